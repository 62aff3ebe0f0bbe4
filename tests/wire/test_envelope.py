"""Envelopes: what goes in comes out at the next hop, and nothing else is let in."""

import math
from dataclasses import replace

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.ids import case_id

from miles_agents.wire import envelope as wire
from miles_agents.wire.envelope import (
    Address,
    Envelope,
    MalformedFrame,
    Target,
    check_sendable,
    envelope_from_plain,
)
from miles_agents.wire.frames import UnsendableMessage
from miles_agents.wire.transport import MAX_FRAME_BYTES

NOW = 1000.0
FIELDS = [
    *("kind", "rid", "source_mesh", "source_rank", "source_incarnation", "mesh", "targets"),
    *("size", "method", "remaining", "flags", "trace", "sizes", "body"),
]

naturals = st.integers(0, wire.MAX_NUMBER)
targets = st.lists(st.tuples(naturals, naturals, naturals), min_size=1, max_size=5).map(
    lambda triples: tuple(number for triple in triples for number in triple)
)
buffers = st.lists(st.one_of(st.binary(max_size=40), st.binary(max_size=40).map(memoryview)), max_size=4)
envelopes = st.builds(
    Envelope,
    kind=st.sampled_from(sorted(wire.KIND_NAMES)),
    rid=naturals,
    source=st.builds(Address, naturals, naturals, naturals),
    mesh=naturals,
    targets=targets,
    size=naturals,
    method=st.text(st.characters(exclude_categories=["Cs"]), max_size=wire.MAX_METHOD_CHARS),
    deadline=st.none(),
    flags=naturals,
    trace=naturals,
    body=st.binary(max_size=100),
    buffers=buffers,
)


def an_envelope(**changes):
    base = Envelope(
        wire.CALL, 7, Address(2, 3, 4), 5, (0, 10, 0, 1, 11, 1), 2, "train", NOW + 5, wire.STREAM, 99, b"body", []
    )
    return replace(base, **changes)


def on_the_wire(envelope, now=NOW):
    return msgpack.unpackb(msgpack.packb(envelope.to_plain(now)))


def plain_with(field, value):
    plain = on_the_wire(an_envelope(buffers=[b"12", b"345"]))
    plain[FIELDS.index(field)] = value
    return plain


@given(envelopes)
def test_an_envelope_comes_out_as_it_went_in(envelope):
    check_sendable(envelope)
    frames = [bytes(buffer) for buffer in envelope.buffers]
    read, taken = envelope_from_plain(on_the_wire(envelope), [*frames, b"of the next envelope"], NOW)
    assert read == replace(envelope, buffers=frames)
    assert taken == len(frames)
    assert read.num_bytes == envelope.num_bytes


@given(remaining=st.floats(-1e6, 1e6), hops=st.lists(st.floats(0, 100), max_size=5))
def test_each_hop_takes_off_a_deadline_what_it_spent(remaining, hops):
    envelope, clock, left = an_envelope(deadline=NOW + remaining), NOW, remaining
    for number, spent in enumerate(hops):
        clock, left = clock + spent, max(left, 0) - spent
        other_clock = 1e5 * (number + 1)  # no two clocks agree
        envelope, _ = envelope_from_plain(on_the_wire(envelope, clock), [], other_clock)
        assert envelope.deadline is not None
        assert envelope.deadline >= other_clock
        # Milliseconds are cut off, never added.
        assert max(left, 0) - 0.0011 * (number + 1) <= envelope.deadline - other_clock <= max(left, 0) + 1e-6
        clock, left = other_clock, envelope.deadline - other_clock


def test_no_deadline_stays_none_and_a_passed_one_is_zero():
    assert envelope_from_plain(on_the_wire(an_envelope(deadline=None)), [], NOW)[0].deadline is None
    assert envelope_from_plain(on_the_wire(an_envelope(deadline=NOW - 3)), [], NOW)[0].deadline == NOW


@pytest.mark.parametrize("deadline", [math.inf, 1e300])
def test_a_deadline_without_measure_travels(deadline):
    read, _ = envelope_from_plain(on_the_wire(an_envelope(deadline=deadline)), [], NOW)
    assert read.deadline is not None
    assert read.deadline > NOW + 1e12


BAD_NUMBERS = [-1, -(2**63), True, 1.0, "1", None, [1], b"1", 2**63]
NUMERIC = ["kind", "rid", "source_mesh", "source_rank", "source_incarnation", "mesh", "size", "flags", "trace"]


@pytest.mark.parametrize("field", NUMERIC)
@pytest.mark.parametrize("value", BAD_NUMBERS, ids=repr)
def test_a_number_that_is_not_natural_is_malformed(field, value):
    with pytest.raises(MalformedFrame):
        envelope_from_plain(plain_with(field, value), [b"12", b"345"], NOW)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("kind", 0),
        ("kind", 9),
        ("remaining", -2),
        ("remaining", 2**63),
        ("remaining", 1.5),
        ("remaining", None),
        ("remaining", True),
        ("method", b"train"),
        ("method", None),
        ("method", "m" * (wire.MAX_METHOD_CHARS + 1)),
        ("body", "text"),
        ("body", None),
        ("body", [1]),
        ("targets", []),
        ("targets", [1, 2]),
        ("targets", [1, 2, 3, 4]),
        ("targets", [1, 2, -3]),
        ("targets", [1, 2, 3.0]),
        ("targets", [1, 2, True]),
        ("targets", [1, 2, [3]]),
        ("targets", [1, 2, 2**63]),
        ("targets", (1, 2, 3)),
        ("targets", {"a": 1}),
        ("targets", None),
        ("sizes", None),
        ("sizes", 2),
        ("sizes", [2, 3, 4]),
        ("sizes", [2, 4]),
        ("sizes", [3, 2]),
        ("sizes", [2, -3]),
        ("sizes", [2, 3.0]),
        ("sizes", ["2", "3"]),
    ],
    ids=repr,
)
def test_a_field_of_the_wrong_shape_is_malformed(field, value):
    with pytest.raises(MalformedFrame):
        envelope_from_plain(plain_with(field, value), [b"12", b"345"], NOW)


def test_a_size_that_equals_a_number_without_being_one_is_malformed():
    plain = on_the_wire(an_envelope(buffers=[b"1"]))
    plain[FIELDS.index("sizes")] = [True]
    with pytest.raises(MalformedFrame):
        envelope_from_plain(plain, [b"1"], NOW)


def test_buffers_that_did_not_come_are_malformed():
    plain = on_the_wire(an_envelope(buffers=[b"12", b"345"]))
    assert envelope_from_plain(plain, [b"12", b"345"], NOW)[1] == 2
    for came in ([], [b"12"], [b"12", b"34"], [b"345", b"12"]):
        with pytest.raises(MalformedFrame):
            envelope_from_plain(plain, came, NOW)


@pytest.mark.parametrize("plain", [None, 1, b"", "x", {}, (), [], [1] * 13, [1] * 15, [None] * 14], ids=repr)
def test_what_is_not_an_array_of_14_fields_is_malformed(plain):
    with pytest.raises(MalformedFrame):
        envelope_from_plain(plain, [], NOW)


anything = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(), st.text(), st.binary()),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.sampled_from(FIELDS), anything)
def test_any_value_in_any_field_is_either_read_and_sendable_again_or_malformed(field, value):
    try:
        read, _ = envelope_from_plain(plain_with(field, value), [b"12", b"345"], NOW)
    except MalformedFrame:
        return
    check_sendable(read)
    assert envelope_from_plain(on_the_wire(read), read.buffers, NOW)[0].rid == read.rid


def test_receivers_are_the_triples_in_order():
    assert an_envelope().receivers() == [Target(0, 10, 0), Target(1, 11, 1)]


def test_to_narrows_the_receivers_and_shares_the_rest():
    whole = an_envelope(buffers=[b"data"])
    part = whole.to([Target(1, 11, 1)])
    assert part == replace(whole, targets=(1, 11, 1))
    assert part.buffers[0] is whole.buffers[0]
    assert whole.targets == (0, 10, 0, 1, 11, 1)


def test_an_answer_goes_to_the_life_that_asked():
    me = Address(5, 1, 11)
    answer = an_envelope().answer(wire.REPLY, me, b"value", [b"buffer"])
    assert (answer.kind, answer.rid, answer.source, answer.mesh) == (wire.REPLY, 7, me, 2)
    assert answer.receivers() == [Target(3, 4, 0)]
    assert (answer.body, answer.buffers, answer.trace, answer.deadline) == (b"value", [b"buffer"], 99, None)
    check_sendable(answer)


def test_answers_do_not_share_their_buffers():
    first, second = an_envelope().answer(wire.END, Address(5, 0, 10)), an_envelope().answer(wire.END, Address(5, 1, 11))
    first.buffers.append(b"x")
    assert second.buffers == []


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": 0},
        {"rid": -1},
        {"trace": 2**63},
        {"source": Address(2, -1, 4)},
        {"mesh": True},
        {"targets": ()},
        {"targets": (1, 2)},
        {"targets": (1, 2, -1)},
        {"method": "m" * (wire.MAX_METHOD_CHARS + 1)},
        {"deadline": math.nan},
        {"body": bytearray(b"x")},
        {"buffers": [memoryview(bytes(10))[::2]]},
    ],
    ids=case_id,
)
def test_what_a_peer_would_refuse_cannot_be_sent(changes):
    with pytest.raises(UnsendableMessage):
        check_sendable(an_envelope(**changes))


def test_a_frame_above_the_limit_cannot_be_sent():
    much = bytes(MAX_FRAME_BYTES + 1)  # zeros that nobody reads occupy no memory
    check_sendable(an_envelope(buffers=[memoryview(much)[:-1]]))
    with pytest.raises(UnsendableMessage, match="train"):
        check_sendable(an_envelope(buffers=[much]))
    with pytest.raises(UnsendableMessage):
        check_sendable(an_envelope(body=much))
