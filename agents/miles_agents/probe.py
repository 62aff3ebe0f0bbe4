"""What a host is like: a small server of questions, for a host that may have nothing of ours installed.

Standard library only, so that its source can be sent to any Python and run from stdin (``ssh host python3 -c BOOT``);
an agent answers the same questions with the same code. One question is one line of JSON (``{"do": "facts", ...}``), and
so is its answer, behind a mark, because login scripts write to stdout, too. The end of stdin ends it.

Invariants: nothing is changed on the host but files that the asker names, which it removes itself; each question ends
within its own deadline; a part that cannot be found out is a line in ``faults`` and hinders no other part.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import pwd
import resource
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

MARK = "miles-probe:"
"""What an answer's line begins with."""

_LOAD = (
    "import sys; f = sys.stdin.buffer; n = int(f.readline()); "
    "exec(compile(f.read(n), 'probe', 'exec'), {'__name__': '__main__'})"
)
BOOT = (
    f"import json, os, sys; L = {_LOAD!r}; E = json.loads(os.fdopen(0, 'rb', 0, closefd=False).readline()); "
    "E and os.execve(sys.executable, [sys.executable, '-u', '-c', L], dict(os.environ, **E)); exec(L)"
)
"""Program that reads variables from stdin, a line of JSON, and starts anew with them if there are any (some say where
Python looks for code); then the length of this file, a line, then the file, and becomes it. Variables may be secret:
no command line has them, which others on the machine can read."""

_ENV_PREFIXES = ("NCCL_", "GLOO_", "CUDA_", "UCX_")
_SIOCGIFCONF = 0x8912
_CONNECT_S = 5.0
_MAX_TEXT = 200


class Probe:
    """Answers questions; holds the listeners that it was asked to open."""

    def __init__(self) -> None:
        self._listeners: list[socket.socket] = []

    def answer(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to one question; ``{"error": ...}`` where there is none."""
        do: dict[str, Callable[..., dict[str, Any]]] = {
            "facts": facts,
            "clock": lambda: {"now": time.time()},
            "write": write_file,
            "read": read_file,
            "remove": remove_file,
            "listen": self.listen,
            "connect": connect,
            "close": self.close,
        }
        wanted = {name: value for name, value in question.items() if name != "do"}
        try:
            return do[question["do"]](**wanted)
        except Exception as error:  # noqa: BLE001 - boundary: whatever fails here is an answer
            return {"error": f"{type(error).__name__}: {error}"[:_MAX_TEXT]}

    def listen(self, address: str, token: str) -> dict[str, Any]:
        """A port at ``address`` that tells the token to whoever connects, until `close`."""
        listener = socket.create_server((address, 0), family=_family(address), backlog=128)
        self._listeners.append(listener)
        threading.Thread(target=_tell, args=(listener, token.encode() + b"\n"), daemon=True).start()
        return {"port": listener.getsockname()[1]}

    def close(self) -> dict[str, Any]:
        """Listen no more."""
        for listener in self._listeners:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
            listener.close()
        self._listeners.clear()
        return {}


def _tell(listener: socket.socket, text: bytes) -> None:
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        with connection, contextlib.suppress(OSError):
            connection.settimeout(_CONNECT_S)
            connection.sendall(text)


def connect(peers: list[dict[str, Any]], each_s: float = _CONNECT_S) -> dict[str, Any]:
    """Connect to each of the peers, all at once: ``{name: ""}`` where the right one answered, else the reason."""
    found: dict[str, str] = {}
    threads = [threading.Thread(target=_connect, args=(peer, each_s, found), daemon=True) for peer in peers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * each_s + 1)
    return {"peers": {peer["name"]: found.get(peer["name"], "no answer in time") for peer in peers}}


def _connect(peer: Mapping[str, Any], timeout_s: float, found: dict[str, str]) -> None:
    try:
        with socket.create_connection((peer["address"], peer["port"]), timeout=timeout_s) as connection:
            if "token" not in peer:
                found[peer["name"]] = ""
                return
            told = connection.recv(100).decode(errors="replace").strip()
    except OSError as error:
        found[peer["name"]] = str(error) or type(error).__name__
        return
    found[peer["name"]] = "" if told == peer["token"] else "another program answers at this address and port"


def write_file(path: str, text: str) -> dict[str, Any]:
    """Write a new small file into a directory that is there."""
    with open(path, "x", encoding="utf-8") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    return {}


def read_file(path: str, patience_s: float = 3.0) -> dict[str, Any]:
    """The text of a small file; waits a little for file systems that show others' files late."""
    deadline = time.monotonic() + patience_s
    while True:
        try:
            os.listdir(Path(path).parent)  # makes NFS ask its server again
            return {"text": Path(path).read_text(encoding="utf-8")[:_MAX_TEXT]}
        except FileNotFoundError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def remove_file(path: str) -> dict[str, Any]:
    """Remove what `write_file` wrote."""
    Path(path).unlink(missing_ok=True)
    return {}


def facts(
    paths: Mapping[str, str] | None = None,
    packages: list[str] | None = None,
    ports: list[int] | None = None,
    peer: str = "",
    path: list[str] | None = None,
    *,
    gpus: bool = True,
    code: bool = True,
) -> dict[str, Any]:
    """What this host is like, all plain values. ``docs/clusters.md`` has what is made of it.

    Args:
        paths: Directories or files by label, to look at.
        packages: Distributions whose versions are asked for.
        ports: TCP ports that have to be free.
        peer: An address of another host; the answer tells by which of its own addresses this host would reach it.
        path: Where our code may lie, besides where this Python looks.
        gpus, code: Whether to ask the GPU driver, and to hash our code.
    """
    found: dict[str, Any] = {"faults": {}}
    sys.path += [entry for entry in path or () if entry not in sys.path and os.path.isdir(entry)]
    parts: dict[str, Callable[[], Any]] = {
        "host": _host,
        "packages": lambda: {name: _version(name) for name in packages or ()},
        "paths": lambda: {label: _path(path) for label, path in (paths or {}).items()},
        "ports": lambda: {str(port): _port_is_free(port) for port in ports or ()},
        "interfaces": interfaces,
        "reaches_by": lambda: _own_address(peer) if peer else "",
        "limits": _limits,
        "cgroup": _cgroup,
        "env": lambda: {name: value for name, value in os.environ.items() if name.startswith(_ENV_PREFIXES)},
        "rdma": lambda: sorted(os.listdir("/sys/class/infiniband")) if Path("/sys/class/infiniband").exists() else [],
        **({"code": code_hash} if code else {}),
        **({"gpus": _gpus} if gpus else {}),
    }
    for name, look in parts.items():
        try:
            found[name] = look()
        except Exception as error:  # noqa: BLE001 - boundary: one part that fails is a fact, too
            found["faults"][name] = f"{type(error).__name__}: {error}"[:_MAX_TEXT]
    return found


def _host() -> dict[str, Any]:
    try:
        user = pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        user = str(os.geteuid())
    return {
        "hostname": socket.gethostname(),
        "user": user,
        "uid": os.geteuid(),
        "python": platform.python_version(),
        "executable": sys.executable,
        "platform": f"{platform.system()}-{platform.release()} {platform.machine()}",
    }


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def code_hash(packages: tuple[str, ...] = ("miles_agents", "miles_controller", "miles_launcher", "miles")) -> str:
    """Short hash over all Python files of our packages, as this interpreter would import them; empty without them."""
    digest = hashlib.sha256()
    for name in packages:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.submodule_search_locations is None:
            return ""
        for root in spec.submodule_search_locations:
            for file in sorted(Path(root).rglob("*.py")):
                digest.update(f"{name}/{file.relative_to(root)}\0".encode())
                digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _path(text: str) -> dict[str, Any]:
    path = Path(text).expanduser()
    there = path
    while not there.exists() and there != there.parent:
        there = there.parent
    space = os.statvfs(there)
    return {
        "path": str(path),
        "exists": path.exists(),
        "nearest": str(there if there.is_dir() else there.parent),
        "content": _content(path),
        "writable": os.access(there, os.W_OK),
        "free_bytes": space.f_bavail * space.f_frsize,
        "free_inodes": space.f_favail if space.f_files else -1,
    }


def _content(path: Path) -> str:
    """What tells two copies apart at a glance: names and sizes of what lies in a directory, the size of a file."""
    if path.is_file():
        return f"{path.stat().st_size} bytes"
    if not path.is_dir():
        return ""
    with os.scandir(path) as entries:
        sizes = sorted((entry.name, entry.stat().st_size if entry.is_file() else -1) for entry in entries)
    return f"{len(sizes)} entries, {hashlib.sha256(repr(sizes).encode()).hexdigest()[:8]}"


def _port_is_free(port: int) -> bool:
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind(("", port))
        except OSError:
            return False
        return True


def interfaces() -> dict[str, list[str]]:
    """Addresses of each interface that is up, the system's order kept; v4 by ioctl, v6 from ``/proc``."""
    found: dict[str, list[str]] = {}
    size = 40 * 256
    buffer = bytearray(size)
    holder = (struct.pack("iL", size, _address_of(buffer)),)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        filled = struct.unpack("iL", fcntl.ioctl(any_socket.fileno(), _SIOCGIFCONF, holder[0]))[0]
    for start in range(0, filled, 40):  # struct ifreq: 16 bytes of name, then a sockaddr_in
        name = bytes(buffer[start : start + 16]).split(b"\0", 1)[0].decode().partition(":")[0]
        found.setdefault(name, []).append(socket.inet_ntoa(bytes(buffer[start + 20 : start + 24])))
    with contextlib.suppress(OSError):
        for line in Path("/proc/net/if_inet6").read_text().splitlines():
            address, _, _, _, _, name = line.split()
            found.setdefault(name, []).append(socket.inet_ntop(socket.AF_INET6, bytes.fromhex(address)))
    return found


def _address_of(buffer: bytearray) -> int:
    import ctypes

    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


def _own_address(peer: str) -> str:
    """No packet leaves: the kernel only looks up its route."""
    with socket.socket(_family(peer), socket.SOCK_DGRAM) as route:
        route.connect((peer, 9))
        return str(route.getsockname()[0])


def _family(address: str) -> int:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _limits() -> dict[str, list[int]]:
    """Soft and hard; -1: none."""
    kinds = {"nofile": resource.RLIMIT_NOFILE, "memlock": resource.RLIMIT_MEMLOCK, "nproc": resource.RLIMIT_NPROC}
    return {name: list(resource.getrlimit(kind)) for name, kind in kinds.items()}


def _cgroup() -> dict[str, int]:
    """Memory and cores: the machine's, and what is left of them; -1: no limit."""
    memory = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    limits = [_number(Path("/sys/fs/cgroup") / name) for name in ("memory.max", "memory/memory.limit_in_bytes")]
    real = [limit for limit in limits if 0 < limit < 1 << 60]
    return {
        "memory_bytes": int(memory["MemTotal"].split()[0]) * 1024,
        "available_bytes": int(memory["MemAvailable"].split()[0]) * 1024,
        "limit_bytes": min(real, default=-1),
        "cores": len(os.sched_getaffinity(0)),
    }


def _number(path: Path) -> int:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return -1


def _gpus() -> dict[str, Any]:
    """By NVML, which is let go of again. Without a driver: none."""
    try:
        import pynvml
    except ImportError:
        has_driver = Path("/proc/driver/nvidia/version").exists()
        if has_driver:
            raise
        return {"driver": "", "gpus": []}
    try:
        pynvml.nvmlInit()
    except (pynvml.NVMLError_LibraryNotFound, pynvml.NVMLError_DriverNotLoaded):
        return {"driver": "", "gpus": []}
    try:
        driver = pynvml.nvmlSystemGetDriverVersion()
        gpus = [_gpu(pynvml, index) for index in range(pynvml.nvmlDeviceGetCount())]
    finally:
        pynvml.nvmlShutdown()
    return {"driver": driver.decode() if isinstance(driver, bytes) else str(driver), "gpus": gpus}


def _gpu(nvml: Any, index: int) -> dict[str, Any]:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    try:
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        total, free = int(memory.total), int(memory.free)
    except nvml.NVMLError:  # a GPU that shares the host's memory does not say
        total = free = 0
    try:
        running = nvml.nvmlDeviceGetComputeRunningProcesses(handle)
    except nvml.NVMLError:
        running = []
    name, uuid = nvml.nvmlDeviceGetName(handle), nvml.nvmlDeviceGetUUID(handle)
    return {
        "index": index,
        "uuid": uuid.decode() if isinstance(uuid, bytes) else str(uuid),
        "name": name.decode() if isinstance(name, bytes) else str(name),
        "total_bytes": total,
        "free_bytes": free,
        "processes": [_gpu_process(int(each.pid), int(each.usedGpuMemory or 0)) for each in running],
    }


def _gpu_process(pid: int, used_bytes: int) -> dict[str, Any]:
    user = name = ""  # in a container with pids of its own nobody can be found by this pid
    with contextlib.suppress(OSError, KeyError):
        user = pwd.getpwuid(os.stat(f"/proc/{pid}").st_uid).pw_name
        name = Path(f"/proc/{pid}/comm").read_text().strip()
    return {"pid": pid, "user": user, "name": name, "bytes": used_bytes}


def serve() -> None:
    """Answer what comes on stdin until it ends."""
    probe = Probe()
    for line in sys.stdin.buffer:
        answer = probe.answer(json.loads(line))
        sys.stdout.write(f"{MARK}{json.dumps(answer)}\n")
        sys.stdout.flush()
    probe.close()


if __name__ == "__main__":
    serve()
