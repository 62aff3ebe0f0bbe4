"""What every transport promises, held against each of them."""

import asyncio
import os
import random

import pytest
from support.transports import Recorder, eventually, on_every_transport

from miles_agents.wire.frames import AddressUnavailable, UnsendableMessage
from miles_agents.wire.transport import DIALED, ZERO_COPY_BYTES, Transport


def num_threads():
    """With those of zmq, which Python does not know."""
    return len(os.listdir("/proc/self/task"))


def descriptors():
    return sorted(os.listdir("/proc/self/fd"))


@on_every_transport
async def test_messages_arrive_whole_and_in_order_both_ways(world):
    rng = random.Random(7)
    acceptor, heard, dialer, told, connection = await world.pair()
    sizes = [0, 1, 50, 8191, 8192, 8193, ZERO_COPY_BYTES - 1, ZERO_COPY_BYTES, ZERO_COPY_BYTES + 1]
    messages = [
        [index.to_bytes(4, "big"), *(rng.randbytes(rng.choice(sizes)) for _ in range(rng.randrange(4)))]
        for index in range(300)
    ]
    for message in messages:
        assert dialer.send(DIALED, message)
        assert acceptor.send(connection, message)
    await heard.until(lambda: len(heard.messages) == len(messages))
    await told.until(lambda: len(told.messages) == len(messages))
    assert [message.data for message in heard.messages] == messages
    assert [message.data for message in told.messages] == messages
    assert {message.connection for message in heard.messages} == {connection}
    assert {message.connection for message in told.messages} == {DIALED}


@on_every_transport
async def test_counters_count_what_passed(world):
    acceptor, heard, dialer, _, _ = await world.pair()
    before = acceptor.stats.received_messages, acceptor.stats.received_bytes
    assert dialer.send(DIALED, [b"12345", bytes(ZERO_COPY_BYTES)])
    await heard.until(lambda: bool(heard.messages))
    after = acceptor.stats.received_messages, acceptor.stats.received_bytes
    assert after == (before[0] + 1, before[1] + 5 + ZERO_COPY_BYTES)
    assert (dialer.stats.sent_messages, dialer.stats.sent_bytes) == (2, 10 + ZERO_COPY_BYTES)


@on_every_transport
async def test_big_frames_arrive_intact_and_writable_and_apart_from_the_senders(world):
    _, heard, dialer, _, _ = await world.pair()
    original = bytearray(random.Random(3).randbytes(4 << 20))
    untouched = bytes(original)
    assert dialer.send(DIALED, [b"head", original, memoryview(untouched), b"tail"])
    await heard.until(lambda: bool(heard.messages))
    head, first, second, tail = heard.messages[0].frames
    assert (head, tail) == (b"head", b"tail")
    assert first == untouched
    assert second == untouched
    for frame in (first, second):
        assert isinstance(frame, memoryview)
        assert not frame.readonly
        frame[:4] = b"mine"
    assert original == untouched
    assert memoryview(second)[4:] == untouched[4:]


@on_every_transport
async def test_received_memory_outlives_its_message_and_its_transport(world):
    acceptor, heard, dialer, _, _ = await world.pair()
    data = random.Random(5).randbytes(1 << 20)
    assert dialer.send(DIALED, [data])
    await heard.until(lambda: bool(heard.messages))
    (frame,) = heard.messages.pop().frames
    dialer.close()
    acceptor.close()
    assert frame == data


@on_every_transport
async def test_flat_memory_of_other_types_travels_as_its_bytes(world):
    _, heard, dialer, _, _ = await world.pair()
    numbers = memoryview(bytes(range(16))).cast("I")
    assert dialer.send(DIALED, [numbers, bytearray(b"abc"), memoryview(b"")])
    await heard.until(lambda: bool(heard.messages))
    assert heard.messages[0].data == [bytes(range(16)), b"abc", b""]


@on_every_transport
async def test_what_cannot_be_sent_is_refused_whole(world):
    _, heard, dialer, _, _ = await world.pair()
    for frames in ([], [b"good", memoryview(b"abcdef")[::2]]):
        with pytest.raises(UnsendableMessage):
            dialer.send(DIALED, frames)
    assert dialer.send(DIALED, [b"next"])
    await heard.until(lambda: bool(heard.messages))
    assert [message.data for message in heard.messages] == [[b"next"]]


@on_every_transport
async def test_nothing_can_be_sent_to_an_unknown_connection(world):
    acceptor, _, dialer, _, _ = await world.pair()
    assert acceptor.send(b"\x00none", [b"x"]) is False
    assert dialer.send(b"\x00none", [b"x"]) is False
    assert acceptor.stats.unsendable == 1
    assert dialer.stats.unsendable == 1


@on_every_transport
async def test_a_dialer_that_was_never_up_sends_nothing_and_keeps_nothing(world):
    heard, told = Recorder(), Recorder()
    first = world.acceptor(Recorder())
    address = first.address
    first.close()
    dialer = world.dialer(address, told)
    assert dialer.send(DIALED, [b"too early"]) is False
    world.acceptor(heard, address)
    await told.until(lambda: bool(told.ups))
    assert dialer.send(DIALED, [b"in time"])
    await heard.until(lambda: bool(heard.messages))
    assert [message.data for message in heard.messages] == [[b"in time"]]


@on_every_transport
async def test_on_up_comes_before_everything_else_and_sending_from_it_works(world):
    heard = Recorder()
    acceptor = world.acceptor(heard)
    heard.react = lambda message: acceptor.send(message.connection, [b"welcome"])

    class Greeter(Recorder):
        def on_up(self, connection):
            super().on_up(connection)
            assert dialer.send(connection, [b"hello"])

    told = Greeter()
    dialer = world.dialer(acceptor.address, told)
    await told.until(lambda: bool(told.messages))
    assert told.order == ["up", "message"]


@on_every_transport
async def test_a_dialer_hears_that_its_peer_went_and_comes_up_again_with_the_next_one(world):
    acceptor, heard, dialer, told, _ = await world.pair()
    address = acceptor.address
    acceptor.close()
    await told.until(lambda: bool(told.downs))
    assert dialer.send(DIALED, [b"nobody there"]) is False
    successor = world.acceptor(heard, address)
    await told.until(lambda: len(told.ups) == 2)
    assert dialer.send(DIALED, [b"again"])
    await heard.until(lambda: bool(heard.messages))
    assert [message.data for message in heard.messages] == [[b"again"]]
    assert successor.send(heard.messages[0].connection, [b"welcome back"])
    await told.until(lambda: bool(told.messages))
    assert told.order == ["up", "down", "up", "message"]


@on_every_transport
async def test_what_was_sent_to_a_peer_that_is_gone_never_reaches_its_successor(world):
    acceptor, heard, dialer, told, _ = await world.pair()
    address = acceptor.address
    acceptor.close()
    # The dialer cannot know yet. Whatever it answers, these must not wait for whoever comes next.
    for _ in range(10):
        dialer.send(DIALED, [b"stale"])
    world.acceptor(heard, address)
    await told.until(lambda: len(told.ups) == 2)
    assert dialer.send(DIALED, [b"fresh"])
    await heard.until(lambda: bool(heard.messages))
    assert [message.data for message in heard.messages] == [[b"fresh"]]


@on_every_transport
async def test_an_acceptor_hears_of_the_end_of_a_connection_after_its_last_message(world):
    acceptor, heard, dialer, _, connection = await world.pair()
    other_told = Recorder()
    other = world.dialer(acceptor.address, other_told)
    await other_told.until(lambda: bool(other_told.ups))
    assert other.send(DIALED, [b"still here"])
    await heard.until(lambda: len(heard.messages) == 1)
    for _ in range(100):
        assert dialer.send(DIALED, [b"x"])
    await heard.until(lambda: len(heard.messages) == 101)
    dialer.close()
    await heard.until(lambda: bool(heard.downs))
    assert heard.downs == [connection]
    assert heard.order[-1] == "down"
    assert acceptor.send(connection, [b"x"]) is False
    assert acceptor.send(heard.messages[0].connection, [b"you are not meant"]) is True


@on_every_transport
async def test_a_new_connection_has_a_new_name(world):
    acceptor, heard, dialer, _, first = await world.pair()
    names = {first}
    for count in range(2, 6):
        dialer.close()
        await heard.until(lambda n=count: len(heard.downs) == n - 1)
        heard.messages.clear()
        told = Recorder()
        dialer = world.dialer(acceptor.address, told)
        await told.until(lambda told=told: bool(told.ups))
        assert dialer.send(DIALED, [b"x"])
        await heard.until(lambda: bool(heard.messages))
        names.add(heard.messages[0].connection)
        assert len(names) == count
    assert set(heard.downs) < names


@on_every_transport
async def test_a_burst_to_a_slow_reader_loses_nothing(world):
    acceptor, heard, dialer, told, connection = await world.pair()
    num_messages = 20_000
    # The readers share this event loop, so they see nothing before the last message is queued.
    for index in range(num_messages):
        data = index.to_bytes(4, "big")
        assert dialer.send(DIALED, [data, b"to the acceptor"])
        assert acceptor.send(connection, [data, b"to the dialer"])
    await heard.until(lambda: len(heard.messages) == num_messages)
    await told.until(lambda: len(told.messages) == num_messages)
    numbers = list(range(num_messages))
    assert [int.from_bytes(message.frames[0], "big") for message in heard.messages] == numbers
    assert [int.from_bytes(message.frames[0], "big") for message in told.messages] == numbers


@on_every_transport
async def test_replies_from_within_a_callback_do_not_stall(world):
    acceptor, heard, dialer, told, _ = await world.pair()
    heard.react = lambda message: acceptor.send(message.connection, message.frames)
    rounds = 500

    def again(message):
        if len(told.messages) < rounds:
            dialer.send(DIALED, message.frames)

    told.react = again
    assert dialer.send(DIALED, [b"ping", b"pong"])
    await told.until(lambda: len(told.messages) == rounds)


@on_every_transport
async def test_a_message_that_came_while_the_other_side_was_sending_is_not_overlooked(world):
    acceptor, _, dialer, told, connection = await world.pair()
    for count in range(1, 31):
        assert acceptor.send(connection, [b"came meanwhile"])
        # Long enough for it to arrive; one of these sends takes notice of that, and so swallows the FD's edge.
        for _ in range(300):
            dialer.send(DIALED, [b"busy"])
        await told.until(lambda count=count: len(told.messages) == count)
    # The sweep would have found what was overlooked, and counted it.
    assert "missed edge" not in dialer.stats.reasons


@on_every_transport
async def test_a_handler_that_raises_loses_only_its_own_message(world):
    failures = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context["exception"]))
    _, heard, dialer, _, _ = await world.pair()

    def fragile(message):
        if message.frames[0] == b"poison":
            raise LookupError("a handler's own trouble")

    heard.react = fragile
    for data in (b"one", b"poison", b"two", b"poison", b"three"):
        assert dialer.send(DIALED, [data])
    await heard.until(lambda: len(heard.messages) == 5)
    await eventually(lambda: len(failures) == 2)
    assert [type(failure) for failure in failures] == [LookupError, LookupError]


@on_every_transport
async def test_a_transport_can_be_closed_from_its_own_callback(world):
    acceptor, heard, dialer, told, _ = await world.pair()
    heard.react = lambda _: acceptor.close()
    for _ in range(10):
        dialer.send(DIALED, [b"x"])
    await told.until(lambda: bool(told.downs))
    assert len(heard.messages) == 1


@on_every_transport
async def test_close_is_idempotent_final_and_leaves_nothing(world):
    before, threads_before = descriptors(), num_threads()
    acceptor, heard, dialer, told, connection = await world.pair()
    assert dialer.send(DIALED, [bytes(1 << 20)])
    events = len(told.order)
    for transport in (dialer, acceptor, acceptor, dialer):
        transport.close()
    assert descriptors() == before
    await eventually(lambda: num_threads() <= threads_before)  # the kernel lists a thread a little longer
    assert dialer.send(DIALED, [b"x"]) is False
    assert acceptor.send(connection, [b"x"]) is False
    heard_events = len(heard.order)
    await asyncio.sleep(0.05)
    assert (len(told.order), len(heard.order)) == (events, heard_events)


@on_every_transport
async def test_an_address_in_use_is_an_error_that_names_it(world):
    acceptor = world.acceptor(Recorder())
    with pytest.raises(AddressUnavailable, match=acceptor.address):
        world.acceptor(Recorder(), acceptor.address)


@on_every_transport
async def test_two_networks_of_one_process_do_not_disturb_each_other(world):
    other = world.another()
    try:
        acceptor, heard, dialer, _, _ = await world.pair()
        other_acceptor, other_heard, other_dialer, _, other_connection = await other.pair()
        for index in range(50):
            assert dialer.send(DIALED, [b"one", bytes([index])])
            assert other_dialer.send(DIALED, [b"two", bytes([index])])
        await heard.until(lambda: len(heard.messages) == 50)
        await other_heard.until(lambda: len(other_heard.messages) == 50)
        assert {message.data[0] for message in heard.messages} == {b"one"}
        assert {message.data[0] for message in other_heard.messages} == {b"two"}
        dialer.close()
        acceptor.close()
        assert other_acceptor.send(other_connection, [b"x"])
        assert other_dialer.send(DIALED, [b"still"])
        await other_heard.until(lambda: len(other_heard.messages) == 51)
        assert not other_heard.downs
    finally:
        other.close()


@on_every_transport
async def test_both_sides_are_transports(world):
    acceptor, _, dialer, _, _ = await world.pair()
    assert isinstance(acceptor, Transport)
    assert isinstance(dialer, Transport)
    assert dialer.address == acceptor.address
