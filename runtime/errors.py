"""Every error a user can meet.

F2ggufError
├── WrongUsage               exit 2: an argument or flag that cannot work
│   ├── UnknownName          a model, variant, device or prompt that does not exist; suggests the nearest
│   └── UnknownDims          a width the model was not trained for
├── CheckpointError          the Hugging Face side
│   ├── UnsupportedCheckpoint    an architecture, tokenizer or module that f2gguf does not convert
│   ├── BrokenCheckpoint         a file that is missing, truncated or contradicts another
│   └── Disagreement             models.lock and the checkpoint state different facts
├── GGUFError                the llama.cpp side
│   ├── NotGGUF              no GGUF file, or a truncated one
│   ├── NotAnEmbeddingModel  a GGUF file that holds something else
│   ├── PoolingMissing       the header does not say how to pool
│   ├── SelftestMissing      the header has no golden vectors to compare with
│   └── SelftestFailed       a file or device that does not give what the file's maker measured; carries the faults
├── ConversionMismatch       the written file does not do what the checkpoint does
├── QuantizationFailed       llama.cpp's quantiser gave up
├── NonFiniteActivations     a calibration text on which the model overflows; names tensor and text
├── WrongImatrix             an importance matrix of another model, or none
├── WrongRecipe              a recipe that does not parse, or belongs to other inputs
├── TextError                a text that cannot be embedded
│   └── NoVector                 texts whose vector is not finite; carries the vectors of all others
├── Closed                   an Embedder that was closed
├── InputError               an input file that does not parse
├── OutputError              an output that cannot be written
├── UnfitRelease             a release folder that is incomplete, unmeasured or contradicts itself
├── DeviceMissing            this build of llama.cpp lacks the device
├── HubError                 the Hub did not do what was asked
│   ├── RepoMissing              no such repository or revision, or a private one
│   ├── RepoGated                the owner grants access
│   ├── RepoRenamed              it has another name now
│   ├── RepoMoved                a branch or tag of it is not where it was, or was to be
│   ├── RateLimited              too many requests
│   ├── HubUnreachable           no connection, or told to do without one
│   └── HashMismatch             other bytes than stated, on either side
├── EndpointFailed           an embeddings endpoint gave no vectors
├── BenchFailed              a side of `f2gguf bench` did not run
├── MemoryMissing            a model does not fit this machine's memory
├── ExtraMissing             an optional dependency is not installed
├── OverBound                exit 3: measured, and over the bound (every file was written)
└── OutOfReach               exit 3: no file can be that small
"""

from __future__ import annotations

import contextlib
import difflib
import struct
from collections.abc import Iterable, Iterator
from typing import Any


class F2ggufError(Exception):
    """Base of every error that f2gguf raises on purpose; its text names the file or flag and the next step."""

    exit_code = 1


class WrongUsage(F2ggufError):
    exit_code = 2


class UnknownName(WrongUsage):
    """`what` called `name` does not exist among `known`."""

    def __init__(self, what: str, name: str, known: Iterable[str], hint: str = "") -> None:
        known = list(known)
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        lowered = {k.lower(): k for k in known}
        close = lowered.get(name.lower()) or (nearest[0] if nearest else None)
        suggestion = f" Did you mean {close!r}?" if close else ""
        super().__init__(f"no {what} is called {name!r}.{suggestion} Known: {', '.join(known) or 'none'}.{hint}")


class UnknownDims(WrongUsage): ...


class CheckpointError(F2ggufError): ...


class UnsupportedCheckpoint(CheckpointError): ...


class BrokenCheckpoint(CheckpointError): ...


class Disagreement(CheckpointError): ...


class GGUFError(F2ggufError): ...


class NotGGUF(GGUFError): ...


class NotAnEmbeddingModel(GGUFError): ...


class PoolingMissing(GGUFError): ...


class SelftestMissing(GGUFError): ...


class SelftestFailed(GGUFError):
    """`faults` says what each check found."""

    def __init__(self, message: str, faults: tuple[Any, ...]) -> None:
        super().__init__(message)
        self.faults = faults


class ConversionMismatch(F2ggufError): ...


class QuantizationFailed(F2ggufError): ...


class NonFiniteActivations(F2ggufError): ...


class WrongImatrix(F2ggufError): ...


class WrongRecipe(F2ggufError): ...


class TextError(F2ggufError): ...


class NoVector(TextError):
    """`indices` are the texts that have no finite vector; `embeddings` holds all others, in their order."""

    def __init__(self, message: str, indices: list[int], embeddings: Any) -> None:
        super().__init__(message)
        self.indices = indices
        self.embeddings = embeddings


class Closed(F2ggufError): ...


class InputError(F2ggufError): ...


class OutputError(F2ggufError): ...


class UnfitRelease(F2ggufError): ...


class DeviceMissing(F2ggufError): ...


class HubError(F2ggufError): ...


class RepoMissing(HubError): ...


class RepoGated(HubError): ...


class RepoRenamed(HubError): ...


class RepoMoved(HubError): ...


class RateLimited(HubError): ...


class HubUnreachable(HubError): ...


class HashMismatch(HubError): ...


class EndpointFailed(F2ggufError): ...


class BenchFailed(F2ggufError): ...


class MemoryMissing(F2ggufError): ...


class ExtraMissing(F2ggufError): ...


class OverBound(F2ggufError):
    exit_code = 3


class OutOfReach(F2ggufError):
    exit_code = 3


@contextlib.contextmanager
def parsing(what: object, kind: type[F2ggufError], next_step: str) -> Iterator[None]:
    """Turn what Python raises on foreign data of the wrong shape into one clear `kind`.

    Keep the block to reading and checking that data: an error of our own code must not be called damage.
    """
    try:
        yield
    except _MALFORMED as error:
        reason = _reason(error)
        shown = reason if len(reason) <= 160 else reason[:157] + "..."
        raise kind(
            f"{what}: is damaged, or not what it should be ({type(error).__name__}: {shown}). {next_step}"
        ) from error


_MALFORMED = (ArithmeticError, LookupError, RecursionError, ValueError, struct.error)


def _reason(error: Exception) -> str:
    """What an error says, in a line; of pydantic's lists of errors the first, with the place of the value."""
    if isinstance(error, ValueError) and callable(listed := getattr(error, "errors", None)):
        first = listed()[0]
        return f"{'.'.join(map(str, first['loc'])) or 'all of it'}: {first['msg']}"
    return str(error) or type(error).__name__


class DriftWarning(UserWarning):
    """A file from the Hub is over its bound, or was never measured."""


class TruncationWarning(UserWarning):
    """Texts were cut to the model's maximum length; the EOS stayed last."""
