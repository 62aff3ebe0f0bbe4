"""Where objects lie in a segment, and what is refused that nobody put there."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles_agents.store.errors import DamagedObject
from miles_agents.store.layout import PAGE, plan, read

LARGE = 1 << 18


def written(body, buffers, addresses=None):
    """A part with that content."""
    found = plan(len(body), [(len(b), a) for b, a in zip(buffers, addresses or [0] * len(buffers), strict=True)])
    part = bytearray(found.nbytes)
    part[: len(found.head)] = found.head
    part[found.body : found.body + len(body)] = body
    for offset, buffer in zip(found.buffers, buffers, strict=True):
        part[offset : offset + len(buffer)] = buffer
    return part, found


@given(st.binary(max_size=300), st.lists(st.tuples(st.binary(max_size=300), st.integers(0, 2**48)), max_size=6))
def test_what_was_written_is_read(body, pieces):
    part, _ = written(body, [data for data, _ in pieces], [address for _, address in pieces])
    found, buffers = read(memoryview(part))
    assert bytes(found) == body and [bytes(b) for b in buffers] == [data for data, _ in pieces]


@given(st.integers(0, 5000), st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 2**48)), max_size=6))
def test_buffers_are_aligned_apart_and_large_ones_copy_fast(body_bytes, pieces):
    found = plan(body_bytes, pieces)
    end = found.body + body_bytes
    for offset, (size, address) in zip(found.buffers, pieces, strict=True):
        assert offset >= end and offset % 64 == 0 and offset - end < 64 + PAGE
        if size >= LARGE:
            assert 0 <= (address - offset) % PAGE < 64
        end = offset + size
    assert found.nbytes == end


def test_what_is_no_object_is_refused():
    part, found = written(b"body", [b"x" * 100])
    for start, wrong in ((0, b"y"), (8, b"\xff" * 8), (16, b"\xff" * 8), (24, b"\0" * 8), (32, b"\xff" * 4)):
        damaged = bytearray(part)
        damaged[start : start + len(wrong)] = wrong
        with pytest.raises(DamagedObject):
            read(memoryview(damaged))
    for size in (0, 10, 30, found.nbytes - 1):
        with pytest.raises(DamagedObject):
            read(memoryview(part)[:size])
