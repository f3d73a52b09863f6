"""What goes beside the .gguf files: model card, picture, report, Ollama's Modelfile, checksums."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from f2gguf.evals.report import (
    STOCK_NOTE,
    conversion_sentence,
    dims_table,
    files_table,
    groups_table,
    markdown_table,
    over_lines,
    recipe_lines,
)
from f2gguf.evals.report_html import report_html
from f2gguf.evals.report_plot import can_draw, draw
from f2gguf.quantize.facts import Facts
from f2gguf.runtime.console import say
from f2gguf.runtime.files import format_bound, sha256_file, write_text, writing
from f2gguf.runtime.references import recommended

_PICTURE = "![Drift of every text, size against drift, and mean drift by dimension and language](drift.png)"


def write_release(facts: Facts, folder: Path, report: dict[str, Any]) -> list[Path]:
    """Write what people read beside the files of `report`, and SHA256SUMS; gives their paths.

    drift.png is drawn only where matplotlib is installed, and an older one would show other figures: it goes.
    """
    texts = {
        "README.md": model_card(facts, report),
        "Modelfile": ollama_modelfile(facts, report),
        "report.html": report_html(report),
    }
    for name, text in texts.items():
        write_text(folder / name, text)
    paths = [folder / name for name in (*texts, *_draw(folder / "drift.png", report))]
    files = [*report["files"].values(), *([report["imatrix"]] if "imatrix" in report else [])]
    hashes = {file["file"]: file["sha256"] for file in files}
    hashes |= {path.name: sha256_file(path) for path in (folder / "drift.json", *paths)}
    sums = folder / "SHA256SUMS"
    write_text(sums, "".join(f"{digest}  {name}\n" for name, digest in sorted(hashes.items())))
    return [*paths, sums]


def _draw(path: Path, report: dict[str, Any]) -> list[str]:
    """Draw the picture where that is possible; gives the names of what was drawn."""
    if not can_draw(report):
        path.unlink(missing_ok=True)
        if report["variants"]:
            say(f"{path.name}: not drawn, for want of matplotlib. Run: pip install 'f2gguf[plots]', then quantize card")
        return []
    with writing(path) as part:
        draw(report, part, file_format="png")
    return [path.name]


def ollama_modelfile(facts: Facts, report: dict[str, Any]) -> str:
    file = report["files"][recommended(report)]["file"]
    return f"FROM ./{file}\nPARAMETER num_ctx {facts.max_tokens}\n"


def model_card(facts: Facts, report: dict[str, Any]) -> str:
    """README.md with the YAML front matter of the Hugging Face Hub."""
    file = report["files"][recommended(report)]["file"]
    sections = [
        f"---\n{_front_matter(facts)}\n---",
        f"# {facts.name}, GGUF",
        _introduction(facts),
        "## Files",
        markdown_table(*files_table(report)),
        STOCK_NOTE if report.get("stock") else "",
        _measurement(report),
        "\n".join(f"**{line}.**" for line in over_lines(report)),
        _PICTURE if can_draw(report) else "",
        *(_where_it_drifts(report) if report["variants"] else ()),
        *_recipes(report),
        "## SHA-256",
        markdown_table(("file", "sha256"), [[f["file"], f"`{f['sha256']}`"] for f in report["files"].values()]),
        "## How to run it",
        _usage(facts, file),
        "## The model",
        markdown_table(("", ""), _properties(facts)),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _front_matter(facts: Facts) -> str:
    from huggingface_hub import ModelCardData

    entry = facts.entry
    data = ModelCardData(
        language=list(entry.languages) or None,
        license=entry.license,
        base_model=entry.repo,
        base_model_relation="quantized" if entry.repo else None,
        library_name="gguf",
        pipeline_tag="sentence-similarity",
        tags=["gguf", "llama.cpp", "f2gguf", "sentence-transformers", "feature-extraction"],
    )
    return str(data.to_yaml())


def _introduction(facts: Facts) -> str:
    entry = facts.entry
    where = f"[{entry.repo}](https://huggingface.co/{entry.repo})" if entry.repo else f"the checkpoint {entry.name}"
    at = f" at revision `{entry.revision}`" if entry.revision else ""
    return (
        f"GGUF files of {where}{at} for llama.cpp, each measured: how far its vectors are from the full-precision "
        "model's. The figures stand in the files' own headers too (`f2gguf inspect FILE`)."
    )


def _measurement(report: dict[str, Any]) -> str:
    check = report["conversion"]
    sentence = conversion_sentence(report)
    n_stock = check.get("n_stock_tokenizer_differs", 0)
    stock = (
        f" Stock llama.cpp leaves out the checkpoint's own text normaliser and splits {n_stock} of the test strings "
        "(such as decomposed Unicode) differently; f2gguf runs it."
        if n_stock
        else ""
    )
    texts = report["texts"]
    return (
        f"Drift is 1 - cosine to the F16 file's vector, over {texts['n']} texts in the model's languages "
        f"({', '.join(texts['languages'])}): queries with the prompt, documents, code, long texts, edge cases. The "
        "bound holds when the upper end of the 95% interval, and the mean of every language and kind, are under "
        f"{format_bound(report['max_drift'])}. Conversion: {sentence}.{stock} Everything measured is in `report.html`, "
        "and for programs in `drift.json`."
    )


def _where_it_drifts(report: dict[str, Any]) -> list[str]:
    dims = dims_table(report)
    return [
        f"Mean drift by Matryoshka dimension:\n\n{markdown_table(*dims)}" if len(dims[1]) > 1 else "",
        "<details><summary>Mean drift by language, the worst first</summary>",
        markdown_table(*groups_table(report, "language")),
        "</details>",
    ]


def _recipes(report: dict[str, Any]) -> Iterator[str]:
    """How each variant was made, where the report says."""
    recipes = recipe_lines(report)
    if recipes:
        yield "## How they were made"
    for name, lines in recipes.items():
        yield "\n".join([f"{name}:\n", *(f"- {line}" for line in lines)])


def _usage(facts: Facts, file: str) -> str:
    query = facts.prompts.get("query", "")
    prompt_note = (
        f"Put the prompt before every query (f2gguf does it by itself), none before documents:\n\n```text\n{query}\n```"
        if query
        else "The model needs no prompt."
    )
    server_text = (query + "what is a GGUF file?").replace("\n", "\\n")
    return f"""```bash
pip install f2gguf
f2gguf embed -m {file} --query "what is a GGUF file?"
```

```bash
llama-server -m {file} --embedding
curl http://localhost:8080/v1/embeddings -H "Content-Type: application/json" \\
  -d '{{"input": "{server_text}"}}'
```

```bash
ollama create {facts.name.lower()} -f Modelfile
```

{prompt_note}"""


def _properties(facts: Facts) -> list[list[str]]:
    return [
        ["Architecture", facts.architecture.name],
        ["Parameters", f"{facts.checkpoint.n_parameters:,}"],
        ["Dimensions", ", ".join(map(str, facts.dims))],
        ["Pooling", facts.pooling],
        ["Longest input", f"{facts.max_tokens:,} tokens"],
        ["Closing token", f"`{facts.vocabulary.eos_token}`"],
        ["Licence", facts.entry.license or "see the base model"],
    ]
