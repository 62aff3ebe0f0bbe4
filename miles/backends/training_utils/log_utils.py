"""What a rollout's data and an optimizer step come to in numbers, over all ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import psutil
import torch

from miles.backends.base import ParallelState, StepOutcome, TrainBackend
from miles.backends.training_utils.collectives import sum_by_name
from miles.backends.training_utils.data import RankData
from miles.utils.flops import adapter_flops, forward_flops, training_flops
from miles.utils.lora import LoraSettings
from miles_agents.errors import EnvironmentFault

PER_TOKEN = ("log_probs", "ref_log_probs", "rollout_log_probs", "advantages", "returns", "entropy")
PER_SAMPLE = ("raw_reward", "rewards", "truncated")


class NotFinite(EnvironmentFault):
    """Loss or gradients are not finite. The optimizer has not used them."""

    code = "E-TRAIN-006"


def speaks(parallel: ParallelState) -> bool:
    """Among ranks that have the same samples, the one whose numbers count: it has the logits."""
    return parallel.tp_rank == 0 and parallel.cp_rank == 0 and parallel.pp_rank == parallel.pp_size - 1


def rollout_metrics(data: RankData, parallel: ParallelState, device: torch.device) -> dict[str, float]:
    """``rollout/...``: averages over all samples; of what is per token, of each sample's average over trained tokens.

    Collective over all ranks.
    """
    sums: dict[str, float] = {}
    if speaks(parallel):
        sums["count"] = float(len(data))
        sums["response_lengths"] = float(sum(data.response_lengths))
        sums["total_lengths"] = float(sum(data.total_lengths))
        for name in PER_SAMPLE:
            values = data.columns.get(name, [])
            if values and all(isinstance(value, int | float) for value in values):
                sums[name] = float(sum(values))
        for name in PER_TOKEN:
            if name in data.columns:
                sums[name] = sum(map(_masked_mean, data.columns[name], data.loss_masks))
    totals = sum_by_name(sums, device)
    count = max(totals.pop("count", 0.0), 1.0)
    return {f"rollout/{name}": total / count for name, total in totals.items()}


def step_metrics(outcome: StepOutcome, parallel: ParallelState, device: torch.device) -> dict[str, float]:
    """Sums over all ranks of what losses gave, with gradient norm and learning rate. Collective over all ranks."""
    own = {name: float(value) for name, value in outcome.metrics.items()} if speaks(parallel) else {}
    rates = outcome.learning_rates or (outcome.learning_rate,)
    named = {f"lr-pg_{group}": rate for group, rate in enumerate(rates)}
    return sum_by_name(own, device) | {"grad_norm": outcome.grad_norm} | named


def check_finite(args: Any, metrics: dict[str, float], where: str) -> None:
    """Unless ``--no-check-for-nan-in-loss-and-grad``.

    Raises:
        NotFinite: On all ranks alike.
    """
    if not getattr(args, "check_for_nan_in_loss_and_grad", True):
        return
    # With fp16 an overflow is how the loss scale finds its value.
    watched = ["loss"] if getattr(args, "fp16", False) else ["loss", "grad_norm"]
    bad = [name for name in watched if not math.isfinite(metrics.get(name, 0.0))]
    if bad:
        raise NotFinite(
            f"{' and '.join(bad)} not finite at {where}",
            evidence=", ".join(f"{name} {value:g}" for name, value in metrics.items()),
            advice="Lower --lr or look at the samples of this rollout (--save-debug-rollout-data); "
            "--no-check-for-nan-in-loss-and-grad goes on instead.",
        )


def mean_over_steps(steps: list[dict[str, float]]) -> dict[str, float]:
    """``train/...``: of each name the average over the rollout's steps; of the learning rate the last."""
    names = sorted({name for step in steps for name in step})
    means = {f"train/{name}": sum(s.get(name, 0.0) for s in steps) / len(steps) for name in names}
    if steps:
        means |= {f"train/{name}": value for name, value in steps[-1].items() if name.startswith("lr-pg_")}
    return means


def by_step(rollout_id: int, steps: list[dict[str, float]]) -> list[dict[str, float]]:
    """``train/...`` of each step of a rollout, with its number in the run (``train/step``)."""
    first = rollout_id * len(steps)
    return [
        {f"train/{name}": value for name, value in step.items()} | {"train/step": float(first + number)}
        for number, step in enumerate(steps)
    ]


def memory_metrics(device: torch.device) -> dict[str, float]:
    """``perf/cpu_memory_*`` of this rank's machine and process, ``perf/gpu_memory_*`` of its GPU, in GB."""
    machine = psutil.virtual_memory()
    found = {
        "cpu_memory_used_GB": machine.used, "cpu_memory_available_GB": machine.available,
        "cpu_memory_rss_GB": psutil.Process().memory_info().rss,
    }  # fmt: skip
    if device.type == "cuda":
        found |= {
            "gpu_memory_allocated_GB": torch.cuda.memory_allocated(device),
            "gpu_memory_reserved_GB": torch.cuda.memory_reserved(device),
            "gpu_memory_peak_GB": torch.cuda.max_memory_allocated(device),
        }
    return {f"perf/{name}": value / 1e9 for name, value in found.items()}


def params_norm(backend: TrainBackend) -> float:
    """Norm of all weights, as engines get them. Collective over all ranks: each tensor is gathered."""
    return math.sqrt(sum(float(tensor.detach().double().square().sum()) for _, tensor in backend.hf_weights()))


PEAK_TFLOPS = {
    "B200": 2250.0, "H200": 989.0, "H100": 989.0, "H800": 989.0, "H20": 148.0, "A100": 312.0, "A800": 312.0,
    "L40S": 362.0, "L20": 119.5, "RTX 4090": 165.0,
}  # fmt: skip
"""Of devices by a part of their name: dense bfloat16, from the makers' data sheets. Longer names stand first."""


def speed_metrics(
    args: Any, data: RankData, parallel: ParallelState, device: torch.device, seconds: dict[str, float]
) -> dict[str, float]:
    """``perf/...``: tokens per second of the training steps; TFLOP/s per rank of each timer in which samples go through
    a model (``{timer}_tflops``), and of the training steps as a share of the device's peak (``actor_train_mfu``), where
    ``--mfu-peak-tflops`` gives it or the device is known. Collective over all ranks."""
    own: dict[str, float] = {}
    if speaks(parallel):
        own["tokens"] = float(sum(data.total_lengths))
        config = getattr(args, "hf_config", None) or {}
        if {"hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size"} <= config.keys():
            own |= _pass_flops(config, data.total_lengths, LoraSettings.from_args(args))
    totals = sum_by_name(own, device)
    elapsed = max(seconds.get("perf/actor_train_time", 0.0), 1e-9)
    metrics = {"perf/actor_train_tok_per_s": totals["tokens"] / elapsed}
    for timer, flops in totals.items():
        took = seconds.get(f"perf/{timer}_time", 0.0)
        if took > 0:
            metrics[f"perf/{timer}_tflops"] = flops / took / parallel.world_size / 1e12
    peak = peak_tflops(args, device)
    if peak and "perf/actor_train_tflops" in metrics:
        metrics["perf/actor_train_mfu"] = metrics["perf/actor_train_tflops"] / peak
    return metrics


def _pass_flops(config: Any, lengths: Sequence[int], lora: LoraSettings | None) -> dict[str, float]:
    """Of the timers in which all samples go through a model. The reference has no adapters."""
    below = sum(forward_flops(config, length) for length in lengths)
    added = adapter_flops(config, lora) * sum(lengths) if lora is not None else 0.0
    training = sum(training_flops(config, length, lora) for length in lengths)
    return {"log_probs": below + added, "ref_log_probs": below, "actor_train": training}


def peak_tflops(args: Any, device: torch.device) -> float | None:
    """``--mfu-peak-tflops``, or that of the GPU if it is one of ``PEAK_TFLOPS``."""
    typed = getattr(args, "mfu_peak_tflops", None)
    if typed:
        return float(typed)
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)


def _masked_mean(values: torch.Tensor, mask: torch.Tensor) -> float:
    trained = mask > 0
    return float(values[trained].mean()) if bool(trained.any()) else 0.0
