"""What a node offers, with drivers and control groups of all kinds."""

import os

import psutil
import pynvml
import pytest

from miles_agents.agent.inventory import (
    BadCpuSlots,
    BadVisibleDevices,
    DriverNvml,
    GpuDriverFault,
    UnknownInterface,
    address_towards,
    gpu_notices,
    interface_addresses,
    interface_of,
    inventory_notices,
    memory_left,
    order_addresses,
    read_gpus,
    select_visible,
    take_inventory,
    usable_cores,
    usable_memory,
)

GIB = 1024**3


class TwoGpus:
    """A driver with two GPUs, the second cut by MIG. Says no more once it is closed."""

    def __init__(self, broken_at=None):
        self.is_open = False
        self.opened = 0
        self.broken_at = broken_at

    def open(self):
        self.opened += 1
        self.is_open = True
        return True

    def close(self):
        assert self.is_open
        self.is_open = False

    def count(self):
        assert self.is_open
        return 2

    def uuid(self, index):
        assert self.is_open
        return ["GPU-aaaa1111-0", "GPU-aaaa2222-0"][index]

    def name(self, index):
        if index == self.broken_at:
            raise GpuDriverFault("the driver does not answer", evidence="GPU is lost")
        return "NVIDIA H100"

    def memory_bytes(self, index):
        return 80 * GIB

    def numa_node(self, index):
        return [0, None][index]

    def mig(self, index):
        return index == 1

    def users(self, index):
        if index == self.broken_at:
            raise GpuDriverFault("the driver does not answer", evidence="GPU is lost")
        return [(os.getpid(), 3 << 30), (2**22 + 1, 0)] if index == 1 else []


class NoDriver:
    def open(self):
        return False


def take(nvml=None, cpu_slots=None, interface=None, **environ):
    return take_inventory("node-a", cpu_slots=cpu_slots, interface=interface, nvml=nvml, environ=environ)


def test_a_node_without_gpus_offers_at_least_8_cpu_slots_and_says_when_that_is_more_than_its_cores():
    info = take(NoDriver())
    assert info.gpus == ()
    assert info.cpu_slots == max(8, info.cores)
    assert info.addresses
    assert info.memory_bytes <= psutil.virtual_memory().total
    assert type(info).from_plain(info.to_plain()) == info
    notices = inventory_notices(take(cpu_slots=info.cores + 1))
    assert notices == [f"node node-a offers {info.cores + 1} CPU slots on {info.cores} cores: ranks will share cores"]
    assert inventory_notices(take(cpu_slots=info.cores)) == []


def test_gpus_are_listed_with_their_identity_and_mig_is_noted():
    nvml = TwoGpus()
    info = take(nvml)
    assert [(gpu.index, gpu.uuid, gpu.name, gpu.memory_bytes, gpu.numa_node) for gpu in info.gpus] == [
        (0, "GPU-aaaa1111-0", "NVIDIA H100", 80 * GIB, 0),
        (1, "GPU-aaaa2222-0", "NVIDIA H100 (MIG)", 80 * GIB, None),
    ]
    assert info.cpu_slots == 0
    assert take(TwoGpus(), cpu_slots=3).cpu_slots == 3
    assert inventory_notices(info) == ["node node-a: GPU 1 in MIG mode; processes see slices of it, not the whole GPU"]
    assert (nvml.opened, nvml.is_open) == (1, False)


def test_who_computes_on_a_gpu_already_is_told_with_name_and_memory():
    nvml = TwoGpus()
    info = take(nvml)
    mine, unseen = gpu_notices(nvml, info)
    name = psutil.Process().name()
    assert mine == f"node node-a: GPU 1 is in use: pid {os.getpid()} ({name}) holds 3072 MiB of {80 << 10}"
    assert f"pid {2**22 + 1} (not seen from here) holds 0 MiB" in unseen
    assert not nvml.is_open
    hidden = take(TwoGpus(), CUDA_VISIBLE_DEVICES="0")
    assert gpu_notices(TwoGpus(), hidden) == []  # those of others are not looked at


def test_a_driver_that_does_not_tell_who_computes_ends_nothing():
    broken = TwoGpus(broken_at=1)
    assert gpu_notices(broken, take(TwoGpus())) == [] and not broken.is_open
    assert gpu_notices(NoDriver(), take(NoDriver())) == []


def test_a_driver_fault_is_told_and_the_driver_is_let_go():
    nvml = TwoGpus(broken_at=1)
    with pytest.raises(GpuDriverFault, match="GPU is lost"):
        read_gpus(nvml, None)
    assert not nvml.is_open


def test_an_open_driver_that_fails_is_a_fault_with_the_text_of_nvml():
    # Every call before nvmlInit, or without a driver, is refused by NVML.
    with pytest.raises(GpuDriverFault) as caught:
        DriverNvml().count()
    assert str(pynvml.NVMLError(pynvml.NVML_ERROR_UNINITIALIZED)) in str(caught.value)


def test_the_driver_of_this_machine_answers_or_is_absent():
    for gpu in read_gpus(DriverNvml(), None):
        assert gpu.uuid.startswith("GPU-")
        assert gpu.memory_bytes > 0


@pytest.mark.parametrize(
    ("visible", "indices"),
    [
        ("0,1", [0, 1]),
        ("1", [1]),
        ("1, 0", [1, 0]),
        ("", []),
        ("-1", []),
        ("1,-1,0", [1]),
        ("GPU-aaaa2", [1]),
        ("gpu-AAAA1111-0,1", [0, 1]),
    ],
)
def test_visible_devices_choose_by_index_uuid_and_its_beginning(visible, indices):
    assert [gpu.index for gpu in take(TwoGpus(), CUDA_VISIBLE_DEVICES=visible).gpus] == indices


@pytest.mark.parametrize(
    ("visible", "problem"),
    [("2", "nothing here"), ("GPU-aaaa", "several"), ("0,0", "twice"), ("MIG-1", "nothing here"), ("x", "nothing")],
)
def test_visible_devices_that_are_not_there_are_refused_with_what_there_is(visible, problem):
    with pytest.raises(BadVisibleDevices, match=problem) as caught:
        take(TwoGpus(), CUDA_VISIBLE_DEVICES=visible)
    assert "0=GPU-aaaa1111-0, 1=GPU-aaaa2222-0" in caught.value.evidence


def test_visible_devices_mean_nothing_without_a_driver():
    assert take(NoDriver(), CUDA_VISIBLE_DEVICES="0").gpus == ()
    with pytest.raises(BadVisibleDevices, match="no GPUs"):
        select_visible([], "0")


def test_a_negative_number_of_slots_is_refused():
    with pytest.raises(BadCpuSlots, match="cpu_slots=-1"):
        take(cpu_slots=-1)


INTERFACES = {
    "lo": ["127.0.0.1", "::1"],
    "docker0": ["172.17.0.1"],
    "eth0": ["fd00::2", "192.0.2.2", "fe80::1%eth0"],
    "ib0": ["10.0.0.2"],
}


def test_addresses_come_v4_first_and_without_loopback_and_link_local():
    assert order_addresses(INTERFACES, None) == ("192.0.2.2", "10.0.0.2", "fd00::2", "172.17.0.1")


def test_the_chosen_interface_comes_first():
    assert order_addresses(INTERFACES, "ib0")[0] == "10.0.0.2"
    assert order_addresses(INTERFACES, "172.17.0.1")[0] == "172.17.0.1"
    assert order_addresses(INTERFACES, "lo")[:2] == ("127.0.0.1", "::1")
    assert order_addresses(INTERFACES, "eth0") == ("192.0.2.2", "fd00::2", "10.0.0.2", "172.17.0.1")


def test_loopback_is_used_when_there_is_nothing_else():
    assert order_addresses({"lo": ["127.0.0.1", "::1"]}, None) == ("127.0.0.1", "::1")
    assert order_addresses({}, None) == ()


def test_an_interface_that_is_not_there_is_refused_with_those_that_are():
    with pytest.raises(UnknownInterface, match="eth7") as caught:
        order_addresses(INTERFACES, "eth7")
    assert "ib0: 10.0.0.2" in caught.value.evidence


def test_the_addresses_of_this_machine_are_found():
    assert "127.0.0.1" in {address for found in interface_addresses().values() for address in found}


def tree(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_limits_of_cgroup_v2_hold_wherever_above_they_are_set(tmp_path):
    tree(
        tmp_path,
        {
            "proc/self/cgroup": "0::/pod/container\n",
            "sys/fs/cgroup/pod/container/cpu.max": "max 100000\n",
            "sys/fs/cgroup/pod/container/memory.max": "2147483648\n",
            "sys/fs/cgroup/pod/cpu.max": "150000 100000\n",
            "sys/fs/cgroup/pod/memory.max": "1073741824\n",
            "sys/fs/cgroup/memory.max": "max\n",
        },
    )
    assert usable_cores(tmp_path) == 1
    assert usable_memory(tmp_path) == GIB


def test_limits_of_cgroup_v1_hold_also_when_the_path_is_that_of_the_host(tmp_path):
    tree(
        tmp_path,
        {
            "proc/self/cgroup": "5:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n0::/docker/abc\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{GIB}\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
    )
    assert usable_cores(tmp_path) == 1
    assert usable_memory(tmp_path) == GIB


def test_what_is_left_of_a_container_is_its_limit_less_what_cannot_be_given_back(tmp_path):
    mib = 1024**2
    stat = f"anon 1\ninactive_file {8 * mib}\nactive_file {2 * mib}\nshmem 3\n"
    tree(
        tmp_path,
        {
            "proc/self/cgroup": "0::/a/b\n",
            "sys/fs/cgroup/a/memory.max": f"{100 * mib}\n",
            "sys/fs/cgroup/a/memory.current": f"{95 * mib}\n",
            "sys/fs/cgroup/a/memory.stat": stat,
            "sys/fs/cgroup/a/b/memory.max": "max\n",
            "sys/fs/cgroup/a/b/memory.current": f"{95 * mib}\n",
        },
    )
    assert memory_left(tmp_path) == (15 * mib, 100 * mib)


def test_what_is_left_under_cgroup_v1(tmp_path):
    mib = 1024**2
    tree(
        tmp_path,
        {
            "proc/self/cgroup": "5:memory:/docker/abc\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{100 * mib}\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{95 * mib}\n",
            "sys/fs/cgroup/memory/memory.stat": f"inactive_file 1\ntotal_inactive_file {4 * mib}\n",
        },
    )
    assert memory_left(tmp_path) == (9 * mib, 100 * mib)


def test_without_limits_the_machine_counts(tmp_path):
    tree(
        tmp_path,
        {
            "proc/self/cgroup": "5:memory:/\n4:cpu:/\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
    )
    assert usable_cores(tmp_path) == len(os.sched_getaffinity(0))
    assert usable_memory(tmp_path) == usable_memory(tmp_path / "none") == psutil.virtual_memory().total


def test_the_own_address_is_the_one_at_which_the_way_begins():
    assert address_towards("tcp://127.0.0.1:9") == "127.0.0.1"
    assert address_towards("tcp://127.0.0.77:9") == "127.0.0.1"
    for nowhere in ("unix:///tmp/socket", "tcp://no.such.host.invalid:9", "tcp://"):
        assert address_towards(nowhere) is None


def test_an_interface_is_found_by_its_address():
    assert interface_of("10.0.0.2", {"lo": ["127.0.0.1"], "eth1": ["10.0.0.1", "10.0.0.2"]}) == "eth1"
    assert interface_of("10.0.0.3", {"lo": ["127.0.0.1"]}) is None
