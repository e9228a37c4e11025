"""An engine for asyncio: it computes in a thread of its own, and requests come from any task."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from .engine import Engine
from .request import Answer, Event, Job, Request
from .threads import release_threads

_Deliver = Callable[[Event | BaseException], None]


class AsyncEngine:
    """Runs an engine that nobody else uses from then on. `async with AsyncEngine(engine) as asking: …`

    A task that is cancelled, or that stops reading, cancels its request. On a CPU the engine's thread wants the cores
    to itself: create this in the thread that loaded the model, and compute with torch in no other one meanwhile.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._wake = threading.Condition()
        self._commands: list[Callable[[], None]] = []  # for the thread, between two steps
        self._readers: dict[Job, _Deliver] = {}  # the thread's own
        self._ended: BaseException | None = None
        release_threads()  # this thread's, who loaded the model; the engine's own come beside them
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    async def stream(self, request: Request) -> AsyncGenerator[Event, None]:
        """A request's tokens as they are chosen.

        Raises:
            RuntimeError: the engine is closed, or has failed.
        """
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event | BaseException] = asyncio.Queue()
        jobs: list[Job] = []

        def deliver(event: Event | BaseException) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(events.put_nowait, event)

        def begin() -> None:
            jobs.append(self.engine.add(request))
            self._readers[jobs[0]] = deliver

        def cancel() -> None:
            for job in jobs:
                self._readers.pop(job, None)
                self.engine.cancel(job)

        self._command(begin)
        try:
            while True:
                event = await events.get()
                if isinstance(event, BaseException):
                    raise RuntimeError(f"the engine has ended: {event}") from event
                yield event
                if event.finish_reason is not None:
                    return
        finally:
            with self._wake:
                if self._ended is None:
                    self._commands.append(cancel)
                    self._wake.notify()

    async def generate(self, request: Request) -> Answer:
        """A request's whole answer; its `error` where it failed.

        Raises:
            RuntimeError: the engine is closed, or has failed.
        """
        async with aclosing(self.stream(request)) as events:
            async for event in events:
                if event.answer is not None:
                    return event.answer
        raise RuntimeError("the engine gave no answer")

    def close(self) -> None:
        """Cancel every request and end the thread."""

        def end() -> None:
            raise _Closed("it was closed")

        with self._wake:
            if self._ended is None:
                self._commands.append(end)
                self._wake.notify()
        self._thread.join()

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(self, *error: object) -> None:
        await asyncio.to_thread(self.close)

    def _command(self, command: Callable[[], None]) -> None:
        with self._wake:
            if self._ended is not None:
                raise RuntimeError(f"the engine has ended: {self._ended}") from self._ended
            self._commands.append(command)
            self._wake.notify()

    def _work(self) -> None:
        try:
            while True:
                with self._wake:
                    self._wake.wait_for(lambda: self._commands or self.engine.has_work)
                    commands, self._commands = self._commands, []
                for command in commands:
                    command()
                if self.engine.has_work:
                    self.engine.step()
                for job, deliver in list(self._readers.items()):
                    while job.events:
                        deliver(job.events.popleft())
                    if job.answer is not None:
                        del self._readers[job]
        except BaseException as error:  # closed, or a defect of ours: nobody waits for ever
            with self._wake:
                self._ended = error
            for deliver in self._readers.values():
                deliver(error)
            self.engine.close()


class _Closed(Exception):
    """Ends the thread."""
