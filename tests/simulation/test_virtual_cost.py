"""What is booked on an account: all that a party does and sets in motion, and nothing of anybody else."""

import asyncio
import time

import pytest

from miles_agents.virtual_cost import CpuAccount, run_costed


def work(seconds=0.002):
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass


def test_tasks_timers_and_callbacks_of_the_party_are_booked_and_others_are_not():
    async def story():
        loop = asyncio.get_running_loop()
        with CpuAccount() as cpu:

            async def party():
                work()
                await asyncio.sleep(1.0)
                work()
                loop.call_later(1.0, work)
                future = loop.create_future()
                future.add_done_callback(lambda _: work())
                loop.call_soon(future.set_result, None)
                await asyncio.create_task(asyncio.sleep(0))
                async with asyncio.timeout(1.0):
                    await future

            async def other():
                for _ in range(10):
                    work()
                    await asyncio.sleep(0.3)

            others = asyncio.create_task(other())
            await cpu.task(party(), "party")
            await others
            assert 0.008 <= cpu.seconds <= 0.018
            cpu.enter(work)
            assert 0.010 <= cpu.seconds <= 0.020
            assert cpu.callbacks >= 6

    run_costed(story())


def test_what_stands_for_somebody_else_is_not_booked_nor_what_comes_of_it():
    async def story():
        loop = asyncio.get_running_loop()
        with CpuAccount() as cpu:

            def sends():
                def transport():
                    work(0.01)
                    loop.call_later(0.5, work, 0.01)

                cpu.leave(transport)

            cpu.enter(sends)
            await asyncio.sleep(1.0)
            assert cpu.seconds < 0.005

    run_costed(story())


def test_work_takes_virtual_time_if_it_is_to():
    async def story(takes_time):
        loop = asyncio.get_running_loop()
        began = loop.time()
        with CpuAccount(takes_time=takes_time) as cpu:
            cpu.enter(work)
            assert loop.time() - began == pytest.approx(cpu.seconds if takes_time else 0.0)

    run_costed(story(True))
    run_costed(story(False))
