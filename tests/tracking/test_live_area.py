"""The live view on a terminal: what is printed stays whole above it, whatever prints, and nothing of it is left."""

import asyncio
import io
import os
import sys
import termios
import threading

import pytest
from rich.console import Console
from support.procs import eventually, eventually_sync
from support.terminal import Terminal

from miles.tracking.console import MAX_WAITING, RunConsole, can_be_live
from miles.tracking.live_area import LiveArea


class Screen(io.StringIO):
    """A file that is a terminal of some size, and shows what was written."""

    def __init__(self, columns=60, rows=20):
        super().__init__()
        self.terminal = Terminal(columns, rows)
        self.console = Console(file=self, force_terminal=True, width=columns, height=rows, highlight=False)

    def write(self, text):
        self.terminal.feed(text)
        return len(text)

    def isatty(self):
        return True

    def resize(self, columns, rows=20):
        self.terminal.resize(columns, rows)
        self.console.size = (columns, rows)


@pytest.fixture
def screen():
    return Screen()


def a_run(console):
    console.progress.run_id = "run-1"
    return console


def labels(screen):
    return [line.split(" ")[0] for line in screen.terminal.lines()]


def test_lines_stand_above_and_the_view_goes_away_at_the_end(screen):
    console = a_run(RunConsole(screen.console, is_live=True))
    with console.live():
        with console.bars(4, 0), console.phase("generate"):
            console.say("first")
            console.show({"finished": 3, "target": 8})
            console.say("second")
            assert labels(screen) == ["first", "second", "run", "generate", "rollouts"]
            assert "3/8" in screen.terminal.lines()[3]
        with console.phase("train"):
            assert labels(screen) == ["first", "second", "run", "train", "rollouts"]
            assert "3/8" not in "".join(screen.terminal.lines()), "counts are those of the phase before"
    assert screen.terminal.lines() == ["first", "second"]
    console.say("after")
    assert screen.terminal.lines() == ["first", "second", "after"]


def test_a_line_that_is_longer_than_the_terminal_stays_whole(screen):
    console = a_run(RunConsole(screen.console, is_live=True))
    with console.live():
        console.say("x" * 150)
        console.say("y")
    assert screen.terminal.lines() == ["x" * 60, "x" * 60, "x" * 30, "y"]


def test_many_lines_scroll_and_all_can_be_read(screen):
    console = a_run(RunConsole(screen.console, is_live=True))
    with console.live(), console.bars(4, 0):
        for number in range(100):
            console.say(f"line {number}")
    assert screen.terminal.lines() == [f"line {number}" for number in range(100)]


def test_what_others_write_to_stderr_is_not_mixed_with_the_view(screen):
    before = sys.stderr
    sys.stderr = screen
    try:
        console = a_run(RunConsole(screen.console, is_live=True))
        with console.live():
            try:
                raise RuntimeError("of somebody's thread")
            except RuntimeError:
                sys.excepthook(*sys.exc_info())
            console.say("told")
        assert sys.stderr is screen
    finally:
        sys.stderr = before
    shown = screen.terminal.lines()
    assert shown[0] == "Traceback (most recent call last):"
    assert shown[-2:] == ["RuntimeError: of somebody's thread", "told"]


@pytest.mark.parametrize("columns", [30, 59, 61, 120])
def test_lines_survive_a_change_of_width(screen, columns):
    console = a_run(RunConsole(screen.console, is_live=True))
    with console.live(), console.bars(4, 0):
        console.say("before")
        screen.resize(columns)
        console.say("after")
        asked = labels(screen)
    assert asked[0] == "before"
    assert asked[-3:] == ["after", "run", "rollouts"]
    assert [line for line in labels(screen) if line in ("before", "after")] == ["before", "after"]


def test_where_nothing_was_broken_by_it_nothing_is_left_of_the_old_width(screen):
    console = a_run(RunConsole(screen.console, is_live=True))
    with console.live():
        screen.resize(40)
        console.say("after")
    assert screen.terminal.lines() == ["after"]


def test_a_terminal_that_is_low_shows_less(screen):
    console = a_run(RunConsole(screen.console, is_live=True))
    with console.live(), console.bars(4, 0), console.phase("generate"):
        screen.resize(60, 3)
        console.say("told")
    assert screen.terminal.lines()[-1] == "told"


def test_a_flood_of_lines_draws_the_view_a_few_times_only(screen):
    console = a_run(RunConsole(screen.console, is_live=True))
    drawn = []
    view = console._view
    console._view = lambda *size: drawn.append(size) or view(*size)
    with console.live():
        for number in range(1000):
            console.say(f"line {number}")
    assert screen.terminal.lines() == [f"line {number}" for number in range(1000)]
    assert len(drawn) < 30


def test_threads_do_not_tear_it(screen):
    console = a_run(RunConsole(screen.console, is_live=True))
    with console.live(), console.bars(4, 0):
        area = console._area
        threads = [threading.Thread(target=lambda n=n: [area.print(f"{n}-{i}") for i in range(50)]) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    shown = screen.terminal.lines()
    assert sorted(shown) == sorted(f"{n}-{i}" for n in range(4) for i in range(50))


def test_colours_that_were_asked_for_in_a_pipe_make_no_terminal(tmp_path):
    with (tmp_path / "out").open("w") as file:
        console = RunConsole(Console(file=file, force_terminal=True))
        with console.live(), console.bars(4, 0), console.phase("generate"):
            console.say("told")
    assert (tmp_path / "out").read_text() == "told\n"


@pytest.fixture
def tty():
    """Both ends of a terminal, the program's as a file."""
    ours, theirs = os.openpty()
    os.set_blocking(ours, False)
    file = os.fdopen(theirs, "w")
    yield ours, file
    file.close()
    os.close(ours)


def read(fd):
    try:
        return os.read(fd, 1 << 16).decode()
    except BlockingIOError:
        return ""


@pytest.mark.parametrize(("term", "is_one"), [("xterm", True), ("dumb", False), ("unknown", False)])
def test_a_terminal_that_can_do_nothing_gets_plain_lines(tty, term, is_one):
    assert can_be_live(Console(file=tty[1], _environ={"TERM": term})) == is_one


def test_no_color_means_no_colour(tty):
    console = a_run(RunConsole(Console(file=tty[1], _environ={"TERM": "xterm-256color", "NO_COLOR": "1"})))
    console.progress.rewards.extend([0.1, 0.9])
    with console.live(), console.bars(4, 2):
        eventually_sync(console._area.can_write, 60)
        with console.phase("train"):
            pass
    got = []
    eventually_sync(lambda: got.append(read(tty[0])) or "rollouts" in "".join(got), 60)  # it comes in pieces
    text = "".join(got)
    assert not [code for code in ("\x1b[3", "\x1b[9", "\x1b[38") if code in text]


async def test_a_terminal_that_takes_nothing_stops_nobody_and_gets_all_lines_later(tty):
    ours, file = tty
    console = a_run(RunConsole(Console(file=file, _environ={"TERM": "xterm"}, width=60, height=20)))
    with console.live():
        ticking = asyncio.create_task(console.tick())
        termios.tcflow(file.fileno(), termios.TCOOFF)  # as Ctrl-S does
        console._area.refresh()
        assert not console._area.can_write()
        while read(ours):
            pass
        for number in range(MAX_WAITING + 1000):
            console.say(f"line {number}")
        assert "line" not in read(ours)
        termios.tcflow(file.fileno(), termios.TCOON)
        got = []
        await eventually(lambda: got.append(read(ours)) or "line 2999\r\n" in "".join(got), 60)
        ticking.cancel()
    text = "".join(got)
    assert "[1000 lines are left out: the terminal took none]" in text
    assert "line 999\r" not in text
    assert text.index("line 1000\r") < text.index("line 2999\r")


def test_it_is_closed_twice_and_draws_nothing_any_more(screen):
    area = LiveArea(screen.console, lambda width, height: [])
    area.open()
    area.close()
    area.close()
    area.refresh()
    assert screen.terminal.lines() == []
