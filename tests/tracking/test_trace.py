"""The trace of a run: a file that is whole after every write, and what engines did in times without a gap."""

import os
import signal
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.run_trace import Trace

from miles.tracking.trace import ENGINES, LOOP, TRAINER, TraceFile
from miles.utils.spans import BusyLog, SpanLog


def test_the_file_is_whole_after_every_write(tmp_path):
    trace = TraceFile(tmp_path)
    for number in range(3):
        trace.add(LOOP, [("train", 10.0 + number, 10.5 + number, {"rollout_id": number})])
        found = Trace(trace.path)
        assert found.tracks["controller/loop"][-1] == (
            "train", 10_000_000 + number * 1_000_000, 10_500_000 + number * 1_000_000, {"rollout_id": number},
        )  # fmt: skip
        assert len(found.tracks["controller/loop"]) == number + 1
    trace.add(TRAINER, [("log_probs", 10.1, 10.2, {}), ("train", 10.0, 10.4, {})])
    trace.add(ENGINES, [])
    trace.close()
    assert Trace(trace.path).spans("trainer/rank 0", "train") == [(10_000_000, 10_400_000)]


def test_a_run_that_goes_on_goes_on_in_the_file(tmp_path):
    for number in range(2):
        trace = TraceFile(tmp_path)
        trace.add(LOOP, [("save", float(number), number + 0.5, {})])
        trace.close()
    assert Trace(trace.path).spans("controller/loop") == [(0, 500_000), (1_000_000, 1_500_000)]
    trace.path.write_text("[\nnothing of ours")
    trace = TraceFile(tmp_path)
    trace.add(LOOP, [("save", 0.0, 0.5, {})])
    trace.close()
    assert Trace(trace.path).spans("controller/loop") == [(0, 500_000)]


WRITER = """
import sys
from pathlib import Path
from miles.tracking.trace import LOOP, TraceFile
trace, number = TraceFile(Path(sys.argv[1])), 0
while True:
    trace.add(LOOP, [("train", float(number), number + 0.5, {"text": "x" * (number % 5000)})])
    number += 1
    if number == 50:
        print("many", flush=True)
"""


def test_it_is_whole_if_the_run_is_killed(tmp_path):
    with subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE) as writer:
        assert writer.stdout.readline() == b"many\n"
        writer.send_signal(signal.SIGKILL)
    assert len(Trace(tmp_path / "trace.json").spans("controller/loop")) >= 50


LIMITED = """
import resource, signal, sys
from pathlib import Path
from miles.tracking.trace import LOOP, TraceFile
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
trace = TraceFile(Path(sys.argv[1]), lambda line: print(line))
for number in range(100):
    trace.add(LOOP, [("train", float(number), number + 0.5, {})])
trace.close()
"""


def test_a_full_disk_is_told_once_and_leaves_what_is_there(tmp_path):
    done = subprocess.run([sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.count("is not written any more") == 1
    kept = Trace(tmp_path / "trace.json").spans("controller/loop")
    assert 10 < len(kept) < 100
    assert os.path.getsize(tmp_path / "trace.json") <= 4000


def test_a_place_where_it_cannot_be_ends_no_run(tmp_path):
    said = []
    trace = TraceFile(tmp_path / "nowhere", said.append)
    trace.add(LOOP, [("train", 0.0, 1.0, {})])
    trace.close()
    assert len(said) == 1


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


STEPS = st.lists(st.tuples(st.sampled_from(["begin", "end", "take"]), st.floats(0.001, 5)), max_size=60)


@given(STEPS)
def test_busy_times_are_those_with_something_under_way(steps):
    """Against a plain count over time; gaps below 10 ms do not count as gaps."""
    clock = Clock()
    busy, under_way, expected, found, begun = BusyLog("generate", clock), 0, [], [], 0
    for what, pause in steps:
        if what == "begin":
            busy.begin()
            under_way, begun = under_way + 1, begun + 1
        elif what == "end" and under_way:
            busy.end()
            under_way -= 1
        elif what == "take":
            found += busy.take()
        if under_way:
            expected.append((clock.now, clock.now + pause))
        clock.now += pause
    for _ in range(under_way):
        busy.end()
    found += busy.take()
    assert sum(span[3]["begun"] for span in found) == begun
    times = [(begin, end) for _, begin, end, _ in found]
    assert times == sorted(times)
    for begin, end in expected:
        covered = sum(max(0.0, min(end, e) - max(begin, b)) for b, e in times)
        assert covered == pytest.approx(end - begin)
    total, idle = sum(e - b for b, e in expected), sum(e - b for b, e in times)
    assert total - 1e-6 <= idle <= total + 0.01 * len(steps)


def test_spans_are_taken_once():
    log = SpanLog()
    log.add("train", 1.0, 2.0, rollout_id=3)
    assert log.take() == [("train", 1.0, 2.0, {"rollout_id": 3})]
    assert log.take() == []
