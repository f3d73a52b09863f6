"""A .gguf file that llama.cpp has loaded: its weights and its vocabulary."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from f2gguf.runtime.errors import GGUFError, TextError
from f2gguf.runtime.gguf.pretokenizers import recursive
from f2gguf.runtime.llama.kernels import amx
from f2gguf.runtime.llama.kernels.choice import Placement, place
from f2gguf.runtime.llama.library import OWN, backends, captured_errors, log_to, require_device
from f2gguf.runtime.llama.stack import with_room
from f2gguf.runtime.llama.worker import free_with, interruptible
from numpy.typing import NDArray

# On the CPU, llama.cpp's flash attention sums up in F16 where a pass has fewer tokens than this, which moves an F16
# file's vectors by up to 5e-6; for more it sums up in F32, like attention without it (7e-8), and is a quarter faster.
MIN_FLASH = 64
_ALIBI = "jina-bert-v2"  # the architecture of embedding models whose scores fall with the distance of two tokens
_MAX_TEXT_BYTES = (1 << 31) - 64  # it counts them in 32 bits
_LEAST_OF_A_LAYER = 4  # matrices of a layer: queries, keys and values in one, what follows them, and two more
_OFFLOADED = re.compile(r"offloaded \d+/\d+ layers to GPU")


def runs_on_cpu(device: str, n_gpu_layers: int) -> bool:
    """Whether a model that is loaded so has no layer on a GPU."""
    return device == "cpu" or n_gpu_layers == 0 or backends() == ["CPU"]


class Model:
    """A loaded .gguf file. Close it, or use it as a context manager."""

    def __init__(
        self,
        path: Path,
        *,
        device: str = "auto",
        n_gpu_layers: int = -1,
        vocab_only: bool = False,
        overrides: Mapping[str, bool] | None = None,
        placement: Placement | None = None,
        has_weights: bool = True,
    ) -> None:
        """`overrides` replaces header values. `placement` is of matrices that get other CPU kernels.

        Without weights, neither they nor the buffers of a context take memory: nothing can be computed, and llama.cpp
        logs what it would take.
        """
        require_device(device)
        params = llama_cpp.llama_model_default_params()
        params.vocab_only = vocab_only
        if not has_weights:
            params.no_alloc, params.load_mode = True, llama_cpp.LLAMA_LOAD_MODE_NONE
        params.n_gpu_layers = 0 if device == "cpu" else n_gpu_layers
        self.placement = placement or {}
        if vocab_only or not runs_on_cpu(device, n_gpu_layers) or not place(params, self.placement):
            self.placement, params.use_extra_bufts = {}, not amx.is_built_in()
        no_devices = (ctypes.c_void_p * 1)(None)  # a list that ends at once: nothing but the CPU
        if device == "cpu":
            params.devices = ctypes.cast(no_devices, ctypes.c_void_p)
        kept = _kv_overrides(overrides or {})
        params.kv_overrides = kept
        lines: list[str] = []
        with captured_errors() as errors, log_to(lambda _, text: lines.append(text)):
            self.pointer = interruptible(lambda: llama_cpp.llama_model_load_from_file(os.fsencode(path), params))
        if not self.pointer:
            reason = errors[0] if errors else "no reason given"  # later lines only say that it failed
            raise GGUFError(f"{path}: llama.cpp cannot load it: {reason}. Download or make it again.")
        self.path = path
        self.vocab = llama_cpp.llama_model_get_vocab(self.pointer)
        offloaded = _OFFLOADED.search("".join(lines))
        self.offloaded = offloaded[0] if offloaded else ""  # "offloaded 29/29 layers to GPU"
        self._free = free_with(self, llama_cpp.llama_model_free, self.pointer)
        kind, pre = self._stated("tokenizer.ggml.model"), self._stated("tokenizer.ggml.pre")
        if flaw := self._special_flaw() or self._byte_flaw() or _split_flaw(kind, pre):
            self.close()
            raise GGUFError(f"{path}: {flaw}: llama.cpp would end the process. Download or make it again.")
        self._recursive = recursive(kind, pre)

    @property
    def is_offloaded_whole(self) -> bool:
        """Whether all layers are on a GPU."""
        counts = re.findall(r"\d+", self.offloaded)
        return bool(counts) and counts[0] == counts[1]

    @property
    def has_other_kernels(self) -> bool:
        """Whether most matrices have other CPU kernels than llama.cpp's for the layout of the file."""
        n_layers = int(llama_cpp.llama_model_n_layer(self.pointer))
        return sum(map(len, self.placement.values())) >= _LEAST_OF_A_LAYER * n_layers

    @property
    def min_flash(self) -> int:
        """Tokens of a pass from which flash attention is exact: any number on a GPU, and by f2gguf's own kernels."""
        return 0 if self.offloaded or (OWN in self.placement and self._has_own_attention()) else MIN_FLASH

    def _has_own_attention(self) -> bool:
        """Whether f2gguf's own kernels attend: they take heads of multiples of 32 numbers, and scores as they are."""
        name = self._stated("general.architecture")
        if name == _ALIBI or self._stated(f"{name}.attn_logit_softcapping"):
            return False
        width = str(self.n_embd // max(1, int(llama_cpp.llama_model_n_head(self.pointer))))
        sizes = [self._stated(f"{name}.attention.{key}") or width for key in ("key_length", "value_length")]
        return all(size.isdigit() and int(size) % 32 == 0 for size in sizes)

    @property
    def n_embd(self) -> int:
        return int(llama_cpp.llama_model_n_embd(self.pointer))

    @property
    def n_vocab(self) -> int:
        return int(llama_cpp.llama_vocab_n_tokens(self.vocab))

    def tokenize(self, text: str) -> NDArray[np.int32]:
        """Token ids of `text` with the special tokens that the header asks for, (n_tokens,) int32.

        Raises `TextError` for a text on which llama.cpp would end the process.
        """
        data = text.encode("utf-8")
        if len(data) > _MAX_TEXT_BYTES:
            raise TextError(f"it has {len(data):,} bytes, and llama.cpp takes at most {_MAX_TEXT_BYTES:,}.")
        if self._recursive is None:
            return self._split(data)
        return with_room(text, self._recursive, lambda: self._split(data))

    def _split(self, data: bytes) -> NDArray[np.int32]:
        n_max = len(data) + 8  # mostly a token has at least one byte, and a handful of special tokens come on top
        while True:
            ids = np.empty(n_max, dtype=np.int32)
            pointer = ids.ctypes.data_as(ctypes.POINTER(llama_cpp.llama_token))
            n = llama_cpp.llama_tokenize(self.vocab, data, len(data), pointer, n_max, True, True)
            if n >= 0:
                return ids[:n].copy()
            n_max = -n  # a normaliser may write one character as many

    def token_texts(self) -> list[str]:
        """The vocabulary as the header spells it, by id."""
        ids = range(self.n_vocab)
        texts = (llama_cpp.llama_vocab_get_text(self.vocab, i) for i in ids)
        return [text.decode("utf-8", errors="replace") for text in texts]

    def piece(self, token: int) -> bytes:
        """What one token stands for, special tokens by their names."""
        buffer = ctypes.create_string_buffer(512)  # the longest token of any vocabulary has 256 bytes
        n = llama_cpp.llama_token_to_piece(self.vocab, token, buffer, len(buffer), 0, True)
        return buffer.raw[: max(n, 0)]

    def is_special(self, token: int) -> bool:
        return bool(llama_cpp.llama_vocab_is_control(self.vocab, token))

    @property
    def closes_texts(self) -> bool:
        """Whether the tokenizer puts a special token (EOS or [SEP]) after every text."""
        is_wordpiece = llama_cpp.llama_vocab_type(self.vocab) == llama_cpp.LLAMA_VOCAB_TYPE_WPM
        return bool(is_wordpiece or llama_cpp.llama_vocab_get_add_eos(self.vocab))

    def _special_flaw(self) -> str | None:
        """What is wrong with a header that asks for a token around every text, and does not say which."""
        vocab, is_wordpiece = self.vocab, llama_cpp.llama_vocab_type(self.vocab) == llama_cpp.LLAMA_VOCAB_TYPE_WPM
        asked = {
            "bos": (is_wordpiece or llama_cpp.llama_vocab_get_add_bos(vocab), llama_cpp.llama_vocab_bos(vocab)),
            "eos": (llama_cpp.llama_vocab_get_add_eos(vocab) and not is_wordpiece, llama_cpp.llama_vocab_eos(vocab)),
            "seperator": (is_wordpiece, llama_cpp.llama_vocab_sep(vocab)),
        }
        lacking = [name for name, (is_asked, token) in asked.items() if is_asked and token < 0]
        return f"its texts need the token tokenizer.ggml.{lacking[0]}_token_id, which it lacks" if lacking else None

    def _byte_flaw(self) -> str | None:
        """What is wrong with a SentencePiece vocabulary that cannot spell every byte."""
        if llama_cpp.llama_vocab_type(self.vocab) != llama_cpp.LLAMA_VOCAB_TYPE_SPM:
            return None
        texts = set(self.token_texts())
        lacking = [byte for byte in range(256) if f"<0x{byte:02X}>" not in texts and chr(byte) not in texts]
        return f"its vocabulary has no token for the byte {lacking[0]}" if lacking else None

    def _stated(self, key: str) -> str:
        """A text of the header, cut to 63 bytes; empty where it has none."""
        buffer = ctypes.create_string_buffer(64)
        llama_cpp.llama_model_meta_val_str(self.pointer, key.encode(), buffer, len(buffer))
        return buffer.value.decode("utf-8", errors="replace")

    def close(self) -> None:
        self._free()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _split_flaw(kind: str, pre: str) -> str | None:
    is_odd = (kind, pre) == ("gpt2", "whitespace")
    return "its pre-tokenizer 'whitespace' needs the tokenizer model 'whitespace'" if is_odd else None


def _kv_overrides(values: Mapping[str, bool]) -> Any:
    """A C array of llama_model_kv_override, ended by an empty key: header values to add or replace."""
    array = (llama_cpp.llama_model_kv_override * (len(values) + 1))()
    for slot, (key, value) in zip(array, values.items(), strict=False):
        slot.key, slot.tag, slot.value.val_bool = key.encode(), llama_cpp.LLAMA_KV_OVERRIDE_TYPE_BOOL, value
    return array
