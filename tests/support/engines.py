"""A real SGLang engine on a CPU for tests, started by our launcher without controller or agent.

``warm_engine`` is one for the whole session: it takes half a minute to start. Leak checks compare before and after each
module, so it has to be there before the first module that uses it begins: a ``conftest.py`` makes it with an automatic
fixture of the session, if any test that was collected asks for it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import save_file

from miles.backends.sglang_utils.environment import engine_environment
from miles.backends.sglang_utils.launch_key import KEY_VARIABLE
from miles.backends.sglang_utils.server_arguments import server_arguments
from miles.backends.sglang_utils.settle import forget_stale
from miles.backends.weight_update.messages import EngineTarget
from miles_agents.agent.ports import PortLeases
from miles_agents.runtime_dir import sweep
from support.fake_engine import load_directory
from support.procs import bound_to_us
from support.tiny_models import tiny_model

START_S = 300.0
KEY = "the-key-of-this-test-session"


@dataclass(frozen=True)
class RealEngine:
    """Where it is, what it has loaded, its processes."""

    url: str
    api_key: str
    model: Path
    pid: int
    log_path: Path
    tp_size: int = 1

    @property
    def target(self) -> EngineTarget:
        """As the only engine of a fleet."""
        return EngineTarget("engine-0", self.url, self.api_key, self.tp_size, 1, True)

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    @property
    def pids(self) -> list[int]:
        """Its own and those of its children."""
        return [self.pid, *(child.pid for child in psutil.Process(self.pid).children(recursive=True))]


def engine_config(model: Path, **more: Any) -> dict[str, Any]:
    """What engines need of a run's configuration."""
    return {
        "device": "cpu",
        "params_dtype": "float32",
        "hf_checkpoint": str(model),
        "hf_config": json.loads((model / "config.json").read_text()),
        "rollout_num_engines": 1,
        "rollout_num_gpus_per_engine": 1,
        "rollout_batch_size": 4,
        "n_samples_per_prompt": 4,
        "update_weight_buffer_size": 30000,
        "seed": 1,
        **more,
    }


def external_config(*fakes: Any, **more: Any) -> dict[str, Any]:
    """Of a run whose engines are these, which somebody else has started."""
    addresses = [fake.url.removeprefix("http://") for fake in fakes]
    external = {"rollout_external": True, "rollout_external_engine_addrs": addresses, "rollout_num_engines": len(fakes)}
    return engine_config(engine_model(), **external, **more)


@contextmanager
def real_engine(model: Path, *, api_key: str = KEY, **config: Any) -> Iterator[RealEngine]:
    """Starts one; at the end none of its processes is left, also if this process is killed."""
    settings = engine_config(model, **config)
    size = settings["rollout_num_gpus_per_engine"]
    leases = PortLeases()
    http, nccl = leases.lease("engine", 2)
    ports = json.dumps({"http": http, "nccl": nccl})
    program = [sys.executable, "-m", "miles.backends.sglang_utils.launch_engine", "127.0.0.1", ports]
    env = engine_environment("cpu", index=0, tp_size=size, colocate=True, inherited=os.environ)
    with tempfile.TemporaryDirectory(prefix="engine-") as directory:
        log_path = Path(directory) / "engine.log"
        with log_path.open("wb") as log:
            leases.hand_over([http, nccl])
            process = subprocess.Popen(
                bound_to_us([*program, json.dumps(server_arguments(settings, 0))]),
                env={**os.environ, **env, KEY_VARIABLE: api_key},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        engine = RealEngine(f"http://127.0.0.1:{http}", api_key, model, process.pid, log_path, size)
        try:
            _wait_until_healthy(engine, process)
            yield engine
        finally:
            _end(process)
            leases.release("engine")
            leases.close()
            sweep()
            forget_stale()


def _wait_until_healthy(engine: RealEngine, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_S
    while True:
        try:
            with urllib.request.urlopen(engine.url + "/health", timeout=5.0) as answer:
                if answer.status == 200:
                    return
        except OSError:
            pass
        if process.poll() is not None or time.monotonic() > deadline:
            raise AssertionError(f"the engine did not start; its log:\n{engine.log[-5000:]}")
        time.sleep(0.1)


def _end(process: subprocess.Popen[bytes]) -> None:
    """The whole family, by pid."""
    family: list[psutil.Process] = []
    with suppress(psutil.NoSuchProcess):
        family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    for child in family:
        try:
            child.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(family, timeout=10.0)


REAL = "real"
"""The parameter of a fixture with which a test gets the session's engine."""


def is_wanted(session: Any, fixture: str) -> bool:
    """Whether a test of this pytest session uses the fixture, or has ``REAL`` among its parameters."""
    for item in session.items:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        if fixture in getattr(item, "fixturenames", ()) or any(
            isinstance(value, str) and value == REAL for value in parameters.values()
        ):
            return True
    return False


def engine_model() -> Path:
    """What the session's engine serves."""
    return tiny_model("qwen3")


def changed_copy(model: Path, directory: Path, *, factor: float) -> tuple[Path, dict[str, torch.Tensor]]:
    """A copy of a model directory with all weights multiplied, and these weights."""
    weights = {name: tensor * factor for name, tensor in load_directory(model).items()}
    directory.mkdir()
    for file in model.iterdir():
        if file.suffix != ".safetensors":
            (directory / file.name).write_bytes(file.read_bytes())
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory, weights
