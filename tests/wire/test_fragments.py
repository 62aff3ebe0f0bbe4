"""Messages in pieces: whatever the connection does they arrive whole; whatever a peer says, nothing else does."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.conversations import SESSION, SETTINGS, WINDOW_BYTES, WINDOW_MESSAGES, Conversation, an_envelope

from miles_agents.wire import session as wire
from miles_agents.wire.envelope import MAX_BUFFERS, MAX_MESSAGE_BYTES, MalformedFrame, envelope_from_plain
from miles_agents.wire.fragments import Assembly, Fragment, Head, cut, item_from_plain
from miles_agents.wire.session import NETWORK, Pace, Session, parse_frame, parse_items
from miles_agents.wire.transport import MAX_FRAME_BYTES

PIECE = 200


class FragmentedConversation(Conversation):
    """The same talk; most messages go in pieces, some in more of them than the window holds."""

    pace = Pace(PIECE, WINDOW_BYTES, WINDOW_MESSAGES)


FragmentedConversation.TestCase.settings = SETTINGS
TestFragmentedConversation = FragmentedConversation.TestCase


def on_the_wire(item):
    plain = parse_frame(wire.pack_frame(wire.DATA, SESSION, 1, 0, [item.to_plain(0.0)])).payload
    (read,) = parse_items(plain, item.buffers, 0.0)
    return read


@given(st.integers(0, 900), st.lists(st.binary(max_size=700), max_size=4), st.integers(1, 400))
def test_what_is_cut_is_put_together_again(size, buffers, piece_bytes):
    envelope = an_envelope(7, size, buffers)
    items = list(cut(envelope, piece_bytes))
    assert all(len(item.piece) <= piece_bytes for item in items if isinstance(item, Fragment))
    assert Assembly().take([on_the_wire(item) for item in items]) == [envelope]


def test_cutting_copies_nothing_and_what_comes_is_writable_memory_of_its_own():
    data = bytearray(b"ab" * 300)
    items = list(cut(an_envelope(1, 0, [memoryview(data).cast("H")]), PIECE))
    data[:2] = b"xy"
    assert bytes(items[0].piece[:2]) == b"xy"
    (envelope,) = Assembly().take(items)
    (buffer,) = envelope.buffers
    assert bytes(buffer) == bytes(data)
    assert not buffer.readonly
    data[:2] = b"zz"
    assert bytes(buffer[:2]) == b"xy"


def test_a_message_in_pieces_keeps_its_window_and_resumes_where_it_was_cut():
    sender, receiver = (Session(SESSION, Pace(PIECE, WINDOW_BYTES, 1000)) for _ in range(2))
    sender.send(an_envelope(1, 0, [bytes(50 * PIECE)]))
    first = sender.next_batch(0.0)
    frame = parse_frame(first.frames[0])
    assert sender.next_batch(0.0) is None, "the window is full"
    items = parse_items(frame.payload, first.frames[1:], 0.0)
    assert receiver.on_data(frame.seq, items[:3], 1) == []
    sender.resume(receiver.received)
    assert sender.next_batch(0.0).first_seq == 4
    assert sender.stats.resent == len(items) - 3


def test_a_window_of_pieces_is_acknowledged_long_before_it_is_full():
    receiver = Session(SESSION, NETWORK)
    receiver.on_data(1, [Fragment(MAX_FRAME_BYTES, bytes(1024))], NETWORK.window_bytes // 8)
    assert receiver.ack_due()


WHOLE = an_envelope(1)


@pytest.mark.parametrize(
    "items",
    [
        [WHOLE],
        [Fragment(11, b"x")],
        [Fragment(10, b"x" * 6)],
        [Head(WHOLE, [10])],
        [Fragment(10, b"x" * 5), Head(WHOLE, [11])],
        [Fragment(10, b"x" * 5), Head(WHOLE, [10, 1])],
        [Fragment(10, b"x" * 5), Head(WHOLE, [])],
        [Fragment(10, b"x" * 5), Head(WHOLE, [], 11)],
        [Fragment(10, b"x" * 5), Head(WHOLE, [10]), Head(WHOLE, [10])],
        [Fragment(10, b"x" * 5), *[Fragment(MAX_FRAME_BYTES, range(MAX_FRAME_BYTES))] * 13],  # only its length counts
    ],
    ids=[
        "message in between", "other size", "too much", "not whole", "wrong size", "one more", "one less", "no body",
        "twice", "too large",
    ],
)  # fmt: skip
def test_pieces_that_fit_nothing_are_malformed_and_change_nothing(items):
    assembly = Assembly()
    assembly.take([Fragment(10, b"x" * 5)])
    with pytest.raises(MalformedFrame):
        assembly.take(items)
    (envelope,) = assembly.take([Fragment(10, b"y" * 5), Head(WHOLE, [10])])
    assert [bytes(buffer) for buffer in envelope.buffers] == [b"xxxxxyyyyy"]


def test_more_pieces_than_any_message_has_are_malformed():
    assembly = Assembly()
    with pytest.raises(MalformedFrame):
        assembly.take([Fragment(1, b"x")] * (MAX_BUFFERS + 1))


PLAIN = WHOLE.to_plain(0.0)


@pytest.mark.parametrize(
    ("plain", "buffers"),
    [
        ([10, 0], [b""]),
        ([10, 11], [b"x" * 11]),
        ([MAX_FRAME_BYTES + 1, 1], [b"x"]),
        ([MAX_MESSAGE_BYTES, 1], [b"x"]),
        ([10, 2], [b"x"]),
        ([10, 1], []),
        ([10, True], [b"x"]),
        ([-1, 1], [b"x"]),
        (["10", 1], [b"x"]),
        ([PLAIN, [1], -1], []),
        ([PLAIN, [-1], 0], []),
        ([PLAIN, ["x"], 0], []),
        ([PLAIN, 1, 0], []),
        ([PLAIN, [0] * (MAX_BUFFERS + 1), 0], []),
        ([[PLAIN, [], 0], [], 0], []),
        ([None, [], 0], []),
        ([an_envelope(1, 5).to_plain(0.0), [], 5], []),
        ([[1, 1], [], 0], [b"x"]),
    ],
    ids=range(18),
)
def test_what_is_no_item_is_malformed(plain, buffers):
    with pytest.raises(MalformedFrame):
        item_from_plain(parse_frame(wire.pack_frame(wire.DATA, 1, 1, 0, plain)).payload, buffers, 0.0)


def test_a_message_in_pieces_is_no_envelope_by_itself():
    with pytest.raises(MalformedFrame):
        envelope_from_plain([PLAIN, [], 0], [], 0.0)
