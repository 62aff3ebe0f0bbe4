"""Rewards: ``async_rm`` for a sample, ``batched_async_rm`` for several; ``--rm-type``, ``--custom-rm-path`` choose.

docs/rewards.md says what each of them reads, compares and returns.
"""

from __future__ import annotations

import asyncio
import difflib
import hashlib
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from miles.rollout.hooks import Hook, load_hook
from miles.rollout.rm_hub.deepscaler import deepscaler_reward, gemma_math_reward
from miles.rollout.rm_hub.f1 import f1_score
from miles.rollout.rm_hub.gpqa import compute_gpqa_reward
from miles.rollout.rm_hub.math_dapo_utils import compute_score
from miles.rollout.rm_hub.math_utils import extract_answer, math_reward
from miles.rollout.rm_hub.remote import ask, budget_of, remote_rm
from miles.utils.types import Sample
from miles_agents.errors import ConfigError

__all__ = ["BadLabel", "NoReward", "async_rm", "batched_async_rm", "deterministic_random", "remote_rm"]


class NoReward(ConfigError, NotImplementedError):
    """No reward is chosen, or one that there is not."""

    code = "E-ROLL-009"


class BadLabel(ConfigError, ValueError):
    """A row of the data has a label that its reward cannot use."""

    code = "E-ROLL-020"


async def async_rm(args: Any, sample: Sample, **kwargs: Any) -> Any:
    """The reward of a sample: a number, or a dict of them.

    A custom function comes first: that of the sample's ``reward_spec``, or ``--custom-rm-path``. Else the type is that
    of ``reward_spec``, or of ``metadata["rm_type"]``, or ``--rm-type``. With ``boxed_`` before a type, the response is
    what its last box holds.

    Raises:
        NoReward: None is chosen, or one that there is not.
        BadLabel: The label cannot be compared with.
        CannotCheck: Of ``ifbench``.
        NoRemoteReward, RequestRefused: Of ``remote_rm``.
        NoGrader: Processes cannot be started.
        HookFailed: The user's function raised.
    """
    spec = sample.reward_spec
    path = (spec.custom_rm_path if spec else None) or args.custom_rm_path
    if path:
        return await _custom(path)(args, sample, **kwargs)
    kind, origin = _kind_of(args, sample)
    response = sample.response
    reward = kind.removeprefix("boxed_")
    if reward != kind:
        response = extract_answer(response) or ""
    if reward not in REWARDS:
        raise _no_such(kind, origin, sample)
    try:
        return await REWARDS[reward](args, sample, response)
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise _bad_label(kind, origin, sample, error) from error


def _kind_of(args: Any, sample: Sample) -> tuple[str, str]:
    """The type of a sample's reward, and who says so."""
    metadata = sample.metadata if isinstance(sample.metadata, dict) else {}
    found = (
        (sample.reward_spec.rm_type if sample.reward_spec else None, "Sample.reward_spec.rm_type"),
        (metadata.get("rm_type"), 'metadata["rm_type"]'),
        (args.rm_type, "--rm-type"),
    )
    kind, origin = next(((kind, origin) for kind, origin in found if kind), ("", "--rm-type"))
    return str(kind).strip(), origin


async def _math(args: Any, sample: Sample, response: str) -> int:
    return await math_reward(response, sample.label)


async def _deepscaler(args: Any, sample: Sample, response: str) -> int:
    return await deepscaler_reward(response, sample.label)


async def _gemma_math(args: Any, sample: Sample, response: str) -> int:
    return await gemma_math_reward(response, sample.label)


async def _dapo(args: Any, sample: Sample, response: str) -> dict[str, Any]:
    return compute_score(response, sample.label)


async def _f1(args: Any, sample: Sample, response: str) -> float:
    return f1_score(response, sample.label)[0]


async def _gpqa(args: Any, sample: Sample, response: str) -> float:
    return compute_gpqa_reward(response, sample.label, sample.metadata)


async def _ifbench(args: Any, sample: Sample, response: str) -> float:
    from miles.rollout.rm_hub.ifbench import ifbench_reward

    return await ifbench_reward(response, sample.metadata)


async def _remote(args: Any, sample: Sample, response: str) -> Any:
    return await ask(args.rm_url, sample, response, budget_of(args))


async def _random(args: Any, sample: Sample, response: str) -> int:
    return random.randint(0, 1)  # noqa: S311


async def _deterministic_random(args: Any, sample: Sample, response: str) -> int:
    return deterministic_random(sample, response)


REWARDS: dict[str, Callable[[Any, Sample, str], Awaitable[Any]]] = {
    "math": _math,
    "deepscaler": _deepscaler,
    "gemma_math": _gemma_math,
    "dapo": _dapo,
    "f1": _f1,
    "gpqa": _gpqa,
    "ifbench": _ifbench,
    "remote_rm": _remote,
    "random": _random,
    "deterministic_random": _deterministic_random,
}
"""By ``--rm-type``: what is called with args, sample, and the response or what its last box holds. The same names as in
``miles.flags.group_reward``, where flags are checked."""


def _no_such(kind: str, origin: str, sample: Sample) -> NoReward:
    near = difflib.get_close_matches(kind.removeprefix("boxed_"), REWARDS, 1, 0.5)
    where = "" if origin == "--rm-type" else f" of {_which(sample)}"
    return NoReward(
        f"{origin} {kind!r}{where} is no reward" if kind else "no reward is chosen",
        evidence=f"there are: {', '.join(REWARDS)}; also with boxed_ before it"
        + ("" if kind else "; neither --rm-type nor --custom-rm-path is given, nor an rm_type in the row's metadata"),
        advice=f"Did you mean {near[0]}? Or give --custom-rm-path a function of your own."
        if near
        else "Choose one of them, or give --custom-rm-path a function of your own.",
        flag="--rm-type",
    )


def _bad_label(kind: str, origin: str, sample: Sample, error: ValueError) -> BadLabel:
    chosen = f"--rm-type {kind}" if origin == "--rm-type" else f"{kind} ({origin})"
    return BadLabel(
        f"the label of {_which(sample)} cannot be used by {chosen}: {error}",
        evidence=f"the label is {_shown(sample.label)}; the prompt begins {_shown(sample.prompt)}",
        advice="Correct this row of the data, give --label-key the right column, or choose another reward.",
        flag="--label-key",
    )


def _which(sample: Sample) -> str:
    return f"sample {sample.index} of prompt group {sample.group_index}"


def _shown(value: Any) -> str:
    return f"{str(value)[:200]!r}" if isinstance(value, str) else f"a {type(value).__name__}: {str(value)[:200]}"


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
        return await _each(args, samples, kwargs)
    hook = _custom(args.custom_rm_path)
    rewards = await hook(args, samples, **kwargs)
    if not hasattr(rewards, "__len__") or isinstance(rewards, dict) or len(rewards) != len(samples):
        raise hook.bad_result(rewards, f"a list of {len(samples)} rewards, one for each sample that it was given")
    return list(rewards)


async def _each(args: Any, samples: Sequence[Sample], kwargs: dict[str, Any]) -> list[Any]:
    """One after the other would wait for each grader and server; the first error ends all of them."""
    tasks = [asyncio.ensure_future(async_rm(args, sample, **kwargs)) for sample in samples]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()


def _custom(path: str) -> Hook:
    hook = load_hook(path, "--custom-rm-path")
    assert hook is not None
    return hook


def deterministic_random(sample: Sample, response: str) -> int:
    """0 or 1, by a hash of tokens and response."""
    text = str(sample.tokens) + response
    return hashlib.sha256(text.encode(errors="surrogatepass")).digest()[0] % 2
