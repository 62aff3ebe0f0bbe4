"""Parts of the zygote that need no zygote: what it refuses to share, and how long the one in between stays."""

from __future__ import annotations

import mmap
import os
import select
import socket
import subprocess
import sys
import threading

import pytest

from miles_agents.worker.zygote import wait_for_leave
from miles_agents.worker.zygote_safety import Holdings, why_unsafe
from miles_agents.worker.zygote_talk import LEAVE

WAIT_S = 10.0


def refusal(text: str, folder) -> str:
    """Of a fresh process whose imports are ``text``."""
    code = f"""
import os, sys
from miles_agents.worker.zygote_safety import Holdings, why_unsafe
before = Holdings.now()
{text}
print(why_unsafe(before))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


OPENED = {
    "socket": ("import socket; kept = socket.socketpair()", "socket:["),
    "pipe": ("kept = os.pipe()", "pipe:["),
    "epoll": ("import select; kept = select.epoll()", "anon_inode:[eventpoll]"),
    "eventfd": ("kept = os.eventfd(0)", "anon_inode:[eventfd]"),
    "file": ("kept = open('mine.log', 'a')", "mine.log"),
    "shared mapping": ("import mmap; kept = mmap.mmap(-1, 4096)", "writable shared mapping"),
    "mapped file": (
        "import mmap; open('mine', 'wb').write(b'x' * 4096); file = open('mine', 'r+b'); "
        "kept = mmap.mmap(file.fileno(), 4096); file.close()",
        "mine",
    ),
}


@pytest.mark.parametrize("name", OPENED)
def test_what_workers_would_share_is_refused_by_name(tmp_path, name):
    text, named = OPENED[name]
    assert named in refusal(text, tmp_path)


def test_what_is_only_read_or_has_no_state_is_let_pass(tmp_path):
    (tmp_path / "data").write_text("x")
    text = "kept = [open('data'), open('/dev/null', 'w'), open('/dev/urandom', 'rb'), os.open('.', os.O_RDONLY)]"
    assert refusal(text, tmp_path) == ""


def test_what_was_there_before_the_imports_is_no_fault_of_theirs():
    left, right = socket.socketpair()
    shared = mmap.mmap(-1, mmap.PAGESIZE)
    with left, right, shared:
        assert "socket" not in why_unsafe(Holdings.now()) and "mapping" not in why_unsafe(Holdings.now())


def test_a_worker_that_died_ends_its_line_at_once_and_the_others_are_waited_for():
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead_fd, alive_fd = os.pidfd_open(dead.pid), os.pidfd_open(os.getpid())
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    other, others = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs, other, others:
        midwife = threading.Thread(target=wait_for_leave, args=([(theirs, dead_fd), (others, alive_fd)],))
        midwife.start()
        ours.settimeout(WAIT_S)
        assert ours.recv(1) == b""
        assert midwife.is_alive() and not select.select([other], [], [], 0)[0]
        other.send(LEAVE)
        midwife.join(WAIT_S)
        assert not midwife.is_alive()
    dead.wait()
    os.close(dead_fd)
    os.close(alive_fd)
