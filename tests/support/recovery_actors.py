"""A trainer and a rollout manager without models, for tests of recovery on real processes.

The trainer's state is a text of all that it was trained on, in order; the rollout manager's batches are files.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from pathlib import Path
from typing import Any

from miles.rollout.hooks import BadHookResult, HookFailed
from miles_agents import Actor, endpoint
from miles_agents.errors import MilesError


def meets_its_end(directory: Path, what: str) -> bool:
    """Whether the file that asks for it is there; each asks once."""
    try:
        (directory / what).unlink()
    except FileNotFoundError:
        return False
    return True


def pause(directory: Path, what: str) -> None:
    """For as long as the file ``wait-{what}`` is there; says with ``waiting-{what}`` that it was."""
    while (directory / f"wait-{what}").exists():
        (directory / f"waiting-{what}").touch()
        time.sleep(0.01)


def _of_a_hook(kind: type[MilesError]) -> MilesError:
    return kind("of a hook", evidence="the user's traceback", advice="Repair it.")


class TextTrainer(Actor):
    """One rank. Files named ``die-{rank}-{where}`` make it die there, ``stop-{rank}-{where}`` stop, as by SIGSTOP,
    ``stuck-{rank}-{where}`` hang without letting other threads run, ``raise-{rank}-{error}`` raise what a hook may."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config, self.rank = config, int(os.environ["MILES_TEST_RANK"])
        self.directory = Path(config["run_dir"])
        self.state = ""
        self.rollout_id = -1

    def _maybe_die(self, where: str) -> None:
        if (self.directory / f"always-{where}").exists() or meets_its_end(self.directory, f"die-{self.rank}-{where}"):
            os.abort()
        if meets_its_end(self.directory, f"stop-{self.rank}-{where}"):
            os.kill(os.getpid(), signal.SIGSTOP)
        if meets_its_end(self.directory, f"stuck-{self.rank}-{where}"):
            while True:
                ctypes.PyDLL(None).sleep(3600)  # a signal ends it; PyDLL does not let go of the interpreter

    @endpoint(thread="io")
    def pid(self) -> int:
        """Of the process."""
        return os.getpid()

    @endpoint(thread="io")
    def progress(self) -> dict[str, Any]:
        """Answers while others wait."""
        return {"rollout_id": self.rollout_id}

    @endpoint
    def init(self) -> None:
        """Begin, or go on from a checkpoint."""
        self._maybe_die("init")
        with (self.directory / f"lives-{self.rank}").open("a") as lives:
            lives.write("x")
        if self.config.get("load"):
            path = Path(self.config["load"]) / f"iter_{self.config['ckpt_step']:07d}" / str(self.rank)
            self.state = path.read_text()

    @endpoint
    def train(self, rollout_id: int, refs: list[str]) -> str:
        """The state after it. Waits a little in the middle, where a rank can be killed."""
        self.rollout_id = rollout_id
        for kind in (HookFailed, BadHookResult):
            if meets_its_end(self.directory, f"raise-{self.rank}-{kind.__name__}"):
                raise _of_a_hook(kind)
        before = self.state
        self.state += f"half of {rollout_id};"
        self._maybe_die("train")
        self._lose_each_other(RuntimeError("Connection closed by peer"))
        self._lose_each_other(_of_a_hook(HookFailed), "-in-a-hook")
        pause(self.directory, f"{self.rank}")
        self.state = before + f"{rollout_id}: {', '.join(refs)};"
        return self.state

    def _lose_each_other(self, error: Exception, where: str = "") -> None:
        """As in a collective: rank 0 raises because of rank 1, and is heard of before rank 1 is."""
        asked = self.directory / f"lose-each-other{where}"
        if not asked.exists():
            return
        met, lost = self.directory / "met", self.directory / "lost"
        if self.rank == 1:
            met.touch()  # a call that rank 1 has not begun is not begun any more once rank 0 has raised
        while not (met if self.rank == 0 else lost).exists():
            time.sleep(0.01)
        if self.rank == 0:
            lost.touch()
            raise error
        asked.unlink()
        time.sleep(0.5)
        os.abort()

    @endpoint
    def save(self, rollout_id: int, directory: str) -> str:
        """A checkpoint: a file for each rank."""
        self._maybe_die("save")
        path = Path(directory) / f"iter_{rollout_id:07d}"
        path.mkdir(parents=True, exist_ok=True)
        (path / str(self.rank)).write_text(self.state)
        return str(path)

    @endpoint
    def update_weights(self, version: int) -> tuple[int, str]:
        """What engines would get."""
        self._maybe_die("update")
        pause(self.directory, "update")
        return version, self.state


class FileRollouts(Actor):
    """The rollout manager's part in recovery."""

    def __init__(self, directory: str) -> None:
        self.directory = Path(directory)
        self.recovered_at: list[tuple[int, int]] = []
        self.replaying: list[dict[int, list[str]]] = []
        self.replays: list[int] = []
        self.ended: list[int] = []

    @endpoint(thread="io")
    def pid(self) -> int:
        """Of the process."""
        return os.getpid()

    @endpoint
    def keep(self, rollout_id: int) -> None:
        """A run begins."""
        (self.directory / "batches").mkdir()

    @endpoint
    def recover(self, trained: int, weight_version: int, next_version: int, replaying: dict[int, list[str]]) -> None:
        """A run goes on."""
        self.recovered_at.append((trained, weight_version))
        self.replaying.append(replaying)

    @endpoint
    def generate(self, rollout_id: int) -> list[str]:
        """The same batch whenever it is asked for."""
        if meets_its_end(self.directory, "die-generate"):
            os.abort()
        pause(self.directory, "generate")
        path = self.directory / "batches" / str(rollout_id)
        path.write_text(f"batch {rollout_id}")
        return [path.read_text()]

    @endpoint
    def kept(self) -> tuple[list[int], int]:
        """Rollouts and bytes."""
        return sorted(int(path.name) for path in (self.directory / "batches").iterdir()), 10

    @endpoint
    def replay(self, rollout_id: int) -> list[str]:
        """A batch once more."""
        if meets_its_end(self.directory, "die-replay"):
            os.abort()
        self.replays.append(rollout_id)
        return [(self.directory / "batches" / str(rollout_id)).read_text()]

    @endpoint
    def replayed(self, rollout_id: int) -> None:
        """It was trained on, or the ranks have died."""
        self.ended.append(rollout_id)

    @endpoint
    def covered(self, rollout_id: int) -> None:
        """A checkpoint has it."""
        for path in (self.directory / "batches").iterdir():
            if int(path.name) <= rollout_id:
                path.unlink()

    @endpoint
    def story(self) -> dict[str, Any]:
        """What happened in this life."""
        return {
            "recovered_at": self.recovered_at, "replays": self.replays, "replayed": self.ended,
            "replaying": self.replaying,
        }  # fmt: skip
