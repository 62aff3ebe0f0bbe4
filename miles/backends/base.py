"""The contract of a training backend: what the trainer needs of Megatron-core or FSDP2, and no more.

A backend owns process groups, model, optimizer and learning-rate schedule. It knows nothing of rewards, advantages or
loss formulas: those come in as functions of logits. Every method is collective: all ranks call it, in the same order.

Packed batches: the samples of a micro-batch lie one after the other in one row of ``T`` tokens ("thd"), bounded by
``cu_seqlens``; attention and positions stay within each sample.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
import torch.distributed as dist

from miles.backends.training_utils.routing import Routing
from miles.backends.training_utils.sequence_layout import SequenceLayout

ModelTag: TypeAlias = Literal["actor", "ref", "teacher"]


@dataclass(frozen=True)
class GroupInfo:
    """This rank's place in one kind of parallelism. ``group``: None where there is one rank."""

    rank: int
    size: int
    group: dist.ProcessGroup | None


@dataclass(frozen=True)
class ParallelState:
    """This rank's place. A group of size 1 may be None.

    ``dp_rank`` is the part of a step's samples that this rank works on. Ranks that differ in ``tp_rank`` only work on
    the same samples; their logits are shards of the vocabulary. Of those that differ in ``cp_rank`` only, each has the
    logits of some tokens of each sample (``training_utils.sequence_layout``). Of those that differ in ``pp_rank`` only,
    the last has logits. Expert parallelism (``ep``) is inside data and context parallelism.
    """

    rank: int = 0
    world_size: int = 1
    dp_rank: int = 0
    dp_size: int = 1
    tp_rank: int = 0
    tp_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1
    cp_rank: int = 0
    cp_size: int = 1
    ep_rank: int = 0
    ep_size: int = 1
    etp_rank: int = 0
    etp_size: int = 1
    dp_group: dist.ProcessGroup | None = None
    tp_group: dist.ProcessGroup | None = None
    pp_group: dist.ProcessGroup | None = None
    cp_group: dist.ProcessGroup | None = None
    ep_group: dist.ProcessGroup | None = None
    etp_group: dist.ProcessGroup | None = None

    @property
    def dp(self) -> GroupInfo:
        """Data parallel. User code knows it as ``intra_dp`` and ``effective_dp``, too."""
        return GroupInfo(self.dp_rank, self.dp_size, self.dp_group)

    intra_dp = effective_dp = dp

    @property
    def tp(self) -> GroupInfo:
        """Tensor parallel."""
        return GroupInfo(self.tp_rank, self.tp_size, self.tp_group)

    @property
    def pp(self) -> GroupInfo:
        """Pipeline parallel."""
        return GroupInfo(self.pp_rank, self.pp_size, self.pp_group)

    @property
    def cp(self) -> GroupInfo:
        """Context parallel."""
        return GroupInfo(self.cp_rank, self.cp_size, self.cp_group)

    @property
    def ep(self) -> GroupInfo:
        """Expert parallel."""
        return GroupInfo(self.ep_rank, self.ep_size, self.ep_group)

    @property
    def etp(self) -> GroupInfo:
        """Tensor parallel within experts."""
        return GroupInfo(self.etp_rank, self.etp_size, self.etp_group)

    @property
    def is_pp_last_stage(self) -> bool:
        """The same as ``has_logits``, by the name that user code knows."""
        return self.has_logits

    @property
    def has_logits(self) -> bool:
        """The last pipeline stage: what is computed from logits is here."""
        return self.pp_rank == self.pp_size - 1


@dataclass
class MicroBatch:
    """Samples that go through the model together.

    Attributes:
        tokens: int64 ``[T]``: prompts and responses, one after the other.
        position_ids: int64 ``[T]``, from 0 in each sample.
        cu_seqlens: int32 ``[n + 1]``: where each sample begins; the last entry is ``T`` without padding.
        total_lengths: Tokens of each sample, prompt included.
        response_lengths: Response tokens ``R_i`` of each sample.
        loss_masks: float32 ``[R_i]`` each.
        sample_positions: Places of the samples in this rank's data.
        columns: Per-sample values that losses need, by name: tensors ``[R_i]`` (``log_probs``, ``advantages``, ...)
            or plain numbers.
        layout: Set by a backend that gives a rank other rows than the tokens as they are. Losses see all response
            tokens either way: what is computed of logits is shared among the ranks of ``cp_group``.
        further_logits: Set by a backend that trains layers for further tokens (``--enable-mtp-training``): of each in
            turn logits like the model's own, whose row at position i predicts token i + 2, i + 3, and so on.
        routing: Where a model with experts records or finds those of these samples; None: routers choose.
    """

    tokens: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    total_lengths: list[int]
    response_lengths: list[int]
    loss_masks: list[torch.Tensor]
    sample_positions: list[int] = field(default_factory=list)
    columns: dict[str, list[Any]] = field(default_factory=dict)
    layout: SequenceLayout | None = None
    further_logits: list[torch.Tensor] = field(default_factory=list)
    routing: Routing | None = None


@dataclass
class LossOutput:
    """What a loss function makes of a micro-batch's logits.

    Attributes:
        loss: 0-d, with gradient. The step's loss is the SUM of these over all micro-batches and data-parallel ranks:
            whatever divides (samples of the step, tokens of the step) is in it already. The backend must therefore
            undo every averaging of its own (over micro-batches, over data-parallel ranks).
        metrics: 0-d tensors without gradient that are summed the same way.
    """

    loss: torch.Tensor
    metrics: dict[str, torch.Tensor]


LogitsFunction: TypeAlias = Callable[[torch.Tensor, MicroBatch], Any]
"""Takes float32 logits ``[rows, V / tp_size]`` and the micro-batch they belong to. Without context parallelism and
padding the rows are the batch's tokens; else ``MicroBatch.layout`` tells which."""
LossFunction: TypeAlias = Callable[[torch.Tensor, MicroBatch], LossOutput]


@dataclass
class StepOutcome:
    """Of one optimizer step.

    Attributes:
        metrics: Sums over this rank's micro-batches only; the caller reduces over ``dp_group``.
        grad_norm: Global norm before clipping.
        learning_rate: The one that the step used.
        stepped: False: the gradients were not finite and the step was left out.
        learning_rates: Of each parameter group; nothing where they are all alike.
    """

    metrics: dict[str, torch.Tensor]
    grad_norm: float
    learning_rate: float
    stepped: bool = True
    learning_rates: tuple[float, ...] = ()


@dataclass(frozen=True)
class TrainedObjects:
    """What hooks of users get to see.

    Attributes:
        model: The model's parts on this rank as they are called: Megatron's data-parallel wrappers, or FSDP's module.
        optimizer: Its ``param_groups`` are those of torch.
        scheduler: Of learning rate and weight decay.
    """

    model: list[Any]
    optimizer: Any
    scheduler: Any


class TrainBackend(ABC):
    """See the module's docstring. Made in the rank's process once ``torch.distributed`` is initialised."""

    parallel: ParallelState
    device: torch.device

    @abstractmethod
    def init(self) -> int:
        """Build everything and load weights: ``--load`` if it holds a checkpoint (then optimizer, schedule and RNG
        too), else ``--ref-load``, else ``--hf-checkpoint``. Returns the next rollout id: 0 for a fresh start."""

    @abstractmethod
    def forward_only(
        self, batches: Sequence[MicroBatch], function: LogitsFunction, *, model: ModelTag = "actor"
    ) -> list[Any]:
        """``function(logits, batch)`` of each micro-batch, in order, without gradient; nothing on ranks without logits.
        ``ref`` and ``teacher``: with the weights of those models (only if ``init`` was told that they are needed)."""

    @abstractmethod
    def train_step(self, batches: Sequence[MicroBatch], loss_function: LossFunction) -> StepOutcome:
        """Gradients of all micro-batches, clipping, one optimizer step, one step of the schedule."""

    @abstractmethod
    def reset_optimizer(self) -> None:
        """Forget the optimizer's moments and its count of steps. The schedule goes on."""

    @abstractmethod
    def objects(self, model: ModelTag = "actor") -> TrainedObjects:
        """For hooks of users, which may look and change."""

    @abstractmethod
    def hf_weights(self, *, only_first: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and full tensor as in the model's HF safetensors files, in the dtype the engines get, the same order on
        all ranks. Every rank must exhaust it, and every rank sees each full tensor; with ``only_first`` rank 0 does,
        and others need not be sent them: what they yield means nothing. A tensor may lie in the model; it stays as it
        is for as long as it is kept, until the model changes: senders send several at once."""

    @abstractmethod
    def local_weights(self, model: ModelTag = "actor", *, trained: bool = False) -> list[torch.Tensor]:
        """This rank's part of a model's parameters, in the same order of all models; with ``trained``, without those
        that stay as they are. They may be written to (not while asleep at level 2), and passes see what was written;
        the optimizer's own copies do not."""

    @abstractmethod
    def save(self, directory: Path, *, rollout_id: int) -> None:
        """Write weights, optimizer, schedule and RNG (``--no-save-optim``: weights only) into ``directory``, which is
        new and empty. The caller renames it when all ranks are done."""

    @abstractmethod
    def sleep(self, level: int) -> None:
        """Give memory back. Level 1: gradients and optimizer state; level 2: parameters (of frozen models, too). What
        cannot be computed again goes to where ``--offload-train-target`` says."""

    @abstractmethod
    def wake_up(self) -> None:
        """Take everything back, exactly as it was. Nothing to do if awake."""

    def close(self) -> None:  # noqa: B027  # most have nothing to give back
        """Give files and groups back at an orderly end."""
