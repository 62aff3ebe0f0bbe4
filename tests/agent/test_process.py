from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvloop
from support.process_cases import (
    DEBUGGER,
    EVADER,
    FORKER,
    HELD_BY_DEBUGGER,
    REPORT,
    TRACE_EXIT,
    alive,
    open_fds,
    python,
    reported,
    until,
)

from miles_agents.agent.process import CannotStart, Command, ProcessTable, SpawnOffMainThread
from miles_agents.agent.process_exit import OomWatch
from miles_agents.agent.process_tree import ProcessId, children_of, descendants, kill_below, read_stat

FACTS = """
import ctypes, json, os, resource, signal, sys
libc = ctypes.CDLL(None)
def get(option):
    value = ctypes.c_int()
    libc.prctl(option, ctypes.byref(value), 0, 0, 0)
    return value.value
print('to stderr', file=sys.stderr)
print(json.dumps(dict(
    argv=sys.argv[1:], env=dict(os.environ), cwd=os.getcwd(), stdin=os.readlink('/proc/self/fd/0'),
    deathsig=get(2), subreaper=get(37), sid=os.getsid(0), pid=os.getpid(), ppid=os.getppid(),
    mask=[int(s) for s in signal.pthread_sigmask(signal.SIG_BLOCK, [])],
    hup=signal.getsignal(signal.SIGHUP) == signal.SIG_DFL, affinity=sorted(os.sched_getaffinity(0)),
    nofile=resource.getrlimit(resource.RLIMIT_NOFILE), core=resource.getrlimit(resource.RLIMIT_CORE)[0],
    oom=int(open('/proc/self/oom_score_adj').read()),
    fds=sorted(int(fd) for fd in os.listdir('/proc/self/fd') if os.path.lexists(f'/proc/self/fd/{fd}')),
)))
"""


@pytest.fixture
async def table() -> Iterator[ProcessTable]:
    before = open_fds()
    table = ProcessTable()
    yield table
    await table.kill_all(grace_s=0)
    assert await table.reap_orphans() == ()
    table.close()
    assert open_fds() == before


async def facts_of(table: ProcessTable, command: Command) -> dict:
    child = await table.spawn(command)
    exit_ = await child.wait(30)
    text = command.log_path.read_text()
    assert exit_ is not None
    assert exit_.code == 0, text
    return json.loads(text.splitlines()[-1])


async def test_a_child_gets_exactly_what_the_command_says(table: ProcessTable, tmp_path: Path) -> None:
    read_end, write_end = os.pipe()
    env = {"PATH": "/bin", "GREETING": "grüß = dich\nzwei", "EMPTY": ""}
    (tmp_path / "child.log").write_text("earlier\n")
    try:
        facts = await facts_of(table, python(tmp_path, FACTS, "a b", "--", env=env, pass_fds=(write_end,)))
    finally:
        os.close(read_end)
        os.close(write_end)
    assert facts["argv"] == ["a b", "--"]
    assert {name: facts["env"][name] for name in env} == env
    assert set(facts["env"]) <= {*env, "LC_CTYPE"}  # the interpreter's own locale coercion
    assert facts["cwd"] == str(tmp_path)
    assert facts["stdin"] == "/dev/null"
    assert facts["fds"] == [0, 1, 2, write_end]
    assert facts["sid"] == facts["pid"]
    assert (tmp_path / "child.log").read_text().splitlines()[:2] == ["earlier", "to stderr"]


async def test_a_new_log_is_private(table: ProcessTable, tmp_path: Path) -> None:
    await facts_of(table, python(tmp_path, FACTS))
    assert (tmp_path / "child.log").stat().st_mode & 0o777 == 0o600


async def test_hygiene_holds_before_the_first_instruction(table: ProcessTable, tmp_path: Path) -> None:
    hup = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGUSR1])
    try:
        facts = await facts_of(table, python(tmp_path, FACTS))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGHUP, hup)
    assert facts["deathsig"] == signal.SIGKILL
    assert facts["subreaper"] == 1
    assert facts["ppid"] == os.getpid()
    assert facts["mask"] == []
    assert facts["hup"]
    assert facts["nofile"][0] == min(facts["nofile"][1], 1 << 20)
    assert facts["core"] == 0
    assert facts["oom"] >= 500


async def test_a_child_runs_on_the_cpus_it_is_given(table: ProcessTable, tmp_path: Path) -> None:
    cpu = max(os.sched_getaffinity(0))
    facts = await facts_of(table, python(tmp_path, FACTS, cpus=(cpu,)))
    assert facts["affinity"] == [cpu]


async def test_a_numa_node_that_does_not_exist_costs_a_line_in_the_log(table: ProcessTable, tmp_path: Path) -> None:
    await facts_of(table, python(tmp_path, FACTS, numa_node=1023))
    text = (tmp_path / "child.log").read_text()
    assert "cannot run on cpus of NUMA node 1023" in text
    assert "cannot bind memory to NUMA node 1023" in text


async def test_memory_is_bound_to_the_numa_node_or_the_log_says_why_not(table: ProcessTable, tmp_path: Path) -> None:
    command = python(tmp_path, "print(open('/proc/self/numa_maps').read())", numa_node=0)
    child = await table.spawn(command)
    assert (await child.wait(30)).code == 0
    text = command.log_path.read_text()
    # Containers may forbid set_mempolicy; never silently.
    assert "bind:0" in text or "cannot bind memory to NUMA node 0: Operation not permitted" in text


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("raise SystemExit(3)", "exit code 3"),
        ("pass", "exit code 0"),
        ("import os; os.kill(os.getpid(), 9)", "killed by SIGKILL (9)"),
        ("import os; os.kill(os.getpid(), 11)", "killed by SIGSEGV (11)"),
        ("import os; os.kill(os.getpid(), 40)", "killed by signal 40 (40)"),
    ],
)
async def test_the_end_of_a_child_is_told(table: ProcessTable, tmp_path: Path, code: str, text: str) -> None:
    child = await table.spawn(python(tmp_path, code))
    exit_ = await child.exited
    assert exit_.describe() == text
    assert child.describe() == text
    assert child.state() is None
    assert not child.send(signal.SIGTERM)
    assert not child.send_group(signal.SIGTERM)
    assert child.pid not in table.children


async def test_an_out_of_memory_kill_is_told_from_other_kills(tmp_path: Path) -> None:
    count = tmp_path / "memory.events"
    count.write_text("oom 0\noom_kill 4\n")
    table = ProcessTable(oom=OomWatch(count))
    child = await table.spawn(python(tmp_path, REPORT + "forever()"))
    other = await table.spawn(python(tmp_path, REPORT + "forever()"))
    third = await table.spawn(python(tmp_path, REPORT + "forever()"))
    count.write_text("oom 1\noom_kill 5\n")
    other.send(signal.SIGKILL)  # ours, so not the kernel's
    assert (await other.exited).describe() == "killed by SIGKILL (9)"
    os.kill(child.pid, signal.SIGKILL)
    assert (await child.exited).describe() == "killed by SIGKILL (9) (out of memory)"
    os.kill(third.pid, signal.SIGKILL)
    assert (await third.exited).describe() == "killed by SIGKILL (9)"


async def test_waiting_can_be_cancelled_without_harm(table: ProcessTable, tmp_path: Path) -> None:
    child = await table.spawn(python(tmp_path, REPORT + "forever()"))
    waiter = asyncio.create_task(child.wait())
    await asyncio.sleep(0)
    waiter.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiter
    assert await child.wait(0) is None
    child.send(signal.SIGINT)
    assert (await child.wait(30)) is not None


def script(path: Path, text: str, mode: int) -> str:
    path.write_text(text)
    path.chmod(mode)
    return str(path)


@pytest.mark.parametrize(
    ("make", "number", "advice"),
    [
        (lambda tmp: "no-such-program", 2, "Install no-such-program"),
        (lambda tmp: str(tmp / "nowhere"), 2, "Install"),
        (lambda tmp: script(tmp / "data", "#!/bin/sh\n", 0o600), 13, "chmod +x"),
        (str, 13, "chmod +x"),
        (lambda tmp: script(tmp / "lost", "#!/no/such/sh\n", 0o700), 2, "the first line of"),
        (lambda tmp: script(tmp / "odd", "no first line", 0o700), 8, "#!/bin/sh"),
    ],
)
async def test_what_cannot_be_executed_is_explained(
    table: ProcessTable, tmp_path: Path, make: object, number: int, advice: str
) -> None:
    program = make(tmp_path)
    command = Command(argv=(program, "--flag"), env={"PATH": "/usr/bin:/bin"}, cwd=tmp_path, log_path=tmp_path / "log")
    with pytest.raises(CannotStart) as caught:
        await table.spawn(command)
    error = caught.value
    assert error.fields["errno"] == number
    assert error.fields["argv"] == [program, "--flag"]
    assert "/usr/bin:/bin" in error.evidence
    assert advice in error.advice
    assert not table.children


async def test_a_missing_working_directory_is_explained(table: ProcessTable, tmp_path: Path) -> None:
    command = Command(argv=("true",), env={}, cwd=tmp_path / "gone", log_path=tmp_path / "log")
    with pytest.raises(CannotStart, match=r"working directory .*gone"):
        await table.spawn(command)


async def test_a_log_that_cannot_be_written_is_explained(table: ProcessTable, tmp_path: Path) -> None:
    command = Command(argv=("true",), env={}, cwd=tmp_path, log_path=tmp_path / "gone" / "log")
    with pytest.raises(CannotStart, match="cannot start true") as caught:
        await table.spawn(command)
    assert "gone/log" in caught.value.evidence


@pytest.mark.parametrize(
    ("argv", "env"), [(("a\0b",), {}), ((), {}), (("true",), {"A=B": "c"}), (("true",), {"A": "c\0"})]
)
async def test_what_exec_cannot_carry_is_refused(
    table: ProcessTable, tmp_path: Path, argv: tuple[str, ...], env: dict[str, str]
) -> None:
    with pytest.raises(CannotStart):
        await table.spawn(Command(argv=argv, env=env, cwd=tmp_path, log_path=tmp_path / "log"))


async def test_a_start_that_takes_too_long_is_given_up(table: ProcessTable, tmp_path: Path) -> None:
    with pytest.raises(CannotStart, match=r"not executing after 0\.0 s"):
        await table.spawn(python(tmp_path, REPORT + "forever()"), start_s=0.0)
    assert not table.children


async def test_a_cancelled_start_leaves_nothing(table: ProcessTable, tmp_path: Path) -> None:
    task = asyncio.create_task(table.spawn(python(tmp_path, REPORT + "forever()")))
    await until(lambda: bool(table.children), "the child is forked")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: not table.children, "the child is reaped")


async def test_only_the_main_thread_may_start_a_child(table: ProcessTable, tmp_path: Path) -> None:
    caught: list[BaseException] = []

    def elsewhere() -> None:
        try:
            asyncio.run(table.spawn(python(tmp_path, "pass")))
        except SpawnOffMainThread as error:
            caught.append(error)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    await until(lambda: not thread.is_alive(), "the thread ends")
    assert "PR_SET_PDEATHSIG" in caught[0].evidence
    assert not table.children


def told_by_proc(process: ProcessId, name: str) -> bytes:
    return Path(f"/proc/{process.pid}/{name}").read_bytes().strip(b"\0")


async def kill_evader(tmp_path: Path, grace_s: float) -> None:
    table = ProcessTable()
    file = tmp_path / "reported"
    child = await table.spawn(python(tmp_path, EVADER + "forever()", str(file)))
    await until(lambda: len(reported(file)) == 4, "the tree stands")
    tree = reported(file)
    assert alive(tree) == tree
    for hidden in reported(file, "evader"):
        assert told_by_proc(hidden, "environ") == b""
        assert told_by_proc(hidden, "cmdline") == b""
        assert read_stat(hidden.pid).session not in (child.pid, os.getsid(0))
    report = await table.kill_tree(child, grace_s=grace_s)
    assert alive(tree) == []
    assert [process for process in tree if read_stat(process.pid) is not None] == []
    assert report.clean
    assert not report.ended_by_itself
    assert report.exit.signal == signal.SIGKILL
    assert set(tree) <= set(report.processes)
    assert report.processes[0] == child.id
    assert set(children_of(os.getpid())) <= set(table.spared())
    table.close()


async def test_a_tree_that_hides_from_everything_is_killed_after_its_grace(tmp_path: Path) -> None:
    await kill_evader(tmp_path, grace_s=0.1)


def test_a_tree_is_killed_at_once_on_uvloop_too(tmp_path: Path) -> None:
    before = open_fds()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(kill_evader(tmp_path, grace_s=0))
    assert open_fds() == before


async def test_orphans_of_a_child_that_died_alone_are_ended(table: ProcessTable, tmp_path: Path) -> None:
    file = tmp_path / "reported"
    child = await table.spawn(python(tmp_path, EVADER + "forever()", str(file)))
    await until(lambda: len(reported(file)) == 4, "the tree stands")
    tree = reported(file)
    os.kill(child.pid, signal.SIGKILL)
    await child.exited
    await until(lambda: not alive(reported(file, "member")), "the group dies with its leader")
    assert alive(reported(file, "evader"))
    assert await table.reap_orphans() == ()
    assert alive(tree) == []


async def test_a_child_that_obeys_term_ends_by_itself(table: ProcessTable, tmp_path: Path) -> None:
    code = REPORT + "signal.signal(15, lambda *_: sys.exit(7))\nreport('child')\nforever()"
    child = await table.spawn(python(tmp_path, code, str(tmp_path / "reported")))
    await until(lambda: bool(reported(tmp_path / "reported")), "the handler is set")
    report = await table.kill_tree(child, grace_s=30)
    assert report.ended_by_itself
    assert report.exit.code == 7
    assert report.describe() == "exit code 7, 1 processes"


async def test_a_stopped_child_is_seen_and_hears_term(table: ProcessTable, tmp_path: Path) -> None:
    code = REPORT + "signal.signal(15, lambda *_: sys.exit(7))\nreport('child')\nforever()"
    child = await table.spawn(python(tmp_path, code, str(tmp_path / "reported")))
    await until(lambda: bool(reported(tmp_path / "reported")), "the handler is set")
    assert not child.stopped()
    child.send(signal.SIGSTOP)
    await until(child.stopped, "the child is stopped")
    assert child.describe() == "running (state T)"
    assert (await table.kill_tree(child, grace_s=30)).exit.code == 7


async def test_a_child_that_forks_without_end_is_ended(table: ProcessTable, tmp_path: Path) -> None:
    file = tmp_path / "reported"
    child = await table.spawn(python(tmp_path, FORKER, str(file)))
    await until(lambda: bool(reported(file, "many")), "it has forked for a while")
    below = [stat.id for stat in descendants(child.pid)]
    report = await table.kill_tree(child, grace_s=0)
    assert report.clean
    assert alive([*reported(file), *below, *report.processes]) == []
    assert set(children_of(os.getpid())) <= set(table.spared())


def start_stranger() -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-I", "-S", "-c", "import sys; sys.stdin.read()"], stdin=-1)


async def test_what_was_there_before_the_table_is_left_alone(tmp_path: Path) -> None:
    stranger = start_stranger()
    table = ProcessTable()
    child = await table.spawn(python(tmp_path, REPORT + "forever()"))
    assert (await table.kill_tree(child, grace_s=0)).clean
    assert stranger.poll() is None
    stranger.communicate()
    assert stranger.returncode == 0
    table.close()


async def test_what_does_not_end_is_named_with_its_state(table: ProcessTable, tmp_path: Path) -> None:
    file = tmp_path / "reported"
    child = await table.spawn(python(tmp_path, HELD_BY_DEBUGGER, str(file)))
    await until(lambda: bool(reported(file)), "the child lets itself be traced")
    debugger = await table.spawn(python(tmp_path, DEBUGGER, str(child.pid), "0"))
    await until(lambda: "attached" in (tmp_path / "child.log").read_text(), "the debugger holds it")
    report = await table.kill_tree(child, grace_s=0, kill_s=0.2)
    assert not report.clean
    assert report.exit is None
    assert [survivor.pid for survivor in report.survivors] == [child.pid]
    assert f"cannot be killed: pid {child.pid} (python" in report.describe()
    assert "state Z, zombie that a debugger holds" in report.describe()
    debugger.send(signal.SIGKILL)
    assert (await child.wait(30)).signal == signal.SIGKILL


async def test_what_is_below_a_child_that_hangs_in_its_exit_is_killed(table: ProcessTable, tmp_path: Path) -> None:
    file = tmp_path / "reported"
    code = REPORT + "if os.fork() == 0:\n    report('below')\n    forever()\n" + HELD_BY_DEBUGGER
    child = await table.spawn(python(tmp_path, code, str(file)))
    await until(lambda: len(reported(file)) == 2, "both run")
    debugger = await table.spawn(python(tmp_path, DEBUGGER, str(child.pid), TRACE_EXIT))
    await until(lambda: "attached" in (tmp_path / "child.log").read_text(), "the debugger holds it")
    killed = kill_below(os.getpid(), spare={*table.spared()} - {child.pid})
    assert killed == [child.id, *reported(file, "below")]
    await until(lambda: not alive(reported(file, "below")), "what is below ends")
    debugger.send(signal.SIGKILL)
    assert (await child.wait(30)).signal == signal.SIGKILL


class FakeGpu:
    """Holds memory for some questions, then gives it back; or never does."""

    def __init__(self, questions: int, size: int = 5 << 20) -> None:
        self.questions = questions
        self.size = size
        self.asked: list[set[int]] = []

    def used_bytes(self, pids) -> dict[int, int]:
        self.asked.append(set(pids))
        return {min(pids): self.size} if len(self.asked) <= self.questions else {}


async def test_killing_waits_until_gpu_memory_is_free(tmp_path: Path) -> None:
    gpu = FakeGpu(questions=2)
    table = ProcessTable(gpu=gpu)
    child = await table.spawn(python(tmp_path, REPORT + "forever()"))
    report = await table.kill_tree(child, grace_s=0)
    assert report.clean
    assert gpu.asked == [{child.pid}] * 3
    table.close()


async def test_killing_all_waits_for_gpu_memory_too(tmp_path: Path) -> None:
    gpu = FakeGpu(questions=2)
    table = ProcessTable(gpu=gpu)
    child = await table.spawn(python(tmp_path, REPORT + "forever()"))
    (report,) = await table.kill_all(grace_s=0)
    assert report.clean
    assert gpu.asked == [{child.pid}] * 3
    table.close()


async def test_gpu_memory_that_stays_is_reported(tmp_path: Path) -> None:
    table = ProcessTable(gpu=FakeGpu(questions=10**6))
    child = await table.spawn(python(tmp_path, REPORT + "forever()"))
    report = await table.kill_tree(child, grace_s=0, gpu_s=0.15)
    assert report.gpu_bytes == {child.pid: 5 << 20}
    assert not report.clean
    assert f"pid {child.pid} still holds 5 MiB of GPU memory" in report.describe()
    table.close()


async def test_all_children_are_killed_together(table: ProcessTable, tmp_path: Path) -> None:
    children = [await table.spawn(python(tmp_path, REPORT + "forever()")) for _ in range(4)]
    reports = await table.kill_all(grace_s=0)
    assert [report.exit.signal for report in reports] == [signal.SIGKILL] * 4
    assert {report.processes[0] for report in reports} == {child.id for child in children}
    assert not table.children


async def test_a_process_is_named_by_pid_and_start_time(table: ProcessTable, tmp_path: Path) -> None:
    file = tmp_path / "reported"
    child = await table.spawn(python(tmp_path, REPORT + "report('child')\nforever()", str(file)))
    await until(lambda: bool(reported(file)), "it runs")
    assert reported(file) == [child.id]
    assert alive([child.id]) == [child.id]
    assert alive([ProcessId(child.pid, child.start_time + 1)]) == []
