"""Texts of many requests: company, who is next, pauses, cancellation, back-pressure, and texts that fail alone."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest
from f2gguf.runtime.errors import GGUFError
from f2gguf.runtime.llama.context import Pause
from f2gguf.runtime.llama.packing import Ids
from f2gguf.runtime.server import batching
from f2gguf.runtime.server.batching import CLIENT, Batcher, QueueFull, Schedule
from f2gguf.runtime.server.metrics import Metrics

POISON = 666


class Model:
    """Stands in for llama.cpp: a text's vector is its first id. Holds its steps back until told."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[int], int | None]] = []  # first ids of the texts, first id of the prompt
        self.may_go_on = threading.Event()

    def __call__(self, texts: list[Ids], prompt: Ids | None, *, pause: Pause | None = None) -> np.ndarray:
        self.calls.append(([int(ids[0]) for ids in texts], None if prompt is None else int(prompt[0])))
        self.may_go_on.wait(10)
        time.sleep(0.002)
        if pause:
            pause()
        if any(POISON in ids for ids in texts):
            raise GGUFError("llama.cpp failed on a batch")
        return np.array([[ids[0]] for ids in texts], dtype=np.float32)


def text(first: int, n_tokens: int = 10) -> Ids:
    return np.full(n_tokens, first, dtype=np.int32)


def run(test: Callable[[Batcher, Model], Awaitable[Any]], **limits: int) -> Model:
    """Run a test on a batcher whose model is busy with text 0."""
    model = Model()

    async def main() -> None:
        batcher = new_batcher(model, Schedule(), **limits)
        busy = asyncio.create_task(batcher([text(0)], None))
        while not model.calls:
            await asyncio.sleep(0.001)
        try:
            await test(batcher, model)
        finally:
            model.may_go_on.set()
        await busy
        assert batcher.waiting_tokens == 0

    asyncio.run(asyncio.wait_for(main(), 20))
    return model


def new_batcher(model: Model, schedule: Schedule, **limits: int) -> Batcher:
    options: dict[str, Any] = {"batch_tokens": 100, "max_waiting_tokens": 10_000, "can_pause": True, **limits}
    return Batcher(model, schedule, shares_prompts=True, metrics=Metrics().of("model"), **options)


async def release(model: Model, *waiting: asyncio.Task[Any]) -> list[Any]:
    model.may_go_on.set()
    return await asyncio.gather(*waiting, return_exceptions=True)


async def ask(batcher: Batcher, *texts: Ids, prompt: Ids | None = None, client: str = "a client") -> asyncio.Task[Any]:
    """A request that waits in the queue."""
    CLIENT.set(client)
    task = asyncio.create_task(batcher(list(texts), prompt))
    await asyncio.sleep(0)
    return task


def test_requests_that_wait_are_computed_together() -> None:
    async def test(batcher: Batcher, model: Model) -> None:
        waiting = [await ask(batcher, text(i), text(i + 100)) for i in range(1, 4)]
        rows = await release(model, *waiting)
        assert [row[:, 0].tolist() for row in rows] == [[i, i + 100] for i in range(1, 4)]

    assert run(test).calls[1:] == [([1, 2, 3, 101, 102, 103], None)]


def test_a_small_request_goes_before_a_huge_one_whose_steps_have_full_size() -> None:
    async def test(batcher: Batcher, model: Model) -> None:
        huge = await ask(batcher, *[text(1)] * 500)
        small = await ask(batcher, text(2))
        await release(model, small, huge)

    calls = [texts for texts, _ in run(test).calls[1:]]
    assert calls[:2] == [[2], [1] * 10], "as many as fit 100 tokens"


def test_what_is_short_is_computed_in_the_pauses_of_what_is_long() -> None:
    async def test(batcher: Batcher, model: Model) -> None:
        model.may_go_on.set()
        while batcher.waiting_tokens:
            await asyncio.sleep(0.001)
        model.may_go_on.clear()
        huge = await ask(batcher, text(1, 500), text(2, 500))
        while len(model.calls) < 2:
            await asyncio.sleep(0.001)
        small = await ask(batcher, text(3))
        await release(model, small, huge)

    assert [texts for texts, _ in run(test).calls[1:]] == [[1], [3], [2]]


def test_a_stream_of_short_requests_leaves_a_share_to_long_ones() -> None:
    async def test(batcher: Batcher, model: Model) -> None:
        huge = await ask(batcher, *[text(1, 90)] * 5)
        await release(model, huge, *[await ask(batcher, text(i, 90)) for i in range(10, 60)])

    order = [texts[0] for texts, _ in run(test).calls]
    assert order[1] == 10, "what is short goes first"
    assert order[-1] > 1, "and is not all done before the last text of the long one"


def test_long_requests_get_their_share_and_no_more_where_a_step_cannot_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(steps: list[list[int]]) -> float:
        return sum(3.0 if texts[0] == 1 else 1.0 for texts in steps)

    async def test(batcher: Batcher, model: Model) -> None:
        monkeypatch.setattr(batching.time, "perf_counter", lambda: seconds([texts for texts, _ in model.calls]))
        huge = await ask(batcher, *[text(1, 90)] * 100)
        await release(model, huge, *[await ask(batcher, text(i, 95)) for i in range(10, 410)])

    steps = [texts for texts, _ in run(test, can_pause=False, max_waiting_tokens=10**6).calls[1:]]
    while steps[-1][0] == 1:  # once no query waits
        steps.pop()
    share = seconds([texts for texts in steps if texts[0] == 1]) / seconds(steps)
    assert 0.15 < share < 0.25, f"{share:.2f} of the time, and LONG_SHARE is {batching.LONG_SHARE}"


def test_a_client_with_many_requests_does_not_hold_up_another() -> None:
    async def test(batcher: Batcher, model: Model) -> None:
        many = [await ask(batcher, text(i), client="many") for i in range(100, 150)]
        one = await ask(batcher, text(2), client="one")
        long = [await ask(batcher, *[text(n, 60)] * 4, client=str(n)) for n in (3, 4)]
        await release(model, one, *many, *long)

    calls = [texts for texts, _ in run(test).calls]
    assert 2 in calls[1]
    long = [texts[0] for texts in calls if texts[0] in (3, 4)]
    assert long == [3, 4] * 4, "text by text, in turns"


def test_models_take_turns() -> None:
    async def test(batcher: Batcher, model: Model) -> None:
        second = new_batcher(model, batcher._schedule)
        many = [await ask(batcher, text(i, 90)) for i in range(100, 130)]
        await release(model, *many, *[await ask(second, text(1, 90)) for _ in range(3)])

    order = [texts[0] for texts, _ in run(test).calls]
    assert max(i for i, first in enumerate(order) if first == 1) < 15


def test_time_that_a_model_used_before_another_one_came_counts_no_more() -> None:
    async def test(batcher: Batcher, model: Model) -> None:
        await asyncio.sleep(0.3)  # text 0 takes so long
        model.may_go_on.set()
        await (await ask(batcher, text(5)))
        model.may_go_on.clear()
        second = new_batcher(model, batcher._schedule)
        many = [await ask(second, text(i, 90)) for i in range(100, 130)]
        await release(model, *many, await ask(batcher, text(1, 90)))

    order = [texts[0] for texts, _ in run(test).calls]
    assert order.index(1) < 7, "the other model's time so far is not made up for"


def test_texts_of_one_prompt_are_computed_together_and_cost_only_their_own_tokens() -> None:
    prompt = text(9, 80)

    async def test(batcher: Batcher, model: Model) -> None:
        waiting = [await ask(batcher, text(i, 90), prompt=prompt) for i in range(1, 9)]
        waiting += [await ask(batcher, text(20, 10)), await ask(batcher, text(21, 10))]
        await release(model, *waiting)

    assert run(test).calls[1:] == [(list(range(1, 9)), 9), ([20, 21], None)]


def test_a_text_over_the_budget_is_a_step_of_its_own() -> None:
    async def test(batcher: Batcher, model: Model) -> None:
        waiting = [await ask(batcher, text(1, 500)), await ask(batcher, text(2)), await ask(batcher, text(3))]
        await release(model, *waiting)

    assert [texts for texts, _ in run(test).calls[1:]] == [[2, 3], [1]]


def test_a_cancelled_request_leaves_the_queue() -> None:
    async def test(batcher: Batcher, model: Model) -> None:
        leaving, staying = await ask(batcher, text(1), text(1)), await ask(batcher, text(2))
        assert batcher.waiting_tokens == 30
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        assert batcher.waiting_tokens == 10
        await release(model, staying)

    assert [texts for texts, _ in run(test).calls] == [[0], [2]]


def test_a_request_that_is_cancelled_half_way_is_not_computed_to_its_end() -> None:
    async def test(batcher: Batcher, model: Model) -> None:
        huge = await ask(batcher, *[text(1)] * 500)
        small = await ask(batcher, text(2))
        await release(model, small)
        huge.cancel()
        await asyncio.gather(huge, return_exceptions=True)
        assert batcher.waiting_tokens == 0

    assert len(run(test).calls) <= 40


def test_a_full_queue_says_when_to_come_again() -> None:
    async def test(batcher: Batcher, model: Model) -> None:
        waiting = await ask(batcher, text(1, 2500))
        with pytest.raises(QueueFull) as refused:
            await batcher([text(2, 600)], None)
        assert refused.value.retry_after_s == 3, "2,500 tokens at the 1,000 a second that it assumes at first"
        await release(model, waiting, await ask(batcher, text(3, 500)))

    run(test, max_waiting_tokens=3000)


def test_a_request_that_is_larger_than_the_queue_is_taken_when_nobody_waits() -> None:
    async def test(batcher: Batcher, model: Model) -> None:
        await release(model, await ask(batcher, text(1, 500)))

    assert run(test, max_waiting_tokens=100).calls[1:] == [([1], None)]


def test_a_text_on_which_the_model_fails_fails_alone() -> None:
    async def test(batcher: Batcher, model: Model) -> None:
        waiting = [await ask(batcher, text(i)) for i in (1, 2, POISON, 3, 4)]
        waiting.append(await ask(batcher, text(5), text(POISON)))
        outcomes = await release(model, *waiting)
        assert [outcome[0, 0] for outcome in (*outcomes[:2], *outcomes[3:5])] == [1, 2, 3, 4]
        assert isinstance(outcomes[2], GGUFError)
        assert isinstance(outcomes[5], GGUFError)
        assert (await batcher([text(7)], None))[0, 0] == 7

    run(test)
