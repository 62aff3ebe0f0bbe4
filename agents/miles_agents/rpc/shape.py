"""Named dimensions of meshes: extents, points, slices, and values by coordinate. Pure.

Everything is row-major: the last dimension varies fastest. Two numbers must not be confused:

* the **position** of a point is its place in the extent at hand (in a slice: in the slice), ``Point.rank``;
* the **rank** of a member is its place in the mesh that was spawned; ``Shape.ranks[position]``. Slicing,
  flattening and renaming keep it.
"""

from __future__ import annotations

import difflib
import functools
import itertools
import keyword
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import EllipsisType
from typing import Any, Generic, TypeAlias, TypeVar, overload

from miles_agents.errors import ConfigError, PeerFault

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
R = TypeVar("R")

Selector: TypeAlias = "int | slice | EllipsisType"
"""What to take of one dimension: an int drops the dimension, a slice keeps it, ``...`` keeps all of it."""

MAX_RANKS = 2**20
"""A shape that arrives from elsewhere has no more: it says so in a few bytes, and each rank takes memory here."""
_TAKEN_BY_POINT = frozenset({"coordinates", "extent", "get", "items", "keys", "values"})


class UnknownDimension(ConfigError):
    """A dimension was named that the mesh does not have, or one that it has was not named."""

    code = "E-SHAPE-001"


class IndexOutOfRange(ConfigError):
    """A coordinate or position lies outside of the mesh."""

    code = "E-SHAPE-002"


class EmptySlice(ConfigError):
    """A slice selects nothing."""

    code = "E-SHAPE-003"


class BadExtent(ConfigError):
    """Dimensions cannot be named or sized like this."""

    code = "E-SHAPE-004"


class BadPlainShape(PeerFault):
    """A shape arrived from elsewhere that is none."""

    code = "E-SHAPE-005"


@dataclass(frozen=True, slots=True)
class Extent:
    """Ordered named dimensions with their sizes. No dimension at all is an extent with one point.

    Raises:
        BadExtent: A name is not an identifier, is taken, or twice there; a size is below 1.
    """

    dims: tuple[str, ...]
    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        problems = [
            f"{name!r} is not a name" for name in self.dims if not name.isidentifier() or keyword.iskeyword(name)
        ]
        problems += [f"{name!r} is reserved" for name in self.dims if name in _TAKEN_BY_POINT or name[:1] == "_"]
        if "rank" in self.dims and len(self.dims) > 1:
            problems.append("'rank' names the position of a point, so it can only be the single dimension")
        problems += [f"{name!r} is there twice" for name in sorted({d for d in self.dims if self.dims.count(d) > 1})]
        if len(self.dims) != len(self.sizes):
            problems.append(f"{len(self.dims)} names but {len(self.sizes)} sizes")
        problems += [f"size {size} is below 1" for size in self.sizes if size < 1]
        if problems:
            raise BadExtent(
                f"no mesh can have the dimensions {dict(zip(self.dims, self.sizes, strict=False))}",
                evidence="; ".join(problems),
                advice="Give each dimension a name of its own and a size of 1 or more, such as hosts=2, gpus=8.",
            )

    @classmethod
    def of(cls, **sizes: int) -> Extent:
        """``Extent.of(hosts=2, gpus=4)``."""
        return cls(tuple(sizes), tuple(sizes.values()))

    def __len__(self) -> int:
        return math.prod(self.sizes)

    def __str__(self) -> str:
        return ", ".join(f"{dim}={size}" for dim, size in zip(self.dims, self.sizes, strict=True)) or "single"

    @property
    def strides(self) -> tuple[int, ...]:
        """Positions between neighbours, per dimension."""
        return tuple(math.prod(self.sizes[i + 1 :]) for i in range(len(self.sizes)))

    def point(self, position: int) -> Point:
        """The point at a position; negative ones count from the end. Raises `IndexOutOfRange`."""
        return Point(self, _checked(position, len(self), "position", self))

    def points(self) -> Iterator[Point]:
        """All points, in order."""
        return (Point(self, position) for position in range(len(self)))

    def position(self, **coordinates: int) -> int:
        """The position of the point with these coordinates, all of which must be given.

        Raises:
            UnknownDimension: A name that is not there, or one that is missing.
            IndexOutOfRange: A coordinate outside of its dimension.
        """
        self._check_names(coordinates)
        missing = [dim for dim in self.dims if dim not in coordinates]
        if missing:
            raise UnknownDimension(
                f"coordinates {coordinates} do not name one point of ({self})",
                evidence=f"missing: {', '.join(missing)}",
                advice="Give every dimension a coordinate, or use slice() for a part of the mesh.",
            )
        return sum(
            _checked(coordinates[dim], size, dim, self) * stride
            for dim, size, stride in zip(self.dims, self.sizes, self.strides, strict=True)
        )

    def select(self, **selectors: Selector) -> tuple[Extent, tuple[int, ...]]:
        """The extent of a slice, and the positions (in this extent) of its points in its own order.

        Raises:
            UnknownDimension: A name that is not there.
            IndexOutOfRange: An int outside of its dimension.
            EmptySlice: A slice with nothing in it.
        """
        self._check_names(selectors)
        kept: dict[str, int] = {}
        offsets: list[list[int]] = []
        for dim, size, stride in zip(self.dims, self.sizes, self.strides, strict=True):
            chosen = selectors.get(dim, ...)
            if isinstance(chosen, slice):
                indices = range(*chosen.indices(size))
            elif chosen is ...:
                indices = range(size)
            else:
                index = _checked(chosen, size, dim, self)
                indices = range(index, index + 1)
            if not indices:
                raise EmptySlice(
                    f"{dim}={chosen} selects nothing of ({self})",
                    evidence=f"{dim} has the indices 0 to {size - 1}",
                    advice="Choose a slice that holds at least one index.",
                )
            if not isinstance(chosen, int):
                kept[dim] = len(indices)
            offsets.append([index * stride for index in indices])
        return Extent.of(**kept), tuple(sum(parts) for parts in itertools.product(*offsets))

    def renamed(self, names: Mapping[str, str]) -> Extent:
        """The same extent with other names, ``{old: new}``."""
        self._check_names(names)
        return Extent(tuple(names.get(dim, dim) for dim in self.dims), self.sizes)

    def _check_names(self, names: Mapping[str, object]) -> None:
        for name in names:
            if name not in self.dims:
                near = difflib.get_close_matches(name, self.dims, n=1, cutoff=0.4)
                raise UnknownDimension(
                    f"no dimension {name!r} in a mesh of ({self})",
                    evidence=f"dimensions: {', '.join(self.dims) or 'none'}",
                    advice=f"Did you mean {near[0]!r}?" if near else "Name one of the dimensions above.",
                )


@dataclass(frozen=True, slots=True, repr=False)
class Point(Mapping[str, int]):
    """One point of an extent: ``point.hosts``, ``point["hosts"]``, ``dict(point)``; hashable.

    Attributes:
        extent: The extent that it is a point of.
        rank: Its position there, row-major.
    """

    extent: Extent
    rank: int

    @property
    def coordinates(self) -> tuple[int, ...]:
        """One number per dimension, in order."""
        return tuple(
            self.rank // stride % size for stride, size in zip(self.extent.strides, self.extent.sizes, strict=True)
        )

    def __getitem__(self, dim: str) -> int:
        if dim not in self.extent.dims:
            raise KeyError(dim)
        return self.coordinates[self.extent.dims.index(dim)]

    def __getattr__(self, dim: str) -> int:
        # Reserved names come here only while a copy is being made, when there is no extent to ask yet.
        if dim in _TAKEN_BY_POINT or dim[:1] == "_" or dim not in self.extent.dims:
            raise AttributeError(f"a point has no {dim!r}")
        return self[dim]

    def __iter__(self) -> Iterator[str]:
        return iter(self.extent.dims)

    def __len__(self) -> int:
        return len(self.extent.dims)

    def __repr__(self) -> str:
        return f"Point({', '.join(f'{dim}={index}' for dim, index in self.items())})"


@dataclass(frozen=True, slots=True)
class Shape:
    """A whole mesh or a part of one: an extent, and for each position the rank in the mesh that was spawned.

    Raises:
        BadExtent: As many ranks as positions are needed, each 0 or more and there once.
    """

    extent: Extent
    ranks: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.ranks is _counting(len(self.extent)):
            return
        distinct = len(set(self.ranks)) == len(self.ranks) and min(self.ranks, default=0) >= 0
        if len(self.ranks) != len(self.extent) or not distinct:
            raise BadExtent(
                f"ranks {self.ranks!r:.200} do not fill a mesh of ({self.extent})",
                evidence=f"{len(self.extent)} positions, {len(self.ranks)} ranks, all different: {distinct}",
                advice="Give each position one rank.",
            )

    @classmethod
    def of(cls, **sizes: int) -> Shape:
        """A whole mesh: ``Shape.of(hosts=2, gpus=4)`` has the ranks 0 to 7."""
        return cls.whole(Extent.of(**sizes))

    @classmethod
    def whole(cls, extent: Extent) -> Shape:
        """All of a mesh of this extent."""
        return cls(extent, _counting(len(extent)))

    def __len__(self) -> int:
        return len(self.ranks)

    def points(self) -> Iterator[Point]:
        """All points, in order; the rank of ``point`` in the spawned mesh is ``ranks[point.rank]``."""
        return self.extent.points()

    def slice(self, **selectors: Selector) -> Shape:
        """``shape.slice(hosts=0, gpus=slice(0, 4))``. For errors see `Extent.select`."""
        extent, positions = self.extent.select(**selectors)
        return Shape(extent, tuple(self.ranks[position] for position in positions))

    def flatten(self, name: str) -> Shape:
        """The same ranks along one dimension of this name."""
        return Shape(Extent((name,), (len(self),)), self.ranks)

    def rename(self, **names: str) -> Shape:
        """``shape.rename(hosts="replicas")``."""
        return Shape(self.extent.renamed(names), self.ranks)

    def rank_at(self, **coordinates: int) -> int:
        """The rank (in the spawned mesh) at these coordinates."""
        return self.ranks[self.extent.position(**coordinates)]

    def to_plain(self) -> dict[str, Any]:
        """The value as a dict of plain values; ``ranks`` is None where they count up from 0."""
        all_ranks = _counting(len(self))
        whole = self.ranks is all_ranks or self.ranks == all_ranks
        return {
            "dims": list(self.extent.dims),
            "sizes": list(self.extent.sizes),
            "ranks": None if whole else list(self.ranks),
        }

    @classmethod
    def from_plain(cls, value: object) -> Shape:
        """Inverse of `to_plain`. Raises `BadPlainShape`."""
        fields = value if isinstance(value, Mapping) else {}
        dims, sizes, ranks = fields.get("dims"), fields.get("sizes"), fields.get("ranks", ())
        try:
            extent = Extent(_all_of(dims, str), _all_of(sizes, int))
            if ranks is None and len(extent) > MAX_RANKS:
                raise TypeError(f"more than {MAX_RANKS} ranks")
            return cls.whole(extent) if ranks is None else cls(extent, _all_of(ranks, int))
        except (TypeError, ConfigError) as error:
            raise BadPlainShape(
                "a shape arrived that is none",
                evidence=f"{value!r:.200} ({error.what if isinstance(error, ConfigError) else error})",
                advice="Run the same version on all nodes.",
            ) from error


@dataclass(frozen=True, slots=True, repr=False)
class ValueMesh(Generic[T_co]):
    """One value for each position of a shape, such as the answers of a call.

    Raises:
        BadExtent: There are more or fewer values than positions.
    """

    shape: Shape
    values: tuple[T_co, ...]

    def __post_init__(self) -> None:
        if len(self.values) != len(self.shape):
            raise BadExtent(
                f"{len(self.values)} values do not fill a mesh of ({self.shape.extent})",
                evidence=f"{len(self.shape)} positions",
                advice="Give each position one value.",
            )

    def at(self, **coordinates: int) -> T_co:
        """The value at these coordinates, all of which must be given. For errors see `Extent.position`."""
        return self.values[self.shape.extent.position(**coordinates)]

    @overload
    def __getitem__(self, position: int) -> T_co: ...
    @overload
    def __getitem__(self, position: slice) -> tuple[T_co, ...]: ...
    def __getitem__(self, position: int | slice) -> T_co | tuple[T_co, ...]:
        if isinstance(position, slice):
            return self.values[position]
        return self.values[_checked(position, len(self), "position", self.shape.extent)]

    def __iter__(self) -> Iterator[T_co]:
        return iter(self.values)

    def __len__(self) -> int:
        return len(self.values)

    def items(self) -> Iterator[tuple[Point, T_co]]:
        """Points and their values, in order."""
        return zip(self.shape.points(), self.values, strict=True)

    def slice(self, **selectors: Selector) -> ValueMesh[T_co]:
        """A part, as with `Shape.slice`."""
        extent, positions = self.shape.extent.select(**selectors)
        ranks = tuple(self.shape.ranks[position] for position in positions)
        return ValueMesh(Shape(extent, ranks), tuple(self.values[position] for position in positions))

    def map(self, function: Callable[[T_co], R]) -> ValueMesh[R]:
        """The same shape with ``function(value)`` at each position."""
        return ValueMesh(self.shape, tuple(function(value) for value in self.values))

    def to_dict(self) -> dict[Point, T_co]:
        """Values by point, in order."""
        return dict(self.items())

    def __repr__(self) -> str:
        shown = [
            f"{', '.join(f'{dim}={index}' for dim, index in point.items()) or 'single'}: {value!r:.80}"
            for point, value in itertools.islice(self.items(), 8)
        ]
        more = [f"... {len(self) - 8} more"] if len(self) > 8 else []
        return f"ValueMesh({self.shape.extent})[{'; '.join(shown + more)}]"


@functools.lru_cache(maxsize=32)
def _counting(size: int) -> tuple[int, ...]:
    """The ranks of whole meshes, which are large and many: a shape travels to every rank of its mesh."""
    return tuple(range(size))


def _checked(index: int, size: int, dim: str, extent: Extent) -> int:
    if not -size <= index < size:
        raise IndexOutOfRange(
            f"{dim}={index} is outside of a mesh of ({extent})",
            evidence=f"{dim} has the indices 0 to {size - 1}",
            advice="Choose an index that is there; negative ones count from the end.",
        )
    return index % size


def _all_of(values: object, kind: type[T]) -> tuple[T, ...]:
    if not isinstance(values, Sequence) or isinstance(values, str | bytes):
        raise TypeError(f"{values!r:.80} is not a list")
    for value in values:
        if not isinstance(value, kind) or isinstance(value, bool):
            raise TypeError(f"{value!r:.80} is not {kind.__name__}")
    return tuple(values)
