from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.process_cases import (
    DEBUGGER,
    EVADER,
    FORKER,
    HELD_BY_DEBUGGER,
    REPORT,
    TRACE_EXIT,
    alive,
    open_fds,
    reported,
    until,
    until_sync,
)

from miles_agents.agent import reaper
from miles_agents.agent.process import become_subreaper
from miles_agents.agent.reaper import EXIT_NOT_CLEAN, LIFELINE_VARIABLE, watch_reaper

BARE = [sys.executable, "-I", "-S"]
OBEDIENT = REPORT + "signal.signal(15, lambda *_: sys.exit(7))\nreport('agent')\nforever()"
AGENT = """
import asyncio, os, signal, sys
from pathlib import Path
from miles_agents.agent.process import Command, ProcessTable
from miles_agents.agent.reaper import watch_reaper
async def main(file, script, action):
    ended = asyncio.Event()
    watch_reaper(asyncio.get_running_loop(), ended.set)
    table = ProcessTable()
    command = Command((sys.executable, '-I', '-S', '-c', script, file), {}, Path.cwd(), Path('child.log'))
    child = await table.spawn(command)
    if action == 'stop the child':
        child.send(signal.SIGSTOP)
    Path('agent').write_text(str(os.getpid()))
    await ended.wait()
    await table.kill_tree(child, grace_s=0)
    Path('saw the reaper die').touch()
asyncio.run(main(*sys.argv[1:]))
"""
"""An agent with one child; ends it when the reaper dies."""


class Run:
    """One reaper with its agent."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / "reported"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *command: str, options: tuple[str, ...] = (), **popen: object) -> subprocess.Popen[bytes]:
        argv = [*BARE, reaper.__file__, *options, "--", *command]
        with (self.folder / "stderr").open("ab") as log:
            self.process = subprocess.Popen(argv, cwd=self.folder, stderr=log, **popen)
        return self.process

    def start_bare(self, code: str, *arguments: str, **popen: object) -> subprocess.Popen[bytes]:
        return self.start(*BARE, "-c", code, str(self.file), *arguments, **popen)

    def start_agent(self, script: str, action: str = "", **popen: object) -> subprocess.Popen[bytes]:
        return self.start(sys.executable, "-c", AGENT, str(self.file), script, action, **popen)

    def agent_pid(self) -> int:
        path = self.folder / "agent"
        until_sync(lambda: path.exists() and path.read_text() != "", "the agent runs")
        return int(path.read_text())

    def stderr(self) -> str:
        return (self.folder / "stderr").read_text()


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    before = open_fds()
    run = Run(tmp_path)
    yield run
    if run.process is not None:
        if run.process.poll() is None:
            run.process.send_signal(signal.SIGQUIT)
        run.process.wait(30)
        for stream in (run.process.stdin, run.process.stdout):
            if stream is not None:
                stream.close()
    assert alive(reported(run.file)) == []
    assert open_fds() == before


@pytest.mark.parametrize(
    ("code", "number"),
    [
        ("raise SystemExit(0)", 0),
        ("raise SystemExit(3)", 3),
        ("import os; os.kill(os.getpid(), 9)", 137),
        ("import os; os.kill(os.getpid(), 11)", 139),
    ],
)
def test_the_reaper_ends_like_its_agent(run: Run, code: str, number: int) -> None:
    assert run.start_bare(code).wait(30) == number


def test_the_agent_has_the_reapers_standard_streams(run: Run) -> None:
    process = run.start_bare(
        "import sys; print(sys.stdin.read().upper())", stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.communicate(b"abc", timeout=30)[0] == b"ABC\n"
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("program", "reason"), [("no-such-agent", "No such file"), ("/etc/passwd", "Permission denied")]
)
def test_an_agent_that_cannot_be_executed_is_127(run: Run, program: str, reason: str) -> None:
    assert run.start(program).wait(30) == 127
    assert f"reaper: cannot start the agent {program}: {reason}" in run.stderr()


def test_a_wrong_command_line_is_refused(run: Run) -> None:
    assert run.start().wait(30) == 64
    assert "usage" in run.stderr()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_are_passed_on(run: Run, number: signal.Signals) -> None:
    code = REPORT + f"signal.signal({int(number)}, lambda *_: sys.exit(7))\nreport('agent')\nforever()"
    process = run.start_bare(code)
    until_sync(lambda: bool(reported(run.file)), "the handler is set")
    process.send_signal(number)
    assert process.wait(30) == 7


def test_quit_kills_an_agent_that_does_not_listen(run: Run) -> None:
    process = run.start_bare(REPORT + "signal.signal(15, signal.SIG_IGN)\nreport('agent')\nforever()")
    until_sync(lambda: bool(reported(run.file)), "the agent runs")
    os.kill(reported(run.file)[0].pid, signal.SIGSTOP)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGQUIT)
    assert process.wait(30) == 137


def test_the_agent_starts_with_an_empty_signal_mask(run: Run) -> None:
    code = "import signal; print(signal.pthread_sigmask(signal.SIG_BLOCK, []))"
    assert run.start_bare(code, stdout=subprocess.PIPE).communicate(timeout=30)[0] == b"set()\n"


def test_an_ignored_sigchld_is_no_obstacle(run: Run) -> None:
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        process = run.start_bare("raise SystemExit(3)", restore_signals=False)
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert process.wait(30) == 3


def test_nothing_is_left_of_a_tree_that_hides_when_the_agent_ends(run: Run) -> None:
    process = run.start_bare(EVADER + "forever()")
    until_sync(lambda: len(reported(run.file)) == 4, "the tree stands")
    os.kill(reported(run.file, "child")[0].pid, signal.SIGKILL)
    assert process.wait(30) == 137
    assert alive(reported(run.file)) == []


def test_nothing_is_left_when_the_agent_is_killed(run: Run) -> None:
    process = run.start_agent(EVADER + "forever()")
    until_sync(lambda: len(reported(run.file)) == 4, "the tree stands")
    os.kill(run.agent_pid(), signal.SIGKILL)
    assert process.wait(30) == 137
    assert alive(reported(run.file)) == []


def test_nothing_is_left_when_the_agent_is_killed_over_a_stopped_child(run: Run) -> None:
    process = run.start_agent(EVADER + "forever()", "stop the child")
    agent = run.agent_pid()
    os.kill(agent, signal.SIGKILL)
    assert process.wait(30) == 137
    assert alive(reported(run.file)) == []


def test_nothing_is_left_when_the_agent_is_killed_over_a_fork_storm(run: Run) -> None:
    process = run.start_agent(FORKER)
    until_sync(lambda: bool(reported(run.file, "many")), "it has forked for a while")
    os.kill(run.agent_pid(), signal.SIGKILL)
    assert process.wait(60) == 137
    assert alive(reported(run.file)) == []


def test_an_agent_ends_its_children_when_the_reaper_dies(run: Run) -> None:
    become_subreaper()
    process = run.start_agent(EVADER + "forever()")
    until_sync(lambda: len(reported(run.file)) == 4, "the tree stands")
    agent = run.agent_pid()
    process.kill()
    until_sync((run.folder / "saw the reaper die").exists, "the agent has cleaned up")
    assert alive(reported(run.file)) == []
    assert os.waitpid(agent, 0) == (agent, 0)


def test_what_does_not_end_is_named_and_the_exit_code_says_so(run: Run) -> None:
    become_subreaper()
    code = REPORT + f"if os.fork() == 0:\n    exec({HELD_BY_DEBUGGER!r})\nreport('agent')\nforever()"
    process = run.start_bare(code, options=("--give-up-s", "0.3"))
    until_sync(lambda: len(reported(run.file)) == 2, "both run")
    held = reported(run.file, "child")[0]
    debugger = subprocess.Popen([*BARE, "-c", DEBUGGER, str(held.pid), "0"], stdout=subprocess.PIPE)
    assert debugger.stdout is not None
    assert debugger.stdout.readline() == b"attached\n"
    os.kill(reported(run.file, "agent")[0].pid, signal.SIGKILL)
    try:
        assert process.wait(30) == EXIT_NOT_CLEAN
        assert f"reaper: pid {held.pid} (python" in run.stderr()
        assert "state Z" in run.stderr()
    finally:
        debugger.kill()
        debugger.communicate()
    os.waitpid(held.pid, 0)


def test_what_is_below_a_process_that_hangs_in_its_exit_is_killed(run: Run) -> None:
    become_subreaper()
    below = REPORT + "if os.fork() == 0:\n    report('below')\n    forever()\n" + HELD_BY_DEBUGGER
    code = REPORT + f"if os.fork() == 0:\n    exec({below!r})\nreport('agent')\nforever()"
    process = run.start_bare(code, options=("--give-up-s", "0.3"))
    until_sync(lambda: len(reported(run.file)) == 3, "all run")
    held = reported(run.file, "child")[0]
    debugger = subprocess.Popen([*BARE, "-c", DEBUGGER, str(held.pid), TRACE_EXIT], stdout=subprocess.PIPE)
    assert debugger.stdout is not None
    assert debugger.stdout.readline() == b"attached\n"
    os.kill(reported(run.file, "agent")[0].pid, signal.SIGKILL)
    try:
        assert process.wait(30) == EXIT_NOT_CLEAN
        assert alive(reported(run.file, "below")) == []
    finally:
        debugger.kill()
        debugger.communicate()
    for process_id in (held, *reported(run.file, "below")):
        os.waitpid(process_id.pid, 0)


def test_the_reaper_is_small(run: Run) -> None:
    process = run.start_bare(OBEDIENT)
    until_sync(lambda: bool(reported(run.file)), "the agent runs")
    lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
    sizes = [int(line.split()[1]) for line in lines if line.startswith("Pss:")]
    assert sizes[0] < 9 * 1024
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 7


async def test_the_lifeline_is_watched_once_and_not_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    before = open_fds()
    read_end, write_end = os.pipe()
    os.set_inheritable(read_end, True)
    monkeypatch.setenv(LIFELINE_VARIABLE, str(read_end))
    deaths: list[str] = []
    stop = watch_reaper(asyncio.get_running_loop(), lambda: deaths.append("died"))
    assert LIFELINE_VARIABLE not in os.environ
    assert not os.get_inheritable(read_end)
    os.close(write_end)
    await until(lambda: bool(deaths), "the death is told")
    stop()
    assert deaths == ["died"]
    assert open_fds() == before


async def test_without_a_reaper_there_is_nothing_to_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(LIFELINE_VARIABLE, raising=False)
    before = open_fds()
    watch_reaper(asyncio.get_running_loop(), lambda: pytest.fail("nobody died"))()
    assert open_fds() == before


@pytest.mark.parametrize("ends", ["raise SystemExit(5)", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"])
def test_the_reapers_word_comes_when_the_node_is_clean_and_its_directory_is_gone(run, tmp_path, ends):
    (tmp_path / "copied" / "lib").mkdir(parents=True)
    says = {"MILES_REAPER_SAYS": "the word", "MILES_REAPER_REMOVES": str(tmp_path / "copied")}
    shows = (
        f"import os, sys; print(sorted(name for name in os.environ if 'REAPER_' in name)); sys.stdout.flush(); {ends}"
    )
    process = run.start_bare(shows, env={**os.environ, **says}, stdout=subprocess.PIPE)
    out, _ = process.communicate(timeout=60)
    assert out.decode() == "['MILES_REAPER_FD']\n\nthe word\n"
    assert not (tmp_path / "copied").exists()
