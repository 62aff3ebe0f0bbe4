"""Whoever held GPU memory is gone only when the memory is: services and workers alike, with what ran below them."""

import asyncio
import os
import sys
from pathlib import Path

from support.procs import alive, eventually, process_identity

from miles_agents.agent.ports import PortLeases
from miles_agents.agent.process import ProcessTable
from miles_agents.agent.process_launch import Command
from miles_agents.agent.service import Service, ServiceSpec
from miles_agents.agent.service_life import LifeNumbers, Phase
from miles_agents.agent.starter import _RealWorker

ENGINE = """
import http.server, os, pathlib, signal, subprocess, sys
below = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"], start_new_session=True)
class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()
def end(*_):  # in good order: nothing is left for anybody to find
    below.kill()
    below.wait()
    os._exit(0)
signal.signal(signal.SIGTERM, end)
server = http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[2])), Health)
pathlib.Path(sys.argv[1]).write_text(str(below.pid))
server.serve_forever()
"""


class Driver:
    """Memory by pid, which the test gives back when it likes."""

    def __init__(self) -> None:
        self.held: dict[int, int] = {}

    def used_bytes(self, pids) -> dict[int, int]:
        return {pid: size for pid, size in self.held.items() if pid in pids}


async def test_a_service_is_gone_only_when_the_gpu_memory_of_its_scheduler_is_free(tmp_path: Path) -> None:
    driver = Driver()
    table = ProcessTable(gpu=driver)
    ports = PortLeases(lock_dir=tmp_path / "ports")
    file = tmp_path / "below"
    spec = ServiceSpec(
        "engine",
        (sys.executable, "-c", ENGINE, str(file), "{port}"),
        tmp_path / "engine.log",
        env=dict(os.environ),
        numbers=LifeNumbers(probe_interval_s=0.05, grace_s=5),
    )
    service = Service(spec, table, ports, lambda change: None)
    running = asyncio.create_task(service.run())
    loop = asyncio.get_running_loop()
    await service.wait_for(Phase.READY, deadline=loop.time() + 30)
    child, below = table.children[service.state.pid], process_identity(int(file.read_text()))
    driver.held[below.pid] = 5 << 20  # not the server itself: its scheduler, which is found before the first signal
    service.stop()
    await eventually(lambda: child.exit is not None and not alive(below), 30)
    done, _ = await asyncio.wait([running], timeout=0.3)
    assert not done and service.state.phase is Phase.STOPPING
    driver.held.clear()
    async with asyncio.timeout(30):
        await running
    assert service.state.phase is Phase.DEAD
    ports.close()
    table.close()


async def test_a_worker_that_died_is_gone_only_when_its_gpu_memory_is_free(tmp_path: Path) -> None:
    driver = Driver()
    table = ProcessTable(gpu=driver)
    command = Command((sys.executable, "-c", "pass"), dict(os.environ), tmp_path, tmp_path / "log")
    child = await table.spawn(command)
    driver.held[child.pid] = 5 << 20
    await child.wait(30)
    sweeping = asyncio.create_task(_RealWorker(table, child).sweep())
    done, _ = await asyncio.wait([sweeping], timeout=0.3)
    assert not done
    driver.held.clear()
    await sweeping
    table.close()
