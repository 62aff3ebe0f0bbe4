"""Agents on hosts that real OpenSSH reaches: joining, faults, and that nothing is left on any host whatever dies."""

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from support.procs import eventually
from support.ssh_cluster import Asked, machines, processes_of, ssh_cluster
from support.sshd import ssh_hosts

from miles_launcher.host_life import Phase
from miles_launcher.ssh_errors import CodeNotCopied, HostsFailed, NotShared
from miles_launcher.ssh_start import Machine

pytestmark = [pytest.mark.full, pytest.mark.needs("ssh")]
LONG_S = 120.0
ASKED = "support.ssh_cluster:Asked"


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    """Three hosts, for all tests here; in the end nothing runs on them."""
    folder = tmp_path_factory.mktemp("hosts")
    with ssh_hosts(folder, ["h1", "h2", "h3"]) as made:
        yield made
    left = processes_of(folder)
    for process in left:
        process.kill()
    assert left == []


async def gone(hosts):
    """Until nothing of ours runs on any host."""
    await eventually(lambda: not processes_of(hosts.folder), LONG_S, what="hosts without processes of ours")


async def test_hosts_join_with_what_is_theirs_and_nothing_is_left_of_them(hosts, tmp_path):
    first = Machine("h1", "h1", slots=3, env={"NOTE": "of h1"})
    async with ssh_cluster(tmp_path / "run", hosts.config, [first, *machines("h2")], env={"ALL": "x y"}) as (
        controller,
        agents,
    ):
        assert {node.name: node.info.cpu_slots for node in controller.fabric.nodes} == {"h1": 3, "h2": 2}
        assert list(agents.report.joined) == ["h1", "h2"]
        assert controller.address_of("h2") == "127.0.0.1"
        mesh = await controller.spawn("asked", Asked, dims={"hosts": 2, "gpus": 1})
        for name, told in {"NOTE": ["of h1", ""], "ALL": ["x y"] * 2, "GLOO_SOCKET_IFNAME": ["lo"] * 2}.items():
            assert list((await mesh.variable.call(name)).values) == told, name
        for process in processes_of(hosts.folder):  # the key and the environment are on no command line
            assert not any("x y" in word or "secret" in word for word in process.cmdline())
    assert {agents.phase(name) for name in ("h1", "h2")} == {Phase.GONE}
    assert not [name for name in os.listdir(tmp_path / "run") if name.startswith(".miles-shared")]
    await gone(hosts)


def faulty(hosts, tmp_path, closed):
    """Hosts that fail each in a way of its own, and the configuration that knows them."""
    port = hosts.hosts["h1"].port
    here = f"    HostName 127.0.0.1\n    Port {port}\n"
    (tmp_path / "none").write_text("")
    stranger = tmp_path / "stranger"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(stranger)], check=True)
    hosts.write_config(
        f"Host closed\n    HostName 127.0.0.1\n    Port {closed}\n",
        "Host nowhere\n    HostName no.such.host.invalid\n",
        f"Host unknown\n{here}    UserKnownHostsFile {tmp_path}/none\n",
        f"Host locked\n{here}    IdentityFile {stranger}\n    IdentitiesOnly yes\n",
        f"Host bare\n{here}",
        f"Host crash\n{here}",
    )
    crash = tmp_path / "crash"
    crash.write_text("#!/bin/sh\necho something broke >&2\nexit 7\n")
    crash.chmod(0o755)
    bare = Machine("bare", "bare", python="/no/such/python")
    return [*machines("closed", "nowhere", "unknown", "locked"), bare, Machine("crash", "crash", python=str(crash))]


async def test_hosts_that_fail_are_named_each_with_its_reason_and_the_others_are_cleaned_up(hosts, tmp_path):
    bound = socket.socket()  # which does not listen
    bound.bind(("127.0.0.1", 0))
    try:
        # The key of the hosts' user is offered before the stranger's unless it is not named for them all.
        failing = faulty(hosts, tmp_path, bound.getsockname()[1])
        config = hosts.config.read_text().replace("Host *\n", "Host * !locked\n")
        locked = f"Host locked\n    UserKnownHostsFile {hosts.folder}/known_hosts\n    StrictHostKeyChecking yes\n"
        hosts.config.write_text(config + locked)
        with pytest.raises(HostsFailed) as caught:
            async with ssh_cluster(tmp_path / "run", hosts.config, [*machines("h1"), *failing]):
                pytest.fail("was entered")
    finally:
        bound.close()
        hosts.write_config()
    assert caught.value.what == "6 of 7 hosts cannot be used"
    assert caught.value.fields["hosts"] == sorted(machine.name for machine in failing)
    told = {line.partition(":")[0]: line for line in caught.value.evidence.splitlines()}
    for name, words in {
        "closed": "E-SSH-001", "nowhere": "E-SSH-001", "unknown": "E-SSH-003", "locked": "E-SSH-002",
        "bare": "E-SSH-004", "crash": "E-SSH-008]: something broke",
    }.items():  # fmt: skip
        assert words in told[name], told[name]
    await gone(hosts)


async def test_an_ssh_that_is_killed_ends_nothing(hosts, tmp_path, caplog):
    async with ssh_cluster(tmp_path / "run", hosts.config, machines("h1", "h2")) as (controller, agents):
        mesh = await controller.spawn("asked", Asked, dims={"hosts": 2, "gpus": 1})
        agents.agents["h1"].process.kill()
        await eventually(lambda: agents.phase("h1") is Phase.LINK_LOST, LONG_S)
        homes = [str(hosts.hosts[name].home) for name in ("h1", "h2")]
        assert list((await mesh.variable.call("HOME")).values) == homes
        assert len(controller.fabric.nodes) == 2
    assert "its agent goes on" in caplog.text
    await gone(hosts)


async def test_an_agent_that_is_killed_is_dead_by_its_reapers_word(hosts, tmp_path):
    async with ssh_cluster(tmp_path / "run", hosts.config, machines("h1", "h2")) as (controller, agents):
        await controller.spawn("asked", Asked, dims={"hosts": 2, "gpus": 1})
        (agent,) = psutil.Process(agents.facts("h1")["reaper"]).children()
        agent.kill()
        event = await controller.wait_for_event(
            lambda event: event.subject == "h1" and "says that nothing is left" in event.text + str(event.fields),
            timeout_s=LONG_S,
        )
        assert event is not None
        await eventually(lambda: agents.phase("h1") is Phase.GONE, LONG_S)
        assert [node.name for node in controller.fabric.nodes] == ["h2"]
    await gone(hosts)


CONTROLLER = """
import asyncio, sys
from pathlib import Path
sys.path.insert(0, sys.argv[4])
from support.ssh_cluster import Asked, machines, ssh_cluster

async def main():
    run_dir, config = Path(sys.argv[1]), Path(sys.argv[2])
    copies = sys.argv[3] == "copies"
    async with ssh_cluster(run_dir, config, machines("h1", "h2"), copies_code=copies) as (controller, agents):
        if not copies:
            await controller.spawn("asked", Asked, dims={"hosts": 2, "gpus": 1})
        (run_dir / "up").touch()
        await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.mark.parametrize("code", ["shared", "copies"])
async def test_a_controller_that_is_killed_leaves_nothing_on_its_hosts(hosts, tmp_path, code):
    run_dir = tmp_path / "run"
    command = [sys.executable, "-c", CONTROLLER, str(run_dir), str(hosts.config), code, str(Path(__file__).parents[1])]
    controller = subprocess.Popen(command, cwd=tmp_path)  # noqa: ASYNC220
    try:
        await eventually(lambda: (run_dir / "up").exists() or controller.poll() is not None, LONG_S)
        assert controller.poll() is None
        assert len(processes_of(hosts.folder)) >= 4
    finally:
        controller.send_signal(signal.SIGKILL)
        controller.wait()
    await gone(hosts)
    left = [path for host in hosts.hosts.values() for path in (host.home / ".cache/miles/code").glob("*")]
    assert left == []


async def test_copied_code_is_what_runs_and_is_removed(hosts, tmp_path, monkeypatch):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "of_the_user.py").write_text("WORD = 1\n")
    (mine / "weights.bin").write_text("not code")
    monkeypatch.chdir(mine)
    code = hosts.hosts["h1"].home / ".cache/miles/code"
    async with ssh_cluster(tmp_path / "run", hosts.config, machines("h1"), copies_code=True) as (controller, _):
        mesh = await controller.spawn("asked", ASKED)
        for module, place in {
            "miles_agents": "lib/miles_agents/__init__.py",
            "of_the_user": "cwd/of_the_user.py",
        }.items():
            found = Path(await mesh.file_of.call_one(module))
            assert found.is_relative_to(code)
            assert str(found).endswith(place)
        (directory,) = code.iterdir()
        assert {name for name in os.listdir(directory / "cwd") if name != "__pycache__"} == {"of_the_user.py"}
    await eventually(lambda: not list(code.iterdir()), LONG_S)
    await gone(hosts)


async def test_a_host_without_rsync_cannot_be_given_code(hosts, tmp_path):
    host = hosts.hosts["h3"]
    bare = tmp_path / "bin"
    bare.mkdir()
    (bare / "sh").symlink_to(shutil.which("sh"))
    host.set_path(str(bare))
    with pytest.raises(CodeNotCopied, match="h3: the code cannot be copied"):
        async with ssh_cluster(tmp_path / "run", hosts.config, machines("h3"), copies_code=True):
            pytest.fail("was entered")
    assert not (host.home / ".cache/miles/code").exists()
    await gone(hosts)


async def test_directories_that_have_to_be_shared_are_looked_for_on_all_hosts(hosts, tmp_path):
    unseen = Path("/proc/self/task")  # cannot hold a token, so no host can show that it sees it
    with pytest.raises(NotShared, match="not all hosts see the same directories") as caught:
        async with ssh_cluster(
            tmp_path / "run", hosts.config, machines("h1"), must_share={"--save": unseen, "--load": tmp_path}
        ):
            pytest.fail("was entered")
    assert caught.value.evidence == f"--save {unseen}: another directory on h1"
    await gone(hosts)


async def test_a_start_that_is_cancelled_leaves_nothing(hosts, tmp_path):
    hosts.write_config(f"Host slow\n    HostName 127.0.0.1\n    Port {hosts.hosts['h2'].port}\n")
    waits = tmp_path / "waits"
    waits.write_text("#!/bin/sh\nexec sleep 1000\n")
    waits.chmod(0o755)
    run_dir = tmp_path / "run"

    async def start():
        slow = Machine("slow", "slow", python=str(waits))
        async with ssh_cluster(run_dir, hosts.config, [*machines("h1"), slow], grace_s=1.0):
            pytest.fail("was entered")

    task = asyncio.create_task(start())
    await eventually(lambda: len(processes_of(hosts.folder)) >= 3 or task.done(), LONG_S)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    hosts.write_config()
    for process in processes_of(hosts.folder):
        if process.name() == "sleep":  # it is not ours, and sshd ends nobody who keeps no pipe
            process.kill()
    await gone(hosts)
