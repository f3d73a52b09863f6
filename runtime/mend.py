"""A mended copy of a .gguf file: other header values, the same tensors. See `f2gguf repair-header`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from f2gguf.runtime.errors import GGUFError, NotGGUF, OutputError, UnknownDims, UnknownName, WrongUsage
from f2gguf.runtime.files import require_absent, require_free_space, writing
from f2gguf.runtime.gguf import header as keys
from f2gguf.runtime.gguf.case import Finding
from f2gguf.runtime.gguf.doctor import examine
from f2gguf.runtime.gguf.entries import UNSEALED, Value, entries, entry, is_sealed, leading_bytes, seal
from f2gguf.runtime.gguf.header import Header, read_header
from f2gguf.runtime.gguf.vocabulary import CONTROL, Vocabulary
from f2gguf.runtime.llama.model import Model

_CHUNK_BYTES = 1 << 24
# Keys of what was measured before, and is not true of other vectors
_MEASURED = ("f2gguf.golden.", "f2gguf.drift.", keys.KEY_INT8_STEP)
_VECTORS_STAY = (keys.KEY_NORMALIZE, keys.KEY_MATRYOSHKA_DIMS)  # these change no full-width direction
_ALIGNMENT = 32
_PROMPT_NAME = re.compile(r"\w[\w-]*")


@dataclass(frozen=True)
class Changes:
    """What to write into a header; None leaves a value as it is."""

    pooling: str | None = None
    add_bos: bool | None = None
    add_eos: bool | None = None
    eos_token: str | None = None
    causal: bool | None = None
    pre: str | None = None
    lowercase: bool | None = None
    prompts: Mapping[str, str] | None = None
    max_tokens: int | None = None
    dims: Sequence[int] | None = None
    normalize: bool | None = None


@dataclass(frozen=True)
class Mended:
    """A copy that was written: what was changed, what was dropped for it, and what the doctor still finds."""

    path: Path
    changes: tuple[str, ...]
    dropped: tuple[str, ...]
    findings: tuple[Finding, ...]


def repair_header(
    source: Path,
    target: Path,
    changes: Changes,
    *,
    force: bool = False,
    on_progress: Callable[[int], None] = lambda _: None,
) -> Mended:
    """Copy `source` to `target` with other header values, and every tensor as it is, byte for byte.

    The copy states what was changed. Golden vectors and the drift are left out where other vectors come of it.
    `on_progress` gets the number of bytes that were copied. Raises `WrongUsage` for changes that cannot be, or change
    nothing, `NotGGUF` for a damaged file, `OutputError` for a target that cannot be written or is the source.
    """
    header = read_header(source)
    if is_sealed(header) is False:
        raise NotGGUF(f"{source}: its header is not as f2gguf wrote it. Download or make it again, and mend that.")
    if target.exists() and target.samefile(source):
        raise OutputError(f"{target}: is the file itself. Name another one with -o.")
    require_absent(target, force=force)
    values = _values(header, changes)
    changed = {key: value for key, value in values.items() if _plain(header.values.get(key)) != _plain(value)}
    if not changed:
        stated = f" All of it is stated already: {', '.join(values)}." if values else ""
        raise WrongUsage(f"{source}: nothing to change.{stated} Name a flag, such as --pooling or --add-eos.")
    is_other = not set(changed) <= set(_VECTORS_STAY)
    dropped = tuple(key for key in header.values if is_other and key.startswith(_MEASURED))
    said = tuple(f"{key} = {value!r}, was {_stated(header, key)}" for key, value in changed.items())
    head = _head(header, changed, dropped, said)
    require_free_space(target.parent, source.stat().st_size, target.name, choose_with="-o")
    with writing(target) as part:
        _copy(header, head, part, on_progress)
        seal(part)
        _require_usable(read_header(part), target)
    return Mended(target, said, dropped, tuple(examine(read_header(target))))


def parse_prompts(stated: Sequence[str]) -> dict[str, str]:
    """["query=Query: "] -> {"query": "Query: "}."""
    found: dict[str, str] = {}
    for one in stated:
        name, equals, text = one.partition("=")
        if not equals or not _PROMPT_NAME.fullmatch(name) or name in found:
            raise WrongUsage(f"--prompt {one!r}: write NAME=TEXT, each NAME once, such as --prompt 'query=Query: '.")
        found[name] = text
    return found


def parse_dims(stated: str | None) -> list[int] | None:
    """'64,128' -> [64, 128]."""
    if stated is None:
        return None
    numbers = [one.strip() for one in stated.split(",")]
    if not all(number.isascii() and number.isdigit() for number in numbers):
        raise WrongUsage(f"--dims {stated}: write whole numbers, such as --dims 64,128,256.")
    return list(map(int, numbers))


def _values(header: Header, changes: Changes) -> dict[str, Value | Sequence[Value]]:
    """Header key -> its new value."""
    architecture = header.architecture
    found: dict[str, Value | Sequence[Value]] = {}
    if changes.pooling is not None:
        if changes.pooling not in keys.POOLING_IDS:
            raise UnknownName("pooling", changes.pooling, keys.POOLING_IDS)
        found[f"{architecture}.pooling_type"] = keys.POOLING_IDS[changes.pooling]
    if changes.eos_token is not None:
        found["tokenizer.ggml.eos_token_id"] = _token_id(header, changes.eos_token)
    if changes.max_tokens is not None:
        found[keys.KEY_MAX_TOKENS] = header.require_max_tokens(changes.max_tokens)
    if changes.dims is not None:
        found[keys.KEY_MATRYOSHKA_DIMS] = _widths(header, changes.dims)
    plain: dict[str, Value | None] = {
        keys.KEY_ADD_BOS: changes.add_bos,
        keys.KEY_ADD_EOS: changes.add_eos,
        f"{architecture}.attention.causal": changes.causal,
        "tokenizer.ggml.pre": changes.pre,
        keys.KEY_LOWERCASE: changes.lowercase,
        keys.KEY_NORMALIZE: changes.normalize,
    }
    found |= {key: value for key, value in plain.items() if value is not None}
    return found | {keys.KEY_PROMPT + name: text for name, text in (changes.prompts or {}).items()}


def _token_id(header: Header, token: str) -> int:
    """The id of a token as the vocabulary spells it."""
    vocabulary = Vocabulary(header)
    found = vocabulary.ids.get(token.encode())
    if found is None:
        types = vocabulary.types if vocabulary.types is not None else ()
        special = [vocabulary.text(i) or "" for i, kind in enumerate(types) if kind == CONTROL]
        raise UnknownName(f"token of {header.path}", token, special[:20], " (--eos-token)")
    return found


def _widths(header: Header, dims: Sequence[int]) -> list[int]:
    if not dims or min(dims) < 1 or max(dims) > header.n_embd:
        shown = ", ".join(map(str, dims)) or "none"
        raise UnknownDims(f"--dims {shown}: {header.name} gives {header.n_embd} dimensions, so name 1 to that.")
    return sorted({*dims, header.n_embd})


def _stated(header: Header, key: str) -> str:
    return repr(_plain(header.values[key])) if key in header.values else "not stated"


def _plain(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _head(
    header: Header, changed: Mapping[str, Value | Sequence[Value]], dropped: Sequence[str], said: Sequence[str]
) -> bytes:
    """Everything before the tensors, whose entries stay as they are."""
    kept = {key: data for key, data in entries(header).items() if key not in dropped}
    kept |= {key: entry(key, value) for key, value in changed.items()}
    maker = f"f2gguf {version('f2gguf')} repair-header: "
    lines = [*header.values.get(keys.KEY_MENDED, ()), *(maker + one for one in said)]
    lines += [f"{maker}left out {key}" for key in dropped]
    kept[keys.KEY_MENDED] = entry(keys.KEY_MENDED, lines)
    kept[keys.KEY_SEAL] = entry(keys.KEY_SEAL, UNSEALED)
    source = leading_bytes(header)
    counts = source[:16] + len(kept).to_bytes(8, "little")  # magic, version and number of tensors stay
    head = counts + b"".join(kept.values()) + source[header.values_end :]
    return head + bytes(-len(head) % _alignment(header))


def _copy(header: Header, head: bytes, target: Path, on_progress: Callable[[int], None]) -> None:
    """Write `head`, and behind it all that the source has from its first tensor on."""
    alignment = _alignment(header)
    with header.path.open("rb") as source, target.open("wb") as file:
        file.write(head)
        source.seek(-(-header.end // alignment) * alignment)
        while chunk := source.read(_CHUNK_BYTES):
            file.write(chunk)
            on_progress(len(chunk))


def _require_usable(header: Header, target: Path) -> None:
    """Raise `NotGGUF` for what no header can mend, `GGUFError` for what llama.cpp refuses."""
    if errors := [finding for finding in examine(header) if finding.severity == "error"]:
        raise NotGGUF(f"{target}: would still be of no use, and was not written: {errors[0]}")
    try:
        Model(header.path, device="cpu", vocab_only=True).close()
    except GGUFError as error:  # such as of --pre
        raise GGUFError(str(error).replace(str(header.path), f"{target}, which was not written", 1)) from error


def _alignment(header: Header) -> int:
    return int(header.values.get("general.alignment", _ALIGNMENT))
