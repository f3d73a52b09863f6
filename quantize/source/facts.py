"""The facts of one model: what its checkpoint states, and what models.lock adds to that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from f2gguf.quantize.checkpoint.architectures import architecture_of, implied_tensors, match_tensors
from f2gguf.quantize.checkpoint.architectures.shared import Architecture
from f2gguf.quantize.checkpoint.folder import Checkpoint, read_checkpoint, read_settings
from f2gguf.quantize.checkpoint.modules import PROMPTS_FILE
from f2gguf.quantize.checkpoint.vocabulary import NO_EOS, Vocabulary, read_vocabulary
from f2gguf.quantize.checkpoint.weights import StoredTensor
from f2gguf.quantize.source.fetch import fetch, find_model
from f2gguf.quantize.source.lock import Entry, read_lock
from f2gguf.runtime.console import say
from f2gguf.runtime.errors import BrokenCheckpoint, Disagreement, UnknownName
from f2gguf.runtime.gguf.header import ENCODERS, POOLING_IDS


@dataclass(frozen=True)
class Stated:
    """What the user says of a model, where its checkpoint does not say it."""

    pooling: str | None = None
    eos_token: str | None = None  # the token that closes every text, or "none"
    allowed_keys: tuple[str, ...] = ()  # keys of config.json that change no vector
    name: str | None = None  # instead of the folder's


NOTHING = Stated()


@dataclass(frozen=True)
class Facts:
    """Everything that a conversion must know of a model."""

    entry: Entry
    checkpoint: Checkpoint
    architecture: Architecture
    shape: Mapping[str, Any]  # header keys below the architecture's name, as 'block_count'
    tensors: Mapping[str, StoredTensor]  # by GGUF name, in GGUF order
    vocabulary: Vocabulary
    pooling: str  # 'last', 'mean' or 'cls'
    prompts: Mapping[str, str]
    default_prompt: str | None  # name of the prompt that `encode` puts before every text
    max_tokens: int
    dims: tuple[int, ...]  # Matryoshka widths, the full one last

    @property
    def name(self) -> str:
        return self.entry.name

    @property
    def n_embd(self) -> int:
        return int(self.shape["embedding_length"])

    @property
    def base(self) -> str:
        """Dtype of the file that variants are made from: F16, or F32 for a model that does not fit it.

        llama.cpp rounds what enters a matrix to the type of the matrix. BF16 is too coarse for that: the minimum cosine
        of gate 1 was 0.99953 on Gemma 3 270M, whose weights are BF16, and 0.999998 with F32.
        """
        return "f16" if self.architecture.fits_f16 else "f32"

    @property
    def cache_bytes(self) -> int:
        """Bytes of one token's keys and values in F16; none for models that see a text at once."""
        if self.architecture.name in ENCODERS or "attention.head_count_kv" not in self.shape:
            return 0
        width = self.shape["attention.key_length"] + self.shape["attention.value_length"]
        return int(2 * self.shape["block_count"] * self.shape["attention.head_count_kv"] * width)


def open_facts(model: str, *, stated: Stated = NOTHING, lock: Path | None = None) -> Facts:
    """The facts of the model that `model` names. Its checkpoint is downloaded where it is not on this disk.

    Raises the errors of `find_model`, `fetch` and `read_facts`.
    """
    entry, folder = find_model(model, read_lock(lock), name=stated.name)
    checkpoint = fetch(entry, folder, check=lambda path: architecture_of(read_settings(path), stated.allowed_keys))
    say(f"{entry.name}: {checkpoint}")
    return read_facts(entry, checkpoint, stated=stated)


def read_facts(entry: Entry, folder: Path, *, stated: Stated = NOTHING, has_weights: bool = True) -> Facts:
    """Combine lock and checkpoint, and what the user states where the checkpoint does not.

    Of a folder without weights, the tensors are those that config.json implies: they can be planned with, not read.

    Raises `Disagreement` where two sources contradict each other (it names both), `BrokenCheckpoint` for a checkpoint
    that contradicts itself, `UnsupportedCheckpoint` for one that f2gguf does not convert.
    """
    checkpoint = read_checkpoint(folder) if has_weights else read_settings(folder)
    architecture = architecture_of(checkpoint, stated.allowed_keys)
    if not has_weights:
        checkpoint = replace(checkpoint, tensors=implied_tensors(checkpoint, architecture))
    shape = architecture.facts(checkpoint)
    limits = (entry.max_tokens, checkpoint.max_seq_length, shape["context_length"])
    return Facts(
        entry=entry,
        checkpoint=checkpoint,
        architecture=architecture,
        shape=shape,
        tensors=match_tensors(checkpoint, architecture),
        vocabulary=read_vocabulary(checkpoint, eos_token=_eos_token(entry, stated)),
        pooling=_pooling(entry, checkpoint, stated.pooling),
        prompts=_prompts(entry, checkpoint),
        default_prompt=checkpoint.prompts.default,
        max_tokens=min(int(limit) for limit in limits if limit),
        dims=_dims(entry, checkpoint, int(shape["embedding_length"])),
    )


def _eos_token(entry: Entry, stated: Stated) -> str | None:
    if stated.eos_token is None:
        return entry.eos_token
    return NO_EOS if stated.eos_token.lower() == "none" else stated.eos_token


def _pooling(entry: Entry, checkpoint: Checkpoint, pooling: str | None) -> str:
    if pooling is not None and pooling not in POOLING_IDS:
        raise UnknownName("pooling in --pooling", pooling, POOLING_IDS)
    for source, value in (("models.lock", entry.pooling), ("--pooling", pooling)):
        if value and checkpoint.modules.pooling and value != checkpoint.modules.pooling:
            raise Disagreement(
                f"{source} says {value} pooling for {entry.name}, but {checkpoint.root / 'modules.json'} leads to "
                f"{checkpoint.modules.pooling}. The checkpoint decides: correct {source}, or fetch the right revision."
            )
    stated = checkpoint.modules.pooling or pooling or entry.pooling
    if stated is None:
        files = checkpoint.modules.files[1:]
        what = f"lacks {files[0]}, which modules.json names" if files else "has no modules.json with a Pooling module"
        raise BrokenCheckpoint(
            f"{checkpoint.root}: {what}, so nothing says how to pool. "
            "State it with --pooling last (or mean, or cls), or as `pooling` in models.lock."
        )
    return stated


def _prompts(entry: Entry, checkpoint: Checkpoint) -> Mapping[str, str]:
    for name, text in entry.prompts.items():
        if checkpoint.prompts.texts.get(name, text) != text:
            raise Disagreement(
                f"models.lock gives {entry.name} the {name} prompt {text!r}, but "
                f"{checkpoint.root / PROMPTS_FILE} has {checkpoint.prompts.texts[name]!r}. "
                "The checkpoint decides: correct the lock, or fetch the revision that it means."
            )
    return {**entry.prompts, **checkpoint.prompts.texts}


def _dims(entry: Entry, checkpoint: Checkpoint, n_embd: int) -> tuple[int, ...]:
    if entry.matryoshka_dims and max(entry.matryoshka_dims) > n_embd:
        raise Disagreement(
            f"models.lock gives {entry.name} up to {max(entry.matryoshka_dims)} dimensions, but "
            f"{checkpoint.folder / 'config.json'} has a hidden_size of {n_embd}. Correct the lock."
        )
    return tuple(sorted({*entry.matryoshka_dims, n_embd}))
