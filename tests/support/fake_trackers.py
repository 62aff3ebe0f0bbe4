"""Trackers that do what a test wants of them, and what they are told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading

from miles.tracking.tracker import Begun, Outcome, Point, RunInfo

PATIENCE_S = 20.0


def run_info(**changes):
    values = {
        "run_id": "run-1", "name": "my-run", "run_dir": "/nowhere", "config": {"lr": 1e-3, "hf_config": {"a": 1}},
        "first_steps": {"rollout/step": 0, "train/step": 0}, "versions": {"miles": "0"},
    }  # fmt: skip
    return RunInfo(**{**values, **changes})


def point(step, **metrics):
    """Metrics of a rollout; ``__`` in names is ``/``."""
    named = {name.replace("__", "/"): value for name, value in metrics.items()} or {"rollout/raw_reward": 0.5}
    return Point({"rollout/step": step, "train/step": step}, named, 1e9 + step)


def host_answers(run_dir, names, orders, **env):
    """What the process of the trackers answers to these orders, and what it leaves in its log."""
    done = subprocess.run(
        [sys.executable, "-m", "miles.tracking.host", *names], input="".join(json.dumps(o) + "\n" for o in orders),
        capture_output=True, text=True, timeout=60, check=True, cwd=run_dir,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
    )  # fmt: skip
    return [json.loads(line) for line in done.stdout.splitlines()], done.stderr


def said(answers):
    return [answer["say"] for answer in answers if "say" in answer]


def remembered(answers):
    return {answer["began"]: answer["remembered"] for answer in answers if "began" in answer}


class FakeTracker:
    """Writes down what it is told.

    Args:
        fails: How many calls fail, by method.
        gate: ``log`` waits for it.
    """

    name = "fake"

    def __init__(self, fails=None, gate=None):
        self.fails = dict(fails or {})
        self.gate = gate
        self.calls = []
        self.is_in_log = threading.Event()
        self.has_finished = threading.Event()

    def _called(self, method, *what):
        if self.fails.get(method, 0) > 0:
            self.fails[method] -= 1
            raise OSError(28, "No space left on https://me:hunter2@server/x")
        self.calls.append((method, *what))

    def begin(self, run, before):
        self._called("begin", run.run_id, dict(before))
        return Begun({"id": "remembered"}, "look there")

    def log(self, given):
        self.is_in_log.set()
        if self.gate is not None:
            self.gate.wait(PATIENCE_S)
        self._called("log", given.step_of("rollout/x"))

    def examples(self, examples):
        self._called("examples", examples.step)

    def artefact(self, path):
        self._called("artefact", str(path))

    def finish(self, outcome: Outcome):
        self._called("finish", outcome.how)
        self.has_finished.set()
        return "the last word"

    @property
    def logged(self):
        return [call[1] for call in self.calls if call[0] == "log"]
