"""What a node has to offer: GPUs by UUID, CPU slots, cores, memory, addresses. Looked at once, at the agent's start.

Limits count, not hardware: cgroup v2 and v1 bounds on memory and CPU time, the affinity mask, and
``CUDA_VISIBLE_DEVICES``. NVML is shut down after the look, so that the agent keeps no driver state.
"""

from __future__ import annotations

import ctypes
import ipaddress
import os
import platform
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import psutil

from miles_agents.errors import ConfigError, EnvironmentFault
from miles_agents.node_info import Gpu, NodeInfo, default_cpu_slots

MIG_MARK = " (MIG)"
LEFT_FREE = 0.05
"""Of the memory: beyond it the kernel would rather kill somebody than say no."""

_DRIVER_LIBRARY = "libnvidia-ml.so.1"
_MIG_ENABLED = 1  # NVML_DEVICE_MIG_ENABLE

_VIRTUAL_INTERFACE = re.compile(r"^(docker|br-|veth|virbr|cni|flannel|cali|lxc|tun|tap|kube)")


class GpuDriverFault(EnvironmentFault):
    """The NVIDIA driver is there but does not answer as it should."""

    code = "E-GPU-001"


class BadVisibleDevices(ConfigError):
    """``CUDA_VISIBLE_DEVICES`` names something that this node does not have."""

    code = "E-GPU-002"


class UnknownInterface(ConfigError):
    """The chosen network interface is not on this node, or has no address that peers can use."""

    code = "E-INV-001"


class BadCpuSlots(ConfigError):
    """The number of CPU slots is not usable."""

    code = "E-INV-002"


class Nvml(Protocol):
    """What is asked of NVML. Indices are those of the PCI bus order. Failures raise ``GpuDriverFault``."""

    def open(self) -> bool:
        """Start; False if the node has no NVIDIA driver."""

    def close(self) -> None:
        """Let go of the driver; called once after an ``open`` that returned True."""

    def count(self) -> int:
        """Number of GPUs."""

    def uuid(self, index: int) -> str:
        """``GPU-...``."""

    def name(self, index: int) -> str:
        """Product name."""

    def memory_bytes(self, index: int) -> int:
        """Total memory."""

    def numa_node(self, index: int) -> int | None:
        """The NUMA node it hangs at; None if unknown."""

    def mig(self, index: int) -> bool:
        """Whether it is cut into MIG slices."""

    def users(self, index: int) -> list[tuple[int, int]]:
        """Processes that compute on it: pid, and bytes of its memory (0 where the driver does not say)."""


class DriverNvml:
    """NVML through pynvml, which is loaded only where there is a driver: it takes 2.5 MiB."""

    def open(self) -> bool:
        """Start; False without a driver library or a loaded driver."""
        try:
            ctypes.CDLL(_DRIVER_LIBRARY)
        except OSError:
            return False
        import pynvml

        try:
            pynvml.nvmlInit()
        except (pynvml.NVMLError_LibraryNotFound, pynvml.NVMLError_DriverNotLoaded):
            return False
        except pynvml.NVMLError as error:
            raise _driver_fault("nvmlInit", error) from error
        return True

    def close(self) -> None:
        """Shut NVML down."""
        self._call("nvmlShutdown")

    def count(self) -> int:
        """Number of GPUs."""
        return int(self._call("nvmlDeviceGetCount"))

    def uuid(self, index: int) -> str:
        """``GPU-...``."""
        return str(self._call("nvmlDeviceGetUUID", self._handle(index)))

    def name(self, index: int) -> str:
        """Product name."""
        return str(self._call("nvmlDeviceGetName", self._handle(index)))

    def memory_bytes(self, index: int) -> int:
        """Total memory; 0 where the GPU shares the host's and NVML therefore does not say."""
        memory = self._optional("nvmlDeviceGetMemoryInfo", index)
        return 0 if memory is None else int(memory.total)

    def numa_node(self, index: int) -> int | None:
        """From sysfs by PCI address: NVML's own call is missing in older drivers and in virtual machines."""
        pci = self._optional("nvmlDeviceGetPciInfo", index)
        if pci is None:
            return None
        bus_id = pci.busId.decode() if isinstance(pci.busId, bytes) else str(pci.busId)
        # NVML writes an eight-digit domain, sysfs a four-digit one.
        domain, _, rest = bus_id.lower().partition(":")
        number = _read_number(Path("/sys/bus/pci/devices") / f"{domain[-4:]}:{rest}" / "numa_node")
        return number if number is not None and number >= 0 else None

    def mig(self, index: int) -> bool:
        """Whether MIG mode is on now."""
        modes = self._optional("nvmlDeviceGetMigMode", index)
        return modes is not None and modes[0] == _MIG_ENABLED

    def users(self, index: int) -> list[tuple[int, int]]:
        """In a container with a pid namespace of its own the pids are those of the machine."""
        processes = self._optional("nvmlDeviceGetComputeRunningProcesses", index) or ()
        return [(process.pid, int(process.usedGpuMemory or 0)) for process in processes]

    def _handle(self, index: int) -> Any:
        return self._call("nvmlDeviceGetHandleByIndex", index)

    def _optional(self, function: str, index: int) -> Any:
        """None where this GPU or driver does not know the question."""
        import pynvml

        try:
            return self._call(function, self._handle(index))
        except GpuDriverFault as fault:
            if isinstance(fault.__cause__, (pynvml.NVMLError_NotSupported, pynvml.NVMLError_FunctionNotFound)):
                return None
            raise

    def _call(self, function: str, *args: Any) -> Any:
        import pynvml

        try:
            return getattr(pynvml, function)(*args)
        except pynvml.NVMLError as error:
            raise _driver_fault(f"{function}{args or ''}", error) from error


def _driver_fault(call: str, error: Exception) -> GpuDriverFault:
    return GpuDriverFault(
        "the NVIDIA driver of this node does not answer",
        evidence=f"{call}: {error}",
        advice="Run nvidia-smi on the node; restart the driver or the machine, or run with --device cpu.",
    )


def take_inventory(
    node: str,
    *,
    cpu_slots: int | None,
    interface: str | None,
    nvml: Nvml | None,
    environ: Mapping[str, str] | None = None,
) -> NodeInfo:
    """Look at this node.

    Args:
        node: The name that the run uses for it.
        cpu_slots: How many CPU slots to offer; None: ``max(8, cores)`` without GPUs, none beside GPUs.
        interface: Name or address of the network interface that peers should use; None: as the system lists them.
        nvml: The GPU driver, ``DriverNvml()``; None to offer no GPUs.
        environ: Where ``CUDA_VISIBLE_DEVICES`` is looked up; the process's environment by default.

    Raises:
        GpuDriverFault, BadVisibleDevices, UnknownInterface, BadCpuSlots.
    """
    if cpu_slots is not None and cpu_slots < 0:
        raise BadCpuSlots(
            f"cpu_slots={cpu_slots} on node {node}",
            evidence="a node cannot offer fewer than 0 slots",
            advice="Give 0 or more, or leave it out.",
        )
    visible = (os.environ if environ is None else environ).get("CUDA_VISIBLE_DEVICES")
    gpus = () if nvml is None else read_gpus(nvml, visible)
    cores = usable_cores()
    default_slots = 0 if gpus else default_cpu_slots(cores)
    return NodeInfo(
        node=node,
        hostname=socket.gethostname(),
        addresses=order_addresses(interface_addresses(), interface),
        gpus=gpus,
        cpu_slots=default_slots if cpu_slots is None else cpu_slots,
        cores=cores,
        memory_bytes=usable_memory(),
        python=platform.python_version(),
        platform=f"{platform.system()}-{platform.release()} {platform.machine()}",
    )


def inventory_notices(info: NodeInfo) -> list[str]:
    """What a person should know about a node before a run, one line each."""
    notices = []
    if not info.gpus and info.cpu_slots > info.cores:
        notices.append(
            f"node {info.node} offers {info.cpu_slots} CPU slots on {info.cores} cores: ranks will share cores"
        )
    cut = [str(gpu.index) for gpu in info.gpus if gpu.name.endswith(MIG_MARK)]
    if cut:
        notices.append(
            f"node {info.node}: GPU {', '.join(cut)} in MIG mode; processes see slices of it, not the whole GPU"
        )
    return notices


def gpu_notices(nvml: Nvml, info: NodeInfo) -> list[str]:
    """Who computes on a node's GPUs before the run does, one line each: what they hold is missing later.

    Nothing if the driver does not answer: this is a courtesy, and whoever needs the GPUs will hear of it.
    """
    try:
        if not info.gpus or not nvml.open():
            return []
        try:
            users = [(gpu, pid, held) for gpu in info.gpus for pid, held in nvml.users(gpu.index)]
        finally:
            nvml.close()
    except GpuDriverFault:
        return []
    return [
        f"node {info.node}: GPU {gpu.index} is in use: pid {pid} ({_program(pid)}) holds {held >> 20} MiB"
        + (f" of {gpu.memory_bytes >> 20}" if gpu.memory_bytes else "")
        for gpu, pid, held in users
    ]


def _program(pid: int) -> str:
    """Its name, if it can be seen from here."""
    try:
        return psutil.Process(pid).name()
    except psutil.Error:
        return "not seen from here"


def read_gpus(nvml: Nvml, visible: str | None) -> tuple[Gpu, ...]:
    """The GPUs that ``CUDA_VISIBLE_DEVICES`` (``visible``; None: not set) leaves, in its order."""
    if not nvml.open():
        return ()
    try:
        everything = [
            Gpu(
                index=index,
                uuid=nvml.uuid(index),
                name=nvml.name(index) + (MIG_MARK if nvml.mig(index) else ""),
                memory_bytes=nvml.memory_bytes(index),
                numa_node=nvml.numa_node(index),
            )
            for index in range(nvml.count())
        ]
    finally:
        nvml.close()
    return tuple(everything if visible is None else select_visible(everything, visible))


def select_visible(gpus: list[Gpu], visible: str) -> list[Gpu]:
    """Resolve ``CUDA_VISIBLE_DEVICES``: indices (PCI order), UUIDs or their unique beginnings; ``-1`` ends the list.

    CUDA itself silently ends the list at an entry that it does not know; here that is an error.
    """
    chosen: list[Gpu] = []
    for entry in (part.strip() for part in visible.split(",")):
        if not entry or entry == "-1":
            break
        if entry.isdecimal():
            found = [gpu for gpu in gpus if gpu.index == int(entry)]
        else:
            found = [gpu for gpu in gpus if gpu.uuid.lower().startswith(entry.lower())]
        if len(found) != 1 or found[0] in chosen:
            problem = "twice" if len(found) == 1 else "nothing here" if not found else "several GPUs"
            raise BadVisibleDevices(
                f"CUDA_VISIBLE_DEVICES={visible}: the entry {entry!r} names {problem}",
                evidence="this node has " + (", ".join(f"{gpu.index}={gpu.uuid}" for gpu in gpus) or "no GPUs"),
                advice="Use indices or UUIDs of whole GPUs as `nvidia-smi -L` lists them, each once, or unset it.",
            )
        chosen += found
    return chosen


def interface_addresses() -> dict[str, list[str]]:
    """Addresses of each interface that is up."""
    stats = psutil.net_if_stats()
    return {
        name: [each.address for each in entries if each.family in (socket.AF_INET, socket.AF_INET6)]
        for name, entries in psutil.net_if_addrs().items()
        if name not in stats or stats[name].isup
    }


def address_towards(address: str) -> str | None:
    """This machine's own address on the way to ``tcp://host:port``; None where there is no way, or it is a socket here.

    Nothing is sent.
    """
    parts = urlsplit(address)
    if parts.scheme != "tcp" or not parts.hostname:
        return None
    try:
        family, kind, _, _, place = socket.getaddrinfo(parts.hostname, parts.port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(place)
            return str(probe.getsockname()[0])
    except OSError:
        return None


def interface_of(address: str, interfaces: Mapping[str, list[str]]) -> str | None:
    """The name of the interface that has it."""
    return next((name for name, found in interfaces.items() if address in found), None)


def order_addresses(interfaces: Mapping[str, list[str]], chosen: str | None) -> tuple[str, ...]:
    """Addresses that peers may use, best first.

    The chosen interface (a name or an address) goes first, bridges of containers and tunnels last, v4 before v6.
    Link-local addresses are left out, and loopback unless there is nothing else or it was chosen.
    """
    ranked: list[tuple[tuple[bool, bool, bool, bool], str]] = []
    for name, addresses in interfaces.items():
        for text in addresses:
            address = ipaddress.ip_address(text.partition("%")[0])
            is_chosen = chosen is not None and (name == chosen or str(address) == chosen)
            if not address.is_link_local:
                virtual = _VIRTUAL_INTERFACE.match(name) is not None
                key = (not is_chosen, address.is_loopback, virtual, address.version == 6)
                ranked.append((key, str(address)))
    ranked.sort(key=lambda item: item[0])
    if chosen is not None and not any(not key[0] for key, _ in ranked):
        raise UnknownInterface(
            f"the network interface {chosen!r} has no address that peers could use",
            evidence="; ".join(f"{name}: {', '.join(found) or 'none'}" for name, found in interfaces.items()),
            advice="Choose one of these interfaces or addresses.",
        )
    usable = [text for (not_chosen, loopback, _, _), text in ranked if not loopback or not not_chosen]
    return tuple(usable or [text for _, text in ranked])


def usable_cores(root: Path = Path("/")) -> int:
    """Cores that this process may use: its affinity mask, bounded by the cgroup's CPU time, at least 1."""
    cores = len(os.sched_getaffinity(0))
    for folder in _cgroup_folders(root, "cpu"):
        fields = _read_text(folder / "cpu.max").split()
        quota, period = fields if len(fields) == 2 else ("", "")
        if not quota:
            quota, period = _read_text(folder / "cpu.cfs_quota_us"), _read_text(folder / "cpu.cfs_period_us")
        if quota.isdecimal() and period.isdecimal() and int(period) > 0:
            cores = min(cores, int(quota) // int(period))
    return max(1, cores)


def usable_memory(root: Path = Path("/")) -> int:
    """Bytes of RAM that this process may use: the machine's, bounded by the cgroup's limit."""
    limits = [psutil.virtual_memory().total]
    for folder in _cgroup_folders(root, "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            limit = _read_number(folder / name)
            if limit is not None and limit > 0:
                limits.append(limit)
    return min(limits)


def memory_left(root: Path = Path("/")) -> tuple[int, int]:
    """Bytes of RAM that can still be taken, and all of it, where the least is left: the machine, or a cgroup of ours.

    What the kernel only keeps because there is room (files read before) counts as left.
    """
    memory = psutil.virtual_memory()
    found = [(memory.available, memory.total)]
    for folder in _cgroup_folders(root, "memory"):
        for most, taken, prefix in (
            ("memory.max", "memory.current", ""),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
        ):
            limit, usage = _read_number(folder / most), _read_number(folder / taken)
            if limit is not None and usage is not None and 0 < limit < memory.total:
                stat = _read_text(folder / "memory.stat")
                cache = re.findall(rf"^{prefix}(?:in)?active_file (\d+)$", stat, re.MULTILINE)
                found.append((max(0, limit - usage + sum(map(int, cache))), limit))
    return min(found, key=lambda each: each[0] - LEFT_FREE * each[1])


def _cgroup_folders(root: Path, controller: str) -> list[Path]:
    """The folders of this process's cgroup and those above it, v2 and v1; a limit in any of them holds."""
    folders: list[Path] = []
    for line in _read_text(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and controller not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / (controller if controllers else "")
        # In a container the path may be the host's, which is not mounted: then the mount's top is the own cgroup.
        own = mount / path.strip("/")
        folders += [own, *(parent for parent in own.parents if parent.is_relative_to(mount))]
    return folders


def _read_text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _read_number(path: Path) -> int | None:
    text = _read_text(path)
    return int(text) if re.fullmatch(r"-?\d+", text) else None
