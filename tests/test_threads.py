"""The number of threads: the cores of a machine, less what a container or the user takes away from them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from f2gguf.runtime.llama import threads
from f2gguf.runtime.llama.threads import default_threads

V2 = "31 23 0:28 {top} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw\n"
V1 = (
    "32 31 0:29 {top} /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
    "33 31 0:30 {top} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
)
OTHERS = "23 1 8:1 / / rw - ext4 /dev/root rw\n24 1 0:5 / /empty rw,relatime -  tmpfs  rw\n"
CPU = "sys/fs/cgroup/cpu,cpuacct"


@pytest.fixture(autouse=True)
def sixteen_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with two threads: 32 processors."""
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(32)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


def tree(root: Path, files: dict[str, str]) -> Path:
    siblings = {
        f"sys/devices/system/cpu/cpu{n}/topology/thread_siblings_list": f"{n % 16},{n % 16 + 16}\n" for n in range(32)
    }
    for name, content in (siblings | files).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


def test_two_threads_of_a_core_count_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_threads(tree(tmp_path, {})) == 16
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 16, 17})  # taskset, or a container's cpuset
    assert default_threads(tmp_path) == 2


def test_processors_count_where_the_machine_does_not_tell_its_cores(tmp_path: Path) -> None:
    assert default_threads(tmp_path) == 32


@pytest.mark.parametrize(
    ("mounts", "group", "files", "expected"),
    [
        # version 2: a container with a namespace of its own, and one that names its group from the host's top
        (V2.format(top="/"), "0::/", {"sys/fs/cgroup/cpu.max": "150000 100000\n"}, 2),
        (V2.format(top="/docker/12ab"), "0::/docker/12ab", {"sys/fs/cgroup/cpu.max": "300000 100000\n"}, 3),
        (V2.format(top="/"), "0::/", {"sys/fs/cgroup/cpu.max": "max 100000\n"}, 16),
        (V2.format(top="/"), "0::/", {"sys/fs/cgroup/cpu.max": "6400000 100000\n"}, 16),
        # a service of systemd, whose slice has a limit as well
        (
            V2.format(top="/"),
            "0::/a.slice/b.service",
            {"sys/fs/cgroup/a.slice/b.service/cpu.max": "400000 100000\n"},
            4,
        ),
        (
            V2.format(top="/"),
            "0::/a.slice/b.service",
            {
                "sys/fs/cgroup/a.slice/cpu.max": "200000 100000\n",
                "sys/fs/cgroup/a.slice/b.service/cpu.max": "max 100000\n",
            },
            2,
        ),
        # version 1, and both at once, as older systemd has them
        (
            V1.format(top="/docker/12ab"),
            "4:cpu,cpuacct:/docker/12ab\n3:memory:/docker/12ab",
            {f"{CPU}/cpu.cfs_quota_us": "250000\n", f"{CPU}/cpu.cfs_period_us": "50000\n"},
            5,
        ),
        (
            V1.format(top="/"),
            "4:cpu,cpuacct:/user\n3:memory:/other",
            {f"{CPU}/user/cpu.cfs_quota_us": "-1\n", f"{CPU}/user/cpu.cfs_period_us": "100000\n"},
            16,
        ),
        (
            V1.format(top="/") + V2.format(top="/").replace("/cgroup ", "/cgroup/unified "),
            "4:cpu,cpuacct:/user\n0::/user.slice",
            {f"{CPU}/user/cpu.cfs_quota_us": "50000\n", f"{CPU}/user/cpu.cfs_period_us": "100000\n"},
            1,
        ),
        # no group that can be seen, and a file that holds no number
        (V2.format(top="/"), "0::/gone", {}, 16),
        (V2.format(top="/"), "0::/", {"sys/fs/cgroup/cpu.max": "lots\n"}, 16),
    ],
)
def test_quotas_of_containers_count(
    tmp_path: Path, mounts: str, group: str, files: dict[str, str], expected: int
) -> None:
    told = {"proc/self/mountinfo": OTHERS + mounts, "proc/self/cgroup": f"{group}\n"}
    assert default_threads(tree(tmp_path, files | told)) == expected


@pytest.mark.parametrize(("value", "expected"), [("4", 4), ("3,2", 3), ("64", 16), ("", 16), ("0", 16), ("many", 16)])
def test_fewer_threads_for_openmp_are_fewer_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str, expected: int
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert default_threads(tree(tmp_path, {})) == expected


@pytest.mark.parametrize(("answer", "expected"), [("8\n", 8), ("", os.cpu_count() or 1)])
def test_macos_is_asked_for_its_performance_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str, expected: int
) -> None:
    command = tmp_path / "sysctl"
    command.write_text(f"#!/bin/sh\necho '{answer.strip()}'\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(sys, "platform", "darwin")
    threads._performance_cores.cache_clear()
    assert default_threads(tmp_path) == expected
    threads._performance_cores.cache_clear()
