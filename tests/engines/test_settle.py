"""Names of shared memory that SGLang leaves: removed where nobody needs them, and nobody else's."""

import mmap
import os
from contextlib import contextmanager

import pytest

from miles.backends.sglang_utils.settle import SHARED_MEMORY, forget_names, forget_stale, mapped_inodes


@contextmanager
def shared(name):
    """A name with a page of memory; gone at the end."""
    path = SHARED_MEMORY / f"{name}_{os.getpid()}"
    path.write_bytes(bytes(4096))
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


@contextmanager
def mapped(path):
    """It is mapped by this process."""
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 4096) as memory:
        yield memory


@pytest.mark.parametrize("name", ["sglang_loads_test", "sgl_shm_mq_test", "sem.mp-test"])
def test_a_name_that_is_mapped_by_a_process_can_go_and_the_memory_stays(name):
    with shared(name) as path, mapped(path) as memory:
        assert (path.stat().st_dev, path.stat().st_ino) in mapped_inodes(os.getpid())
        assert path.name in forget_names([os.getpid()]) and not path.exists()
        memory[0] = 7
        assert memory[0] == 7


def test_names_of_others_and_other_names_stay():
    with shared("sglang_loads_test") as unmapped, shared("another_test") as other, mapped(other):
        forget_names([os.getpid()])
        assert unmapped.exists() and other.exists()


def test_a_name_that_no_process_has_mapped_is_stale():
    with shared("sglang_loads_test") as left, shared("sgl_shm_mq_test") as used, mapped(used):
        found = forget_stale()
        assert left.name in found and not left.exists()
        assert used.exists()


def test_a_process_that_is_gone_has_nothing_mapped():
    assert mapped_inodes(2**22 + 1) == set()
