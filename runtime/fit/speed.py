"""How fast a file runs here: a sample of a few of its layers, by the engine that would run it."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from f2gguf.runtime.errors import GGUFError

if TYPE_CHECKING:
    from f2gguf.runtime.llama.engine import Engine

N_IDS = 4096  # first tokens of the vocabulary, which a sample's texts are made of
MIX = (8, 256)  # tokens of the shortest and the longest document, as in `f2gguf bench`
QUERY_TOKENS = 10  # of a query without its prompt: the middle of those of `f2gguf bench`
_FEWEST, _MOST = 4, 64  # documents of a round
_DOCUMENTS_S, _QUERIES_S = 0.8, 0.3  # of measuring, for each file
_ROUNDS = 3  # about
_BYTES_A_TOKEN = 4  # of a prompt, about
_PROSE = "A lighthouse keeper trims the lamp at dusk, winds the clockwork, and writes the weather down. " * 8


@dataclass(frozen=True)
class Excerpt:
    """A file with the first layers of a model."""

    path: str
    share: float  # of the model's layers
    prompt_bytes: int  # of the query's prompt, which is computed once and kept


@dataclass(frozen=True)
class Speed:
    """What a whole file does: tokens of documents in a second, and a query by itself. None: not known."""

    tokens_per_s: float | None
    query_ms: float | None


def sample_speed(excerpt: Excerpt, *, pooling: str, n_threads: int, n_tokens: int | None) -> Speed:
    """Time an excerpt in a process of its own, and give the speed of the whole file.

    Documents have `n_tokens` each, or the lengths of `f2gguf bench`. Raises `GGUFError` where it does not run.
    """
    settings = {"device": "auto", "n_threads": n_threads, "pooling": pooling}
    arguments = {"excerpt": asdict(excerpt), "settings": settings, "n_tokens": n_tokens}
    command = [sys.executable, "-P", "-c", "from f2gguf.runtime.fit.speed import main; main()", json.dumps(arguments)]
    process = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if process.returncode:
        reason = (process.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise GGUFError(f"{excerpt.path}: its speed cannot be sampled: {reason}")
    return Speed(**json.loads(process.stdout.splitlines()[-1]))


def main() -> None:
    """Print, as JSON, the speed of what the first argument describes."""
    from f2gguf.runtime.gguf.header import read_header
    from f2gguf.runtime.llama.context import ComputeSettings
    from f2gguf.runtime.llama.engine import Engine
    from f2gguf.runtime.llama.tokenizer import Tokenizer, own_tokenizer

    arguments = json.loads(sys.argv[1])
    excerpt = Excerpt(**arguments["excerpt"])
    header = read_header(excerpt.path)
    most, n_tokens = header.max_tokens, arguments["n_tokens"]
    settings = ComputeSettings(n_gpu_layers=-1, max_tokens=most, deterministic=False, **arguments["settings"])
    engine = Engine(header, settings)
    seconds_a_token = _tokenizing(Tokenizer(engine.model, own_tokenizer(header)))
    lengths = [min(n, most) for n in ([n_tokens] if n_tokens else MIX)]
    print(json.dumps(asdict(_speed(engine, excerpt, lengths, seconds_a_token))))
    engine.close()


def _tokenizing(tokenizer: Any) -> float:
    """Seconds that splitting a text takes, for each of its tokens."""
    n_tokens = len(tokenizer(_PROSE)[0])
    return _median(lambda: tokenizer(_PROSE), 0.05) / n_tokens


def _speed(engine: Engine, excerpt: Excerpt, lengths: Sequence[int], seconds_a_token: float) -> Speed:
    import numpy as np

    generator = np.random.default_rng(0)
    n_ids = min(N_IDS, engine.model.n_vocab)

    def made(n_tokens: int) -> Any:
        return generator.integers(0, n_ids, n_tokens).astype(np.int32)

    def run(texts: Sequence[Any], n_shared: int = 0) -> None:
        engine.embed(texts, n_shared=n_shared, on_batch=lambda _: None)

    def documents(n_texts: int) -> list[Any]:
        return [made(int(n)) for n in np.linspace(lengths[0], lengths[-1], n_texts)]

    texts = documents(_FEWEST if lengths[-1] <= MIX[1] else 1)
    run(texts)
    seconds = _median(lambda: run(texts), 0.0)
    if seconds < _DOCUMENTS_S / _ROUNDS:  # else one run of them is enough
        n_texts = int(np.clip(len(texts) * _DOCUMENTS_S / _ROUNDS / seconds, len(texts), _MOST))
        texts = documents(n_texts)
        seconds = _median(lambda: run(texts), _DOCUMENTS_S)
    n_tokens = sum(map(len, texts))
    seconds = seconds / excerpt.share + n_tokens * seconds_a_token
    prompt = made(excerpt.prompt_bytes // _BYTES_A_TOKEN)
    n_shared = len(prompt) if engine.shares_prefixes else 0
    queries = iter(np.concatenate([prompt, made(QUERY_TOKENS)]) for _ in range(1 << 20))
    run([next(queries)], n_shared)
    query_s = _median(lambda: run([next(queries)], n_shared), _QUERIES_S) / excerpt.share
    query_s += (len(prompt) + QUERY_TOKENS) * seconds_a_token
    return Speed(n_tokens / seconds, 1000 * query_s)


def _median(work: Callable[[], object], at_least_s: float) -> float:
    """The median of some runs of `work`, which together take `at_least_s`."""
    took: list[float] = []
    while not took or sum(took) < at_least_s:
        begin = time.perf_counter()
        work()
        took.append(time.perf_counter() - begin)
    return statistics.median(took)
