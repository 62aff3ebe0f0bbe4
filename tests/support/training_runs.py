"""``python train.py`` as a user runs it, on a tiny model: flags in, exit code, output, metrics and leftovers out."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from miles.tracking.metrics_file import read_metrics
from support.tiny_models import tiny_model

ROOT = Path(__file__).parents[2]
USER_CODE = ROOT / "tests" / "job"
RUN_S = 400.0

GRPO = {
    "--rollout-batch-size": 8, "--n-samples-per-prompt": 8, "--rollout-max-response-len": 8, "--lr": 1e-2,
    "--num-rollout": 4, "--input-key": "prompt", "--label-key": "label", "--custom-rm-path": "user_code.letter_share",
    "--sglang-max-total-tokens": 4096, "--actor-num-gpus-per-node": 1, "--rollout-num-gpus": 1,
}  # fmt: skip
"""The flags of a small run whose reward rises; ``train`` takes what differs."""


@dataclass
class Finished:
    """A run that has ended."""

    code: int
    output: str
    run_dir: Path

    def rows(self, event: str = "rollout") -> list[dict]:
        """The lines of metrics.jsonl of that kind."""
        return [row for row in read_metrics(self.run_dir / "metrics.jsonl") if row["event"] == event]

    def rewards(self) -> list[float]:
        """Mean raw reward of each rollout."""
        return [row["rollout/raw_reward"] for row in self.rows()]


def write_prompts(path: Path, count: int = 32) -> Path:
    """A JSONL file of short prompts with labels."""
    rows = [{"prompt": f"{n} plus {n}?", "label": str(2 * n), "metadata": {"n": n}} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def command(tmp_path: Path, flags: dict[str, object], *, model: Path | None = None) -> tuple[list[str], Path]:
    """The command line; a flag with None is left out, one with True has no value, a tuple has several."""
    run_dir = tmp_path / "run"
    # Alive enough for engines, small enough for seconds.
    base: dict[str, object] = {
        "--hf-checkpoint": model or tiny_model("qwen3", hidden=64, layers=2),
        "--prompt-data": tmp_path / "prompts.jsonl", "--run-dir": run_dir, **GRPO,
    }  # fmt: skip
    if not (tmp_path / "prompts.jsonl").exists():
        write_prompts(tmp_path / "prompts.jsonl")
    argv = [sys.executable, str(ROOT / "train.py")]
    for name, value in {**base, **flags}.items():
        if value is None or value is False:
            continue
        argv.append(name)
        if value is not True:
            argv += [str(one) for one in value] if isinstance(value, tuple) else [str(value)]
    return argv, Path(str({**base, **flags}["--run-dir"]))


def train(tmp_path: Path, *, model: Path | None = None, timeout_s: float = RUN_S, **flags: object) -> Finished:
    """Run to the end. Keywords are flags with ``_`` for ``-``."""
    argv, run_dir = command(tmp_path, {f"--{k.replace('_', '-')}": v for k, v in flags.items()}, model=model)
    done = subprocess.run(
        argv, cwd=tmp_path, env=environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True,
        stderr=subprocess.STDOUT, timeout=timeout_s, check=False,
    )  # fmt: skip
    return Finished(done.returncode, done.stdout, run_dir)


def assert_trains(done: Finished, rollouts: int) -> None:
    """A run with ``--check-weight-update-equal``: its reward rises, and engines hold the trainer's weights."""
    assert done.code == 0, done.output
    # After the first update and after each step: the engines hold exactly what the trainer does.
    checked = [f"weight version {version} checked" in done.output for version in range(1, rollouts + 3)]
    assert checked == [True] * (rollouts + 1) + [False]
    assert max(row["train/train_rollout_logprob_abs_diff"] for row in done.rows()) < 1e-4
    rewards = done.rewards()
    assert len(rewards) == rollouts
    # A random model writes a letter now and then; a policy that is trained, mostly.
    assert rewards[0] < 0.35, done.output
    assert rewards[-1] > rewards[0] + 0.25, done.output
    assert [row["rollout/weight_version/mean"] for row in done.rows()] == list(range(1, rollouts + 1))


@contextmanager
def running(tmp_path: Path, **flags: object) -> Iterator[subprocess.Popen[str]]:
    """A run that is under way; it is interrupted on leaving, and waited for."""
    argv, _ = command(tmp_path, {f"--{k.replace('_', '-')}": v for k, v in flags.items()})
    process = subprocess.Popen(
        argv, cwd=tmp_path, env=environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        process.communicate(timeout=200)


def until(process: subprocess.Popen[str], text: str) -> str:
    """Read a run's output up to the line with that text."""
    lines: list[str] = []
    for line in process.stdout or ():
        lines.append(line)
        if text in line:
            return "".join(lines)
    raise AssertionError("it ended before: " + "".join(lines))


def find_below(pid: int, word: str) -> list[psutil.Process]:
    """The processes below ``pid`` with that word on their command line."""
    found = []
    for child in psutil.Process(pid).children(recursive=True):
        try:
            if any(word in part for part in child.cmdline()):
                found.append(child)
        except psutil.Error:
            continue
    return found


def all_gone(processes: Iterable[psutil.Process]) -> bool:
    """Whether none of them runs any more."""
    return not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes)


def environment() -> dict[str, str]:
    """A user's: their code on PYTHONPATH, one thread per process. What else is there stays, for a checkout that is not
    the installed one."""
    path = os.pathsep.join(filter(None, [str(USER_CODE), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "200"}
