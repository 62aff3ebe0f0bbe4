"""What a trainer's rank hears of the engines' ranks that it sends to."""

import contextlib
from contextlib import ExitStack

import pytest
from support.procs import eventually

from miles.backends.weight_update.lines import Lines
from miles.backends.weight_update.stream import Listener, StreamBroken, connect

WAIT_S = 60.0


class Ends:
    """Lines of a trainer's rank, and their other ends by engine and rank."""

    def __init__(self, stack, *peers, timeout_s=WAIT_S):
        self.lines, self.far, self._stack = Lines(peers, timeout_s), {}, stack
        stack.callback(self.lines.close)
        self._listener = stack.enter_context(Listener("127.0.0.1", WAIT_S))

    async def come(self, engine, rank=0, **hello):
        hello = {"engine": engine, "rank": rank, **hello}
        far = self._stack.enter_context(contextlib.closing(connect(self._listener.place, hello, WAIT_S)))

        def look():
            came = self._listener.accept(0.0)
            return came is not None and (self.lines.take(*came) or True)

        await eventually(look)
        self.far[engine, rank] = far
        return far

    async def all_come(self):
        for engine, rank in sorted(self.lines._expected):
            await self.come(engine, rank, group="g")
        return [self.far[peer] for peer in sorted(self.far)]


def has_ended(far):
    with contextlib.suppress(StreamBroken):
        return not far.receive()
    return True


async def test_all_ranks_of_all_engines_are_waited_for_and_nobody_else_is_taken():
    with ExitStack() as stack:
        ends = Ends(stack, ("a", 0), ("a", 1), ("b", 0))
        assert ends.lines.missing() == {"a", "b"}
        await ends.come("a", 0, group="g7")
        for engine, rank in (("a", 0), ("c", 0), ("b", 1)):
            assert has_ended(await ends.come(engine, rank)), "a second one, or one that is not expected"
        assert ends.lines.missing() == {"a", "b"} and ends.lines.groups == {("a", 0): "g7"}
        await ends.come("a", 1)
        assert ends.lines.missing() == {"b"} and ends.lines.groups[("a", 1)] == ""
        ends.lines.fail("b", "it is gone")
        assert ends.lines.missing() == set() and has_ended(await ends.come("b", 0))
        assert ends.lines.failures == {"b": "it is gone"}


async def test_an_update_is_done_when_all_ranks_have_said_so():
    with ExitStack() as stack:
        ends = Ends(stack, ("a", 0), ("b", 0))
        one, other = await ends.all_come()
        ends.lines.tell(lambda peer: {"say": "bucket", "to": peer[0]})
        assert one.receive()["to"] == "a" and other.receive()["to"] == "b"
        for far, seconds in ((one, 0.25), (other, 0.5)):
            for number in range(2):
                far.send({"said": "loaded", "number": number, "seconds": seconds})
        ends.lines.await_loaded(1)
        assert ends.lines.engine_seconds == 1.0
        for far in (one, other):
            far.send({"said": "joined"})
            far.send({"said": "done"})
        ends.lines.await_joined()
        ends.lines.await_done()
        assert ends.lines.peers == [] and not ends.lines.is_broken and ends.lines.missing() == set()


async def test_a_rank_that_fails_ends_its_engine_and_nobody_else():
    with ExitStack() as stack:
        ends = Ends(stack, ("a", 0), ("a", 1), ("b", 0))
        first, second, other = await ends.all_come()
        second.send({"error": "ValueError: too large"})
        other.send({"said": "loaded", "number": 0, "seconds": 0.0})
        ends.lines.await_loaded(0)
        assert ends.lines.failures == {"a": "rank 1: ValueError: too large"} and ends.lines.peers == [("b", 0)]
        assert has_ended(first)
        ends.lines.tell(lambda _: {"say": "end"})
        assert other.receive() == {"say": "end"}


async def test_who_says_nothing_for_too_long_is_given_up_by_name():
    with ExitStack() as stack:
        ends = Ends(stack, ("a", 0), ("b", 0), timeout_s=0.2)
        one, other = await ends.all_come()
        one.send({"said": "loaded", "number": 4, "seconds": 0.0})
        ends.lines.await_loaded(4)
        assert ends.lines.failures == {"b": "rank 0 has not loaded bucket 4 within 0.2 s"} and has_ended(other)


async def test_who_has_let_go_is_heard_before_it_is_spoken_to():
    with ExitStack() as stack:
        ends = Ends(stack, ("a", 0), ("b", 0))
        one, other = await ends.all_come()
        one.send({"said": "loaded", "number": 0, "seconds": 0.0})
        one.send({"error": "no memory is left"})
        one.close()
        for _ in range(1000):  # until it is known that nobody reads
            ends.lines.tell(lambda _: {"say": "bucket", "bytes": bytes(100)})
            if ends.lines.failures:
                break
        assert ends.lines.failures == {"a": "rank 0: no memory is left"}
        assert other.receive()["say"] == "bucket"


@pytest.mark.parametrize("speaks_first", [True, False])
async def test_who_was_cut_off_is_not_to_blame_if_somebody_else_is(speaks_first):
    with ExitStack() as stack:
        ends = Ends(stack, ("a", 0), ("b", 0), ("c", 0))
        one, other, _ = await ends.all_come()
        one.send({"said": "cut off", "why": "connection closed by peer"})
        one.close()
        if speaks_first:
            await eventually(lambda: ends.lines.listen(0.0) and ends.lines.is_broken)
            assert ends.lines.failures == {}
        other.close()
        ends.lines.settle_blame()
        assert ends.lines.failures == {"b": "rank 0: the other side is gone"}


async def test_if_nobody_is_known_to_be_the_cause_those_that_were_cut_off_are_and_else_all():
    with ExitStack() as stack:
        ends = Ends(stack, ("a", 0), ("b", 0), timeout_s=0.2)
        (await ends.all_come())[0].send({"said": "cut off", "why": "connection closed by peer"})
        ends.lines.settle_blame()
        assert ends.lines.failures == {"a": "rank 0: connection closed by peer"}
    with ExitStack() as stack:
        ends = Ends(stack, ("a", 0), ("b", 0), timeout_s=0.2)
        await ends.all_come()
        ends.lines.settle_blame()
        assert ends.lines.failures.keys() == {"a", "b"}


async def test_who_has_loaded_the_least_holds_up_the_others():
    with ExitStack() as stack:
        ends = Ends(stack, ("a", 0), ("b", 0), ("c", 0))
        for far, number in zip(await ends.all_come(), (3, 1, 2), strict=True):
            far.send({"said": "loaded", "number": number, "seconds": 0.0})
        ends.lines.await_loaded(1)
        ends.lines.fail_slowest("has loaded nothing for 5 s")
        assert ends.lines.failures == {"b": "rank 0 has loaded nothing for 5 s"}


async def test_engines_that_are_still_receiving_are_let_go_at_the_end():
    with ExitStack() as stack:
        ends = Ends(stack, ("a", 0))
        (far,) = await ends.all_come()
        ends.lines.close()
        assert has_ended(far) and ends.lines.peers == []
