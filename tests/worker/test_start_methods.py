"""Workers that were executed and workers that were forked: the same to their user, and to the agent."""

import asyncio
import ctypes
import gc
import json
import logging
import os
import random
import re
import resource
import signal
import sys
import threading
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import pytest_asyncio
from support.cluster import all_gone, error_of, kill, known, real_cluster
from support.procs import eventually

from miles_agents import Actor, endpoint
from miles_agents.agent.process import ProcessTable
from miles_agents.agent.starter import CannotFork, ProcessStarter
from miles_agents.agent.zygotes import Zygotes
from miles_agents.node_info import Gpu
from miles_agents.rpc.errors import WorkerDied
from miles_agents.rpc.shape import Shape
from miles_agents.simulation import simulated_info
from miles_agents.timings import Timings
from miles_agents.worker.spec import BadStart, Birth, WorkerSpec
from miles_controller.policy import Policy

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.full]
METHODS = ("exec", "zygote")
MAY_DIFFER = {"pid", "cmdline", "run"}


def prctl(option):
    value = ctypes.c_int()
    ctypes.CDLL(None).prctl(option, ctypes.byref(value), 0, 0, 0)
    return value.value


class Facts(Actor):
    """Tells of its process."""

    @endpoint
    def facts(self):
        fds = (f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd"))
        targets = sorted(re.sub(r":\[.*|\.\d+\.log$", "", os.readlink(fd)) for fd in fds if os.path.lexists(fd))
        env = dict(os.environ)
        return {
            "pid": os.getpid(),
            "cmdline": Path("/proc/self/cmdline").read_text(),
            "run": env.pop("MILES_RUN"),
            "env": env,
            "environment_of_children": json.loads(
                os.popen(f"{sys.executable} -c 'import os, json; print(json.dumps(sorted(os.environ)))'").read()
            ),
            "comm": Path("/proc/self/comm").read_text().strip(),
            "argv": sys.argv[1:],
            "orig_argv": sys.orig_argv[1:],
            "main": sys.modules["__main__"].__spec__.name,
            "sys_path": sys.path,
            "cwd": os.getcwd(),
            "stdin": os.readlink("/proc/self/fd/0"),
            "log": os.readlink("/proc/self/fd/1").rpartition("/")[2].rpartition(".")[0].rpartition(".")[0],
            "stderr": os.readlink("/proc/self/fd/2") == os.readlink("/proc/self/fd/1"),
            "descriptors": targets,
            "deathsig": prctl(2),
            "subreaper": prctl(37),
            "leads": (os.getsid(0), os.getpgid(0)) == (os.getpid(), os.getpid()),
            "parent": Path(f"/proc/{os.getppid()}/cmdline").read_text().split("\0")[2],
            "mask": sorted(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, []))),
            "handlers": {
                int(number): str(signal.getsignal(number))
                for number in signal.valid_signals()
                if number != signal.SIGUSR1
            },
            "nofile": list(resource.getrlimit(resource.RLIMIT_NOFILE)),
            "core": resource.getrlimit(resource.RLIMIT_CORE)[0],
            "oom": int(Path("/proc/self/oom_score_adj").read_text()),
            "affinity": sorted(os.sched_getaffinity(0)),
            "umask": os.umask(0o022),
            "threads": sorted(thread.name for thread in threading.enumerate()),
            "gc": [gc.isenabled(), list(gc.get_threshold())],
            "log_level": logging.getLogger().level,
            "recursion": sys.getrecursionlimit(),
            "switch": sys.getswitchinterval(),
        }

    @endpoint
    def draw(self):
        numpy = sys.modules.get("numpy")
        return random.random(), float(numpy.random.random()) if numpy is not None else 0.0, hash("miles")

    @endpoint
    def loaded(self, name):
        return name in sys.modules

    @endpoint
    def variable(self, name):
        return os.environ.get(name)

    @endpoint
    def memory(self):
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return {line.split()[0].rstrip(":"): int(line.split()[1]) << 10 for line in lines[1:]}

    @endpoint
    def hang(self):
        threading.Event().wait()

    @endpoint(thread="io")
    def pid(self):
        return os.getpid()

    @endpoint
    def leave(self, code):
        os._exit(code)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(tmp_path_factory):
    async with real_cluster(tmp_path_factory.mktemp("run"), cpu_slots=16) as cluster:
        yield cluster


async def spawn(cluster, name, method, count=2, **options):
    mesh = await cluster.controller.spawn(name, Facts, dims={"ranks": count}, start_method=method, **options)
    cluster.identities()
    return mesh


def is_forked(cluster, pid):
    return "--zygote" in psutil.Process(pid).cmdline()


async def test_what_a_worker_finds_is_the_same(cluster):
    found = {}
    for method in METHODS:
        mesh = await spawn(cluster, "same", method, env={"GREETING": "grüß = dich", "EMPTY": ""})
        both = list((await mesh.facts.call()).values)
        await mesh.stop()
        assert ["--zygote" in facts["cmdline"] for facts in both] == [method == "zygote"] * 2
        found[method] = [{name: value for name, value in facts.items() if name not in MAY_DIFFER} for facts in both]
    executed, forked = found["exec"], found["zygote"]
    for name in executed[0]:
        assert [each[name] for each in forked] == [each[name] for each in executed], name
    first = found["zygote"][0]
    assert first["parent"] == "miles_agents.agent" and first["leads"] and first["env"]["RANK"] == "0"
    assert "miles_agents.worker" in first["main"] and "MILES_WORKER_FD" not in first["env"]


@pytest.mark.parametrize("method", METHODS)
async def test_a_killed_worker_ends_its_pending_call_and_comes_back(cluster, method):
    mesh = await spawn(cluster, f"killed-{method}", method, policy=Policy("restart", backoff_s=0.0))
    first = mesh.slice(ranks=0)
    pid = await first.pid.call_one()
    pending = first.hang.call_one()
    await first.pid.call_one()
    kill(pid)
    error = await error_of(pending, WorkerDied)
    assert "SIGKILL" in error.what and error.fields["pid"] == pid
    await cluster.event("worker_restarted", f"killed-{method}[0]")
    again = await mesh.slice(ranks=0).pid.call_one()
    assert again != pid and is_forked(cluster, again) == (method == "zygote")
    error = await error_of(mesh.slice(ranks=1).leave.call_one(7), WorkerDied)
    assert "exit code 7" in error.what
    await mesh.stop()


async def test_workers_outlive_their_zygote_and_new_ones_come_from_its_successor(cluster):
    mesh = await spawn(cluster, "orphans", "zygote")
    pids = [known(pid) for pid in (await mesh.pid.call()).values]
    old = {zygote["pid"]: zygote["name"] for zygote in await zygotes(cluster)}
    for pid, name in old.items():
        kill(pid)
        await cluster.event("zygote_failed", "node-0", fits=lambda e, n=name: n in e.text and "SIGKILL" in e.text)
    assert [known(pid) for pid in (await mesh.pid.call()).values] == pids
    more = await spawn(cluster, "more", "zygote")
    assert all(is_forked(cluster, pid) for pid in (await more.pid.call()).values)
    assert not set(old) & {zygote["pid"] for zygote in await zygotes(cluster)}
    await more.stop()
    await mesh.stop()
    await all_gone(pids)


async def zygotes(cluster):
    agent = cluster.controller.fabric.agent(cluster.controller.fabric.find("node-0"))
    return (await agent.endpoint("status").call_one())["zygotes"]


async def test_the_agent_chooses_a_zygote_where_it_pays(cluster):
    """Several alike; one alone only if there is a zygote for it already; never several that differ."""
    cases = {
        "alone": ({}, 1, {"env": {"MINE": "alone"}}, [False]),
        "several": ({}, 2, {"env": {"MINE": "several"}}, [True, True]),
        "one-more": ({}, 1, {"env": {"MINE": "several"}}, [True]),
        "different": ({}, 2, {"rank_env": lambda rank: {"MINE": f"rank {rank}"}}, [False, False]),
        "late": ({}, 2, {"rank_env": lambda rank: {"MASTER_PORT": str(rank), "MILES_X": "y"}}, [True, True]),
        "asked-for": ({"preload": ()}, 1, {"env": {"MINE": "asked"}}, [True]),
    }
    for name, (preload, count, options, expected) in cases.items():
        mesh = await spawn(cluster, name, "auto", count, **preload, **options)
        assert [is_forked(cluster, pid) for pid in (await mesh.pid.call()).values] == expected, name
        wanted = options.get("env", {}).get("MINE")
        if wanted is not None:
            assert set((await mesh.variable.call("MINE")).values) == {wanted}
        if name == "late":
            assert list((await mesh.variable.call("MASTER_PORT")).values) == ["0", "1"]
        await mesh.stop()


async def test_what_is_read_at_exec_comes_from_a_zygote_of_its_own(cluster):
    seeded = await spawn(cluster, "seeded", "zygote", env={"PYTHONHASHSEED": "5"})
    other = await spawn(cluster, "other", "zygote")
    (first,) = {draw[2] for draw in (await seeded.draw.call()).values}
    (second,) = {draw[2] for draw in (await other.draw.call()).values}
    executed = await spawn(cluster, "executed", "exec", 1, env={"PYTHONHASHSEED": "5"})
    assert first == (await executed.draw.call_one())[2] != second
    for mesh in (seeded, other, executed):
        await mesh.stop()


async def test_modules_are_there_once_and_chance_is_not(cluster):
    mesh = await spawn(cluster, "has-torch", "zygote", 8, preload=("torch",))
    assert set((await mesh.loaded.call("torch")).values) == {True}
    draws = list((await mesh.draw.call()).values)
    assert len({draw[0] for draw in draws}) == len({draw[1] for draw in draws}) == 8
    memory = list((await mesh.memory.call()).values)
    shared = sum(each["Pss"] for each in memory) / sum(each["Rss"] for each in memory)
    assert shared < 0.5, f"the workers together have {shared:.0%} of the memory of eight alone"
    plain = await spawn(cluster, "no-torch", "auto")
    assert set((await plain.loaded.call("torch")).values) == {False}
    (kept,) = [zygote for zygote in await zygotes(cluster) if zygote["modules"] == ["torch"]]
    assert kept["state"] == "ready" and kept["made"] >= 8 and kept["memory_bytes"] > 50 << 20
    await eventually(lambda: kept["name"] in str(cluster.controller.status()["nodes"][0]["zygotes"]))
    await plain.stop()
    await mesh.stop()


async def test_what_a_module_sets_when_imported_holds_in_forked_workers_too(cluster, tmp_path):
    (tmp_path / "sets_things.py").write_text(
        "import logging, signal, sys\nsignal.signal(signal.SIGUSR2, signal.SIG_IGN)\n"
        "logging.basicConfig(level=logging.DEBUG)\nsys.setrecursionlimit(4321)\n"
    )
    env = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    found = []
    for method in METHODS:
        mesh = await spawn(cluster, "set", method, 1, preload=("sets_things",), env=env)
        facts = await mesh.facts.call_one()
        found.append([facts[name] for name in ("handlers", "log_level", "recursion")])
        await mesh.stop()
    assert found[0] == found[1]
    assert found[0][0][int(signal.SIGUSR2)] == str(signal.SIG_IGN)
    assert found[0][1:] == [logging.INFO, 4321]


async def test_executed_workers_have_their_modules_too(cluster):
    mesh = await spawn(cluster, "late-numpy", "exec", 1, preload=("numpy",))
    assert await mesh.loaded.call_one("numpy")
    await mesh.stop()


async def test_where_a_zygote_is_refused_workers_are_executed_or_the_reason_is_the_error(cluster, tmp_path):
    (tmp_path / "threaded.py").write_text(
        "import threading\nthreading.Thread(target=threading.Event().wait, daemon=True).start()\n"
    )
    env = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    mesh = await spawn(cluster, "threaded", "auto", preload=("threaded",), env=env)
    assert set((await mesh.loaded.call("threaded")).values) == {True}
    assert not any(is_forked(cluster, pid) for pid in (await mesh.pid.call()).values)
    await cluster.event("zygote_refused", "node-0", fits=lambda event: "2 threads" in event.text)
    error = await error_of(spawn(cluster, "insists", "zygote", preload=("threaded",), env=env), CannotFork)
    assert "2 threads" in error.evidence and error.code == "E-PROC-005"
    assert cluster.controller.find_mesh("insists") is None
    await mesh.stop()


async def test_a_mesh_whose_zygote_still_imports_can_be_given_up(cluster, tmp_path):
    os.mkfifo(tmp_path / "gate")
    (tmp_path / "slow_import.py").write_text(f"open({str(tmp_path / 'gate')!r}).read()\n")
    env = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    task = asyncio.ensure_future(spawn(cluster, "given-up", "zygote", preload=("slow_import",), env=env))
    await eventually(lambda: "slow_import" in str(cluster.controller.status()["nodes"][0]["zygotes"]))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        async with asyncio.timeout(20.0):
            await task
    assert cluster.controller.find_mesh("given-up") is None
    await asyncio.to_thread((tmp_path / "gate").write_text, "open")


@pytest.mark.parametrize("options", [{"preload": "torch"}, {"preload": ("no module",)}, {"start_method": "fork"}])
async def test_nonsense_is_refused_before_anything_starts(cluster, options):
    method = options.pop("start_method", "auto")
    error = await error_of(spawn(cluster, "nonsense", method, **options), BadStart)
    assert error.code == "E-MESH-004"


async def test_ranks_with_gpus_are_never_forked(tmp_path):
    gpu = Gpu(0, "GPU-0", "H100", 80 * 2**30)
    info = replace(simulated_info("node-0"), gpus=(gpu,), cpu_slots=0)
    table = ProcessTable()
    zygotes = Zygotes(table, tmp_path)
    starter = ProcessStarter(table, info, zygotes=zygotes)
    spec = WorkerSpec(
        "run",
        7,
        "m",
        0,
        8,
        9,
        Shape.of(ranks=1),
        devices=(0,),
        env={"A": "b"},
        cwd=str(tmp_path),
        start_method="zygote",
    )
    birth = Birth(spec, "unix:///nonexistent/nobody", (0, 1), "token", "node-0", Timings())
    error = await error_of(starter.start(birth, tmp_path / "log"), CannotFork)
    assert "CUDA" in error.evidence
    assert zygotes.facts() == [] and not table.children
    await zygotes.close()
    table.close()
