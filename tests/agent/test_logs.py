"""Tails of growing files, and keeping those files small."""

import fcntl
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miles_agents.agent.logs import LogCannotShrink, LogTail, cap_file, last_lines


def append(path, data):
    with path.open("ab") as file:
        file.write(data)


def read_all(tail, max_bytes=1024):
    lines = []
    while tail.offset < tail.size():
        lines += tail.read(max_bytes)
    return lines


@pytest.fixture
def log(tmp_path):
    return tmp_path / "rank.log"


@pytest.fixture
def follow(log):
    tails = []

    def make(**options):
        tails.append(LogTail(log, **options))
        return tails[-1]

    yield make
    for tail in tails:
        tail.close()


def shown(line, limit):
    """What a terminal would show of a line, said another way than the tail does."""
    states = [state for state in line.split(b"\r") if state]
    state = states[-1] if states else b""
    text = state[:limit].replace(b"\0", b"").decode("utf-8", "replace")
    return text + (f" [cut: {len(state) - limit} more bytes]" if len(state) > limit else "")


def test_a_file_that_is_not_there_yet_has_no_lines(log, follow):
    tail = follow()
    assert tail.read() == []
    append(log, b"here\n")
    assert tail.read() == ["here"]


def test_a_line_comes_when_it_is_complete_but_is_already_among_the_last_lines(log, follow):
    tail = follow()
    append(log, b"one\ntw")
    assert tail.read() == ["one"]
    assert tail.last_lines() == ["one", "tw"]
    append(log, b"o\n")
    assert tail.read() == ["two"]
    assert tail.last_lines() == ["one", "two"]


def test_finish_returns_the_incomplete_last_line_once(log, follow):
    tail = follow()
    append(log, b"one\nSegmentation fault")
    assert tail.finish() == ["one", "Segmentation fault"]
    assert tail.finish() == tail.read() == []
    assert tail.last_lines(1) == ["Segmentation fault"]


def test_a_progress_bar_collapses_to_its_last_state(log, follow):
    tail = follow()
    append(log, b"\r 10%\r 50%")
    assert tail.read() == []
    append(log, b"\r100%\r")
    assert tail.read() == []
    append(log, b"\ndone\r\n")
    assert tail.read() == ["100%", "done"]


def test_a_line_that_is_too_long_is_cut_and_counted(log, follow):
    tail = follow(max_line_bytes=10)
    append(log, b"x" * 25 + b"\nshort\n")
    assert read_all(tail, max_bytes=7) == ["x" * 10 + " [cut: 15 more bytes]", "short"]


@settings(max_examples=200)
@given(
    data=st.binary(max_size=200).map(lambda raw: raw.replace(b"a", b"\n").replace(b"b", b"\r"))
    | st.text(alphabet="ab\n\r\0é", max_size=200).map(str.encode),
    max_bytes=st.integers(1, 64),
)
def test_lines_do_not_depend_on_how_the_file_is_read(tmp_path_factory, data, max_bytes):
    path = tmp_path_factory.mktemp("logs") / "log"
    path.write_bytes(data)
    tail = LogTail(path, max_line_bytes=8)
    lines = read_all(tail, max_bytes)
    if data and not data.endswith(b"\n"):
        assert len(tail.finish()) == 1
    tail.close()
    assert lines == [shown(line, 8) for line in data.split(b"\n")[:-1]]


def test_a_tail_that_is_far_behind_jumps_ahead_and_accounts_for_every_byte(log, follow):
    tail = follow(max_lag_bytes=1000)
    append(log, b"first\nhalf")
    assert tail.read() == ["first"]
    rest = b"".join(b"%08d\n" % number for number in range(1000))
    append(log, rest)
    lines = read_all(tail)
    half, notice, *read = lines
    assert half == "half"
    assert notice == f"[log: skipped {tail.skipped_bytes} bytes; they are in {log}]"
    assert read == rest.decode().split("\n")[-1 - len(read) : -1]
    assert 400 <= 9 * len(read) <= 500
    assert tail.skipped_bytes + 9 * len(read) == len(rest)


def test_finish_keeps_the_end_when_much_is_left(log, follow):
    tail = follow()
    append(log, b"noise\n" * 10_000 + b"ValueError: the end")
    lines = tail.finish(max_bytes=1000)
    assert lines[0].startswith("[log: skipped ")
    assert lines[-1] == "ValueError: the end"
    assert len(lines) < 200


def test_a_file_emptied_by_someone_is_read_from_its_start(log, follow):
    tail = follow()
    append(log, b"a long first line\n")
    tail.read()
    os.truncate(log, 0)
    append(log, b"new\n")
    assert tail.read() == ["[log: the file was emptied by someone else]", "new"]


def test_only_the_last_200_lines_are_kept(log, follow):
    tail = follow()
    append(log, b"".join(b"%d\n" % number for number in range(500)))
    tail.read()
    assert tail.last_lines() == [str(number) for number in range(300, 500)]
    assert tail.last_lines(2) == ["498", "499"]
    assert tail.last_lines(0) == []


def test_last_lines_of_a_file_do_not_reach_before_the_start(log):
    append(log, b"old\n")
    start = log.stat().st_size
    append(log, b"new\nnewer")
    assert last_lines(log, start=start) == ["new", "newer"]
    assert last_lines(log, 1) == ["newer"]
    assert last_lines(log, start=10_000) == last_lines(log.with_name("none")) == []


def test_a_file_under_its_cap_is_left_alone(log):
    append(log, b"x" * 100_000)
    assert cap_file(log, 1_000_000, 1000) == 0
    assert log.read_bytes() == b"x" * 100_000
    assert cap_file(log.with_name("none"), 1, 1) == 0


def test_the_middle_of_a_too_large_file_is_freed_while_its_writer_goes_on(log, follow):
    head, middle, end = b"head\n" * 2000, b"middle\n" * 200_000, b"end\n"
    with log.open("ab", buffering=0) as writer:
        writer.write(head + middle + end)
        size = log.stat().st_size
        freed = cap_file(log, max_bytes=100_000, keep_head=len(head))
        assert freed > 1_000_000
        assert log.stat().st_size == size
        assert log.stat().st_blocks * 512 <= 100_000
        writer.write(b"more\n")
    content = log.read_bytes()
    assert content.startswith(b"head\n" * 1900)
    assert b"the middle was freed here" in content[:20_000]
    assert content.endswith(b"middle\nend\nmore\n")
    assert cap_file(log, max_bytes=100_000, keep_head=len(head)) == 0


def test_a_tail_steps_over_a_freed_middle(log, follow):
    tail = follow()
    append(log, b"head\n" * 2000 + b"middle\n" * 200_000 + b"end\n")
    tail.read(1000)
    cap_file(log, max_bytes=100_000, keep_head=10_000)
    lines = read_all(tail, 4096)
    notices = [line for line in lines if "were freed to keep the size limit" in line]
    assert len(notices) == 1
    assert lines[-2:] == ["middle", "end"]
    assert 1_200_000 < tail.skipped_bytes < 1_410_000
    assert not any("\0" in line for line in lines)


def test_a_file_that_cannot_be_shrunk_is_said_to_be_so():
    fd = os.memfd_create("log", os.MFD_ALLOW_SEALING)
    try:
        os.write(fd, b"x" * 100_000)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
        with pytest.raises(LogCannotShrink, match="cannot be shrunk") as caught:
            cap_file(Path(f"/proc/self/fd/{fd}"), 10_000, 4096)
        assert "fallocate" in caught.value.evidence
    finally:
        os.close(fd)
