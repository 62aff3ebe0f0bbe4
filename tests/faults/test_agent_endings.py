"""An agent that has to end at once gives nobody grace. Real processes; more of it is in tests/simulation."""

import asyncio
import signal
import sys

import pytest
from support.cluster import DEADLINE_S, kill, known, real_cluster
from support.procs import alive, eventually

pytestmark = pytest.mark.full
STUBBORN = (
    sys.executable,
    "-c",
    "import http.server, signal, sys\n"
    "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "http.server.test(http.server.SimpleHTTPRequestHandler, port=int(sys.argv[1]), bind='127.0.0.1')\n",
    "{port}",
)


async def test_a_fence_leaves_no_grace_to_a_service_not_even_to_one_that_is_being_stopped(tmp_path):
    """Their grace is many times the deadline of this test, and of the agent's patience."""
    async with real_cluster(tmp_path, num_nodes=1) as cluster:
        numbers = {"grace_s": 20 * DEADLINE_S, "probe_interval_s": 0.1}
        services = []
        for name in ("idle", "stopping"):
            service = await cluster.controller.start_service(
                name, list(STUBBORN), health_path="/", numbers=numbers, ready_timeout_s=DEADLINE_S
            )
            services.append(known(service.pid))
        cluster.identities()
        stop = cluster.controller.background(service.stop(), "stop")
        await cluster.controller.wait_for_event(lambda event: "stopping" in event.text, timeout_s=DEADLINE_S)
        agent = known(cluster.agent())
        kill(cluster.reaper(), signal.SIGKILL)
        await eventually(lambda: not any(map(alive, [agent, *services])), DEADLINE_S)
        await asyncio.wait([stop])
        gone = await cluster.controller.wait_for_event(lambda event: event.kind == "node_gone", timeout_s=DEADLINE_S)
        assert gone.text == "it said goodbye: the reaper died"  # nothing had to be given up
