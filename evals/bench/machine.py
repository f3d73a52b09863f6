"""What a benchmark ran on: processor, packages, the speed of a plain matrix product, the time of a cold start."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from f2gguf.evals.bench.sides import SideSettings
from f2gguf.runtime.errors import BenchFailed
from f2gguf.runtime.llama.library import default_threads

MATMUL_SIZE = 1536
_MATMUL_ROUNDS = 9
_COLD_ROUNDS = 5
_EMBED = "from f2gguf.runtime.cli import f2gguf; f2gguf(prog_name='f2gguf')"
_CALL = "import sys; from f2gguf.evals import bench_machine; bench_machine.{}(*sys.argv[1:])"
# every BLAS that numpy is built with: OpenBLAS, MKL, Accelerate
_BLAS_THREADS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")


def machine_facts(settings: SideSettings) -> dict[str, Any]:
    """Processor and threads, and the instructions that this llama.cpp was built for."""
    import llama_cpp

    return {
        "cpu": _cpu_model(),
        "n_physical_cores": default_threads(),
        "n_threads": settings.n_threads,
        "device": settings.device,
        "llama_cpp_system_info": llama_cpp.llama_print_system_info().decode().strip(" |\n"),
    }


def versions(settings: SideSettings) -> dict[str, str]:
    """Name -> version of what takes part."""
    packages = ["f2gguf", "llama-cpp-python", "numpy"]
    packages += ["sentence-transformers", "transformers", "torch"] if settings.checkpoint else []
    found = {"python": platform.python_version()} | {name: version(name) for name in packages}
    if settings.llama_server:
        asked = subprocess.run([settings.llama_server, "--version"], capture_output=True, text=True)
        lines = (asked.stdout + asked.stderr).splitlines()
        found["llama-server"] = next((line.split(":", 1)[1].strip() for line in lines if "version:" in line), "unknown")
    return found


def matmul_gflops(n_threads: int) -> float:
    """Billions of operations a second of numpy's float32 matrix product, in a process with so many threads."""
    seconds = float(_run_alone("print_matmul_seconds", env=os.environ | dict.fromkeys(_BLAS_THREADS, str(n_threads))))
    return 2 * MATMUL_SIZE**3 / seconds / 1e9


def print_matmul_seconds() -> None:
    """Print the median seconds of one product of two square float32 matrices."""
    import numpy as np

    left, right = np.random.default_rng(0).standard_normal((2, MATMUL_SIZE, MATMUL_SIZE), dtype=np.float32)
    rounds = []
    for _ in range(2 + _MATMUL_ROUNDS):
        start = time.perf_counter()
        left @ right
        rounds.append(time.perf_counter() - start)
    print(statistics.median(rounds[2:]))


def cold_start(settings: SideSettings) -> dict[str, Any]:
    """Seconds of the whole command `f2gguf embed` for one text, and of loading the model alone; each in new processes.

    The difference is what Python, the imports, the text and the output take.
    """
    flags = ["-m", settings.model, "--device", settings.device, "--threads", str(settings.n_threads)]
    command = [sys.executable, "-c", _EMBED, "embed", *flags, "--pooling", settings.pooling, "a text"]
    commands, loads = [], []
    for _ in range(_COLD_ROUNDS):
        start = time.perf_counter()
        _output(command)
        commands.append(time.perf_counter() - start)
        loads.append(float(_run_alone("print_load_seconds", settings.model, settings.device)))
    command_s, load_s = statistics.median(commands), statistics.median(loads)
    return {
        "command_s": command_s,
        "load_s": load_s,
        "rest_s": command_s - load_s,
        "command_rounds_s": commands,
        "load_rounds_s": loads,
    }


def print_load_seconds(path: str, device: str) -> None:
    """Print the seconds that llama.cpp takes to load a model and to make its first context, of 512 tokens."""
    import llama_cpp
    from f2gguf.runtime.llama.model import Model

    start = time.perf_counter()
    model = Model(Path(path), device=device)
    context = llama_cpp.llama_init_from_model(model.pointer, llama_cpp.llama_context_default_params())
    print(time.perf_counter() - start)
    llama_cpp.llama_free(context)
    model.close()


def _run_alone(function: str, *arguments: str, env: dict[str, str] | None = None) -> str:
    return _output([sys.executable, "-c", _CALL.format(function), *arguments], env=env)


def _output(command: list[str], *, env: dict[str, str] | None = None) -> str:
    process = subprocess.run(command, capture_output=True, text=True, env=env)
    if process.returncode:
        last = process.stderr.strip().splitlines()[-1:]
        raise BenchFailed(f"{' '.join(command[3:])}: ended with exit code {process.returncode}: {' '.join(last)}")
    return process.stdout


def _cpu_model() -> str:
    if sys.platform == "darwin":
        return _sysctl("machdep.cpu.brand_string") or platform.processor()
    lines = _cpuinfo()
    return next((value for key, value in lines if key == "model name"), platform.machine())


def _cpuinfo() -> list[tuple[str, str]]:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return [(key.strip(), value.strip()) for key, _, value in (line.partition(":") for line in lines)]


def _sysctl(name: str) -> str:
    return subprocess.run(["sysctl", "-n", name], capture_output=True, text=True).stdout.strip()
