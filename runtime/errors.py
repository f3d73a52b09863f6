"""Every error and warning that a user can meet."""

from __future__ import annotations

import contextlib
import difflib
import struct
from collections.abc import Iterable, Iterator
from typing import Any


class F2ggufError(Exception):
    """Base of every error that f2gguf raises on purpose. Its text names the file or flag, and the next step."""

    exit_code = 1

    def __reduce__(self) -> Any:
        """Pickle without a call of `__init__`. An error that can't be unpickled hangs a `multiprocessing.Pool`."""
        return _unpickled, (type(self), self.args, vars(self))


def _unpickled(kind: type[F2ggufError], args: tuple[Any, ...], attributes: dict[str, Any]) -> F2ggufError:
    error = kind.__new__(kind, *args)
    vars(error).update(attributes)
    return error


class WrongUsage(F2ggufError):
    """An argument or flag that cannot work."""

    exit_code = 2


class UnknownName(WrongUsage):
    """A model, variant, device or prompt that does not exist: no `what` is called `name`. Suggests the nearest."""

    def __init__(self, what: str, name: object, known: Iterable[str], hint: str = "") -> None:
        known, name = list(known), str(name)
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        lowered = {k.lower(): k for k in known}
        close = lowered.get(name.lower()) or (nearest[0] if nearest else None)
        suggestion = f" Did you mean {close!r}?" if close else ""
        super().__init__(f"no {what} is called {name!r}.{suggestion} Known: {', '.join(known) or 'none'}.{hint}")


# The tree of errors without content, one a line.
# fmt: off
class UnknownDims(WrongUsage): ...                  # a width that the model was not trained for

class CheckpointError(F2ggufError): ...             # the Hugging Face side
class UnsupportedCheckpoint(CheckpointError): ...   # an architecture, tokenizer or module that f2gguf does not convert
class BrokenCheckpoint(CheckpointError): ...        # a file that is missing, truncated or contradicts another
class Disagreement(CheckpointError): ...            # models.lock and the checkpoint state different facts

class GGUFError(F2ggufError): ...                   # the llama.cpp side
class LlamaCppMissing(GGUFError): ...               # llama.cpp's library cannot be loaded
class NotGGUF(GGUFError): ...                       # no GGUF file, or a truncated one
class NotAnEmbeddingModel(GGUFError): ...           # a GGUF file that holds something else
class PoolingMissing(GGUFError): ...                # the header does not say how to pool
class SelftestMissing(GGUFError): ...               # the header has no golden vectors to compare with

class HubError(F2ggufError): ...                    # the Hub did not do what was asked
class RepoMissing(HubError): ...                    # no such repository or revision, or a private one
class RepoGated(HubError): ...                      # the owner grants access
class RepoRenamed(HubError): ...                    # the repository has another name now
class RepoMoved(HubError): ...                      # a branch or tag of it is not where it was, or should be
class RateLimited(HubError): ...                    # too many requests
class HubUnreachable(HubError): ...                 # no connection, or a setting that forbids one
class HashMismatch(HubError): ...                   # other bytes than stated, on either side

class ConversionMismatch(F2ggufError): ...          # the written file does not do what the checkpoint does
class QuantizationFailed(F2ggufError): ...          # llama.cpp's quantiser gave up
class NonFiniteActivations(F2ggufError): ...        # the model overflows on a calibration text; names tensor and text
class WrongImatrix(F2ggufError): ...                # an importance matrix of another model, or none
class WrongRecipe(F2ggufError): ...                 # a recipe that does not parse, or belongs to other inputs
class TextError(F2ggufError): ...                   # a text that cannot be embedded
class Closed(F2ggufError): ...                      # an Embedder that was closed
class Forked(F2ggufError): ...                      # an Embedder that was used before the process was forked
class PoolBroken(F2ggufError): ...                  # a pool of processes of which one ended
class InputError(F2ggufError): ...                  # an input file that does not parse
class OutputError(F2ggufError): ...                 # an output that cannot be written
class UnfitRelease(F2ggufError): ...                # a release folder that is incomplete or contradicts itself
class DeviceMissing(F2ggufError): ...               # this build of llama.cpp lacks the device
class EndpointFailed(F2ggufError): ...              # an embeddings endpoint gave no vectors
class BenchFailed(F2ggufError): ...                 # a side of `f2gguf bench` did not run
class MemoryMissing(F2ggufError): ...               # a model does not fit this machine's memory
class ExtraMissing(F2ggufError): ...                # an optional dependency is not installed
# fmt: on


class SelftestFailed(GGUFError):
    """This file or device does not give what the file's maker measured. `faults` has a fault for each failed check."""

    def __init__(self, message: str, faults: tuple[Any, ...]) -> None:
        super().__init__(message)
        self.faults = faults


class NoVector(TextError):
    """`indices` are the texts that have no finite vector; `embeddings` holds all others, in their order."""

    def __init__(self, message: str, indices: list[int], embeddings: Any) -> None:
        super().__init__(message)
        self.indices = indices
        self.embeddings = embeddings


class OverBound(F2ggufError):
    """A variant was measured, and is over the bound. Every file was written."""

    exit_code = 3


class OutOfReach(F2ggufError):
    """No file can be that small."""

    exit_code = 3


@contextlib.contextmanager
def parsing(what: object, kind: type[F2ggufError], next_step: str) -> Iterator[None]:
    """Turn the errors that Python raises on data of the wrong shape into one clear `kind`.

    The block must only read and check that data: an error of our own code must not be called damage.
    """
    try:
        yield
    except (ArithmeticError, LookupError, RecursionError, ValueError, struct.error) as error:
        reason = str(error) or type(error).__name__
        if isinstance(error, ValueError) and callable(listed := getattr(error, "errors", None)):
            first = listed()[0]  # of pydantic's list
            reason = f"{'.'.join(map(str, first['loc'])) or 'all of it'}: {first['msg']}"
        shown = reason if len(reason) <= 160 else reason[:157] + "..."
        words = f"is damaged, or not what it should be ({type(error).__name__}: {shown})"
        raise kind(f"{what}: {words}. {next_step}") from error


class DriftWarning(UserWarning):
    """A file from the Hub is over its bound, or was never measured."""


class ConfigKeyWarning(UserWarning):
    """A checkpoint states what f2gguf does not know or follow, and what should change no vector."""


class FileWarning(UserWarning):
    """A file lacks or contradicts something, so that its vectors may be wrong; names the flag or command that mends it.

    `f2gguf inspect FILE --check` says all that there is to say.
    """


class TruncationWarning(UserWarning):
    """Texts were cut to the model's maximum length; the EOS stayed last."""
