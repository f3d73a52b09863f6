"""Who is computed next: the texts of all requests to all models wait here, and one batch is computed at a time.

Requests come in two sizes. A short one fits one batch of its model; a long one is a client's bulk work, or a long text.
Short requests go first. They do not wait for a long one's batch to end either: llama.cpp pauses a few times in each
layer, and what is short is computed there, in a context of its own. So long requests keep batches of full size, and a
query waits for a third of a layer. (A third of one layer for 256 tokens takes less than all layers for a query of a
dozen, unless the model has fewer than seven: then the pieces of long requests get smaller while queries come.) A GPU
does not pause: it takes tens of milliseconds for a whole batch, and computes several at a time while no query comes.

However many short requests come, long ones get LONG_SHARE of the time: that is what queries pay, and why no long
request waits for ever. Within a size, models take turns by the time that they used, then clients, then the requests of
a client, text by text: nobody gets more by asking for more at once.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from f2gguf.runtime.llama.context import Pause
from f2gguf.runtime.llama.model import MIN_FLASH
from f2gguf.runtime.llama.packing import Ids
from f2gguf.runtime.llama.runner import Rows

# Of the time, for long requests while short ones wait. Where queries could fill the machine, they take 1.25 times as
# long as alone (at most 1.5 are promised, and pauses and caches cost something too).
LONG_SHARE = 0.2
# Batches in a step of short requests. With 1 instead of 4, a query of f2llm-nano costs 1.2 times the processor time.
SHORT_BATCHES = 4
# Seconds that a model's short requests take in one go while those of another model wait
TURN_S = 0.25
_ACTIVE_S = 1.0  # for which short requests are thought to come again
_MERGED = 2  # tokens of a prompt that count as the text's: the one that may merge with it, and the closing one

CLIENT: ContextVar[str] = ContextVar("client", default="")  # who sent the request that this task answers


class Compute(Protocol):
    def __call__(self, texts: list[Ids], prompt: Ids | None, *, pause: Pause | None = None) -> Rows:
        """Raw vectors of texts, whose prompt is computed once."""


class QueueFull(Exception):
    """Too many tokens wait; `retry_after_s` is when there will be room, at the speed so far."""

    def __init__(self, retry_after_s: int) -> None:
        super().__init__(f"the queue is full; try again in {retry_after_s} s")
        self.retry_after_s = retry_after_s


@dataclass(eq=False)
class Request:
    """Texts of one client. The longest that fit a batch are taken first, which fills batches best."""

    texts: Sequence[Ids]
    prompt: Ids | None
    batcher: Batcher
    client: str
    done: Future[Rows] = field(default_factory=Future)
    begin: float = field(default_factory=time.perf_counter)
    has_begun: bool = False  # whether one of its texts is no more waiting

    def __post_init__(self) -> None:
        n_prompt = len(self.prompt) - _MERGED if self.prompt is not None and self.batcher.shares_prompts else 0
        costs = [max(1, len(ids) - n_prompt) for ids in self.texts]
        self.is_short = sum(costs) <= self.batcher.batch_tokens
        # Negative cost and index of each text that waits. The cost is its tokens without those of the prompt.
        self.waiting = sorted((-cost, i) for i, cost in enumerate(costs))
        self._rows: list[Rows | None] = [None] * len(self.texts)
        self._n_left = len(self.texts)

    @property
    def waiting_tokens(self) -> int:
        return sum(len(self.texts[i]) for _, i in self.waiting)

    def take(self, n_tokens: float) -> tuple[int, int] | None:
        """Index and cost of the longest waiting text of at most `n_tokens`, which waits no more; None if none fits."""
        at = bisect_left(self.waiting, (-n_tokens,))
        if at == len(self.waiting):
            return None
        cost, index = self.waiting.pop(at)
        return index, -cost

    def give(self, i: int, outcome: Rows | Exception) -> None:
        """Receive the vector of a text, or its error. The last vector finishes the request."""
        with suppress(InvalidStateError):  # cancelled, or failed by another of its texts
            if isinstance(outcome, Exception):
                self.done.set_exception(outcome)
                return
            self._rows[i] = outcome
            self._n_left -= 1
            if not self._n_left:
                self.done.set_result(np.stack([row for row in self._rows if row is not None]))


Step = list[tuple[Request, int]]  # texts that are computed together, by their indices


class _Lane:
    """Requests of one size that wait: each model's clients in turn, and each client's requests."""

    def __init__(self) -> None:
        self.models: dict[Batcher, dict[str, deque[Request]]] = {}
        self._used_s: dict[Batcher, float] = {}
        self._least_s = 0.0  # that the last model in turn had used

    def add(self, request: Request) -> None:
        if request.batcher not in self.models:  # a model that rested, or is new, saves up no time
            self._used_s[request.batcher] = max(self._used_s.get(request.batcher, 0.0), self._least_s)
        self.models.setdefault(request.batcher, {}).setdefault(request.client, deque()).append(request)

    def remove(self, request: Request) -> None:
        clients = self.models[request.batcher]
        clients[request.client].remove(request)
        if not clients[request.client]:
            del clients[request.client]
        if not clients:
            del self.models[request.batcher]

    def next_model(self) -> Batcher:
        """The model that used the least time of those with waiting requests."""
        model = min(self.models, key=self._used_s.__getitem__)
        self._least_s = self._used_s[model]
        return model

    def use(self, model: Batcher, seconds: float) -> None:
        self._used_s[model] += seconds

    def take(self, model: Batcher, n_tokens: int) -> tuple[Step, int]:
        """A text of each client in turn until `n_tokens` are used, and their number; a longer text by itself."""
        clients = self.models[model]
        step: Step = []
        used = 0
        while clients:
            client, requests = next(iter(clients.items()))
            taken = requests[0].take(n_tokens - used if step else math.inf)
            if taken is None:
                break
            request = requests.popleft()
            step.append((request, taken[0]))
            used += taken[1]
            del clients[client]
            if request.waiting:
                requests.append(request)
            if requests:
                clients[client] = requests  # the last in turn
        if not clients:
            del self.models[model]
        return step, used

    def n_requests(self, model: Batcher) -> int:
        return sum(map(len, self.models.get(model, {}).values()))


class Schedule:
    """What all models of a server wait in. It has one thread, in which one batch is computed at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._short, self._long = _Lane(), _Lane()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batch")
        self._is_running = False
        self._owed_s = 0.0  # to long requests, before short ones are next
        self._short_s, self._short_end = 0.0, -math.inf  # of the last step of short requests
        self._resumed = 0.0  # when a part of a long step began
        self._inner_s = 0.0  # of short steps within a long one

    def add(self, request: Request) -> None:
        with self._lock:
            self._lane(request).add(request)
            self._count(request.batcher, request.waiting_tokens)
            if not self._is_running:
                self._is_running = True
                self._thread.submit(self._run).add_done_callback(lambda run: run.result())  # a bug goes to the log

    def remove(self, request: Request) -> None:
        """Take out what still waits of a request."""
        with self._lock:
            if request.waiting:
                self._lane(request).remove(request)
                self._count(request.batcher, -request.waiting_tokens)
                request.waiting.clear()

    def _take(self, lane: _Lane, model: Batcher, n_tokens: int) -> tuple[Step, int]:
        step, used = lane.take(model, n_tokens)
        self._count(model, -sum(len(request.texts[i]) for request, i in step))
        return step, used

    def _count(self, model: Batcher, n_tokens: int) -> None:
        model.count(n_tokens, sum(lane.n_requests(model) for lane in (self._short, self._long)))

    def _lane(self, request: Request) -> _Lane:
        return self._short if request.is_short else self._long

    def _run(self) -> None:
        """Compute steps until nobody waits."""
        while True:
            with self._lock:
                if not self._long.models and not self._short.models:
                    self._is_running, self._owed_s = False, 0.0
                    return
            if self._short.models and (self._owed_s <= 0 or not self._long.models):
                self._short_step(are_longs=bool(self._long.models))
            elif self._long.models:
                self._long_step()

    def _short_step(self, *, are_longs: bool) -> None:
        with self._lock:
            if not self._short.models:  # cancelled
                return
            model = self._short.next_model()
            n_tokens = SHORT_BATCHES * model.batch_tokens
            if len(self._short.models) > 1:
                n_tokens = max(1, min(n_tokens, int(TURN_S * model.tokens_per_s)))
            step, used = self._take(self._short, model, n_tokens)
        seconds = model.compute_step(step, used / n_tokens)
        self._short.use(model, seconds)
        self._short_s, self._short_end = seconds, time.perf_counter()
        if are_longs:
            self._owed_s += seconds * LONG_SHARE / (1 - LONG_SHARE)

    def _long_step(self) -> None:
        with self._lock:
            if not self._long.models:
                return
            model = self._long.next_model()
            n_tokens = self._long_tokens(model)
            step, used = self._take(self._long, model, n_tokens)
        self._inner_s, self._resumed = 0.0, time.perf_counter()
        seconds = model.compute_step(step, used / n_tokens, pause=lambda: self._pause(model, used))
        self._owe_less()
        self._long.use(model, seconds - self._inner_s)

    def _long_tokens(self, model: Batcher) -> int:
        """Tokens of the next long step: so many that a query waits for less than half of what it takes itself.

        Without queries, as many batches of full size as are computed at a time; one where `part_s` was never measured.
        """
        if time.perf_counter() - self._short_end > _ACTIVE_S:
            return model.n_batches * model.batch_tokens
        if not model.part_s:
            return model.batch_tokens
        return max(MIN_FLASH, min(model.batch_tokens, int(self._short_s / 2 / model.part_s)))

    def _pause(self, model: Batcher, n_tokens: int) -> None:
        """Between two parts of a long step: compute what is short, if long requests had their share."""
        part_s = self._owe_less() / n_tokens
        model.part_s = 0.9 * model.part_s + 0.1 * part_s if model.part_s else part_s
        if self._short.models and self._owed_s <= 0:
            begin = time.perf_counter()
            self._short_step(are_longs=True)
            self._resumed = time.perf_counter()
            self._inner_s += self._resumed - begin

    def _owe_less(self) -> float:
        """Count the seconds since a part of a long step began, and give them.

        Where a part took more than was owed, short ones go first until that is made up for.
        """
        now = time.perf_counter()
        seconds, self._resumed = now - self._resumed, now
        self._owed_s = max(-seconds, self._owed_s - seconds)
        return seconds


class Batcher:
    """The way of one model's requests into the schedule, and the computing of its steps."""

    def __init__(
        self,
        compute: Compute,
        schedule: Schedule,
        *,
        batch_tokens: int,
        n_batches: int = 1,
        shares_prompts: bool,
        can_pause: bool,
        max_waiting_tokens: int,
        metrics: Mapping[str, Any],
    ) -> None:
        self._compute = compute
        self._schedule = schedule
        self.batch_tokens = batch_tokens
        self.n_batches = n_batches  # that are computed at a time
        self.shares_prompts = shares_prompts
        self._can_pause = can_pause
        self._max_waiting_tokens = max_waiting_tokens
        self._metrics = metrics
        self.tokens_per_s = 1000.0  # until a step was measured
        self.part_s = 0.0  # of computing a token between two pauses
        self.waiting_tokens = 0

    def submit(self, texts: Sequence[Ids], prompt: Ids | None, *, client: str) -> Request:
        """A request that waits. Its `done` becomes raw vectors, (n_texts, n_embd), or what the model raised.

        NaN rows are texts without a finite vector. Raises `QueueFull`.
        """
        n_tokens = sum(map(len, texts))
        if self.waiting_tokens and self.waiting_tokens + n_tokens > self._max_waiting_tokens:
            raise QueueFull(min(600, math.ceil(self.waiting_tokens / self.tokens_per_s)))
        request = Request(texts, prompt, self, client)
        self._schedule.add(request)
        return request

    async def __call__(self, texts: Sequence[Ids], prompt: Ids | None) -> Rows:
        """What `submit` gives, once it is there. A task that is cancelled takes its request out of the queue."""
        request = self.submit(texts, prompt, client=CLIENT.get())
        try:
            return await asyncio.wrap_future(request.done)
        finally:
            self._schedule.remove(request)

    def compute_step(self, step: Step, fill: float, *, pause: Pause | None = None) -> float:
        """Compute a step, `fill` of its budget, and give its vectors to the requests; the seconds that it took."""
        begin = time.perf_counter()
        for request in {request for request, _ in step if not request.has_begun}:
            request.has_begun = True
            self._metrics["queue_seconds"].observe(begin - request.begin)
        self._metrics["batch_fill"].observe(min(1.0, fill))  # a longer text is a step by itself
        outcomes = self._outcomes(step, pause if self._can_pause else None)
        seconds = time.perf_counter() - begin
        self._metrics["compute_seconds"].observe(seconds)
        n_tokens = sum(len(request.texts[i]) for request, i in step)
        self.tokens_per_s = 0.8 * self.tokens_per_s + 0.2 * n_tokens / seconds
        for (request, i), outcome in zip(step, outcomes, strict=True):
            request.give(i, outcome)
        return seconds

    def count(self, n_tokens: int, n_requests: int) -> None:
        """Add to the tokens that wait; `n_requests` wait now."""
        self.waiting_tokens += n_tokens
        self._metrics["queue_tokens"].set(self.waiting_tokens)
        self._metrics["queue_requests"].set(n_requests)

    def _outcomes(self, step: Step, pause: Pause | None) -> list[Rows | Exception]:
        """Vectors of a step, in its order; texts of one prompt are computed together."""
        groups: dict[bytes, list[int]] = {}
        for at, (request, _) in enumerate(step):
            groups.setdefault(b"" if request.prompt is None else request.prompt.tobytes(), []).append(at)
        outcomes: dict[int, Rows | Exception] = {}
        for places in groups.values():
            texts = [step[at][0].texts[step[at][1]] for at in places]
            computed = self._isolated(texts, step[places[0]][0].prompt, pause)
            outcomes.update(zip(places, computed, strict=True))
        return [outcomes[at] for at in range(len(step))]

    def _isolated(self, texts: list[Ids], prompt: Ids | None, pause: Pause | None) -> list[Rows | Exception]:
        """A vector a text. An error of the model goes to the one text that causes it, which halving finds."""
        try:
            return list(self._compute(texts, prompt, pause=pause))
        except Exception as error:
            if len(texts) == 1:
                return [error]
            half = len(texts) // 2
            return self._isolated(texts[:half], prompt, pause) + self._isolated(texts[half:], prompt, pause)
