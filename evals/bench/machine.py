"""What a benchmark ran on: processor, threads, packages."""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from f2gguf.evals.bench.sides import LLAMA_SERVER, TRANSFORMERS, SideSettings
from f2gguf.runtime.llama.library import default_threads


def machine_facts(settings: SideSettings) -> dict[str, Any]:
    """Processor and threads, and the instructions that this llama.cpp was built for."""
    import llama_cpp

    return {
        "cpu": _cpu_model() or platform.processor() or platform.machine(),
        "n_physical_cores": default_threads(),
        "n_threads": settings.n_threads,
        "device": settings.device,
        "llama_cpp_system_info": llama_cpp.llama_print_system_info().decode().strip(" |\n"),
    }


def versions(sides: Mapping[str, SideSettings]) -> dict[str, str]:
    """Name -> version of what takes part."""
    packages = ["f2gguf", "llama-cpp-python", "numpy"]
    packages += ["sentence-transformers", "transformers", "torch"] if TRANSFORMERS.keys() & sides.keys() else []
    numbers = {"python": platform.python_version()} | {name: version(name) for name in packages}
    if LLAMA_SERVER in sides:
        said = _output(str(sides[LLAMA_SERVER].llama_server), "--version")
        numbers[LLAMA_SERVER] = (re.findall("version:(.*)", said) or ["unknown"])[0].strip()
    return numbers


def _cpu_model() -> str:
    if sys.platform == "darwin":
        return _output("sysctl", "-n", "machdep.cpu.brand_string").strip()
    path = Path("/proc/cpuinfo")
    models = re.findall(r"^model name\s*: (.*)", path.read_text() if path.exists() else "", re.MULTILINE)
    return str(models[0]) if models else ""


def _output(*command: str) -> str:
    process = subprocess.run(command, capture_output=True, text=True, errors="replace")
    return process.stdout + process.stderr
