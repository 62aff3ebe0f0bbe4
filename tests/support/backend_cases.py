"""What tests of training backends share: flags, packed batches, a simple loss, and its plain implementation."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from miles.backends.base import LossOutput, MicroBatch


def backend_args(hf_checkpoint: Path, **changes: Any) -> SimpleNamespace:
    """The run's flags as a backend sees them, resolved for a CPU, with the contract's optimizer defaults."""
    flags: dict[str, Any] = {
        "device": "cpu",
        "params_dtype": "float32",
        "hf_checkpoint": str(hf_checkpoint),
        "hf_config": _config(hf_checkpoint),
        "tensor_model_parallel_size": 1,
        "make_vocab_size_divisible_by": 128,
        "load": None,
        "ref_load": None,
        "save": None,
        "ckpt_step": None,
        "no_load_optim": False,
        "no_load_rng": False,
        "no_save_optim": False,
        "no_save_rng": False,
        "finetune": False,
        "seed": 1234,
        "optimizer": "adam",
        "lr": 1e-3,
        "min_lr": 0.0,
        "lr_decay_style": "constant",
        "lr_warmup_iters": 0,
        "lr_warmup_fraction": None,
        "lr_warmup_init": 0.0,
        "lr_decay_iters": None,
        "weight_decay": 0.1,
        "adam_beta1": 0.9,
        "adam_beta2": 0.98,
        "adam_eps": 1e-8,
        "clip_grad": 1.0,
        "check_for_nan_in_loss_and_grad": True,
        "num_rollout": 10,
        "num_steps_per_rollout": 1,
        "use_kl_loss": False,
        "kl_coef": 0.0,
        "attn_implementation": "sdpa",
        "offload_train_target": "cpu",
        "offload_train_disk_dir": None,
        "run_dir": "/nonexistent/run",
    }
    unknown = set(changes) - set(flags) - _RARE
    assert not unknown, f"not a flag of these tests: {unknown}"
    return SimpleNamespace(**flags | changes)


def _config(path: Path) -> dict[str, Any]:
    file = path / "config.json"
    return json.loads(file.read_text()) if file.is_file() else {}


_RARE = {
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "sgd_momentum",
    "gradient_checkpointing",
    "fsdp_cpu_offload",
    "explicit_flags",
    "offload_train_disk_chunk_mb",
    "global_batch_size",
    "deterministic_mode",
    "lr_wsd_decay_style",
    "lr_wsd_decay_iters",
    "start_weight_decay",
    "end_weight_decay",
    "weight_decay_incr_style",
}


def sequences(count: int, *, seed: int = 0, shortest: int = 4, longest: int = 24, vocab: int = 256) -> list[list[int]]:
    """Random token ids of random lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(0, vocab, (length,), generator=generator).tolist() for length in lengths]


def micro_batch(samples: list[list[int]], *, padding: int = 0) -> MicroBatch:
    """The samples packed, the first half of each its prompt."""
    tokens = [token for sample in samples for token in sample] + [0] * padding
    positions = [place for sample in samples for place in range(len(sample))] + list(range(padding))
    totals = [len(sample) for sample in samples]
    responses = [total - total // 2 for total in totals]
    return MicroBatch(
        tokens=torch.tensor(tokens),
        position_ids=torch.tensor(positions),
        cu_seqlens=torch.tensor([0, *itertools.accumulate(totals)], dtype=torch.int32),
        total_lengths=totals,
        response_lengths=responses,
        loss_masks=[torch.ones(response) for response in responses],
        sample_positions=list(range(len(samples))),
    )


def log_probs(logits: torch.Tensor, batch: MicroBatch) -> list[torch.Tensor]:
    """Of each sample's tokens after the first, ``[total - 1]`` each. Logits of the whole vocabulary."""
    every = logits.log_softmax(-1)
    starts = batch.cu_seqlens.tolist()
    found = []
    for start, total in zip(starts, batch.total_lengths, strict=False):
        targets = batch.tokens[start + 1 : start + total]
        found.append(every[start : start + total - 1].gather(-1, targets[:, None])[:, 0])
    return found


class NextTokenLoss:
    """Mean over ``samples`` (of the step, over all ranks) of the mean negative log-probability of their responses."""

    def __init__(self, samples: int) -> None:
        self.samples = samples

    def __call__(self, logits: torch.Tensor, batch: MicroBatch) -> LossOutput:
        total = logits.new_zeros(())
        for values, response in zip(log_probs(logits, batch), batch.response_lengths, strict=True):
            total = total - values[-response:].mean() / self.samples
        return LossOutput(total, {"loss": total.detach()})


def plain_loss(model: torch.nn.Module, samples: list[list[int]]) -> torch.Tensor:
    """The same by the Hugging Face model, one sample at a time."""
    total = torch.zeros(())
    for sample in samples:
        ids = torch.tensor([sample])
        every = model(ids).logits[0, :-1].float().log_softmax(-1)
        values = every.gather(-1, ids[0, 1:, None])[:, 0]
        total = total - values[-(len(sample) - len(sample) // 2) :].mean() / len(samples)
    return total


def share(samples: list[list[int]], rank: int, size: int) -> list[list[int]]:
    """A rank's part of a step's samples."""
    return samples[rank::size]
