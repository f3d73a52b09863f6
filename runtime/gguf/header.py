"""The header of a .gguf file: every fact that the runtime needs, so that it guesses nothing."""

from __future__ import annotations

import json
import math
import mmap
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
from f2gguf.runtime.errors import NotAnEmbeddingModel, NotGGUF, PoolingMissing, UnknownDims, UnknownName, WrongUsage
from f2gguf.runtime.gguf.golden import golden_flaw
from f2gguf.runtime.gguf.reader import Reader, TensorInfo
from numpy.typing import NDArray

# Names of the values that f2gguf adds to llama.cpp's own; `quantize` writes them, the runtime reads them. Those of the
# golden vectors stand in runtime/gguf/golden.py.
KEY_VERSION = "f2gguf.version"
KEY_PROMPT = "f2gguf.prompt."  # + name -> text put before the input
KEY_DEFAULT_PROMPT = "f2gguf.default_prompt"  # name of the prompt that goes before a text where nobody chose one
KEY_MATRYOSHKA_DIMS = "f2gguf.matryoshka_dims"
KEY_MAX_TOKENS = "f2gguf.max_tokens"
KEY_NORMALIZE = "f2gguf.normalize"
KEY_INT8_STEP = "f2gguf.int8_step."  # + width -> what a step of int8 is worth in normalised vectors of that width
KEY_TOKENIZER = "f2gguf.tokenizer"  # the checkpoint's own but for tokens and merges, as JSON: see llama/carried.py
KEY_SCORE_STEPS = "f2gguf.tokenizer.score_steps"  # from float32 scores to the checkpoint's: see llama/carried.py
KEY_SOURCE_SHA256 = "f2gguf.source.sha256"
KEY_REVISION = "f2gguf.source.revision"
KEY_VARIANT = "f2gguf.variant"
KEY_RECIPE = "f2gguf.recipe"  # how the variant was made, as JSON
KEY_MEAN_DRIFT = "f2gguf.drift.mean"
KEY_UPPER_DRIFT = "f2gguf.drift.upper"
KEY_MAX_DRIFT = "f2gguf.drift.bound"
KEY_HOLDS = "f2gguf.drift.holds"
KEY_N_TEXTS = "f2gguf.drift.n_texts"
KEY_QUICK = "f2gguf.drift.quick"  # True where only about a quarter of the evaluation texts were measured
KEY_CORPUS = "f2gguf.drift.corpus.name"  # the file whose held-out texts were measured too, besides the evaluation texts
KEY_CORPUS_MEAN = "f2gguf.drift.corpus.mean"
KEY_CORPUS_UPPER = "f2gguf.drift.corpus.upper"
KEY_CORPUS_N_TEXTS = "f2gguf.drift.corpus.n_texts"
KEY_SEAL = "f2gguf.header_sha256"  # of the header itself: runtime/gguf/entries.py
KEY_MENDED = "f2gguf.mended"  # what `f2gguf repair-header` changed, a sentence each
KEY_LOWERCASE = "tokenizer.ggml.normalizer.lowercase"
KEY_STRIP_ACCENTS = "tokenizer.ggml.normalizer.strip_accents"
KEY_ADD_BOS = "tokenizer.ggml.add_bos_token"
KEY_ADD_EOS = "tokenizer.ggml.add_eos_token"

PART = re.compile(r"-\d{5}-of-\d{5}(?=\.gguf$)", re.IGNORECASE)  # in llama-gguf-split's names of files

# Architectures whose tokens see both ways whatever the header says: llama.cpp keeps no memory for them, as
# `llama_model::create_memory` in src/llama-model.cpp says
ENCODERS: tuple[str, ...] = ("bert", "nomic-bert", "nomic-bert-moe", "modern-bert", "neo-bert", "jina-bert-v2")
ENCODERS += ("jina-bert-v3", "eurobert", "gemma-embedding")

DOCUMENT_PROMPTS = ("document", "passage", "corpus", "search_document")  # names for it, the best first
POOLING_TYPES = {1: "mean", 2: "cls", 3: "last"}
POOLING_IDS = {name: number for number, name in POOLING_TYPES.items()}


@dataclass(frozen=True)
class Header:
    """The facts that a .gguf file states. Make one with `read_header`."""

    path: Path
    values: dict[str, Any]
    tensors: tuple[TensorInfo, ...]
    offsets: dict[str, int] = field(repr=False)  # key -> where its value's bytes stand in the file
    values_end: int = 0  # where the last value ends
    end: int = 0  # where the last tensor's entry ends

    @property
    def architecture(self) -> str:
        return str(self.values.get("general.architecture", ""))

    @property
    def name(self) -> str:
        return str(self.values.get("general.name", self.path.stem))

    @property
    def variant(self) -> str:
        """Such as 'Q4_K_M': what f2gguf made, or the type of most weights."""
        return str(self.values.get(KEY_VARIANT, self.file_type))

    @property
    def n_embd(self) -> int:
        return int(self._of_architecture("embedding_length", 0))

    @property
    def n_ctx_train(self) -> int:
        return int(self._of_architecture("context_length", 0))

    @property
    def max_tokens(self) -> int:
        """Longest input in tokens, special tokens included."""
        return min(int(self.values.get(KEY_MAX_TOKENS, self.n_ctx_train)), self.n_ctx_train)

    @property
    def pooling(self) -> str | None:
        """'last', 'mean' or 'cls'; None where the file does not say."""
        return POOLING_TYPES.get(self._of_architecture("pooling_type", -1))

    @property
    def is_normalized(self) -> bool:
        return bool(self.values.get(KEY_NORMALIZE, True))

    def ranges(self, width: int) -> NDArray[np.float32] | None:
        """The range of each column's numbers, (2, width), for int8 vectors of that width; None where it is not stated.

        All columns have the same one, in which a code of int8 is the number divided by the step, and rounded.
        """
        step = self.values.get(f"{KEY_INT8_STEP}{width}", 0.0)
        return np.outer((-128.5 * step, 126.5 * step), np.ones(width)).astype(np.float32) if step else None

    @property
    def tokenizer(self) -> str | None:
        """What the file carries of the checkpoint's own tokenizer; None for files that f2gguf did not make."""
        return self.values.get(KEY_TOKENIZER)

    @property
    def languages(self) -> tuple[str, ...]:
        """Languages that the model claims, as BCP-47 codes; empty where the file does not say."""
        return tuple(self.values.get("general.languages", ()))

    @property
    def prompts(self) -> dict[str, str]:
        return {key[len(KEY_PROMPT) :]: text for key, text in self.values.items() if key.startswith(KEY_PROMPT)}

    @property
    def default_prompt(self) -> str | None:
        """Name of the prompt that goes before a text where nobody chose one."""
        return self.values.get(KEY_DEFAULT_PROMPT)

    @property
    def document_prompt(self) -> str:
        """The prompt of a text that nobody calls a query: the documents' own, else the default one."""
        names = [name for name in (*DOCUMENT_PROMPTS, self.default_prompt) if name in self.prompts]
        return self.prompts[names[0]] if names else ""

    @property
    def dims(self) -> tuple[int, ...]:
        """Widths that the model was trained for, the full one last."""
        return tuple(self.values.get(KEY_MATRYOSHKA_DIMS, ())) or (self.n_embd,)

    @property
    def file_type(self) -> str:
        """Name of the type that most of the weights have, such as 'Q4_K_M'."""
        from gguf import LlamaFileType

        number = self.values.get("general.file_type", 0)
        try:
            return LlamaFileType(number).name.removeprefix("MOSTLY_").removeprefix("ALL_")
        except ValueError:
            return f"file type {number}"

    def strings(self, key: str) -> list[str]:
        """An array of strings, which `values` may only count. Raises `NotGGUF` for a file without one."""
        if key not in self.offsets:
            raise NotGGUF(f"{self.path}: its header has no {key}; the file is damaged. Download or make it again.")
        with self.path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return Reader(self.path, data, len(data)).strings(self.offsets[key])

    def require_pooling(self, pooling: str | None = None) -> str:
        """The pooling to use: `pooling` where the caller states it, else the header's.

        Raises `NotAnEmbeddingModel` for a file that cannot give text vectors, `PoolingMissing` where neither is stated.
        """
        self._require_model()
        pooling = self.pooling if pooling is None else pooling
        if pooling is None:
            raise PoolingMissing(
                f"{self.path}: the header has no pooling type, so it is no embedding model, or was converted without "
                "one. Convert it again with `quantize convert`, or pass --pooling last (or mean, or cls). "
                "`f2gguf repair-header` writes it into a copy."
            )
        if pooling not in POOLING_IDS:
            raise UnknownName("pooling", pooling, POOLING_IDS)
        return pooling

    def require_width(self, truncate_dim: int | None) -> int:
        """`truncate_dim`, or the full width for None. Raises `UnknownDims` for a width that was not trained."""
        if truncate_dim is None or truncate_dim in (*self.dims, self.n_embd):
            return self.n_embd if truncate_dim is None else int(truncate_dim)
        trained = f"{'was trained for' if len(self.dims) > 1 else 'gives only'} {', '.join(map(str, self.dims))}"
        raise UnknownDims(f"{truncate_dim} dimensions: {self.name} {trained} (--dims, truncate_dim).")

    def require_max_tokens(self, max_tokens: int | None) -> int:
        """`max_tokens`, or the header's for None. Raises `WrongUsage` for more than the model takes."""
        if max_tokens is None:
            return self.max_tokens
        if not isinstance(max_tokens, SupportsIndex) or not 2 <= max_tokens <= self.n_ctx_train:
            raise WrongUsage(f"max_tokens is {max_tokens!r}: {self.name} takes 2 to {self.n_ctx_train} (--max-tokens).")
        return int(max_tokens)

    def takes_last_tokens(self, pooling: str | None) -> bool:
        """Whether the runtime computes outputs for last tokens only, instead of pooling by llama.cpp."""
        return pooling == "last" and self.is_causal

    @property
    def is_causal(self) -> bool:
        """Whether a token sees only those before it."""
        return self.architecture not in ENCODERS and bool(self._of_architecture("attention.causal", True))

    def closing(self) -> Header:
        """The same header, as if it asked for a closing token behind every text."""
        return replace(self, values={**self.values, KEY_ADD_EOS: True})

    def _require_model(self) -> None:
        self._require_whole()
        kind = self.values.get("general.type", "model")
        lengths = {"embedding_length": self.n_embd, "context_length": self.n_ctx_train}
        lacking = [f"{self.architecture}.{key}" for key, length in lengths.items() if not length]
        if kind == "model" and self.tensors and self.architecture and len(lacking) == 1:
            raise NotAnEmbeddingModel(f"{self.path}: its header lacks {lacking[0]}. Download or make it again.")
        if kind != "model" or not self.tensors or lacking:
            raise NotAnEmbeddingModel(
                f"{self.path}: holds no model (general.type is {kind!r}, {len(self.tensors)} tensors, architecture "
                f"{self.architecture!r} of width {self.n_embd}). Pass the .gguf of an embedding model."
            )
        if self._of_architecture("pooling_type", None) == 4:
            raise NotAnEmbeddingModel(f"{self.path}: is a reranker, which gives scores and no vectors.")
        if (width := self._of_architecture("embedding_length_out", self.n_embd)) != self.n_embd:
            raise NotAnEmbeddingModel(
                f"{self.path}: gives vectors of another width ({width}) than the model has ({self.n_embd}), which this "
                "f2gguf does not read; update it."
            )

    def _require_whole(self) -> None:
        """Refuse a part of a split model: the parts that it leaves out would not count in its fingerprint."""
        n_parts, part = self.values.get("split.count", 1), self.values.get("split.no", 0)
        if n_parts in (0, 1):
            return
        is_named = PART.search(self.path.name) is not None
        first = PART.sub(f"-00001-of-{n_parts:05d}", self.path.name) if is_named or not part else "FIRST-PART"
        raise NotAnEmbeddingModel(
            f"{self.path}: is part {part + 1} of {n_parts} of a split model, which f2gguf does not read. Join the "
            f"parts: `llama-gguf-split --merge {first} NEW.gguf`."
        )

    def _of_architecture(self, key: str, default: Any) -> Any:
        return self.values.get(f"{self.architecture}.{key}", default)


def read_header(path: str | Path) -> Header:
    """Read the header of a .gguf file (format version 2 or 3, little endian).

    Raises `NotGGUF` for a missing file, another format, or one that ends before its last tensor does.
    Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
    """
    path = Path(path)
    try:
        size_bytes = path.stat().st_size
        if not path.is_file():
            raise NotGGUF(f"{path}: is no file. Pass the .gguf file itself.")
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return Header(path, *Reader(path, data, size_bytes).read(lambda values: _require_sane(path, values)))
    except FileNotFoundError as error:
        again = "Make one with `quantize all MODEL`, or `f2gguf pull org/name`."
        raise NotGGUF(f"{path}: no such file. {again}") from error
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        raise NotGGUF(f"{path}: cannot be read as GGUF: {error}. Download or make it again.") from error


def _require_sane(path: Path, values: dict[str, Any]) -> None:
    """Refuse values on which llama.cpp would stop the process, or f2gguf would compute nonsense."""
    architecture = values.get("general.architecture", "")
    checks = {key.replace("{arch}", str(architecture)): check for key, check in _CHECKS.items()}
    checks |= {key: _TEXT for key in values if key.startswith(KEY_PROMPT)}
    checks |= {key: (float, lambda value: 0 <= value < math.inf) for key in values if key.startswith(KEY_INT8_STEP)}
    for key in filter(checks.__contains__, values):
        kind, is_sane = checks[key]
        if type(value := values[key]) is not kind or not is_sane(value):
            raise NotGGUF(f"{path}: its header has {key} = {value!r}; the file is damaged. Download or make it again.")
    if flaw := golden_flaw(values, values.get(f"{architecture}.embedding_length", 0)):
        raise NotGGUF(f"{path}: {flaw}; the file is damaged. Download or make it again.")


def _is_tokenizer(carried: str) -> bool:
    """Whether a value has the shape that llama/carried.py writes."""
    try:
        spec = json.loads(carried)
        flag, added = spec["split_special_tokens"], [(token["id"], token["content"]) for token in spec["added_tokens"]]
        return (
            {"normalizer", "pre_tokenizer"} <= spec.keys()
            and isinstance(spec["model"]["type"], str)
            and isinstance(flag, bool)
            and all(type(first) is type(last) is int and 0 <= first <= last for first, last in spec["ids"])
            and all(type(i) is int and i >= 0 and isinstance(content, str) for i, content in added)
        )
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return False


def _is_count(value: object) -> bool:
    return type(value) is int and 0 < value < 1 << 31


_TEXT = (str, lambda _: True)
_TEXTS = (tuple, lambda value: all(isinstance(text, str) for text in value))
_COUNT = (int, _is_count)
_EPSILON = (float, lambda value: 0 < value < math.inf)
_DRIFT = (float, lambda value: -1 < value <= 2)
# header key -> the type of its value, and what the value must be
_CHECKS: dict[str, tuple[type, Callable[[Any], bool]]] = {
    "general.architecture": _TEXT,
    "general.alignment": (int, lambda value: _is_count(value) and value >= 32 and value & (value - 1) == 0),
    "general.languages": _TEXTS,
    "{arch}.block_count": _COUNT,
    "{arch}.embedding_length": _COUNT,
    "{arch}.context_length": _COUNT,
    "{arch}.attention.layer_norm_rms_epsilon": _EPSILON,
    "{arch}.attention.layer_norm_epsilon": _EPSILON,
    KEY_DEFAULT_PROMPT: _TEXT,
    KEY_MAX_TOKENS: (int, lambda value: _is_count(value) and value > 1),
    KEY_MATRYOSHKA_DIMS: (tuple, lambda value: all(map(_is_count, value))),
    KEY_TOKENIZER: (str, _is_tokenizer),
    KEY_MEAN_DRIFT: _DRIFT,
    KEY_UPPER_DRIFT: _DRIFT,
    KEY_MAX_DRIFT: _DRIFT,
    KEY_QUICK: (bool, lambda _: True),
    KEY_CORPUS: _TEXT,
    KEY_CORPUS_MEAN: _DRIFT,
    KEY_CORPUS_UPPER: _DRIFT,
    KEY_CORPUS_N_TEXTS: _COUNT,
    KEY_MENDED: _TEXTS,
    "split.count": (int, lambda value: 0 <= value < 1 << 16),
    "split.no": (int, lambda value: 0 <= value < 1 << 16),
}
