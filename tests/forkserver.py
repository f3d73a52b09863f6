"""The other side of `forking`: it has imported what programs of f2gguf import, and forks one for each job."""

from __future__ import annotations

import atexit
import ctypes
import gc
import importlib
import io
import os
import pickle
import signal
import socket
import sys
from types import CodeType
from typing import TextIO

# Packages that `quantize` and `f2gguf` import; not huggingface_hub, and what imports that
MODULES = """
    anyio.streams.tls click ctypes.util email.utils encodings.ascii fastapi filelock fsspec gguf httpcore2 httptools
    httpx2 importlib.metadata llama_cpp._ggml matplotlib.backends.backend_agg matplotlib.figure numpy orjson
    prometheus_client pydantic safetensors.numpy scipy.stats starlette.middleware.cors tomlkit tomllib tqdm.auto uvicorn
    uvloop yaml
"""


def serve(descriptor: int) -> CodeType:
    """Fork for every job. It returns in the children alone, with the code to run."""
    connection = socket.socket(fileno=descriptor)
    fresh = set(sys.modules)
    for name in MODULES.split():
        importlib.import_module(name)
    del sys.path[0]  # forking put it there
    _spare_at_exit(fresh)
    gc.freeze()
    while True:
        header, fds, _, _ = socket.recv_fds(connection, 8, 3)
        if not header:
            os._exit(0)  # the tests are over
        job = connection.recv(int.from_bytes(header, "little"), socket.MSG_WAITALL)
        if (between := os.fork()) == 0:
            if child := os.fork():
                connection.sendall(child.to_bytes(8, "little"))
                os._exit(0)
            connection.close()
            return _become(*pickle.loads(job), fds)
        os.waitpid(between, 0)
        connection.sendall(b"\0")  # by now the child has another parent
        for fd in fds:
            os.close(fd)


def _spare_at_exit(fresh: set[str]) -> None:
    """Python takes every module apart when it ends, which takes 0.1 s for what is here already: leave that out."""
    here = {name: module for name, module in sys.modules.items() if name not in fresh or name == __name__}
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(here))  # nobody frees them

    def forget() -> None:
        for name in here:
            sys.modules.pop(name, None)

    atexit.register(forget)  # the first to be registered is the last to run


def _become(
    code: str, arguments: list[str], folder: str, environment: dict[str, str], ignored: list[int], fds: list[int]
) -> CodeType:
    for target, fd in enumerate(fds):
        os.dup2(fd, target)
        os.close(fd)
    for target, name in enumerate(("stdin", "stdout", "stderr")):
        setattr(sys, name, _reopened(target, getattr(sys, name)))
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as Python sets it where nobody ignores it
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["-c", *arguments]
    return compile(code, "<string>", "exec")


def _reopened(fd: int, old: TextIO) -> TextIO:
    """As Python opens its standard streams."""
    buffer = open(fd, "wb" if fd else "rb", 0 if fd and old.write_through else -1, closefd=False)  # noqa: SIM115
    return io.TextIOWrapper(
        buffer, old.encoding, old.errors, "\n" if fd else None, old.line_buffering, old.write_through
    )
