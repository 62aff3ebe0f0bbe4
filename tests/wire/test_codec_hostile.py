"""Bytes that no codec made: refused as malformed, whatever they are, without large allocations."""

from __future__ import annotations

import resource
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miles_agents.wire.codec import MalformedBody, UnknownType, decode, encode
from miles_agents.wire.codec_tags import BUFFER_EXT, TAGS
from miles_agents.wire.transport import ZERO_COPY_BYTES

PLAIN_TYPES = (type(None), bool, int, float, str, bytes, list, dict, msgpack.Timestamp)


def decode_or_refuse(body: Any, buffers: Any) -> Any:
    try:
        return decode(body, buffers, libraries="opaque")
    except (MalformedBody, UnknownType):
        return None


ext = st.builds(msgpack.ExtType, st.sampled_from([BUFFER_EXT, *TAGS, 99]), st.just(b"") | st.binary(max_size=5))
leaves = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=4)
names = st.sampled_from(["C", "F", "<f4", "float32", "struct", "sub", "utc", "", "B", "test.slotted", "enum:Enum"])
forged = st.recursive(
    leaves | names | st.binary(max_size=9) | ext,
    lambda v: (
        st.lists(v, max_size=6)
        | st.builds(
            lambda t, rest: [msgpack.ExtType(t, b""), *rest], st.sampled_from(list(TAGS)), st.lists(v, max_size=6)
        )
        | st.dictionaries(
            st.text(max_size=3) | st.sampled_from(["what", "miles", "args", "origin", "lineage"]), v, max_size=4
        )
    ),
    max_leaves=20,
)


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=300), st.lists(st.binary(max_size=20), max_size=3))
def test_random_bytes_decode_or_are_refused(body, buffers):
    decode_or_refuse(body, buffers)


@settings(deadline=None, max_examples=150)
@given(forged, st.lists(st.binary(max_size=20), max_size=3))
def test_forged_structures_decode_or_are_refused(value, buffers):
    decode_or_refuse(msgpack.packb(value), buffers)


SAMPLE = encode(
    {
        "a": [1, (2.5, "text"), {3}, 2**80, 1j],
        "b": np.arange(5),
        "c": np.zeros(ZERO_COPY_BYTES, np.uint8),
        "e": ValueError("x"),
    }
)


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_damaged_bodies_decode_or_are_refused(data):
    body, buffers = SAMPLE
    damaged = bytearray(body)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    decode_or_refuse(bytes(damaged), buffers)


def test_every_truncation_and_every_extension_is_refused():
    body, buffers = SAMPLE
    for end in range(len(body)):
        with pytest.raises(MalformedBody):
            decode(body[:end], buffers, libraries="opaque")
    with pytest.raises(MalformedBody):
        decode(body + b"\xc0", buffers, libraries="opaque")


def test_missing_extra_and_wrong_buffers_are_refused():
    body, buffers = SAMPLE
    for wrong in ([], [*buffers, b"more"], [bytes(buffers[0])[:-1]]):
        with pytest.raises(MalformedBody):
            decode(body, wrong, libraries="import")


def packed(*items: Any) -> bytes:
    return msgpack.packb(list(items))


def test_a_buffer_serves_only_one_value_and_only_inside_one():
    bytes_tag, reference = TAGS[6].ext, msgpack.ExtType(BUFFER_EXT, bytes(4))
    assert decode(packed(bytes_tag, reference), [b"data"], libraries="opaque") == b"data"
    for body in (
        packed([bytes_tag, reference], [bytes_tag, reference]),
        packed(1, reference),
        packed(bytes_tag, msgpack.ExtType(BUFFER_EXT, b"\xff" * 4)),
        msgpack.packb(reference),
    ):
        with pytest.raises(MalformedBody):
            decode(body, [b"data"], libraries="opaque")


def test_a_tag_that_is_not_at_the_head_of_a_list_is_refused():
    for body in (packed(1, TAGS[1].ext), msgpack.packb(TAGS[1].ext), msgpack.packb({"a": TAGS[1].ext})):
        with pytest.raises(MalformedBody):
            decode(body, [], libraries="opaque")


def test_declared_lengths_allocate_nothing():
    nested = b"\xdd\x00\x0f\x00\x00" * 1000 + bytes(2**20)  # a thousand lists of a million, each in the other
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for body in (
        nested,
        b"\xdd\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xdb\x7f\xff\xff\xff",
    ):
        with pytest.raises(MalformedBody):
            decode(body, [], libraries="opaque")
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown_kib < 64 * 1024


@pytest.mark.parametrize("number", [1, 2, 6, 20, 22, 40, 43])
def test_deeply_nested_values_are_refused(number):
    body = (b"\x92" + msgpack.packb(TAGS[number].ext)) * 5000 + b"\xc0"
    with pytest.raises(MalformedBody):
        decode(body, [], libraries="opaque")


def test_deeply_nested_dtypes_are_refused():
    dtype: Any = "<f4"
    for _ in range(400):
        dtype = ["sub", dtype, [1]]
    with pytest.raises(MalformedBody):
        decode(packed(TAGS[42].ext, ["sub", dtype, [2**62]]), [], libraries="import")


def test_a_converter_that_refuses_is_malformed_and_names_the_reason():
    from miles_agents.wire.codec import register_converter

    class Even:
        pass

    def from_plain(plain: Any) -> Even:
        raise ValueError(f"{plain} is odd")

    register_converter(Even, "test.even", lambda _: 3, from_plain)
    with pytest.raises(MalformedBody, match="3 is odd"):
        decode(*encode(Even()), libraries="opaque")


def test_more_than_any_sender_may_send_is_refused():
    part = memoryview(bytes(2**20))
    with pytest.raises(MalformedBody, match="more than any sender"):
        decode(b"\xc0", [part] * 257, libraries="opaque")
