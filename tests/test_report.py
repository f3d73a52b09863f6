"""What people look at: tables, drift.png, report.html, the card; all made of drift.json alone."""

from __future__ import annotations

import io
import json
import re
import shlex
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Run
from f2gguf.evals.conversion import NOT_CHECKED
from f2gguf.evals.drift import Group, drift, judge
from f2gguf.evals.texts import EvalText
from f2gguf.quantize.release.write import write_release
from f2gguf.quantize.repair.corpus import CorpusDrift
from f2gguf.quantize.repair.recipe import Recipe
from f2gguf.quantize.report import picture as report_plot
from f2gguf.quantize.report.card import model_card
from f2gguf.quantize.report.page import report_html
from f2gguf.quantize.report.picture import draw
from f2gguf.quantize.report.report import (
    Conversion,
    File,
    Measured,
    Performance,
    Report,
    Source,
    Texts,
    VariantInputs,
    read_report,
    write_report,
)
from f2gguf.quantize.report.tables import (
    corpus_line,
    corpus_tables,
    drift_rows,
    files_table,
    groups_table,
    report_lines,
    worst_texts,
)
from f2gguf.runtime.errors import InputError
from f2gguf.runtime.fit.devices import Work
from f2gguf.runtime.fit.memory import ContextMemory, Memory, ModelMemory

LANGUAGES = ("de", "en", "ja")
TEXTS = tuple(
    text
    for i, language in enumerate(LANGUAGES)
    for text in (
        EvalText(f"{language}-query", "query", language, f"question {i}", (f"{language}-document",)),
        EvalText(f"{language}-document", "document", language, f"answer {i}"),
    )
)
REFERENCE = np.random.default_rng(0).standard_normal((len(TEXTS), 16))
RECIPE = Recipe(
    "Q4_0",
    types={"token_embd.weight": "Q8_0"},
    exponents={"blk.0.attn_norm": (0.5, 0.25)},
    imatrix_sha256="1" * 64,
    calibration_sha256="2" * 64,
    n_calibration_texts=311,
    versions={"llama-cpp-python": "0.3.36"},
)
CONTEXT = ContextMemory(1000, 1000, 2000, 2000)
LINES = ("importance matrix over 311 texts", "1 tensor promoted: token_embd.weight to Q8_0")


def verdict_of(noise: float, size_bytes: int, *, recipe: Recipe = RECIPE, max_drift: float = 0.02) -> Measured:
    """A real verdict: more noise, more drift; the texts of ja have three times as much."""
    rng = np.random.default_rng(1)
    scale = np.array([3.0 if text.language == "ja" else 1.0 for text in TEXTS])[:, None]
    candidate = REFERENCE + noise * scale * rng.standard_normal(REFERENCE.shape)
    verdict = vars(judge(candidate, REFERENCE, TEXTS, dims=(4, 8, 16), max_drift=max_drift))
    inputs = VariantInputs("f" * 64, max_drift)
    return Measured(**verdict, size_bytes=size_bytes, recipe=recipe, recipe_lines=LINES, inputs=inputs)


def file_of(name: str, size_bytes: int) -> File:
    return File(f"model-{name}.gguf", size_bytes, name.lower() * 8)


def performance_of(size_bytes: int, products: int | None) -> Performance:
    memory = Memory(size_bytes, 0, 1000, 2000, 10_000_000, vram_bytes=size_bytes + 3000, host_bytes=10_000_000)
    return Performance(memory, Work(8, products, size_bytes), 1234.5, "Some CPU, 2 threads")


PERFORMANCE = {
    "F16": performance_of(2_000_000, None),
    "Q2": performance_of(40 * 10**9, 1_000_000),
    "Q4_0": performance_of(600_000, 1_000_000),
}


def report_with(**changes: Any) -> Report:
    """Q4_0 was repaired until it held the bound; Q2 is over it."""
    report = Report(
        model="a<b>&c",
        made_with={"f2gguf": "0.1.0"},
        source=Source(
            repo="org/model",
            revision="abc",
            sha256="0" * 64,
            architecture="qwen3",
            n_parameters=1_000_000,
            pooling="last",
            prompts={"query": "Instruct: find\nQuery: ", "document": ""},
            dims=(4, 8, 16),
            max_tokens=512,
            eos_token="<|im_end|>",
            license="apache-2.0",
            languages=LANGUAGES,
            cache_bytes=2048,
        ),
        texts=Texts(len(TEXTS), "9" * 64, tuple(text.id for text in TEXTS), LANGUAGES, len(TEXTS), "8" * 64),
        max_drift=0.02,
        conversion=Conversion(NOT_CHECKED, why="no torch"),
        files={"F16": file_of("F16", 2_000_000), "Q4_0": file_of("Q4_0", 600_000), "Q2": file_of("Q2", 400_000)},
        variants={"Q4_0": verdict_of(0.03, 600_000), "Q2": verdict_of(0.3, 400_000, recipe=Recipe("Q2"))},
        stock={"Q4_0": verdict_of(0.2, 562_500, recipe=Recipe("Q4_0"))},
        model_memory=ModelMemory(10_000_000, CONTEXT, CONTEXT, CONTEXT),
        performance=PERFORMANCE,
    )
    return replace(report, **changes)


@pytest.fixture
def report() -> Report:
    return report_with()


def without_extras(**changes: Any) -> Report:
    """As a run without repairs leaves it: one variant, no stock figures, no importance matrix."""
    return report_with(stock={}, variants={"Q2": replace(verdict_of(0.3, 400_000, recipe=Recipe("Q2")), **changes)})


def drawn(report: Report, file_format: str = "svg") -> bytes:
    file = io.BytesIO()
    draw(report, file, file_format=file_format)
    return file.getvalue()


def words(svg: bytes) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg.decode())


class Page(HTMLParser):
    """The tags of a page, which must close as they open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_verdict_keeps_every_texts_drift_in_their_order() -> None:
    candidate = REFERENCE + 0.1 * np.random.default_rng(2).standard_normal(REFERENCE.shape)
    verdict = judge(candidate, REFERENCE, TEXTS)
    np.testing.assert_array_equal(verdict.drifts, drift(candidate, REFERENCE))
    assert verdict.as_dict()["drifts"] == [round(value, 6) for value in verdict.drifts]


def test_a_repaired_file_stands_above_what_the_stock_recipe_gives(report: Report) -> None:
    rows = drift_rows(report)
    assert [row[0] for row in rows] == ["F16", "Q4_0", "Q4_0 stock", "Q2"]
    assert [row[1] for row in rows] == ["2.0 MB", "600.0 kB", "562.5 kB", "400.0 kB"]
    assert [row[-1] for row in rows] == ["", "under 2%", "OVER 2%", "OVER 2%"]


def test_bits_per_weight_are_the_files_bits_over_the_parameters(report: Report) -> None:
    table = files_table(report)
    assert [row[table.header.index("bits per weight")] for row in table.rows] == ["16.00", "4.80", "4.50", "3.20"]


def test_ndcg_is_shown_with_its_change() -> None:
    table = files_table(without_extras(ndcg10=0.45, ndcg10_reference=0.5))
    assert [table.rows[i][table.header.index("change")] for i in (0, 1)] == ["", "-10.00%"]


def test_what_was_not_measured_is_left_empty_and_is_no_nan(tmp_path: Path) -> None:
    """A model that claims only languages without a query among the texts has no nDCG; strict parsers read no NaN."""
    documents = [text for text in TEXTS if text.kind == "document"]
    verdict = judge(REFERENCE[:3], REFERENCE[3:], documents)
    assert (verdict.ndcg10, verdict.ndcg10_reference, verdict.top10_overlap) == (None, None, None)
    nothing = {"ndcg10": None, "ndcg10_reference": None, "top10_overlap": None, "spearman": None}
    report = without_extras(**nothing)
    assert drift_rows(report)[1][-3:-1] == ["", ""]
    assert "ndcg_at_10" not in model_card(report)
    write_report(tmp_path, report)
    assert "NaN" not in (tmp_path / "drift.json").read_text()


def test_groups_are_marked_as_the_verdict_names_them_the_worst_first(report: Report) -> None:
    table = groups_table(report, "language")
    assert table.header == ("language", "texts", "Q4_0", "Q4_0 stock", "Q2")
    assert table.rows[0][:2] == ["ja", "2"]
    for row in table.rows:
        marked = [cell.endswith(" OVER") for cell in row[2:]]
        verdicts = [report.variants["Q4_0"], report.stock["Q4_0"], report.variants["Q2"]]
        assert marked == [verdict.languages[row[0]].mean >= 0.02 for verdict in verdicts]
        assert marked == [any(f"language {row[0]} " in over for over in verdict.over) for verdict in verdicts]


def test_worst_texts_begin_with_the_verdicts_worst(report: Report) -> None:
    verdict, table = report.variants["Q2"], worst_texts(report, "Q2")
    assert table.rows[0] == [verdict.worst_text, f"{verdict.worst:.3%}"]
    assert len(table.rows) == len(TEXTS)


@pytest.mark.parametrize("file_format", ["png", "svg"])
def test_the_same_report_draws_the_same_bytes(report: Report, file_format: str, tmp_path: Path) -> None:
    write_report(tmp_path, report)
    stored = read_report(tmp_path)
    write_report(tmp_path, stored)
    assert drawn(stored, file_format) == drawn(read_report(tmp_path), file_format)


def test_what_is_stated_follows_from_the_rounded_figures(tmp_path: Path) -> None:
    """0.0199999999 is under the bound, and rounded to a millionth it is at the bound."""
    groups = {"de": Group(2, 0.0150499996), "en": Group(2, 0.0199999999), "ja": Group(2, 0.02000000001)}
    report = without_extras(languages=groups, kinds={}, upper=0.0123450004)
    write_report(tmp_path, report)
    stored = read_report(tmp_path).variants["Q2"]
    assert stored.over == ("language en 2.00%", "language ja 2.00%")
    assert json.loads((tmp_path / "drift.json").read_text())["variants"]["Q2"]["over"] == list(stored.over)


def test_a_report_is_read_as_it_was_written(report: Report, tmp_path: Path) -> None:
    write_report(tmp_path, report)
    stored = read_report(tmp_path)
    assert stored.as_dict() == report.as_dict()
    assert (stored.source, stored.texts, stored.files) == (report.source, report.texts, report.files)
    assert stored.variants["Q4_0"].recipe == RECIPE


def test_a_report_of_a_version_that_knew_no_corpus_is_read(report: Report, tmp_path: Path) -> None:
    write_report(tmp_path, report)
    document = json.loads((tmp_path / "drift.json").read_text())
    for verdict in (*document["variants"].values(), *document["stock"].values()):
        del verdict["corpus"], verdict["inputs"]["held_out_sha256"]
    (tmp_path / "drift.json").write_text(json.dumps(document))
    assert read_report(tmp_path).as_dict() == report.as_dict()


def test_a_report_of_a_version_that_measured_no_speed_is_read(report: Report, tmp_path: Path) -> None:
    write_report(tmp_path, report)
    document = json.loads((tmp_path / "drift.json").read_text())
    del document["model_memory"], document["performance"]
    (tmp_path / "drift.json").write_text(json.dumps(document))
    old = read_report(tmp_path)
    assert (old.performance, old.performances) == (None, {})
    assert "What fits where" not in model_card(old)


def test_card_says_what_fits_where_and_how_fast_it_was(report: Report) -> None:
    card = model_card(report)
    assert "| Q4_0 | 600.0 kB | 4.80 |" in card
    assert "| 1,234.5 | q4_0q4_0q4_0 |" in card
    assert "Texts/s: the evaluation texts, once, when the file was measured, on Some CPU, 2 threads." in card
    assert "| Q4_0 | 10.6 MB | 600.0 kB | 603.0 kB | 10.0 MB |" in card
    rows = {line.split(" | ")[0][2:]: line.split(" | ")[2:] for line in card.splitlines() if line.startswith("| RTX")}
    f16, q4_0, q2 = rows["RTX 4090"]
    assert f16 == "fits", "nothing is known of 16-bit weights"
    assert re.fullmatch(r"about [\d,]+ tokens/s", q4_0), "reading so few bytes takes no time"
    assert q2 == "too large |"


def test_tables_of_a_corpus_name_it(report: Report) -> None:
    drift = CorpusDrift(300, 0.00912, 0.0088, 0.0095, 0.02, 0.03, 0.04, "row|7", "my|own.jsonl")
    report = replace(report, variants={**report.variants, "Q4_0": replace(report.variants["Q4_0"], corpus=drift)})
    (table,) = corpus_tables(report)
    assert table.caption == "Drift on your corpus (300 held-out texts of my|own.jsonl)"
    assert table.rows == [["Q4_0", "0.912%", "0.880% to 0.950%", "3.000%", "4.000%", "row|7"]]
    assert "| 4.000% | row\\|7 |" in model_card(report)
    assert f"{table.caption}:" in report_lines(report)
    assert corpus_line(drift).startswith("on your corpus: mean drift 0.912% (0.880% to 0.950%) over 300 held-out texts")


@pytest.mark.parametrize("content", ["[]", "{", "null", '{"model": 1}', '{"model": "x", "variants": {"Q8_0": []}}', ""])
def test_what_is_no_report_is_one_error(content: str, tmp_path: Path) -> None:
    (tmp_path / "drift.json").write_text(content)
    with pytest.raises(InputError, match=r"drift\.json: is damaged, .*quantize all"):
        read_report(tmp_path)


def test_the_picture_names_every_variant_language_width_and_the_bound(report: Report) -> None:
    found = words(drawn(report))
    assert {*LANGUAGES, "4", "8", "16", "bound, 2%", "stock recipe"} <= set(found)
    assert found.count("Q4_0") == found.count("Q2") == 3  # legend, row, point


def test_points_at_one_place_all_keep_their_names(report: Report) -> None:
    same = report.variants["Q2"]
    names = ("Q2", "Q3", "Q4_0", "Q5", "Q6", "Q7")
    found = words(drawn(replace(report, variants=dict.fromkeys(names, same), stock={"Q4_0": same})))
    assert all(found.count(name) == 3 for name in names)


def test_a_report_without_stock_recipe_and_widths_is_drawn() -> None:
    found = words(drawn(without_extras(dims={16: 0.5})))
    assert "Every text's drift (mark: the mean)" in found
    assert not {"stock recipe", "Mean drift by Matryoshka dimension"} & set(found)


def test_drifts_of_zero_and_below_are_drawn() -> None:
    """Rounding makes 1 - cosine of equal vectors 0 or -0.000001, and the axis is logarithmic."""
    verdict = judge(REFERENCE, REFERENCE, TEXTS, dims=(8, 16))
    drifts = (-1e-6, *verdict.drifts[1:])
    plain = without_extras(mean=-1e-6, drifts=drifts, languages=verdict.languages, dims=verdict.dims)
    assert "0.0001%" in words(drawn(plain))


def test_page_is_one_file_without_script(report: Report) -> None:
    text = report_html(report)
    page = Page(text)
    assert page.open == []
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in page.tags}
    references = [value for _, attributes in page.tags for name, value in attributes.items() if "href" in name]
    assert all(value and value.startswith("#") for value in references)
    assert "src=" not in text
    assert set(re.findall(r"url\((.)", text)) <= {"#"}
    assert "@import" not in text


def test_page_says_at_a_glance_what_holds_and_gives_every_table_a_header(report: Report) -> None:
    page = Page(report_html(report))
    assert "1 of 2 variants hold the bound of 2%." in page.text
    assert "✓ Q4_0, under 2%" in page.text
    assert "✗ Q2, OVER 2%" in page.text
    assert [tag for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)][:3] == ["h1", "h2", "h2"]
    assert all(attributes.get("scope") in ("col", "row") for tag, attributes in page.tags if tag == "th")
    n_tables = sum(tag == "table" for tag, _ in page.tags)
    assert (
        n_tables == sum(tag == "caption" for tag, _ in page.tags) == 12
    )  # files, memory, devices, 4 of groups, 2 of texts, 3 of origin


def test_page_tells_recipe_worst_texts_and_origin(report: Report) -> None:
    text = Page(report_html(report)).text
    for said in (*LINES, "token_embd.weight: Q8_0", "exponents 0.5 of activations", "1" * 64, "2" * 64):
        assert said in text
    for said in ("org/model", "abc", "9" * 64, "Made with f2gguf", "not checked (no torch)", "ja-document"):
        assert said in text


def test_whatever_the_report_holds_is_escaped(report: Report) -> None:
    ids = ("<script>alert(1)</script>", *report.texts.ids[1:])
    verdict = replace(report.variants["Q4_0"], recipe_lines=("<img src=x>",))
    text = report_html(replace(report, texts=replace(report.texts, ids=ids), variants={"Q4_0": verdict}))
    assert "<script" not in text
    assert "<img" not in text
    assert "<h1>a&lt;b&gt;&amp;c</h1>" in text
    assert Page(text).open == []


def test_card_shows_picture_recipe_and_stock(report: Report) -> None:
    card = model_card(report)
    assert "](drift.png)" in card
    assert "| Q4_0 stock | 562.5 kB | 4.50 |" in card
    assert "- 1 tensor promoted: token_embd.weight to Q8_0" in card
    assert "| dimensions | Q4_0 | Q4_0 stock | Q2 |" in card
    assert "| ja | 2 | " in card


@pytest.mark.parametrize("prompt", ["it's a query: ", 'say "query": ', "a\\b\nQuery: ", "$HOME `date` {x}: "])
def test_curl_of_the_card_sends_any_prompt_as_it_is(report: Report, prompt: str) -> None:
    card = model_card(replace(report, source=replace(report.source, prompts={"query": prompt})))
    command = shlex.split(re.search(r"^(curl .*?)```", card, re.DOTALL | re.MULTILINE)[1].replace("\\\n", " "))  # type: ignore[index]
    assert json.loads(command[command.index("-d") + 1])["input"] == f"{prompt}what is a GGUF file?"


def test_without_matplotlib_the_extra_is_named_and_no_old_picture_stays(
    report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_report(tmp_path, report)
    assert tmp_path / "drift.png" in write_release(tmp_path, report)
    monkeypatch.setattr(report_plot, "find_spec", lambda _name: None)
    paths = write_release(tmp_path, report)
    assert {path.name for path in paths} == {"README.md", "Modelfile", "report.html", "SHA256SUMS"}
    assert {path.name for path in tmp_path.iterdir()} == {"drift.json", *(path.name for path in paths)}
    assert "pip install 'f2gguf[plots]'" in capsys.readouterr().err
    assert "pip install 'f2gguf[plots]'" in Page((tmp_path / "report.html").read_text()).text
    for name in ("README.md", "SHA256SUMS"):
        assert "drift.png" not in (tmp_path / name).read_text()


def test_a_report_before_its_first_variant_still_has_page_and_card() -> None:
    report = report_with(variants={}, stock={}, performance=None, files={"F16": file_of("F16", 2_000_000)})
    assert "0 of 0 variants" in Page(report_html(report)).text
    assert "| F16 | 2.0 MB | 16.00 | reference |" in model_card(report)


def test_card_of_a_report_of_another_shape_is_an_error_that_says_what_to_run(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "f2llm-nano" / "drift.json"
    path.parent.mkdir()
    path.write_text('{"model": "f2llm-nano", "variants": {}, "files": {"F16": {}}}')
    process = run("quantize", "card", "f2llm-nano", "--out", tmp_path)
    assert process.returncode == 1
    assert f"error: {path}: is damaged" in process.stderr
    assert "Run `quantize all`" in process.stderr
