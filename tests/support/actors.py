"""Actors that misbehave on request, for tests with real workers. Loaded in workers as ``support.actors``."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from miles_agents import Actor, endpoint
from support.process_cases import EVADER


class RefusedToLive(ValueError):
    """What a constructor raises here."""


class Victim(Actor):
    """Does whatever a test wants to see survived. ``mode``: how the constructor behaves."""

    def __init__(self, mode: str = "fine", path: str = "") -> None:
        self.seen: list[int] = []
        self.taken: list[int] = []
        self.released = threading.Event()
        if mode == "raise":
            raise RefusedToLive(f"no life without {path or 'a reason'}")
        if mode == "exit":
            sys.stderr.write("the constructor gives up\n")
            os._exit(3)
        if mode == "evader":
            self.leave_evaders(path)

    @endpoint(thread="io")
    def pid(self) -> int:
        """Answers while the main thread is busy."""
        return os.getpid()

    @endpoint
    def echo(self, value: object) -> object:
        """What came, on the main thread."""
        return value

    @endpoint
    def say(self, text: str) -> None:
        """Into the log."""
        sys.stdout.write(text + "\n")

    @endpoint
    def hang(self, started: str = "") -> None:
        """Never returns; touches the file ``started`` before."""
        if started:
            Path(started).touch()
        threading.Event().wait()

    @endpoint
    async def hang_async(self) -> None:
        """Never returns either, on the async thread."""
        await asyncio.get_running_loop().create_future()

    @endpoint(thread="io")
    async def hang_io(self) -> None:
        """Nor this one, on the I/O loop."""
        await asyncio.get_running_loop().create_future()

    @endpoint
    def join_collective(self, fifo: str) -> None:
        """Blocks in a system call until somebody opens the other end, like a rank in a collective."""
        with open(fifo, "rb"):
            pass

    @endpoint
    def leave(self, code: int) -> None:
        """Ends the process behind everybody's back."""
        os._exit(code)

    @endpoint
    def crash(self) -> None:
        """Segmentation fault."""
        sys.stderr.write("about to crash\n")
        ctypes.string_at(0)

    @endpoint
    def fail(self, text: str) -> None:
        """Raises a type that only some callers know."""
        raise RefusedToLive(text)

    @endpoint
    def untransportable(self) -> object:
        """Returns something that has no form on the wire."""
        return {"metrics": [1.0, threading.Lock()]}

    @endpoint
    def hold_interpreter(self, seconds: int) -> str:
        """Sits in C without giving up the interpreter lock."""
        ctypes.PyDLL(None).sleep(ctypes.c_uint(seconds))
        return "held"

    @endpoint
    def exhaust_descriptors(self) -> int:
        """Opens files until there are no more, and keeps them."""
        self.files: list[int] = []
        try:
            while True:
                self.files.append(os.open(os.devnull, os.O_RDONLY))
        except OSError:
            return len(self.files)

    @endpoint
    def free_descriptors(self) -> None:
        """Closes them again."""
        while self.files:
            os.close(self.files.pop())

    @endpoint
    def flood(self, num_lines: int) -> None:
        """Writes much and fast to stdout."""
        block = "".join(f"flood {number:07d} {'x' * 80}\n" for number in range(1000))
        for _ in range(num_lines // 1000):
            sys.stdout.write(block)

    @endpoint
    def wait_for_release(self) -> None:
        """Keeps the main thread until ``release``."""
        self.released.wait()

    @endpoint(thread="io")
    def release(self) -> None:
        """Lets it go on."""
        self.released.set()

    @endpoint
    def take(self, number: int, padding: bytes = b"") -> None:
        """Remembers the order."""
        self.taken.append(number)

    @endpoint
    def taken_numbers(self) -> list[int]:
        """In the order in which they came."""
        return self.taken

    @endpoint
    def note(self, path: str, text: str) -> int:
        """Appends a line to a file: executions can be counted from outside, over lives."""
        with open(path, "a", encoding="utf-8") as file:
            file.write(text + "\n")
        return os.getpid()

    @endpoint
    def items(self, count: int) -> Iterator[int]:
        """A generator."""
        yield from range(count)

    @endpoint
    def leave_evaders(self, path: str) -> None:
        """Starts a child, and below it processes that leave session, title and environment behind."""
        subprocess.Popen([sys.executable, "-I", "-S", "-c", EVADER, path])

    @endpoint
    def leave_child_with_stdout(self, path: str) -> None:
        """A child that ignores TERM and holds stdout and stderr open."""
        code = (
            "import os, signal, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN); os.setsid(); "
            "tail = open('/proc/self/stat').read().rpartition(')')[2].split(); "
            "open(sys.argv[1], 'a').write(f'child {os.getpid()} {tail[19]}\\n'); signal.pause()"
        )
        subprocess.Popen([sys.executable, "-I", "-S", "-c", code, path])

    @endpoint(thread="io")
    def stop_self(self) -> None:
        """SIGSTOP, from inside: everything before it was sent."""
        os.kill(os.getpid(), signal.SIGSTOP)


class Caller(Actor):
    """Calls other actors, so that callers are workers too."""

    @endpoint
    def call_victim(self, victim: object, method: str, *args: object) -> object:
        """Blocks its main thread with a call."""
        return victim.endpoint(method).call_one(*args).get()  # type: ignore[attr-defined]
