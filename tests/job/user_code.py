"""What a user brings: rewards, filters, generate and rollout functions with the reference's signatures."""

from __future__ import annotations

import json
import time
from pathlib import Path


async def letter_share(args, sample, **kwargs):
    """The share of an answer that is ASCII letters: dense, so that a random model learns it in a few rollouts."""
    return sum(char.isascii() and char.isalpha() for char in sample.response) / max(1, len(sample.response))


def sync_letter_share(args, sample, **kwargs):
    """The same without async."""
    return sum(char.isascii() and char.isalpha() for char in sample.response) / max(1, len(sample.response))


class RewardWasWrong(Exception):
    """A user's own error."""


async def broken_reward(args, sample, **kwargs):
    """Raises an error of the user's."""
    raise RewardWasWrong(f"cannot grade {sample.label!r}")


def blocking_reward(args, sample, **kwargs):
    """Blocks its thread for a while: heartbeats must not care."""
    time.sleep(0.2)
    return 1.0


def log_rollout(rollout_id, args, samples, rollout_extra_metrics, rollout_time):
    """Records a metric of its own beside the default ones."""
    from miles.utils import tracking_utils

    tracking_utils.log(args, {"user/samples": len(samples), "rollout/step": rollout_id}, step_key="rollout/step")
    return False


def log_eval(rollout_id, args, data, extra_metrics):
    """Replaces the default metrics of an evaluation."""
    from miles.utils import tracking_utils

    tracking_utils.log(args, {"eval/mine": sum(len(entry["rewards"]) for entry in data.values())})
    return True


def not_the_first(args, samples, **kwargs):
    """Drops the first group of a run, and no other."""
    return samples[0].group_index != 0


def note_save(args, rollout_id, checkpoint_dir, hf_checkpoint_dir):
    """Called on rank 0, when all is on the disk."""
    complete = Path(checkpoint_dir, "rollout_state").exists() and Path(hf_checkpoint_dir, "config.json").exists()
    with Path(args.save, "saves.jsonl").open("a") as file:
        file.write(json.dumps([rollout_id, checkpoint_dir, hf_checkpoint_dir, complete]) + "\n")


def broken_step(args, rollout_id, step_id, model, optimizer, opt_param_scheduler):
    """Raises an error of the user's in the trainer."""
    raise RewardWasWrong(f"no step {step_id}")
