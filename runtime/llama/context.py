"""A llama.cpp context: token ids of a batch become raw vectors, by the last-token path or by llama.cpp's pooling."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import llama_cpp
import numpy as np
from f2gguf.runtime.errors import GGUFError
from f2gguf.runtime.gguf.header import POOLING_IDS
from f2gguf.runtime.llama.library import OWN, captured_errors
from f2gguf.runtime.llama.model import Model
from f2gguf.runtime.llama.packing import Ids, leading_length
from f2gguf.runtime.llama.worker import free_with
from llama_cpp._ggml import libggml
from numpy.typing import NDArray

N_SEQ_MAX = 64  # sequences in a context; llama.cpp's mean pooling wants a divisor of its tokens
MAX_TEXTS = N_SEQ_MAX - 1  # texts in one batch: a sequence is left to hold the shared prefix
N_UBATCH = 512  # tokens in one pass; with last-token pooling a longer text takes several, through the KV cache
# What llama.cpp calls the outputs of attention, and of the two halves of the feed-forward network: about equal parts of
# a layer, behind each of which a pass can pause.
PAUSES = ("ffn_inp-", "ffn_up-", "ffn_out-")
_HELD = 0  # the sequence that holds the shared prefix

libggml.ggml_get_name.argtypes = [ctypes.c_void_p]
libggml.ggml_get_name.restype = ctypes.c_char_p
libggml.ggml_nbytes.argtypes = [ctypes.c_void_p]
libggml.ggml_nbytes.restype = ctypes.c_size_t
libggml.ggml_backend_tensor_get.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]


@dataclass(frozen=True)
class ComputeSettings:
    """How to compute: what a user chooses when opening a file."""

    device: str
    n_gpu_layers: int
    n_threads: int
    pooling: str
    max_tokens: int  # of a text, special tokens included
    deterministic: bool  # every text is a batch of its own


class Watch(Protocol):
    """Is shown tensors while the graph runs. It must keep its errors: nobody catches what a C callback raises."""

    def wants(self, tensor: int) -> bool:
        """Whether to show a ggml_tensor, named by its address. Called before the tensor is computed."""

    def take(self, tensor: int) -> None:
        """Called with a tensor that `wants` asked for, once it and its operands are computed."""


Pause = Callable[[], None]  # called between the parts of a pass; must keep its errors as well


class Context:
    """KV cache and compute buffers for one batch of texts of up to `n_ctx` tokens; a cache in F32 if `f32`.

    `pauses`: whether `embed` can be given a `pause`.
    """

    tapped: str | None = None  # name of the tensor that vectors are taken from; None for llama.cpp's own pooling
    # Short texts are packed up to this. On 2 cores all-MiniLM-L6-v2 in Q4_K_M does 2,722 tokens/s of documents by 512
    # and 2,557 by 256, in Q4_0, repacked, 3,523 and 3,783, and on AMX, in Q8_0, 5,392 and 5,699.
    cpu_tokens = 512
    cpu_tokens_anew = 256  # where the matrices are laid out anew
    # f2gguf's own kernels unpack a matrix once for a batch. Documents of 0.6B in Q4_K_M do 758 tokens/s by 512, 637 by
    # 256 and 632 by 1,024 (its queries 729, 867 and 676), of all-MiniLM-L6-v2 in Q4_0 15,190, 13,344 and 15,852.
    cpu_tokens_own = 512
    # On an H200 its Q4_0 does 195,000 tokens/s so; 172,000 by 512, 165,000 by 2,048 and 96,000 by 4,096.
    gpu_tokens = 1024

    def __init__(
        self,
        model: Model,
        settings: ComputeSettings,
        *,
        n_ctx: int,
        flash: bool,
        f32: bool,
        pauses: bool = False,
        watch: Watch | None = None,
    ) -> None:
        params = llama_cpp.llama_context_default_params()
        # llama.cpp pools each pass by itself, so that a text must fit one
        params.n_ctx = params.n_batch = params.n_ubatch = n_ctx
        params.n_seq_max = N_SEQ_MAX
        # One stream a sequence was no faster (0.93 to 1.00 of this: 80M in Q8_0, BF16, F16, Q4_0; texts of 8 to 256
        # tokens), since ggml skips tiles of attention that are masked throughout, and takes 256 cells for each.
        params.kv_unified = True
        params.embeddings = True
        params.pooling_type = POOLING_IDS[settings.pooling]
        params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32 if f32 else llama_cpp.GGML_TYPE_F16
        on = llama_cpp.LLAMA_FLASH_ATTN_TYPE_AUTO if model.offloaded else llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        params.flash_attn_type = on if flash else llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.n_threads = params.n_threads_batch = settings.n_threads
        self._n_pass = self.gpu_tokens if model.offloaded else N_UBATCH
        self._tap = _Tap(self.tapped, watch)
        if self.tapped or watch or pauses:
            params.cb_eval = self._tap.callback
        self._prepare(params)
        with captured_errors() as errors:
            pointer = llama_cpp.llama_init_from_model(model.pointer, params)
        if not pointer:
            reason = errors[0] if errors else "out of memory?"
            raise GGUFError(f"{model.path}: no context for {n_ctx:,} tokens: {reason}. Try a smaller --max-tokens.")
        self.n_ctx, self.n_pass = n_ctx, int(params.n_ubatch)  # tokens of a batch, and of a pass
        self.n_embd = model.n_embd
        self.compute_seconds = 0.0  # spent in llama_decode
        self._pointer = pointer
        self._model = model  # must outlive the context
        self._memory = llama_cpp.llama_get_memory(pointer)
        self._free = free_with(self, llama_cpp.llama_free, pointer)

    @classmethod
    def batch_tokens(cls, model: Model) -> int:
        """Tokens up to which short texts of this model are packed into one batch."""
        if model.offloaded:
            return cls.gpu_tokens
        if model.placement.get(OWN):
            return cls.cpu_tokens_own
        return cls.cpu_tokens_anew if model.has_other_kernels else cls.cpu_tokens

    def embed(self, texts: Sequence[Ids], *, n_shared: int = 0, pause: Pause | None = None) -> NDArray[np.float32]:
        """Pooled raw vectors of a batch of token ids that together fit the context, (n_texts, n_embd) float32.

        The `n_shared` leading ids are the same in all texts. Only the last-token path uses that. `pause` is called a
        few times in each layer. Another context may be used there, this one must not.
        """
        self._tap.pauses[:] = filter(None, [pause])
        if self._memory:
            llama_cpp.llama_memory_clear(self._memory, False)
        self._decode(texts, outputs="all")
        pointers = (llama_cpp.llama_get_embeddings_seq(self._pointer, i) for i in range(len(texts)))
        return np.stack([np.ctypeslib.as_array(pointer, (self.n_embd,)) for pointer in pointers])

    def close(self) -> None:
        self._free()

    def _prepare(self, params: Any) -> None:
        """Set the parameters that depend on how vectors are taken."""

    def _decode(self, texts: Sequence[Ids], *, outputs: str, first_position: int = 0, first_sequence: int = 0) -> None:
        batch = _batch(texts, outputs, first_position, first_sequence)
        begin = time.perf_counter()
        with captured_errors() as errors:
            status = llama_cpp.llama_decode(self._pointer, batch)
        self.compute_seconds += time.perf_counter() - begin
        if status != 0:
            raise GGUFError(f"llama.cpp failed on a batch (status {status}): {errors[0] if errors else 'no reason'}")


class LastTokenContext(Context):
    """Last-token pooling from the final norm's rows of the last tokens, without the LM head.

    llama.cpp's own pooling makes every token an output and runs the LM head on each: half of the work of an 80M model.
    Here only last tokens are outputs, and the graph is stopped once the rows of `tapped` were taken. Leading
    ids that all texts of a batch share are computed once and stay for the next batch.
    """

    tapped = "result_norm"  # llama.cpp's name for the final norm's output
    # 512 took 0.95 of the time for f2llm-nano, 0.99 for the 80M and 1.09 for the 0.6B shape
    cpu_tokens = cpu_tokens_anew = 256
    # A GPU starts a kernel for each step of a layer, however few the tokens. On an H100, 0.6B in Q4_K_M does 17,600
    # tokens/s in batches of 256, 39,000 of 1,024, 47,000 of 2,048 and 46,700 of 4,096, where the attention mask, which
    # grows with the square, takes what the fuller kernels save.
    gpu_tokens = 2048

    def _prepare(self, params: Any) -> None:
        self._held = np.empty(0, dtype=np.int32)  # ids whose keys and values the sequence _HELD keeps
        self._flash = params.flash_attn_type != llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.n_batch = params.n_ubatch = min(params.n_ctx, self._n_pass)
        params.embeddings = False
        params.pooling_type = llama_cpp.LLAMA_POOLING_TYPE_NONE
        params.n_outputs_max = N_SEQ_MAX

    def embed(self, texts: Sequence[Ids], *, n_shared: int = 0, pause: Pause | None = None) -> NDArray[np.float32]:
        """See `Context.embed`. Raises `TensorMissing` where the model's graph has no tensor `tapped`."""
        self._tap.pauses[:] = filter(None, [pause])
        own = [ids[n_shared:] for ids in texts]
        llama_cpp.llama_memory_seq_keep(self._memory, _HELD)
        if len(self._held) + sum(map(len, own)) > self.n_ctx:
            llama_cpp.llama_memory_clear(self._memory, False)
            self._held = self._held[:0]
        self._hold(texts[0][:n_shared])
        for sequence in range(1, len(own) + 1 if n_shared else 0):
            llama_cpp.llama_memory_seq_cp(self._memory, _HELD, sequence, 0, n_shared)
        self._tap.rows.clear()
        self._decode_passes(own, outputs="last", first_position=n_shared, first_sequence=1)
        values = np.concatenate([np.empty(0, np.float32), *self._tap.rows])
        if len(values) != len(texts) * self.n_embd:
            raise TensorMissing(f"{len(values) // self.n_embd} rows of {self.tapped} for {len(texts)} texts")
        return values.reshape(-1, self.n_embd)

    def _decode_passes(self, texts: Sequence[Ids], *, outputs: str, first_position: int, first_sequence: int) -> None:
        """One pass for texts that fit it; equal passes for one longer text, so that none is under MIN_FLASH."""
        n_passes = -(-sum(map(len, texts)) // self._n_pass)
        if n_passes > 1:
            *earlier, last = np.array_split(texts[0], n_passes)
            for piece in earlier:
                self._decode([piece], outputs="none", first_position=first_position, first_sequence=first_sequence)
                first_position += len(piece)
            texts = [last]
        self._decode(texts, outputs=outputs, first_position=first_position, first_sequence=first_sequence)

    def _hold(self, prefix: Ids) -> None:
        """Compute the keys and values of `prefix` into the sequence _HELD, except those that it holds already."""
        n_there = leading_length(prefix, self._held)
        if n_there == len(prefix):
            return
        llama_cpp.llama_memory_seq_rm(self._memory, _HELD, n_there, -1)
        new = prefix[n_there:]
        n_lacking = self._model.min_flash - len(new) if self._flash else 0
        if n_lacking > 0:
            new = np.pad(new, (0, n_lacking), mode="edge")
        self._decode_passes([new], outputs="none", first_position=n_there, first_sequence=_HELD)
        llama_cpp.llama_memory_seq_rm(self._memory, _HELD, len(prefix), -1)
        self._held = prefix


class TensorMissing(Exception):
    """The graph of this model has no `result_norm`: llama.cpp's own pooling must be used."""


class _Tap:
    """Takes the rows of one named tensor while the graph runs, and stops the graph there; shows others to `watch`.

    Where there is one of `pauses`, it is called behind each part of the graph that PAUSES names.
    """

    def __init__(self, name: str | None, watch: Watch | None) -> None:
        self.rows: list[NDArray[np.float32]] = []
        self.pauses: list[Pause] = []  # at most one
        rows, pauses = self.rows, self.pauses  # the callback must not keep its own owner alive

        @llama_cpp.llama_cpp.ggml_backend_sched_eval_callback  # type: ignore[untyped-decorator]
        def callback(tensor: int, ask: bool, _user_data: int) -> bool:
            this = tensor_name(tensor)
            if ask:
                return bool(this == name or (watch and watch.wants(tensor)) or (pauses and this.startswith(PAUSES)))
            if this == name:
                rows.append(read_rows(tensor))
                return False
            if watch:
                watch.take(tensor)
            for pause in pauses:
                pause()
            return True

        self.callback = callback


def tensor_name(tensor: int) -> str:
    """llama.cpp's name of a ggml_tensor, which its address names."""
    return str(libggml.ggml_get_name(tensor).decode())


def read_rows(tensor: int) -> NDArray[np.float32]:
    """The values of an F32 ggml_tensor, flat."""
    values = np.empty(libggml.ggml_nbytes(tensor) // 4, dtype=np.float32)
    libggml.ggml_backend_tensor_get(tensor, values.ctypes.data, 0, values.nbytes)
    return values


def _batch(texts: Sequence[Ids], outputs: str, first_position: int, first_sequence: int) -> Any:
    """A llama_batch over numpy memory, which it keeps alive: text i is sequence first_sequence + i."""
    lengths = np.array([len(ids) for ids in texts])
    ends = lengths.cumsum()
    n_tokens = int(ends[-1])
    tokens = np.concatenate(texts).astype(np.int32)
    starts = np.repeat(ends - lengths, lengths)
    positions = (np.arange(n_tokens) - starts + first_position).astype(np.int32)
    sequences = np.repeat(np.arange(len(texts), dtype=np.int32) + first_sequence, lengths)
    counts = np.ones(n_tokens, dtype=np.int32)
    is_output = np.full(n_tokens, outputs == "all", dtype=np.int8)
    if outputs == "last":
        is_output[ends - 1] = 1
    pointers = (sequences.ctypes.data + sequences.itemsize * np.arange(n_tokens)).astype(np.uintp)
    batch: Any = llama_cpp.llama_batch()  # its annotations are of arrays, its fields pointers
    batch.n_tokens = n_tokens
    batch.token = tokens.ctypes.data_as(ctypes.POINTER(llama_cpp.llama_token))
    batch.pos = positions.ctypes.data_as(ctypes.POINTER(llama_cpp.llama_pos))
    batch.n_seq_id = counts.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
    batch.seq_id = pointers.ctypes.data_as(ctypes.POINTER(ctypes.POINTER(llama_cpp.llama_seq_id)))
    batch.logits = is_output.ctypes.data_as(ctypes.POINTER(ctypes.c_int8))
    batch.arrays = (tokens, positions, sequences, counts, is_output, pointers)
    return batch
