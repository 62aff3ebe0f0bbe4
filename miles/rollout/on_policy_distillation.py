"""On-policy distillation: an SGLang server says how likely the tokens of a response are to the teacher.

Consumes samples whose response is complete; produces their ``teacher_log_probs``, one number per response token, which
travel to the trainer. Waits for the server, within the budget of ``--rm-max-retries`` and ``--rm-timeout``.

The teacher has the student's vocabulary: it is asked for token ids, not for text.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from typing import Any

from miles.rollout.rm_hub.remote import budget_of
from miles.utils.http_utils import http_client
from miles.utils.teachers import read_teachers
from miles.utils.types import Sample, SampleStatus
from miles_agents.errors import ConfigError, PeerFault


class NoTeacher(ConfigError):
    """It cannot be told which teacher a sample has, or where it is."""

    code = "E-ROLL-021"


class BadTeacher(PeerFault):
    """A teacher's server answers with something else than the log-probs of the tokens that it was sent."""

    code = "E-ROLL-022"


async def reward_func(args: Any, sample: Any, **kwargs: Any) -> Any:
    """For ``--custom-rm-path``, where nothing but the teacher judges: it is asked, and the reward is 0.

    Without ``--rm-type`` and ``--custom-rm-path`` this is what ``--use-opd`` takes. Of several samples
    (``--group-rm``) a list of zeros.

    Raises:
        NoTeacher, BadTeacher. RequestFailed, RequestRefused: The server does not answer, or says no.
    """
    if isinstance(sample, list):
        await ask_teacher(args, sample)
        return [0.0] * len(sample)
    await ask_teacher(args, [sample])
    return 0.0


def post_process_rewards(args: Any, samples: Sequence[Sample]) -> tuple[list[float], list[float]]:
    """For ``--custom-reward-post-process-path``: rewards are shown as they are, and none is trained on."""
    return [float(sample.get_reward_value(args) or 0.0) for sample in samples], [0.0] * len(samples)


async def ask_teacher(args: Any, samples: Sequence[Sample]) -> None:
    """Fill ``teacher_log_probs`` of complete samples that have none, where the teacher is a server of the flags'."""
    if not args.use_opd or args.opd_type != "sglang":
        return
    teachers = _teachers(args)
    need = [s for s in samples if s.teacher_log_probs is None and s.opd_reverse_kl is None]
    need = [s for s in need if s.status is not SampleStatus.ABORTED]
    if not teachers or not need:
        return
    tasks = [asyncio.ensure_future(_ask(args, url, s)) for url, s in [(_choose(args, teachers, s), s) for s in need]]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def _teachers(args: Any) -> dict[str, str]:
    """None where user code has to fill the numbers in: flags are checked before."""
    is_reward = (args.rm_type or "").removeprefix("boxed_") == "remote_rm"
    try:
        return read_teachers(args.opd_teacher_urls, None if is_reward else args.rm_url)
    except ValueError as error:
        raise NoTeacher(
            "the teacher's address cannot be used", evidence=str(error), advice="Correct --opd-teacher-urls."
        ) from error


def _choose(args: Any, teachers: dict[str, str], sample: Sample) -> str:
    """The address of the teacher that the sample's metadata names; of a single one it need not."""
    metadata = sample.metadata if isinstance(sample.metadata, dict) else {}
    name = metadata.get(args.opd_teacher_key)
    if not args.opd_teacher_urls or (name is None and len(teachers) == 1):
        return next(iter(teachers.values()))
    if name not in teachers:
        raise NoTeacher(
            f"sample {sample.index} of prompt group {sample.group_index} "
            + (f"has a teacher that there is not: {name!r}" if name is not None else "names no teacher"),
            evidence=f"metadata[{args.opd_teacher_key!r}] is {name!r}; there are: {', '.join(teachers)}",
            advice="Name one of --opd-teacher-urls in each row's metadata, or give --opd-teacher-key the right key.",
        )
    return teachers[name]


async def _ask(args: Any, url: str, sample: Sample) -> None:
    if sample.response_length == 0:
        sample.teacher_log_probs = []
        return
    budget = budget_of(args)
    # The position before the response, too: of the first one that is asked for, servers tell no log-prob.
    start = max(0, len(sample.tokens) - sample.response_length - 1)
    payload = {
        "input_ids": sample.tokens,
        "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
        "return_logprob": True,
        "logprob_start_len": start,
    }
    answer = await http_client().request(
        "POST", f"{url}/generate", payload, max_retries=budget.retries, deadline_s=budget.total_s
    )
    sample.teacher_log_probs = read_log_probs(answer, sample, url)


def read_log_probs(answer: Any, sample: Sample, url: str) -> list[float]:
    """The log-prob of each response token in an answer of SGLang: ``meta_info.input_token_logprobs``.

    Raises:
        BadTeacher: There are none, or those of other tokens.
    """
    wanted = sample.tokens[len(sample.tokens) - sample.response_length :]
    try:
        rows = answer["meta_info"]["input_token_logprobs"][-len(wanted) :]
        found = [(float(row[0]), int(row[1])) for row in rows]
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise _bad(url, f"{type(error).__name__}: {error}; it answered {str(answer)[:300]!r}") from error
    if [token for _, token in found] != wanted:
        raise _bad(url, f"sample {sample.index} has {len(wanted)} response tokens; log-probs of others came back")
    if not all(math.isfinite(value) for value, _ in found):
        raise _bad(url, f"a log-prob of sample {sample.index} is not finite")
    return [value for value, _ in found]


def _bad(url: str, evidence: str) -> BadTeacher:
    return BadTeacher(
        f"{url} does not tell the log-probs of the tokens that it was sent",
        evidence=evidence,
        advice="Serve the teacher with SGLang, and a model of the student's vocabulary.",
        url=url,
    )
