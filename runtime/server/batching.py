"""Dynamic batching: the texts of all requests wait in one queue a model, and are computed together, in turns."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from f2gguf.runtime.llama.engine import Rows
from f2gguf.runtime.llama.packing import Ids

Compute = Callable[[list[Ids], Ids | None], Rows]  # texts and the ids of the prompt they share -> raw vectors


class QueueFull(Exception):
    """Too many tokens wait; `retry_after_s` is when there will be room, at the speed so far."""

    def __init__(self, retry_after_s: int) -> None:
        super().__init__(f"the queue is full; try again in {retry_after_s} s")
        self.retry_after_s = retry_after_s


@dataclass(eq=False)
class _Request:
    """Texts of one client. They are taken in order, so their vectors come in order."""

    texts: Sequence[Ids]
    prompt: Ids | None
    done: asyncio.Future[Rows]
    begin: float = field(default_factory=time.perf_counter)
    n_taken: int = 0
    rows: list[Rows] = field(default_factory=list)  # of each text, (n_embd,)

    @property
    def next_cost(self) -> int:
        """Tokens of the next text without its prompt, which is computed once for all texts of a step."""
        n_tokens = len(self.texts[self.n_taken])
        return n_tokens if self.prompt is None else max(1, n_tokens - len(self.prompt))

    def give(self, outcome: Rows | Exception) -> None:
        """Receive the vector of the next text, or its error. The last vector finishes the request."""
        if self.done.done():  # cancelled, or failed by another of its texts
            return
        if isinstance(outcome, Exception):
            self.done.set_exception(outcome)
            return
        self.rows.append(outcome)
        if len(self.rows) == len(self.texts):
            self.done.set_result(np.stack(self.rows))


class Batcher:
    """The queue of one model. While one step is computed, texts gather for the next: no text waits for others to come.

    A step takes one text of each request in turn, up to `step_tokens`, so that a small request is never behind a huge
    one. A request that is cancelled leaves the queue. A Batcher lives in one event loop.
    """

    def __init__(
        self, compute: Compute, *, step_tokens: int, max_waiting_tokens: int, metrics: Mapping[str, Any]
    ) -> None:
        self._compute = compute
        self._step_tokens = step_tokens
        self._max_waiting_tokens = max_waiting_tokens
        self._metrics = metrics
        self._turns: deque[_Request] = deque()
        self._task: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batch")
        self._tokens_per_s = 1000.0  # until a step was measured
        self.waiting_tokens = 0

    async def __call__(self, texts: Sequence[Ids], prompt: Ids | None) -> Rows:
        """Raw vectors of one request's texts, (n_texts, n_embd); NaN rows for texts without a finite one.

        Raises `QueueFull`, or what the model raised on one of these texts.
        """
        n_tokens = sum(map(len, texts))
        if self.waiting_tokens and self.waiting_tokens + n_tokens > self._max_waiting_tokens:
            raise QueueFull(min(600, math.ceil(self.waiting_tokens / self._tokens_per_s)))
        request = _Request(texts, prompt, asyncio.get_running_loop().create_future())
        self._turns.append(request)
        self._count(n_tokens)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())
        try:
            return await request.done
        finally:
            if request.n_taken < len(texts):
                self._turns.remove(request)
                self._count(-sum(map(len, texts[request.n_taken :])))

    async def _run(self) -> None:
        """Compute steps until nobody waits."""
        loop = asyncio.get_running_loop()
        while self._turns:
            step = self._take()
            n_tokens, begin = sum(len(text) for _, text in step), time.perf_counter()
            outcomes = await loop.run_in_executor(self._thread, self._compute_step, step)
            seconds = time.perf_counter() - begin
            self._metrics["compute_seconds"].observe(seconds)
            self._tokens_per_s = 0.8 * self._tokens_per_s + 0.2 * n_tokens / seconds
            for (request, _), outcome in zip(step, outcomes, strict=True):
                request.give(outcome)

    def _take(self) -> list[tuple[_Request, Ids]]:
        """One text of each request in turn, until the budget is used; a text over the budget has a step of its own."""
        step: list[tuple[_Request, Ids]] = []
        used = 0
        while self._turns and (not step or used + self._turns[0].next_cost <= self._step_tokens):
            request = self._turns.popleft()
            if not request.n_taken:
                self._metrics["queue_seconds"].observe(time.perf_counter() - request.begin)
            used += request.next_cost
            step.append((request, request.texts[request.n_taken]))
            request.n_taken += 1
            if request.n_taken < len(request.texts):
                self._turns.append(request)
        self._count(-sum(len(text) for _, text in step))
        self._metrics["batch_fill"].observe(used / self._step_tokens)
        return step

    def _compute_step(self, step: Sequence[tuple[_Request, Ids]]) -> list[Rows | Exception]:
        """Vectors of a step, in its order; texts of one prompt are computed together."""
        groups: dict[bytes, list[int]] = {}
        for at, (request, _) in enumerate(step):
            groups.setdefault(b"" if request.prompt is None else request.prompt.tobytes(), []).append(at)
        outcomes: dict[int, Rows | Exception] = {}
        for places in groups.values():
            computed = self._isolated([step[at][1] for at in places], step[places[0]][0].prompt)
            outcomes.update(zip(places, computed, strict=True))
        return [outcomes[at] for at in range(len(step))]

    def _isolated(self, texts: list[Ids], prompt: Ids | None) -> list[Rows | Exception]:
        """A vector a text. An error of the model goes to the one text that causes it, which halving finds."""
        try:
            return list(self._compute(texts, prompt))
        except Exception as error:
            if len(texts) == 1:
                return [error]
            half = len(texts) // 2
            return self._isolated(texts[:half], prompt) + self._isolated(texts[half:], prompt)

    def _count(self, n_tokens: int) -> None:
        self.waiting_tokens += n_tokens
        self._metrics["queue_tokens"].set(self.waiting_tokens)
        self._metrics["queue_requests"].set(len(self._turns))
