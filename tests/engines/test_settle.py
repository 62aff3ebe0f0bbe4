"""Names of shared memory that SGLang leaves: removed where nobody needs them, and nobody else's.

Other processes look for stale names at the same time: a name that shall stay is mapped before it gets its name.
"""

import mmap
import os
import subprocess
import sys
from contextlib import contextmanager

import pytest

from miles.backends.sglang_utils.settle import SHARED_MEMORY, forget_names, forget_stale, mapped_inodes

HOLD = """
import mmap, sys
with open(sys.argv[1], "r+b") as file, mmap.mmap(file.fileno(), 4096):
    print("mapped", flush=True)
    sys.stdin.read()
"""


@contextmanager
def page(name):
    """A name with a page of memory; gone at the end."""
    path = SHARED_MEMORY / f"{name}_{os.getpid()}"
    path.write_bytes(bytes(4096))
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


@contextmanager
def named(made, name):
    """The same memory under a name of SGLang's."""
    path = made.rename(SHARED_MEMORY / f"{name}_{os.getpid()}")
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


@contextmanager
def mapped(name):
    """A name that this process has mapped, and its memory."""
    with page("miles_own_test") as made, made.open("r+b") as file, mmap.mmap(file.fileno(), 4096) as memory:  # noqa: SIM117
        with named(made, name) as path:  # only now
            yield path, memory


@contextmanager
def mapped_by_another(name):
    """A name that another process has mapped."""
    with page("miles_other_test") as made:
        command = [sys.executable, "-c", HOLD, str(made)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdout.readline() == b"mapped\n"
            with named(made, name) as path:
                yield path
            process.stdin.close()


@pytest.mark.parametrize("name", ["sglang_loads_test", "sgl_shm_mq_test", "sem.mp-test"])
def test_a_name_that_is_mapped_by_a_process_can_go_and_the_memory_stays(name):
    with mapped(name) as (path, memory):
        assert (path.stat().st_dev, path.stat().st_ino) in mapped_inodes(os.getpid())
        assert path.name in forget_names([os.getpid()]) and not path.exists()
        memory[0] = 7
        assert memory[0] == 7


def test_names_of_others_and_other_names_stay():
    with mapped_by_another("sglang_loads_test") as foreign, mapped("another_test") as (other, _):
        forget_names([os.getpid()])
        assert foreign.exists() and other.exists()


def test_a_name_that_no_process_has_mapped_is_stale():
    with page("sglang_loads_test") as left, mapped("sgl_shm_mq_test") as (used, _):
        forget_stale()  # another process may have found it first
        assert not left.exists()
        assert used.exists()


def test_a_process_that_is_gone_has_nothing_mapped():
    assert mapped_inodes(2**22 + 1) == set()
