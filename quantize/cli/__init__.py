"""The command `quantize`, and `f2gguf` with `quantize` in it: in which module each of their commands is."""

from __future__ import annotations

import click
from f2gguf.runtime.cli import f2gguf
from f2gguf.runtime.console import Commands

_QUANTIZE = {
    "all": "f2gguf.quantize.cli.all:all_",
    "fetch": "f2gguf.quantize.cli.checkpoint:fetch",
    "lock": "f2gguf.quantize.cli.checkpoint:lock",
    "convert": "f2gguf.quantize.cli.checkpoint:convert",
    "imatrix": "f2gguf.quantize.cli.files:imatrix",
    "variant": "f2gguf.quantize.cli.files:variant",
    "verify": "f2gguf.quantize.cli.files:verify",
    "card": "f2gguf.quantize.cli.release:card",
    "push": "f2gguf.quantize.cli.release:push",
}
_F2GGUF = {
    "index": "f2gguf.runtime.index.cli:index",
    "search": "f2gguf.runtime.index.cli:search",
    "fit": "f2gguf.quantize.cli.fit:fit",
    "bench": "f2gguf.evals.bench.cli:bench",
    "serve": "f2gguf.runtime.server.cli:serve",
    "quantize": "f2gguf.quantize.cli:quantize",
}


@click.group(cls=Commands, elsewhere=_QUANTIZE)
@click.version_option(package_name="f2gguf")
def quantize() -> None:
    """Turn embedding checkpoints into measured GGUF files.

    MODEL is a name in models.lock, a checkpoint folder, or org/name[@revision] on the Hugging Face Hub.
    """


f2gguf.elsewhere |= _F2GGUF
