"""Extents, points, slices and values by coordinate, compared with plain indexing of nested lists."""

import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles_agents.rpc.shape import (
    BadExtent,
    BadPlainShape,
    EmptySlice,
    Extent,
    IndexOutOfRange,
    Shape,
    UnknownDimension,
    ValueMesh,
)

NAMES = ("hosts", "gpus", "lanes")


def nested(sizes, start=0):
    """The ranks of a mesh as nested lists, and the next free rank."""
    if not sizes:
        return start, start + 1
    rows = []
    for _ in range(sizes[0]):
        row, start = nested(sizes[1:], start)
        rows.append(row)
    return rows, start


def index(value, keys):
    """Index nested lists by one key for each level."""
    if not keys:
        return value
    chosen = value[keys[0]]
    return [index(row, keys[1:]) for row in chosen] if isinstance(keys[0], slice) else index(chosen, keys[1:])


def flat(value):
    return [leaf for row in value for leaf in flat(row)] if isinstance(value, list) else [value]


sizes_lists = st.lists(st.integers(1, 4), min_size=0, max_size=3)


@st.composite
def keys_for(draw, sizes):
    keys = []
    for size in sizes:
        if draw(st.booleans()):
            keys.append(draw(st.integers(-size, size - 1)))
        else:
            chosen = draw(st.slices(size).filter(lambda one, size=size: range(*one.indices(size))))
            keys.append(chosen)
    return keys


@given(st.data(), sizes_lists)
def test_a_slice_of_a_slice_is_direct_indexing(data, sizes):
    shape, values = Shape.of(**dict(zip(NAMES, sizes, strict=False))), nested(sizes)[0]
    for _ in range(2):
        keys = data.draw(keys_for(shape.extent.sizes))
        shape = shape.slice(**dict(zip(shape.extent.dims, keys, strict=True)))
        values = index(values, keys)
        assert list(shape.ranks) == flat(values)
        assert len(shape) == len(flat(values))


@given(sizes_lists)
def test_points_positions_and_coordinates_agree(sizes):
    extent = Extent.of(**dict(zip(NAMES, sizes, strict=False)))
    points = list(extent.points())
    assert [point.rank for point in points] == list(range(len(extent)))
    assert [extent.position(**point) for point in points] == list(range(len(extent)))
    assert [point.coordinates for point in points] == sorted(point.coordinates for point in points)
    assert len(set(points)) == len(points)


@given(st.data(), sizes_lists)
def test_a_value_mesh_slices_like_its_shape(data, sizes):
    shape = Shape.of(**dict(zip(NAMES, sizes, strict=False)))
    mesh = ValueMesh(shape, tuple(f"v{rank}" for rank in shape.ranks))
    keys = dict(zip(shape.extent.dims, data.draw(keys_for(shape.extent.sizes)), strict=True))
    part = mesh.slice(**keys)
    assert part.shape == shape.slice(**keys)
    assert part.values == tuple(f"v{rank}" for rank in part.shape.ranks)
    assert all(part.at(**point) == value == part[point.rank] for point, value in part.items())


@given(st.data(), sizes_lists)
def test_a_shape_survives_the_way_through_plain_values(data, sizes):
    shape = Shape.of(**dict(zip(NAMES, sizes, strict=False)))
    keys = dict(zip(shape.extent.dims, data.draw(keys_for(shape.extent.sizes)), strict=True))
    for one in (shape, shape.slice(**keys), shape.flatten("rank")):
        assert Shape.from_plain(one.to_plain()) == one


def test_a_whole_shape_is_sent_without_its_ranks():
    assert Shape.of(hosts=2, gpus=4).to_plain()["ranks"] is None
    assert Shape.of(hosts=2, gpus=4).slice(hosts=1).to_plain()["ranks"] == [4, 5, 6, 7]


def test_a_point_reads_by_attribute_and_by_name():
    point = Extent.of(hosts=2, gpus=4).point(6)
    assert (point.hosts, point.gpus, point["gpus"], point.rank) == (1, 2, 2, 6)
    assert dict(point) == {"hosts": 1, "gpus": 2}
    assert repr(point) == "Point(hosts=1, gpus=2)"
    assert copy.copy(point) == point
    with pytest.raises(AttributeError):
        point.lanes
    with pytest.raises(KeyError):
        point["lanes"]


def test_flatten_and_rename_keep_the_ranks():
    part = Shape.of(hosts=2, gpus=4).slice(gpus=slice(2, 4))
    assert part.ranks == (2, 3, 6, 7)
    assert part.flatten("rank") == Shape(Extent.of(rank=4), (2, 3, 6, 7))
    assert [point.rank for point in part.flatten("rank").points()] == [0, 1, 2, 3]
    assert part.rename(hosts="replicas").slice(replicas=1).ranks == (6, 7)
    assert part.rank_at(hosts=1, gpus=0) == 6


def test_a_single_point_has_no_dimension_and_one_rank():
    single = Shape.of(hosts=2).slice(hosts=1)
    assert (len(single), single.extent.dims, single.ranks) == (1, (), (1,))
    assert ValueMesh(single, ("x",)).at() == "x"


def test_an_unknown_dimension_names_the_nearest():
    with pytest.raises(UnknownDimension, match="Did you mean 'hosts'"):
        Shape.of(hosts=2, gpus=4).slice(host=0)
    with pytest.raises(UnknownDimension, match="missing: gpus"):
        ValueMesh(Shape.of(hosts=1, gpus=2), (1, 2)).at(hosts=0)


@pytest.mark.parametrize("outside", [2, -3])
def test_a_coordinate_outside_is_refused(outside):
    shape = Shape.of(hosts=2)
    with pytest.raises(IndexOutOfRange, match="0 to 1"):
        shape.slice(hosts=outside)
    with pytest.raises(IndexOutOfRange):
        shape.extent.point(outside)
    with pytest.raises(IndexOutOfRange):
        ValueMesh(shape, ("a", "b"))[outside]


def test_an_empty_slice_is_refused():
    with pytest.raises(EmptySlice):
        Shape.of(hosts=2).slice(hosts=slice(2, 4))


@pytest.mark.parametrize(
    ("dims", "sizes"),
    [
        (("a", "a"), (1, 1)),
        (("not a name",), (1,)),
        (("class",), (1,)),
        (("items",), (1,)),
        (("_x",), (1,)),
        (("rank", "a"), (1, 1)),
        (("a",), (0,)),
        (("a",), (1, 2)),
    ],
)
def test_extents_that_make_no_sense_are_refused(dims, sizes):
    with pytest.raises(BadExtent):
        Extent(dims, sizes)


@pytest.mark.parametrize("ranks", [(0,), (0, 0), (0, -1), (0, 1, 2)])
def test_ranks_must_fill_the_extent_once(ranks):
    with pytest.raises(BadExtent):
        Shape(Extent.of(hosts=2), ranks)


@pytest.mark.parametrize(
    "garbage",
    [
        None,
        7,
        {},
        {"dims": ["a"], "sizes": [True], "ranks": None},
        {"dims": ["a"], "sizes": [10**12], "ranks": None},
        {"dims": "a", "sizes": [1], "ranks": None},
        {"dims": ["a"], "sizes": [2], "ranks": [0]},
        {"dims": ["a"], "sizes": [2], "ranks": ["0", "1"]},
        {"dims": ["a"], "sizes": [0], "ranks": None},
    ],
)
def test_a_plain_value_that_is_no_shape_is_refused(garbage):
    with pytest.raises(BadPlainShape):
        Shape.from_plain(garbage)


def test_a_value_mesh_maps_compares_and_shows_itself():
    mesh = ValueMesh(Shape.of(hosts=2), (1, 2))
    assert list(mesh) == [1, 2]
    assert mesh.map(str) == ValueMesh(Shape.of(hosts=2), ("1", "2"))
    assert mesh != mesh.map(lambda value: value + 1)
    assert {point.hosts: value for point, value in mesh.to_dict().items()} == {0: 1, 1: 2}
    assert mesh[-1] == 2
    assert mesh[0:2] == (1, 2)
    assert repr(mesh) == "ValueMesh(hosts=2)[hosts=0: 1; hosts=1: 2]"
    assert "92 more" in repr(ValueMesh(Shape.of(hosts=100), tuple(range(100))))
    with pytest.raises(BadExtent):
        ValueMesh(Shape.of(hosts=2), (1,))
