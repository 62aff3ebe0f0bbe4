"""The warm process of ``support.ranks``: imports once, then forks ranks on request. It never computes anything."""

from __future__ import annotations

import ctypes
import faulthandler
import importlib
import importlib.util
import os
import pickle
import select
import shutil
import signal
import socket
import struct
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PRELOAD = (
    "pytest",
    "torch",
    "torch.distributed",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "miles.backends.megatron_utils.preload",
    "safetensors.torch",
)
"""Imported before the first fork, those that there are."""
LOG_TAIL = 4000
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Request:
    world_size: int
    module: str
    source: str
    qualname: str
    args: bytes
    timeout_s: float
    distributed: bool


@dataclass(frozen=True)
class Answer:
    """Pickled results by rank, or the text of the failure."""

    results: list[bytes] = field(default_factory=list)
    failure: str = ""


def send(connection: socket.socket, value: Any) -> None:
    body = pickle.dumps(value)
    connection.sendall(struct.pack("<Q", len(body)) + body)


def receive(connection: socket.socket) -> Any:
    (size,) = struct.unpack("<Q", _exactly(connection, 8))
    return pickle.loads(_exactly(connection, size))


def _exactly(connection: socket.socket, size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        part = connection.recv(min(size - len(parts), 1 << 20))
        if not part:
            raise EOFError("the other side is gone")
        parts += part
    return bytes(parts)


def main(descriptor: int) -> None:
    connection = socket.socket(fileno=descriptor)
    for name in PRELOAD:
        importlib.import_module(name)
    _preload_transformers()
    threads = len(os.listdir("/proc/self/task"))
    assert threads == 1, f"{threads} threads after the imports: a fork would break them"
    send(connection, "ready")
    while True:
        try:
            request = receive(connection)
        except EOFError:
            # Taking so many imports down takes seconds.
            os._exit(0)
        send(connection, _run(request))


def _preload_transformers() -> None:
    """The reference models, whose import takes seconds."""
    for family in ("qwen2", "qwen3", "llama"):
        importlib.import_module(f"transformers.models.{family}.modeling_{family}")


def _run(request: Request) -> Answer:
    directory = Path(tempfile.mkdtemp(prefix="ranks-"))
    ranks: dict[int, int] = {}
    try:
        for rank in range(request.world_size):
            pid = os.fork()
            if pid == 0:
                _be_rank(request, rank, directory)
            ranks[pid] = rank
        return _collect(request, ranks, directory)
    finally:
        for pid in ranks:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        shutil.rmtree(directory, ignore_errors=True)


def _collect(request: Request, ranks: dict[int, int], directory: Path) -> Answer:
    """Wait for all ranks, or for the first failure. Takes those that have ended out of ``ranks``."""
    deadline = time.monotonic() + request.timeout_s
    pidfds = {os.pidfd_open(pid): pid for pid in ranks}
    try:
        while pidfds:
            ready, _, _ = select.select(list(pidfds), [], [], max(deadline - time.monotonic(), 0))
            if not ready:
                return Answer(failure=_stacks(ranks, directory, request.timeout_s))
            for pidfd in ready:
                pid = pidfds.pop(pidfd)
                os.close(pidfd)
                status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                rank = ranks.pop(pid)
                if status != 0:
                    return Answer(failure=_told(rank, status, directory))
    finally:
        for pidfd in pidfds:
            os.close(pidfd)
    return Answer([(directory / f"result-{rank}").read_bytes() for rank in range(request.world_size)])


def _told(rank: int, status: int, directory: Path) -> str:
    failure = directory / f"failure-{rank}"
    text = failure.read_text() if failure.exists() else ""
    return f"rank {rank} ended with {status}\n{text}\n{_tail(rank, directory)}"


def _stacks(ranks: dict[int, int], directory: Path, timeout_s: float) -> str:
    for pid in ranks:
        os.kill(pid, signal.SIGUSR1)
    time.sleep(0.5)
    tails = "\n".join(_tail(rank, directory) for rank in ranks.values())
    return f"ranks {sorted(ranks.values())} did not end within {timeout_s} s\n{tails}"


def _tail(rank: int, directory: Path) -> str:
    path = directory / f"log-{rank}"
    text = path.read_text(errors="replace")[-LOG_TAIL:] if path.exists() else ""
    return f"rank {rank} wrote:\n{text}" if text else ""


def _be_rank(request: Request, rank: int, directory: Path) -> None:
    """In the forked process; does not return."""
    status = 1
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        log = os.open(directory / f"log-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        for descriptor in (1, 2):
            os.dup2(log, descriptor)
        faulthandler.enable()
        faulthandler.register(signal.SIGUSR1, all_threads=True)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(request.world_size)}
        result = _call(request, rank, directory)
        (directory / f"result-{rank}").write_bytes(pickle.dumps(result))
        status = 0
    except BaseException:
        (directory / f"failure-{rank}").write_text(traceback.format_exc())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # Not `sys.exit`: what the warm process registered for its own end is not the rank's to do.
        os._exit(status)


def _call(request: Request, rank: int, directory: Path) -> Any:
    import torch.distributed as dist

    if request.distributed:
        store = dist.FileStore(str(directory / "store"), request.world_size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=request.world_size)
    function: Any = _module(request)
    for name in request.qualname.split("."):
        function = getattr(function, name)
    result = function(*pickle.loads(request.args))
    if request.distributed and dist.is_initialized():
        # A rank that leaves early breaks the collectives that its peers are still in.
        dist.barrier()
    return result


def _module(request: Request) -> Any:
    """The test's module, under the name it has in the test process, so that its classes can be pickled."""
    if request.module in sys.modules:
        return sys.modules[request.module]
    spec = importlib.util.spec_from_file_location(request.module, request.source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[request.module] = module
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    # Not `main` itself: requests name classes of `support.warm_ranks`, not of `__main__`.
    importlib.import_module("support.warm_ranks").main(int(sys.argv[1]))
