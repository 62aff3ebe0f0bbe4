"""Services as real processes: a small web server that behaves, and the ways in which it does not."""

import asyncio
import os
import signal
import socket
import sys
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from support.procs import alive, eventually, process_identity

from miles_agents.agent.ports import PortLeases
from miles_agents.agent.process import ProcessTable
from miles_agents.agent.service import BadServiceSpec, Service, ServiceDied, ServiceNotReady, ServiceSpec
from miles_agents.agent.service_life import LifeNumbers, Phase

SERVER = """
import http.server, os, subprocess, sys, threading
mode, host, port = sys.argv[1], sys.argv[2], int(sys.argv[3])
print("server starts in mode", mode, flush=True)
if mode == "crash":
    raise ValueError("no such model: " + os.environ["MODEL"])
if mode == "deaf":
    print("loading for ever", flush=True)
    threading.Event().wait()
if mode == "leave-child":
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.send_header("Content-Length", "0")
        self.end_headers()
        if self.path == "/die":
            os._exit(3)

Handler.protocol_version = "HTTP/1.1"
http.server.ThreadingHTTPServer((host, port), Handler).serve_forever()
"""

NUMBERS = LifeNumbers(
    start_timeout_s=30,
    probe_interval_s=0.05,
    probe_timeout_s=2,
    failures_until_unhealthy=2,
    max_restarts=1,
    backoff_s=0.01,
    grace_s=5,
)


def now():
    return asyncio.get_running_loop().time()


@pytest.fixture
async def table():
    table = ProcessTable()
    yield table
    await table.kill_all(grace_s=0)
    table.close()


@pytest.fixture
def leases(tmp_path):
    leases = PortLeases(lock_dir=tmp_path / "ports")
    yield leases
    leases.close()


@pytest.fixture
def server(tmp_path):
    path = tmp_path / "server.py"
    path.write_text(SERVER)

    def spec(mode, **options):
        options = {"numbers": NUMBERS, "env": {**os.environ, "MODEL": "qwen-{port}"}, **options}
        argv = (sys.executable, str(path), mode, "{host}", "{port}")
        return ServiceSpec("web", argv, tmp_path / "web.log", **options)

    return spec


@asynccontextmanager
async def running(spec, table, leases):
    """The service and its changes; stopped at the end, after which nothing is left."""
    changes = []
    service = Service(spec, table, leases, changes.append)
    task = asyncio.create_task(service.run())
    try:
        yield service, changes
    finally:
        service.stop()
        async with asyncio.timeout(30):
            await task
        assert not table.children
        assert not leases.table.holders()
        assert service.ports == {}


def pids(changes):
    return [change.pid for change in changes if change.transition.after is Phase.READY]


async def test_a_service_becomes_ready_and_a_stop_leaves_nothing(server, table, leases):
    async with running(server("leave-child"), table, leases) as (service, changes):
        await service.wait_for(Phase.READY, deadline=now() + 30)
        process = process_identity(service.state.pid)
        assert alive(process)
        assert set(service.ports) == {"http"}
        service.stop("the test is over")
        await service.wait_for(Phase.DEAD, deadline=now() + 30)
        assert not alive(process)
    assert [change.transition.after for change in changes] == [Phase.READY, Phase.STOPPING, Phase.DEAD]
    assert changes[1].transition.cause == "the test is over"
    assert service.fault is None
    assert all(change.fault is None for change in changes)


@pytest.mark.full
async def test_one_that_never_listens_is_not_ready_and_the_error_names_its_last_lines(server, table, leases):
    numbers = LifeNumbers(start_timeout_s=2, probe_interval_s=0.05, max_restarts=0, grace_s=5)
    async with running(server("deaf", numbers=numbers), table, leases) as (service, _):
        with pytest.raises(ServiceNotReady) as caught:
            await service.wait_for(Phase.READY, deadline=now() + 30)
    text = str(caught.value)
    assert "not ready after 2 s; last probe: connection refused" in text
    assert "loading for ever" in text
    assert str(service.spec.log_path) in text
    assert "killed by SIGTERM" in text


async def test_one_that_crashes_at_start_is_restarted_within_its_budget_and_then_given_up(server, table, leases):
    async with running(server("crash"), table, leases) as (service, changes):
        with pytest.raises(ServiceDied, match="before it was ready: exit code 1; 1 restarts in") as caught:
            await service.wait_for(Phase.READY, deadline=now() + 30)
    assert "ValueError: no such model: qwen-2" in caught.value.evidence
    assert caught.value.fields["attempt"] == 2
    assert [change.transition.after for change in changes] == [Phase.BACKOFF, Phase.STARTING, Phase.DEAD]
    assert "ValueError" in changes[0].log_tail[-1]


async def test_one_that_dies_is_restarted_on_the_same_port_and_then_given_up(server, table, leases):
    async with running(server("serve"), table, leases) as (service, changes):
        await service.wait_for(Phase.READY, deadline=now() + 30)
        ports = dict(service.ports)
        os.kill(service.state.pid, signal.SIGKILL)
        await eventually(lambda: len(pids(changes)) == 2, 30)
        assert service.ports == ports
        os.kill(service.state.pid, signal.SIGKILL)
        await service.wait_for(Phase.DEAD, deadline=now() + 30)
    assert isinstance(service.fault, ServiceDied)
    assert "killed by SIGKILL (9)" in str(service.fault)
    assert len(set(pids(changes))) == 2


async def test_a_port_in_use_means_another_port_and_costs_no_restart(server, table, leases):
    class Collider:
        """Leases as usual, but a stranger takes the first port just before the tenant starts."""

        def __init__(self):
            self.strangers = []

        def lease(self, owner, count):
            return leases.lease(owner, count)

        def hand_over(self, ports):
            leases.hand_over(ports)
            if not self.strangers:
                self.strangers.append(socket.create_server(("127.0.0.1", next(iter(ports)))))

        def release(self, owner):
            leases.release(owner)

    collider = Collider()
    spec = server("serve", numbers=LifeNumbers(probe_interval_s=0.05, max_restarts=0))
    changes = []
    service = Service(spec, table, collider, changes.append)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(service.run())
        await service.wait_for(Phase.READY, deadline=now() + 30)
        taken = collider.strangers[0].getsockname()[1]
        assert service.ports["http"] != taken
        assert service.state.attempt == 2
        assert "a port was in use" in changes[0].transition.cause
        service.stop()
    collider.strangers[0].close()
    assert service.fault is None


async def test_one_that_hangs_is_unhealthy_then_killed_and_restarted(server, table, leases):
    numbers = LifeNumbers(
        probe_interval_s=0.05, probe_timeout_s=0.5, failures_until_unhealthy=2, max_restarts=1, backoff_s=0, grace_s=1
    )
    async with running(server("serve", numbers=numbers), table, leases) as (service, changes):
        await service.wait_for(Phase.READY, deadline=now() + 30)
        process = process_identity(service.state.pid)
        os.kill(process.pid, signal.SIGSTOP)
        await eventually(lambda: len(pids(changes)) == 2, 30)
        assert not alive(process)
    unhealthy = next(change for change in changes if change.transition.after is Phase.UNHEALTHY)
    assert isinstance(unhealthy.fault, ServiceNotReady)
    assert "2 health probes failed: no answer in 0.5 s" in str(unhealthy.fault)
    assert unhealthy.pid == process.pid


async def test_paused_it_may_be_silent_and_dies_no_unseen_death(server, table, leases):
    async with running(server("serve"), table, leases) as (service, changes):
        await service.wait_for(Phase.READY, deadline=now() + 30)
        service.pause()
        await service.wait_for(Phase.PAUSED, deadline=now() + 5)
        service.release(done=False)
        service.release(done=True)
        await service.wait_for(Phase.RELEASED, deadline=now() + 5)
        service.resume()
        await service.wait_for(Phase.READY, deadline=now() + 5)
        service.pause()
        await service.wait_for(Phase.PAUSED, deadline=now() + 5)
        os.kill(service.state.pid, signal.SIGKILL)
        await service.wait_for(Phase.BACKOFF, Phase.STARTING, deadline=now() + 5)
    assert any(isinstance(change.fault, ServiceDied) for change in changes)


async def test_a_fenced_one_is_gone_and_stays_so_until_it_is_stopped(server, table, leases):
    async with running(server("serve"), table, leases) as (service, _):
        await service.wait_for(Phase.READY, deadline=now() + 30)
        process = process_identity(service.state.pid)
        service.fence("the lease is lost")
        await service.wait_for(Phase.FENCED, deadline=now() + 5)
        await eventually(lambda: not alive(process))
        service.resume()
        service.stop()
        await service.wait_for(Phase.DEAD, deadline=now() + 5)
        assert service.state.attempt == 1


async def test_cancelling_leaves_nothing(server, table, leases):
    service = Service(server("leave-child"), table, leases, lambda change: None)
    task = asyncio.create_task(service.run())
    await service.wait_for(Phase.READY, deadline=now() + 30)
    task.cancel()
    await asyncio.wait({task}, timeout=30)
    assert task.cancelled()
    assert not table.children
    assert not leases.table.holders()
    assert service.state.phase is Phase.DEAD
    with pytest.raises(ServiceDied, match="was ended"):
        await service.wait_for(Phase.READY, deadline=now() + 30)


async def test_a_program_that_is_not_there_is_given_up_with_the_reason(tmp_path, table, leases):
    spec = ServiceSpec("web", ("/no/such/program",), tmp_path / "web.log", numbers=LifeNumbers(max_restarts=0))
    async with running(spec, table, leases) as (service, _):
        with pytest.raises(ServiceDied, match=r"could not start: .*/no/such/program"):
            await service.wait_for(Phase.READY, deadline=now() + 30)


async def test_waiting_for_a_phase_ends_at_its_deadline(server, table, leases):
    async with running(server("deaf"), table, leases) as (service, _):
        with pytest.raises(TimeoutError):
            await service.wait_for(Phase.READY, deadline=now() + 0.1)


def test_placeholders_are_filled_and_other_braces_stay():
    spec = ServiceSpec("x", ("p",), Path("log"), host="10.0.0.1", ports=("http", "nccl"))
    text = '{host}:{port}/{ports[nccl]} {"json": {}} {other}'
    assert spec.fill(text, {"http": 1, "nccl": 2}) == '10.0.0.1:1/2 {"json": {}} {other}'


@pytest.mark.parametrize(
    "options",
    [
        {"argv": ("p", "{ports[nccl]}")},
        {"env": {"A": "{ports[]}"}},
        {"health_port": "admin"},
        {"health_path": "health"},
        {"ports": ()},
        {"argv": ()},
    ],
)
def test_a_spec_that_cannot_work_is_refused(options):
    with pytest.raises(BadServiceSpec, match="described in a way"):
        ServiceSpec(**{"name": "x", "argv": ("p",), "log_path": Path("log"), **options})
