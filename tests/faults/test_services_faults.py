"""Services in a real cluster: children that are not ours inside, killed, stopped, fenced and lost with their node."""

import asyncio
import logging
import signal
import socket
import sys
import time
from urllib.request import urlopen

import pytest
import pytest_asyncio
from support.cluster import DEADLINE_S, error_of, kill, known, real_cluster
from support.procs import alive, eventually, process_identity

from miles_agents.agent.orders import UnknownService
from miles_agents.agent.service import ServiceDied, ServiceNotReady
from miles_agents.rpc.errors import NodeLost
from miles_controller.services import NameTaken, NoSuchNode

pytestmark = pytest.mark.asyncio(loop_scope="module")
SERVER = (sys.executable, "-m", "http.server", "{port}", "--bind", "{host}")
QUICK = {"probe_interval_s": 0.1, "backoff_s": 0.1, "grace_s": 2.0, "start_timeout_s": 20.0, "max_restarts": 2}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(tmp_path_factory):
    async with real_cluster(tmp_path_factory.mktemp("run"), num_nodes=2) as cluster:
        yield cluster


async def start(cluster, name, argv=SERVER, **options):
    options = {"health_path": "/", "numbers": QUICK, "ready_timeout_s": 20.0, **options}
    service = await cluster.controller.start_service(name, list(argv), **options)
    cluster.identities()
    return service


async def status_of(url):
    def get():
        with urlopen(url, timeout=10) as answer:
            return answer.status

    return await asyncio.to_thread(get)


async def test_a_service_is_ready_when_its_start_returns(cluster, took):
    at = time.perf_counter()
    service = await start(cluster, "web")
    took("start to ready", at)
    assert service.phase == "ready" and await status_of(service.url) == 200
    await service.stop()


async def test_a_killed_service_comes_back_on_the_same_handle(cluster, took):
    service = await start(cluster, "web")
    await eventually(lambda: service.pid, DEADLINE_S)
    old = known(service.pid)
    at = kill(old.pid)
    await eventually(lambda: service.pid not in (None, old.pid) and service.phase == "ready", DEADLINE_S)
    took("kill to ready", at)
    assert not alive(old) and await status_of(service.url) == 200
    told = await cluster.event("service_failed", "web@")
    assert "SIGKILL" in told.text + told.fields["fault"]
    await service.stop()


async def test_a_stopped_service_leaves_no_process_and_no_port(cluster):
    service = await start(cluster, "web", node="node-1")
    await eventually(lambda: service.pid, DEADLINE_S)
    process, port = known(service.pid), service.ports["http"]
    assert service.node == "node-1"
    await service.stop()
    assert not alive(process)
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind(("127.0.0.1", port))
    assert service.phase == "dead"
    error = await error_of(service.stop(), UnknownService)
    assert error.code == "E-SVC-004"
    again = await start(cluster, "web", node="node-1")  # the name is free
    await again.stop()


async def test_a_service_whose_port_is_taken_gets_another_one(cluster, tmp_path):
    """The first attempt is robbed of its port: it says so as servers do, and leaves."""
    marker = tmp_path / "robbed"
    code = (
        "import http.server, os, socket, sys\n"
        "port = int(sys.argv[1])\n"
        f"if not os.path.exists({str(marker)!r}):\n"
        f"    open({str(marker)!r}, 'w').write(str(port))\n"
        "    robber = socket.create_server(('127.0.0.1', port))\n"
        "server = http.server.ThreadingHTTPServer(('127.0.0.1', port), http.server.SimpleHTTPRequestHandler)\n"
        "server.allow_reuse_port = False\n"
        "server.serve_forever()\n"
    )
    service = await start(cluster, "robbed", (sys.executable, "-c", code, "{port}"))
    assert marker.exists() and service.ports["http"] != int(marker.read_text())
    assert await status_of(service.url) == 200
    await service.stop()


async def test_a_service_that_cannot_start_shows_its_last_lines_and_is_gone(cluster):
    code = "import sys; sys.exit('no model at /models/none')"
    error = await error_of(start(cluster, "broken", (sys.executable, "-c", code)), ServiceDied)
    assert error.code == "E-SVC-001" and "no model at /models/none" in str(error)
    assert not _named(cluster, "broken")


async def test_a_service_that_never_gets_healthy_is_given_up_and_is_gone(cluster, tmp_path):
    path = tmp_path / "pid"
    code = f"import os, signal; open({str(path)!r}, 'w').write(str(os.getpid())); signal.pause()"
    starting = start(cluster, "mute", (sys.executable, "-c", code), ready_timeout_s=1.0)
    error = await error_of(starting, ServiceNotReady)
    assert error.code == "E-SVC-002" and "within 1 s" in error.what and "mute.log" in error.evidence
    assert process_identity(int(path.read_text())) is None and not _named(cluster, "mute")


async def test_a_service_out_of_restarts_is_dead_and_says_why(cluster):
    service = await start(cluster, "fragile", numbers={**QUICK, "max_restarts": 0})
    await eventually(lambda: service.pid, DEADLINE_S)
    kill(service.pid)
    assert await service.wait_for_phase("dead", timeout_s=DEADLINE_S) == "dead"
    assert "SIGKILL" in service.fault
    await eventually(lambda: not _named(cluster, "fragile"), DEADLINE_S)


async def test_a_stopped_process_is_found_by_its_probe_and_replaced(cluster):
    service = await start(cluster, "frozen", numbers={**QUICK, "probe_timeout_s": 0.3, "failures_until_unhealthy": 2})
    await eventually(lambda: service.pid, DEADLINE_S)
    old = known(service.pid)
    kill(old.pid, signal.SIGSTOP)
    await eventually(lambda: service.pid not in (None, old.pid) and service.phase == "ready", DEADLINE_S)
    assert not alive(old)
    await service.stop()


async def test_a_fenced_service_stays_dead_until_it_is_started_anew(cluster):
    service = await start(cluster, "fenced")
    await eventually(lambda: service.pid, DEADLINE_S)
    old = known(service.pid)
    await service.fence("it took the wrong weights")
    await service.wait_for_phase("fenced", timeout_s=DEADLINE_S)
    await eventually(lambda: not alive(old), DEADLINE_S)
    await service.stop()


async def test_a_service_on_a_node_that_nobody_knows_is_refused(cluster):
    error = await error_of(start(cluster, "lost", node="node-7"), NoSuchNode)
    assert "node-7" in error.what and "node-0" in error.evidence


async def test_a_name_that_is_taken_is_refused_and_the_first_service_is_unharmed(cluster):
    service = await start(cluster, "web")
    error = await error_of(start(cluster, "web"), NameTaken)
    assert error.code == "E-MESH-002" and "ready" in error.evidence
    assert await status_of(service.url) == 200
    await service.stop()
    assert service.phase == "dead", "the handle of the first one was forgotten"


@pytest.mark.full
async def test_services_of_a_dead_node_are_lost_and_their_processes_gone(tmp_path):
    async with real_cluster(tmp_path, num_nodes=2) as other:
        service = await start(other, "web", node="node-0")
        safe = await start(other, "web", node="node-1")
        await eventually(lambda: service.pid, DEADLINE_S)
        process = known(service.pid)
        kill(other.agent("node-0"))
        assert await service.wait_for_phase("lost", timeout_s=DEADLINE_S) == "lost"
        assert not alive(process) and "node-0" in service.fault
        assert await status_of(safe.url) == 200
        error = await error_of(service.pause(), NodeLost)
        assert "node-0" in error.what
        await service.stop()  # there is nothing left to do
        await safe.stop()


def _named(cluster, name):
    return [found for found in cluster.controller.status()["services"] if found["name"] == name]


async def test_what_a_service_writes_is_shown_with_its_name_also_its_last_words(cluster, caplog):
    caplog.set_level(logging.INFO, "miles.remote")
    code = (
        "import http.server, sys\n"
        "print('loading the model', flush=True)\n"
        "class Server(http.server.SimpleHTTPRequestHandler):\n"
        "    def log_message(self, *args): pass\n"
        "server = http.server.ThreadingHTTPServer(('127.0.0.1', int(sys.argv[1])), Server)\n"
        "import signal\n"
        "signal.signal(signal.SIGTERM, lambda *_: (sys.stdout.write('goodbye'), sys.stdout.flush(), sys.exit()))\n"
        "server.serve_forever()\n"
    )
    service = await start(cluster, "talker", (sys.executable, "-c", code, "{port}"))
    await eventually(lambda: "talker@node-0 | loading the model" in caplog.messages, DEADLINE_S)
    await service.stop()
    await eventually(lambda: "talker@node-0 | goodbye" in caplog.messages, DEADLINE_S)
    assert caplog.messages.count("talker@node-0 | loading the model") == 1
