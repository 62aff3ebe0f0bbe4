"""The preflight check against real probes: processes that are sent to a Python, and what they find of each other."""

import asyncio
import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from support.procs import eventually

from miles_agents import probe
from miles_agents.agent.inventory import interface_addresses
from miles_launcher.preflight.channel import NoAnswer, ProcessChannel
from miles_launcher.preflight.examine import _pairs, examine
from miles_launcher.preflight.judge import judge
from miles_launcher.preflight.needs import Needs

NOISE = "import sys; print('Welcome to this host'); sys.stdout.flush(); exec(sys.argv.pop())"


def here(arguments):
    return [sys.executable, *arguments]


def noisy(arguments):
    """A login script that greets."""
    return [sys.executable, "-u", "-c", NOISE, arguments[-1]]


def without_ours(arguments):
    """A Python that has no package at all."""
    return [sys.executable, "-I", "-S", *arguments]


def _greet_nobody(server):
    server.accept()[0].close()


def broken(arguments):
    return ["sh", "-c", "echo no such host >&2; exit 255"]


def mute(arguments):
    return [sys.executable, "-c", "import time; time.sleep(600)"]


async def test_real_hosts_are_looked_at_in_parallel_and_each_ones_fault_is_its_own(tmp_path):
    (tmp_path / "model").mkdir()
    paths = {"save": str(tmp_path / "not" / "yet"), "model": str(tmp_path / "model"), "data": str(tmp_path / "none")}
    needs = Needs(device="cpu", paths=paths, shared=("save",), present=("model", "data"), written=("save",))
    channels = [ProcessChannel("a", here), ProcessChannel("b", noisy), ProcessChannel("c", broken)]
    channels.append(ProcessChannel("d", without_ours))
    found = await examine(channels, needs)
    by_name = {host.name: host for host in found.hosts}
    assert list(by_name) == ["a", "b", "c", "d"]
    assert "no such host" in by_name["c"].error
    for name in "abd":
        assert by_name[name].facts["host"]["hostname"] == socket.gethostname()
        assert by_name[name].facts["faults"] == {}
        assert abs(by_name[name].clock_s) <= by_name[name].clock_error_s + 0.1
    assert by_name["a"].facts["code"] == by_name["b"].facts["code"] == probe.code_hash()
    assert by_name["d"].facts["code"] == ""
    assert found.unshared == {}
    assert list(tmp_path.rglob("*")) == [tmp_path / "model"]  # what was written is removed, and no directory made
    checks = {(each.check, each.hosts) for each in judge(found, needs)}
    assert {("answers", ("c",)), ("code", ("d",)), ("packages", ("d",)), ("paths", ("a", "b", "d"))} <= checks
    assert {(link.source, link.target) for link in found.links} == {(a, b) for a in "abd" for b in "abd" if a != b}
    assert [link.problem for link in found.links] == [""] * len(found.links)


async def test_a_directory_that_is_not_shared_is_found(tmp_path):
    """Each host sees another one below the same path, as with local disks."""

    class Elsewhere(ProcessChannel):
        async def ask(self, do, timeout_s, **details):
            if do != "facts" and "path" in details:
                details["path"] = details["path"].replace("/shared/", f"/{self.name}/")
            if do == "read":
                details["patience_s"] = 0.1
            return await super().ask(do, timeout_s, **details)

    for name in ("shared", "a", "b"):
        (tmp_path / name).mkdir()
    needs = Needs(device="cpu", paths={"save": str(tmp_path / "shared")}, shared=("save",), written=("save",))
    found = await examine([Elsewhere("a", here), Elsewhere("b", here)], needs)
    assert list(found.unshared) == ["save"]
    assert list(found.unshared["save"]) == ["b"]
    assert "does not see what a wrote there" in found.unshared["save"]["b"]
    assert any(each.check == "shared" and each.severity == "error" for each in judge(found, needs))


async def test_a_host_that_says_nothing_is_ended_with_its_deadline():
    channel = ProcessChannel("slow", mute)
    with pytest.raises(NoAnswer) as error:
        await channel.ask("facts", 0.2)
    assert "nothing within 0.2 s" in error.value.evidence
    assert channel._process.returncode is not None


async def test_a_probe_ends_with_its_stdin():
    channel = ProcessChannel("a", here)
    assert "now" in await channel.ask("clock", 30)
    process = channel._process
    process.stdin.close()
    await eventually(lambda: process.returncode is not None)
    assert process.returncode == 0
    await channel.close()


async def test_another_program_at_an_address_and_nobody_at_all_are_told_apart():
    channel = ProcessChannel("a", here)
    with socket.create_server(("127.0.0.1", 0)) as other, socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        server = asyncio.to_thread(_greet_nobody, other)
        peers = [
            {"name": "wrong", "address": "127.0.0.1", "port": other.getsockname()[1], "token": "t"},
            {"name": "none", "address": "127.0.0.1", "port": unused.getsockname()[1], "token": "t"},
        ]
        answer, _ = await asyncio.gather(channel.ask("connect", 30, peers=peers), server)
    await channel.close()
    assert answer["peers"]["wrong"] == "another program answers at this address and port"
    assert "refused" in answer["peers"]["none"]


def test_questions_that_cannot_be_answered_are_answered_with_the_reason(tmp_path):
    asked = probe.Probe()
    assert "FileExistsError" in asked.answer({"do": "write", "path": str(tmp_path), "text": ""})["error"]
    assert "FileNotFoundError" in asked.answer({"do": "read", "path": str(tmp_path / "x"), "patience_s": 0})["error"]
    assert "KeyError" in asked.answer({"do": "dance"})["error"]
    assert "TypeError" in asked.answer({"do": "clock", "more": 1})["error"]


def test_the_probe_needs_nothing_but_python():
    program = f"{Path(probe.__file__).read_text()}\nsys.modules.update(psutil=None, msgpack=None)"
    imported = "import sys; before = set(sys.modules); exec(sys.stdin.read(), {'__name__': 'probe'}); "
    imported += "print([m for m in set(sys.modules) - before if m.partition('.')[0] not in sys.stdlib_module_names])"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", imported], input=program, capture_output=True, text=True, timeout=60,
        check=True,
    )  # fmt: skip
    assert sorted(json.loads(done.stdout.replace("'", '"'))) == ["msgpack", "psutil"]  # those that were put there


def test_interfaces_are_those_that_psutil_knows():
    known = {name: sorted(a.partition("%")[0] for a in found) for name, found in interface_addresses().items() if found}
    assert {name: sorted(found) for name, found in probe.interfaces().items()} == known


def test_ports_and_paths(tmp_path):
    with socket.create_server(("0.0.0.0", 0)) as server:
        port = server.getsockname()[1]
        found = probe.facts(ports=[port], paths={"a": str(tmp_path / "x" / "y")}, peer="127.0.0.1", gpus=False)
    assert found["ports"] == {str(port): False}
    assert found["reaches_by"] == "127.0.0.1"
    assert (found["paths"]["a"]["nearest"], found["paths"]["a"]["exists"]) == (str(tmp_path), False)
    (tmp_path / "f").write_text("12345")
    assert probe.facts(paths={"f": str(tmp_path / "f")})["paths"]["f"]["content"] == "5 bytes"
    before = probe.facts(paths={"d": str(tmp_path)})["paths"]["d"]["content"]
    (tmp_path / "f").write_text("123456")
    assert probe.facts(paths={"d": str(tmp_path)})["paths"]["d"]["content"] != before


@pytest.mark.parametrize("size", [2, 24, 25, 100, 1000])
def test_pairs_that_are_tried_join_all_hosts_and_are_few(size):
    names = [f"h{number}" for number in range(size)]
    pairs = _pairs(names)
    assert all(name not in others for name, others in pairs.items())
    if size <= 24:
        assert all(len(others) == size - 1 for others in pairs.values())
    else:
        assert max(map(len, pairs.values())) <= 12
        for place, name in enumerate(names):
            assert names[(place + 1) % size] in pairs[name]  # rings
            assert place == 0 or "h0" in pairs[name]  # everybody's rendezvous
