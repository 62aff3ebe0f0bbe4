"""Zygotes as real processes: the hand-over, whoever dies in it, and what is refused."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.leaks import MARK
from support.process_cases import alive, open_fds, reported, until
from support.zygote_cases import WAIT_S, pool

from miles_agents.agent import reaper
from miles_agents.agent.process_exit import OomWatch
from miles_agents.agent.process_launch import CannotStart
from miles_agents.agent.process_tree import children_of, descendants, read_stat
from miles_agents.agent.zygote_table import Limits
from miles_agents.agent.zygotes import MissingModule, NoZygote

pytestmark = pytest.mark.full
STEPS = ("ask", "leave", "adopt", "go")


@pytest.fixture(autouse=True)
def leaves_no_descriptor():
    before = open_fds()
    yield
    assert open_fds() == before


def is_ours(child) -> bool:
    """A child of this process that leads its own session, and runs."""
    stat = read_stat(child.pid)
    return stat is not None and (stat.ppid, stat.session, stat.group) == (os.getpid(), child.pid, child.pid)


def is_marked(pid):
    """Whether the checks for leaks know it as of this test session."""
    return f"{MARK}={os.environ[MARK]}".encode() in Path(f"/proc/{pid}/environ").read_bytes()


async def test_a_forked_worker_is_a_child_like_any_other(tmp_path):
    async with pool(tmp_path) as p:
        worker = await p.start(p.profile())
        assert is_ours(worker) and p.table.children[worker.pid] is worker
        await until(lambda: read_stat(worker.pid).name == "lonely[0]", "it has its own name")
        (zygote,) = p.zygote_pids()
        assert children_of(zygote) == []
        for pid in (zygote, worker.pid):
            assert is_marked(pid)
        worker.send(signal.SIGSEGV)
        assert (await worker.wait(WAIT_S)).describe() == "killed by SIGSEGV (11)"
        second = await p.start(p.profile(), 1)
        report = await p.table.kill_tree(second, grace_s=10.0)
        assert report.ended_by_itself and report.exit.signal == signal.SIGTERM
        assert p.zygote_pids() == [zygote]
        assert p.zygotes.facts()[0]["made"] == 2


async def test_sixteen_at_once_while_orphans_are_reaped(tmp_path):
    async with pool(tmp_path) as p:
        async with asyncio.TaskGroup() as tasks:
            starts = [tasks.create_task(p.start(p.profile(), number)) for number in range(16)]
            while not all(start.done() for start in starts):
                assert await p.table.reap_orphans() == ()
                await asyncio.sleep(0)
        workers = [start.result() for start in starts]
        assert all(map(is_ours, workers)) and len({worker.pid for worker in workers}) == 16
        assert len(p.zygote_pids()) == 1 and p.news == []


@pytest.mark.parametrize("step", STEPS)
async def test_a_zygote_killed_at_any_step_is_replaced_and_the_start_is_made_again(tmp_path, step):
    killed: list[int] = []

    def at_step(name, pid):
        if name == step and not killed and len(p.zygotes.facts()) == 1 and p.zygotes.facts()[0]["made"]:
            killed.append(pid)
            os.kill(pid, signal.SIGKILL)

    async with pool(tmp_path, on_step=at_step) as p:
        before = await p.start(p.profile(), 0)
        workers = await asyncio.gather(*(p.start(p.profile(), number) for number in (1, 2, 3)))
        assert all(map(is_ours, [before, *workers]))
        await until(lambda: read_stat(killed[0]) is None, "the dead zygote is reaped")
        again = await p.start(p.profile(), 4)
        assert is_ours(again)
        assert p.zygote_pids() and killed[0] not in p.zygote_pids()
        assert [kind for kind, _ in p.news] == ["zygote_failed"]
        await p.table.reap_orphans()
        assert p.strangers() == set() and all(map(is_ours, [before, *workers, again]))


@pytest.mark.parametrize("step", ["leave", "adopt"])
async def test_the_one_in_between_can_be_killed_too(tmp_path, step):
    """M, which forks the worker: its death is what it owes anyway, if the worker is known by then."""
    killed: list[int] = []

    def at_step(name, pid):
        if name == step:
            for child in children_of(pid):
                killed.append(child)
                os.kill(child, signal.SIGKILL)

    async with pool(tmp_path, on_step=at_step) as p:
        assert is_ours(await p.start(p.profile()))
        assert killed or step == "adopt"


async def test_a_worker_that_dies_in_its_hand_over_is_made_again(tmp_path):
    killed: list[int] = []

    def at_step(name, pid):
        if name == "leave" and not killed:
            killed.extend(stat.pid for stat in descendants(pid) if stat.group == stat.pid)
            os.kill(killed[0], signal.SIGKILL)

    async with pool(tmp_path, on_step=at_step) as p:
        worker = await p.start(p.profile())
        assert is_ours(worker) and worker.pid not in killed
        assert p.strangers() == set()


async def test_a_zygote_that_is_killed_again_and_again_is_given_up(tmp_path):
    def at_step(name, pid):
        os.kill(pid, signal.SIGKILL)

    async with pool(tmp_path, on_step=at_step) as p:
        with pytest.raises(NoZygote):
            await p.start(p.profile())
        with pytest.raises(NoZygote):
            await p.start(p.profile())
        assert [kind for kind, _ in p.news] == ["zygote_failed", "zygote_failed"]
        assert p.strangers() == set()


async def test_a_frozen_zygote_ends_the_start_and_is_ended(tmp_path):
    frozen: list[int] = []

    def at_step(name, pid):
        if name == "ask":
            frozen.append(pid)
            os.kill(pid, signal.SIGSTOP)

    async with pool(tmp_path, on_step=at_step) as p:
        task = asyncio.create_task(p.start(p.profile()))
        await until(lambda: bool(frozen), "it is frozen")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert read_stat(frozen[0]) is None
        assert p.strangers() == set()


@pytest.mark.parametrize("step", STEPS)
async def test_a_start_that_is_cancelled_leaves_nothing(tmp_path, step):
    asked: list[str] = []

    def at_step(name, pid):
        if name == step and not asked:
            asked.append(name)
            task.cancel()

    async with pool(tmp_path, on_step=at_step) as p:
        task = asyncio.create_task(p.start(p.profile()))
        with pytest.raises(asyncio.CancelledError):
            await task
        assert asked == [step]
        assert set(p.table.children) <= set(p.zygote_pids())
        assert is_ours(await p.start(p.profile()))


async def test_a_start_that_is_cancelled_twice_leaves_nothing(tmp_path):
    def at_step(name, pid):
        if name == "go":
            task.cancel()
            task.get_loop().call_soon(task.cancel)

    async with pool(tmp_path, on_step=at_step) as p:
        task = asyncio.create_task(p.start(p.profile()))
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: set(p.table.children) <= set(p.zygote_pids()), "the worker is ended")


async def test_killing_everything_includes_what_is_about_to_arrive(tmp_path):
    def at_step(name, pid):
        if name == "leave":
            p.table._arriving.clear()  # the first thing that ``kill_all`` does

    async with pool(tmp_path, on_step=at_step) as p:
        with pytest.raises(NoZygote):
            await p.start(p.profile())
        assert not p.table.children


async def test_a_worker_whose_directory_is_gone_cannot_start_and_the_zygote_lives_on(tmp_path):
    (tmp_path / "gone").mkdir()
    async with pool(tmp_path) as p:
        command = p.command()
        (tmp_path / "gone").rmdir()
        lost = type(command)(command.argv, command.env, tmp_path / "gone", command.log_path)
        with pytest.raises(CannotStart, match="working directory"):
            await p.zygotes.start(p.profile(), lost, p.birth(0), wait_s=WAIT_S)
        assert len(p.zygote_pids()) == 1 and p.news == []


async def test_a_start_that_can_never_be_is_no_fault_of_the_zygote(tmp_path):
    async with pool(tmp_path) as p:
        await p.start(p.profile())
        zygotes = p.zygote_pids()
        with pytest.raises(CannotStart, match="cannot start"):
            await p.start(p.profile(), 1, MILES_X="a\0b")
        assert p.zygote_pids() == zygotes and p.news == []


def private_memory(pid: int) -> bytes:
    """What a process can write."""
    parts = []
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for line in maps:
            place, mode = line.split()[:2]
            first, last = (int(each, 16) for each in place.split("-"))
            if mode.startswith("rw") and last - first < 1 << 27:
                memory.seek(first)
                parts.append(memory.read(last - first) or b"")
    return b"".join(parts)


async def test_a_worker_holds_no_secret_of_its_siblings(tmp_path):
    secrets = [os.urandom(16).hex() for _ in range(3)]
    async with pool(tmp_path) as p:
        starts = (p.start(p.profile(), number, MILES_SECRET=secret) for number, secret in enumerate(secrets))
        workers = await asyncio.gather(*starts)
        for worker, own in zip(workers, secrets, strict=True):
            memory = private_memory(worker.pid)
            assert [secret for secret in secrets if secret.encode() in memory] == [own]


async def test_a_log_that_cannot_be_written_is_no_fault_of_the_zygote(tmp_path):
    async with pool(tmp_path) as p:
        await p.start(p.profile())
        command = p.command()
        lost = type(command)(command.argv, command.env, command.cwd, tmp_path / "gone" / "log")
        with pytest.raises(CannotStart) as caught:
            await p.zygotes.start(p.profile(), lost, p.birth(0), wait_s=WAIT_S)
        assert "gone/log" in caught.value.evidence
        assert len(p.zygote_pids()) == 1 and p.news == []


async def test_an_out_of_memory_kill_of_a_forked_worker_is_told(tmp_path):
    count = tmp_path / "memory.events"
    count.write_text("oom_kill 4\n")
    async with pool(tmp_path, oom=OomWatch(count)) as p:
        worker = await p.start(p.profile())
        count.write_text("oom_kill 5\n")
        os.kill(worker.pid, signal.SIGKILL)
        assert (await worker.exited).describe() == "killed by SIGKILL (9) (out of memory)"


def module(folder: Path, name: str, text: str) -> str:
    (folder / f"{name}.py").write_text(text)
    return name


REFUSED = {
    "thread": ("import threading\nthreading.Thread(target=threading.Event().wait, daemon=True).start()", "2 threads"),
    "process": ("import subprocess\nsubprocess.Popen(['sleep', '60'])", "started a process"),
    "error": ("raise ValueError('not today')", "ValueError: not today"),
    "exit": ("raise SystemExit(3)", "SystemExit: 3"),
    "torch": ("class cuda:\n    is_initialized = staticmethod(lambda: True)", "CUDA context"),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_what_a_fork_would_break_is_refused_for_good(tmp_path, name):
    text, why = REFUSED[name]
    module(tmp_path, name, text)  # in the working directory, which comes first
    async with pool(tmp_path) as p:
        for _ in range(2):
            with pytest.raises(NoZygote, match=why):
                await p.start(p.profile(name))
        assert [kind for kind, _ in p.news] == ["zygote_refused"]
        await until(lambda: not p.table.children, "what the import started has ended")


async def test_a_module_of_the_run_is_found_by_the_paths_of_the_run(tmp_path):
    (tmp_path / "own").mkdir()
    module(tmp_path / "own", "only_here", "")
    async with pool(tmp_path) as p:
        with pytest.raises(MissingModule, match="only_here"):
            await p.start(p.profile("only_here"))
        assert p.news == []
        worker = await p.start(p.profile("only_here", sys_path=(str(tmp_path / "own"),)))
        assert is_ours(worker)
        with pytest.raises(NoZygote, match="nowhere"):
            await p.start(p.profile("nowhere", sys_path=(str(tmp_path / "own"),)))


async def test_a_zygote_that_dies_while_it_imports_is_tried_twice_and_shows_its_last_lines(tmp_path):
    module(tmp_path, "killer", "import os\nprint('so it goes', flush=True)\nos.kill(os.getpid(), 9)")
    async with pool(tmp_path) as p:
        with pytest.raises(NoZygote, match="SIGKILL"):
            await p.start(p.profile("killer"))
        assert [kind for kind, _ in p.news] == ["zygote_failed"] * 2
        assert "so it goes" in p.news[0][1]


async def test_who_waits_too_long_for_imports_is_told_and_the_zygote_goes_on(tmp_path):
    os.mkfifo(tmp_path / "gate")
    module(tmp_path, "slow", f"open({str(tmp_path / 'gate')!r}).read()")
    async with pool(tmp_path) as p:
        with pytest.raises(NoZygote, match="still imports"):
            await p.start(p.profile("slow"), wait_s=0.0)
        waiting = asyncio.create_task(p.start(p.profile("slow")))
        await asyncio.to_thread((tmp_path / "gate").write_text, "open")
        assert is_ours(await waiting)


async def test_other_variables_make_another_zygote_and_idle_ones_end(tmp_path):
    async with pool(tmp_path, limits=Limits(most=2, idle_s=0.3)) as p:
        for seed in ("1", "2", "3"):
            worker = await p.start(p.profile(PYTHONHASHSEED=seed), PYTHONHASHSEED=seed)
            assert is_ours(worker)
            assert len(p.zygotes.facts()) <= 2
        await until(lambda: not p.zygotes.facts(), "all are idle")
        await until(lambda: len(p.table.children) == 3, "only the workers are left")


async def test_one_that_was_warmed_stays_and_is_used(tmp_path):
    async with pool(tmp_path, limits=Limits(idle_s=0.0)) as p:
        p.zygotes.warm(p.profile())
        await until(lambda: [fact["state"] for fact in p.zygotes.facts()] == ["ready"], "it is ready")
        (warm,) = p.zygote_pids()
        await p.start(p.profile())
        assert p.zygote_pids() == [warm]
        os.kill(warm, signal.SIGKILL)
        await until(lambda: p.zygote_pids() not in ([], [warm]), "another one takes its place")
        await until(lambda: [fact["state"] for fact in p.zygotes.facts()] == ["ready"], "it is ready")


AGENT = """
import asyncio, os, signal, sys
from pathlib import Path
from support.process_cases import REPORT
from support.zygote_cases import Pool
async def main(folder, step):
    def at_step(name, pid):
        if name == step and p.zygotes.facts()[0]["made"]:
            os.kill(os.getpid(), signal.SIGKILL)
    p = Pool(folder, on_step=at_step)
    for number in range(2):
        worker = await p.start(p.profile(), number)
        with (folder / "reported").open("a") as file:
            for each in (worker.id, *(child.id for child in p.table.children.values())):
                file.write(f"child {each.pid} {each.start_time}\\n")
asyncio.run(main(Path(sys.argv[1]), sys.argv[2]))
"""


@pytest.mark.parametrize("step", STEPS)
def test_an_agent_killed_at_any_step_leaves_nothing(tmp_path, step):
    argv = [sys.executable, "-I", "-S", reaper.__file__, "--", sys.executable, "-c", AGENT, str(tmp_path), step]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    done = subprocess.run(argv, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 128 + signal.SIGKILL, done.stderr
    known = reported(tmp_path / "reported")
    assert len(known) >= 2 and alive(known) == []
