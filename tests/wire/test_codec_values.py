"""Plain and registered values: what arrives is what was sent, with its type; what cannot travel is named."""

from __future__ import annotations

import dataclasses
import datetime as dt
import enum
import math
import threading
import types
import zoneinfo
from collections import OrderedDict, defaultdict, namedtuple
from decimal import Decimal
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.ids import case_id

from miles_agents.errors import MilesError
from miles_agents.wire.codec import (
    BadRegistration,
    CannotTravel,
    MalformedBody,
    TooLarge,
    UnknownType,
    decode,
    encode,
    register_converter,
    register_type,
)
from miles_agents.wire.transport import ZERO_COPY_BYTES


@register_type
@dataclasses.dataclass(frozen=True)
class Point:
    x: Any
    y: Any = 0
    size: int = dataclasses.field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "size", 17)


@register_type(name="test.slotted")
@dataclasses.dataclass(slots=True)
class Slotted:
    items: list[Any]


@register_type
class Pair(NamedTuple):
    left: Any
    right: Any


class Color(enum.Enum):
    RED = 1
    BLUE = "b"


@register_type(name="test.level")
class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Rights(enum.Flag):
    READ = 1
    WRITE = 2


class Handle:
    def __init__(self, number):
        self.number = number


register_converter(Handle, "test.handle", lambda h: (h.number,), lambda plain: Handle(*plain))


def round_trip(value: Any) -> Any:
    body, buffers = encode(value)
    return decode(body, buffers, libraries="opaque")


def same(a: Any, b: Any) -> bool:
    """Equal, with equal types all the way down, and nan equal to nan."""
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return (math.isnan(a) and math.isnan(b)) or (a == b and math.copysign(1, a) == math.copysign(1, b))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return len(a) == len(b) and all(
            same(k, m) and same(v, w) for (k, v), (m, w) in zip(a.items(), b.items(), strict=True)
        )
    if isinstance(a, (set, frozenset)):
        return len(a) == len(b) and all(any(same(x, y) for y in b) for x in a)  # in whatever order
    if dataclasses.is_dataclass(a):
        return all(same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    if isinstance(a, memoryview):
        return a.format == b.format and a.shape == b.shape and bytes(a) == bytes(b)
    return bool(a == b)


any_text = st.text(alphabet=st.characters(), max_size=8)  # surrogates included
zones = (
    st.none()
    | st.just(dt.UTC)
    | st.builds(
        dt.timezone, st.timedeltas(dt.timedelta(-1), dt.timedelta(1)).filter(lambda d: abs(d) < dt.timedelta(1))
    )
)
hashables = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | any_text
    | st.binary(max_size=8)
    | st.decimals(allow_nan=False)
    | st.complex_numbers(allow_nan=False)
    | st.dates()
    | st.datetimes(timezones=zones)
    | st.times(timezones=zones)
    | st.timedeltas()
    | st.sampled_from([*Color, *Level, Rights.READ, Rights.READ | Rights.WRITE])
    | st.builds(PurePosixPath, st.text(alphabet="ab/.", max_size=8))
)
keys = st.recursive(hashables, lambda k: st.tuples(k, k) | st.frozensets(k, max_size=2), max_leaves=3)
values = st.recursive(
    hashables
    | st.binary(max_size=8).map(bytearray)
    | st.binary(max_size=8).map(memoryview)
    | st.binary(min_size=ZERO_COPY_BYTES, max_size=ZERO_COPY_BYTES + 2)
    | st.integers(0, 100).map(range),
    lambda v: (
        st.lists(v, max_size=4)
        | st.lists(v, max_size=3).map(tuple)
        | st.dictionaries(keys, v, max_size=3)
        | st.dictionaries(keys, v, max_size=3).map(OrderedDict)
        | st.sets(keys, max_size=3)
        | st.builds(Point, v, v)
        | st.builds(Slotted, st.lists(v, max_size=2))
        | st.builds(Pair, v, v)
    ),
    max_leaves=12,
)


@settings(deadline=None, max_examples=60)
@given(values)
def test_nested_values_arrive_as_they_were_sent_also_through_a_relay(value):
    arrived = round_trip(value)
    assert same(arrived, value)
    assert same(round_trip(arrived), value)


@pytest.mark.parametrize(
    "value",
    [
        slice(1, None, 2),
        range(5, -5, -2),
        2**64,
        -(2**63) - 1,
        2**5000,
        float("-inf"),
        -0.0,
        Decimal("sNaN"),
        "\ud800 lone",
        {1: "a", None: "b", (1, (2,)): "c", Color.RED: "d", b"k": "e", 2**70: "f"},
        Path("/tmp/\udcff"),
        PureWindowsPath("c:\\x"),
        dt.datetime(2024, 10, 27, 2, 30, fold=1, tzinfo=zoneinfo.ZoneInfo("Europe/Berlin")),
        dt.timezone(dt.timedelta(hours=2), "name"),
        dt.datetime.max,
        bytearray(b""),
        memoryview(b"abcd").cast("H"),
        memoryview(bytes(12)).cast("B", (3, 4)),
        memoryview(b""),
        (),
        [[], {}, set(), frozenset(), ()],
    ],
    ids=case_id,
)
def test_a_value_of_every_kind_arrives(value):
    got = round_trip(value)
    assert str(got) == str(value) if isinstance(value, Decimal) else same(got, value)


def test_a_time_with_fold_keeps_it():
    assert round_trip(dt.datetime(2024, 1, 1, fold=1)).fold == 1


def test_a_discontiguous_memoryview_arrives_contiguous():
    assert bytes(round_trip(memoryview(b"abcdef")[::2])) == b"ace"


@pytest.mark.parametrize("make", [bytes, bytearray, memoryview])
def test_large_bytes_likes_travel_beside_the_body_without_a_copy(make):
    data = make(b"x" * ZERO_COPY_BYTES)
    for value in (data, [data], {"k": {"deep": data}}, (data,), Point(data), {"a": (1, [data])}, ((), {"k": data})):
        body, (buffer,) = encode(value)
        assert len(body) < 200
        source = data.obj if make is memoryview else data
        assert buffer.obj is source
        assert same(decode(body, [buffer], libraries="opaque"), value)


def test_small_buffers_travel_in_the_body():
    assert encode(b"x" * (ZERO_COPY_BYTES - 1))[1] == []


def test_a_large_bytes_frame_becomes_the_same_object_and_a_view_is_not_copied():
    data = b"x" * ZERO_COPY_BYTES
    body, _ = encode([data, memoryview(data)])
    arrived = [bytes(bytearray(data)), bytearray(data)]
    first, second = decode(body, arrived, libraries="opaque")
    assert first is arrived[0]
    arrived[1][0] = 7
    assert second[0] == 7


def test_a_dataclass_arrives_with_its_fields_and_without_its_init():
    value = Point(1)
    object.__setattr__(value, "size", 3)
    assert round_trip(value).size == 3


def test_a_converter_is_used_in_both_directions():
    got = round_trip({"h": [Handle(2**70)]})["h"][0]
    assert type(got) is Handle
    assert got.number == 2**70


def test_registering_twice_is_idempotent_but_a_taken_name_is_refused():
    register_type(Point)

    @dataclasses.dataclass
    class Other:
        z: int

    with pytest.raises(BadRegistration, match="belongs to"):
        register_type(Other, name="test.slotted")
    with pytest.raises(BadRegistration, match="registered already"):
        register_type(Slotted, name="another")
    with pytest.raises(BadRegistration, match="neither a dataclass"):
        register_type(Handle)


def test_a_dataclass_that_cannot_be_made_empty_is_refused_at_registration():
    @dataclasses.dataclass
    class Failure(Exception):
        z: int

    with pytest.raises(BadRegistration, match="cannot be made empty"):
        register_type(Failure)


def test_an_unregistered_name_on_the_wire_is_named():
    body, _ = encode(Slotted([1]))
    with pytest.raises(UnknownType, match=r"test\.slottex"):
        decode(body.replace(b"test.slotted", b"test.slottex"), [], libraries="opaque")
    body, _ = encode(Color.RED)
    with pytest.raises(UnknownType, match="Colos"):
        decode(body.replace(b"Color", b"Colos"), [], libraries="opaque")


def test_an_enum_of_a_module_that_is_not_loaded_is_not_imported():
    import sys

    sys.modules.pop("this", None)
    body, _ = encode(Color.RED)
    name = f"{Color.__module__}:Color".encode()
    body = (
        body.replace(bytes([0xA0 + len(name)]) + name, b"\xa6this:X")
        if len(name) < 32
        else body.replace(b"\xd9" + bytes([len(name)]) + name, b"\xa6this:X")
    )
    with pytest.raises(UnknownType, match="this:X"):
        decode(body, [], libraries="import")
    assert "this" not in sys.modules


def test_other_fields_than_here_are_a_version_mismatch():
    @dataclasses.dataclass
    class Before:
        a: int

    register_type(Before, name="test.versioned")
    body, _ = encode(Before(1))
    Before.__dataclass_fields__  # the class itself stays; only the checksum on the wire differs
    bad = bytearray(body)
    at = bad.index(b"test.versioned") + len(b"test.versioned") + 1
    bad[at] ^= 1
    with pytest.raises(UnknownType, match="same version"):
        decode(bytes(bad), [], libraries="opaque")


class Dict(dict):
    pass


@pytest.mark.parametrize(
    ("value", "path", "kind"),
    [
        ({"samples": [0, {"metadata": {"env": types}}]}, "['samples'][1]['metadata']['env']", "is a 'module'"),
        ((1, [lambda: 0]), "[1][0]", "is a 'function'"),
        ([threading.Lock()], "[0]", "is a '_thread.lock'"),
        ([iter([])], "[0]", "is a 'list_iterator'"),
        ((x for x in []), "", "is a 'generator'"),
        (Point([0, object()]), ".x[1]", "is a 'object'"),
        (Pair(1, {2: object()}), ".right[2]", "is a 'object'"),
        (OrderedDict(a=1, b=object()), "['b']", "is a 'object'"),
        ({(1, object): 2}, " (in the key", "is a 'type'"),
        ({object()}, " (in the set)", "is a 'object'"),
        ([Dict(a=1)], "[0]", "Dict'"),
        ([defaultdict(list)], "[0]", "is a 'collections.defaultdict'"),
        ([namedtuple("Loose", "a")(1)], "[0]", "Loose'"),
        ([type("Text", (str,), {})("x")], "[0]", "Text'"),
        ([{"k": memoryview(b"x" * 8).cast("d").cast("B"), "bad": [object()]}], "[0]['bad'][0]", "is a 'object'"),
        (["\ud800", object()], "[1]", "is a 'object'"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_what_cannot_travel_is_named_with_its_path(value, path, kind):
    with pytest.raises(CannotTravel) as caught:
        encode(value, what="argument")
    assert caught.value.what.startswith(f"cannot travel: argument{path}")
    assert kind in caught.value.what
    assert caught.value.advice
    assert caught.value.fields["path"].startswith(path)


def test_the_message_reads_as_documented():
    with pytest.raises(CannotTravel) as caught:
        encode([0, {"env": types}], what="argument samples")
    assert caught.value.what == "cannot travel: argument samples[1]['env'] is a 'module'"


def test_an_open_file_cannot_travel(tmp_path):
    with (tmp_path / "f").open("w") as file, pytest.raises(CannotTravel, match="TextIOWrapper"):
        encode({"log": file})


def test_advice_names_what_to_do():
    @dataclasses.dataclass
    class Loose:
        a: int

    with pytest.raises(CannotTravel, match="@register_type"):
        encode(Loose(1))
    with pytest.raises(CannotTravel, match="plain dict"):
        encode(defaultdict(int))


def test_values_that_contain_themselves_cannot_travel():
    loop: list[Any] = [1]
    loop.append({"again": loop})
    with pytest.raises(CannotTravel, match=r"value\[1\]\['again'\] is a list that contains itself"):
        encode(loop)
    point = Point(1)
    object.__setattr__(point, "x", [point])
    with pytest.raises(CannotTravel, match=r"value\.x\[0\] is a Point that contains itself"):
        encode(point)


def test_too_deep_nesting_cannot_travel():
    deep: Any = 0
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(CannotTravel, match=r"deeply|cannot be packed"):
        encode(deep)
    while deep:  # take it apart, level by level
        deep = deep[0]
    tuples: Any = b"x" * ZERO_COPY_BYTES
    for _ in range(200):
        tuples = (tuples, [1])
    assert same(round_trip(tuples), tuples)


def test_an_object_whose_class_fails_is_reported_with_its_path():
    class Bad:
        pass

    register_converter(Bad, "test.bad", lambda _: 1 / 0, lambda _: Bad())
    with pytest.raises(CannotTravel, match=r"value\[0\] fails to be packed \(ZeroDivisionError") as caught:
        encode([Bad()])
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_an_unset_field_is_reported():
    half = object.__new__(Slotted)
    with pytest.raises(CannotTravel, match="unset field"):
        encode(half)


def test_more_than_the_limit_is_refused_for_body_and_buffers():
    part = bytes(64 * 1024 * 1024)
    with pytest.raises(TooLarge, match="shared-memory store") as caught:
        encode([{"k": part}, (part, part), part, part])
    assert caught.value.fields["limit"] == 256 * 1024 * 1024
    assert encode([part, part])[1]
    with pytest.raises(TooLarge):
        encode([b"", "", [part] * 3, {"text": "x" * (64 * 1024 * 1024)}])


def test_a_dict_that_a_builder_makes_unhashable_is_malformed():
    with pytest.raises(MalformedBody):
        decode(b"\x81\x91\x01\x02", [], libraries="opaque")


def test_every_error_has_its_own_code():
    classes = [CannotTravel, TooLarge, MalformedBody, UnknownType, BadRegistration]
    assert len({c.code for c in classes}) == len(classes)
    assert all(issubclass(c, MilesError) for c in classes)
