"""Mappings: private ones forget what was written through them, and nothing else."""

import gc
import os

import pytest

from miles_agents.store.layout import PAGE
from miles_agents.store.memory import Mapping, address_of, copy_bytes, copy_into
from miles_agents.wire.codec_tags import Gathered

PAGES = 1000


@pytest.fixture
def fd():
    fd = os.memfd_create("test")
    os.truncate(fd, PAGES * PAGE)
    yield fd
    os.close(fd)


def view(mapping):
    return memoryview(mapping.exporter(mapping.nbytes)).cast("B")


def test_what_a_private_mapping_changed_is_dropped_and_the_rest_stays(fd):
    shared, private = (Mapping(fd, PAGES * PAGE, private=kind) for kind in (False, True))
    both = view(shared), view(private)
    both[0][:] = b"s" * (PAGES * PAGE)
    for page in (0, 7, 8, 9, 500, PAGES - 1):
        both[1][page * PAGE] = ord("p")
    assert both[0][7 * PAGE] == ord("s") and both[1][7 * PAGE] == ord("p")
    assert private.drop_private_pages()
    assert bytes(both[1]) == b"s" * (PAGES * PAGE)
    both[0][8 * PAGE] = ord("n")
    assert both[1][8 * PAGE] == ord("n"), "a page is still a private copy"


def test_a_view_in_a_cycle_that_is_handed_on_by_del_is_not_gone(fd):
    kept, gone = [], []

    class HandsOn:
        def __del__(self):
            kept.append(self.view)

    mapping = Mapping(fd, PAGE, private=True)
    one = HandsOn()
    one.itself = one
    one.view = memoryview(mapping.exporter_until(PAGE, lambda: gone.append("gone"))).cast("B")[7:]
    del one
    gc.collect()
    assert len(kept) == 1 and not gone, "its memory was given back while it can be read"
    kept.clear()
    gc.collect()
    assert gone == ["gone"]


def test_a_view_in_a_cycle_that_nobody_keeps_is_gone(fd):
    gone = []
    mapping = Mapping(fd, PAGE, private=True)
    cycle = [memoryview(mapping.exporter_until(PAGE, lambda: gone.append("gone")))]
    cycle.append(cycle)
    del cycle
    gc.collect()
    assert gone == ["gone"]


def test_a_mapping_of_a_file_that_cannot_be_written_can_be(fd):
    readable = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    mapping = Mapping(readable, PAGE, private=True)
    with pytest.raises(OSError, match="Permission"):
        Mapping(readable, PAGE, private=False)
    os.close(readable)
    view(mapping)[0] = 1
    assert os.pread(fd, 1, 0) == b"\0"


def test_copying(fd):
    mapping = Mapping(fd, PAGES * PAGE, private=False, populate=True)
    found = view(mapping)
    copy_bytes(mapping.address, b"abc")
    copy_into(mapping.address + 3, memoryview(bytearray(b"def")))
    copy_into(mapping.address + 6, memoryview(b"read-only"))
    copy_into(mapping.address + 15, Gathered(3, lambda to: to.__setitem__(slice(None), b"xyz")))
    assert bytes(found[:18]) == b"abcdefread-onlyxyz"
    assert address_of(found[100:]) == mapping.address + 100
    assert address_of(Gathered(1, print)) == 0


def test_large_buffers_in_pieces():
    size = (40 << 20) + 5
    fd = os.memfd_create("large")
    os.truncate(fd, size)
    mapping = Mapping(fd, size, private=False)
    os.close(fd)
    data = os.urandom(size)
    copy_into(mapping.address, memoryview(data))
    assert bytes(view(mapping)) == data


def test_an_unmapped_one_stays_unmapped(fd):
    mapping = Mapping(fd, PAGE, private=False)
    mapping.unmap()
    mapping.unmap()
    with pytest.raises(OSError, match="mapping"):
        Mapping(fd, 0, private=False)
