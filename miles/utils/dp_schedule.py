"""Who trains which samples, in which micro-batch: for all optimizer steps of a rollout and all data-parallel ranks.

Pure: a function of lengths and numbers. All ranks get the same number of micro-batches in a step, because each of them
means collectives (pipeline, sharded parameters, experts) in which all take part.

First the samples of a step are packed into micro-batches, then these are dealt to the ranks. With dynamic batches the
micro-batches are as few as the token budget allows, and even: if all ranks meet in each of them, nobody waits long.
Which sample lies where changes no gradient, as the loss of a step is a sum over its samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from miles.utils import bins as packing
from miles_agents.errors import ConfigError

SCHEDULE_CONFIG_KEYS = ("dp_size", "cp_size", "vpp_size", "microbatch_group_size_per_vp_stage")
Bins = list[list[int]]


class BadBatchSizes(ConfigError):
    """The samples of a rollout do not make an optimizer step."""

    code = "E-TRAIN-001"


class ScheduleArgs(Protocol):
    """The flags that matter here."""

    use_dynamic_batch_size: bool
    max_tokens_per_gpu: int | None
    micro_batch_size: int
    balance_data: bool


@dataclass(frozen=True)
class ScheduleConfig:
    """Parallel sizes. ``microbatch_group_size_per_vp_stage``: with virtual pipeline stages, the number of micro-batches
    must be a multiple of it."""

    dp_size: int
    cp_size: int = 1
    vpp_size: int = 1
    microbatch_group_size_per_vp_stage: int = 1

    @property
    def group(self) -> int:
        """A rank's micro-batches in a step are a multiple of this."""
        return self.microbatch_group_size_per_vp_stage if self.vpp_size > 1 else 1


@dataclass(frozen=True)
class DpSchedule:
    """The plan.

    Attributes:
        partitions: By rank: the samples' places in the rollout, step by step, micro-batch by micro-batch.
        micro_batch_indices: By rank: its micro-batches over all steps, as places in its partition. An empty one keeps
            a rank in step with others where there are too few samples.
        num_microbatches: By step: micro-batches of each rank.
        num_rollouts: By step: distinct rollout ids, which the loss is averaged over.
        dropped: Samples of rollouts that do not fill a step.

    Can be unpacked like a tuple of the first four.
    """

    partitions: list[list[int]]
    micro_batch_indices: list[Bins]
    num_microbatches: list[int]
    num_rollouts: list[int]
    dropped: list[int] = field(default_factory=list)

    def __iter__(self) -> Iterator[Any]:
        return iter((self.partitions, self.micro_batch_indices, self.num_microbatches, self.num_rollouts))


def has_full_schedule_config(train_parallel_config: Mapping[str, Any] | None) -> bool:
    """Whether all of ``SCHEDULE_CONFIG_KEYS`` are there."""
    return all(key in (train_parallel_config or {}) for key in SCHEDULE_CONFIG_KEYS)


def build_dp_schedule(
    args: ScheduleArgs,
    cfg: ScheduleConfig | Mapping[str, Any],
    total_lengths: Sequence[int],
    *,
    global_batch_size: int,
    rollout_indices: Sequence[int],
    weights: Sequence[float] | None = None,
) -> DpSchedule:
    """The schedule of one rollout.

    Args:
        args: Flags. With ``balance_data``, ranks get equal numbers of tokens.
        cfg: Parallel sizes.
        total_lengths: Tokens of each sample.
        global_batch_size: Rollouts (samples that share an id count once) of an optimizer step.
        rollout_indices: Rollout id of each sample. Steps take rollouts in the order in which they first appear.
        weights: Cost of each sample. Given: dynamic batches are even in cost, and the token budget is only a guide.

    Raises:
        BadBatchSizes: There are fewer rollouts than one step needs.
    """
    cfg = cfg if isinstance(cfg, ScheduleConfig) else _config(cfg)
    steps, num_rollouts, dropped = _steps(args, global_batch_size, rollout_indices)
    packer = _Packer(args, cfg, by_cost=weights is not None)
    lengths = np.asarray(total_lengths, np.int64)
    costs = lengths if weights is None else np.asarray(weights, np.float64)
    partitions: list[list[int]] = [[] for _ in range(cfg.dp_size)]
    indices: list[Bins] = [[] for _ in range(cfg.dp_size)]
    num_microbatches = []
    for samples in steps:
        places = np.array(samples, np.int64)
        ranks = packer.step(lengths[places], costs[places])
        num_microbatches.append(len(ranks[0]))
        for rank, mine in enumerate(ranks):
            for micro_batch in mine:
                begin = len(partitions[rank])
                partitions[rank] += [samples[i] for i in micro_batch]
                indices[rank].append(list(range(begin, len(partitions[rank]))))
    return DpSchedule(partitions, indices, num_microbatches, num_rollouts, dropped)


def build_forward_schedule(
    lengths_by_rank: Sequence[Sequence[int]], max_tokens: int, group: int = 1, like: Sequence[Bins] | None = None
) -> list[Bins]:
    """Micro-batches of passes without gradient, where steps do not matter: by rank, as places in its partition.

    The same number for all ranks, a multiple of ``group``. ``like``: those of training, taken if none can be fewer.
    """
    arrays = [np.asarray(lengths, np.int64) for lengths in lengths_by_rank]
    if like is not None and _fits(like, arrays, max_tokens):
        fewest = max(packing.fewest_bins(lengths, max_tokens) for lengths in arrays)
        if len(like[0]) == _round_up(fewest, group):
            return [[list(micro_batch) for micro_batch in mine] for mine in like]
    found = [packing.pack(lengths, max_tokens, group, at_least=0) for lengths in arrays]
    count = max(number for _, number in found)
    for rank, (lengths, (_, number)) in enumerate(zip(arrays, found, strict=True)):
        if number < count:
            found[rank] = packing.pack(lengths, max_tokens, group, at_least=count)
    return [packing.members(labels, count) for labels, _ in found]


def _fits(by_rank: Sequence[Bins], arrays: Sequence[packing.Lengths], max_tokens: int) -> bool:
    return all(
        len(micro_batch) <= 1 or lengths[micro_batch].sum() <= max_tokens
        for mine, lengths in zip(by_rank, arrays, strict=True)
        for micro_batch in mine
    )


def _config(sizes: Mapping[str, Any]) -> ScheduleConfig:
    return ScheduleConfig(**{name: sizes.get(name) or 1 for name in SCHEDULE_CONFIG_KEYS})


def _steps(
    args: ScheduleArgs, global_batch_size: int, rollout_indices: Sequence[int]
) -> tuple[list[list[int]], list[int], list[int]]:
    """Samples of each step, rollouts of each step, and what is left over."""
    by_rollout: dict[int, list[int]] = {}
    for place, rollout in enumerate(rollout_indices):
        by_rollout.setdefault(int(rollout), []).append(place)
    rollouts = list(by_rollout.values())
    partial = getattr(args, "allow_partial_train_step", False) and args.use_dynamic_batch_size
    if global_batch_size < 1 or not rollouts or (len(rollouts) < global_batch_size and not partial):
        raise BadBatchSizes(
            f"{len(rollouts)} rollouts do not make an optimizer step of {global_batch_size}",
            evidence=f"{len(rollout_indices)} samples with {len(rollouts)} different rollout ids",
            advice="Lower --global-batch-size, or generate more: --rollout-batch-size times --n-samples-per-prompt.",
        )
    chunks = [rollouts[i : i + global_batch_size] for i in range(0, len(rollouts), global_batch_size)]
    left = [] if partial or len(chunks[-1]) == global_batch_size else [p for r in chunks.pop() for p in r]
    return [[place for rollout in chunk for place in rollout] for chunk in chunks], [len(c) for c in chunks], left


def _capacity(args: ScheduleArgs, cfg: ScheduleConfig) -> int:
    if not args.max_tokens_per_gpu or args.max_tokens_per_gpu < 1:
        raise BadBatchSizes(
            "--use-dynamic-batch-size needs a token budget",
            evidence=f"--max-tokens-per-gpu is {args.max_tokens_per_gpu}",
            advice="Give --max-tokens-per-gpu: about --rollout-max-response-len to begin with.",
        )
    return args.max_tokens_per_gpu * cfg.cp_size


class _Packer:
    """Packs the samples of a step into micro-batches and deals these to the ranks."""

    def __init__(self, args: ScheduleArgs, cfg: ScheduleConfig, *, by_cost: bool) -> None:
        self.dp_size, self.group = cfg.dp_size, cfg.group
        self.by_cost, self.balance = by_cost, args.balance_data
        self.capacity = _capacity(args, cfg) if args.use_dynamic_batch_size else None
        self.micro_batch_size = args.micro_batch_size
        self.padded = getattr(args, "qkv_format", "thd") == "bshd"  # to the longest of each micro-batch

    def step(self, lengths: packing.Lengths, costs: packing.Weights) -> list[Bins]:
        """Each rank's micro-batches, as places in the step: the same number for all, a multiple of the group."""
        micro_batches, kept = self.pack(lengths, costs, self.dp_size * self.group)
        if not (self.by_cost or self.balance):
            return [micro_batches[rank :: self.dp_size] for rank in range(self.dp_size)]
        sums = np.array([self.cost(costs[micro_batch]) for micro_batch in micro_batches], np.float64)
        each = len(micro_batches) // self.dp_size
        labels = packing.balanced(sums, self.dp_size, limit=each)
        heaviest = float(packing.sums(labels, sums, self.dp_size).max())
        in_turn = np.arange(len(micro_batches)) % self.dp_size
        if packing.sums(in_turn, sums, self.dp_size).max() < heaviest:  # by chance
            labels, heaviest = in_turn, float(packing.sums(in_turn, sums, self.dp_size).max())
        if ranks := self.ranks_first(lengths, costs, each, heaviest, keep=kept):
            return ranks
        # The costly ones first on all ranks, so that those that run at the same time are alike.
        return [
            [micro_batches[number] for number in sorted(mine, key=lambda number: -sums[number])]
            for mine in packing.members(labels, self.dp_size)
        ]

    def ranks_first(
        self, lengths: packing.Lengths, costs: packing.Weights, each: int, heaviest: float, *, keep: bool
    ) -> list[Bins] | None:
        """The other way around, samples to ranks and then each rank's into ``each`` micro-batches: if ranks come out
        clearly more even than ``heaviest`` by that, within the budget if that is to be kept. One
        sample that is like many others asks for that.
        """
        if self.padded:
            return None  # micro-batches of samples that are alike: none of them is spread out
        slack = packing.TIES * float(costs.sum()) / self.dp_size
        if heaviest <= max(float(costs.sum()) / self.dp_size, float(costs.max())) + slack:
            return None  # no way to be better
        limit = None if self.capacity else self.micro_batch_size * each
        labels = packing.balanced(costs, self.dp_size, limit)
        if packing.sums(labels, costs, self.dp_size).max() > heaviest - slack:
            return None
        ranks = []
        for mine in packing.members(labels, self.dp_size):
            micro_batches, kept = self.pack(lengths[mine], costs[mine], self.group, at_least=each)
            if not all(micro_batches) or len(micro_batches) > each or (keep and not kept):
                return None
            micro_batches.sort(key=lambda micro_batch: -float(costs[mine][micro_batch].sum()))
            ranks.append([[mine[i] for i in micro_batch] for micro_batch in micro_batches])
        return ranks

    def pack(
        self, lengths: packing.Lengths, costs: packing.Weights, multiple: int, at_least: int = 1
    ) -> tuple[Bins, bool]:
        """Micro-batches, a multiple of ``multiple`` and at least so many, some of them empty if samples are few; and
        whether they are within the budget."""
        if self.capacity is None:
            count = _round_up(max(-(-len(lengths) // self.micro_batch_size), at_least), multiple)
            return packing.members(self.fixed(lengths, count), count), True
        if not self.by_cost:
            return packing.members(*packing.pack(lengths, self.capacity, multiple, at_least)), True
        count = _round_up(max(-(-int(lengths.sum()) // self.capacity), at_least), multiple)
        within = packing.heaviest_first_within(costs, lengths, count, self.capacity)
        labels = packing.heaviest_first(costs, count) if within is None else within
        return packing.members(labels, count), within is not None

    def cost(self, costs: packing.Weights) -> float:
        """Of a micro-batch, from those of its samples."""
        return float(costs.max(initial=0) * len(costs) if self.padded else costs.sum())

    def fixed(self, lengths: packing.Lengths, count: int) -> packing.Labels:
        """Equal numbers of samples: consecutive ones, or such that tokens are even; where each micro-batch is padded,
        such that little is."""
        if self.balance and not self.padded:
            return packing.balanced(lengths, count, limit=-(-len(lengths) // count))
        size, larger = divmod(len(lengths), count)
        chunks = np.repeat(np.arange(count), [size + 1] * larger + [size] * (count - larger))
        if not self.balance:
            return chunks
        labels = np.empty_like(chunks)
        labels[packing.descending(lengths)] = chunks
        return labels


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
