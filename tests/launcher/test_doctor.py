"""miles doctor as a person runs it: on this machine, and on hosts that real OpenSSH reaches; the check before a run."""

import asyncio
import json
import logging
import sys

import pytest
from support.host_facts import GIB, examined, facts, path
from support.sshd import ssh_hosts

from miles.training.job import Nodes
from miles_controller import Controller, ControllerConfig
from miles_launcher import doctor
from miles_launcher.local import LocalAgents
from miles_launcher.preflight.before_run import NodesUnfit, checked, refuse_unfit
from miles_launcher.preflight.judge import judge
from miles_launcher.preflight.needs import Needs


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    with ssh_hosts(tmp_path_factory.mktemp("hosts"), ["h1", "h2"]) as made:
        yield made


def run(capsys, *words):
    code = doctor.main(list(words))
    said = capsys.readouterr()
    return code, said.out, said.err


def test_this_machine_is_looked_at(capsys, tmp_path):
    code, out, _ = run(capsys, "--device", "cpu", "--json", "--run-dir", str(tmp_path))
    told = json.loads(out)
    assert [host["name"] for host in told["hosts"]] == ["this machine"]
    assert told["fit"] == (code == 0) == all(each["severity"] != "error" for each in told["findings"])
    assert told["hosts"][0]["facts"]["packages"]["psutil"]
    code, out, _ = run(capsys, "--device", "cpu", "--run-dir", str(tmp_path))
    assert "this machine" in out
    assert "1 host: " in out


@pytest.mark.full
def test_hosts_by_ssh_are_looked_at_together(capsys, hosts, tmp_path):
    words = ["--hosts", "h[1-2],nowhere", "--ssh-config", str(hosts.config), "--remote-python", sys.executable]
    code, out, err = run(capsys, *words, "--device", "cpu", "--run-dir", str(tmp_path / "run"), "--json")
    assert code == 1, err
    told = json.loads(out)
    by_name = {host["name"]: host for host in told["hosts"]}
    assert list(by_name) == ["h1", "h2", "nowhere"]
    assert "nowhere" in by_name["nowhere"]["error"]
    mute = [each for each in told["findings"] if each["check"] == "answers"]
    assert [each["hosts"] for each in mute] == [["nowhere"]]
    assert by_name["h1"]["facts"]["code"] == by_name["h2"]["facts"]["code"] != ""
    links = {(link["source"], link["target"]): link["problem"] for link in told["links"]}
    assert links == dict.fromkeys([("h1", "h2"), ("h2", "h1"), ("h1", "controller"), ("h2", "controller")], "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--hosts", "h[1-"], "a bracket is not closed"),
        (["--hostfile", "/nonexistent"], "it cannot be read"),
        (["--launcher", "ssh"], "no host is named"),
        (["--hosts", "h1", "--hostfile", "/nonexistent"], "--hostfile: --hosts names machines, too"),
        (["--launcher", "local", "--hosts", "h1"], "--hosts: --launcher local is this machine alone"),
        (["--launcher", "slurm", "--hostfile", "f"], "--hostfile: --launcher slurm is the machines of the allocation"),
        (["--launcher", "slurm"], "E-SLURM-001"),
        (["--hosts", "h1", "--no-such-flag"], "--no-such-flag"),
    ],
)
def test_flags_that_cannot_work(capsys, words, said):
    code, out, err = run(capsys, *words)
    assert (code, out) == (2, "")
    assert said in err


CONFIG = {
    "launcher": "local", "skip_preflight": False, "run_dir": "/tmp", "device": "cpu", "debug_rollout_only": True,
    "debug_train_only": True, "colocate": False, "env": {}, "interface": None, "save": None, "load": None,
    "hf_checkpoint": "", "ref_load": None, "prompt_data": None,
}  # fmt: skip


@pytest.mark.full
@pytest.mark.parametrize("missing", [False, True])
async def test_a_run_looks_at_its_nodes_once_they_have_joined(tmp_path, missing):
    prompts = tmp_path / "prompts.jsonl"
    if not missing:
        prompts.write_text("")
    config = {**CONFIG, "run_dir": str(tmp_path), "prompt_data": str(prompts)}

    async def enter(config):
        start = lambda controller, run_dir: LocalAgents(controller, ["a", "b"], run_dir=run_dir)  # noqa: E731
        nodes = checked(Nodes(("a", "b"), start), config)
        async with (
            Controller(ControllerConfig(nodes=nodes.names, status=False)) as controller,
            nodes.start(controller, tmp_path),
        ):
            await controller.wait_for_nodes(timeout_s=60)

    if not missing:
        await enter(config)
        return
    with pytest.raises(NodesUnfit) as error:
        await enter(config)
    assert f"a, b: --prompt-data: not there\n  {prompts}" in error.value.evidence
    assert "--skip-preflight" in error.value.advice
    await enter({**config, "skip_preflight": True})


def test_warnings_are_told_and_errors_refuse(caplog):
    full = examined(facts(paths__save=path(5 * GIB)))
    needs = Needs(device="cuda", written=("save",))
    with caplog.at_level(logging.WARNING):
        refuse_unfit(judge(full, needs))
    assert "h0: --save: 5.00 GiB left" in caplog.text
    with pytest.raises(NodesUnfit):
        refuse_unfit(judge(examined(facts(paths__save=path(1000))), needs))


def test_what_a_run_needs_is_read_from_its_config():
    config = {
        **CONFIG, "device": "cuda", "debug_rollout_only": False, "debug_train_only": False, "world_size": 8,
        "rollout_num_gpus": 4, "train_backend": "megatron", "hf_checkpoint": "/m", "save": "/s", "load": "/s",
        "prompt_data": "/p.jsonl@[0:10]", "sglang_router_port": 3000, "interface": "eth0",
    }  # fmt: skip
    needs = Needs.of(config, {"A": "b"})
    assert needs.num_devices == 12
    assert {"torch", "megatron-core", "sglang", "pyzmq"} <= set(needs.packages)
    assert needs.paths["prompt-data"] == "/p.jsonl"
    assert needs.present == ("hf-checkpoint", "prompt-data")  # --load names what --save will make
    assert needs.shared == ("save", "load")
    assert needs.ports == (3000,)
    assert Needs.of({**config, "colocate": True}, {}).num_devices == 8
    assert "load" in Needs.of({**config, "load": "/other"}, {}).present
    assert Needs.of({**config, "sglang_router_ip": "10.0.0.9"}, {}).ports == ()
    external = Needs.of({**config, "rollout_external": ["http://e"]}, {})
    assert external.num_devices == 8
    assert "sglang" not in external.packages


async def test_an_agent_that_left_is_a_host_that_does_not_answer():
    from miles_launcher.preflight.channel import AgentChannel
    from miles_launcher.preflight.examine import examine

    async with Controller(ControllerConfig(nodes=("a",), status=False)) as controller:
        found = await asyncio.wait_for(examine([AgentChannel(controller, "a")], Needs(device="cpu")), 30)
    assert found.hosts[0].error == "its agent has left"
