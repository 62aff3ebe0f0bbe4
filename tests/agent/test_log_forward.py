"""Forwarding lines to the controller: bounded, one batch in flight, and what is left out is said."""

import asyncio
from contextlib import asynccontextmanager

import pytest
from support.procs import eventually

from miles_agents.agent.log_forward import ForwardLimits, LogForwarder, TokenBucket, render
from miles_agents.agent.logs import last_lines
from miles_agents.errors import PeerFault


class Controller:
    """Takes batches; ``gate`` holds answers back, ``faults`` are raised instead of an answer."""

    def __init__(self):
        self.batches = []
        self.in_flight = 0
        self.most_in_flight = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.faults = []
        self.pause_s = 0.0

    async def send(self, batch):
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            await self.gate.wait()
            if self.faults:
                raise self.faults.pop()
            self.batches.append(batch)
            return self.pause_s
        finally:
            self.in_flight -= 1

    @property
    def lines(self):
        return [render(entry) for batch in self.batches for entry in batch]


def now():
    return asyncio.get_running_loop().time()


@asynccontextmanager
async def running(forwarder):
    task = asyncio.create_task(forwarder.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest.fixture
async def controller():
    return Controller()


@pytest.fixture
def write(tmp_path):
    def append(name, text):
        path = tmp_path / f"{name}.log"
        with path.open("a") as file:
            file.write(text)
        return path

    return append


async def test_lines_of_ranks_arrive_merged_and_with_their_source(controller, write):
    forwarder = LogForwarder("node-a", controller.send)
    for rank in range(4):
        forwarder.add("trainer", rank, write(rank, f"hello\nWARNING slow disk {rank}\n"), now())
    async with running(forwarder):
        assert await forwarder.flush(now() + 10)
    assert controller.lines == [
        "trainer[0]@node-a | hello",
        "trainer[0]@node-a | WARNING slow disk 0",
        "trainer[1-3]@node-a | (x3) WARNING slow disk 1 [numbers differ]",
    ]
    forwarder.close()


async def test_a_service_is_named_without_a_rank_and_merged_with_nobody(controller, write):
    forwarder = LogForwarder("node-a", controller.send)
    forwarder.add("web", None, write("web", "hello\nhello\n"), now())
    forwarder.add("engine", None, write("engine", "hello\nlast words"), now())
    async with running(forwarder):
        assert await forwarder.flush(now() + 10)
        assert forwarder.finish("engine", None, now()) == ["hello", "last words"]
        assert await forwarder.flush(now() + 10)
    assert controller.lines == ["web@node-a | hello"] * 2 + ["engine@node-a | hello", "engine@node-a | last words"]
    forwarder.close()


async def test_polling_sends_without_a_flush(controller, write):
    forwarder = LogForwarder("node-a", controller.send)
    path = write("x", "")
    forwarder.add("trainer", 0, path, now())
    async with running(forwarder):
        forwarder.poll(now())
        write("x", "one\n")
        forwarder.poll(now())
        await eventually(lambda: controller.lines)
    assert controller.lines == ["trainer[0]@node-a | one"]
    assert forwarder.finish("trainer", 0, now()) == ["one"]
    assert forwarder.finish("trainer", 0, now()) == []


async def test_one_batch_is_in_flight_at_a_time_and_none_is_too_large(controller, write):
    limits = ForwardLimits(batch_bytes=1000)
    forwarder = LogForwarder("node-a", controller.send, limits)
    forwarder.add("trainer", 0, write("x", "".join(f"line {n}\n" for n in range(200))), now())
    async with running(forwarder):
        assert await forwarder.flush(now() + 10)
    assert controller.most_in_flight == 1
    assert controller.lines == [f"trainer[0]@node-a | line {n}" for n in range(200)]
    assert len(controller.batches) > 10
    assert all(sum(len(text) for _, _, text, _ in batch) <= 1000 for batch in controller.batches)
    forwarder.close()


async def test_a_batch_that_failed_is_sent_again(controller, write):
    controller.faults = [PeerFault("gone"), TimeoutError()]
    forwarder = LogForwarder("node-a", controller.send, ForwardLimits(retry_s=0.01))
    forwarder.add("trainer", 0, write("x", "one\ntwo\n"), now())
    async with running(forwarder):
        assert await forwarder.flush(now() + 10)
    assert controller.lines == ["trainer[0]@node-a | one", "trainer[0]@node-a | two"]
    forwarder.close()


async def test_a_flush_ends_at_its_deadline_when_nobody_answers_and_nothing_is_lost(controller, write):
    controller.gate.clear()
    forwarder = LogForwarder("node-a", controller.send)
    forwarder.add("trainer", 0, write("x", "one\n"), now())
    async with running(forwarder):
        assert not await forwarder.flush(now() + 0.05)
        controller.gate.set()
        assert await forwarder.flush(now() + 10)
    assert controller.lines == ["trainer[0]@node-a | one"]
    forwarder.close()


async def test_the_pause_that_the_controller_asks_for_is_kept(controller, write):
    controller.pause_s = 3600.0
    forwarder = LogForwarder("node-a", controller.send, ForwardLimits(batch_bytes=1))
    forwarder.add("trainer", 0, write("x", "one\ntwo\n"), now())
    async with running(forwarder):
        assert not await forwarder.flush(now() + 0.2)
    assert controller.lines == ["trainer[0]@node-a | one"]
    forwarder.close()


async def test_of_a_flood_that_cannot_be_shown_soon_the_newest_lines_and_the_last_words_are_kept(controller, write):
    controller.pause_s = 0.01
    forwarder = LogForwarder("node-a", controller.send, ForwardLimits(batch_bytes=1000, stale_s=0.02))
    dead = write("dead", "KeyError: 'the cause'")
    forwarder.add("dead", 0, dead, now())
    forwarder.finish("dead", 0, now())
    forwarder.add("trainer", 0, write("x", "".join(f"line {n:05}\n" for n in range(1000))), now())
    async with running(forwarder):
        assert await forwarder.flush(now() + 10)
        assert await forwarder.flush(now() + 10)
    lines = controller.lines
    assert "dead[0]@node-a | KeyError: 'the cause'" in lines
    assert lines[1] == "trainer[0]@node-a | line 00000" and "trainer[0]@node-a | line 00999" in lines
    shown = [line for line in lines if " line 0" in line]
    missing = sum(int(line.split()[3]) for line in lines if line.startswith("logs@node-a | [log: "))
    assert 20 < len(shown) < 100
    assert missing == 1000 - len(shown)
    forwarder.close()


async def test_a_flood_is_read_in_slices_and_a_process_that_ends_between_two_of_them_ends(controller, write):
    limits = ForwardLimits(slice_bytes=100, poll_bytes=1000, poll_file_bytes=500)
    forwarder = LogForwarder("node-a", controller.send, limits)
    flood = forwarder.add("a", 0, write("a", "123456789\n" * 1000), now())
    other = forwarder.add("b", 0, write("b", "123456789\n" * 1000), now())
    assert len(list(forwarder.turns(now()))) == 10
    assert (flood.offset, other.offset) == (500, 500)
    turns = forwarder.turns(now())
    next(turns)
    assert len(forwarder.finish("a", 0, now())) == 200
    assert len(list(turns)) >= 4
    assert (flood.offset, other.offset) == (10_000, 1000)
    forwarder.close()


async def test_what_is_too_much_is_counted_and_its_file_is_named(controller, write):
    limits = ForwardLimits(rate_bytes=0, burst_bytes=1000)
    forwarder = LogForwarder("node-a", controller.send, limits)
    path = write("x", "".join(f"line {n:05}\n" for n in range(1000)))
    tail = forwarder.add("trainer", 0, path, now())
    async with running(forwarder):
        assert await forwarder.flush(now() + 10)
    assert controller.lines == [
        *(f"trainer[0]@node-a | line {n:05}" for n in range(100)),
        f"trainer[0]@node-a | [log: 900 lines (9000 bytes) were too many to show; they are in {path}]",
    ]
    assert tail.last_lines(1) == ["line 00999"]
    forwarder.close()


async def test_the_queue_is_bounded_while_the_controller_is_away_and_the_last_words_still_arrive(controller, write):
    forwarder = LogForwarder("node-a", controller.send, ForwardLimits(queue_bytes=10_000))
    path = write("x", "".join(f"line {n:05}\n" for n in range(1000)))
    forwarder.add("trainer", 0, path, now())
    forwarder.poll(now())
    write("x", "Traceback (most recent call last):\n  File x\nKeyError: 'the cause'")
    assert forwarder.finish("trainer", 0, now())[-1] == "KeyError: 'the cause'"
    async with running(forwarder):
        assert await forwarder.flush(now() + 10)
    shown = [line for line in controller.lines if "line 0" in line]
    assert 100 < len(shown) < 200
    assert controller.lines[-4:-1] == [
        "trainer[0]@node-a | Traceback (most recent call last):",
        "trainer[0]@node-a |   File x",
        "trainer[0]@node-a | KeyError: 'the cause'",
    ]
    assert f"{1000 - len(shown)} lines" in controller.lines[-1]


async def test_a_chatty_process_does_not_starve_the_others(controller, write):
    limits = ForwardLimits(poll_bytes=1000, poll_file_bytes=1000)
    forwarder = LogForwarder("node-a", controller.send, limits)
    tails = [
        forwarder.add("a", 0, write("a", "chatter\n" * 10_000), now()),
        forwarder.add("b", 0, write("b", "quiet\n"), now()),
    ]
    forwarder.poll(now())
    forwarder.poll(now())
    assert [tail.last_lines()[:1] for tail in tails] == [["chatter"], ["quiet"]]
    forwarder.close()


async def test_large_files_are_capped(controller, write):
    limits = ForwardLimits(file_bytes=200_000, file_head_bytes=8192)
    forwarder = LogForwarder("node-a", controller.send, limits)
    path = write("x", "many words\n" * 200_000)
    forwarder.add("trainer", 1, path, now())
    forwarder.poll(now())
    assert path.stat().st_blocks * 512 <= 200_000
    forwarder.close()


async def test_a_log_that_its_process_replaced_by_a_directory_is_told_once_and_hurts_nobody(controller, write):
    forwarder = LogForwarder("node-a", controller.send, ForwardLimits(cap_s=0.0))
    wrecked = write("wrecked", "")
    wrecked.unlink()
    (wrecked / "below").mkdir(parents=True)
    forwarder.add("trainer", 0, wrecked, now())
    forwarder.add("other", 0, write("other", ""), now())
    async with running(forwarder):
        for _ in range(3):
            forwarder.poll(now())
        write("other", "hello\n")
        assert await forwarder.flush(now() + 10)
        assert forwarder.finish("trainer", 0, now()) == []
        assert await forwarder.flush(now() + 10)
    told = [line for line in controller.lines if str(wrecked) in line]
    assert len(told) == 1 and "Is a directory" in told[0], told
    assert "other[0]@node-a | hello" in controller.lines
    assert forwarder.num_faults >= 3
    assert "Is a directory" in last_lines(wrecked)[0]
    forwarder.close()


def test_a_token_bucket_allows_its_rate_and_after_a_pause_its_burst():
    bucket = TokenBucket(rate=10, burst=100, now=0)
    assert bucket.take(100, 0)
    assert not bucket.take(1, 0)
    assert bucket.take(10, 1)
    assert not bucket.take(1, 1)
    assert bucket.take(1000, 11)
    assert not bucket.take(1, 11)
