"""The hosts that other tests use are what they say: apart, reachable by ssh, and harmed as ordered."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.netns import HERE, network
from support.procs import eventually_sync

pytestmark = [pytest.mark.full, pytest.mark.needs("hosts")]
TESTS = str(Path(__file__).parents[1])
GREETING = (
    "import socket, sys, time\n"
    "at = time.monotonic()\n"
    "try:\n"
    "    with socket.create_connection((sys.argv[1], 22), timeout=float(sys.argv[2])) as found:\n"
    "        found.settimeout(float(sys.argv[2]))\n"
    "        print(found.recv(4).decode(), time.monotonic() - at)\n"
    "except TimeoutError:\n"
    "    print('silence', time.monotonic() - at)\n"
)


def greeting(net, at, to, patience_s=60):
    """What sshd of host ``to`` says to a process at ``at``, and after how long."""
    argv = [sys.executable, "-S", "-c", GREETING, net.address(to), str(patience_s)]
    command = argv if at == HERE else net[at].command(argv)
    said, seconds = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout.split()
    return said, float(seconds)


def test_each_host_has_processes_memory_and_a_name_of_its_own(net):
    for name, host in net.hosts.items():
        done = subprocess.run(
            ["ssh", "-o", "BatchMode=yes", name, "hostname; echo $SSH_CONNECTION; ls /dev/shm; touch /dev/shm/mine"],
            env={**os.environ, "PATH": f"{net.bin}:{os.environ['PATH']}"}, check=True, capture_output=True, text=True,
            timeout=120,
        )  # fmt: skip
        hostname, connection = done.stdout.splitlines()
        assert (hostname, connection.split()[2]) == (name, host.address)
        assert host.processes() == []
    assert not os.path.exists("/dev/shm/mine")


def test_a_cut_link_is_silence_between_the_two_alone(net):
    net.cut("node1", "node2")
    assert greeting(net, "node1", "node2", 0.5)[0] == greeting(net, "node2", "node1", 0.5)[0] == "silence"
    assert greeting(net, "node1", "node3")[0] == greeting(net, HERE, "node2")[0] == "SSH-"
    net.cut(HERE, "node3")
    assert greeting(net, HERE, "node3", 0.5)[0] == "silence"
    net.restore()
    assert greeting(net, HERE, "node3")[0] == greeting(net, "node1", "node2")[0] == "SSH-"


def test_a_slow_link_delays_each_way_and_a_lossy_one_loses(net):
    net.spoil("node2", delay_ms=150)
    said, seconds = greeting(net, "node1", "node2")
    assert said == "SSH-" and seconds >= 2 * 0.3  # to connect, and to be greeted: there and back again each
    net.spoil("node2", loss_percent=100)
    assert greeting(net, "node1", "node2", 0.5)[0] == "silence"
    net.spoil("node2", loss_percent=10)
    assert greeting(net, "node1", "node2")[0] == "SSH-"
    net.restore()
    assert greeting(net, "node1", "node2")[0] == "SSH-"


def test_a_host_without_its_cable_or_its_power_is_silent_until_it_has_it_again(net):
    net.unplug("node3")
    assert greeting(net, "node1", "node3", 0.5)[0] == "silence"
    net.plug("node3")
    assert greeting(net, "node1", "node3")[0] == "SSH-"
    left = subprocess.Popen(net["node3"].command(["cat"]), stdin=subprocess.PIPE)
    net.take_away("node3")
    left.wait(60)
    left.stdin.close()
    assert greeting(net, "node1", "node3", 0.5)[0] == "silence"
    net.give_back("node3")
    assert net["node3"].processes() == []
    assert greeting(net, "node1", "node3")[0] == "SSH-"


@pytest.mark.long
def test_nothing_outlives_a_session_that_is_killed(tmp_path):
    text = (
        "import sys, threading\nfrom support.netns import network\n"
        "with network(['lone']) as net:\n"
        "    print(net.hosts['lone'].init, net.switch.pid, net.directory, flush=True)\n    threading.Event().wait()\n"
    )
    argv = [sys.executable, "-c", text]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": TESTS}) as session:
        init, switch, directory = session.stdout.readline().split()
        assert all(os.path.exists(f"/proc/{pid}") for pid in (init, switch))
        session.kill()
    eventually_sync(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in (init, switch)), 60.0)
    links = subprocess.run(["ip", "-brief", "link"], check=True, capture_output=True, text=True).stdout
    assert os.path.basename(directory) not in links
    with network([]):
        assert not os.path.exists(directory), "what a killed session left goes with the next"
