"""What a worker finds in its environment, and that it was there before its first instruction."""

import os
import sys
from pathlib import Path

import pytest

from miles_agents import Actor, endpoint, lease_ports
from miles_agents.agent.main import name_interface
from miles_agents.agent.orders import service_spec
from miles_agents.agent.starter import worker_environment
from miles_agents.node_info import Gpu, NodeInfo
from miles_agents.rpc.context import current_actor
from miles_agents.rpc.guard import NotYourOrder
from miles_agents.rpc.shape import Shape
from miles_agents.worker.spec import WorkerSpec
from miles_controller import Controller, ControllerConfig
from miles_launcher.local import LocalAgents

GPUS = tuple(Gpu(index, f"GPU-{index}", "H100", 80 * 2**30, numa_node=index // 2) for index in range(4))
NODE = NodeInfo("node-0", "host", ("10.0.0.1",), GPUS, 0, 8, 2**36, "3.12.1", "Linux x86_64")


def spec(**changes):
    fields = {
        "run_id": "r", "mesh": 2, "mesh_name": "m", "rank": 1, "incarnation": 7, "controller_incarnation": 1,
        "shape": Shape.of(gpus=4), "devices": (2, 3), "local_rank": 1,
    }  # fmt: skip
    return WorkerSpec(**{**fields, **changes})


def test_defaults_are_those_of_torchrun_and_the_spec_wins():
    env = worker_environment({"PATH": "/bin", "OMP_NUM_THREADS": "9"}, spec(env={"RANK": "x", "MORE": "1"}), NODE)
    assert (env["PATH"], env["OMP_NUM_THREADS"], env["WORLD_SIZE"], env["LOCAL_RANK"]) == ("/bin", "9", "4", "1")
    assert (env["RANK"], env["MORE"], env["PYTHONUNBUFFERED"]) == ("x", "1", "1")
    assert worker_environment({}, spec(), NODE)["OMP_NUM_THREADS"] == "1"


def test_devices_are_hidden_only_when_asked_and_then_by_uuid():
    assert "CUDA_VISIBLE_DEVICES" not in worker_environment({}, spec(), NODE)
    assert worker_environment({"CUDA_VISIBLE_DEVICES": "0,1"}, spec(), NODE)["CUDA_VISIBLE_DEVICES"] == "0,1"
    env = worker_environment({}, spec(env={"CUDA_VISIBLE_DEVICES": "own"}), NODE)
    assert env["CUDA_VISIBLE_DEVICES"] == "GPU-2,GPU-3"


def harmless_library():
    """A part of glibc that does nothing, and that nobody else loads."""
    return min(Path("/usr/lib").rglob("libBrokenLocale.so.1"))


class Looks(Actor):
    @endpoint
    def first_environment(self):
        """As the kernel has it: what was there at exec."""
        entries = Path("/proc/self/environ").read_bytes().split(b"\0")
        return dict(entry.decode().split("=", 1) for entry in entries if b"=" in entry)

    @endpoint
    def maps(self):
        return Path("/proc/self/maps").read_text()

    @endpoint
    def cpus(self):
        return sorted(os.sched_getaffinity(0))

    @endpoint
    def ports(self, count):
        return lease_ports(count).get(10)

    @endpoint
    def order(self):
        current_actor().agent.endpoint("stop_service").call_one("web", "me").get(10)


@pytest.mark.full
async def test_a_real_worker_has_its_environment_before_exec(tmp_path):
    library = harmless_library()
    async with (
        Controller(ControllerConfig(status=False)) as controller,
        LocalAgents(controller, ["node-0"], run_dir=tmp_path, cpu_slots=2),
    ):
        await controller.wait_for_nodes()
        mesh = await controller.spawn(
            "looks", Looks, dims={"gpus": 2}, env={"LD_PRELOAD": str(library), "OMP_NUM_THREADS": "2"},
            rank_env=lambda rank: {"MY_RANK": str(rank)},
        )  # fmt: skip
        for rank, env in enumerate(await mesh.first_environment.call()):
            assert env["LD_PRELOAD"] == str(library)
            assert (env["OMP_NUM_THREADS"], env["RANK"], env["MY_RANK"]) == ("2", str(rank), str(rank))
            assert env["MILES_RUN"].startswith(f"{controller.run_id}:")
            assert "SECRET" not in str(env).upper()
        assert all(library.name in maps for maps in await mesh.maps.call())
        agent_log = (tmp_path / "logs" / "agent-node-0.log").read_text()
        assert "LD_PRELOAD" not in agent_log
        assert (await mesh.cpus.call())[0] == sorted(os.sched_getaffinity(0))

        first, second = await mesh.ports.call(3)
        assert len({*first, *second}) == 6
        with pytest.raises(NotYourOrder):
            await mesh.slice(gpus=0).order.call_one()


def test_code_of_the_node_comes_before_that_of_the_controller():
    base = {"MILES_NODE_PATH": "/here/lib:/here/cwd"}
    path = worker_environment(base, spec(env={"PYTHONPATH": "/there"}), NODE)["PYTHONPATH"]
    assert path == "/here/lib:/here/cwd:/there"
    assert worker_environment(base, spec(), NODE)["PYTHONPATH"] == "/here/lib:/here/cwd"
    assert worker_environment(base, spec(env={"PYTHONPATH": path}), NODE)["PYTHONPATH"] == path
    assert "PYTHONPATH" not in worker_environment({}, spec(), NODE)


def test_services_run_this_nodes_interpreter_and_code(tmp_path):
    plain = {"name": "s", "argv": ["{python}", "-m", "{python}"], "env": {"PYTHONPATH": "/there"}}
    made = service_spec(plain, tmp_path, {"MILES_NODE_PATH": "/here"})
    assert made.argv == (sys.executable, "-m", "{python}")
    assert made.env["PYTHONPATH"] == "/here:/there"


def test_process_groups_talk_over_the_interface_of_the_nodes_address_unless_told():
    env = {"NCCL_SOCKET_IFNAME": "mine"}
    name_interface("127.0.0.1", env)
    assert env == {"NCCL_SOCKET_IFNAME": "mine", "GLOO_SOCKET_IFNAME": "lo", "MILES_NODE_ADDRESS": "127.0.0.1"}
    env = {}
    name_interface("203.0.113.1", env)
    assert env == {"MILES_NODE_ADDRESS": "203.0.113.1"}
