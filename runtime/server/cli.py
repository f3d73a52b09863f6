"""The command `f2gguf serve`."""

from __future__ import annotations

import ipaddress
import os
import socket
import threading
from collections.abc import Callable
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import click
from f2gguf.runtime.cli import ADD_EOS, DEVICE, GPU_LAYERS, MAX_TOKENS, POOLING, THREADS, require_model
from f2gguf.runtime.console import say
from f2gguf.runtime.errors import ExtraMissing, WrongUsage

_Command = TypeVar("_Command", bound=Callable[..., None])


def _limit(flag: str, name: str, default: int | float, words: str) -> Callable[[_Command], _Command]:
    kind = click.IntRange(1) if isinstance(default, int) else float
    return click.option(flag, name, default=default, show_default=True, type=kind, help=words)


@click.command()
@click.option(
    "-m",
    "--model",
    "models",
    multiple=True,
    metavar="[NAME=]MODEL",
    help="A .gguf file, or org/name[:VARIANT][@revision] on the Hub; repeatable [default: $F2GGUF_MODEL].",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", default=8080, show_default=True, type=click.IntRange(0, 65535), help="Port, or 0 for a free one."
)
@click.option("--api-keys-file", type=click.Path(path_type=Path), help="File of the clients' keys, one a line.")
@click.option("--api-key-env", metavar="NAME", help="Environment variable that holds such a key, or several.")
@click.option("--allow-open", is_flag=True, help="Let other machines in without a key.")
@click.option(
    "--cors", "cors_origins", multiple=True, metavar="ORIGIN", help="Accept pages of this origin; repeatable."
)
@click.option(
    "--allow-host",
    "allowed_hosts",
    multiple=True,
    metavar="NAME",
    help="Answer requests to this name of the server too, or to every name for '*'; repeatable. Addresses, localhost, "
    "--host and this machine's name are always answered.",
)
@click.option("--truncate", is_flag=True, help="Cut texts that are too long, where a request does not say.")
@click.option(
    "--allow-token-ids",
    is_flag=True,
    help="Accept token ids instead of texts. They must be of the model's own tokenizer.",
)
@click.option("--selftest", is_flag=True, help="Refuse files without golden vectors. Files that have them are tested.")
@_limit("--max-body", "max_body_bytes", 16 << 20, "Bytes that a request's body may have.")
@_limit("--max-texts", "max_texts", 2048, "Texts that a request may have.")
@_limit("--max-request-tokens", "max_request_tokens", 262_144, "Tokens that a request may have.")
@_limit("--max-waiting-tokens", "max_waiting_tokens", 524_288, "Tokens that may wait; more are answered with 429.")
@_limit("--max-requests", "max_requests", 512, "Requests in flight; more are answered with 429.")
@_limit("--header-timeout", "header_timeout_s", 10.0, "Seconds to wait for a request's headers before hanging up.")
@_limit("--body-timeout", "body_timeout_s", 30.0, "Seconds to wait for a body before the answer 408.")
@_limit("--drain-timeout", "drain_timeout_s", 60.0, "Seconds to finish accepted requests after SIGTERM.")
@MAX_TOKENS
@POOLING
@ADD_EOS
@DEVICE
@GPU_LAYERS
@THREADS
def serve(
    models: tuple[str, ...],
    host: str,
    port: int,
    api_keys_file: Path | None,
    api_key_env: str | None,
    allow_open: bool,
    allowed_hosts: tuple[str, ...],
    selftest: bool,
    drain_timeout_s: float,
    **options: Any,
) -> None:
    """Serve embeddings to the clients of OpenAI, text-embeddings-inference, Ollama and Cohere.

    A model's NAME is its file's name, unless you give another; clients put ':query' or ':document' behind it. Logs are
    JSON on stderr, without anybody's text. After SIGTERM, accepted requests are finished.
    """
    files = named_files(models or (require_model(os.environ.get("F2GGUF_MODEL")),))
    keys = _read_keys(api_keys_file, api_key_env)
    if not keys and not allow_open and not _is_loopback(host):
        raise WrongUsage(
            f"--host {host}: other machines could use this server. Pass --api-keys-file or --api-key-env, or "
            "--allow-open to let everybody in."
        )
    missing = [
        name for name in ("fastapi", "httptools", "uvicorn", "prometheus_client", "orjson") if find_spec(name) is None
    ]
    if missing:
        raise ExtraMissing(f"serve: not installed: {', '.join(missing)}. Run: pip install 'f2gguf[serve]'")
    from f2gguf.runtime.server import app as server
    from f2gguf.runtime.server.batching import Schedule
    from f2gguf.runtime.server.metrics import Metrics, log_as_json
    from f2gguf.runtime.server.models import Limits, open_model

    stated = {field.name: options.pop(field.name) for field in fields(Limits) if field.name in options}
    limits, metrics = Limits(api_keys=keys, host_names=_host_names(host, allowed_hosts), **stated), Metrics()
    log_as_json()
    with server.bound(host, port) as listener:
        opening = {"schedule": Schedule(), "selftest": selftest, **options}
        served = [open_model(file, name, limits, metrics, **opening) for name, file in files.items()]
        for model in served:
            say(f"{model.name}: {model.embedder.description}; selftest: {model.selftest}")
            threading.Thread(target=model.finish_selftest, name="selftest", daemon=True).start()
        say(f"http://{host}:{listener.getsockname()[1]}")
        server.serve(server.create_app(served, limits, metrics), listener, drain_timeout_s=drain_timeout_s)
        for model in served:
            model.embedder.close()


def named_files(models: tuple[str, ...]) -> dict[str, str]:
    """Names and files of `-m [NAME=]MODEL`. Without a name: that of the file ('nano-Q8_0'), or of 'org/nano:Q8_0'."""
    from f2gguf.runtime.hub.models import parse_model

    files: dict[str, str] = {}
    for option in models:
        name, equals, model = option.partition("=")
        if not equals or Path(option).exists():
            reference = None if Path(option).exists() else parse_model(option)
            parts = [reference.repo.split("/")[1], reference.variant] if reference else [Path(option).stem]
            name, model = "-".join(filter(None, parts)), option
        if not name or not model:
            raise WrongUsage(f"-m {option}: pass MODEL, or NAME=MODEL.")
        if name in files:
            raise WrongUsage(f"-m {option}: another model is called {name}. Pass NAME=MODEL.")
        files[name] = model
    return files


def _read_keys(path: Path | None, variable: str | None) -> tuple[str, ...]:
    """API keys of a file (one a line; # begins a comment) and of an environment variable (separated by spaces)."""
    keys: list[str] = []
    if path is not None:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise WrongUsage(f"--api-keys-file {path}: cannot be read: {error}.") from error
        keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not keys:
            raise WrongUsage(f"--api-keys-file {path}: holds no key. Write one a line.")
    if variable is not None:
        if not (more := os.environ.get(variable, "").split()):
            raise WrongUsage(f"--api-key-env {variable}: holds no key. Set it.")
        keys += more
    return tuple(keys)


def _host_names(host: str, allowed: tuple[str, ...]) -> tuple[str, ...]:
    """The names by which requests may call this server: those that are stated, and the machine's own."""
    from f2gguf.runtime.server.guard import host_name, is_host

    for name in allowed:
        if name != "*" and not is_host(name):
            raise WrongUsage(f"--allow-host {name}: pass a name, such as embeddings.example.org.")
    own = socket.gethostname()
    return tuple(map(host_name, (host, own, f"{own}.local", *allowed)))


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
