"""The file of events: written whole, and never in anybody's way."""

import asyncio
import json
import logging
import os

from miles_controller.event_file import EventFile
from miles_controller.events import EventLog


def test_lines_are_written_in_order(tmp_path):
    file = EventFile(tmp_path / "events.jsonl")
    for index in range(100):
        file.put(f"line {index}")
    assert file.close(timeout_s=10.0)
    assert (tmp_path / "events.jsonl").read_text().splitlines() == [f"line {index}" for index in range(100)]
    assert file.num_lost == 0


def test_a_full_disk_is_told_once_and_counted(tmp_path, caplog):
    (tmp_path / "events.jsonl").symlink_to("/dev/full")
    events = EventLog(tmp_path / "events.jsonl")
    with caplog.at_level(logging.WARNING, logger="miles_controller.event_file"):
        for index in range(10):
            events.emit("node_dead", "node-0", f"for the {index}th time")
        file = events._file
        events.close()
    assert file.num_lost == 10
    assert [r.name for r in caplog.records].count("miles_controller.event_file") == 1
    assert "No space left" in next(r for r in caplog.records if r.name == "miles_controller.event_file").getMessage()
    assert len(events.history) == 10


def test_a_stalled_disk_holds_up_neither_the_teller_nor_the_end(tmp_path):
    path = tmp_path / "events.jsonl"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    file = EventFile(path, queue_lines=3)
    for _ in range(10):
        file.put("x" * 100_000)  # more than a pipe holds: the writer stalls in the first line
    assert file.num_lost >= 6
    assert not file.close(timeout_s=0.01)
    while file._thread.is_alive():
        file._thread.join(0.001)
        try:
            while os.read(reader, 1 << 20):
                pass
        except BlockingIOError:
            if file.close(timeout_s=0.01):
                break
    os.close(reader)


def test_what_cannot_be_written_or_logged_is_counted(tmp_path):
    class Sour(logging.Handler):
        def emit(self, record):
            raise RuntimeError("the embedder's handler is broken")

    handler = Sour()
    logging.getLogger("miles_controller.events").addHandler(handler)
    try:
        events = EventLog(tmp_path / "events.jsonl")
        events.emit("node_dead", "node-0", "gone", where={("a", "b"): 1})
        assert events.num_lost == 2
        events.close()
    finally:
        logging.getLogger("miles_controller.events").removeHandler(handler)


def test_subscribers_and_file_get_the_same(tmp_path):
    async def story():
        events = EventLog(tmp_path / "events.jsonl")
        told = []

        async def listen():
            async for event in events.subscribe("a"):
                told.append(event.text)

        listener = asyncio.create_task(listen())
        await asyncio.sleep(0)
        events.emit("a", "s", "1")
        events.emit("b", "s", "2")
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        listener.cancel()
        await asyncio.wait([listener])
        events.close()
        assert told == ["1"]

    asyncio.run(story())
    lines = (tmp_path / "events.jsonl").read_text().splitlines()
    assert [json.loads(line)["text"] for line in lines] == ["1", "2"]
