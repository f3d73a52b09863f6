"""`f2gguf bench`: sides, figures, texts. Which side is faster is no test's business."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import NANO
from conftest import Run, run_command
from endpoint import KEY, Api
from f2gguf.evals.bench import report as bench_report
from f2gguf.evals.bench import run as bench
from f2gguf.evals.bench.process import SideProcess, started
from f2gguf.evals.bench.sides import LLAMA_EMBED, LLAMA_SERVER, OURS, SideSettings, peak_rss_bytes
from f2gguf.evals.bench.texts import make_workloads
from f2gguf.runtime import Embedder
from f2gguf.runtime.errors import BenchFailed, ExtraMissing
from f2gguf.runtime.gguf.header import read_header

OWN_TEXTS = ["an archiver for zip files", "a chess engine", "", "a chess engine"]
# the part of llama-server that the bench uses: a text's vector is its length and one
FAKE_SERVER = """#!{python}
import base64, http.server, json, struct, sys

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.reply({{"status": "ok"}})

    def do_POST(self):
        texts = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["input"]
        rows = [base64.b64encode(struct.pack("<2f", len(text), 1)).decode() for text in texts]
        self.reply({{"data": [{{"index": i, "embedding": row}} for i, row in reversed(list(enumerate(rows)))]}})

    def reply(self, answer):
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def settings_for(path: Path, **changes: Any) -> SideSettings:
    return SideSettings(
        **({"model": str(path), "pooling": "last", "device": "cpu", "n_threads": 1, "n_ctx": 512} | changes)
    )


def running(words: str) -> list[str]:
    processes = subprocess.run(["ps", "-axwwo", "args"], capture_output=True, text=True, check=True).stdout
    return [line for line in processes.splitlines() if words in line]


@pytest.fixture(scope="module")
def outcome(nano_f16: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    """One small run of the command: its process, and the picture that it wrote."""
    folder = tmp_path_factory.mktemp("bench")
    (folder / "own.txt").write_text("\n".join(OWN_TEXTS))
    arguments = ("--texts", "4", "--rounds", "2", "--input", folder / "own.txt", "-o", folder / "bench.png", "--json")
    return run_command("f2gguf", "bench", "-m", nano_f16, *arguments), folder / "bench.png"


@pytest.fixture(scope="module")
def report(outcome: tuple[subprocess.CompletedProcess[str], Path]) -> dict[str, Any]:
    process, _ = outcome
    assert process.returncode == 0, process.stderr
    figures: dict[str, Any] = json.loads(process.stdout)
    return figures


def test_every_side_has_positive_figures_for_every_workload(report: dict[str, Any]) -> None:
    assert list(report["work"]) == ["documents", "queries", "input"]
    for work in report["work"].values():
        assert list(work["sides"]) == [OURS, LLAMA_EMBED]
        for side in work["sides"].values():
            assert min(side[name] for name in ("median_s", "texts_per_s", "tokens_per_s", "ratio")) > 0
            assert len(side["rounds_s"]) == 2


def test_ratio_is_the_quotient_of_the_medians(report: dict[str, Any]) -> None:
    for work in report["work"].values():
        ours, theirs = (statistics.median(work["sides"][name]["rounds_s"]) for name in (OURS, LLAMA_EMBED))
        assert work["sides"][LLAMA_EMBED]["ratio"] == pytest.approx(theirs / ours)
        assert work["sides"][LLAMA_EMBED]["tokens_per_s"] == pytest.approx(work["n_tokens"] / theirs)
        assert work["sides"][OURS]["ratio"] == 1


def test_both_sides_give_the_same_vectors(report: dict[str, Any]) -> None:
    # the same F16 file in two batch layouts: 0.9999998 was seen
    assert min(work["sides"][LLAMA_EMBED]["min_cosine"] for work in report["work"].values()) > 0.9999


def test_memory_is_that_of_each_process_alone(report: dict[str, Any]) -> None:
    peaks = {name: side["peak_rss_bytes"] for name, side in report["sides"].items()}
    assert min(peaks.values()) > Path(report["model"]["path"]).stat().st_size
    assert report["sides"][LLAMA_EMBED]["rss_ratio"] == pytest.approx(peaks[OURS] / peaks[LLAMA_EMBED])


def test_queries_stand_behind_the_prompt_and_documents_do_not(report: dict[str, Any], nano: Embedder) -> None:
    assert report["work"]["documents"]["prompt"] == ""
    assert report["work"]["queries"]["prompt"] == nano.prompts["query"]


def test_the_users_empty_and_equal_texts_are_left_out(report: dict[str, Any], nano: Embedder) -> None:
    assert report["work"]["input"]["n_texts"] == 2
    assert report["work"]["input"]["n_tokens"] == sum(len(nano.tokenize(text)) for text in OWN_TEXTS[:2])


def test_the_picture_is_a_png_and_its_path_goes_to_stderr(
    outcome: tuple[subprocess.CompletedProcess[str], Path],
) -> None:
    import matplotlib.image

    process, picture = outcome
    assert process.stderr.splitlines()[-1] == str(picture)
    height, width, _ = matplotlib.image.imread(picture).shape
    assert width > height > 200


def test_tables_name_every_side_workload_and_ratio(report: dict[str, Any]) -> None:
    lines = "\n".join(bench_report.report_lines(report))
    for name, work in report["work"].items():
        assert f"{name}: {work['n_texts']} texts, {work['n_tokens']:,} tokens" in lines
        assert f"{work['sides'][LLAMA_EMBED]['ratio']:.2f}x" in lines
    assert f"{report['sides'][LLAMA_EMBED]['rss_ratio']:.0%}" in lines


def test_json_and_svg_files_can_be_written(report: dict[str, Any], tmp_path: Path) -> None:
    for name in ("bench.json", "bench.svg"):
        bench_report.write_report(tmp_path / name, report)
    assert json.loads((tmp_path / "bench.json").read_text()) == report
    assert "Llama.embed" in (tmp_path / "bench.svg").read_text()


@pytest.mark.parametrize("model", ["nano", "minilm"])
def test_texts_have_the_asked_lengths_and_are_all_different(model: str, request: pytest.FixtureRequest) -> None:
    embedder: Embedder = request.getfixturevalue(model)
    documents, queries = make_workloads(
        embedder.header, ["documents", "queries"], n_texts=40, seed=1, input_path=None, column="text"
    )
    for work, fewest, most, n_texts in ((documents, 8, 256, 40), (queries, 4, 16, 160)):
        lengths = [len(embedder.tokenize(text)) for text in work.texts]
        assert fewest <= min(lengths) < (fewest + most) / 2 < max(lengths) <= most
        assert len(set(work.texts)) == len(work.texts) == n_texts
        assert work.n_tokens == sum(len(embedder.tokenize(work.prompt + text)) for text in work.texts)


def test_the_same_seed_gives_the_same_texts(nano: Embedder) -> None:
    options: dict[str, Any] = {"n_texts": 4, "input_path": None, "column": "text"}
    first, again, other = (make_workloads(nano.header, ["queries"], seed=seed, **options) for seed in (1, 1, 2))
    assert first == again != other


def test_long_texts_of_the_user_are_cut_before_any_side_sees_them(minilm: Embedder, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("word " * 1000)
    options: dict[str, Any] = {"n_texts": 1, "seed": 0, "column": "text"}
    (own,) = make_workloads(minilm.header, ["input"], input_path=str(tmp_path / "long.txt"), **options)
    assert minilm.max_seq_length - 2 <= own.longest <= minilm.max_seq_length


@pytest.mark.slow
def test_transformers_side_runs_the_checkpoint(nano_f16: Path, nano: Embedder) -> None:
    texts = ["a chess engine", "an archiver for zip files"]
    name = "sentence-transformers float32"
    with started({name: settings_for(nano_f16, checkpoint=str(NANO))}) as sides:
        assert "cpu, 1 threads" in sides[name].answer()["setup"]
        vectors = sides[name].ask(texts=texts, prompt=nano.prompts["query"], with_vectors=True)["vectors"]
    cosines = (vectors * nano.encode_query(texts)).sum(axis=1)
    assert cosines.min() > 0.9999  # the bound of conversion


def test_server_side_keeps_the_order_of_texts_and_ends_its_server(nano_f16: Path, tmp_path: Path) -> None:
    server = executable(tmp_path / "fake-server", FAKE_SERVER.format(python=sys.executable))
    with started({LLAMA_SERVER: settings_for(nano_f16, llama_server=str(server))}) as sides:
        assert "--embedding --pooling last" in sides[LLAMA_SERVER].answer()["setup"]
        texts = ["x" * n for n in range(200)]
        answer = sides[LLAMA_SERVER].ask(texts=texts, prompt="12345", with_vectors=True)
        assert running(str(server))
    np.testing.assert_array_equal(answer["vectors"][:, 0], np.arange(200) + 5)
    assert answer["seconds"] > 0
    assert not running(str(server))


@pytest.mark.slow
def test_a_url_is_a_side_without_known_memory(
    api: Api, run: Run, nano_f16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("URL_KEY", KEY)
    (tmp_path / "own.txt").write_text("\n".join(OWN_TEXTS))
    url = ("--url", f"{api.url}/embeddings?version=1", "--url-model", "nano", "--api-key-env", "URL_KEY")
    texts = ("--work", "input", "--input", tmp_path / "own.txt", "--rounds", "1")
    picture = ("-o", tmp_path / "bench.svg")
    process = run("f2gguf", "bench", "-m", nano_f16, *texts, *url, *picture, "--device", "cpu", "--json")
    assert process.returncode == 0, process.stderr
    report = json.loads(process.stdout)
    name = f"{api.url}/embeddings nano"
    assert list(report["sides"]) == [OURS, LLAMA_EMBED, name]
    assert (report["sides"][name]["peak_rss_bytes"], report["sides"][name]["rss_ratio"]) == (None, None)
    assert report["work"]["input"]["sides"][name]["min_cosine"] > 0.9999
    assert "not known" in (tmp_path / "bench.svg").read_text()
    assert "not known here" in "\n".join(bench_report.report_lines(report))
    for request in api.requests:
        assert (request["path"], request["model"]) == ("/v1/embeddings?version=1", "nano")
        assert request["key"] == f"Bearer {KEY}"
    assert KEY not in process.stdout + process.stderr


def test_a_side_that_fails_names_itself_and_says_why(api: Api, nano_f16: Path) -> None:
    api.answers = [(401, {})]
    with started({"a server": settings_for(nano_f16, url=api.url)}) as sides:
        sides["a server"].answer()
        with pytest.raises(BenchFailed, match=r"^a server: http.*/embeddings: status 401 .*Check --api-key-env"):
            sides["a server"].ask(texts=["a"], prompt="", with_vectors=True)


def test_url_models_and_keys_stand_for_all_urls_or_for_one_each(nano_f16: Path) -> None:
    header, urls = read_header(nano_f16), ("http://a/v1", "http://b/v1")
    for models, expected in (((), (None, None)), (("x",), ("x", "x")), (("x", "y"), ("x", "y"))):
        sides = list(bench.choose_sides(header, device="cpu", urls=urls, url_models=models).values())[2:]
        assert tuple(side.url_model for side in sides) == expected
        assert tuple(side.url for side in sides) == urls


def test_server_that_does_not_start_is_one_error_with_its_words(nano_f16: Path, tmp_path: Path) -> None:
    server = executable(tmp_path / "server", "#!/bin/sh\necho 'cannot bind' >&2\nexit 3\n")
    with (
        started({LLAMA_SERVER: settings_for(nano_f16, llama_server=str(server))}) as sides,
        pytest.raises(BenchFailed, match=r"^llama-server: .*ended with exit code 3(?s:.*)cannot bind"),
    ):
        sides[LLAMA_SERVER].answer()


def test_side_that_is_killed_is_one_error(nano_f16: Path) -> None:
    with started({LLAMA_EMBED: settings_for(nano_f16)}) as sides:
        sides[LLAMA_EMBED].answer()
        os.kill(sides[LLAMA_EMBED].pid, signal.SIGKILL)
        with pytest.raises(BenchFailed, match=r"Llama.embed: its process ended early \(signal SIGKILL\)"):
            sides[LLAMA_EMBED].ask(texts=["a"], prompt="", with_vectors=False)


def test_only_llama_embed_is_left_out_where_it_cannot_embed(
    nano_f16: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ask = SideProcess.ask

    def ask_or_die(self: SideProcess, **request: Any) -> dict[str, Any]:
        if self.name == dying:
            os.kill(self.pid, signal.SIGILL)
        return ask(self, **request)

    monkeypatch.setattr(SideProcess, "ask", ask_or_die)
    header = read_header(nano_f16)
    sides = bench.choose_sides(header, device="cpu")
    works = make_workloads(header, ["queries"], n_texts=1, seed=0, input_path=None, column=None)
    dying = LLAMA_EMBED
    report = bench.run_bench(header, sides, works, rounds=1)
    assert list(report["sides"]) == list(report["work"]["queries"]["sides"]) == [OURS]
    assert "left out: Llama.embed: its process ended early (signal SIGILL)" in capsys.readouterr().err
    assert bench_report.report_lines(report)
    dying = OURS
    with pytest.raises(BenchFailed, match="f2gguf: its process ended early"):
        bench.run_bench(header, sides, works, rounds=1)


def test_checkpoint_of_another_model_is_an_error() -> None:
    ours, theirs = np.ones((2, 4), dtype=np.float32), np.ones((2, 3), dtype=np.float32)
    with pytest.raises(BenchFailed, match="x: gives vectors of shape"):
        bench._min_cosine("x", ours, theirs)


@pytest.mark.parametrize("value", [0, np.nan, np.inf])
def test_vectors_that_are_none_are_an_error(value: float) -> None:
    ours, theirs = np.ones((2, 4), dtype=np.float32), np.full((2, 4), value, dtype=np.float32)
    with pytest.raises(BenchFailed, match="x: gives vectors that are not finite, or zero"):
        bench._min_cosine("x", ours, theirs)


@pytest.mark.slow
def test_ctrl_c_leaves_no_process(nano_f16: Path, tmp_path: Path) -> None:
    model = tmp_path / "interrupted.gguf"
    model.hardlink_to(nano_f16)
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored in background jobs
        "from f2gguf.quantize.cli import f2gguf; f2gguf()"
    )
    command = [sys.executable, "-c", code, "bench", "-m", str(model), "--work", "queries", "--rounds", "1000"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stderr
    while "Llama.embed" not in process.stderr.readline():
        assert process.poll() is None
    while len(running(str(model))) < 3:  # itself and two sides
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert err.strip().startswith("interrupted: ")
    assert not running(str(model))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc")
def test_peak_memory_of_a_child_does_not_begin_at_its_parents(nano_f16: Path) -> None:
    code = "from f2gguf.evals.bench.sides import peak_rss_bytes; print(peak_rss_bytes())"
    ballast = np.ones(25_000_000)  # 200 MB
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(child.stdout) < ballast.nbytes < (peak_rss_bytes() or 0)


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, nano_f16: Path, tmp_path: Path) -> None:
    for module in (bench, bench_report):
        monkeypatch.setattr(module, "find_spec", lambda _name: None)
    with pytest.raises(ExtraMissing, match="pip install 'f2gguf\\[plots\\]'"):
        bench_report.require_output(tmp_path / "x.png", force=False)
    with pytest.raises(ExtraMissing, match="pip install sentence-transformers torch"):
        bench.choose_sides(read_header(nano_f16), checkpoint=NANO, device="cpu")


BAD_CALLS = [
    ([], 2, "no model: pass -m MODEL"),
    (["-m", "absent.gguf"], 1, "absent.gguf: no such file"),
    (["-m", "{nano}", "--work", "docs"], 2, "Did you mean 'documents'?"),
    (["-m", "{nano}", "--work", "input"], 2, "--work input: name its texts with --input FILE"),
    (["-m", "{nano}", "--input", "{dir}/empty.txt"], 2, "empty.txt: holds no text (--input)"),
    (["-m", "{nano}", "--device", "cude"], 2, "Did you mean 'cuda'?"),
    (["-m", "{nano}", "--pooling", "max"], 2, "no pooling is called 'max'"),
    (["-m", "{nano}", "--llama-server", "{dir}/absent"], 2, "absent: no such program (--llama-server)"),
    (["-m", "{nano}", "--server-flags", "-np 2"], 2, "--server-flags: name the program as well"),
    (["-m", "{nano}", "--llama-server", "sh", "--server-flags", "'"], 2, "No closing quotation"),
    (["-m", "{nano}", "--checkpoint", "{dir}"], 2, "is no checkpoint folder, it has no config.json (--checkpoint)"),
    (["-m", "{nano}", "--url", "host/v1"], 2, "host/v1: is no URL of an API"),
    (["-m", "{nano}", "--url", "http://[::1"], 2, "http://[::1: is no URL of an API"),
    (["-m", "{nano}", "--url", "http://a", "--api-key-env", "NO_SUCH_KEY"], 2, "NO_SUCH_KEY: the environment variable"),
    (["-m", "{nano}", "--url-model", "x"], 2, "--url-model: give it once for all URLs, or once for each --url"),
    (["-m", "{nano}", "-o", "{dir}/x.pdf"], 2, "no output format is called '.pdf'"),
    (["-m", "{nano}", "-o", "{dir}/there.png"], 1, "there.png: exists already. Pass --force"),
]


@pytest.mark.parametrize(("arguments", "exit_code", "message"), BAD_CALLS)
def test_mistakes_get_one_clear_error(
    run: Run, nano_f16: Path, tmp_path: Path, arguments: list[str], exit_code: int, message: str
) -> None:
    for name in ("empty.txt", "there.png"):
        (tmp_path / name).touch()
    process = run(
        "f2gguf", "bench", *(a.replace("{nano}", str(nano_f16)).replace("{dir}", str(tmp_path)) for a in arguments)
    )
    assert message in process.stderr
    assert (process.returncode, process.stdout) == (exit_code, "")
    assert process.stderr.startswith("error: ")
    assert "Traceback" not in process.stderr


def executable(path: Path, content: str) -> Path:
    path.write_text(content)
    path.chmod(0o755)
    return path
