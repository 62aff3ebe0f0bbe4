"""The codec's shorter ways for plain values give what the long way gives, for every value and for any bytes."""

import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from miles_agents.errors import MilesError
from miles_agents.wire import codec
from miles_agents.wire.codec import CannotTravel, decode, encode, encode_call
from miles_agents.wire.codec_tags import Outgoing
from miles_agents.wire.transport import ZERO_COPY_BYTES

any_text = st.text(st.characters(), max_size=20)
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(2**63) - 2, 2**64 + 2),
    st.floats(),
    any_text,
)
plain = st.recursive(
    scalars, lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(any_text, inner, max_size=4))
)


def the_long_way(value, what="value"):
    return codec._encode(value, what, Outgoing)


def same(one, other):
    """Equal, of the same types, with NaN equal to itself."""
    if type(one) is not type(other):
        return False
    if isinstance(one, float):
        return one == other or (math.isnan(one) and math.isnan(other))
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    return one == other


def outcome(function, *args, **options):
    try:
        return function(*args, **options)
    except MilesError as error:
        return type(error)


@given(scalars)
@example("\ud800")
@example(2**64)
@example(-(2**63) - 1)
@example("x" * ZERO_COPY_BYTES)
@example("é" * ZERO_COPY_BYTES)
def test_a_scalar_is_encoded_as_by_the_long_way_and_comes_back(value):
    assert encode(value) == the_long_way(value)
    assert same(decode(*encode(value), libraries="opaque"), value)


@given(st.lists(plain, max_size=4).map(tuple), st.dictionaries(any_text, plain, max_size=3))
@example(("\ud800", 1), {})
@example((2**100, "x", None), {})
@example(("x" * ZERO_COPY_BYTES,), {})
@example((b"bytes", 1), {})
@example(((1, 2),), {})
@example((), {"key": b"x" * ZERO_COPY_BYTES})
def test_arguments_are_encoded_as_by_the_long_way_and_come_back_as_list_and_dict(args, kwargs):
    assert encode_call(args, kwargs) == the_long_way([list(args), kwargs], "arguments")
    assert same(decode(*encode_call(args, kwargs), libraries="opaque"), [list(args), kwargs])


class Text(str):
    """A string that is more than one."""


@pytest.mark.parametrize("value", [Text("x"), object(), lambda: None], ids=["text", "object", "function"])
def test_what_cannot_travel_is_named_in_the_same_words(value):
    with pytest.raises(CannotTravel) as quick:
        encode_call((1, value), {})
    with pytest.raises(CannotTravel) as long:
        the_long_way([[1, value], {}], "arguments")
    assert str(quick.value) == str(long.value)


@given(plain)
def test_plain_values_are_decoded_as_by_the_long_way(value):
    body, buffers = encode(value)
    assert same(decode(body, buffers, libraries="opaque"), value)
    assert same(codec._decode(body, buffers, "opaque", codec.MAX_BODY_BYTES), value)


@given(st.binary(max_size=60))
@example(b"\xd6\xff\x00\x00\x00\x01")
@example(b"\x81\x91\x01\x02")
@example(b"\x82\x01\x02\x01\x03")
@example(b"\x91" * 2000)
@example(b"\x01\x02")
def test_any_bytes_mean_the_same_both_ways(body):
    quick = outcome(decode, body, [], libraries="opaque")
    long = outcome(codec._decode, body, [], "opaque", codec.MAX_BODY_BYTES)
    assert same(quick, long)
