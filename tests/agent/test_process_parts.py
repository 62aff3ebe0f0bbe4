from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles_agents.agent import exec_shim
from miles_agents.agent.process_exit import (
    CREDIT_S,
    Exit,
    OomAttribution,
    OomWatch,
    oom_count_file,
    read_oom_count,
)
from miles_agents.agent.process_gpu import NvmlProbe
from miles_agents.agent.process_tree import all_processes, children_of, describe_survivor, read_stat


@given(
    st.lists(st.tuples(st.integers(0, 3), st.booleans(), st.floats(0, 4)), max_size=30),
    st.integers(0, 100),
)
def test_each_counted_kill_explains_at_most_one_exit(exits: list[tuple[int, bool, float]], before: int) -> None:
    attribution = OomAttribution(before)
    count, now, grown_at = before, 0.0, []
    for growth, by_stranger, passed in exits:
        now += passed
        count += growth
        grown_at += [now] * growth
        if attribution.on_exit(count, killed_by_stranger=by_stranger, now=now):
            assert by_stranger
            usable = [at for at in grown_at if now - at <= CREDIT_S]
            assert usable
            grown_at.remove(usable[0])
        elif by_stranger:
            assert not [at for at in grown_at if now - at <= CREDIT_S]


def test_an_exit_is_described_for_people() -> None:
    assert Exit(code=1, signal=None).describe() == "exit code 1"
    assert Exit(None, 6, core_dumped=True).describe() == "killed by SIGABRT (6) (core dumped)"
    assert Exit(None, 9, oom=True).describe() == "killed by SIGKILL (9) (out of memory)"
    assert Exit(None, None).describe() == "exit status unknown"


@pytest.mark.parametrize(
    ("self_cgroup", "file"),
    [
        ("0::/a/b\n", "a/b/memory.events"),
        ("0::/host/path\n", "memory.events"),
        ("5:cpu:/x\n4:memory:/a\n0::/\n", "memory/a/memory.oom_control"),
        ("4:cpu,memory:/host/path\n", "memory/memory.oom_control"),
    ],
)
def test_the_count_of_memory_kills_is_found_in_both_kinds_of_cgroups(
    tmp_path: Path, self_cgroup: str, file: str
) -> None:
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text("oom_kill_disable 0\noom_kill 12\n")
    found = oom_count_file(self_cgroup, tmp_path)
    assert found == tmp_path / file
    assert read_oom_count(found) == 12


def test_where_nothing_can_be_read_no_exit_is_for_memory(tmp_path: Path) -> None:
    assert oom_count_file("0::/a\n", tmp_path) is None
    assert not OomWatch(None).on_exit(killed_by_stranger=True, now=0.0)
    assert not OomWatch(tmp_path / "gone").on_exit(killed_by_stranger=True, now=0.0)


def test_the_shim_reads_the_kernels_cpu_lists() -> None:
    assert exec_shim.parse_cpus("0-3,8,10-11\n") == {0, 1, 2, 3, 8, 10, 11}
    assert exec_shim.parse_cpus("") == set()


def test_proc_is_read_for_this_process_and_for_none() -> None:
    stat = read_stat(os.getpid())
    assert stat is not None
    assert (stat.pid, stat.ppid, stat.session) == (os.getpid(), os.getppid(), os.getsid(0))
    assert stat.id in {other.id for other in all_processes()}
    assert os.getpid() in children_of(os.getppid())
    survivor = describe_survivor(stat.id)
    assert survivor is not None
    assert survivor.describe().startswith(f"pid {os.getpid()} ({stat.name}): state R")
    assert read_stat(2**22 + 1) is None
    assert children_of(2**22 + 1) == []
    assert describe_survivor(stat.id._replace(start_time=0)) is None


class FakeNvml:
    """Three GPUs: two with processes, one that fell off the bus."""

    class NVMLError(Exception):
        pass

    def nvmlInit(self) -> None:
        self.started = True

    def nvmlDeviceGetCount(self) -> int:
        return 3

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetComputeRunningProcesses(self, device: int) -> list[SimpleNamespace]:
        if device == 1:
            raise self.NVMLError
        return [
            SimpleNamespace(pid=10, usedGpuMemory=100),
            SimpleNamespace(pid=11, usedGpuMemory=None),
            SimpleNamespace(pid=12, usedGpuMemory=7),
        ]


def test_gpu_memory_is_summed_over_gpus_for_the_pids_asked_for() -> None:
    nvml = FakeNvml()
    probe = NvmlProbe(nvml)
    assert nvml.started
    assert probe.used_bytes({10, 11, 99}) == {10: 200, 11: 0}
    assert probe.num_faults == 1


class LostDriver(FakeNvml):
    """The driver was reloaded: nothing is answered any more."""

    def nvmlDeviceGetCount(self) -> int:
        raise self.NVMLError("Driver Not Loaded")


def test_a_driver_that_does_not_answer_is_counted_and_told_once(caplog: pytest.LogCaptureFixture) -> None:
    probe = NvmlProbe(LostDriver())
    assert [probe.used_bytes({10}) for _ in range(3)] == [{}, {}, {}]
    assert probe.num_faults == 3
    assert [record.getMessage().count("Driver Not Loaded") for record in caplog.records] == [1]
