"""What a user brings: rewards, filters, generate and rollout functions with the reference's signatures."""

from __future__ import annotations

import time


async def digit_share(args, sample, **kwargs):
    """The share of an answer's bytes that are digits: dense, so that a random model learns it in a few rollouts."""
    text = sample.response.encode()
    return sum(48 <= byte <= 57 for byte in text) / max(1, len(text))


def sync_digit_share(args, sample, **kwargs):
    """The same without async."""
    text = sample.response.encode()
    return sum(48 <= byte <= 57 for byte in text) / max(1, len(text))


class RewardWasWrong(Exception):
    """A user's own error."""


async def broken_reward(args, sample, **kwargs):
    """Raises an error of the user's."""
    raise RewardWasWrong(f"cannot grade {sample.label!r}")


def blocking_reward(args, sample, **kwargs):
    """Blocks its thread for a while: heartbeats must not care."""
    time.sleep(0.2)
    return 1.0


def only_varied(args, samples, **kwargs):
    """Keeps groups whose rewards differ; the first group of each run is always dropped."""
    if samples[0].group_index == 0:
        return False
    return len({sample.get_reward_value(args) for sample in samples}) > 1
