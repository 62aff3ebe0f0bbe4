"""Colocated runs on one GPU of what no other stage has: experts, and a trainer that sleeps on the disk."""

from __future__ import annotations

from gpu_bench import rehearsal
from gpu_bench.results import Results
from gpu_bench.training import flags
from gpu_bench.two_gpus import checked_run

_FEW = ("--colocate", "--rollout-num-gpus", "1", "--check-weight-update-equal")


def _tokens() -> tuple[str, ...]:
    return ("--rollout-max-response-len", str(min(128, rehearsal.sizes()[2])))


def moe(results: Results) -> None:
    """GRPO of a small random model with experts: engines hold the trainer's weights, expert by expert."""
    run_dir = results.out / "run-moe"
    arguments = flags(results.out, "megatron", run_dir, *_FEW, "--num-rollout", "2", *_tokens(), shape="moe")
    checked_run(results, "moe", arguments, rollouts=2)


def disk(results: Results) -> None:
    """``--offload-train-target disk``: what sleeps is written to files and read again, and nothing is lost."""
    run_dir = results.out / "run-disk"
    arguments = flags(
        results.out, "megatron", run_dir, *_FEW, "--num-rollout", "2", *_tokens(), "--offload-train-target", "disk",
        "--offload-train-disk-dir", str(results.out / "asleep"), shape="layers8",
    )  # fmt: skip
    checked_run(results, "disk", arguments, rollouts=2)
    left = sorted(path.name for path in (results.out / "asleep").rglob("*") if path.is_file())
    results.add("files that are left of what slept", len(left), note=", ".join(left)[:200])
