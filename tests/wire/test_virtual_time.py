"""The clock that jumps: exact, repeatable, and loud when nothing can happen any more."""

import asyncio
import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miles_agents.virtual_time import START_S, Deadlock, NoVirtualIO, VirtualTimeLimit, run_virtual


def now():
    return asyncio.get_running_loop().time()


def test_a_day_passes_at_once_and_the_result_comes_back():
    async def main():
        assert now() == START_S
        await asyncio.sleep(24 * 3600)
        return now()

    assert run_virtual(main(), limit_s=None) == START_S + 24 * 3600


def test_every_run_starts_at_the_same_time():
    async def main():
        return now()

    assert [run_virtual(main()), run_virtual(main())] == [START_S, START_S]


def test_timeouts_expire_exactly():
    async def main():
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(2.5):
                await asyncio.Event().wait()
        return now()

    assert run_virtual(main()) == START_S + 2.5


def test_a_timeout_that_is_not_needed_does_not_move_the_clock():
    async def main():
        async with asyncio.timeout(100):
            await asyncio.sleep(1)
        return now()

    assert run_virtual(main()) == START_S + 1


@given(delays=st.lists(st.floats(min_value=0, max_value=100), min_size=1, max_size=20))
@settings(max_examples=50, deadline=None)
def test_timers_fire_in_order_and_at_their_time(delays):
    async def main():
        loop = asyncio.get_running_loop()
        fired = []
        for delay in delays:
            loop.call_later(delay, lambda delay=delay: fired.append((delay, loop.time() - START_S)))
        await asyncio.sleep(101)
        return fired

    fired = run_virtual(main())
    assert sorted(delay for delay, _ in fired) == sorted(delays)
    assert [at for _, at in fired] == sorted(at for _, at in fired)
    assert all(abs(delay - at) < 1e-6 for delay, at in fired)


def test_a_cancelled_timer_does_not_attract_the_clock():
    async def main():
        asyncio.get_running_loop().call_later(50, lambda: None).cancel()
        await asyncio.sleep(100)
        return now()

    assert run_virtual(main()) == START_S + 100


def test_task_groups_queues_and_locks_work():
    async def main():
        queue = asyncio.Queue()
        received = []

        async def produce(name, pause):
            for index in range(3):
                await asyncio.sleep(pause)
                await queue.put((now() - START_S, name, index))

        async def consume():
            for _ in range(6):
                received.append(await queue.get())

        async with asyncio.TaskGroup() as group:
            group.create_task(produce("slow", 2))
            group.create_task(produce("fast", 1.5))
            group.create_task(consume())
        return received

    assert run_virtual(main()) == [
        (1.5, "fast", 0),
        (2.0, "slow", 0),
        (3.0, "fast", 1),
        (4.0, "slow", 1),
        (4.5, "fast", 2),
        (6.0, "slow", 2),
    ]


def test_two_runs_are_the_same():
    async def main():
        rng = random.Random(1)
        seen = []

        async def wander(name):
            for _ in range(20):
                await asyncio.sleep(rng.random())
                seen.append((name, now()))

        async with asyncio.TaskGroup() as group:
            for name in range(20):
                group.create_task(wander(name))
        return seen

    assert run_virtual(main()) == run_virtual(main())


def test_an_exception_of_the_program_comes_out():
    async def main():
        await asyncio.sleep(1)
        raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        run_virtual(main())


async def waits_for_nobody(event):
    await event.wait()


def test_a_deadlock_names_every_task_and_where_it_waits():
    async def main():
        event = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            group.create_task(waits_for_nobody(event), name="left")
            group.create_task(waits_for_nobody(event), name="right")

    with pytest.raises(Deadlock) as caught:
        run_virtual(main())
    text = str(caught.value)
    for part in ("task left", "task right", "waits_for_nobody", "Event.wait", "test_virtual_time.py", "E-VIRT-001"):
        assert part in text


def test_cleanup_runs_after_a_deadlock_with_timers_of_its_own():
    cleaned = []

    async def main():
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(10)
            cleaned.append(now())

    with pytest.raises(Deadlock):
        run_virtual(main(), limit_s=5)
    assert cleaned == [START_S + 10]


def test_a_program_that_never_ends_meets_its_limit():
    async def main():
        for pause in itertools.repeat(1):
            await asyncio.sleep(pause)

    with pytest.raises(VirtualTimeLimit, match="60 virtual seconds") as caught:
        run_virtual(main(), limit_s=60)
    assert "main" in caught.value.evidence


def test_a_program_may_use_all_of_its_limit():
    async def main():
        await asyncio.sleep(60)
        return "done"

    assert run_virtual(main(), limit_s=60) == "done"


@pytest.mark.parametrize(
    "ask",
    [
        lambda loop: loop.run_in_executor(None, print),
        lambda loop: loop.add_reader(0, print),
        lambda loop: loop.add_writer(1, print),
    ],
)
def test_real_io_and_threads_are_refused(ask):
    async def main():
        ask(asyncio.get_running_loop())

    with pytest.raises(NoVirtualIO):
        run_virtual(main())


def test_async_generators_are_closed_at_the_end():
    closed = []

    async def numbers():
        try:
            while True:
                yield 1
        finally:
            closed.append(True)

    async def main():
        generator = numbers()
        await anext(generator)
        asyncio.get_running_loop().generator = generator

    run_virtual(main())
    assert closed == [True]
