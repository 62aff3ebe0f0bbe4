"""What a user brings: rewards, filters, generate and rollout functions with the reference's signatures."""

from __future__ import annotations

import asyncio
import json
import os
import time
from pathlib import Path


async def letter_share(args, sample, **kwargs):
    """The share of an answer that is ASCII letters: dense, so that a random model learns it in a few rollouts."""
    return sum(char.isascii() and char.isalpha() for char in sample.response) / max(1, len(sample.response))


def sync_letter_share(args, sample, **kwargs):
    """The same without async."""
    return sum(char.isascii() and char.isalpha() for char in sample.response) / max(1, len(sample.response))


OVERLAP_S = 300.0


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


def _overlap(args):
    """``OVERLAP=held from,answers``, and the files by which trainer and rollouts tell each other how far they are."""
    held_from, answers = map(int, os.environ["OVERLAP"].split(","))
    return held_from, answers, Path(args.run_dir, "training"), Path(args.run_dir, "answers")


async def generate_while_training(input):  # noqa: A002 - the name tells the form
    """Answers of later samples are asked for when the first rollout is trained on, and not before. Counts answers."""
    from miles.rollout.generate_hub import single_turn

    held_from, _, training, answers = _overlap(input.args)
    deadline = time.monotonic() + OVERLAP_S
    while input.sample.index >= held_from and not training.exists():
        if time.monotonic() > deadline:
            raise RewardWasWrong("the first rollout is not trained on")
        await asyncio.sleep(0.05)
    made = await single_turn.generate(input)
    with answers.open("ab") as file:
        file.write(b".")
    return made


def train_while_generating(args, rollout_id, step_id, model, optimizer, opt_param_scheduler):
    """The first rollout is trained on for as long as so many answers in all are not there."""
    _, count, training, answers = _overlap(args)
    training.touch()
    deadline = time.monotonic() + OVERLAP_S
    while rollout_id == 0 and answers.stat().st_size < count:
        if time.monotonic() > deadline:
            raise RewardWasWrong(f"engines made {answers.stat().st_size} of {count} answers")
        time.sleep(0.05)
