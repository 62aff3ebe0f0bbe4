"""The judge of the preflight check: what is said of which host, and how badly. Pure."""

import pytest
from support.host_facts import GIB, examined, facts, gpu, path

from miles_launcher.preflight.facts import Link
from miles_launcher.preflight.findings import Finding, ordered
from miles_launcher.preflight.judge import judge
from miles_launcher.preflight.needs import Needs
from miles_launcher.preflight.network import addresses, nccl_interface

NEEDS = Needs(
    device="cuda", packages=("torch", "pyzmq"), paths={"run-dir": "/data", "save": "/data"}, shared=("save",),
    written=("run-dir", "save"), present=("model",),
)  # fmt: skip
SMI = {"pid": 77, "user": "bob", "name": "python", "bytes": 30 * GIB}


def only(found):
    assert len(found) == 1, found
    return found[0]


def test_hosts_without_a_fault_have_no_findings():
    assert judge(examined(facts()), NEEDS) == []
    assert judge(examined(facts(), facts(), facts()), NEEDS) == []


HOSTS = [
    ("python", "error", {"host__python": "3.10.9"}, "Python 3.10.9 is too old", "/venv/bin/python"),
    ("code", "error", {"code": ""}, "cannot be imported", "/venv/bin/python"),
    ("packages", "error", {"packages__torch": ""}, "not installed: torch", "pip install torch"),
    ("gpus", "error", {"gpus": {"driver": "", "gpus": []}}, "no GPU", "no NVIDIA driver answers"),
    ("gpus", "error", {"gpus": {"driver": "570", "gpus": []}}, "no GPU", "driver 570"),
    ("gpu-in-use", "error", {"gpus__gpus": [gpu(3, used=30 * GIB, processes=[SMI])]}, "GPU 3 is in use", "bob"),
    ("gpu-in-use", "warning", {"gpus__gpus": [gpu(3, used=GIB, processes=[SMI])]}, "GPU 3 is in use", "pid 77"),
    ("gpu-in-use", "error", {"gpus__gpus": [gpu(used=30 * GIB)]}, "30.0 of 80.0 GiB", "another container"),
    ("disk", "error", {"paths__save": path(1000)}, "--save: 0.00 GiB left", "/data"),
    ("disk", "warning", {"paths__run-dir": path(5 * GIB)}, "--run-dir: 5.00 GiB left", "/data"),
    ("disk", "warning", {"paths__tmp": path(5 * GIB, where="/tmp")}, "tmp: 5.00 GiB left", "/tmp"),
    ("disk", "error", {"paths__save": path(writable=False)}, "cannot be written", "/data"),
    ("disk", "error", {"paths__save": path(inodes=3)}, "no room for files", "3 inodes"),
    ("disk", "warning", {"paths__shm": path(64 << 20)}, "shared memory has 0.06 GiB left", "--shm-size"),
    ("paths", "error", {"paths__model": path(exists=False, where="/models/a")}, "--model: not there", "/models/a"),
    ("limits", "error", {"limits__nofile": [256, 512]}, "512 open files", "LimitNOFILE"),
    ("limits", "warning", {"limits__nofile": [256, 4096]}, "4096 open files", "limits.conf"),
    ("limits", "error", {"limits__memlock": [65536, -1], "rdma": ["mlx5_0"]}, "only 64 KiB", "mlx5_0"),
    ("memory", "warning", {"cgroup__available_bytes": GIB}, "1.0 GiB of memory are left", "900.0"),
    ("memory", "warning", {"cgroup__limit_bytes": GIB}, "the cgroup allows 1.0 GiB", "900.0"),
    ("interfaces", "error", {"env": {"NCCL_SOCKET_IFNAME": "ib"}}, "NCCL_SOCKET_IFNAME=ib", "eth0: 10.0.0.1"),
    ("interfaces", "error", {"env": {"GLOO_SOCKET_IFNAME": "eth7"}}, "names eth7", "eth0: 10.0.0.1"),
    ("probe", "error", {"gpus": None, "faults": {"gpus": "NVML: unknown error"}}, "gpus could not", "NVML"),
    ("probe", "warning", {"cgroup": None, "faults": {"cgroup": "odd"}}, "cgroup could not", "odd"),
    ("answers", "error", {"limits": {"nofile": "many"}}, "makes no sense", "ValueError"),
]


@pytest.mark.parametrize(("check", "severity", "changes", "what", "more"), HOSTS, ids=[f"{c[0]}-{c[3]}" for c in HOSTS])
def test_one_host_with_one_fault_has_one_finding(check, severity, changes, what, more):
    found = only(judge(examined(facts(**changes)), NEEDS))
    assert (found.check, found.severity, found.hosts) == (check, severity, ("h0",))
    assert what in found.what
    assert more in f"{found.evidence} {found.advice}"
    assert found.advice


def test_what_a_run_does_not_use_is_no_fault():
    on_cpu = Needs(device="cpu")
    strange = facts(
        gpus={"driver": "", "gpus": []}, paths__shm=path(64 << 20), env={"NCCL_SOCKET_IFNAME": "ib"},
        limits__memlock=[65536, 65536], rdma=["mlx5_0"], packages__torch="",
    )  # fmt: skip
    assert judge(examined(strange), on_cpu) == []
    assert judge(examined(facts(limits__memlock=[65536, 65536])), NEEDS) == []  # nobody registers memory without RDMA


DIFFERENCES = [
    ("python", "error", {"host__python": "3.11.9"}, "Python differs"),
    ("code", "error", {"code": "0ther"}, "our own code differs"),
    ("packages", "error", {"packages__torch": "2.8.0"}, "torch differs"),
    ("packages", "error", {"packages__sglang": "0.5.20"}, "sglang differs"),
    ("packages", "warning", {"packages__pyzmq": "26.0"}, "pyzmq differs"),
    ("user", "note", {"host__user": "root"}, "the user differs"),
    ("platform", "warning", {"host__platform": "Linux-6.8 aarch64"}, "the kind of machine differs"),
    ("gpus", "warning", {"gpus__driver": "535.2"}, "the driver differs"),
    ("gpus", "warning", {"gpus__gpus": [gpu()]}, "the GPUs differs"),
    ("paths", "warning", {"paths__save": path(content="2 entries, cd")}, "what lies at --save differs"),
]


@pytest.mark.parametrize(("check", "severity", "changes", "what"), DIFFERENCES, ids=[c[3] for c in DIFFERENCES])
def test_the_host_that_is_not_like_most_is_named(check, severity, changes, what):
    found = only(judge(examined(facts(), facts(**changes), facts()), NEEDS))
    assert (found.check, found.severity, found.hosts) == (check, severity, ("h1",))
    assert found.what.startswith(what)
    assert "h0, h2: " in found.evidence
    assert "; h1: " in found.evidence or found.evidence.startswith("h1: ")


def test_code_is_measured_by_the_controllers():
    found = only(judge(examined(facts()), Needs(device="cuda", code="f00")))
    assert (found.check, found.severity) == ("code", "error")
    assert "c0de there, f00 here" in found.evidence
    assert judge(examined(facts()), Needs(device="cuda", code="c0de")) == []


def test_small_steps_of_python_are_no_difference():
    assert judge(examined(facts(), facts(host__python="3.12.11")), NEEDS) == []


def test_what_only_several_hosts_show():
    found = judge(examined(facts(), "ssh: no route to host", facts(), clocks=(0, 0, -90)), NEEDS)
    by_check = {each.check: each for each in found}
    assert {check: (each.severity, each.hosts) for check, each in by_check.items()} == {
        "answers": ("error", ("h1",)), "clock": ("warning", ("h2",)),
    }  # fmt: skip
    assert by_check["answers"].evidence == "ssh: no route to host"
    assert "-90.0 s" in by_check["clock"].what


def test_an_address_of_loopback_has_an_advice_of_its_own():
    links = [Link("h0", "h1", "gloo", "127.0.0.1", "refused"), Link("h0", "h1", "agents", "10.0.0.2", "timed out")]
    found = judge(examined(facts(), facts(), links=links), NEEDS)
    assert ["GLOO_SOCKET_IFNAME" in each.advice for each in found] == [True, False]


def test_a_clock_that_was_measured_badly_is_not_blamed():
    slow = examined(facts(), facts())
    late = type(slow)(tuple(type(h)(h.name, h.facts, clock_s=3.0, clock_error_s=2.5) for h in slow.hosts))
    assert judge(late, NEEDS) == []


def test_paths_ports_and_links():
    links = [
        Link("h0", "h1", "agents and NCCL", "10.0.0.2", "timed out"),
        Link("h2", "h1", "agents and NCCL", "10.0.0.2", "timed out"),
        Link("h1", "h0", "agents", "10.0.0.1"),
    ]
    unshared = {"save": {"h1": "does not see it"}, "run-dir": {"h1": "does not see it"}}
    needs = Needs(device="cuda", shared=("save",), ports=(30000,))
    hosts = (facts(ports={"30000": False}), facts(ports={"30000": False}), facts())
    found = {(f.check, f.severity): f for f in judge(examined(*hosts, unshared=unshared, links=links), needs)}
    assert set(found) == {("ports", "error"), ("shared", "error"), ("shared", "warning"), ("reach", "error")}
    assert found["ports", "error"].hosts == ("h0",)  # it is only the first host's that has to be free
    assert found["reach", "error"].hosts == ("h1",)
    assert found["reach", "error"].evidence == "from h0, h2: timed out"
    assert "agents and NCCL" in found["reach", "error"].what


def test_gpus_are_counted_over_all_hosts():
    needs = Needs(device="cuda", num_devices=5)
    assert "needs 5 GPUs, there are 4" in only(judge(examined(facts(), facts()), needs)).what
    assert judge(examined(facts(), facts()), Needs(device="cuda", num_devices=4)) == []
    assert only(judge(examined(facts(), "gone"), needs)).check == "answers"  # who knows what it has


BUSY = [gpu(0), gpu(1), gpu(2, used=70 * GIB, processes=[SMI]), gpu(3, used=70 * GIB)]


@pytest.mark.parametrize(
    ("visible", "used"),
    [
        ("0,1", []), ("GPU-1f,GPU-0", []), ("1", []), ("0,2", [2]), ("GPU-3f00", [3]), ("-1", []), (None, [2, 3]),
    ],
)  # fmt: skip
def test_only_gpus_that_an_agent_would_offer_may_be_in_use_by_nobody_else(visible, used):
    env = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    found = judge(examined(facts(gpus__gpus=BUSY, env=env)), Needs())
    assert [each.what.partition(" is in use")[0] for each in found] == [f"GPU {index}" for index in used]
    assert judge(examined(facts(gpus__gpus=BUSY, env=env)), Needs(device="cpu")) == []


def test_only_gpus_that_an_agent_would_offer_are_counted_and_compared():
    four = [gpu(0), gpu(1), gpu(2, name="other"), gpu(3)]
    shared = facts(gpus__gpus=four, env={"CUDA_VISIBLE_DEVICES": "GPU-3,0"})
    needs = Needs(device="cuda", num_devices=4)
    assert judge(examined(shared, facts()), needs) == []
    found = only(judge(examined(shared), needs))
    assert "needs 4 GPUs, there are 2" in found.what


@pytest.mark.parametrize(
    ("visible", "what", "evidence"),
    [
        ("0,7", "the entry '7' names nothing here", "0=GPU-0f00, 1=GPU-1f00"),
        ("", "CUDA_VISIBLE_DEVICES leaves no GPU", "2 are there"),
    ],
)
def test_a_host_whose_variable_leaves_no_gpus_is_one_error(visible, what, evidence):
    found = only(judge(examined(facts(env={"CUDA_VISIBLE_DEVICES": visible})), Needs(device="cuda")))
    assert (found.check, found.severity, found.hosts) == ("gpus", "error", ("h0",))
    assert what in found.what
    assert evidence in found.evidence


def test_the_same_on_several_hosts_is_one_line_and_errors_come_first():
    def finding(severity, host, evidence):
        return Finding(severity, "disk", (host,), "full", evidence, "free some")

    notes = [
        finding("note", "a", "x"),
        finding("error", "b", "x"),
        finding("error", "c", "y"),
        finding("error", "d", "x"),
    ]
    assert [(f.severity, f.hosts, f.evidence) for f in ordered(notes)] == [
        ("error", ("b", "c", "d"), "b, d: x; c: y"),
        ("note", ("a",), "x"),
    ]


INTERFACES = {
    "lo": ["127.0.0.1"], "docker0": ["172.17.0.1"], "eth0": ["10.0.0.1"], "ib1": ["10.1.0.1"], "eth1": ["fe80::1"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("wanted", "chosen"),
    [
        ("eth", "eth0"), ("=eth", None), ("=eth0", "eth0"), ("^ib,lo", "docker0"), ("^=lo,docker0", "eth0"),
        ("eth1", None), ("bond,ib", "ib1"), ("ib1:1", "ib1"),
    ],
)  # fmt: skip
def test_which_interface_nccl_takes(wanted, chosen):
    assert nccl_interface(INTERFACES, wanted) == chosen


def test_addresses_by_who_would_use_them():
    host = facts(interfaces=INTERFACES)
    own = addresses(host, {}, None, cuda=True)["agents"]
    assert addresses(host, {}, None, cuda=True) == dict.fromkeys(["agents", "NCCL", "gloo"], own)
    chosen = addresses(host, {"GLOO_SOCKET_IFNAME": "ib1", "NCCL_SOCKET_IFNAME": "eth"}, "ib1", cuda=True)
    assert chosen == {"agents": "10.1.0.1", "NCCL": "10.0.0.1", "gloo": "10.1.0.1"}
    assert addresses(host, {}, "eth9", cuda=True) == {}
    on_the_way = facts(interfaces=INTERFACES, reaches_by="10.1.0.1")
    assert addresses(on_the_way, {}, None, cuda=False) == {"agents": "10.1.0.1", "gloo": "10.1.0.1"}
    assert addresses(on_the_way, {}, "eth0", cuda=False)["agents"] == "10.0.0.1"
