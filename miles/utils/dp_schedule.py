"""Who trains which samples, in which micro-batch: for all optimizer steps of a rollout and all data-parallel ranks.

Pure: a function of lengths and numbers. All ranks get the same number of micro-batches in a step, because each of them
means collectives (pipeline, sharded parameters, experts) in which all take part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from miles.utils.seqlen_balancing import first_fit_decreasing, get_seqlen_balanced_partitions, split_in_two
from miles_agents.errors import ConfigError

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
    """

    partitions: list[list[int]]
    micro_batch_indices: list[Bins]
    num_microbatches: list[int]
    num_rollouts: list[int]
    dropped: list[int] = field(default_factory=list)


def build_dp_schedule(
    args: ScheduleArgs,
    cfg: ScheduleConfig,
    total_lengths: Sequence[int],
    *,
    global_batch_size: int,
    rollout_indices: Sequence[int],
    weights: Sequence[float] | None = None,
) -> DpSchedule:
    """The schedule of one rollout.

    Args:
        args: Flags.
        cfg: Parallel sizes.
        total_lengths: Tokens of each sample.
        global_batch_size: Rollouts (samples that share an id count once) of an optimizer step.
        rollout_indices: Rollout id of each sample. Steps take rollouts in the order in which they first appear.
        weights: Cost of each sample. Given: dynamic batches are even in cost, and the token budget is only a guide.

    Raises:
        BadBatchSizes: There are fewer rollouts than one step needs.
    """
    steps, num_rollouts, dropped = _steps(args, global_batch_size, rollout_indices)
    partitions: list[list[int]] = [[] for _ in range(cfg.dp_size)]
    indices: list[Bins] = [[] for _ in range(cfg.dp_size)]
    num_microbatches = []
    for samples in steps:
        bins = _bins(args, cfg, samples, total_lengths, weights)
        by_rank = _deal(bins, cfg.dp_size, weights or total_lengths, even=weights is not None or args.balance_data)
        num_microbatches.append(len(by_rank[0]))
        for rank, mine in enumerate(by_rank):
            for micro_batch in mine:
                begin = len(partitions[rank])
                partitions[rank] += micro_batch
                indices[rank].append(list(range(begin, begin + len(micro_batch))))
    return DpSchedule(partitions, indices, num_microbatches, num_rollouts, dropped)


def build_forward_schedule(lengths_by_rank: Sequence[Sequence[int]], max_tokens: int, group: int = 1) -> list[Bins]:
    """Micro-batches of passes without gradient, where steps do not matter: by rank, as places in its partition.

    The same number for all ranks, a multiple of ``group``.
    """
    by_rank = [first_fit_decreasing(lengths, max_tokens) for lengths in lengths_by_rank]
    count = _round_up(max(map(len, by_rank)), group)
    return [_fill(bins, lengths, count) for bins, lengths in zip(by_rank, lengths_by_rank, strict=True)]


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


def _bins(
    args: ScheduleArgs,
    cfg: ScheduleConfig,
    samples: list[int],
    total_lengths: Sequence[int],
    weights: Sequence[float] | None,
) -> Bins:
    """Micro-batches of one step over all ranks: a multiple of ``dp_size * group``."""
    lengths = [int(total_lengths[i]) for i in samples]
    align = cfg.dp_size * cfg.group
    if not args.use_dynamic_batch_size:
        count = _round_up(-(-len(samples) // args.micro_batch_size), align)
        bins = _even_chunks(len(samples), count)
    else:
        capacity = _capacity(args, cfg)
        if weights is None:
            found = first_fit_decreasing(lengths, capacity)
            bins = _fill(found, lengths, _round_up(len(found), align))
        else:
            count = _round_up(-(-sum(lengths) // capacity), align)
            costs = [float(weights[i]) for i in samples]
            found = get_seqlen_balanced_partitions(costs, min(count, len(samples)), equal_size=False)
            bins = found + [[] for _ in range(count - len(found))]
    return [[samples[i] for i in micro_batch] for micro_batch in bins]


def _capacity(args: ScheduleArgs, cfg: ScheduleConfig) -> int:
    if not args.max_tokens_per_gpu or args.max_tokens_per_gpu < 1:
        raise BadBatchSizes(
            "--use-dynamic-batch-size needs a token budget",
            evidence=f"--max-tokens-per-gpu is {args.max_tokens_per_gpu}",
            advice="Give --max-tokens-per-gpu: about --rollout-max-response-len to begin with.",
        )
    return args.max_tokens_per_gpu * cfg.cp_size


def _fill(bins: Bins, weights: Sequence[float], count: int) -> Bins:
    """``count`` bins: the heaviest that has two samples is split, again and again; then empty ones."""
    bins = [list(bin_) for bin_ in bins]
    while len(bins) < count:
        splittable = [i for i, bin_ in enumerate(bins) if len(bin_) > 1]
        if not splittable:
            return bins + [[] for _ in range(count - len(bins))]
        heaviest = max(splittable, key=lambda i: sum(weights[place] for place in bins[i]))
        bins[heaviest], other = split_in_two(bins[heaviest], weights)
        bins.append(other)
    return bins


def _even_chunks(num_samples: int, count: int) -> Bins:
    """Consecutive samples, as evenly as can be; the larger chunks first, so that empty ones come last."""
    size, larger = divmod(num_samples, count)
    bounds = [size * i + min(i, larger) for i in range(count + 1)]
    return [list(range(bounds[i], bounds[i + 1])) for i in range(count)]


def _deal(bins: Bins, dp_size: int, costs: Sequence[float], *, even: bool) -> list[Bins]:
    """Each rank the same number of micro-batches: every ``dp_size``-th, or such that the costs are even."""
    if not even:
        return [bins[rank::dp_size] for rank in range(dp_size)]
    sums = [float(sum(costs[i] for i in bin_)) for bin_ in bins]
    parts = get_seqlen_balanced_partitions(sums, dp_size, equal_size=True)
    return [[bins[i] for i in part] for part in parts]


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
