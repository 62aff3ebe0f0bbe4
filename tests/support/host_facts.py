"""A host without a fault, and hosts that differ from it in one thing."""

import copy

from miles_launcher.preflight.facts import Examined, HostReport

GIB = 1 << 30
MODEL = "NVIDIA H100"


def path(free=500 * GIB, *, exists=True, writable=True, content="3 entries, ab", inodes=10**6, where="/data"):
    return {
        "path": where, "exists": exists, "nearest": where, "content": content, "writable": writable,
        "free_bytes": free, "free_inodes": inodes,
    }  # fmt: skip


def gpu(index=0, *, used=0, processes=(), name=MODEL, total=80 * GIB):
    return {
        "index": index, "uuid": f"GPU-{index}f00", "name": name, "total_bytes": total, "free_bytes": total - used,
        "processes": list(processes),
    }  # fmt: skip


FIT = {
    "faults": {},
    "host": {
        "hostname": "h", "user": "alice", "uid": 1000, "python": "3.12.4", "executable": "/venv/bin/python",
        "platform": "Linux-6.8 x86_64",
    },
    "packages": {"torch": "2.9.0", "megatron-core": "0.16.0", "sglang": "0.5.16", "pyzmq": "27.0"},
    "paths": {"run-dir": path(), "save": path(), "tmp": path(where="/tmp"), "shm": path(where="/dev/shm")},
    "ports": {},
    "interfaces": {"lo": ["127.0.0.1"], "eth0": ["10.0.0.1", "fe80::1"]},
    "reaches_by": "",
    "limits": {"nofile": [1024, 1 << 20], "memlock": [-1, -1], "nproc": [-1, -1]},
    "cgroup": {"memory_bytes": 900 * GIB, "available_bytes": 800 * GIB, "limit_bytes": -1, "cores": 64},
    "env": {},
    "code": "c0de",
    "rdma": [],
    "gpus": {"driver": "570.1", "gpus": [gpu(0), gpu(1)]},
}  # fmt: skip


def facts(**changes):
    """``a__b=x`` changes ``b`` of ``a``; ``a=None`` leaves it out."""
    found = copy.deepcopy(FIT)
    for name, value in changes.items():
        part, _, key = name.partition("__")
        if key:
            found[part][key] = value
        elif value is None:
            del found[part]
        else:
            found[part] = value
    return found


def examined(*hosts, unshared=None, links=(), clocks=()):
    """Hosts h0, h1, ...: facts, or why there are none."""
    reports = []
    for number, host in enumerate(hosts):
        clock = clocks[number] if clocks else 0.0
        if isinstance(host, str):
            reports.append(HostReport(f"h{number}", error=host))
        else:
            reports.append(HostReport(f"h{number}", facts=host, clock_s=clock, clock_error_s=0.01))
    return Examined(tuple(reports), unshared or {}, tuple(links))
