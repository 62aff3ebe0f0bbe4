"""A real training backend over a model of three matrices, for tests of what surrounds backends.

The output matrix is sharded over the vocabulary, gradients are summed over data-parallel ranks, Adam's state is kept,
saved and put aside. Loaded in workers as ``support.tiny_backend``.
"""

from __future__ import annotations

import copy
import io
import resource
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from miles.backends.base import (
    LogitsFunction,
    LossFunction,
    MicroBatch,
    ModelTag,
    ParallelState,
    StepOutcome,
    TrainBackend,
    TrainedObjects,
)
from miles.backends.trainer import Trainer
from miles_agents import endpoint

MAX_POSITION = 64


def tiny_parameters(vocab: int, hidden: int, seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Unsharded: ``tokens`` and ``out`` [V, H], ``positions`` [64, H], ``mix`` [H, H]."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"tokens": (vocab, hidden), "positions": (MAX_POSITION, hidden), "mix": (hidden, hidden)}
    shapes["out"] = (vocab, hidden)
    return {name: torch.randn(shape, generator=generator, dtype=dtype) * 0.5 for name, shape in shapes.items()}


def tiny_logits(parameters: dict[str, torch.Tensor], tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """``[T, V]``, or the shard that ``out`` is of."""
    hidden = torch.tanh((parameters["tokens"][tokens] + parameters["positions"][positions]) @ parameters["mix"])
    return _SumGradients.apply(hidden, parameters.get("group")) @ parameters["out"].T


class _SumGradients(torch.autograd.Function):
    """What every shard of ``out`` reads: its gradient is the sum over shards."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        gradient = gradient.contiguous()
        if ctx.group is not None:
            dist.all_reduce(gradient, group=ctx.group)
        return gradient, None


class TinyBackend(TrainBackend):
    """``args``: ``tp_size``, ``tiny_vocab``, ``tiny_hidden``, ``lr``, ``seed``, ``save``, ``load``, ``run_dir``."""

    def __init__(self, args: Any) -> None:
        self.args = args
        self.device = torch.device("cpu")
        self.parallel = make_parallel(getattr(args, "tp_size", 1))

    def init(self) -> int:
        args = self.args
        whole = tiny_parameters(args.tiny_vocab, args.tiny_hidden, args.seed)
        rows = args.tiny_vocab // self.parallel.tp_size
        whole["out"] = whole["out"][self.parallel.tp_rank * rows :][:rows].clone()
        self.parameters = {name: value.requires_grad_() for name, value in whole.items()}
        self.reference = {name: value.detach().clone() for name, value in self.parameters.items()}
        self.optimizer = torch.optim.Adam(self.parameters.values(), lr=args.lr)
        tracker = Path(getattr(args, "load", None) or "/nowhere") / "latest_checkpointed_iteration.txt"
        if not tracker.exists():
            return 0
        rollout_id = int(tracker.read_text())
        saved = torch.load(tracker.parent / f"iter_{rollout_id:07d}" / f"rank_{self.parallel.rank}.pt")
        for name, value in saved["parameters"].items():
            self.parameters[name].data.copy_(value)
        self.optimizer.load_state_dict(saved["optimizer"])
        return rollout_id + 1

    def forward_only(
        self, batches: Sequence[MicroBatch], function: LogitsFunction, *, model: ModelTag = "actor"
    ) -> list[Any]:
        parameters = self.reference if model == "ref" else self.parameters
        with torch.no_grad():
            return [function(self._logits(parameters, batch), batch) for batch in batches]

    def train_step(self, batches: Sequence[MicroBatch], loss_function: LossFunction) -> StepOutcome:
        self.optimizer.zero_grad()
        metrics: dict[str, torch.Tensor] = {}
        for batch in batches:
            output = loss_function(self._logits(self.parameters, batch), batch)
            output.loss.backward()
            for name, value in output.metrics.items():
                metrics[name] = metrics.get(name, torch.zeros(())) + value
        squares = torch.zeros(())
        for name, parameter in self.parameters.items():
            assert parameter.grad is not None
            dist.all_reduce(parameter.grad, group=self.parallel.dp_group)
            own = parameter.grad.square().sum()
            if name == "out":
                dist.all_reduce(own, group=self.parallel.tp_group)
            squares += own
        finite = bool(torch.isfinite(squares))
        if finite:
            self.optimizer.step()
        return StepOutcome(metrics, float(squares.sqrt()), self.args.lr, finite)

    def reset_optimizer(self) -> None:
        self.optimizer.state.clear()

    def objects(self, model: ModelTag = "actor") -> TrainedObjects:
        return TrainedObjects([self.reference if model == "ref" else self.parameters], self.optimizer, None)

    def hf_weights(self, *, only_first: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
        raise NotImplementedError("nothing asks this backend for its weights")

    def local_weights(self, model: ModelTag = "actor", *, trained: bool = False) -> list[torch.Tensor]:
        return [value.detach() for value in (self.reference if model == "ref" else self.parameters).values()]

    def save(self, directory: Path, *, rollout_id: int) -> None:
        values = {name: value.detach() for name, value in self.parameters.items()}
        state = {"parameters": values, "optimizer": self.optimizer.state_dict(), "rollout_id": rollout_id}
        written = io.BytesIO()
        torch.save(state, written)
        (directory / f"rank_{self.parallel.rank}.pt").write_bytes(written.getvalue())

    def sleep(self, level: int) -> None:
        target = Path(self.args.run_dir) / f"asleep_{self.parallel.rank}"
        if level >= 1 and not target.with_suffix(".1").exists():
            self.optimizer.zero_grad()
            torch.save(self.optimizer.state_dict(), target.with_suffix(".1"))
            self.optimizer.state.clear()
        if level >= 2:
            torch.save({name: value.detach() for name, value in self.parameters.items()}, target.with_suffix(".2"))
            for value in self.parameters.values():
                value.data = torch.empty(0)

    def wake_up(self) -> None:
        target = Path(self.args.run_dir) / f"asleep_{self.parallel.rank}"
        if (path := target.with_suffix(".2")).exists():
            for name, value in torch.load(path).items():
                self.parameters[name].data = value
            path.unlink()
        if (path := target.with_suffix(".1")).exists():
            self.optimizer.load_state_dict(torch.load(path))
            path.unlink()

    def _logits(self, parameters: dict[str, torch.Tensor], batch: MicroBatch) -> torch.Tensor:
        return tiny_logits(
            {**parameters, "group": self.parallel.tp_group},  # type: ignore[dict-item]
            batch.tokens,
            batch.position_ids,
        )


def make_parallel(tp_size: int) -> ParallelState:
    """Ranks of a tensor-parallel group are neighbours."""
    rank, world = dist.get_rank(), dist.get_world_size()
    dp_size = world // tp_size
    tp_group = dp_group = None
    for first in range(dp_size):
        members = list(range(first * tp_size, (first + 1) * tp_size))
        group = dist.new_group(members)
        tp_group = group if rank in members else tp_group
    for first in range(tp_size):
        members = list(range(first, world, tp_size))
        group = dist.new_group(members)
        dp_group = group if rank in members else dp_group
    return ParallelState(
        rank=rank,
        world_size=world,
        dp_rank=rank // tp_size,
        dp_size=dp_size,
        tp_rank=rank % tp_size,
        tp_size=tp_size,
        dp_group=dp_group,
        tp_group=tp_group,
    )


class TinyTrainer(Trainer):
    """The trainer over it, with questions that only tests ask."""

    def make_backend(self) -> TrainBackend:
        return TinyBackend(self.args)

    @endpoint
    def weights(self) -> dict[str, torch.Tensor]:
        """Copies of this rank's parameters."""
        assert isinstance(self._backend, TinyBackend)
        return copy.deepcopy({name: value.detach() for name, value in self._backend.parameters.items()})

    @endpoint
    def limit_files(self, num_bytes: int) -> None:
        """No file of this process grows beyond so many bytes; -1: any size."""
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard if num_bytes < 0 else num_bytes, hard))

    @endpoint
    def poison(self) -> None:
        """A weight that is not a number."""
        assert isinstance(self._backend, TinyBackend)
        self._backend.parameters["mix"].data[0, 0] = torch.nan
