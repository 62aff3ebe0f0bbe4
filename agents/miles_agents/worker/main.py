"""The worker process: an I/O thread for the runtime, the main thread for the actor, an async thread if it needs one.

The main thread waits on a queue without a deadline: whatever ends the worker ends the process.
"""

from __future__ import annotations

import asyncio
import faulthandler
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable
from typing import NoReturn

import uvloop

from miles_agents.rpc.context import enter_process
from miles_agents.wire.unix_transport import UnixDialer
from miles_agents.worker.own_process import name_process, set_up_logging, with_entries
from miles_agents.worker.runtime import WorkerRuntime
from miles_agents.worker.spec import SPEC_FD_VARIABLE, Birth

EXIT_FENCED = 70
STACK_SIGNAL = signal.SIGRTMIN + 3
"""Prints all stacks to stderr, also while a thread holds the interpreter lock."""


class ThreadExecutors:
    """The main thread's queue, and the async thread on first use."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._async_loop: asyncio.AbstractEventLoop | None = None

    def submit_main(self, job: Callable[[], None]) -> None:
        """Run on the main thread, after everything submitted before."""
        self._jobs.put(job)

    def async_loop(self) -> asyncio.AbstractEventLoop:
        """The loop of the async thread. Called on the I/O thread only."""
        if self._async_loop is None:
            self._async_loop = uvloop.new_event_loop()
            threading.Thread(target=self._run_async_loop, name="async", daemon=True).start()
        return self._async_loop

    def run_main(self) -> NoReturn:
        """Run jobs on this thread for ever. KeyboardInterrupt reaches the job that it hits."""
        while True:
            job = self._jobs.get()
            job()
            del job  # a request's arguments may be large; do not keep them until the next one comes

    def _run_async_loop(self) -> None:
        loop = self._async_loop
        assert loop is not None
        asyncio.set_event_loop(loop)
        loop.run_forever()


def main() -> NoReturn:
    """Entry point of ``python -m miles_agents.worker``."""
    with os.fdopen(int(os.environ.pop(SPEC_FD_VARIABLE)), "rb") as file:
        packed = file.read()
    run(packed)


def run(packed: bytes) -> NoReturn:
    """Be the worker of this packed ``Birth``. In a fresh process: executed, or forked by a zygote."""
    birth = Birth.unpack(packed)
    name_process(birth.spec.label)
    set_up_logging()
    faulthandler.enable()
    faulthandler.register(STACK_SIGNAL, all_threads=True, chain=False)
    sys.setswitchinterval(0.001)  # a busy main thread must not keep the I/O thread waiting for 5 ms at a time
    sys.path[:] = with_entries(sys.path, birth.spec.sys_path)
    executors = ThreadExecutors()
    ready: queue.SimpleQueue[WorkerRuntime | BaseException] = queue.SimpleQueue()
    threading.Thread(target=_run_io, args=(birth, executors, ready), name="io", daemon=True).start()
    runtime = ready.get()
    if isinstance(runtime, BaseException):
        raise runtime
    enter_process(runtime.context)
    executors.run_main()


def _run_io(birth: Birth, executors: ThreadExecutors, ready: queue.SimpleQueue[WorkerRuntime | BaseException]) -> None:
    async def serve() -> None:
        try:
            runtime = WorkerRuntime(birth, executors, _leave)
            runtime.start(lambda link: UnixDialer(birth.agent_address, link))
        except BaseException as error:  # handed to the main thread, which raises it
            ready.put(error)
            raise
        ready.put(runtime)
        await asyncio.get_running_loop().create_future()  # until the process ends

    uvloop.run(serve())


def _leave(reason: str) -> NoReturn:
    """End now. The main thread may sit in a collective and can neither be asked nor interrupted."""
    sys.stderr.write(f"worker leaves: {reason}\n")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code_for(reason))


def exit_code_for(reason: str) -> int:
    """What a worker exits with that leaves for this reason."""
    orderly = not reason.startswith("fenced") and not reason.startswith("the agent refuses")
    return 0 if orderly else EXIT_FENCED
