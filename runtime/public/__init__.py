"""The public names of f2gguf, for `from f2gguf import ...`: those of PUBLIC, and every error and warning.

All other names are private. A name is loaded when it is asked for, so that `import f2gguf` itself takes no time.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from f2gguf.runtime import errors

if TYPE_CHECKING:
    from f2gguf.evals.drift import Verdict as Verdict
    from f2gguf.evals.drift import judge as judge
    from f2gguf.evals.mteb.encoder import F2ggufEncoder as F2ggufEncoder
    from f2gguf.integrations.sentence_transformers import sentence_transformer as sentence_transformer
    from f2gguf.quantize.fit.fit import Fit as Fit
    from f2gguf.quantize.fit.fit import Fits as Fits
    from f2gguf.quantize.fit.fit import fit as fit
    from f2gguf.quantize.pipeline import quantize_model as quantize_model
    from f2gguf.quantize.report.report import Report as Report
    from f2gguf.runtime.embedder import Embedder as Embedder
    from f2gguf.runtime.embedder import Embeddings as Embeddings
    from f2gguf.runtime.errors import *  # noqa: F403

PUBLIC = {
    "Embedder": "f2gguf.runtime.embedder",
    "Embeddings": "f2gguf.runtime.embedder",
    "judge": "f2gguf.evals.drift",
    "Verdict": "f2gguf.evals.drift",
    "fit": "f2gguf.quantize.fit.fit",
    "Fit": "f2gguf.quantize.fit.fit",
    "Fits": "f2gguf.quantize.fit.fit",
    "quantize_model": "f2gguf.quantize.pipeline",
    "Report": "f2gguf.quantize.report.report",
    "sentence_transformer": "f2gguf.integrations.sentence_transformers",
    "F2ggufEncoder": "f2gguf.evals.mteb.encoder",
}
ERRORS = {
    name: found
    for name, found in vars(errors).items()
    if isinstance(found, type) and issubclass(found, (errors.F2ggufError, UserWarning))
}


def __getattr__(name: str) -> Any:
    if name in ERRORS:
        return ERRORS[name]
    if name in PUBLIC:
        return getattr(import_module(PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*PUBLIC, *ERRORS])
