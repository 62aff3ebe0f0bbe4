"""``miles logs``: which file is meant, where its last lines begin, and what becomes of a process started again."""

import asyncio
import os
import subprocess
import sys

import pytest
from support.procs import eventually

from miles_agents.runtime_dir import runtime_dir
from miles_controller.status_server import StatusServer
from miles_launcher import logs
from miles_launcher.runs import Run


@pytest.fixture
def run(tmp_path):
    """A run that is over, with the logs of two nodes."""
    root = tmp_path / "run"
    for name, text in {
        "controller.log": "started\n",
        "agent-a.log": "",
        "a/trainer-0.100.log": "first life\n",
        "a/trainer-0.2000.log": "second life\n",
        "a/engine-0.log": "engine\n",
        "a/zygote-0.log": "",
        "b/zygote-0.log": "",
        "b/trainer-1.101.log": "other rank\n",
        "b/notes.txt": "no log",
    }.items():
        path = root / "logs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return Run("r1", tmp_path / "gone", os.getpid(), root, 0.0)


@pytest.mark.parametrize("text", ["trainer-0", "trainer[0]", "0", "trainer-0@a"])
def test_a_rank_has_several_names_and_its_newest_life_is_meant(run, text):
    log = logs.choose(logs.read_directory(run), text)
    assert (log.path.name, log.node, log.life) == ("trainer-0.2000.log", "a", 2000)


def test_services_and_the_controller_have_one_file(run):
    found = logs.read_directory(run)
    assert logs.choose(found, "engine-0").path.read_text() == "engine\n"
    assert logs.choose(found, "controller").node == ""


def test_a_rank_that_moved_to_another_node_is_where_it_lives_now(run):
    (run.run_dir / "logs/b/trainer-0.3000.log").write_text("third\n")
    assert logs.choose(logs.read_directory(run), "trainer-0").path.read_text() == "third\n"


@pytest.mark.parametrize(("text", "evidence"), [("zygote-0", "zygote-0@a, zygote-0@b"), ("trainer-7", "trainer-1")])
def test_what_is_not_one_process_is_refused_with_a_list(run, text, evidence):
    with pytest.raises(logs.NoSuchLog) as caught:
        logs.choose(logs.read_directory(run), text)
    assert evidence in caught.value.evidence
    assert "notes" not in caught.value.evidence


def test_a_run_without_files_says_so(tmp_path):
    for run_dir in (None, tmp_path):
        with pytest.raises(logs.NoLogs):
            logs.read_directory(Run("r1", tmp_path, 1, run_dir, 0.0))


@pytest.mark.parametrize(
    ("content", "count", "left"),
    [
        ("a\nb\nc\n", 2, "b\nc\n"),
        ("a\nb\nc", 2, "b\nc"),
        ("a\nb\n", 5, "a\nb\n"),
        ("a\n", 0, ""),
        ("", 3, ""),
        ("x" * 200_000 + "\nlast\n", 2, "x" * 200_000 + "\nlast\n"),
        ("\n" * 70_000 + "last\n", 70_000, "\n" * 69_999 + "last\n"),
    ],
)
def test_where_the_last_lines_begin(tmp_path, content, count, left):
    path = tmp_path / "log"
    path.write_text(content)
    assert content[logs.start_of_last(path, count) :] == left


def test_a_file_that_is_not_there_begins_at_its_begin(tmp_path):
    assert logs.start_of_last(tmp_path / "none", 3) == 0


def follower(run, lines, written):
    return logs.Follower(logs.choose(logs.read_directory(run), "trainer-0"), written.append, lines)


def test_a_process_is_followed_into_its_next_life_and_no_line_is_lost(run):
    written = []
    following = follower(run, None, written)
    following.read(following.log, is_over=False)
    with following.log.path.open("a") as file:
        file.write("more\nits last, torn line")
    (run.run_dir / "logs/a/trainer-0.2001.log").write_text("third life\n")
    following.read(logs.choose(logs.read_directory(run), "0"), is_over=False)
    (run.run_dir / "logs/a/trainer-0.2001.log").write_text("third life\nand no end of line")
    following.read(None, is_over=True)
    assert written[:3] == ["second life", "more", "its last, torn line"]
    assert "was started again" in written[3]
    assert written[4:] == ["third life", "and no end of line"]


def test_only_the_last_lines_are_shown_first(run):
    path = run.run_dir / "logs/a/trainer-0.2000.log"
    path.write_text("".join(f"{n}\n" for n in range(1000)))
    written = []
    following = follower(run, 3, written)
    following.read(None, is_over=False)
    following.close()
    assert written == ["997", "998", "999"]


def test_a_large_file_takes_little_memory(run):
    path = run.run_dir / "logs/a/trainer-0.2000.log"
    with path.open("wb") as file:
        for _ in range(400):
            file.write(b"y" * 99 + b"\n" + (b"z" * 999 + b"\n") * 262)
    code = (
        "import resource, sys; from pathlib import Path; from miles_launcher import logs;"
        "from miles_launcher.runs import Run; count = 0\n"
        "def take(line):\n    global count; count += 1\n"
        f"log = logs.choose(logs.read_directory(Run('r', Path('/x'), 1, Path({str(run.run_dir)!r}), 0)), '0')\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "follower = logs.Follower(log, take, None); follower.read(None, is_over=True)\n"
        "print(count, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=True)
    count, grown_kib = map(int, done.stdout.split())
    assert count == 400 * 263
    assert path.stat().st_size > 100_000_000
    assert grown_kib < 16 << 10


async def test_following_ends_with_the_run(run, tmp_path, monkeypatch):
    log = run.run_dir / "logs/a/trainer-0.2000.log"
    out = tmp_path / "out"
    command = [sys.executable, "-m", "miles_launcher.cli", "logs", "--run", "r-logs", "-f", "trainer-0", "engine-0"]
    with runtime_dir("r-logs") as directory, out.open("wb") as file:
        about = {"run_dir": str(run.run_dir), "began": 1.0}
        async with StatusServer(dict, run_id="r-logs", directory=directory, about=about):
            process = await asyncio.create_subprocess_exec(*command, stdout=file, stderr=asyncio.subprocess.PIPE)
            await eventually(lambda: b"second life" in out.read_bytes(), 60)
            with log.open("a") as more:
                more.write("and more\n")
            await eventually(lambda: b"and more" in out.read_bytes(), 60)
            with log.open("a") as more:
                more.write("last words\n")
    _, told = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 0
    lines = sorted(out.read_text().splitlines())
    assert lines == ["engine-0 | engine"] + [
        f"trainer-0 | {text}" for text in ("and more", "last words", "second life")
    ]
    assert told == b"run r-logs has ended\n"
