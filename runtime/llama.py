"""The thin layer over llama-cpp-python's C functions: logs, devices, a model, a context."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import llama_cpp
import numpy as np
from f2gguf.runtime.errors import DeviceMissing, GGUFError, TextError, UnknownName
from f2gguf.runtime.header import POOLING_IDS
from llama_cpp._ggml import libggml
from numpy.typing import NDArray

Result = TypeVar("Result")

# device -> names of the ggml backend that drives it, and the build flag that brings it
DEVICES: dict[str, tuple[tuple[str, ...], str]] = {
    "auto": ((), ""),
    "cpu": ((), ""),
    "metal": (("MTL", "Metal"), "-DGGML_METAL=on"),
    "cuda": (("CUDA",), "-DGGML_CUDA=on"),
}
N_SEQ_MAX = 64  # texts in one batch
N_UBATCH = 512  # tokens in one pass; a causal model splits longer texts over passes, through its KV cache
ERROR = 4  # ggml_log_level

_sinks: list[Callable[[int, str], None]] = []


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def _on_log(level: int, text: bytes, _user_data: ctypes.c_void_p) -> None:
    line = text.decode("utf-8", errors="replace")
    for sink in list(_sinks):
        sink(level, line)


llama_cpp.llama_log_set(_on_log, ctypes.c_void_p())
llama_cpp.llama_backend_init()


@contextlib.contextmanager
def log_to(sink: Callable[[int, str], None]) -> Iterator[None]:
    """Send llama.cpp's log fragments (level, text) to `sink` while the block runs."""
    _sinks.append(sink)
    try:
        yield
    finally:
        _sinks.remove(sink)


@contextlib.contextmanager
def captured_errors() -> Iterator[list[str]]:
    """Collect what llama.cpp logs as errors while the block runs."""
    lines: list[str] = []
    with log_to(lambda level, text: lines.append(text.strip()) if level == ERROR else None):
        yield lines


def interruptible(work: Callable[[], Result]) -> Result:
    """Run a C call in a thread of its own, so that Ctrl-C is answered at once while the call goes on unheard.

    In the main thread the signal would raise inside the log callback, where ctypes swallows it.
    """
    outcome: list[Result] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            outcome.append(work())
        except BaseException as error:  # handed to the waiting thread below
            failure.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(timeout=0.1)  # a join without end would hold back the signal
    if failure:
        raise failure[0]
    return outcome[0]


def require_device(device: str) -> None:
    """Raise `UnknownName` for no device, `DeviceMissing` where this build of llama.cpp lacks it."""
    if device not in DEVICES:
        raise UnknownName("device", device, DEVICES)
    names, flag = DEVICES[device]
    if names and not set(names) & set(_backends()):
        raise DeviceMissing(
            f"--device {device}: this build of llama.cpp has only: {', '.join(_backends())}. Reinstall with\n"
            f'  CMAKE_ARGS="{flag}" pip install --force-reinstall --no-cache-dir llama-cpp-python'
        )


def default_threads() -> int:
    """Number of processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Model:
    """A loaded .gguf file. Close it, or use it as a context manager."""

    def __init__(
        self,
        path: Path,
        *,
        device: str = "auto",
        vocab_only: bool = False,
        overrides: Mapping[str, bool] | None = None,
    ) -> None:
        require_device(device)
        params = llama_cpp.llama_model_default_params()
        params.vocab_only = vocab_only
        params.n_gpu_layers = 0 if device == "cpu" else -1
        params.use_extra_bufts = not _has_amx()
        no_devices = (ctypes.c_void_p * 1)(None)  # a list that ends at once: nothing but the CPU
        if device == "cpu":
            params.devices = ctypes.cast(no_devices, ctypes.c_void_p)
        kept = kv_overrides(overrides or {})
        params.kv_overrides = kept
        with captured_errors() as errors:
            self.pointer = interruptible(lambda: llama_cpp.llama_model_load_from_file(os.fsencode(path), params))
        if not self.pointer:
            reason = errors[0] if errors else "no reason given"  # later lines only say that it failed
            raise GGUFError(f"{path}: llama.cpp cannot load it: {reason}. Download or make it again.")
        self.path = path
        self.vocab = llama_cpp.llama_model_get_vocab(self.pointer)

    @property
    def n_embd(self) -> int:
        return int(llama_cpp.llama_model_n_embd(self.pointer))

    def tokenize(self, text: str) -> NDArray[np.int32]:
        """Token ids of `text` with the special tokens that the header asks for, (n_tokens,) int32."""
        data = text.encode("utf-8")
        n_max = len(data) + 8  # a token has at least one byte, and a handful of special tokens come on top
        ids = np.empty(n_max, dtype=np.int32)
        pointer = ids.ctypes.data_as(ctypes.POINTER(llama_cpp.llama_token))
        n = llama_cpp.llama_tokenize(self.vocab, data, len(data), pointer, n_max, True, True)
        if n < 0:
            raise TextError(f"a text of {len(data):,} bytes gave more than {n_max:,} tokens")
        return ids[:n].copy()

    def token_texts(self) -> list[str]:
        """The vocabulary as the header spells it, by id."""
        ids = range(llama_cpp.llama_vocab_n_tokens(self.vocab))
        texts = (llama_cpp.llama_vocab_get_text(self.vocab, i) for i in ids)
        return [text.decode("utf-8", errors="replace") for text in texts]

    @property
    def closes_texts(self) -> bool:
        """Whether the tokenizer puts a special token (EOS or [SEP]) after every text."""
        is_wordpiece = llama_cpp.llama_vocab_type(self.vocab) == llama_cpp.LLAMA_VOCAB_TYPE_WPM
        return bool(is_wordpiece or llama_cpp.llama_vocab_get_add_eos(self.vocab))

    def close(self) -> None:
        if self.pointer:
            llama_cpp.llama_model_free(self.pointer)
            self.pointer = None

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Context:
    """Room for one batch of texts on a model: KV cache and compute buffers for `n_ctx` tokens."""

    def __init__(self, model: Model, *, n_ctx: int, pooling: str, is_causal: bool, n_threads: int) -> None:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = n_ctx
        params.n_ubatch = min(n_ctx, N_UBATCH) if is_causal else n_ctx  # without a KV cache a text is one pass
        params.n_seq_max = N_SEQ_MAX
        params.kv_unified = True
        params.embeddings = True
        params.pooling_type = POOLING_IDS[pooling]
        params.n_threads = params.n_threads_batch = n_threads
        with captured_errors() as errors:
            self.pointer = interruptible(lambda: llama_cpp.llama_init_from_model(model.pointer, params))
        if not self.pointer:
            reason = errors[0] if errors else "out of memory?"
            raise GGUFError(f"{model.path}: no context for {n_ctx:,} tokens: {reason}. Try a smaller --max-tokens.")
        self.n_ctx = n_ctx
        self.n_embd = model.n_embd

    def embed(self, texts: Sequence[NDArray[np.int32]]) -> NDArray[np.float32]:
        """Pooled vectors of a batch of token ids that together fit the context, (n_texts, n_embd) float32, raw."""
        memory = llama_cpp.llama_get_memory(self.pointer)
        if memory:
            llama_cpp.llama_memory_clear(memory, False)
        with captured_errors() as errors:
            status = llama_cpp.llama_decode(self.pointer, _batch(texts))
        if status != 0:
            raise GGUFError(f"llama.cpp failed on a batch (status {status}): {errors[0] if errors else 'no reason'}")
        vectors = np.empty((len(texts), self.n_embd), dtype=np.float32)
        for i in range(len(texts)):
            pointer = llama_cpp.llama_get_embeddings_seq(self.pointer, i)
            vectors[i] = np.ctypeslib.as_array(pointer, (self.n_embd,))
        return vectors

    def close(self) -> None:
        if self.pointer:
            llama_cpp.llama_free(self.pointer)
            self.pointer = None


def kv_overrides(values: Mapping[str, Any]) -> Any:
    """A C array of llama_model_kv_override, ended by an empty key: header values to add or replace.

    bool, float and str (up to 127 bytes) keep their type; llama.cpp stores an int as uint32.
    """
    array = (llama_cpp.llama_model_kv_override * (len(values) + 1))()
    for slot, (key, value) in zip(array, values.items(), strict=False):
        slot.key = key.encode()
        if isinstance(value, bool):
            slot.tag, slot.value.val_bool = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_BOOL, value
        elif isinstance(value, int):
            slot.tag, slot.value.val_i64 = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_INT, value
        elif isinstance(value, float):
            slot.tag, slot.value.val_f64 = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_FLOAT, value
        else:
            slot.tag, slot.value.val_str = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_STR, str(value).encode()
    return array


def _batch(texts: Sequence[NDArray[np.int32]]) -> Any:
    """A llama_batch over numpy memory, kept alive by the batch: text i is sequence i, every token an output."""
    lengths = [len(ids) for ids in texts]
    n_tokens = sum(lengths)
    tokens = np.concatenate(texts).astype(np.int32)
    positions = np.concatenate([np.arange(n, dtype=np.int32) for n in lengths])
    sequences = np.repeat(np.arange(len(texts), dtype=np.int32), lengths)
    counts = np.ones(n_tokens, dtype=np.int32)
    outputs = np.ones(n_tokens, dtype=np.int8)
    pointers = (sequences.ctypes.data + sequences.itemsize * np.arange(n_tokens)).astype(np.uintp)
    batch: Any = llama_cpp.llama_batch()  # its annotations are of arrays, its fields pointers
    batch.n_tokens = n_tokens
    batch.token = tokens.ctypes.data_as(ctypes.POINTER(llama_cpp.llama_token))
    batch.pos = positions.ctypes.data_as(ctypes.POINTER(llama_cpp.llama_pos))
    batch.n_seq_id = counts.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
    batch.seq_id = pointers.ctypes.data_as(ctypes.POINTER(ctypes.POINTER(llama_cpp.llama_seq_id)))
    batch.logits = outputs.ctypes.data_as(ctypes.POINTER(ctypes.c_int8))
    batch.arrays = (tokens, positions, sequences, counts, outputs, pointers)
    return batch


def _has_amx() -> bool:
    """Whether llama.cpp would repack weights for AMX, where it crashes.

    Built by GCC 12, its tile configuration is optimised away, and the first quantised product faults:
    https://github.com/ggml-org/llama.cpp/issues/20824 and pull request 26954.
    """
    return b"AMX_INT8 = 1" in llama_cpp.llama_print_system_info()


def _backends() -> list[str]:
    libggml.ggml_backend_reg_count.restype = ctypes.c_size_t
    libggml.ggml_backend_reg_get.argtypes = [ctypes.c_size_t]
    libggml.ggml_backend_reg_get.restype = ctypes.c_void_p
    libggml.ggml_backend_reg_name.argtypes = [ctypes.c_void_p]
    libggml.ggml_backend_reg_name.restype = ctypes.c_char_p
    count = libggml.ggml_backend_reg_count()
    return [libggml.ggml_backend_reg_name(libggml.ggml_backend_reg_get(i)).decode() for i in range(count)]
