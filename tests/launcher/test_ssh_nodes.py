"""Where the controller listens for hosts, what hosts need, and what their failures are called."""

import socket

import pytest
from support.flag_cases import config

from miles_launcher.ssh_errors import (
    CodeDiffers,
    HostEnded,
    HostKeyRefused,
    HostsFailed,
    HostUnreachable,
    LoginRefused,
    NoCommonAddress,
    NoPython,
    all_failed,
    from_exit,
    from_host,
)
from miles_launcher.ssh_nodes import (
    bind_address,
    common_address,
    needed_modules,
    nodes_by_ssh,
    settings_of,
    shared_directories,
    way_to,
)
from miles_launcher.ssh_start import Machine, Ssh

CONFIG = """
Host loop
    HostName 127.0.0.1
Host jump
    HostName 127.0.0.1
    ProxyJump loop
Host nowhere
    HostName no.such.host.invalid
"""


@pytest.fixture
def ssh(tmp_path):
    (tmp_path / "config").write_text(CONFIG)
    return Ssh(str(tmp_path / "config"))


def machines(*names):
    return [Machine(name, name) for name in names]


def test_the_controller_listens_where_the_way_to_the_hosts_begins(ssh):
    assert bind_address(None, machines("loop", "jump"), ssh) == "tcp://127.0.0.1:0"
    assert way_to(Machine("x", "jump"), ssh) is None
    assert way_to(Machine("x", "nowhere"), ssh) is None


@pytest.mark.parametrize(
    ("ways", "address"),
    [
        (["10.0.0.1", "10.0.0.1", None], "10.0.0.1"),
        (["127.0.0.1", "10.0.0.1"], "10.0.0.1"),
        (["127.0.0.1"], "127.0.0.1"),
        (["fd00::1", "::1"], "fd00::1"),
        (["10.0.0.1", "10.1.0.1"], None),
        ([None], None),
    ],
)
def test_one_address_serves_all_hosts_or_none_is_taken(ways, address):
    assert common_address(ways) == address


def test_where_no_way_is_known_an_address_is_asked_for(ssh):
    with pytest.raises(NoCommonAddress, match="not clear at which address") as caught:
        bind_address(None, machines("jump", "nowhere"), ssh)
    assert "jump: no direct way" in caught.value.evidence
    assert "--controller-host" in caught.value.advice


@pytest.mark.parametrize(
    ("given", "bind"),
    [("127.0.0.1", "tcp://127.0.0.1:0"), ("localhost:0", "tcp://127.0.0.1:0"), ("127.0.0.2:0", "tcp://127.0.0.2:0")],
)
def test_an_address_that_is_given_is_taken(ssh, given, bind):
    assert bind_address(given, machines("jump"), ssh) == bind


def test_the_controller_listens_where_flags_say(ssh):
    values = config(f"--hosts jump,loop --ssh-config {ssh.config} --controller-host 127.0.0.3")
    nodes = nodes_by_ssh(values, {})
    assert nodes.bind == "tcp://127.0.0.3:0"
    assert nodes.names == ("jump", "loop")


@pytest.mark.parametrize(
    ("given", "words"),
    [("0.0.0.0", "all addresses"), ("203.0.113.9", "assign"), ("127.0.0.1:99999", "no port"), ("no.such.invalid", "")],
)
def test_an_address_that_is_not_one_of_ours_is_refused(ssh, given, words):
    with pytest.raises(NoCommonAddress, match="cannot listen at") as caught:
        bind_address(given, machines("loop"), ssh)
    assert words in caught.value.evidence


def test_a_port_that_is_given_is_taken_as_it_is(ssh):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(NoCommonAddress, match="cannot listen"):
            bind_address(f"127.0.0.1:{port}", machines("loop"), ssh)


def test_hosts_get_what_flags_say():
    values = config(
        "--hosts a --remote-python /opt/py --sync-code --hosts-at-once 7 --start-timeout 9 --ssh-config C "
        "--interface eth7 --env A=1 --num-gpus-per-node 3"
    )
    found = settings_of(values, {"B": "2"})
    assert found.ssh.config == "C"
    assert (found.python, found.copies_code, found.at_once, found.timeout_s) == ("/opt/py", True, 7, 9.0)
    assert (found.slots, found.on_gpus) == (3, False)
    assert found.env["B"] == "2"
    assert found.flags[found.flags.index("--interface") + 1] == "eth7"
    assert {"torch", "megatron.core", "sglang"} <= set(found.modules)


def test_what_has_to_be_shared_and_installed_is_what_the_run_uses():
    alone = config("--hosts a --debug-rollout-only --rollout-num-gpus 1")
    assert "megatron.core" not in needed_modules(alone)
    assert shared_directories(config("--hosts a")) == {}
    saved = shared_directories(config("--hosts a --save S --use-fault-tolerance --save-interval 1"))
    assert {flag: str(path) for flag, path in saved.items()} == {"--save": "/home/me/S", "--run-dir": "/runs/new"}


@pytest.mark.parametrize(
    ("code", "tail", "kind"),
    [
        (255, "ssh: Could not resolve hostname a: Name or service not known", HostUnreachable),
        (255, "kex_exchange_identification: Connection closed by remote host", HostUnreachable),
        (255, "me@a: Permission denied (publickey).", LoginRefused),
        (255, "Received disconnect: 2: Too many authentication failures", LoginRefused),
        (255, "Host key verification failed.", HostKeyRefused),
        (255, "@ WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED! @", HostKeyRefused),
        (127, "sh: 1: exec: /x/python: not found", NoPython),
        (126, "bash: /x/python: Permission denied", NoPython),
        (1, "Permission denied (publickey).", HostEnded),
        (127, "", HostEnded),
        (-9, "", HostEnded),
    ],
)
def test_the_end_of_ssh_says_what_kind_of_failure_it_is(code, tail, kind):
    error = from_exit("a", code, tail, python="/x/python")
    assert type(error) is kind
    assert tail in error.evidence
    assert error.what.startswith("a: ")
    assert error.advice


def test_code_that_differs_is_named_by_file():
    there = {"p/a.py": "1", "p/b.py": "2"}
    error = from_host(
        "a", {"error": "code", "files": there, "places": {}}, {"p/a.py": "1", "p/b.py": "3", "p/c.py": "4"}
    )
    assert isinstance(error, CodeDiffers)
    assert error.evidence.startswith("2 files differ: p/b.py (changed), p/c.py (missing there)")


def test_one_host_fails_with_its_own_error_and_several_with_all_of_theirs():
    first = from_exit("a", 255, "x\nNo route to host", python="")
    second = from_exit("b", 255, "Permission denied (publickey)", python="")
    assert all_failed({"a": first}, 3) is first
    both = all_failed({"a": first, "b": second}, 3)
    assert isinstance(both, HostsFailed)
    assert both.what == "2 of 3 hosts cannot be used"
    assert "[E-SSH-001]: No route to host\nb: login refused [E-SSH-002]" in both.evidence
    assert "ssh-add" in both.advice
