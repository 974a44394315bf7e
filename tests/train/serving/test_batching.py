"""Batches: who arrives together is answered together, nobody waits for ever, an error goes to whom it belongs."""

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from m6rec.train.serving.batching import Batcher, Busy, TooLate


class Work:
    """Doubles numbers, and notes its batches; it waits while `gate` is closed."""

    def __init__(self):
        self.batches, self.gate = [], threading.Event()
        self.gate.set()

    def __call__(self, values):
        self.gate.wait(30)
        self.batches.append(list(values))
        return [ValueError("odd one") if value == 13 else 2 * value for value in values]


def run(test, **more):
    """Run a coroutine with a batcher and its work."""
    work = Work()

    async def whole():
        with ThreadPoolExecutor(1) as executor:
            batcher = Batcher(work, executor, **{"most": 4, "wait": 0.0, "room": 100, **more})
            batcher.start()
            try:
                return await test(batcher, work)
            finally:
                work.gate.set()
                await batcher.stop()

    return asyncio.run(whole())


def test_values_that_wait_are_processed_together_and_each_gets_its_own():
    async def test(batcher, work):
        work.gate.clear()
        first = asyncio.create_task(batcher.submit(0, 30))
        await asyncio.sleep(0.05)  # it is being processed
        others = [asyncio.create_task(batcher.submit(value, 30)) for value in range(1, 10)]
        await asyncio.sleep(0.05)
        work.gate.set()
        assert [await task for task in [first, *others]] == [2 * value for value in range(10)]
        assert work.batches == [[0], [1, 2, 3, 4], [5, 6, 7, 8], [9]] and batcher.size == 0

    run(test)


def test_the_first_waits_for_others():
    async def test(batcher, work):
        tasks = []
        for value in range(3):
            tasks.append(asyncio.create_task(batcher.submit(value, 30)))
            await asyncio.sleep(0.01)
        await asyncio.gather(*tasks)
        assert work.batches == [[0, 1, 2]]

    run(test, wait=10.0, most=3)


def test_a_batch_waits_for_as_many_as_were_in_the_one_before():
    async def test(batcher, work):
        for values in (range(4), range(4, 8)):  # those of the second come one after the other
            tasks = []
            for value in values:
                tasks.append(asyncio.create_task(batcher.submit(value, 30)))
                await asyncio.sleep(0.01 if value >= 4 else 0)
            await asyncio.gather(*tasks)
        assert work.batches == [[0, 1, 2, 3], [4, 5, 6, 7]]

    run(test, wait=10.0, most=4)


def test_values_that_come_one_by_one_are_not_waited_for():
    async def test(batcher, work):
        for value in range(100, 140):
            assert await batcher.submit(value, 30) == 2 * value
        assert work.batches == [[value] for value in range(100, 140)]

    async def whole(batcher, work):
        await asyncio.wait_for(test(batcher, work), 30)  # 40 s if each waited

    run(whole, wait=1.0)


def test_an_error_goes_to_whom_it_belongs():
    async def test(batcher, work):
        found = await asyncio.gather(*[batcher.submit(value, 30) for value in (1, 13, 2)], return_exceptions=True)
        assert (found[0], str(found[1]), found[2]) == (2, "odd one", 4)

        def fail(values):
            raise OSError("no database")

        batcher._work = fail
        found = await asyncio.gather(*[batcher.submit(value, 30) for value in (1, 2)], return_exceptions=True)
        assert [str(error) for error in found] == ["no database"] * 2
        batcher._work = work
        assert await batcher.submit(4, 30) == 8

    run(test)


def test_one_more_than_there_is_room_for_is_refused_at_once():
    async def test(batcher, work):
        work.gate.clear()
        tasks = [asyncio.create_task(batcher.submit(value, 30)) for value in range(5)]
        await asyncio.sleep(0)
        with pytest.raises(Busy) as error:
            await batcher.submit(9, 30)
        assert error.value.seconds >= 1
        work.gate.set()
        assert await asyncio.gather(*tasks) == [0, 2, 4, 6, 8]
        assert await batcher.submit(9, 30) == 18

    run(test, room=5)


def test_who_waits_too_long_is_told_so_and_costs_nothing():
    async def test(batcher, work):
        work.gate.clear()
        first = asyncio.create_task(batcher.submit(1, 30))
        await asyncio.sleep(0.05)
        begin = time.monotonic()
        with pytest.raises(TooLate, match=r"0\.05 s"):
            await batcher.submit(2, 0.05)
        gone = asyncio.create_task(batcher.submit(3, 30))  # the client leaves
        await asyncio.sleep(0)
        gone.cancel()
        assert time.monotonic() - begin < 20
        work.gate.set()
        assert await first == 2 and await batcher.submit(4, 30) == 8
        assert work.batches == [[1], [4]] and batcher.size == 0

    run(test)
