"""How many threads to compute with: one for each physical core that this process may use."""

from __future__ import annotations

import functools
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import SupportsIndex

from f2gguf.runtime.errors import WrongUsage

MAX_THREADS = 512  # as in ggml (GGML_MAX_N_THREADS): a number far beyond ends the process
_ROOT = Path("/")


def default_threads(root: Path = _ROOT) -> int:
    """Number of physical cores that this process may run on: two threads of one core only get in each other's way.

    macOS: the performance cores. A container's CPU quota counts where it is less, and so does OMP_NUM_THREADS, which
    Ray, Slurm and joblib set for their workers. `root` is where /sys and /proc are.
    """
    counts = (_cores(root), _cpu_quota(root), _first_number(os.environ.get("OMP_NUM_THREADS", "")))
    return min(MAX_THREADS, *(count for count in counts if count))


def require_threads(n_threads: int | None) -> int:
    """`n_threads`, or `default_threads()` for None. Raises `WrongUsage` for what ggml cannot have."""
    if n_threads is None:
        return default_threads()
    if not isinstance(n_threads, SupportsIndex) or not 1 <= n_threads <= MAX_THREADS:
        raise WrongUsage(f"n_threads is {n_threads!r}: pass a whole number from 1 to {MAX_THREADS} (--threads).")
    return int(n_threads)


def cpu_name(root: Path = _ROOT) -> str:
    """The processor's model as the system names it, such as 'AMD EPYC 9654 96-Core Processor'."""
    if sys.platform == "darwin":
        return _sysctl("machdep.cpu.brand_string") or platform.machine()
    models = re.findall(r"^model name\s*: (.*)", _read(root / "proc/cpuinfo"), re.MULTILINE)
    return str(models[0]) if models else platform.processor() or platform.machine()


def cpu_flags(root: Path = _ROOT) -> frozenset[str]:
    """What Linux says that the processor has, such as 'avx2'; nothing elsewhere."""
    found = re.findall(r"^flags\s*: (.*)", _read(root / "proc/cpuinfo"), re.MULTILINE)
    return frozenset(found[0].split()) if found else frozenset()


def _cores(root: Path) -> int:
    if sys.platform == "darwin":
        return _performance_cores() or os.cpu_count() or 1
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    processors = os.sched_getaffinity(0)  # a cpuset of the container counts here
    siblings = {_read(root / f"sys/devices/system/cpu/cpu{n}/topology/thread_siblings_list") for n in processors}
    return len(processors) if "" in siblings else len(siblings)


@functools.cache
def _performance_cores() -> int | None:
    """What macOS's `sysctl` says, asked once in a process; None where it does not know."""
    return _first_number(_sysctl("hw.perflevel0.physicalcpu"))


def _sysctl(name: str) -> str:
    return subprocess.run(["sysctl", "-n", name], capture_output=True, text=True).stdout.strip()


def _cpu_quota(root: Path) -> int | None:
    """Processors' worth of time that control groups leave to this process, rounded up; None without a limit.

    Every group above it has a say as well: Kubernetes limits the pod, systemd the slice.
    """
    quotas = [_quota_of(folder) for folder in _control_groups(root)]
    return min((quota for quota in quotas if quota), default=None)


def _quota_of(folder: Path) -> int | None:
    """The limit of one group: cpu.max ("150000 100000") in version 2, two files in version 1; "max" and -1 are none."""
    quota, _, period = _read(folder / "cpu.max").partition(" ")
    if not quota:
        quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
    n_quota, n_period = _first_number(quota), _first_number(period)
    return -(-n_quota // n_period) if n_quota and n_period else None


def _control_groups(root: Path) -> Iterator[Path]:
    """Folders of the groups that this process is in, with those above them, as far as they can be seen here.

    Source: the manual pages cgroups(7), for /proc/self/cgroup, and proc_pid_mountinfo(5).
    """
    paths = {}  # "cpu" (version 1) or "" (version 2) -> the group, such as /docker/12ab
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        paths.update(dict.fromkeys(controllers.split(","), path))
    for line in _read(root / "proc/self/mountinfo").splitlines():
        fields, _, of_type = line.partition(" - ")
        top, mounted_at = fields.split()[3:5]
        kind, *_, options = of_type.split()
        controller = {"cgroup2": "", "cgroup": "cpu"}.get(kind)
        if controller is None or (controller and controller not in options.split(",")):
            continue
        folder = root / mounted_at.lstrip("/")
        yield folder
        group = PurePosixPath(paths.get(controller, "/"))
        # A container may see its own group as the top of the mount, while `paths` names it from the host's top.
        below = group.relative_to(top) if group.is_relative_to(top) else PurePosixPath()
        for part in below.parts:
            folder = folder / part
            yield folder


def _read(path: Path) -> str:
    """The content of a small file without spaces at its ends; "" where it cannot be read."""
    try:
        return path.read_text().strip()
    except (OSError, ValueError):
        return ""


def _first_number(text: str) -> int | None:
    """The positive number that a text begins with ("4,2" -> 4), None for any other text."""
    first = text.split(",")[0].strip()
    return int(first) if first.isascii() and first.isdigit() and int(first) else None
