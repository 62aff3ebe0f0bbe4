"""The four-knob equation: prompts x responses = samples per step x steps. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BatchSizes:
    """All four, related by the equation of ``solve``."""

    rollout_batch_size: int
    n_samples_per_prompt: int
    global_batch_size: int
    num_steps_per_rollout: int


def solve(
    rollout_batch_size: int | None,
    n_samples_per_prompt: int | None,
    global_batch_size: int | None,
    num_steps_per_rollout: int | None,
    *,
    rounds_up: bool = False,
) -> BatchSizes | str:
    """``rollout_batch_size * n_samples_per_prompt = global_batch_size * num_steps_per_rollout``.

    None is what was not given. Responses and steps are 1 unless given or needed to be something else; the batch sizes
    have no default, so one of them must be given. What was given is never changed.

    Args:
        rounds_up: What does not fill a step is a smaller last step.

    Returns:
        The sizes, or why there are none.
    """
    prompts, responses, samples, steps = (
        rollout_batch_size,
        n_samples_per_prompt,
        global_batch_size,
        num_steps_per_rollout,
    )
    if prompts is None and samples is None:
        return "neither the prompts per rollout nor the samples per step are given"
    if prompts is None:
        return _divided(responses or 1, (samples or 1) * (steps or 1), "prompts", responses, samples, steps)
    if samples is None:
        return _divided(steps or 1, prompts * (responses or 1), "samples", prompts, responses, steps)
    if steps is None:
        left = prompts * (responses or 1)
        if rounds_up:
            return BatchSizes(prompts, responses or 1, samples, -(-left // samples))
        if left % samples:
            return f"{left} samples of a rollout are no multiple of the {samples} of a step"
        return BatchSizes(prompts, responses or 1, samples, left // samples)
    right = samples * steps
    if responses is None:
        if right % prompts:
            return f"{right} samples of all steps are no multiple of the {prompts} prompts"
        return BatchSizes(prompts, right // prompts, samples, steps)
    if rounds_up and -(-prompts * responses // samples) == steps:
        return BatchSizes(prompts, responses, samples, steps)
    if prompts * responses != right:
        return (
            f"{prompts} prompts x {responses} responses = {prompts * responses} samples, but "
            f"{samples} samples x {steps} steps = {right}"
        )
    return BatchSizes(prompts, responses, samples, steps)


def _divided(divisor: int, total: int, unknown: str, *given: int | None) -> BatchSizes | str:
    if total % divisor:
        return f"{total} samples cannot be divided by {divisor}"
    one, two, three = given
    if unknown == "prompts":
        return BatchSizes(total // divisor, one or 1, two or 1, three or 1)
    return BatchSizes(one or 1, two or 1, total // divisor, three or 1)
