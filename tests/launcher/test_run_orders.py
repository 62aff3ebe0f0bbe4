"""``miles stack`` and ``miles stop`` against controllers that really run: what they find, refuse and wait for."""

import asyncio
import json
import os

import pytest
from support.actors import Victim
from support.cluster import real_cluster
from support.procs import alive, eventually

from miles_agents.rpc.errors import WorkerDied
from miles_controller import Controller, ControllerConfig
from miles_controller.run_orders import NoSuchRank, RunOrders
from miles_launcher import runs
from miles_launcher.cli import main


@pytest.fixture
def miles(capsys):
    """Runs the command in a thread, since the server answers on this one's loop: (exit code, stdout, stderr)."""

    async def run(*words):
        code = await asyncio.to_thread(main, list(words))
        return (code, *capsys.readouterr())

    return run


async def test_the_stack_of_a_rank_that_sits_in_a_system_call(tmp_path, miles):
    async with real_cluster(tmp_path, num_nodes=2, cpu_slots=2, status=True) as cluster:
        controller = cluster.controller
        mesh = await controller.spawn("trainer", Victim, dims={"hosts": 2})
        await controller.spawn("odd-name", Victim, devices_per_rank=0)
        fifo = tmp_path / "fifo"
        os.mkfifo(fifo)
        pending = mesh.slice(hosts=1).join_collective.call(str(fifo))
        orders = RunOrders(controller)
        stack = ""
        while "join_collective" not in stack:
            stack = (await orders.stack({"rank": "1"}))["stack"]
        for name in ("trainer[1]", "trainer-1", "1"):
            code, out, err = await miles("stack", "--run", controller.run_id, name)
            assert (code, err) == (0, "")
            assert out.startswith("trainer[1] on node-1, pid ")
            assert "thread MainThread" in out and "in join_collective" in out
        assert (await orders.stack({"rank": "odd-name-0"}))["rank"] == "odd-name[0]"
        assert (await orders.stack({"rank": "odd-name"}))["rank"] == "odd-name[0]"
        for wrong in ("trainer", "trainer-2", "other-0", "engine", "2", "trainer[x]", ""):
            error = await refusal(orders.stack({"rank": wrong}), NoSuchRank)
            assert "trainer[0-1]" in error.evidence
        code, _, err = await miles("stack", "--run", controller.run_id, "trainer-9")
        assert code == 2
        assert err.startswith("no rank 'trainer-9' is in the run\n")
        await mesh.kill(rank=0)
        await refusal(orders.stack({"rank": "0"}), WorkerDied)
        with fifo.open("wb"):
            await asyncio.wait([asyncio.ensure_future(awaited(pending))], timeout=30)


async def awaited(call):
    try:
        return await call
    except Exception as error:
        return error


async def refusal(call, kind):
    with pytest.raises(kind) as caught:
        await call
    return caught.value


async def test_a_program_without_a_way_to_stop_refuses_and_runs_on(miles):
    async with Controller(ControllerConfig()) as controller:
        code, out, err = await miles("stop", "--run", controller.run_id)
        assert (code, out) == (2, "")
        assert "cannot be stopped from outside" in err
        assert (await miles("status", "--run", controller.run_id))[0] == 0


async def test_stop_waits_for_the_end_and_says_what_has_ended(tmp_path, miles):
    stopped = asyncio.Event()
    asked_by = []

    async def life():
        async with real_cluster(tmp_path, cpu_slots=2, status=True) as cluster:
            cluster.controller.on_stop = lambda by: (asked_by.append(by), stopped.set())
            await cluster.controller.spawn("trainer", Victim, dims={"ranks": 2})
            started.set_result((cluster.controller.run_id, cluster.identities()))
            await stopped.wait()

    started = asyncio.get_running_loop().create_future()
    living = asyncio.create_task(life())
    run_id, identities = await started
    code, out, err = await miles("stop", "--run", run_id)
    assert (code, err) == (0, "")
    assert "1 node (node-0), trainer (2 ranks)" in out
    assert f"logs: {tmp_path / 'logs'}" in out
    assert asked_by == ["miles stop"]
    await living
    assert not any(map(alive, identities))


async def test_a_run_that_does_not_end_is_told_and_can_be_stopped_again(tmp_path, miles):
    async with real_cluster(tmp_path, cpu_slots=2, status=True) as cluster:
        asked = []
        cluster.controller.on_stop = asked.append
        await cluster.controller.spawn("trainer", Victim)
        code, _, err = await miles("stop", "--run", cluster.controller.run_id, "--timeout-s", "0.3")
        assert code == 1
        assert "has not ended within 0.3 s" in err
        assert "its controller" in err and "trainer[0] (pid " in err
        assert (await miles("stop", "--run", cluster.controller.run_id, "--timeout-s", "0"))[0] == 1
        assert len(asked) == 2


async def test_a_run_is_found_by_its_directory_and_others_are_listed(tmp_path, miles, monkeypatch):
    async with Controller(ControllerConfig(run_dir=tmp_path / "a", run_id="run-a")), \
            Controller(ControllerConfig(run_dir=tmp_path / "b", run_id="run-b")):  # fmt: skip
        assert runs.find_run(str(tmp_path / "b")).run_id == "run-b"
        monkeypatch.chdir(tmp_path)
        assert runs.find_run("a").run_dir == tmp_path / "a"
        code, out, _ = await miles("status", "--run", "b", "--json")
        assert code == 0
        assert json.loads(out)["run_dir"] == str(tmp_path / "b")
        for words in (["stop"], ["logs"], ["stack", "0"], ["status"]):
            code, _, err = await miles(*words)
            assert code == 2
            assert f"run-a: pid {os.getpid()}, for 0 min, directory {tmp_path / 'a'}" in err
            assert "run-b" in err and "--run RUN_ID" in err
        assert (await miles("stop", "--run", "run-c"))[0] == 2
    await eventually(lambda: "run-a" not in [run.run_id for run in runs.all_runs()])


def test_orders_of_a_run_that_does_not_know_them_are_told(tmp_path):
    run = runs.Run("r1", tmp_path, 1, None, 0.0)
    with pytest.raises(runs.NoStatus):
        runs.order(run, "/stop", {})
