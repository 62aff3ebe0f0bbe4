"""From the train data of a rollout to one compact part for each data-parallel rank. Needs numpy only.

The rollout manager calls ``split_train_data`` and puts the parts into the store; a rank makes tensors of its part with
``miles.backends.training_utils.data.RankData.from_wire``. What ranks need to know of each other (the schedule, and what
the loss is divided by) is in every part, so that no rank has to ask another.

A part is a dict of plain values and numpy arrays:

==================  ===================================================================================
``dp_rank``         whose part it is; ``dp_size`` of how many
``partition``       int64 ``[n]``: place of each sample in the rollout
``tokens``          int32, all samples one after the other; ``total_lengths`` int64 ``[n]``
``loss_masks``      int8 (float32 if not whole numbers), 0 to 1, all responses; ``response_lengths`` int64 ``[n]``
``per_token``       by name: float32 (int64 if all of them are whole numbers), all responses one after the other
                    (``rollout_log_probs``, ...)
``per_sample``      by name: float64 or int64 ``[n]`` (``rewards``, ``rollout_ids``, ``rollout_mask_sums``, ...)
``routed_experts``  with ``--use-rollout-routing-replay``: int32 ``[sum (T_i - 1), layers, k]``, all samples one after
                    the other: the experts that engines gave each token to; -1 where that is not known
``objects``         by name: a list of ``n`` values of any kind that travels (``weight_versions``, ...)
``shared``          by name: what is no list, the same for all ranks
``steps``           per optimizer step: ``micro_batches`` (places in the partition), ``num_rollouts`` and
                    ``num_tokens`` of the step over all ranks, which losses are divided by
``forward``         micro-batches of the passes without gradient, over all steps
==================  ===================================================================================
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from miles.utils.dp_schedule import DpSchedule, ScheduleConfig, build_dp_schedule, build_forward_schedule
from miles.utils.flops import sample_costs
from miles_agents.errors import ConfigError

log = logging.getLogger(__name__)

REQUIRED = ("tokens", "response_lengths", "loss_masks")
ROUTED_EXPERTS = "rollout_routed_experts"
"""The column that engines' choices of experts travel in: integers ``[T_i - 1, layers, k]`` for each sample. A row of -1
was not recorded; the last token has none, as no engine computes it."""
ALWAYS_PER_TOKEN = frozenset({"rollout_log_probs", "teacher_log_probs", "opd_reverse_kl"})
ALWAYS_FLOAT = ALWAYS_PER_TOKEN | {"log_probs", "ref_log_probs", "values", "returns", "advantages"}
"""What losses compute with; of other columns whole numbers stay what they are: float32 has 24 bits for them."""
_Ints = npt.NDArray[np.int64]


class BadTrainData(ConfigError):
    """What a rollout was converted to does not fit together."""

    code = "E-TRAIN-002"


def split_train_data(args: Any, train_data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One part for each data-parallel rank.

    Args:
        args: The run's flags: ``dp_size``, ``global_batch_size``, ``use_dynamic_batch_size``, ``max_tokens_per_gpu``,
            ``log_probs_max_tokens_per_gpu``, ``micro_batch_size``, ``balance_data``, ``balance_by_flops``.
        train_data: Lists with an entry per sample: ``tokens``, ``response_lengths``, ``loss_masks`` and whatever else;
            what is no list goes to all ranks as it is. ``dynamic_global_batch_size`` overrules the flag.

    Raises:
        BadTrainData: Lengths do not fit, only some samples have a value, or a mask is not of numbers from 0 to 1.
        BadBatchSizes: The samples do not make one optimizer step.

    Samples at the end that do not fill a step are in no part: see ``dropped_rows``.
    """
    lengths, responses = _lengths(train_data)
    masks = [_mask(sample, mask) for sample, mask in enumerate(train_data["loss_masks"])]
    columns = _Columns(train_data, responses, masks)
    routed = _routed_experts(args, train_data.get(ROUTED_EXPERTS), lengths)
    schedule, forward = _schedules(args, train_data, lengths, columns.per_sample["rollout_ids"])
    mask_tokens = np.array([max(float(mask.sum()), 1.0) for mask in masks])
    num_tokens = _tokens_by_step(schedule, mask_tokens)
    if schedule.dropped:
        log.warning("%d samples do not fill an optimizer step and are not trained", len(schedule.dropped))
    parts = []
    for rank, partition in enumerate(schedule.partitions):
        part = columns.of(partition)
        part |= {
            "dp_rank": rank,
            "dp_size": len(schedule.partitions),
            "partition": np.array(partition, np.int64),
            "tokens": _flat([np.asarray(train_data["tokens"][i], np.int32) for i in partition], np.int32),
            "total_lengths": lengths[partition],
            "response_lengths": responses[partition],
            "loss_masks": _flat_masks([masks[i] for i in partition]),
            "steps": _steps(schedule, rank, num_tokens),
            "forward": forward[rank],
        }
        if routed is not None:
            part["routed_experts"] = np.concatenate([routed[i] for i in partition] or [routed[0][:0]])
        parts.append(part)
    return parts


def dropped_rows(parts: Sequence[Mapping[str, Any]], count: int) -> list[int]:
    """Places in the rollout of those of ``count`` samples that no part of ``split_train_data`` holds."""
    held = {int(place) for part in parts for place in part["partition"]}
    return [place for place in range(count) if place not in held]


class _Columns:
    """Everything that train data holds besides tokens and masks, sorted by kind."""

    def __init__(self, train_data: Mapping[str, Any], responses: _Ints, masks: list[npt.NDArray[Any]]) -> None:
        self.responses = responses
        self.per_token: dict[str, list[npt.NDArray[Any]]] = {}
        self.per_sample: dict[str, npt.NDArray[Any]] = {}
        self.objects: dict[str, list[Any]] = {}
        self.shared: dict[str, Any] = {}
        for name, values in train_data.items():
            if name not in (*REQUIRED, ROUTED_EXPERTS):
                self._sort(name, values)
        self._fill_in(masks)

    def of(self, partition: list[int]) -> dict[str, Any]:
        """The columns of these samples."""
        return {
            "per_token": {k: _flat([v[i] for i in partition], v[0].dtype) for k, v in self.per_token.items()},
            "per_sample": {name: values[partition] for name, values in self.per_sample.items()},
            "objects": {name: [values[i] for i in partition] for name, values in self.objects.items()},
            "shared": self.shared,
        }

    def _sort(self, name: str, values: Any) -> None:
        if isinstance(values, np.ndarray) and values.ndim:
            values = list(values)
        if not isinstance(values, list | tuple):
            self.shared[name] = values
            return
        if len(values) != len(self.responses):
            raise BadTrainData(
                f"{name} has {len(values)} entries for {len(self.responses)} samples",
                evidence=f"tokens, response_lengths and loss_masks have {len(self.responses)}",
                advice=f"Return one entry of {name} per sample; a list that is not of samples goes into a dict.",
            )
        missing = [i for i, value in enumerate(values) if value is None]
        if len(missing) == len(values):
            return
        if missing and name in ALWAYS_PER_TOKEN:
            raise BadTrainData(
                f"only some samples have {name}",
                evidence=f"{len(missing)} of {len(values)} have none, the first is sample {missing[0]}",
                advice=f"Give {name} to all samples of a rollout, or to none.",
            )
        if all(isinstance(value, int | float | np.integer | np.floating | np.bool_) for value in values):
            self.per_sample[name] = _scalars(values)
        elif name in ALWAYS_PER_TOKEN or self._is_per_token(values):
            self.per_token[name] = self._token_values(name, values)
        else:
            self.objects[name] = list(values)

    def _is_per_token(self, values: Sequence[Any]) -> bool:
        """A list of numbers of the response's length, for every sample."""
        if not any(self.responses):
            return False
        for value, length in zip(values, self.responses, strict=True):
            if not isinstance(value, list | tuple | np.ndarray) or len(value) != length:
                return False
            if isinstance(value, np.ndarray):
                if value.ndim != 1 or value.dtype.kind not in "bif":
                    return False
            elif not all(isinstance(number, int | float) for number in value):
                return False
        return True

    def _token_values(self, name: str, values: Sequence[Any]) -> list[npt.NDArray[Any]]:
        arrays = [np.asarray(value, np.float32 if name in ALWAYS_FLOAT else None) for value in values]
        for sample, (array, length) in enumerate(zip(arrays, self.responses, strict=True)):
            if array.shape != (length,):
                raise _misfit(name, sample, f"shape {array.shape}, response length {length}")
        # An empty list has no type of its own.
        whole = all(np.can_cast(array.dtype, np.int64) for array in arrays if array.size)
        dtype = np.int64 if whole and name not in ALWAYS_FLOAT else np.float32
        return [array.astype(dtype, copy=False) for array in arrays]

    def _fill_in(self, masks: list[npt.NDArray[Any]]) -> None:
        """Ids and mask totals by id, where the conversion gave none."""
        count = len(masks)
        ids = self.per_sample.setdefault("rollout_ids", self.per_sample.get("sample_indices", np.arange(count)))
        if "rollout_mask_sums" in self.per_sample or not count:
            return
        _, inverse = np.unique(ids, return_inverse=True)
        totals = np.bincount(inverse, weights=[float(mask.sum()) for mask in masks])
        self.per_sample["rollout_mask_sums"] = totals[inverse]


def _lengths(train_data: Mapping[str, Any]) -> tuple[_Ints, _Ints]:
    """Tokens and response tokens of each sample, checked."""
    absent = [name for name in REQUIRED if name not in train_data]
    if absent:
        raise BadTrainData(
            f"train data has no {', '.join(absent)}",
            evidence=f"it has {', '.join(sorted(train_data))}",
            advice="Return these lists from --custom-convert-samples-to-train-data-path.",
        )
    counts = {name: len(train_data[name]) for name in REQUIRED}
    if len(set(counts.values())) != 1:
        raise BadTrainData(
            "lists of train data differ in length",
            evidence=", ".join(f"{name}: {count}" for name, count in counts.items()),
            advice="Give every list one entry per sample.",
        )
    lengths = np.array([len(tokens) for tokens in train_data["tokens"]], np.int64)
    responses = np.array(train_data["response_lengths"], np.int64)
    for sample, (total, response) in enumerate(zip(lengths, responses, strict=True)):
        masked = len(train_data["loss_masks"][sample])
        if masked != response:
            raise _misfit("loss_masks", sample, f"length {masked}, response length {response}")
        if not 0 <= response < max(total, 1):
            raise _misfit("tokens", sample, f"{total} tokens, {response} of them response: a prompt token is needed")
    return lengths, responses


def _routed_experts(args: Any, values: Sequence[Any] | None, lengths: _Ints) -> list[npt.NDArray[np.int32]] | None:
    """Of each sample int32 ``[T_i - 1, layers, k]``; None: the run replays none, or no sample has any."""
    known = [] if values is None else [np.asarray(value) for value in values if value is not None]
    if values is None or not known or not getattr(args, "use_rollout_routing_replay", False):
        return None
    found, inner = [], known[0].shape[1:]
    for sample, (value, length) in enumerate(zip(values, lengths, strict=True)):
        # The last token has none: no engine computes it.
        wanted = (max(int(length) - 1, 0), *inner)
        array = np.full(wanted, -1, np.int32) if value is None else np.asarray(value)
        if array.ndim != 3 or array.shape != wanted or array.dtype.kind not in "iu":
            raise _misfit(ROUTED_EXPERTS, sample, f"shape {array.shape} of {array.dtype}, of {length} tokens: {wanted}")
        found.append(array.astype(np.int32, copy=False))
    return found


def _misfit(name: str, sample: int, what: str) -> BadTrainData:
    return BadTrainData(
        f"{name} of sample {sample} does not fit its response",
        evidence=what,
        advice="Look at the function that made or changed the sample: generate, reward, filter or conversion.",
        name=name,
        sample=sample,
    )


def _mask(sample: int, values: Any) -> npt.NDArray[Any]:
    array = np.asarray(values)
    if array.size == 0:
        return np.zeros(0, np.int8)
    if array.dtype.kind not in "buif" or array.ndim != 1 or not (array.min() >= 0 and array.max() <= 1):
        raise BadTrainData(
            f"loss_masks of sample {sample} holds what is no number from 0 to 1",
            evidence=f"{array.dtype} {array.shape}: {np.array2string(array, threshold=20)}",
            advice="Give each token of the response 1 if it is trained, else 0; a number between weighs it.",
            name="loss_masks",
            sample=sample,
        )
    return array.astype(np.int8 if array.dtype.kind in "bui" else np.float32)


def _flat_masks(masks: list[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    return _flat(masks, np.float32 if any(mask.dtype == np.float32 for mask in masks) else np.int8)


def _flat(arrays: list[npt.NDArray[Any]], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    return np.concatenate(arrays).astype(dtype, copy=False) if arrays else np.zeros(0, dtype)


def _scalars(values: Sequence[Any]) -> npt.NDArray[Any]:
    array = np.asarray(values)
    return array.astype(np.int64 if np.can_cast(array.dtype, np.int64) else np.float64)


def _schedules(
    args: Any, train_data: Mapping[str, Any], lengths: _Ints, rollout_ids: npt.NDArray[Any]
) -> tuple[DpSchedule, list[list[list[int]]]]:
    cfg = ScheduleConfig(
        dp_size=args.dp_size,
        cp_size=getattr(args, "context_parallel_size", None) or 1,
        vpp_size=getattr(args, "virtual_pipeline_model_parallel_size", None) or 1,
        microbatch_group_size_per_vp_stage=getattr(args, "microbatch_group_size_per_vp_stage", None)
        or getattr(args, "pipeline_model_parallel_size", None)
        or 1,
    )
    schedule = build_dp_schedule(
        args,
        cfg,
        lengths.tolist(),
        global_batch_size=train_data.get("dynamic_global_batch_size") or args.global_batch_size,
        rollout_indices=rollout_ids.tolist(),
        weights=sample_costs(args, lengths) if getattr(args, "balance_by_flops", False) else None,
    )
    if not args.use_dynamic_batch_size:
        return schedule, schedule.micro_batch_indices
    budget = getattr(args, "log_probs_max_tokens_per_gpu", None) or args.max_tokens_per_gpu
    by_rank = [lengths[partition].tolist() for partition in schedule.partitions]
    forward = build_forward_schedule(by_rank, budget * cfg.cp_size, cfg.group, like=schedule.micro_batch_indices)
    return schedule, forward


def _tokens_by_step(schedule: DpSchedule, mask_tokens: npt.NDArray[np.float64]) -> list[float]:
    """What per-token losses of each step are divided by. A sample without any trained token counts as one token."""
    totals = np.zeros(len(schedule.num_microbatches))
    step_of = np.repeat(np.arange(len(totals)), schedule.num_microbatches)  # of each micro-batch of a rank
    for partition, micro_batches in zip(schedule.partitions, schedule.micro_batch_indices, strict=True):
        steps = np.repeat(step_of, [len(micro_batch) for micro_batch in micro_batches])
        places = [partition[i] for micro_batch in micro_batches for i in micro_batch]
        totals += np.bincount(steps, weights=mask_tokens[places], minlength=len(totals))
    as_list: list[float] = totals.tolist()
    return as_list


def _steps(schedule: DpSchedule, rank: int, num_tokens: list[float]) -> list[dict[str, Any]]:
    steps = []
    first = 0
    for number, count in enumerate(schedule.num_microbatches):
        steps.append(
            {
                "micro_batches": schedule.micro_batch_indices[rank][first : first + count],
                "num_rollouts": schedule.num_rollouts[number],
                "num_tokens": num_tokens[number],
            }
        )
        first += count
    return steps
