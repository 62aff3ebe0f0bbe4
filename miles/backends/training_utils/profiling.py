"""Traces of what a rank computes, a file for each profiled step, and recordings of where its memory comes from.

A step is what ``--profile-target`` counts: ``train_overall`` a rollout that is trained on, ``train_actor`` an optimizer
step, ``train_log_probs`` a pass over log-probabilities; each counts from 0 where the rank starts, and those from
``--profile-step-start`` up to, but not including, ``--profile-step-end`` are profiled. A file is whole once it exists.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from miles_agents.errors import ConfigError, EnvironmentFault

logger = logging.getLogger(__name__)

TARGETS = ("train_overall", "train_actor", "train_log_probs")
_HISTORY = 1_000_000


class CannotProfile(EnvironmentFault):
    """There is no place for traces or memory recordings."""

    code = "E-TRAIN-011"


class NoMemoryRecorder(ConfigError):
    """What records memory is not installed, or not for this device."""

    code = "E-TRAIN-012"


class StepProfiler:
    """Of one rank. ``step`` goes around each step.

    Args:
        args: The run's flags.
        rank: Of all.
        cudart: Gives CUDA's runtime, for ``--profile``.
        with_ranges: Mark operators for nsys; needs CUDA.

    Raises:
        CannotProfile: The directory cannot be made.
    """

    def __init__(
        self, args: Any, rank: int, *, cudart: Callable[[], Any] = torch.cuda.cudart, with_ranges: bool = True
    ) -> None:
        self._rank = rank
        self._cudart = cudart
        self._with_ranges = with_ranges
        wanted = rank in (getattr(args, "profile_ranks", None) or [0])
        self._traces = wanted and bool(getattr(args, "use_pytorch_profiler", False))
        self._cuda_range = wanted and bool(getattr(args, "profile", False)) and not self._traces
        self._targets = frozenset(getattr(args, "profile_target", None) or ["train_overall"])
        self._window = range(_number(args, "profile_step_start", 10), _number(args, "profile_step_end", 12))
        self._counts = dict.fromkeys(TARGETS, 0)
        self._busy = False
        self._directory = Path(".")
        if self._traces:
            self._directory = _made(args, getattr(args, "tensorboard_dir", None) or "traces", "--tensorboard-dir")

    def step(self, target: str) -> AbstractContextManager[None]:
        """Profile what happens inside, if this step of the target is one of those. One profile runs at a time: a target
        within another one that is profiled is part of that trace."""
        number = self._counts[target]
        self._counts[target] = number + 1
        if target not in self._targets or number not in self._window or self._busy:
            return nullcontext()
        if self._traces:
            return self._traced(target, number)
        return self._in_cuda_range() if self._cuda_range else nullcontext()

    @contextmanager
    def _traced(self, target: str, number: int) -> Iterator[None]:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._busy = True
        try:
            with torch.profiler.profile(
                activities=activities, record_shapes=True, profile_memory=True, with_flops=True, acc_events=True
            ) as profile:
                yield
        finally:
            self._busy = False
        final = self._directory / f"{target}-step{number:05d}-rank{self._rank:05d}.pt.trace.json.gz"
        aside = final.with_name(f".{final.name}.tmp.gz")  # the ending decides about compression
        try:
            profile.export_chrome_trace(str(aside))
            aside.replace(final)
        except (OSError, RuntimeError) as error:  # a run is no worse for a missing trace
            logger.warning("no trace of %s step %d: %s", target, number, error)
            return
        logger.info("trace of %s step %d: %s", target, number, final)

    @contextmanager
    def _in_cuda_range(self) -> Iterator[None]:
        """``--profile``: what ``nsys profile --capture-range=cudaProfilerApi`` records, with ranges of operators."""
        self._busy = True
        profiler: Any = torch.autograd.profiler
        runtime = self._cudart()
        runtime.cudaProfilerStart()
        try:
            with profiler.emit_nvtx(record_shapes=True) if self._with_ranges else nullcontext():
                yield
        finally:
            if self._with_ranges:
                torch.cuda.synchronize()
            runtime.cudaProfilerStop()
            self._busy = False


class MemoryRecorder:
    """``--record-memory-history``: every allocation of this rank until ``--memory-snapshot-num-steps`` rollouts are
    trained, or until the rank ends. ``--memory-recorder``: ``torch`` (a GPU's memory, for
    https://pytorch.org/memory_viz) or ``memray`` (the process's, for ``memray flamegraph``).

    Raises:
        NoMemoryRecorder: ``torch`` without a GPU, or memray that is not installed.
        CannotProfile: The directory cannot be made.
    """

    def __init__(self, args: Any, rank: int) -> None:
        self._stop: contextlib.ExitStack | None = None
        self._left = getattr(args, "memory_snapshot_num_steps", None)
        if not getattr(args, "record_memory_history", False):
            return
        directory = _made(args, getattr(args, "memory_snapshot_dir", None) or ".", "--memory-snapshot-dir")
        name = Path(getattr(args, "memory_snapshot_path", None) or "snapshot.pickle")
        self._stop = contextlib.ExitStack()
        if getattr(args, "memory_recorder", "torch") == "memray":
            self._begin_memray(directory / f"rank{rank:05d}-{name.stem}.memray")
        else:
            self._begin_torch(directory / f"rank{rank:05d}-{name.name}", args.device)

    def rollout_done(self) -> None:
        """A rollout has been trained on."""
        if self._left is None:
            return
        self._left -= 1
        if self._left <= 0:
            self.close()

    def close(self) -> None:
        """Write what was recorded. Nothing to do a second time."""
        if self._stop is not None:
            self._stop.close()
            self._stop = None

    def _begin_memray(self, path: Path) -> None:
        try:
            import memray
        except ImportError as error:
            raise NoMemoryRecorder(
                "--memory-recorder memray needs memray, which is not installed",
                evidence=str(error),
                advice="pip install 'miles[profiling]', or pip install memray",
            ) from error
        path.unlink(missing_ok=True)  # of a run in the same directory; memray refuses to write over it
        assert self._stop is not None
        self._stop.enter_context(memray.Tracker(path))

    def _begin_torch(self, path: Path, device: str) -> None:
        if device != "cuda":
            raise NoMemoryRecorder(
                "--memory-recorder torch records the memory of a GPU",
                evidence=f"the device of this run is {device}",
                advice="Give --memory-recorder memray.",
            )
        memory: Any = torch.cuda.memory
        memory._record_memory_history(max_entries=_HISTORY)

        def dump(*_: Any) -> None:
            memory._dump_snapshot(str(path))

        # What one wants to see most is how it was when there was no memory left.
        torch._C._cuda_attach_out_of_memory_observer(dump)  # type: ignore[attr-defined]
        assert self._stop is not None
        self._stop.callback(lambda: memory._record_memory_history(enabled=None))
        self._stop.callback(dump)


def _number(args: Any, name: str, default: int) -> int:
    value = getattr(args, name, None)
    return default if value is None else int(value)


def _made(args: Any, directory: str, flag: str) -> Path:
    """A relative path begins in the run's directory: ranks have no working directory that a person knows of."""
    path = Path(getattr(args, "run_dir", None) or ".") / directory
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CannotProfile(
            f"{flag} {directory} cannot be used", evidence=str(error), advice="Give a directory that can be written to."
        ) from error
    return path
