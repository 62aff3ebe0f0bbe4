"""Both generations of user functions behind one form each.

Rollout functions: a class made with ``RolloutFnConstructorInput`` and called with an input, or a function
``fn(args, rollout_id, data_source, evaluation=False)``. Generate functions: ``fn(input)`` (or a class with such a
``__call__``), or ``fn(args, sample, sampling_params[, evaluation])``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from miles.rollout.base_types import (
    GenerateFnInput,
    GenerateFnOutput,
    RolloutFnConstructorInput,
    RolloutFnInput,
    RolloutFnOutput,
    as_output,
)
from miles.rollout.hooks import Hook
from miles.utils.misc import CannotLoad, load_function
from miles.utils.types import Sample


class LegacyRolloutFnAdapter:
    """``fn(args, rollout_id, data_source, evaluation=False)`` in the form of a rollout class's object."""

    def __init__(self, input: RolloutFnConstructorInput, fn: Callable[..., Any]) -> None:  # noqa: A002
        self.args = input.args
        self.data_source = input.data_source
        self.fn = fn

    def __call__(self, input: RolloutFnInput) -> Any:  # noqa: A002
        """Call it; the result may have to be awaited."""
        return self.fn(self.args, input.rollout_id, self.data_source, evaluation=input.evaluation)


def load_rollout_function(
    input: RolloutFnConstructorInput,  # noqa: A002
    path: str,
    flag: str = "--rollout-function-path",
) -> Hook:
    """The rollout function of a path, in its call form ``fn(input)``.

    Raises:
        CannotLoad, ImportFailed: There is none. HookFailed: its constructor raised.
    """
    found: Any = load_function(path, flag=flag)
    if not inspect.isclass(found):
        return Hook(flag, path, LegacyRolloutFnAdapter(input, found), origin=found, may_block=True)
    made = Hook(flag, path, found).call(input)
    if not callable(made):
        raise CannotLoad(
            f"{flag} {path} is a class whose objects cannot be called",
            evidence=f"{found.__qualname__} has no __call__",
            advice="Give it __call__(self, input), async or not.",
            flag=flag,
        )
    return Hook(flag, path, made, may_block=True)


async def call_rollout_function(fn: Callable[..., Any], input: RolloutFnInput) -> RolloutFnOutput:  # noqa: A002
    """Call a rollout function of the form ``fn(input)``, sync or async."""
    result = fn(input)
    return as_output(await result if inspect.isawaitable(result) else result, evaluation=input.evaluation)


class LegacyGenerateFnAdapter:
    """``fn(args, sample, sampling_params[, evaluation])`` in the form ``fn(input)``."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.fn = fn
        self._takes_evaluation = "evaluation" in inspect.signature(fn).parameters

    def __call__(self, input: GenerateFnInput) -> Any:  # noqa: A002
        """Call it; the result may have to be awaited."""
        more = {"evaluation": input.evaluation} if self._takes_evaluation else {}
        return self.fn(input.args, input.sample, input.sampling_params, **more)


def as_generate_output(result: Any) -> GenerateFnOutput:
    """A generate function's result in its full form."""
    return result if isinstance(result, GenerateFnOutput) else GenerateFnOutput(samples=result)


def load_generate_function(path: str, flag: str = "--custom-generate-function-path") -> Hook:
    """The generate function of a path, in its call form ``fn(input)``.

    Raises:
        CannotLoad, ImportFailed, HookFailed.
    """
    found: Any = load_function(path, flag=flag)
    if inspect.isclass(found):
        found = Hook(flag, path, found).call()
    return Hook(flag, path, LegacyGenerateFnAdapter(found) if _is_legacy(found) else found, origin=found)


def _is_legacy(function: Any) -> bool:
    names = list(inspect.signature(function).parameters)
    return len(names) >= 3 and names[0] != "input"


def check_generate_output(hook: Hook, result: Any) -> Sample | list[Sample]:
    """The samples of a generate function's result.

    Raises:
        BadHookResult: It is neither a sample nor a list of them.
    """
    samples = as_generate_output(result).samples
    if isinstance(samples, Sample) or (
        isinstance(samples, list) and samples and all(isinstance(s, Sample) for s in samples)
    ):
        return samples
    raise hook.bad_result(samples, "a Sample, a list of them, or GenerateFnOutput(samples=...)")
