"""How long from a command line on one host until actors on all are ready: ours, ``train.py``, Ray."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from support.netns import Network, network
from support.tiny_models import tiny_model
from support.training_runs import write_prompts

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
HOSTS = ("node1", "node2", "node3")
RANKS = 2
"""On each host."""
TORCH = ("torch",)
TRAINER = ("miles.backends.megatron_utils.preload", "miles.backends.trainer")
"""What a trainer's rank has loaded when it is constructed."""
DEADLINE_S = 300.0
_END_S = 60.0


class NotMeasured(Exception):
    """It did not get there; what it wrote last."""


def measure(side: Callable[[Network, Path], Run]) -> float:
    """Seconds on three hosts that have just been made, and are thrown away."""
    with tempfile.TemporaryDirectory(prefix="launch-") as folder, network(HOSTS, private=("/tmp/ray",)) as net:
        run = side(net, Path(folder))
        log = Path(folder) / "log"
        begin = time.perf_counter()
        with log.open("wb") as stderr:
            process = subprocess.Popen(
                net["node1"].command(run.argv),
                env=run.env,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
            )
        try:
            return run.wait(process) - begin
        except NotMeasured as why:
            raise NotMeasured(f"{why}: {log.read_text(errors='replace')[-2000:]}") from None
        finally:
            _end(process)


class Run:
    """A command line, and how it is seen that it is ready: ``wait`` returns the time of that."""

    def __init__(self, argv: Sequence[str], path: Sequence[str], wait: Callable[[Any], float]) -> None:
        self.argv = list(argv)
        dropped = ("XDG_RUNTIME_DIR",)
        kept = {name: value for name, value in os.environ.items() if name not in dropped}
        self.env = {**kept, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
        self.wait = wait


def ours(modules: Sequence[str]) -> Callable[[Network, Path], Run]:
    """Controller, agents by ssh, actors."""

    def side(net: Network, folder: Path) -> Run:
        wanted: dict[str, Any] = {"hosts": HOSTS, "run_dir": str(folder / "run"), "ssh_config": str(net.ssh_config)}
        wanted |= {"modules": list(modules), "ranks": RANKS}
        return Run([sys.executable, str(HERE / "ours_child.py"), json.dumps(wanted)], _path(), _says_ready)

    return side


def ray(python: str, modules: Sequence[str]) -> Callable[[Network, Path], Run]:
    """``ray start``, actors."""

    def side(net: Network, _: Path) -> Run:
        addresses = {name: net.address(name) for name in HOSTS}
        wanted: dict[str, Any] = {"addresses": addresses, "ssh_config": str(net.ssh_config), "ranks": RANKS}
        wanted |= {"modules": list(modules), "path": _path()}
        return Run([python, str(HERE / "ray_child.py"), json.dumps(wanted)], [], _says_ready)

    return side


def train(net: Network, folder: Path) -> Run:
    """``train.py``, until the trainer's ranks are constructed on all hosts."""
    run_dir, recorded = folder / "run", folder / "recorded"
    recorded.mkdir()
    (recorded / "0.pt").touch()  # whose content is read when all ranks are there
    flags = {
        "--hosts": ",".join(HOSTS), "--ssh-config": net.ssh_config, "--num-gpus-per-node": RANKS, "--run-dir": run_dir,
        "--hf-checkpoint": tiny_model("qwen3", hidden=64, layers=2), "--actor-num-nodes": len(HOSTS),
        "--actor-num-gpus-per-node": RANKS, "--rollout-batch-size": 6, "--n-samples-per-prompt": 8, "--num-rollout": 1,
        "--prompt-data": write_prompts(folder / "prompts.jsonl"), "--input-key": "prompt", "--label-key": "label",
        "--load-debug-rollout-data": f"{recorded}/{{rollout_id}}.pt", "--rm-type": "math",
    }  # fmt: skip
    words = [str(word) for pair in flags.items() for word in pair]

    def wait(process: subprocess.Popen[bytes]) -> float:
        events = run_dir / "events.jsonl"
        return _until(process, lambda: events.exists() and _has_started(events.read_text()))

    return Run([sys.executable, str(ROOT / "train.py"), *words, "--debug-train-only"], _path(), wait)


def _has_started(text: str) -> bool:
    lines = (json.loads(line) for line in text.splitlines() if line.endswith("}"))
    return any(line["kind"] == "mesh_started" and line["subject"] == "trainer" for line in lines)


def _says_ready(process: subprocess.Popen[bytes]) -> float:
    assert process.stdout is not None
    readable, _, _ = select.select([process.stdout], [], [], DEADLINE_S)
    at = time.perf_counter()
    if not readable or process.stdout.readline().strip() != b"ready":
        raise NotMeasured("not ready")
    return at


def _until(process: subprocess.Popen[bytes], holds: Callable[[], bool]) -> float:
    deadline = time.perf_counter() + DEADLINE_S
    while not holds():
        if process.poll() is not None or time.perf_counter() > deadline:
            raise NotMeasured("not ready")
        time.sleep(0.01)
    return time.perf_counter()


def _end(process: subprocess.Popen[bytes]) -> None:
    """By Ctrl-C, which ours obey in order; the hosts are taken away anyhow."""
    for end in (process.stdin, process.stdout):
        if end is not None:
            end.close()
    for number in (signal.SIGINT, signal.SIGKILL):
        if process.poll() is None:
            process.send_signal(number)
            try:
                process.wait(_END_S)
            except subprocess.TimeoutExpired:
                continue


def _path() -> list[str]:
    return [str(ROOT / part) for part in ("", "agents", "controller", "launcher", "benchmarks", "tests")]
