"""One data-parallel rank's samples as tensors, and the packing of some of them into a micro-batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from miles.backends.base import MicroBatch
from miles.backends.training_utils.routing import Routing
from miles.utils.train_data import ROUTED_EXPERTS


@dataclass(frozen=True)
class StepPlan:
    """An optimizer step of this rank.

    Attributes:
        micro_batches: Samples of each, as places in the rank's data.
        num_rollouts: Rollouts of the step over all ranks: what per-sample losses are divided by.
        num_tokens: Trained tokens of the step over all ranks: what per-token losses are divided by.
    """

    micro_batches: list[list[int]]
    num_rollouts: int
    num_tokens: float


@dataclass
class RankData:
    """What ``miles.utils.train_data.split_train_data`` made for this rank. Tensors are on the CPU and may be views of
    shared memory: change none of them in place.

    Attributes:
        tokens: Prompt and response of each sample, int32.
        response_lengths: ``R_i``.
        loss_masks: float32 ``[R_i]`` each.
        columns: By name, a value per sample: tensors ``[R_i]``, numbers, or whatever came.
        shared: By name, what is not per sample.
        partition: Place of each sample in the rollout.
        steps: Optimizer steps.
        forward: Micro-batches of passes without gradient, over all steps.
        routed_experts: What engines recorded (``train_data.ROUTED_EXPERTS``), int32 ``[T_i - 1, layers, k]`` each.
        routing: Of the passes of the model that is trained.
    """

    tokens: list[torch.Tensor]
    response_lengths: list[int]
    loss_masks: list[torch.Tensor]
    columns: dict[str, list[Any]]
    shared: dict[str, Any]
    partition: list[int]
    steps: list[StepPlan]
    forward: list[list[int]]
    dp_rank: int = 0
    dp_size: int = 1
    routed_experts: list[torch.Tensor] | None = None
    routing: Routing | None = None
    total_lengths: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.total_lengths = [tokens.shape[0] for tokens in self.tokens]

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def from_wire(cls, part: Mapping[str, Any]) -> RankData:
        """From what came out of the store."""
        responses = [int(length) for length in part["response_lengths"]]
        columns: dict[str, list[Any]] = {name: values.tolist() for name, values in part["per_sample"].items()}
        columns |= {name: list(values) for name, values in part["objects"].items()}
        columns |= {name: pieces(values, responses) for name, values in part["per_token"].items()}
        routed = part.get("routed_experts")
        return cls(
            tokens=pieces(part["tokens"], part["total_lengths"]),
            response_lengths=responses,
            loss_masks=[mask.float() for mask in pieces(part["loss_masks"], responses)],
            columns=columns,
            shared=dict(part["shared"]),
            partition=[int(place) for place in part["partition"]],
            steps=[
                StepPlan([list(m) for m in step["micro_batches"]], int(step["num_rollouts"]), float(step["num_tokens"]))
                for step in part["steps"]
            ],
            forward=[list(micro_batch) for micro_batch in part["forward"]],
            dp_rank=int(part["dp_rank"]),
            dp_size=int(part["dp_size"]),
            routed_experts=None if routed is None else pieces(routed, [n - 1 for n in part["total_lengths"]]),
        )

    def recording(self) -> AbstractContextManager[None]:
        """Around the pass whose routing training replays."""
        return nullcontext() if self.routing is None else self.routing.recording()

    def as_dict(self) -> dict[str, Any]:
        """As users see it: lists with an entry per sample, by name. Tensors are copies."""
        return {
            "tokens": [tokens.clone() for tokens in self.tokens],
            "loss_masks": [mask.clone() for mask in self.loss_masks],
            "response_lengths": list(self.response_lengths),
            "total_lengths": list(self.total_lengths),
            "partition": list(self.partition),
            **({} if self.routed_experts is None else {ROUTED_EXPERTS: [e.clone() for e in self.routed_experts]}),
            **{name: [_copy(value) for value in values] for name, values in self.columns.items()},
        }

    def take_over(self, changed: Mapping[str, Any]) -> None:
        """What ``as_dict`` gave, after a user has changed values or added columns. Samples, their tokens and the steps
        they are in stay, and so do recorded experts.

        Raises:
            ValueError: A list of another length, or a tensor of one; the message says which.
        """
        fixed = {"tokens", "response_lengths", "total_lengths", "partition", ROUTED_EXPERTS}
        for name, values in changed.items():
            if name in fixed:
                continue
            if len(values) != len(self):
                raise ValueError(f"{name} has {len(values)} entries for {len(self)} samples")
            per_token = name == "loss_masks" or any(isinstance(v, torch.Tensor) for v in self.columns.get(name, ()))
            wrong = [i for i, r in enumerate(self.response_lengths) if per_token and len(values[i]) != r]
            if wrong:
                raise ValueError(f"{name} of sample {wrong[0]} has not as many entries as its response has tokens")
        self.loss_masks = [torch.as_tensor(mask).float() for mask in changed["loss_masks"]]
        self.columns = {name: list(v) for name, v in changed.items() if name not in fixed | {"loss_masks"}}

    def packed(self, samples: Sequence[int]) -> list[list[int]]:
        """Micro-batches of some of the samples for a pass without gradient. None has more tokens, or more samples, than
        the largest of ``forward`` has: what fits there, fits here."""
        most_tokens = max((sum(self.total_lengths[i] for i in of) for of in self.forward), default=0)
        most_samples = max((len(of) for of in self.forward), default=0)
        wanted, found = set(samples), list[list[int]]()
        left = 0
        for i in (i for of in self.forward for i in of if i in wanted):
            if not found or self.total_lengths[i] > left or len(found[-1]) == most_samples:
                found.append([])
                left = most_tokens
            found[-1].append(i)
            left -= self.total_lengths[i]
        return found

    def micro_batch(
        self, samples: Sequence[int], device: torch.device, names: Iterable[str] = (), *, routed: bool = False
    ) -> MicroBatch:
        """Pack samples. None at all gives one token that nothing is computed of: ranks must stay in step.

        Args:
            samples: Places in this data.
            device: Where the model is.
            names: Columns that the loss needs; those that are not there are left out.
            routed: For the model whose routing is recorded and replayed.
        """
        routing = self.routing if routed else None
        if not samples:
            zero = torch.zeros(1, dtype=torch.int64, device=device)
            bounds = torch.tensor([0, 1], dtype=torch.int32, device=device)
            return MicroBatch(zero, zero.clone(), bounds, [1], [0], [torch.zeros(0, device=device)], routing=routing)
        lengths = [self.total_lengths[i] for i in samples]
        bounds = torch.tensor([0, *np.cumsum(lengths).tolist()], dtype=torch.int32)
        return MicroBatch(
            tokens=torch.cat([self.tokens[i] for i in samples]).to(device, torch.int64),
            position_ids=torch.cat([torch.arange(length) for length in lengths]).to(device),
            cu_seqlens=bounds.to(device),
            total_lengths=lengths,
            response_lengths=[self.response_lengths[i] for i in samples],
            loss_masks=[self.loss_masks[i].to(device) for i in samples],
            sample_positions=list(samples),
            columns={
                name: [_on(self.columns[name][i], device) for i in samples] for name in names if name in self.columns
            },
            routing=routing,
        )


def response_tokens(batch: MicroBatch) -> torch.Tensor:
    """int64 ``[sum R_i]``."""
    samples = torch.split(batch.tokens[: sum(batch.total_lengths)], batch.total_lengths)
    return torch.cat([t[len(t) - response :] for t, response in zip(samples, batch.response_lengths, strict=True)])


def response_rows(batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of the logits that predict response tokens, and these tokens: of a response at ``[start, end)`` the rows
    ``[start - 1, end - 1)``. int64 ``[sum R_i]`` each. Of batches whose rows are the tokens as they are."""
    device = batch.tokens.device
    rows, end = [], 0
    for total, response in zip(batch.total_lengths, batch.response_lengths, strict=True):
        end += total
        rows.append(torch.arange(end - response - 1, end - 1, device=device))
    chosen = torch.cat(rows)
    return chosen, batch.tokens[chosen + 1]


def pieces(flat: Any, lengths: Iterable[Any]) -> list[torch.Tensor]:
    """A flat tensor (or array) as views of these lengths."""
    if isinstance(flat, np.ndarray):
        flat = torch.from_numpy(flat if flat.flags.writeable else flat.copy())
    return list(torch.split(flat, [int(length) for length in lengths]))


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


def _on(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value
