"""Who computes shards: this process, several processes of this machine, or a Ray cluster."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from importlib.util import find_spec

from f2gguf.runtime.corpus.work import Embedded, Options, embed_texts, embed_with
from f2gguf.runtime.embedder import Embedder
from f2gguf.runtime.errors import ExtraMissing, F2ggufError, PoolBroken, WrongUsage
from f2gguf.runtime.llama.threads import default_threads, require_threads
from f2gguf.runtime.pool import end_with_parent

# Where memory allows, a process for each thread is quicker than one with all: 2,000 texts of f2llm-nano (Q4_0) took two
# processes 30 and 33 s, and one with two threads 49 and 51 s, on two cores that were busy with other work
SMALL_BYTES = 100_000_000  # of a file that every core may have a copy of
_BYTES_A_PROCESS = 2_000_000  # of input: fewer are embedded before a process has started


@dataclass(frozen=True)
class Pool:
    """Takes the texts of a shard, and gives a future of their vectors. `n_slots()` shards are at work at once."""

    submit: Callable[[Sequence[str]], Future[Embedded]]
    n_slots: Callable[[], int]

    def result(self, future: Future[Embedded]) -> Embedded:
        """Raises what the work did, and `PoolBroken` where a process ended before its work was done."""
        try:
            return future.result()
        except BrokenProcessPool as error:
            raise PoolBroken(
                "a process was killed, perhaps for memory. Finished shards are kept: run the command again, perhaps "
                "with fewer --processes."
            ) from error
        except F2ggufError:
            raise
        except Exception as error:
            if isinstance(cause := getattr(error, "cause", None), F2ggufError):  # Ray's way to hand it over
                raise cause from error
            raise


@contextlib.contextmanager
def own_process(model: Embedder, options: Options) -> Iterator[Pool]:
    """One thread that computes, so that this one can read and write at the same time."""
    executor = ThreadPoolExecutor(1, thread_name_prefix="f2gguf corpus")
    try:
        yield Pool(lambda texts: executor.submit(embed_with, model, options, texts), lambda: 1)
    finally:
        executor.shutdown(wait=False, cancel_futures=True)


def choose_processes(model: Embedder, n_input_bytes: int) -> int:
    """A process for each thread on the CPU, where the model's file is small and there is work for them; else one."""
    if model.device != "cpu" or model.header.path.stat().st_size >= SMALL_BYTES:
        return 1
    return max(1, min(model.encoder.settings.n_threads, n_input_bytes // _BYTES_A_PROCESS))


def require_processes(n_processes: int, n_threads: int) -> None:
    """Raise `WrongUsage` for more processes than there are threads to share out."""
    if n_processes > n_threads:
        raise WrongUsage(f"--processes {n_processes}: there are {n_threads} threads to share out. Ask for fewer.")


@contextlib.contextmanager
def processes(n_processes: int, options: Options) -> Iterator[Pool]:
    """`n_processes` that each open the file, with an equal share of the threads."""
    options = _with_threads(options, require_threads(options.opening["n_threads"]) // n_processes)
    executor = ProcessPoolExecutor(n_processes, multiprocessing.get_context("spawn"), initializer=end_with_parent)
    try:
        yield Pool(lambda texts: executor.submit(embed_texts, options, texts), lambda: n_processes)
    finally:
        executor.shutdown(wait=False, cancel_futures=True)


@contextlib.contextmanager
def ray_cluster(address: str, options: Options, size_bytes: int) -> Iterator[Pool]:
    """Tasks of a Ray cluster, where Ray places them, and repeats those of lost machines. They need no shared disk.

    A task takes as many cores as it has threads: one where the file is small, else four, unless --threads says.
    """
    if not find_spec("ray"):
        raise ExtraMissing("ray is not installed, which --ray needs. Run: pip install 'f2gguf[ray]'")
    import ray

    n_threads = options.opening["n_threads"] or (1 if size_bytes < SMALL_BYTES else min(4, default_threads()))
    options = _with_threads(options, n_threads)
    started = not ray.is_initialized()
    try:
        if started:
            ray.init(address, log_to_driver=False, logging_level=logging.WARNING)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise WrongUsage(
            f"--ray {address}: there is no Ray cluster: {str(error).splitlines()[0]} "
            f"Start one with `ray start --head`, or use --ray local."
        ) from error
    task = ray.remote(num_cpus=n_threads, max_retries=-1)(embed_texts)
    shared = ray.put(options)

    def n_slots() -> int:
        resources: dict[str, float] = ray.cluster_resources()
        return max(1, int(resources.get("CPU", 1)) // n_threads)

    try:
        yield Pool(lambda texts: task.remote(shared, texts).future(), n_slots)
    finally:
        if started:
            ray.shutdown()


def _with_threads(options: Options, n_threads: int) -> Options:
    return replace(options, opening={**options.opening, "n_threads": n_threads})
