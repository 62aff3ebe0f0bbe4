"""Forward and backward passes over packed micro-batches, through megatron.core's schedule."""

from __future__ import annotations

import contextlib
import itertools
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.parallel_state import is_pipeline_last_stage
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

from miles.backends.base import LogitsFunction, LossFunction, MicroBatch, ParallelState
from miles.backends.megatron_utils.model import hide_padding, output_of
from miles.backends.megatron_utils.mtp import MTPTraining
from miles.backends.megatron_utils.routing_replay import RoutingReplay
from miles.backends.training_utils.sequence_layout import SequenceLayout

LogitsOf = Callable[[Any, MicroBatch], torch.Tensor]


def make_logits_of(
    device: torch.device,
    vocab: int,
    parallel: ParallelState,
    *,
    multiple: int,
    padded: bool = False,
    replay: RoutingReplay | None = None,
    mtp: MTPTraining | None = None,
) -> LogitsOf:
    """A function of model and micro-batch that gives float32 logits ``[rows, V / tp]``, and what the next pipeline
    stage takes before the last one.

    Args:
        multiple: Of what a rank's row has tokens; of a padded batch, each row.
        padded: ``--qkv-format bshd``: a row for each sample, all as long as the longest.
        replay: Of the model that is trained; other models are given micro-batches without ``routing``.
        mtp: Layers that are trained to predict further tokens; their logits become those of the micro-batch.
    """

    def compute(model: Any, batch: MicroBatch) -> torch.Tensor:
        lengths = _lengths(batch)
        if padded:
            layout = SequenceLayout.padded(lengths, multiple)
        else:
            layout = SequenceLayout(lengths, parallel.cp_size, parallel.cp_rank, multiple)
        batch.layout = None if layout.is_whole else layout
        routed = contextlib.nullcontext() if replay is None else replay.forward(batch, layout, training=model.training)
        with routed:
            output = output_of(model, layout.local_tokens(batch.tokens.to(device)), layout)
        if not parallel.has_logits:
            return output
        if mtp is not None and model.training:
            further = mtp.logits(batch.tokens.to(device), layout)
            batch.further_logits = [hide_padding(part.float(), vocab, parallel.tp_rank) for part in further]
        return hide_padding(output.flatten(0, 1).float(), vocab, parallel.tp_rank)

    return compute


def row_multiple(args: Namespace, parallel: ParallelState) -> int:
    """``--data-pad-size-multiplier`` on each tensor-parallel rank; without it, what sequence parallelism needs."""
    size = int(getattr(args, "data_pad_size_multiplier", None) or 1)
    if size > 1 or getattr(args, "sequence_parallel", False):
        return parallel.tp_size * size
    return 1


def _lengths(batch: MicroBatch) -> tuple[int, ...]:
    """Of the sequences; what pads the batch after the last one is a sequence of its own."""
    return tuple(end - start for start, end in itertools.pairwise(batch.cu_seqlens.tolist()))


def forward_only(model: Any, batches: Sequence[MicroBatch], function: LogitsFunction, logits_of: LogitsOf) -> list[Any]:
    """``function(logits, batch)`` of each, without gradient and without dropout; nothing before the last stage."""
    if not batches:
        return []

    def step(iterator: Iterator[MicroBatch], model: Any) -> tuple[torch.Tensor, Callable[..., Any]]:
        batch = next(iterator)
        return logits_of(model, batch), lambda logits, non_loss_data: function(logits, batch)

    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            results = _run(step, model, batches, forward_only=True, collect_non_loss_data=True)
            return results if is_pipeline_last_stage() else []
    finally:
        model.train(was_training)


def forward_backward(
    model: Any, batches: Sequence[MicroBatch], loss_function: LossFunction, logits_of: LogitsOf
) -> dict[str, torch.Tensor]:
    """Gradients of the sum of all losses, over micro-batches and data-parallel ranks, into the model's buffers.

    Returns metrics, summed over this rank's micro-batches.
    """
    one = torch.ones((), dtype=torch.int)

    def step(iterator: Iterator[MicroBatch], model: Any) -> tuple[torch.Tensor, Callable[..., Any]]:
        batch = next(iterator)

        def loss(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
            output = loss_function(logits, batch)
            # With a count of tokens, which is not used, megatron.core leaves the loss as it is.
            return output.loss, one, {name: value.detach() for name, value in output.metrics.items()}

        return logits_of(model, batch), loss

    model.train()
    model.config.finalize_model_grads_func = _reduce_gradients
    overlaps = model.ddp_config.overlap_grad_reduce
    model.config.no_sync_func = model.no_sync if overlaps else None  # until the last micro-batch
    if not batches:
        # The other data-parallel ranks wait for this one.
        if overlaps:
            model.start_grad_sync()
        _reduce_gradients([model])
        return {}
    results = _run(step, model, batches, forward_only=False)
    return _sum(results) if is_pipeline_last_stage() else {}


def _run(step: Callable[..., Any], model: Any, batches: Sequence[MicroBatch], **options: Any) -> list[Any]:
    run = get_forward_backward_func()
    results: list[Any] = run(
        forward_step_func=step,
        data_iterator=iter(batches),
        model=model,
        num_microbatches=len(batches),
        seq_length=1,  # stages tell each other the shape of each micro-batch
        micro_batch_size=1,
        **options,
    )
    return results


def _reduce_gradients(model: list[Any], _num_tokens: torch.Tensor | None = None, **options: Any) -> None:
    """Sum over data-parallel ranks; not divided by tokens, as megatron.core would with their count."""
    finalize_model_grads(model, None, **options)


def _sum(metrics: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    total: dict[str, torch.Tensor] = {}
    for part in metrics:
        for name, value in part.items():
            total[name] = total[name] + value if name in total else value.clone()
    return total
