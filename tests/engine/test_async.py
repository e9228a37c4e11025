"""The engine behind asyncio: many tasks at a time, cancellation, and how it ends."""

from __future__ import annotations

import asyncio

import pytest
import torch

from llama_multimodal import SamplingParams
from llama_multimodal.engine import AsyncEngine, Engine, EngineConfig, Request

from .engine_for_tests import IMAGE, alone, check_whole, model, prompt

KIND = "cross_attention"
PARAMS = SamplingParams(max_new_tokens=8)
ASKED = [((60, 5, IMAGE, 3), (1,)), ((60, 7, 8), ()), ((60, 9, IMAGE, IMAGE, 30), (0, 2)), ((60, 11), ())]


def make() -> Engine:
    return Engine(model(KIND), None, EngineConfig(block_size=4, cache_memory="1MiB", max_requests=3))


def request(number: int, params: SamplingParams = PARAMS) -> Request:
    return Request(inputs=prompt(KIND, *ASKED[number]), params=params)


def expected(number: int) -> list[int]:
    return alone(KIND, *ASKED[number], PARAMS, torch.float32).token_ids[0]


def test_tasks_are_answered_together_as_alone() -> None:
    async def main(engine: Engine) -> None:
        async with AsyncEngine(engine) as asking:
            answers = await asyncio.gather(*(asking.generate(request(i)) for i in range(4)), asking.generate(Request()))
            assert [answer.token_ids for answer in answers[:4]] == [expected(i) for i in range(4)]
            assert "neither messages nor inputs" in str(answers[4].error)
            events = [event async for event in asking.stream(request(2))]
            assert [event.token_id for event in events] == expected(2)

    engine = make()
    asyncio.run(main(engine))
    check_whole(engine)
    assert engine.metrics.steps < 4 * 8  # side by side, not one after the other


def test_a_cancelled_task_cancels_its_request_and_no_other() -> None:
    async def main(engine: Engine) -> None:
        async with AsyncEngine(engine) as asking:
            long = SamplingParams(max_new_tokens=50, temperature=1.0, seed=1)
            task = asyncio.create_task(asking.generate(request(0, long)))
            other = asyncio.create_task(asking.generate(request(1)))
            async for _ in asking.stream(request(3, long)):
                break  # stops reading
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert (await other).token_ids == expected(1)
            while engine.has_work:
                await asyncio.sleep(0.01)

    engine = make()
    asyncio.run(main(engine))
    check_whole(engine)
    assert engine.metrics.requests["cancelled"] == 2


def test_nobody_waits_for_an_engine_that_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main(engine: Engine) -> None:
        asking = AsyncEngine(engine)
        waiting = asyncio.create_task(asking.generate(request(0)))
        with pytest.raises(RuntimeError, match="has ended: a defect"):
            await waiting
        with pytest.raises(RuntimeError, match="has ended: a defect"):
            await asking.generate(request(1))
        asking.close()

    engine = make()
    monkeypatch.setattr(engine.scheduler, "schedule", lambda: (_ for _ in ()).throw(ValueError("a defect")))
    asyncio.run(main(engine))
    check_whole(engine)


def test_closing_ends_what_is_asked() -> None:
    async def main(engine: Engine) -> None:
        asking = AsyncEngine(engine)
        waiting = asyncio.create_task(asking.generate(request(0, SamplingParams(max_new_tokens=50))))
        await asyncio.sleep(0.02)
        await asyncio.to_thread(asking.close)
        with pytest.raises(RuntimeError, match="closed"):
            await waiting

    engine = make()
    asyncio.run(main(engine))
    check_whole(engine)
