"""The controller's end of the trackers' process: whatever that does, the run goes on and nothing is left."""

import asyncio
import os
import urllib.request
from pathlib import Path

import psutil
import pytest
from support.fake_trackers import run_info
from support.procs import eventually
from support.tracker_files import scalars

from miles.tracking.process import TrackerProcess

ENV = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
PATIENCE_S = 30.0


class Said:
    """Lines for the terminal."""

    def __init__(self):
        self.lines = []
        self._queue = asyncio.Queue()

    def __call__(self, line):
        self.lines.append(line)
        self._queue.put_nowait(line)

    async def next(self):
        async with asyncio.timeout(PATIENCE_S):
            return await self._queue.get()


def page_of(url):
    with urllib.request.urlopen(url, timeout=PATIENCE_S) as page:
        return page.read()


async def started(tmp_path, *names, module="support.odd_host"):
    said, known = Said(), {}
    process = await TrackerProcess.start(
        names, log=tmp_path / "log", env=ENV, say=said, remember=known.__setitem__, module=module
    )
    return process, said, known


async def test_a_process_that_dies_is_told_with_its_last_words_and_costs_nothing(tmp_path):
    process, said, _ = await started(tmp_path, "dies")
    assert "ended with exit code 3: the library / blew up. The run goes on" in await said.next()
    process.send({"do": "log"})
    await process.finish("finished", 5.0)
    assert len(said.lines) == 1


async def test_what_is_said_twice_is_told_once_and_what_is_no_answer_is_left_out(tmp_path):
    process, said, _ = await started(tmp_path, "chatters")
    await process.finish("finished", 5.0)
    assert said.lines == ["the same line"]


async def test_a_process_that_hangs_is_killed_at_the_deadline_with_its_children(tmp_path):
    process, said, _ = await started(tmp_path, "hangs")
    process.grace_s = 0.1
    child = int((await said.next()).split()[1])
    await process.finish("finished", 0.1)
    assert "trackers have not finished in time" in await said.next()
    assert not psutil.pid_exists(process.pid)
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


async def test_a_process_that_does_not_read_is_sent_no_more_than_so_much(tmp_path):
    process, said, _ = await started(tmp_path, "hangs")
    process.grace_s, process.max_unread = 0.1, 100_000
    for _ in range(100):
        process.send({"do": "log", "text": "x" * 10_000})
    assert process._process.stdin.transport.get_write_buffer_size() < 120_000
    assert [line for line in said.lines if "do not keep up" in line]
    await process.finish("finished", 0.1)


async def test_finishing_that_is_cancelled_leaves_nothing_either(tmp_path):
    process, said, _ = await started(tmp_path, "hangs")
    await said.next()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await process.finish("finished", 60.0)
    assert not psutil.pid_exists(process.pid)


@pytest.mark.full
async def test_the_real_one_serves_and_writes_and_ends_when_its_controller_is_gone(tmp_path):
    process, said, known = await started(tmp_path, "tensorboard", "prometheus", module="miles.tracking.host")
    settings = {"prometheus_address": "127.0.0.1", "prometheus_port": 0}
    run = run_info(run_dir=str(tmp_path), settings=settings).as_dict()
    process.send({"do": "begin", "run": run, "before": {}})
    process.send({"do": "log", "steps": {"rollout/step": 0}, "metrics": {"rollout/x": 1.0}, "time": 1e9})
    lines = [await said.next(), await said.next()]
    (url,) = [line.removeprefix("Prometheus: ") for line in lines if "Prometheus" in line]
    assert b"miles_run_info" in await asyncio.to_thread(page_of, url)
    assert known["tensorboard"] == {"directory": str(tmp_path / "tensorboard")}
    process._process.stdin.close()  # as the kernel does when the controller dies
    async with asyncio.timeout(PATIENCE_S):
        assert await process._process.wait() == 0
    assert scalars(tmp_path / "tensorboard")["rollout/x"] == [(0, 1.0)]
    await process.finish("failed", 1.0)


@pytest.mark.parametrize("timeout_s", [30.0, 0.0], ids=["in good order", "killed"])
async def test_what_libraries_put_aside_is_gone_with_the_process(tmp_path, timeout_s):
    """wandb makes temporary directories when it is imported, and leaves them to exit handlers."""
    (tmp_path / "tmp").mkdir()
    said = Said()
    process = await TrackerProcess.start(
        ["wandb"],
        log=tmp_path / "log",
        env={**ENV, "TMPDIR": str(tmp_path / "tmp"), "XDG_RUNTIME_DIR": os.environ["XDG_RUNTIME_DIR"]},
        say=said,
        remember={}.__setitem__,
    )
    own = Path(os.environ["XDG_RUNTIME_DIR"]) / "miles" / f"trackers-{process.pid}"
    try:
        await eventually(lambda: any(own.glob("*wandb*")), PATIENCE_S)
    finally:
        process.grace_s = timeout_s
        await process.finish("finished", timeout_s)
    assert not own.exists()
    assert list((tmp_path / "tmp").iterdir()) == []
