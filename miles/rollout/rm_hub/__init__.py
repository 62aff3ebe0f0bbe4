"""Rewards: ``async_rm`` for a sample, ``batched_async_rm`` for several; ``--rm-type``, ``--custom-rm-path`` choose."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import Sequence
from typing import Any

from miles.rollout.hooks import Hook, load_hook
from miles.rollout.rm_hub.math_text import last_boxed
from miles.rollout.rm_hub.math_utils import math_reward
from miles.utils.http_utils import http_client
from miles.utils.types import Sample
from miles_agents.errors import ConfigError

BUILT = ("math", "random", "deterministic_random", "remote_rm")
NOT_BUILT = ("dapo", "deepscaler", "gemma_math", "f1", "gpqa", "ifbench")
REMOTE_RETRIES = 10
REMOTE_DEADLINE_S = 600.0


class NoReward(ConfigError):
    """No reward is chosen, or one that there is not."""

    code = "E-ROLL-009"


async def async_rm(args: Any, sample: Sample, **kwargs: Any) -> Any:
    """The reward of a sample: a number, or a dict of them.

    The sample's ``reward_spec`` comes first, then ``--custom-rm-path``, ``metadata["rm_type"]`` and ``--rm-type``.

    Raises:
        NoReward: None is chosen, or one that is not built.
        HookFailed: The user's function raised.
    """
    spec = sample.reward_spec
    path = (spec.custom_rm_path if spec else None) or args.custom_rm_path
    if path:
        return await _custom(path)(args, sample, **kwargs)
    kind = ((spec.rm_type if spec else None) or sample.metadata.get("rm_type") or args.rm_type or "").strip()
    response = sample.response
    if kind.startswith("boxed_"):
        response, kind = last_boxed(response) or "", kind.removeprefix("boxed_")
    return await _built_in(args, kind, sample, response)


async def _built_in(args: Any, kind: str, sample: Sample, response: str) -> Any:
    if kind == "math":
        return await math_reward(response, sample.label)
    if kind == "random":
        return random.randint(0, 1)  # noqa: S311
    if kind == "deterministic_random":
        return deterministic_random(sample, response)
    if kind == "remote_rm":
        return await remote_rm(args, sample)
    raise NoReward(
        f"--rm-type {kind} is not built yet" if kind in NOT_BUILT else f"--rm-type {kind!r} is no reward",
        evidence=f"built are: {', '.join(BUILT)}"
        + ("" if kind else "; neither --rm-type nor --custom-rm-path is given"),
        advice="Choose one of them, or give --custom-rm-path a function of your own.",
        flag="--rm-type",
    )


async def batched_async_rm(
    args: Any, samples: Sequence[Sample], inplace_set_reward_field: bool = False, **kwargs: Any
) -> list[Any] | None:
    """The rewards of several samples; a custom function gets all of them at once.

    With ``inplace_set_reward_field`` they are put into the samples, which must have none, and None is returned.
    """
    rewards = await _rewards(args, samples, kwargs)
    if not inplace_set_reward_field:
        return rewards
    for sample, reward in zip(samples, rewards, strict=True):
        if sample.reward is not None:
            raise ValueError(f"sample {sample.index} has a reward already")
        sample.reward = reward
    return None


async def _rewards(args: Any, samples: Sequence[Sample], kwargs: dict[str, Any]) -> list[Any]:
    if not args.custom_rm_path:
        return list(await asyncio.gather(*(async_rm(args, sample, **kwargs) for sample in samples)))
    hook = _custom(args.custom_rm_path)
    rewards = await hook(args, samples, **kwargs)
    if not hasattr(rewards, "__len__") or isinstance(rewards, dict) or len(rewards) != len(samples):
        raise hook.bad_result(rewards, f"a list of {len(samples)} rewards, one for each sample that it was given")
    return list(rewards)


def _custom(path: str) -> Hook:
    hook = load_hook(path, "--custom-rm-path")
    assert hook is not None
    return hook


async def remote_rm(args: Any, sample: Sample, **kwargs: Any) -> Any:
    """What ``--rm-url`` answers to ``{"prompt", "response", "label"}``; passing troubles are retried.

    Raises:
        RequestFailed, RequestRefused.
    """
    payload = {"prompt": sample.prompt, "response": sample.response, "label": sample.label}
    return await http_client().request(
        "POST", args.rm_url, payload, max_retries=REMOTE_RETRIES, deadline_s=REMOTE_DEADLINE_S
    )


def deterministic_random(sample: Sample, response: str) -> int:
    """0 or 1, by a hash of tokens and response."""
    return hashlib.sha256((str(sample.tokens) + response).encode()).digest()[0] % 2
