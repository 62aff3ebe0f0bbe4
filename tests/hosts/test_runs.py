"""``train.py --hosts`` over three hosts, as a user types it: controller apart or on one, engines beside and across."""

import subprocess

import pytest
from support.host_agents import host_environment
from support.netns import HERE
from support.training_runs import Finished, command, environment

pytestmark = [pytest.mark.full, pytest.mark.needs("hosts"), pytest.mark.timeout(900)]
RUN_S = 800.0
ALL = "node[1-3]"
ROLLOUTS = 2


def train_on(net, tmp_path, *, at=HERE, **flags):
    """Run to the end, from this machine or from one of the hosts."""
    typed = {f"--{name.replace('_', '-')}": value for name, value in flags.items()}
    hosts = {"--hosts": ALL, "--ssh-config": net.ssh_config, "--num-gpus-per-node": 1}
    argv, run_dir = command(tmp_path, {**hosts, "--check-weight-update-equal": True, **typed})
    if at != HERE:
        argv = net[at].command(["sh", "-c", f'cd {tmp_path} && exec "$@"', "sh", *argv])
    env = {**host_environment(), **environment()}
    env.pop("XDG_RUNTIME_DIR", None)
    done = subprocess.run(
        argv, cwd=tmp_path, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, timeout=RUN_S, check=False,
    )  # fmt: skip
    return Finished(done.returncode, done.stdout, run_dir)


def assert_right(done):
    """Every update reached all engines as it was, they compute what the trainer does, and the trainer trains. That this
    lets a reward rise is shown on one machine."""
    assert done.code == 0, done.output
    checked = [f"weight version {version} checked" in done.output for version in range(1, ROLLOUTS + 3)]
    assert checked == [True] * (ROLLOUTS + 1) + [False], done.output
    rows = done.rows()
    assert [row["rollout/weight_version/mean"] for row in rows] == list(range(1, ROLLOUTS + 1))
    assert max(row["train/train_rollout_logprob_abs_diff"] for row in rows) < 1e-4
    assert min(row["train/grad_norm"] for row in rows) > 0


def logs_by_host(done, net):
    """What had a log on which host."""
    found = {name: done.run_dir / "logs" / name for name in net.hosts}
    return {name: {path.name for path in folder.iterdir()} for name, folder in found.items() if folder.is_dir()}


def test_a_trainer_over_two_hosts_and_an_engine_on_the_third_with_the_controller_apart(tmp_path, net):
    done = train_on(net, tmp_path, num_rollout=ROLLOUTS, actor_num_nodes=2)
    assert_right(done)
    logs = logs_by_host(done, net)
    assert all(any("trainer" in name for name in logs[host]) for host in ("node1", "node2"))
    assert "router.log" in logs["node1"] and "engine-0.log" in logs["node3"]
    assert [host.processes() for host in net.hosts.values()] == [[], [], []]


@pytest.mark.long
def test_a_trainer_on_one_host_and_engines_on_two_others(tmp_path, net):
    done = train_on(net, tmp_path, num_rollout=ROLLOUTS, rollout_num_gpus=2)
    assert_right(done)
    logs = logs_by_host(done, net)
    assert any("trainer" in name for name in logs["node1"]) and "router.log" in logs["node1"]
    assert "engine-0.log" in logs["node2"] and "engine-1.log" in logs["node3"]


@pytest.mark.long
def test_an_engine_that_spans_two_hosts_with_the_controller_on_the_third(tmp_path, net):
    done = train_on(net, tmp_path, at="node1", num_rollout=ROLLOUTS, rollout_num_gpus=2, rollout_num_gpus_per_engine=2)
    assert_right(done)
    logs = logs_by_host(done, net)
    assert "engine-0.log" in logs["node2"] and "engine-0.log" in logs["node3"]
    assert "router.log" in logs["node1"]
    assert [host.processes() for host in net.hosts.values()] == [[], [], []]


@pytest.mark.long
def test_two_hosts_of_which_each_trains_and_generates(tmp_path, net):
    done = train_on(
        net,
        tmp_path,
        hosts="node1,node2",
        num_rollout=ROLLOUTS,
        actor_num_nodes=2,
        colocate=True,
        rollout_num_gpus=None,
    )
    assert_right(done)
    logs = logs_by_host(done, net)
    assert all({"engine-0.log", "engine-1.log"} & logs[host] for host in ("node1", "node2"))
