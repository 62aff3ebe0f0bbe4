"""The future of a call: from loops and threads, resolved once, cancelled when nobody waits any more."""

import asyncio
import contextlib
import gc
import logging
import threading
import weakref

import pytest
from support.wired import eventually

from miles_agents.rpc.errors import DeadlineExceeded, WouldDeadlock
from miles_agents.rpc.future import CallFuture


class Pending:
    """A future and a record of how it was cancelled."""

    def __init__(self):
        self.cancels = []
        self.future = CallFuture("m.work", self.cancels.append, threading.get_ident())


def in_thread(function):
    """Run in a thread; gives the thread and a list that gets the result or the error."""
    outcome = []

    def run():
        try:
            outcome.append(function())
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, outcome


async def turn():
    """Let every task that can run come to its next wait."""
    for _ in range(3):
        await asyncio.sleep(0)


async def test_several_tasks_get_the_value_or_the_error():
    good, bad = Pending().future, Pending().future
    tasks = [asyncio.ensure_future(wait(f)) for f in (good, good, bad, bad)]
    await turn()
    good.set_result(7)
    error = ValueError("no")
    bad.set_exception(error)
    assert await asyncio.gather(*tasks, return_exceptions=True) == [7, 7, error, error]
    assert await good == 7
    assert good.done()
    assert good.exception() is None
    assert bad.exception() is error


async def wait(future):
    return await future


async def test_it_is_resolved_once():
    future = Pending().future
    future.set_result(1)
    future.set_exception(ValueError())
    future.set_result(2)
    assert await future == 1
    assert not future.cancel()


async def test_a_task_on_another_loop_gets_the_value():
    pending = Pending()
    started = threading.Event()

    async def there():
        asyncio.get_running_loop().call_soon(started.set)
        return await pending.future

    thread, outcome = in_thread(lambda: asyncio.run(there()))
    assert started.wait(30)
    pending.future.set_result("far")
    thread.join(30)
    assert outcome == ["far"]


async def test_a_loop_that_is_gone_does_not_disturb_the_others():
    pending = Pending()
    gone = asyncio.new_event_loop()
    waiter = gone.create_future()
    pending.future._enlist(gone, waiter)
    gone.close()
    task = asyncio.ensure_future(wait(pending.future))
    await turn()
    pending.future.set_result(3)
    assert await task == 3


async def test_get_waits_in_a_thread():
    pending = Pending()
    thread, outcome = in_thread(pending.future.get)
    await eventually(lambda: pending.future._blocked)
    pending.future.set_result(5)
    thread.join(30)
    assert outcome == [5]
    assert pending.future.get() == 5, "what is there can be had anywhere"


async def test_get_on_the_thread_that_brings_the_answer_is_refused():
    with pytest.raises(WouldDeadlock, match=r"get\(\) on m.work would wait for ever"):
        Pending().future.get()


async def test_get_with_a_time_limit_ends_only_the_waiting():
    pending = Pending()
    thread, outcome = in_thread(lambda: pending.future.get(timeout_s=0.0))
    thread.join(30)
    assert isinstance(outcome[0], DeadlineExceeded)
    assert outcome[0].fields["may_have_run"] is True
    assert pending.cancels == []
    pending.future.set_result(1)
    assert await pending.future == 1


async def test_cancelling_the_last_task_that_waits_cancels_the_call():
    pending = Pending()
    first, second = (asyncio.ensure_future(wait(pending.future)) for _ in range(2))
    await turn()
    first.cancel()
    await turn()
    assert pending.cancels == []
    second.cancel()
    await turn()
    assert pending.cancels == [False]


async def test_a_thread_that_gave_up_waiting_does_not_keep_the_call_alive():
    pending = Pending()
    thread, _ = in_thread(lambda: pending.future.get(timeout_s=0.0))
    thread.join(30)
    task = asyncio.ensure_future(wait(pending.future))
    await turn()
    task.cancel()
    await turn()
    assert pending.cancels == [False]


async def test_a_thread_that_waits_keeps_the_call_alive():
    pending = Pending()
    thread, outcome = in_thread(pending.future.get)
    await eventually(lambda: pending.future._blocked)
    task = asyncio.ensure_future(wait(pending.future))
    await turn()
    task.cancel()
    await turn()
    assert pending.cancels == []
    pending.future.set_result(1)
    thread.join(30)
    assert outcome == [1]


async def test_an_explicit_cancel_leaves_the_end_to_the_callee():
    pending = Pending()
    assert pending.future.cancel()
    assert pending.cancels == [True]
    assert not pending.future.done()


async def test_callbacks_are_called_once_and_at_once_when_it_is_done():
    future = Pending().future
    called = []
    future.add_done_callback(called.append)
    assert called == []
    future.set_result(1)
    future.add_done_callback(called.append)
    assert called == [future, future]


async def test_a_callback_that_fails_disturbs_nobody(caplog):
    future = Pending().future
    called = []
    future.add_done_callback(lambda _: 1 / 0)
    future.add_done_callback(called.append)
    future.set_result(1)
    assert called == [future]
    assert "a callback of m.work failed" in caplog.text


class Large:
    """Something that should not live longer than it is used."""


async def test_values_and_frames_are_freed_without_the_garbage_collector():
    class Holder:
        """Like the sink of a call: it has the future, and the future can cancel through it."""

        def __init__(self):
            self.future = CallFuture("m.work", self.cancel, threading.get_ident())

        def cancel(self, wait): ...

    async def look(futures):
        local = Large()
        freed.append(weakref.ref(local))
        with contextlib.suppress(ValueError):
            await futures.pop()
        with contextlib.suppress(ValueError):
            futures.pop().get()

    freed = []
    gc.disable()
    try:
        value = Large()
        freed.append(weakref.ref(value))
        good = [Holder().future for _ in range(2)]
        bad = [Holder().future for _ in range(2)]
        for future in good:
            future.set_result(value)
        for future in bad:
            future.set_exception(ValueError())
        del future, value
        await look(good)
        await look(bad)
        assert [ref() for ref in freed] == [None, None, None]
    finally:
        gc.enable()


async def test_an_error_that_nobody_looked_at_is_logged(caplog):
    caplog.set_level(logging.WARNING)
    future = Pending().future
    future.set_exception(ValueError("lost"))
    del future
    gc.collect()
    assert "nobody looked at the error of m.work: lost" in caplog.text


def look_by_waiting(future):
    with pytest.raises(ValueError, match="seen"):
        future.get()


@pytest.mark.parametrize("look", [CallFuture.exception, look_by_waiting])
async def test_an_error_that_was_seen_is_not_logged(caplog, look):
    future = Pending().future
    future.set_exception(ValueError("seen"))
    look(future)
    del future
    gc.collect()
    assert "nobody looked" not in caplog.text


async def test_it_says_in_what_state_it_is():
    future, failed = Pending().future, Pending().future
    assert repr(future) == "<CallFuture m.work pending>"
    future.set_result(1)
    assert repr(future) == "<CallFuture m.work done>"
    failed.set_exception(ValueError())
    assert repr(failed) == "<CallFuture m.work failed>"
    failed.exception()
