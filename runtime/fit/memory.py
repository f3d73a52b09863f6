"""How much memory a file takes, by llama.cpp's own accounting and a process that opens it without its weights.

Nothing is fitted to measurements. Python, libraries, tokenizer and vocabulary are loaded in a process of their own,
which says what it takes. Contexts are made as they would be to compute, but llama.cpp allocates none of their buffers,
and logs what they would take. Weights are the file's own bytes.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from f2gguf.runtime.errors import GGUFError
from f2gguf.runtime.gguf.header import ENCODERS, Header
from f2gguf.runtime.llama.kernels.choice import choose, copied_bytes

if TYPE_CHECKING:
    from f2gguf.runtime.llama.model import Model

MAX_TOKENS = 512  # of the longest text, where the user and the model say no less
QUERY_TOKENS = 32  # of a query by itself, for which there may be a context without flash attention
TABLE = "token_embd.weight"
_MIB = 1 << 20
# What llama.cpp logs of a context: its outputs, its keys and values, and the numbers of a pass
_SIZES = {
    "output": re.compile(r"output buffer size = +([\d.]+) MiB"),
    "kv": re.compile(r"llama_kv_cache\w*: size = +([\d.]+) MiB"),
    "compute": re.compile(r"compute buffer size = +([\d.]+) MiB"),
}


@dataclass(frozen=True)
class ContextMemory:
    """Bytes of a context's buffers. `used` is what of `compute` is written: the pass stops before the LM head."""

    output_bytes: int
    kv_bytes: int
    compute_bytes: int
    used_bytes: int


@dataclass(frozen=True)
class ModelMemory:
    """What opening and running any file of a model takes, besides its weights."""

    base_bytes: int  # Python, libraries, tokenizer and vocabulary
    query: ContextMemory  # of short texts by themselves
    documents: ContextMemory
    on_gpu: ContextMemory  # with the larger batches that a GPU gets


@dataclass(frozen=True)
class Memory:
    """Bytes that a file takes while it embeds documents and single queries."""

    weights_bytes: int  # mapped from the file: the system can drop and read them again
    repacked_bytes: int  # of matrices that are copied in another order for faster kernels
    kv_bytes: int
    compute_bytes: int  # what the passes write, and their outputs
    base_bytes: int  # Python, libraries, tokenizer and vocabulary
    vram_bytes: int  # that a GPU needs: weights, keys and values, and all that the passes reserve
    host_bytes: int  # that the process takes besides, if a GPU has the weights

    @property
    def total_bytes(self) -> int:
        """The peak of resident memory on the CPU."""
        return self.weights_bytes + self.required_bytes

    @property
    def required_bytes(self) -> int:
        """What cannot be read again from the file."""
        return self.repacked_bytes + self.kv_bytes + self.compute_bytes + self.base_bytes


def usual_tokens(header: Header) -> int:
    """Tokens of the longest text, where nobody says another length."""
    return min(header.max_tokens, MAX_TOKENS)


def model_memory(header: Header, *, pooling: str, max_tokens: int | None = None, parallel: int = 1) -> ModelMemory:
    """Ask a process of its own, which opens the file of `header` without its weights.

    `max_tokens` is the length of the longest text, `usual_tokens` by default. With `parallel` requests, long texts and
    the short ones that go before them have a context each.
    """
    longest = max_tokens or usual_tokens(header)
    arguments = {"path": str(header.path), "max_tokens": longest, "parallel": parallel, "pooling": pooling}
    command = [sys.executable, "-P", "-c", "from f2gguf.runtime.fit.memory import main; main()", json.dumps(arguments)]
    process = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if process.returncode:
        reason = (process.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise GGUFError(f"{header.path}: its memory cannot be planned: {reason}")
    content = json.loads(process.stdout.splitlines()[-1])
    contexts = {name: ContextMemory(**content[name]) for name in ("query", "documents", "on_gpu")}
    return ModelMemory(content["base_bytes"], **contexts)


def memory_of(model: ModelMemory, header: Header, file_bytes: int) -> Memory:
    """The memory of one file of a model, of which there may only be the header."""
    tensors_bytes = {tensor.name: tensor.size_bytes for tensor in header.tensors}
    has_head = "output.weight" in tensors_bytes
    is_headless = header.architecture in ENCODERS and header.architecture != "gemma-embedding"
    weights_bytes = sum(tensors_bytes.values())
    # The first matrix stays with the CPU. A decoder without a head of its own has the table as its head on the GPU.
    on_gpu_bytes = weights_bytes - (tensors_bytes.get(TABLE, 0) if is_headless or has_head else 0)
    contexts = (model.query, model.documents)
    return Memory(
        weights_bytes=file_bytes,
        repacked_bytes=copied_bytes(header),
        kv_bytes=sum(context.kv_bytes for context in contexts),
        compute_bytes=sum(context.used_bytes + context.output_bytes for context in contexts),
        base_bytes=model.base_bytes,
        vram_bytes=on_gpu_bytes + model.on_gpu.kv_bytes + model.on_gpu.compute_bytes,
        host_bytes=model.base_bytes + model.on_gpu.output_bytes + tensors_bytes.get(TABLE, 0),
    )


def main() -> None:
    """Print, as JSON, what the file that the first argument describes takes without its weights."""
    from concurrent.futures import ThreadPoolExecutor

    from f2gguf.runtime.embedder import Embedder as Embedder  # what a user loads
    from f2gguf.runtime.gguf.header import read_header
    from f2gguf.runtime.llama.model import Model
    from f2gguf.runtime.llama.tokenizer import Tokenizer, load_overrides, own_tokenizer

    arguments = json.loads(sys.argv[1])
    header = read_header(arguments["path"])
    overrides = load_overrides(header)
    with ThreadPoolExecutor(1) as pool:  # as in runtime/llama/encoder.py: what two threads do together takes more
        own = pool.submit(own_tokenizer, header)
        model = Model(header.path, device="cpu", overrides=overrides, placement=choose(header), has_weights=False)
        tokenizer = Tokenizer(model, own.result())
    with model:
        tokenizer("a text")
        base_bytes = _resident_bytes()
        print(json.dumps({"base_bytes": base_bytes, **_contexts(header, model, arguments)}))


def _contexts(header: Header, model: Model, arguments: dict[str, Any]) -> dict[str, dict[str, int]]:
    from f2gguf.runtime.llama.context import N_SEQ_MAX, ComputeSettings, Context, LastTokenContext
    from f2gguf.runtime.llama.kernels import own

    pooling, longest = arguments["pooling"], arguments["max_tokens"]
    kind = LastTokenContext if header.takes_last_tokens(pooling) else Context
    settings = ComputeSettings("cpu", 0, 1, pooling, longest, False)

    def sizes(n_tokens: int, *, flash: bool) -> dict[str, int]:
        reserved = _logged(kind, model, settings, n_tokens, flash)
        used = _logged(_Headless, model, settings, n_tokens, flash) if kind is LastTokenContext else reserved
        # llama.cpp's own pooling takes outputs of all tokens, for which it makes room with the first batch
        n_outputs = n_tokens if kind is Context else N_SEQ_MAX
        return {
            "output_bytes": reserved["output"] * max(n_outputs, N_SEQ_MAX) // N_SEQ_MAX,
            "kv_bytes": reserved["kv"],
            "compute_bytes": reserved["compute"],
            "used_bytes": used["compute"] + reserved["kernels"],
        }

    class _Headless(LastTokenContext):
        """As a pass that stops before the LM head uses memory: with logits for one token alone."""

        def _prepare(self, params: Any) -> None:
            super()._prepare(params)
            params.n_outputs_max = params.n_seq_max = 1

    n_batch = max(kind.batch_tokens(model), longest)
    found = {"documents": sizes(n_batch, flash=True)}
    found["query"] = dict.fromkeys(found["documents"], 0)  # which share a context with documents, if flash attention
    if model.min_flash > QUERY_TOKENS:  # is as exact for them
        found["query"] = sizes(QUERY_TOKENS, flash=False)
    if arguments["parallel"] > 1:  # a long text pauses for others, which have a context of their own
        others = sizes(kind.batch_tokens(model), flash=True)
        found["documents"] = {key: value + others[key] for key, value in found["documents"].items()}
    model.offloaded = "as on a GPU"  # so that passes are as large as there
    own.switch(False)  # beside them llama.cpp takes no flash attention by itself, as it does on a GPU
    found["on_gpu"] = sizes(max(kind.gpu_tokens, longest), flash=True)
    return found


def _logged(kind: Any, model: Model, settings: Any, n_tokens: int, flash: bool) -> dict[str, int]:
    """Bytes that llama.cpp names when a context for `n_tokens` is made; 0 for what it does not need.

    And those in which f2gguf's kernels note the keys that each token of a pass sees.
    """
    from f2gguf.runtime.llama.library import OWN, log_to
    from f2gguf.runtime.llama.runner import CTX_STEP

    lines: list[str] = []
    with log_to(lambda _, text: lines.append(text)):
        n_ctx = -(-n_tokens // CTX_STEP) * CTX_STEP
        context = kind(model, settings, n_ctx=n_ctx, flash=flash, f32=False)
        context.close()
    log = "".join(lines)
    found = {name: pattern.findall(log) for name, pattern in _SIZES.items()}
    found["compute"] = list(set(found["compute"]))  # f2gguf's kernels share the CPU's buffer, which is named for both
    sizes = {name: int(sum(map(float, some)) * _MIB) for name, some in found.items()}
    has_own = OWN in model.placement and not model.offloaded
    return sizes | {"kernels": 2 * context.n_pass * n_ctx if has_own else 0}


def _resident_bytes() -> int:
    """Resident memory of this process now, or its peak where there is no /proc."""
    import resource
    from pathlib import Path

    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
