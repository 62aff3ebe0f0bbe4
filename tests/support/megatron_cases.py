"""Flags, micro-batches and losses for tests of the Megatron backend."""

from __future__ import annotations

import itertools
import json
import random
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from miles.backends.base import LossOutput, MicroBatch, ParallelState, StepOutcome
from miles.backends.checkpoint_layout import TRACKER, iteration_name
from miles.backends.megatron_utils.backend import MegatronBackend
from miles.backends.training_utils.collectives import share_places
from miles.backends.training_utils.sequence_layout import SequenceLayout


def backend_args(model: Path, **changed: Any) -> Namespace:
    """Resolved flags of a small CPU run."""
    values = {
        "hf_checkpoint": str(model),
        "hf_config": json.loads((model / "config.json").read_text()),
        "device": "cpu",
        "params_dtype": "float32",
        "seed": 1234,
        "tensor_model_parallel_size": 1,
        "make_vocab_size_divisible_by": 128,
        "optimizer": "adam",
        "lr": 1e-3,
        "lr_decay_style": "constant",
        "weight_decay": 0.1,
        "adam_beta1": 0.9,
        "adam_beta2": 0.98,
        "adam_eps": 1e-8,
        "clip_grad": 1.0,
        "num_rollout": 10,
        "num_steps_per_rollout": 1,
        "load": None,
        "ref_load": None,
        "ckpt_step": None,
        "use_kl_loss": False,
        "kl_coef": 0.0,
        "check_for_nan_in_loss_and_grad": True,
        "offload_train_target": "disk",
        "offload_train_disk_dir": None,
    }
    return Namespace(**{**values, **changed})


class StartedBackend(MegatronBackend):
    """Remembers what ``init`` returned."""

    start: int


def make_backend(model: Path, **changed: Any) -> StartedBackend:
    """Initialised."""
    backend = StartedBackend(backend_args(model, **changed))
    backend.start = backend.init()
    return backend


def weights_of(backend: MegatronBackend) -> dict[str, torch.Tensor]:
    """Copies, by Hugging Face name."""
    return {name: tensor.clone() for name, tensor in backend.hf_weights()}


def sequences(count: int = 6, *, vocab: int = 259, seed: int = 0, longest: int = 24) -> list[list[int]]:
    """Random token ids, of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(0, vocab, (length,), generator=generator).tolist() for length in lengths]


def own_part(backend: MegatronBackend, samples: list[list[int]]) -> list[list[int]]:
    """Of this data-parallel rank."""
    return samples[backend.parallel.dp_rank :: backend.parallel.dp_size]


def micro_batch(samples: list[list[int]], *, prompt: int = 1) -> MicroBatch:
    """Packed; the first ``prompt`` tokens of each are the prompt."""
    lengths = [len(sample) for sample in samples]
    responses = [length - prompt for length in lengths]
    return MicroBatch(
        tokens=torch.tensor([token for sample in samples for token in sample]),
        position_ids=torch.cat([torch.arange(length) for length in lengths]),
        cu_seqlens=torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32),
        total_lengths=lengths,
        response_lengths=responses,
        loss_masks=[torch.ones(response) for response in responses],
        sample_positions=list(range(len(samples))),
    )


def micro_batches(samples: list[list[int]], size: int) -> list[MicroBatch]:
    """Several, of ``size`` samples each."""
    return [micro_batch(samples[start : start + size]) for start in range(0, len(samples), size)]


class TokenLogProbs:
    """Log-probs of each sample's tokens from (vocabulary-parallel) logits, written for clearness, not speed."""

    def __init__(self, parallel: ParallelState) -> None:
        self._parallel = parallel

    def __call__(self, logits: torch.Tensor, batch: MicroBatch) -> list[torch.Tensor]:
        """float32 ``[length - 1]`` each."""
        whole = self._gather(logits).log_softmax(-1)
        bounds = batch.cu_seqlens.tolist()
        lengths = [end - start for start, end in itertools.pairwise(bounds)]
        targets = torch.cat([batch.tokens[start + 1 : end] for start, end in itertools.pairwise(bounds)])
        layout = batch.layout or SequenceLayout(tuple(lengths))
        rows, places = layout.predicting_rows([length - 1 for length in lengths])
        values = whole[rows].gather(-1, targets[places, None]).squeeze(-1)
        shared = share_places(values, places, len(targets), self._parallel.cp_group)
        return list(shared.split([length - 1 for length in lengths]))

    def _gather(self, logits: torch.Tensor) -> torch.Tensor:
        """Of all ranks; the gradient of this rank's part flows."""
        if self._parallel.tp_size == 1:
            return logits
        parts = [torch.empty_like(logits) for _ in range(self._parallel.tp_size)]
        dist.all_gather(parts, logits.detach().contiguous(), group=self._parallel.tp_group)
        parts[self._parallel.tp_rank] = logits
        return torch.cat(parts, -1)


class SumOfSquares:
    """A loss that is easy to compute elsewhere: the sum of squared log-probs, divided by ``denominator``."""

    def __init__(self, parallel: ParallelState, denominator: float = 10.0) -> None:
        self._log_probs = TokenLogProbs(parallel)
        self._denominator = denominator

    def __call__(self, logits: torch.Tensor, batch: MicroBatch) -> LossOutput:
        log_probs = self._log_probs(logits, batch)
        loss = torch.stack([(values**2).sum() for values in log_probs]).sum() / self._denominator
        return LossOutput(loss, {"loss": loss.detach(), "tokens": torch.tensor(float(sum(map(len, log_probs))))})


def train_one(backend: MegatronBackend, number: int) -> StepOutcome:
    """One step on samples that its number decides, in micro-batches of two. User code draws random numbers, too."""
    random.random(), np.random.rand(), torch.rand(3)
    return backend.train_step(
        micro_batches(own_part(backend, sequences(seed=number)), 2), SumOfSquares(backend.parallel)
    )


def save_backend(backend: MegatronBackend, root: Path, rollout_id: int) -> Path:
    """As the trainer does, but for care. Returns the checkpoint's directory."""
    directory = root / iteration_name(rollout_id)
    if dist.get_rank() == 0:
        directory.mkdir(parents=True)
    dist.barrier()
    backend.save(directory, rollout_id=rollout_id)
    dist.barrier()
    if dist.get_rank() == 0:
        (root / TRACKER).write_text(str(rollout_id))
    dist.barrier()
    return directory
