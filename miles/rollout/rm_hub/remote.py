"""The ``remote_rm`` reward: a server of the user's says it.

Consumes samples; produces what the server answers. Waits for the server, within a budget of attempts and seconds.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from dataclasses import dataclass
from typing import Any

from miles.utils.http_utils import RequestFailed, http_client
from miles.utils.types import Sample
from miles_agents.errors import PeerFault

logger = logging.getLogger(__name__)


class NoRemoteReward(PeerFault):
    """A reward server gives no reward, also when it is asked again."""

    code = "E-ROLL-019"


@dataclass(frozen=True)
class Budget:
    """What a reward may cost.

    Attributes:
        retries: How often a request is repeated, at most.
        total_s: Seconds for all attempts, and the waiting between them.
        attempt_s: Seconds for one attempt: a server that hangs is asked again.
        first_wait_s: Seconds before the first repetition; each later one waits twice as long as the one before.
        most_wait_s: Up to this.
    """

    retries: int = 8
    total_s: float = 900.0
    attempt_s: float = 300.0
    first_wait_s: float = 0.5
    most_wait_s: float = 30.0


def budget_of(args: Any) -> Budget:
    """The budget that the flags give: an attempt may take a third of the whole time."""
    default = Budget()
    total_s = float(getattr(args, "rm_timeout", None) or default.total_s)
    retries = getattr(args, "rm_max_retries", None)
    return Budget(default.retries if retries is None else int(retries), total_s, total_s / 3)


async def remote_rm(args: Any, sample: Sample, **kwargs: Any) -> Any:
    """What ``--rm-url`` answers to ``{"prompt", "response", "label"}``, parsed as JSON.

    What may pass (no connection, no answer in time, HTTP 408, 425, 429, 500, 502 to 504) is tried again.

    Raises:
        NoRemoteReward: The budget is used up, or the answer is not JSON. RequestRefused: any other HTTP status.
    """
    return await ask(args.rm_url, sample, sample.response, budget_of(args))


async def ask(url: str, sample: Sample, response: str, budget: Budget) -> Any:
    """``remote_rm`` for this response."""
    payload = {"prompt": sample.prompt, "response": response, "label": sample.label}
    began = time.monotonic()
    for attempt in range(budget.retries + 1):
        left_s = began + budget.total_s - time.monotonic()
        try:
            answer = await http_client().request(
                "POST", url, payload, max_retries=0, deadline_s=max(0.001, min(budget.attempt_s, left_s))
            )
            return _checked(url, answer)
        except RequestFailed as error:
            wait_s = min(budget.most_wait_s, budget.first_wait_s * 2**attempt) * random.uniform(0.75, 1.25)  # noqa: S311
            spent_s = time.monotonic() - began
            if attempt == budget.retries or spent_s + wait_s >= budget.total_s:
                raise _gave_up(url, budget, attempt + 1, spent_s, error) from error
            if attempt == 0:
                logger.warning("%s gives no reward: %s; trying again", url, _last(error))
        await asyncio.sleep(wait_s)
    raise AssertionError("unreachable")


def _checked(url: str, answer: Any) -> Any:
    """Any JSON is an answer; text that is none would be no reward."""
    if not isinstance(answer, str):
        return answer
    try:
        float(answer)
    except ValueError:
        raise NoRemoteReward(
            f"{url} answered with something that is not JSON",
            evidence=f"it answered {answer[:500]!r}",
            advice="Let the server answer with a number, or an object (and give --reward-key), as JSON.",
            url=url,
        ) from None
    return answer


def _gave_up(url: str, budget: Budget, attempts: int, spent_s: float, error: RequestFailed) -> NoRemoteReward:
    return NoRemoteReward(
        f"{url} gives no reward",
        evidence=f"{attempts} attempt{'s' if attempts > 1 else ''} in {spent_s:.1f} s "
        f"(at most {budget.retries + 1}, and {budget.total_s:.0f} s); the last: {_last(error)}",
        advice="Look at the server's log. --rm-max-retries and --rm-timeout give it more chances.",
        url=url,
    )


def _last(error: RequestFailed) -> str:
    return error.evidence.partition("the last: ")[2] or error.evidence
