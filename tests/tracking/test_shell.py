"""Trackers on their threads: what hangs or raises there costs the caller nothing, and is told once."""

import threading
from functools import partial
from pathlib import Path

import pytest
from support.fake_trackers import PATIENCE_S, FakeTracker, point, run_info

from miles.tracking.host import Host
from miles.tracking.shell import TrackerThread
from miles.tracking.tracker import Examples, Outcome, TrackerUnusable


class Running:
    """A tracker on its thread, and what it said."""

    def __init__(self, tracker, limit=100, make=None, before=None):
        self.tracker = tracker
        self.said = []
        self.begun = []
        self.thread = TrackerThread(
            "fake", make or (lambda: tracker), run_info(), before or {},
            say=self.said.append, began=self.begun.append, limit=limit, pause_s=0.001,
        )  # fmt: skip

    def end(self, how="finished", timeout_s=PATIENCE_S):
        self.thread.end(Outcome(how))
        return self.thread.join(timeout_s)


def test_everything_arrives_in_order_and_the_last_word_is_told():
    running = Running(FakeTracker(), before={"id": "old"})
    running.thread.put(point(0))
    running.thread.put(Examples(0, []))
    running.thread.put(Path("/a"))
    assert running.end("interrupted")
    assert running.tracker.calls == [
        ("begin", "run-1", {"id": "old"}), ("log", 0), ("examples", 0), ("artefact", "/a"), ("finish", "interrupted"),
    ]  # fmt: skip
    assert running.said == ["the last word"]
    assert [one.remembered for one in running.begun] == [{"id": "remembered"}]


def test_what_fails_is_tried_again_and_told_once_without_passwords():
    running = Running(FakeTracker({"begin": 1, "log": 2, "finish": 1}))
    running.thread.put(point(0))
    running.thread.put(point(1))
    assert running.end()
    assert running.tracker.logged == [0, 1]
    failures = [line for line in running.said if "fake failed" in line]
    assert [line.partition(":")[0] for line in failures] == ["fake failed and is tried again", "fake failed to finish"]
    assert "https://***@server" in failures[0]
    assert "hunter2" not in "".join(running.said)


def test_a_tracker_that_hangs_delays_nobody_and_its_queue_is_bounded():
    gate = threading.Event()
    running = Running(FakeTracker(gate=gate), limit=10)
    running.thread.put(point(0))
    assert running.tracker.is_in_log.wait(PATIENCE_S)
    for step in range(1, 1000):
        running.thread.put(point(step))
    assert not running.end(timeout_s=0.05)
    assert "has not finished in time: 10 records are not sent" in running.said[-1]
    assert sum("too slow" in line for line in running.said) == 1
    gate.set()
    assert running.thread.join(PATIENCE_S)
    assert running.tracker.logged == [0, *range(991, 1000)]
    assert "fake lacks 990 records" in running.said[-1]


def test_a_tracker_that_says_that_it_cannot_begin_is_given_up_at_once():
    def make():
        raise TrackerUnusable("no such run", advice="Correct it")

    running = Running(FakeTracker(), make=make)
    running.thread.put(point(0))
    assert running.end()
    assert [line.partition(". ")[0] for line in running.said] == ["fake is given up: no such run"]
    assert running.tracker.calls == []


ORDERS = [
    {"do": "begin", "run": run_info().as_dict(), "before": {"good": {"id": "old"}}},
    {"do": "log", "steps": {"rollout/step": 3}, "metrics": {"rollout/x": 1.0}, "time": 1.0},
    {"do": "examples", "step": 3, "rows": []},
    {"do": "artefact", "path": "/a"},
]


@pytest.mark.parametrize(
    ("last", "how"), [([{"do": "finish", "outcome": "finished", "timeout_s": 20}], "finished"), ([], "failed")]
)
def test_the_host_gives_everything_to_every_tracker_and_marks_a_run_whose_controller_is_gone_as_failed(last, how):
    def bad():
        raise TrackerUnusable("no such server", advice="Correct it")

    good, answers = FakeTracker(), []
    Host({"good": lambda: good, "bad": bad}, answers.append).run(iter([*ORDERS, *last]))
    assert good.calls == [
        ("begin", "run-1", {"id": "old"}), ("log", 3), ("examples", 3), ("artefact", "/a"), ("finish", how),
    ]  # fmt: skip
    assert {"began": "good", "remembered": {"id": "remembered"}} in answers
    assert any("bad is given up" in answer.get("say", "") for answer in answers)
    assert answers[-1] == {"finished": True}


def test_the_host_does_not_wait_for_a_tracker_that_hangs_longer_than_it_is_told():
    gate = threading.Event()
    stuck, good = FakeTracker(gate=gate), FakeTracker()
    answers = []
    Host({"stuck": partial(lambda one: one, stuck), "good": lambda: good}, answers.append).run(
        iter([*ORDERS, {"do": "finish", "outcome": "finished", "timeout_s": 0.2}])
    )
    assert good.has_finished.wait(PATIENCE_S)
    assert any("stuck has not finished in time" in answer.get("say", "") for answer in answers)
    assert answers[-1] == {"finished": True}
    gate.set()
