"""What is wrong with one host on its own. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeAlias

from miles_agents.agent.inventory import BadVisibleDevices
from miles_launcher.preflight.facts import AboutGpu, HostFacts
from miles_launcher.preflight.findings import Finding, Severity
from miles_launcher.preflight.gpus import offered
from miles_launcher.preflight.needs import Needs
from miles_launcher.preflight.network import nccl_interface, variables

OLDEST_PYTHON = (3, 11)
GIB = 1 << 30
FULL_DISK_BYTES, SMALL_DISK_BYTES = 1 << 20, 10 * GIB
"""How much a run writes is its user's to know: only what is full is an error."""
FEW_INODES = 1000
SMALL_SHM_BYTES = GIB
"""NCCL keeps some ten MiB for each pair of ranks of a host there; containers have 64 MiB unless told otherwise."""
FEW_FILES, ENOUGH_FILES = 1024, 16384
"""Descriptors: each rank needs a few dozen, each connection of an engine one."""
LITTLE_MEMORY_BYTES = 2 * GIB
GPU_SHARE_TAKEN = 0.1
"""Of a GPU's memory; with more of it in other hands a run that reckons with the whole GPU fails."""

Check: TypeAlias = Callable[[str, HostFacts, Needs], Iterator[Finding]]


def judge_host(name: str, facts: HostFacts, needs: Needs) -> Iterator[Finding]:
    """All findings about one host that answered."""
    for part, fault in facts.get("faults", {}).items():
        yield Finding(
            "error" if part == "gpus" and needs.device == "cuda" else "warning", "probe", (name,),
            f"its {part} could not be found out", fault, "Repair what the evidence names, and ask again.",
        )  # fmt: skip
    for check in _CHECKS:
        yield from check(name, facts, needs)


def _python(name: str, facts: HostFacts, needs: Needs) -> Iterator[Finding]:
    if "host" not in facts:
        return
    version = facts["host"]["python"]
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_PYTHON:
        yield Finding(
            "error", "python", (name,), f"Python {version} is too old", facts["host"]["executable"],
            f"Use Python {'.'.join(map(str, OLDEST_PYTHON))} or newer there.",
        )  # fmt: skip
    if facts.get("code") == "":
        yield Finding(
            "error", "code", (name,), "our own packages cannot be imported there", facts["host"]["executable"],
            "Install the same version there, name the right Python, or share the directory and its PYTHONPATH.",
        )  # fmt: skip
    elif needs.code and facts.get("code", needs.code) != needs.code:
        yield Finding(
            "error", "code", (name,), "our own packages are others than the controller's",
            f"{facts.get('code')} there, {needs.code} here", "Install the same version there, or share its directory.",
        )  # fmt: skip


def _packages(name: str, facts: HostFacts, needs: Needs) -> Iterator[Finding]:
    versions = facts.get("packages", {})
    missing = [package for package in needs.packages if versions.get(package) == ""]
    if missing:
        where = facts["host"]["executable"] if "host" in facts else ""
        yield Finding(
            "error", "packages", (name,), f"not installed: {', '.join(missing)}", where,
            f"Install them there: {where or 'python'} -m pip install {' '.join(missing)}",
        )  # fmt: skip


def _gpus(name: str, facts: HostFacts, needs: Needs) -> Iterator[Finding]:
    if "gpus" not in facts or needs.device == "cpu":
        return
    if needs.device == "cuda" and not facts["gpus"]["gpus"]:
        driver = facts["gpus"]["driver"]
        yield Finding(
            "error", "gpus", (name,), "no GPU", f"driver {driver}" if driver else "no NVIDIA driver answers",
            "Leave this host out, or repair its driver (nvidia-smi).",
        )  # fmt: skip
    try:
        gpus = offered(facts)
    except BadVisibleDevices as error:
        yield Finding("error", "gpus", (name,), error.what, error.evidence, error.advice)
        return
    if needs.device == "cuda" and facts["gpus"]["gpus"] and not gpus:
        yield Finding(
            "error", "gpus", (name,), "CUDA_VISIBLE_DEVICES leaves no GPU", f"{len(facts['gpus']['gpus'])} are there",
            "Name those that the run may use, or unset it there.",
        )  # fmt: skip
    for gpu in gpus:
        yield from _gpu(name, gpu)


def _gpu(name: str, gpu: AboutGpu) -> Iterator[Finding]:
    taken = gpu["total_bytes"] - gpu["free_bytes"]
    much = taken > GPU_SHARE_TAKEN * gpu["total_bytes"]
    # What the driver itself has taken is no process, and little.
    if not gpu["processes"] and not much:
        return
    who = [
        f"pid {process['pid']} ({process['name'] or '?'} of {process['user'] or 'an unknown user'}): "
        f"{process['bytes'] / GIB:.1f} GiB"
        for process in gpu["processes"]
    ]
    severity: Severity = "error" if much else "warning"
    yield Finding(
        severity, "gpu-in-use", (name,),
        f"GPU {gpu['index']} is in use: {taken / GIB:.1f} of {gpu['total_bytes'] / GIB:.1f} GiB",
        "; ".join(who) or "by processes that cannot be seen from here (another container)",
        "Wait for them, end them if they are yours, or leave the GPU out with CUDA_VISIBLE_DEVICES.",
    )  # fmt: skip


def _disks(name: str, facts: HostFacts, needs: Needs) -> Iterator[Finding]:
    for label, path in facts.get("paths", {}).items():
        free, where = path["free_bytes"], f"{path['path']} (on {path['nearest']})"
        flag = label if label in ("tmp", "shm") else f"--{label}"
        if label in needs.present and not path["exists"]:
            yield Finding(
                "error", "paths", (name,), f"{flag}: not there", path["path"], "Copy it there, or share its directory."
            )
            continue
        if label == "shm":
            if free < SMALL_SHM_BYTES and needs.device != "cpu":
                yield Finding(
                    "warning", "disk", (name,), f"shared memory has {free / GIB:.2f} GiB left", where,
                    "Give the container more (--shm-size, or an emptyDir of medium Memory): NCCL needs it.",
                )  # fmt: skip
            continue
        if label in needs.written and not path["writable"]:
            yield Finding("error", "disk", (name,), f"{flag}: cannot be written", where, "Change its owner or mode.")
        if label not in needs.written and label != "tmp":
            continue
        if 0 <= path["free_inodes"] < FEW_INODES:
            yield Finding(
                "error", "disk", (name,), f"{flag}: no room for files", f"{where}: {path['free_inodes']} inodes left",
                "Remove files there.",
            )  # fmt: skip
        if free < SMALL_DISK_BYTES:
            yield Finding(
                "error" if free < FULL_DISK_BYTES else "warning", "disk", (name,),
                f"{flag}: {free / GIB:.2f} GiB left", where, "Free some space, or choose another directory.",
            )  # fmt: skip


def _limits(name: str, facts: HostFacts, needs: Needs) -> Iterator[Finding]:
    limits = facts.get("limits", {})
    _, files = limits.get("nofile", [-1, -1])  # an agent raises the soft one to the hard one
    if 0 <= files < ENOUGH_FILES:
        yield Finding(
            "error" if files < FEW_FILES else "warning", "limits", (name,), f"only {files} open files are allowed",
            "hard limit of RLIMIT_NOFILE", "Raise it (ulimit -Hn 65536, limits.conf, LimitNOFILE= of systemd).",
        )  # fmt: skip
    locked, _ = limits.get("memlock", [-1, -1])
    if locked >= 0 and facts.get("rdma") and needs.device != "cpu":
        yield Finding(
            "error", "limits", (name,), f"only {locked >> 10} KiB of memory may be locked",
            f"RDMA devices {', '.join(facts['rdma'])} need to register memory; soft limit of RLIMIT_MEMLOCK",
            "Set it to unlimited (ulimit -l unlimited, limits.conf, LimitMEMLOCK=infinity of systemd or Slurm).",
        )  # fmt: skip


def _memory(name: str, facts: HostFacts, needs: Needs) -> Iterator[Finding]:
    if "cgroup" not in facts:
        return
    memory = facts["cgroup"]
    if memory["available_bytes"] < LITTLE_MEMORY_BYTES:
        yield Finding(
            "warning", "memory", (name,), f"{memory['available_bytes'] / GIB:.1f} GiB of memory are left",
            f"of {memory['memory_bytes'] / GIB:.1f} GiB", "Find out who has it: ps aux --sort -rss | head",
        )  # fmt: skip
    if 0 < memory["limit_bytes"] < LITTLE_MEMORY_BYTES:
        yield Finding(
            "warning", "memory", (name,), f"the cgroup allows {memory['limit_bytes'] / GIB:.1f} GiB of memory",
            f"the machine has {memory['memory_bytes'] / GIB:.1f} GiB", "Ask for more memory in the job or container.",
        )  # fmt: skip


def _interfaces(name: str, facts: HostFacts, needs: Needs) -> Iterator[Finding]:
    if "interfaces" not in facts:
        return
    there = facts["interfaces"]
    evidence = "; ".join(f"{each}: {', '.join(found)}" for each, found in there.items())
    given = variables(facts, needs.env)
    wanted = given.get("NCCL_SOCKET_IFNAME", "")
    if needs.device != "cpu" and wanted and nccl_interface(there, wanted) is None:
        yield Finding(
            "error", "interfaces", (name,), f"NCCL_SOCKET_IFNAME={wanted} fits no interface", evidence,
            "Name one that every host has, or leave the variable out.",
        )  # fmt: skip
    missing = [each for each in given.get("GLOO_SOCKET_IFNAME", "").split(",") if each and each not in there]
    if missing:
        yield Finding(
            "error", "interfaces", (name,), f"GLOO_SOCKET_IFNAME names {', '.join(missing)}: no such interface",
            evidence, "Name one that every host has, or leave the variable out.",
        )  # fmt: skip
    if needs.interface and needs.interface not in {*there, *(a for found in there.values() for a in found)}:
        yield Finding(
            "error", "interfaces", (name,), f"no interface {needs.interface}", evidence,
            "Name one that every host has.",
        )  # fmt: skip


_CHECKS: tuple[Check, ...] = (_python, _packages, _gpus, _disks, _limits, _memory, _interfaces)
