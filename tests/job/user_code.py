"""What a user brings: rewards, filters, generate and rollout functions with the reference's signatures."""

from __future__ import annotations

import time


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


def not_the_first(args, samples, **kwargs):
    """Drops the first group of a run, and no other."""
    return samples[0].group_index != 0
