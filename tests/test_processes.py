"""An Embedder in other processes: forked ones, those it is sent to, and those that lack a home or llama.cpp."""

from __future__ import annotations

import copy
import inspect
import os
import pickle
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import forking
import numpy as np
import pytest
from checkpoints import write_tiny
from conftest import QUICK, Run, facts_of
from f2gguf.quantize.convert.write import convert
from f2gguf.runtime import Embedder, errors
from f2gguf.runtime.files import cache_folder, recall, remember, sha256_file
from f2gguf.runtime.hub.models import name_elsewhere

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="macOS forbids forks of a process with threads")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    convert(facts_of(write_tiny(folder / "tiny")), folder / "tiny.gguf")
    return folder / "tiny.gguf"


@pytest.fixture(scope="module")
def model(path: Path) -> Iterator[Embedder]:
    with Embedder(path) as model:
        yield model


# Forks. The child ends itself after 60 s: a hang is a failure, not a test without an end.

FORK = """
import copy, gc, os, pickle, signal, sys, warnings
from f2gguf import Embedder, Forked
warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of every fork
path, model = sys.argv[1], Embedder(sys.argv[1])
{parent}
child = os.fork()
if child == 0:
    signal.alarm(60)
    try:
        {in_child}
    except Forked as error:
        print("Forked:", error)
    sys.stdout.flush()
    sys.exit(0)
status = os.waitpid(child, 0)[1]
print("status", status, "then", model.encode("b").shape)
"""


def forked(path: Path, in_child: str, *, parent: str = "model.encode('a')") -> list[str]:
    """What is printed, the child's lines first."""
    process = forking.run(FORK.format(parent=parent, in_child=in_child), path, is_real=True)
    assert process.stderr == ""
    lines = process.stdout.splitlines()
    assert lines[-1] == "status 0 then (32,)", "the child hung or died, or the parent's model is broken"
    return lines[:-1]


@pytest.mark.parametrize("call", ["encode('a')", "embed(['a'])", "tokenize('a')", "selftest()", "encode_query('a')"])
def test_a_fork_of_a_process_that_has_computed_gets_an_error_at_once(path: Path, call: str) -> None:
    (line,) = forked(path, f"model.{call}")
    assert line.startswith("Forked: this Embedder was used before this process was forked")
    assert "Open the file again here, or start processes by multiprocessing.get_context('spawn')" in line


@pytest.mark.parametrize(
    "way",
    [
        "model.close()",
        "model.close(wait=False); model.close()",
        "model.__exit__(None)",
        "del model; gc.collect()",
        "pass",
        "raise SystemExit(0)",
    ],
)
def test_a_fork_ends_its_copy_in_any_way(path: Path, way: str) -> None:
    assert forked(path, way) == []


@pytest.mark.parametrize(
    "again",
    [
        "Embedder(path)",
        "__import__('copy').copy(model)",
        "__import__('pickle').loads(__import__('pickle').dumps(model))",
    ],
)
def test_a_fork_may_open_the_file_again(path: Path, again: str, model: Embedder) -> None:
    (line,) = forked(path, f"print({again}.encode('a').tolist())")
    np.testing.assert_array_equal(np.array(eval(line), dtype=np.float32), model.encode("a"))


def test_a_server_may_open_the_file_and_fork_its_workers(path: Path, model: Embedder) -> None:
    """Until somebody computes there is no thread that a fork could lack."""
    (line,) = forked(path, "print(model.encode('a').tolist()); model.close()", parent="")
    np.testing.assert_array_equal(np.array(eval(line), dtype=np.float32), model.encode("a"))


def test_a_fork_while_another_thread_computes_gets_an_error_as_well(path: Path) -> None:
    parent = "import threading\nthreading.Thread(target=model.encode, args=(['word ' * 200] * 200,)).start()"
    parent += "\nwhile not model.encoder.engine.compute_seconds: pass"
    (line,) = forked(path, "model.encode('a')", parent=parent)
    assert line.startswith("Forked: ")


# Copies and pickles

POOL = """
import multiprocessing, sys, warnings
from concurrent.futures import ProcessPoolExecutor
from functools import partial

warnings.simplefilter("ignore", DeprecationWarning)


def length(model, text):
    return float((model.encode(text) ** 2).sum())


def refuse(_):
    from f2gguf import UnknownName

    raise UnknownName("prompt", "a", ["b"])


if __name__ == "__main__":
    from f2gguf import Embedder, Forked, UnknownName

    model = Embedder(sys.argv[1])
    length(model, "a")
    context = multiprocessing.get_context(sys.argv[2])
    try:
        with context.Pool(2) as pool:
            print([round(x, 3) for x in pool.map(partial(length, model), ["a", "b", "c"])])
    except Forked as error:
        print("Forked")
    with ProcessPoolExecutor(1, mp_context=context) as executor:
        try:
            executor.submit(refuse, 0).result()
        except UnknownName as error:
            print(error)
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver", "fork"])
def test_a_pool_of_processes_computes_with_it(path: Path, tmp_path: Path, method: str) -> None:
    """A pool pickles what it sends, so that even a forked worker opens the file again."""
    (tmp_path / "pool.py").write_text(POOL)
    command = [sys.executable, tmp_path / "pool.py", os.path.relpath(path, tmp_path), method]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert process.stdout.splitlines() == ["[1.0, 1.0, 1.0]", "no prompt is called 'a'. Known: b."], process.stderr


def test_a_pickle_holds_the_path_and_the_options(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)
    with Embedder(path.name, n_threads=1, device="cpu", max_tokens=64, deterministic=True) as model:
        model.prompts["other"] = "other: "
        model.max_seq_length = 16
        data = pickle.dumps(model)
        expected = model.encode("word " * 8, prompt_name="other")
    assert len(data) < 2000
    monkeypatch.chdir(tmp_path)  # a worker may have another folder
    with pickle.loads(data) as again:
        assert (again.header.path, again.max_seq_length) == (path, 16)
        assert again.encoder.settings.n_threads == 1
        assert again.encoder.settings.deterministic
        np.testing.assert_array_equal(again.encode("word " * 8, prompt_name="other"), expected)


def test_a_pickle_leaves_no_option_out(model: Embedder) -> None:
    """An option that was forgotten would change vectors in the other process."""
    options = {*inspect.signature(Embedder.__init__).parameters} - {"self"}
    assert set(model.__getstate__()["opening"]) == options


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_copy_is_open_when_the_first_is_closed(path: Path, copied: type) -> None:
    with Embedder(path) as first:
        second = copied(first)
        first.prompts["mine"] = ""
    assert second.encode("a").shape == (32,)
    assert "mine" not in second.prompts
    second.close()


def test_threads_of_another_machine_are_counted_there(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Embedder(path) as model:
        data = pickle.dumps(model)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with pickle.loads(data) as again:
        assert again.encoder.settings.n_threads == 1


def test_what_cannot_be_opened_again_cannot_be_pickled(path: Path) -> None:
    class Watch:
        def wants(self, tensor: int) -> bool:
            return False

        def take(self, tensor: int) -> None: ...

    with Embedder(path, watch=Watch()) as model, pytest.raises(errors.WrongUsage, match=r"with watch=\.\.\. cannot"):
        pickle.dumps(model)
    with pytest.raises(errors.Closed, match="was closed, and cannot be copied or pickled"):
        copy.copy(model)


def test_a_file_of_the_hub_is_named_by_its_commit() -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = Path("/cache/hub/models--org--name/snapshots") / commit
    assert name_elsewhere("org/name:Q8_0", folder / "n-Q8_0.gguf") == f"org/name:n-Q8_0.gguf@{commit}"
    assert name_elsewhere("org/name@v1", folder / "gguf" / "n.gguf") == f"org/name:gguf/n.gguf@{commit}"
    assert name_elsewhere(folder / "n-Q8_0.gguf", folder / "n-Q8_0.gguf") == str(folder / "n-Q8_0.gguf")


ERRORS = [error for error in vars(errors).values() if isinstance(error, type) and issubclass(error, errors.F2ggufError)]


@pytest.mark.parametrize("kind", ERRORS)
def test_errors_survive_the_way_between_processes(kind: type[errors.F2ggufError]) -> None:
    """`multiprocessing.Pool` waits for ever for a result whose error cannot be unpickled."""
    arguments = {
        errors.UnknownName: ("prompt", "a", ["b"]),
        errors.NoVector: ("words", [1], None),
        errors.SelftestFailed: ("words", ()),
    }
    error = kind(*arguments.get(kind, ("words",)))
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), vars(again)) == (kind, str(error), vars(error))


# Where something is missing

NOBODY = """
import os, pwd
def getpwuid(_): raise KeyError("getpwuid(): uid not found: 12345")
pwd.getpwuid = getpwuid
for name in ("HOME", "F2GGUF_CACHE", "XDG_CACHE_HOME"): os.environ.pop(name, None)
"""


def test_without_a_home_nothing_is_remembered(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pwd

    def getpwuid(_: int) -> None:
        raise KeyError

    monkeypatch.setattr(pwd, "getpwuid", getpwuid)
    for name in ("HOME", "F2GGUF_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert cache_folder() is None
    remember("a", 1)
    assert recall("a") is None
    assert len(sha256_file(path)) == 64


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (["f2gguf", "embed", "-m", "{path}", "a"], '"truncated": false'),
        (["f2gguf", "embed", "-m", "org/name:Q8_0", "a"], "org/name@main: the Hub cannot be reached"),
        (["quantize", "variant", "{path}", "Q8_0", "--stock", "-o", "{out}"], "under 2%"),
    ],
)
@pytest.mark.slow
def test_commands_work_for_a_user_whom_the_system_does_not_know(
    run: Run, path: Path, tmp_path: Path, command: list[str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    process = run(*(a.format(path=path, out=tmp_path / "x.gguf") for a in command), prelude=NOBODY + QUICK)
    assert "Traceback" not in process.stderr
    assert expected in process.stdout + process.stderr


@pytest.mark.slow
def test_files_of_the_current_folder_are_not_taken_for_modules(path: Path, tmp_path: Path) -> None:
    """By the processes that `fit` starts: what memory a file takes, and how fast it is."""
    for name in ("json", "random", "token"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('of the user')")
    command = Path(sysconfig.get_path("scripts"), "f2gguf")  # `python -c` would look in the folder itself
    process = subprocess.run([command, "fit", path.resolve()], cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "Shared library with base name 'llama' not found"), (b"no library", "file too short")],
)
@pytest.mark.parametrize(
    "command", [["f2gguf", "embed", "-m", "x.gguf", "a"], ["quantize", "variant", "x.gguf", "Q8_0"]]
)
def test_a_library_that_does_not_load_says_why_and_what_to_do(
    run: Run, tmp_path: Path, content: bytes | None, reason: str, command: tuple[str, ...]
) -> None:
    if content:
        (tmp_path / "libllama.so").write_bytes(content)
    process = run(*command, is_real=True, env={**os.environ, "LLAMA_CPP_LIB_PATH": str(tmp_path)})
    assert process.returncode == 1
    assert process.stderr.startswith("error: llama.cpp's library cannot be loaded: ")
    assert reason in process.stderr
    assert f"Unset LLAMA_CPP_LIB_PATH, which names {tmp_path}, or build it on this machine" in process.stderr
    assert process.stderr.count("\n") == 2


ABORT = """
import llama_cpp
from f2gguf.runtime.llama.library import libggml
libggml.ggml_log_internal(4, b"CUDA error: an illegal instruction\\n")
libggml.ggml_abort(b"ggml.c", 1, b"CUDA error")
"""


def test_where_llama_cpp_ends_the_process_its_reason_is_shown() -> None:
    process = subprocess.run([sys.executable, "-c", ABORT], capture_output=True, text=True)
    assert process.returncode < 0
    assert process.stderr.splitlines() == [
        "llama.cpp ends the process: ggml.c:1: CUDA error",
        "CUDA error: an illegal instruction",
    ]


@pytest.mark.parametrize("chosen", [None, "0"])
def test_cuda_graphs_are_off_before_llama_cpp_asks(chosen: str | None) -> None:
    """llama.cpp asks for the variable once, by C's getenv. A value that the user has set stays."""
    asked = "import ctypes, f2gguf.runtime.llama.library as _; getenv = ctypes.CDLL(None).getenv\n"
    asked += "getenv.restype = ctypes.c_char_p; print(getenv(b'GGML_CUDA_DISABLE_GRAPHS').decode())"
    env = os.environ | ({"GGML_CUDA_DISABLE_GRAPHS": chosen} if chosen else {})
    process = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, env=env)
    assert process.stdout.strip() == (chosen or "1")
