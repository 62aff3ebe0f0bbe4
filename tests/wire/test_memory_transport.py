"""The transport in memory: its faults do what they say, and the same each time."""

import asyncio
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.transports import Recorder

from miles_agents.virtual_time import START_S, run_virtual
from miles_agents.wire.memory_transport import Faults, MemoryNetwork
from miles_agents.wire.transport import DIALED


def now():
    return asyncio.get_running_loop().time() - START_S


def numbers(recorder):
    return [int.from_bytes(message.frames[0], "big") for message in recorder.messages]


class Pair:
    """Host ``a`` has dialed host ``b``, and has said hello."""

    def __init__(self, **options):
        self.network = MemoryNetwork(**options)
        self.heard, self.told = Recorder(), Recorder()
        self.acceptor = self.network.acceptor("b:1", self.heard, host="b")
        self.dialer = self.network.dialer("b:1", self.told, host="a", user_id="key-a")

    async def meet(self):
        await self.told.until(lambda: bool(self.told.ups))
        assert self.dialer.send(DIALED, [b"hello"])
        await self.heard.until(lambda: bool(self.heard.messages))
        return self.heard.messages.pop().connection

    def send_numbers(self, count):
        for index in range(count):
            assert self.dialer.send(DIALED, [index.to_bytes(4, "big")])


def test_messages_take_the_latency():
    async def main():
        pair = Pair(latency_s=0.25)
        await pair.told.until(lambda: bool(pair.told.ups))
        sent_at = now()
        pair.send_numbers(3)
        await pair.heard.until(lambda: len(pair.heard.messages) == 3)
        assert now() - sent_at == 0.25

    run_virtual(main())


def test_the_acceptor_is_told_the_user_id_of_the_dialer():
    async def main():
        pair = Pair()
        await pair.meet()
        pair.send_numbers(1)
        await pair.heard.until(lambda: bool(pair.heard.messages))
        assert pair.heard.messages[0].user_id == "key-a"

    run_virtual(main())


def test_a_user_id_that_is_not_allowed_is_refused_until_it_is():
    async def main():
        network, allowed = MemoryNetwork(), set()
        heard, told = Recorder(), Recorder()
        acceptor = network.acceptor("b:1", heard, allow=allowed.__contains__)
        dialer = network.dialer("b:1", told, user_id="key-a")
        await asyncio.sleep(10)
        assert told.ups == []
        assert dialer.last_refusal == "b:1: the key is not allowed"
        assert acceptor.stats.refused == dialer.stats.refused > 3
        allowed.add("key-a")
        await told.until(lambda: bool(told.ups))
        assert dialer.send(DIALED, [b"in"])
        await heard.until(lambda: bool(heard.messages))
        allowed.clear()
        assert dialer.send(DIALED, [b"revoked"])
        await asyncio.sleep(1)
        assert [message.data for message in heard.messages] == [[b"in"]]
        assert acceptor.stats.reasons["a message under a key that is not allowed (any more)"] == 1

    run_virtual(main())


@given(seed=st.integers(0, 1000), low=st.floats(0, 1), high=st.floats(0, 1), count=st.integers(1, 60))
@settings(max_examples=40, deadline=None)
def test_delays_alone_neither_reorder_nor_lose(seed, low, high, count):
    async def main():
        pair = Pair(seed=seed)
        pair.network.set_faults("a", "b", Faults(delay_s=(min(low, high), max(low, high))))
        await pair.meet()
        for index in range(count):
            assert pair.dialer.send(DIALED, [index.to_bytes(4, "big")])
            await asyncio.sleep(0.01)
        await pair.heard.until(lambda: len(pair.heard.messages) == count)
        assert numbers(pair.heard) == list(range(count))

    run_virtual(main())


def test_a_slow_link_takes_as_long_as_the_size_demands_and_those_behind_wait():
    async def main():
        pair = Pair()
        await pair.meet()
        pair.network.set_faults("a", "b", Faults(bytes_per_s=1000.0))
        began = asyncio.get_running_loop().time()
        for size in (5000, 10):
            assert pair.dialer.send(DIALED, [bytes(size)])
        await pair.heard.until(lambda: len(pair.heard.messages) == 2)
        assert [len(message.data[0]) for message in pair.heard.messages] == [5000, 10]
        assert 5.01 <= asyncio.get_running_loop().time() - began < 5.02

    run_virtual(main())


def received_under(faults, seed, count=400):
    async def main():
        pair = Pair(seed=seed)
        await pair.meet()
        pair.network.set_faults("a", "b", faults)
        pair.send_numbers(count)
        await asyncio.sleep(60)
        return numbers(pair.heard)

    return run_virtual(main())


def test_drop_loses_about_as_many_as_asked_and_keeps_the_order():
    received = received_under(Faults(drop=0.25), seed=1)
    assert 240 < len(received) < 360
    assert received == sorted(received)
    assert received_under(Faults(drop=1.0), seed=1) == []


def test_duplicate_repeats_about_as_many_as_asked():
    received = received_under(Faults(duplicate=0.25), seed=1)
    assert 440 < len(received) < 560
    assert sorted(set(received)) == list(range(400))
    assert len(received_under(Faults(duplicate=1.0), seed=1)) == 800


def test_reorder_changes_the_order_and_loses_nothing():
    received = received_under(Faults(reorder=0.25), seed=1)
    assert received != sorted(received)
    assert sorted(received) == list(range(400))


def test_a_seed_repeats_its_faults_and_another_has_others():
    faults = Faults(drop=0.2, duplicate=0.2, reorder=0.2, delay_s=(0.0, 0.05))
    assert received_under(faults, seed=5) == received_under(faults, seed=5)
    assert received_under(faults, seed=5) != received_under(faults, seed=6)


def test_faults_are_of_one_direction():
    async def main():
        pair = Pair()
        connection = await pair.meet()
        pair.network.set_faults("a", "b", Faults(drop=1.0))
        pair.send_numbers(5)
        assert pair.acceptor.send(connection, [b"back"])
        await pair.told.until(lambda: bool(pair.told.messages))
        await asyncio.sleep(1)
        assert pair.heard.messages == []

    run_virtual(main())


def test_a_duplicate_has_memory_of_its_own():
    async def main():
        pair = Pair()
        await pair.meet()
        pair.network.set_faults("a", "b", Faults(duplicate=1.0))
        assert pair.dialer.send(DIALED, [bytes(1 << 17)])
        await pair.heard.until(lambda: len(pair.heard.messages) == 2)
        first, second = (message.frames[0] for message in pair.heard.messages)
        first[0] = 1
        assert second[0] == 0

    run_virtual(main())


@pytest.mark.parametrize("one_way", [False, True])
def test_a_short_partition_loses_messages_and_keeps_the_connection(one_way):
    async def main():
        pair = Pair(silence_s=5.0)
        connection = await pair.meet()
        pair.network.partition("a", "b", one_way=one_way)
        pair.send_numbers(3)
        assert pair.acceptor.send(connection, [b"back"])
        await asyncio.sleep(4.9)
        assert pair.heard.messages == []
        assert len(pair.told.messages) == (1 if one_way else 0)
        pair.network.heal("a", "b")
        await asyncio.sleep(20)
        pair.send_numbers(1)
        await pair.heard.until(lambda: bool(pair.heard.messages))
        assert pair.heard.downs == pair.told.downs == []

    run_virtual(main())


@pytest.mark.parametrize("one_way", [False, True])
def test_a_long_partition_ends_the_connection_on_both_sides_and_the_dialer_returns_after_it(one_way):
    async def main():
        pair = Pair(silence_s=5.0)
        connection = await pair.meet()
        begun = now()
        pair.network.partition("b", "a", one_way=one_way)
        await pair.told.until(lambda: bool(pair.told.downs))
        assert now() - begun == 5.0
        assert pair.heard.downs == [connection]
        assert pair.dialer.send(DIALED, [b"x"]) is False
        assert pair.acceptor.send(connection, [b"x"]) is False
        await asyncio.sleep(100)
        assert len(pair.told.ups) == 1
        pair.network.heal("a", "b")
        healed = now()
        await pair.told.until(lambda: len(pair.told.ups) == 2)
        assert now() - healed <= 5.0
        assert await pair.meet() != connection

    run_virtual(main())


def test_a_partition_concerns_only_its_hosts():
    async def main():
        pair = Pair()
        await pair.meet()
        told = Recorder()
        other = pair.network.dialer("b:1", told, host="c")
        await told.until(lambda: bool(told.ups))
        pair.network.partition("a", "b")
        assert other.send(DIALED, [b"x"])
        await pair.heard.until(lambda: bool(pair.heard.messages))
        await asyncio.sleep(30)
        assert told.downs == []
        assert len(pair.told.downs) == 1

    run_virtual(main())


def test_a_cut_is_heard_at_once_loses_what_is_under_way_and_is_mended_soon():
    async def main():
        pair = Pair(latency_s=0.01)
        connection = await pair.meet()
        assert pair.network.connections("b", "a") == [connection]
        pair.send_numbers(3)
        assert pair.network.cut(connection) is True
        assert pair.heard.downs == [connection]
        assert pair.told.downs == [DIALED]
        cut_at = now()
        await pair.told.until(lambda: len(pair.told.ups) == 2)
        assert now() - cut_at == pytest.approx(0.1)
        assert await pair.meet() != connection
        assert pair.heard.messages == []
        assert pair.network.cut(connection) is False

    run_virtual(main())


def test_pauses_between_attempts_double_up_to_five_seconds():
    async def main():
        network, attempts = MemoryNetwork(latency_s=0.0), []

        def refuse(_):
            attempts.append(now())
            return False

        network.acceptor("b:1", Recorder(), allow=refuse)
        network.dialer("b:1", Recorder())
        await asyncio.sleep(30)
        gaps = [after - before for before, after in itertools.pairwise(attempts)]
        assert gaps[:8] == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0])

    run_virtual(main())


def test_a_frozen_host_hears_and_says_nothing_until_it_thaws():
    async def main():
        pair = Pair(silence_s=5.0)
        connection = await pair.meet()
        pair.network.freeze("b")
        pair.send_numbers(3)
        assert pair.acceptor.send(connection, [b"from the ice"])
        await asyncio.sleep(4)
        assert pair.heard.messages == pair.told.messages == []
        pair.network.thaw("b")
        assert numbers(pair.heard) == [0, 1, 2]
        await pair.told.until(lambda: bool(pair.told.messages))
        await asyncio.sleep(60)
        assert pair.told.downs == pair.heard.downs == []

    run_virtual(main())


def test_a_host_that_is_frozen_for_long_is_given_up_and_learns_it_when_it_thaws():
    async def main():
        pair = Pair(silence_s=5.0)
        connection = await pair.meet()
        pair.network.freeze("b")
        pair.send_numbers(2)
        await pair.told.until(lambda: bool(pair.told.downs))
        assert pair.heard.downs == []
        await asyncio.sleep(60)
        assert len(pair.told.ups) == 1
        pair.network.thaw("b")
        assert numbers(pair.heard) == [0, 1]
        assert pair.heard.downs == [connection]
        assert pair.heard.order[-1] == "down"
        await pair.told.until(lambda: len(pair.told.ups) == 2)

    run_virtual(main())


def test_an_end_during_a_partition_is_heard_after_it():
    async def main():
        pair = Pair(silence_s=5.0)
        connection = await pair.meet()
        pair.network.partition("a", "b")
        pair.dialer.close()
        await asyncio.sleep(1)
        assert pair.heard.downs == []
        pair.network.heal("a", "b")
        await pair.heard.until(lambda: bool(pair.heard.downs))
        assert pair.heard.downs == [connection]

    run_virtual(main())


def test_an_end_that_cannot_be_heard_is_noticed_by_silence():
    async def main():
        pair = Pair(silence_s=5.0)
        await pair.meet()
        begun = now()
        pair.network.partition("a", "b")
        pair.acceptor.close()
        await pair.told.until(lambda: bool(pair.told.downs))
        assert now() - begun == 5.0

    run_virtual(main())


def test_closing_the_network_leaves_no_timers():
    async def main():
        pair = Pair()
        await pair.meet()
        waiting = pair.network.dialer("nowhere", Recorder())
        pair.network.close()
        pair.network.close()
        assert waiting.send(DIALED, [b"x"]) is False
        await asyncio.sleep(1)
        assert pair.told.downs == pair.heard.downs == []
        assert [timer for timer in asyncio.get_running_loop()._scheduled if not timer.cancelled()] == []

    run_virtual(main())


def test_many_nodes_beat_for_a_simulated_minute():
    async def main():
        network = MemoryNetwork(latency_s=0.001)
        heard = Recorder(lambda message: acceptor.send(message.connection, message.frames))
        acceptor = network.acceptor("controller", heard)
        told = [Recorder() for _ in range(50)]
        dialers = [network.dialer("controller", recorder, host=f"node-{index}") for index, recorder in enumerate(told)]
        for beat in range(60):
            await asyncio.sleep(1)
            for dialer in dialers:
                assert dialer.send(DIALED, [beat.to_bytes(4, "big")])
        await asyncio.sleep(1)
        assert len(heard.messages) == 50 * 60
        assert all(numbers(recorder) == list(range(60)) for recorder in told)

    run_virtual(main())
