"""Faults that no real ssh shows on demand: a program named ssh that runs what it is given here, or does not."""

import pytest
from support.procs import eventually
from support.ssh_cluster import Asked, machines, processes_of, ssh_cluster

from miles_launcher.bounded_start import StartTooSlow
from miles_launcher.host_life import Phase
from miles_launcher.ssh_errors import HostEnded, HostUnreachable

pytestmark = pytest.mark.full
LONG_S = 120.0

SSH = """#!/bin/bash
export HOME={home}
words="${{@: -1}}"
host="${{@: -2:1}}"
{act}
"""
HERE = 'exec sh -c "$words"'
BANNER = 'printf "Welcome to $host\\nmiles-0 {{}}\\n\\nno end of line"; ' + HERE
HANGS = 'echo "debug: connected" >&2; exec sleep 1000'
REFUSES = 'echo "ssh: connect to host $host port 22: Connection refused" >&2; exit 255'
DIES = 'head -c 300 > /dev/null; echo "client_loop: send disconnect: Broken pipe" >&2; exit 255'


@pytest.fixture
def fake_ssh(tmp_path, monkeypatch):
    """Puts it on PATH: what each host does, by its name; the others run here."""
    home, bin_ = tmp_path / "home", tmp_path / "bin"
    home.mkdir()
    bin_.mkdir()
    monkeypatch.setenv("PATH", str(bin_), prepend=":")

    def put(**acts):
        cases = "".join(f"  {name}) {act};;\n" for name, act in acts.items())
        script = bin_ / "ssh"
        script.write_text(SSH.format(home=home, act=f'case "$host" in\n{cases}  *) {HERE};;\nesac'))
        script.chmod(0o755)

    yield put
    for process in processes_of(home):
        process.kill()


async def test_what_login_shells_print_harms_nobody(fake_ssh, tmp_path):
    fake_ssh(a=BANNER.replace("{{}}", "{}"))
    async with ssh_cluster(tmp_path / "run", None, machines("a")) as (controller, agents):
        assert agents.phase("a") is Phase.JOINED
        assert [node.name for node in controller.fabric.nodes] == ["a"]
    assert agents.phase("a") is Phase.GONE
    await eventually(lambda: not processes_of(tmp_path / "home"), LONG_S)


async def test_a_host_that_hangs_is_given_up_after_its_time_with_what_it_said_last(fake_ssh, tmp_path):
    fake_ssh(a=HANGS)
    with pytest.raises(StartTooSlow, match=r"a has not joined within 0\.5 s") as caught:
        async with ssh_cluster(tmp_path / "run", None, machines("a"), timeout_s=0.5):
            pytest.fail("was entered")
    assert "waiting for ssh and Python" in caught.value.evidence
    await eventually(lambda: not processes_of(tmp_path / "home"), LONG_S)


@pytest.mark.parametrize(
    ("act", "kind", "words"),
    [(REFUSES, HostUnreachable, "Connection refused"), (DIES, HostUnreachable, "Broken pipe")],
)
async def test_an_ssh_that_ends_is_told_with_its_last_words(fake_ssh, tmp_path, act, kind, words):
    fake_ssh(a=act)
    with pytest.raises(kind, match="a: ssh does not get through") as caught:
        async with ssh_cluster(tmp_path / "run", None, machines("a")):
            pytest.fail("was entered")
    assert words in caught.value.evidence
    assert "ssh exited with code 255" in caught.value.evidence


async def test_an_agent_that_refuses_its_flags_is_told_with_its_own_error(fake_ssh, tmp_path):
    fake_ssh()
    with pytest.raises(HostEnded, match="ended before its agent had joined") as caught:
        async with ssh_cluster(tmp_path / "run", None, machines("a"), slots=-1):
            pytest.fail("was entered")
    assert "--cpu-slots -1 is no number of slots" in caught.value.evidence
    await eventually(lambda: not processes_of(tmp_path / "home"), LONG_S)


async def test_slots_of_a_host_are_its_first_gpus_where_models_run_on_gpus(fake_ssh, tmp_path):
    fake_ssh()
    hosts = [*machines("a"), *machines("b", slots=1), *machines("c", env={"CUDA_VISIBLE_DEVICES": "7"})]
    async with ssh_cluster(tmp_path / "run", None, hosts, on_gpus=True) as (controller, _):
        mesh = await controller.spawn("asked", Asked, dims={"hosts": 3, "gpus": 1})
        assert list((await mesh.variable.call("CUDA_VISIBLE_DEVICES")).values) == ["0,1", "0", "7"]
    await eventually(lambda: not processes_of(tmp_path / "home"), LONG_S)
