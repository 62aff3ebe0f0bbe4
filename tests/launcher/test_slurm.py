"""Runs below a real Slurm of several nodes on this machine: agents by srun, job scripts, and every way to the end."""

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from support import leaks
from support.procs import eventually_sync
from support.recorded_rollouts import write_rollouts
from support.slurm_cluster import slurm_cluster
from support.slurm_holder import config
from support.training_runs import RUN_S, command, environment

from miles.flags.slurm_facts import slurm_facts
from miles.tracking.metrics_file import read_metrics
from miles_agents.errors import MilesError
from miles_agents.runtime_dir import sweep
from miles_controller import Controller, ControllerConfig
from miles_launcher.launchers import agent_environment
from miles_launcher.slurm import NoAllocation, StepEnded, found_allocation, nodes_by_slurm

TESTS = Path(__file__).parents[1]
PATH = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH", "")]))
WAIT_S = 90.0

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def cluster(tmp_path_factory, leaves_nothing_behind):
    with slurm_cluster(tmp_path_factory.mktemp("slurm")) as found:
        yield found
    sweep()  # an agent that was killed could not remove its runtime directory


@pytest.fixture
def allocation(cluster):
    """Three whole nodes: the environment of a shell of salloc."""
    granted = cluster.run("salloc", "--nodes=3", "--exclusive", "--no-shell", "--job-name=by-hand")
    job = granted.stderr.rpartition(" ")[2].strip()
    assert job.isdecimal(), granted.stderr
    told = dict(word.partition("=")[::2] for word in cluster.run("scontrol", "-o", "show", "job", job).stdout.split())
    yield {
        **cluster.env, "SLURM_JOB_ID": job, "SLURM_JOB_NODELIST": told["NodeList"], "PYTHONPATH": PATH,
        "SLURM_JOB_CPUS_PER_NODE": "4(x3)",
    }  # fmt: skip
    cluster.run("scancel", job)
    eventually_sync(lambda: cluster.job_state(job)[0] == "CANCELLED", WAIT_S)
    eventually_sync(lambda: set(cluster.states().values()) == {"idle"}, WAIT_S)


@pytest.fixture
def in_allocation(allocation):
    before = dict(os.environ)
    os.environ.update(allocation)
    yield allocation
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def hold(cluster, tmp_path):
    """Submits a job that holds three nodes; returns its id, once it has ranks on all of them, and what they told."""
    jobs = []

    def submit(*options):
        out, script = tmp_path / "seen.json", tmp_path / "job.sh"
        words = [sys.executable, str(TESTS / "support" / "slurm_holder.py"), str(out), str(tmp_path / "run")]
        script.write_text(f"#!/bin/bash\nexec {' '.join(words)}\n")
        flags = ["--nodes=3", "--exclusive", "--no-kill", "--no-requeue", f"--output={tmp_path / 'job.log'}", *options]
        done = cluster.run("sbatch", "--parsable", f"--chdir={tmp_path}", *flags, str(script), PYTHONPATH=PATH)
        assert done.returncode == 0, done.stderr
        jobs.append(done.stdout.strip())

        def ready():
            state = cluster.job_state(jobs[-1])
            assert state[0] in ("PENDING", "CONFIGURING", "RUNNING"), (state, (tmp_path / "job.log").read_text())
            return out.exists()

        eventually_sync(ready, WAIT_S)
        return jobs[-1], json.loads(out.read_text())

    yield submit
    for job in jobs:
        cluster.run("scancel", job)
        ended(cluster, job)


def ended(cluster, job, timeout_s=WAIT_S):
    """State and exit code of a job, once nothing of it is left."""
    going_on = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING")
    eventually_sync(lambda: cluster.job_state(job)[0] not in going_on, timeout_s, what=f"job {job} ends")
    eventually_sync(lambda: ours() == [], WAIT_S, what="nothing is left")
    return cluster.job_state(job)


def ours():
    """Agents, ranks, controllers and their srun: everything of a run that this test session started."""
    words = ("miles_launcher.cli", "miles_agents", "slurm_holder", "reaper.py", "train.py")
    return [line for line in leaks.processes() if any(word in line for word in words)]


async def test_an_agent_joins_from_each_node_and_ranks_run_there(in_allocation, tmp_path):
    nodes = nodes_by_slurm(config(), agent_environment(config()))
    assert nodes.names == ("n1", "n2", "n3")
    async with Controller(ControllerConfig(bind=nodes.bind, nodes=nodes.names, status=False)) as controller:
        keys = {name: json.loads(controller.issue_key(name)) for name in nodes.names}
        async with nodes.start(controller, tmp_path) as agents:
            assert [node.info.devices for node in controller.fabric.nodes] == [(0,)] * 3
            mesh = await controller.spawn("sees", "support.slurm_holder:Sees", dims={"hosts": 3})
            seen = (await mesh.where.call()).values
            assert sorted(node for node, _, _ in seen) == ["n1", "n2", "n3"]
            assert {where for _, _, where in seen} == {os.getcwd()}
            secrets = [value for key in keys.values() for name, value in key.items() if "secret" in name]
            assert len(secrets) == 3
            told = await asyncio.to_thread(everything_that_others_can_read)
            assert not any(secret in told for secret in secrets)
        assert {name: step.exited.result() for name, step in agents.steps.items()} == dict.fromkeys(nodes.names, 0)
        assert controller.fabric.nodes == []
    assert ours() == []


def kill_the_only(is_meant):
    """The process of this test session whose command line is meant; srun has a thread-like child of the same one."""
    mark = f"{leaks.MARK}={os.environ[leaks.MARK]}".encode()
    found = []
    for process in psutil.process_iter(["cmdline"]):
        try:
            if process.info["cmdline"] and is_meant(process.info["cmdline"]) and mark in environ_of(process.pid):
                found.append(process)
        except psutil.Error:
            continue
    (oldest,) = [process for process in found if process.parent() not in found]
    oldest.kill()


def environ_of(pid):
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return []


def everything_that_others_can_read():
    """Command lines of all processes, and Slurm's record of steps."""
    lines = [" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])]
    steps = subprocess.run(["scontrol", "show", "step"], capture_output=True, text=True, check=True)
    return "\n".join([*lines, steps.stdout])


async def test_nodes_that_cannot_be_used_are_named_with_the_reason_and_the_others_are_ended(in_allocation, tmp_path):
    wrong = config(machines=[{"name": "n1"}, {"name": "n7"}])
    nodes = nodes_by_slurm(wrong, agent_environment(wrong))
    async with Controller(ControllerConfig(bind=nodes.bind, nodes=nodes.names, status=False)) as controller:
        with pytest.raises(StepEnded) as error:
            async with nodes.start(controller, tmp_path):
                raise AssertionError("not reached")
        assert error.value.what.startswith("srun of n7 exited with code 1")
        assert "srun: error: Unable to create step" in error.value.evidence
    assert ours() == []


def test_without_an_allocation_or_srun_it_says_what_is_missing():
    for environ, word in (
        ({}, "SLURM_JOB_ID"),
        ({"SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "n[1-"}, "n[1-"),
        ({"SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "n1", "PATH": "/nonexistent"}, "no srun"),
    ):
        with pytest.raises(NoAllocation) as error:
            found_allocation(environ)
        assert word in error.value.evidence


def goodbyes(run_dir):
    """Nodes that left in good order."""
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    return sorted(e["subject"] for e in events if e["kind"] == "node_gone" and "goodbye" in e["text"])


def test_a_job_of_miles_submit_trains_on_two_nodes(cluster, tmp_path):
    recorded = write_rollouts(tmp_path / "recorded", rollouts=1)
    argv, run_dir = command(
        tmp_path,
        {
            "--debug-train-only": True, "--load-debug-rollout-data": recorded, "--num-rollout": 1,
            "--train-backend": "fsdp", "--actor-num-nodes": 2, "--rollout-num-gpus": None, "--device": "cpu",
        },
    )  # fmt: skip
    log = tmp_path / "job.log"
    submit = [sys.executable, "-m", "miles_launcher.cli", "submit", "--exclude", "n2", f"--output={log}"]
    done = subprocess.run(
        [*submit, *argv[2:]], env={**environment(), **cluster.env, "PYTHONPATH": environment()["PYTHONPATH"]},
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    job = done.stdout.strip().rpartition(" ")[2]
    assert ended(cluster, job, RUN_S) == ("COMPLETED", "0:0"), log.read_text()
    assert [row["rollout_id"] for row in read_metrics(run_dir / "metrics.jsonl") if row["event"] == "rollout"] == [0]
    assert {path.name for path in (run_dir / "logs").iterdir() if path.is_dir()} == {"n1", "n3"}
    assert list((run_dir / "logs" / "n3").glob("trainer-1.*"))


def test_a_job_that_is_cancelled_ends_in_good_order(cluster, hold, tmp_path):
    job, seen = hold()
    assert sorted(node for node, _, _ in seen) == ["n1", "n2", "n3"]
    cluster.run("scancel", job)
    assert ended(cluster, job)[0] == "CANCELLED"
    assert goodbyes(tmp_path / "run") == ["n1", "n2", "n3"]


def test_nothing_is_left_of_a_job_whose_controller_is_killed(cluster, hold):
    job, _ = hold()
    kill_the_only(lambda words: len(words) > 1 and words[1].endswith("slurm_holder.py"))
    assert ended(cluster, job) == ("FAILED", "0:9")


@pytest.mark.long
@pytest.mark.parametrize("what", ["its srun is killed", "its power goes"])
def test_a_node_that_is_lost_ends_the_job_with_the_reason(cluster, hold, tmp_path, what):
    job, _ = hold()
    if what == "its power goes":
        cluster.kill_node("n2")
    else:
        kill_the_only(lambda words: words[0] == "srun" and "--nodelist=n2" in words)  # Slurm ends its step then
    assert ended(cluster, job)[0] in ("FAILED", "NODE_FAIL")
    assert "n2 is gone" in (tmp_path / "job.log").read_text()
    if what == "its power goes":
        cluster.start_node("n2")
    eventually_sync(lambda: set(cluster.states().values()) == {"idle"}, WAIT_S)


@pytest.mark.long
def test_a_job_whose_time_is_over_ends_in_good_order(cluster, hold, tmp_path):
    job, _ = hold("--time=1")
    assert ended(cluster, job)[0] == "TIMEOUT"
    assert goodbyes(tmp_path / "run") == ["n1", "n2", "n3"]


def test_miles_doctor_asks_the_nodes_of_the_allocation(in_allocation, tmp_path):
    command = [sys.executable, "-m", "miles_launcher.cli", "doctor", "--json", "--device", "cpu", "--run-dir", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    told = json.loads(done.stdout)
    assert [host["name"] for host in told["hosts"]] == ["n1", "n2", "n3"]
    assert all(host["facts"]["code"] for host in told["hosts"])
    assert {(link["source"], link["target"]) for link in told["links"]} >= {("n1", "n2"), ("n3", "controller")}
    errors = [finding for finding in told["findings"] if finding["severity"] == "error"]
    assert (done.returncode, told["fit"]) == ((1, False) if errors else (0, True))
    assert [error["check"] for error in errors if error["check"] in ("answers", "code", "reach", "shared")] == []


def test_slurm_facts_are_read_from_the_environment():
    environ = {
        "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "a[01-02],b9", "SLURM_JOB_CPUS_PER_NODE": "8(x2),4",
        "SLURM_GPUS_PER_NODE": "h100:8", "SLURMD_NODENAME": "a01",
    }  # fmt: skip
    found = slurm_facts(environ)
    assert (found.job, found.nodes, found.here) == ("7", ("a01", "a02", "b9"), "a01")
    assert [found.cpus_of(node) for node in (*found.nodes, "c")] == [8, 8, 4, None]
    assert found.gpus_of("a01") == 8
    assert slurm_facts({}).nodes == ()
    assert slurm_facts({**environ, "SLURM_JOB_CPUS_PER_NODE": "8"}).cpus_of("a01") is None
    assert issubclass(NoAllocation, MilesError)
