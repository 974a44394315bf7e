"""Requests that arrive together are answered together.

While a batch is being answered, the next one gathers. A batch begins as soon as the worker is free and either as many
requests are waiting as were answered before, or the first has waited long enough. Waiting requests are bounded in
number and time.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any


class Busy(Exception):  # noqa: N818  the name of the condition, which is no fault
    """Too many requests are waiting.

    Args:
        seconds: Estimated time until there is room.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__(f"too many requests are waiting: try again in {seconds:.0f} s")
        self.seconds = seconds


class TooLate(Exception):  # noqa: N818  as above
    """A request was not answered within its time."""


@dataclass(frozen=True)
class _Waiting:
    value: Any
    until: float
    """Time of `time.monotonic` after which nobody waits for the result."""
    result: asyncio.Future = field(compare=False)


class Batcher:
    """Collects values from concurrent tasks of one event loop and processes them in batches, one batch at a time.

    Args:
        work: Maps a list of values to results of the same number, in another thread. A result that is an exception is
            raised where the value was given.
        executor: Executor of `work`.
        most: Largest number of values of a batch.
        wait: Seconds that the first value of a batch waits at most for others.
        room: Largest number of values that wait or are processed; more are refused by `Busy`.
        seen: Called with the size of each batch.
    """

    def __init__(
        self,
        work: Callable[[list[Any]], Sequence[Any]],
        executor: Executor,
        most: int,
        wait: float,
        room: int,
        seen: Callable[[int], None] = lambda size: None,
    ) -> None:
        self._work, self._executor, self._most, self._wait, self.room = work, executor, most, wait, room
        self._seen = seen
        self._queue: asyncio.Queue[_Waiting] = asyncio.Queue()
        self._pace = 0.0  # seconds of a value, a moving average
        self._expected = most
        self.size = 0
        """Number of values that wait or are processed."""
        self._loop: asyncio.Task | None = None

    def start(self) -> None:
        """Begin to process, in the running event loop."""
        self._loop = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        """Stop processing; values that still wait get no result."""
        if self._loop is not None:
            self._loop.cancel()
            await asyncio.gather(self._loop, return_exceptions=True)

    async def submit(self, value: Any, seconds: float) -> Any:
        """Process a value with others.

        Args:
            value: The value.
            seconds: Time to wait for the result.

        Raises:
            Busy: There is no room.
            TooLate: The time is over.
        """
        if self.size >= self.room:
            raise Busy(max(1.0, self.size * self._pace))
        until, loop = time.monotonic() + seconds, asyncio.get_running_loop()
        entry = _Waiting(value, until, loop.create_future())
        self.size += 1
        entry.result.add_done_callback(self._leave)
        self._queue.put_nowait(entry)
        try:
            return await asyncio.wait_for(entry.result, seconds)
        except TimeoutError as error:
            raise TooLate(f"no answer within {seconds:g} s") from error

    def _leave(self, _: asyncio.Future) -> None:
        self.size -= 1

    async def _run(self) -> None:
        while True:
            batch = await self._gather()
            if not batch:
                continue
            self._seen(len(batch))
            self._expected = len(batch)
            begin = time.monotonic()
            values = [entry.value for entry in batch]
            try:
                results = await asyncio.get_running_loop().run_in_executor(self._executor, self._work, values)
            except Exception as error:  # noqa: BLE001  it belongs to those who wait; the loop must go on
                results = [error] * len(batch)
            pace = (time.monotonic() - begin) / len(batch)
            self._pace = pace if not self._pace else 0.9 * self._pace + 0.1 * pace
            for entry, result in zip(batch, results):
                if entry.result.done():
                    continue  # nobody waits any more
                if isinstance(result, Exception):
                    entry.result.set_exception(result)
                else:
                    entry.result.set_result(result)

    async def _gather(self) -> list[_Waiting]:
        """Wait for the first value, then for others; leave out those for which nobody waits any more.

        A batch waits for as many as were in the batch before: where values come one by one, none is waited for.
        """
        batch = [await self._queue.get()]
        until = time.monotonic() + self._wait
        while len(batch) < self._most:
            if self._queue.empty():
                left = until - time.monotonic()
                if left <= 0 or len(batch) >= self._expected:
                    break
                try:
                    batch.append(await asyncio.wait_for(self._queue.get(), left))
                except TimeoutError:
                    break
            else:
                batch.append(self._queue.get_nowait())
        return [entry for entry in batch if not entry.result.done()]


__all__ = ["Batcher", "Busy", "TooLate"]
