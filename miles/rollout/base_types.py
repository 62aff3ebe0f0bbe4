"""What goes into rollout and generate functions, and what comes out. User code imports these."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from miles.utils.types import Sample

if TYPE_CHECKING:
    from miles.rollout.data_source import DataSource

Group: TypeAlias = list[Any]
"""Samples of one prompt; an entry may be a list, if one execution made several samples."""


@dataclass(frozen=True)
class RolloutFnConstructorInput:
    """What a rollout class is made with."""

    args: Namespace
    data_source: DataSource


@dataclass(frozen=True)
class RolloutFnBaseInput:
    """Of one call."""

    rollout_id: int

    @property
    def evaluation(self) -> bool:
        """Whether samples are wanted for evaluation."""
        raise NotImplementedError


@dataclass(frozen=True)
class RolloutFnTrainInput(RolloutFnBaseInput):
    """Samples for training are wanted.

    Attributes:
        weight_version: That of the engines.
        oldest_version: With ``--keep-old-actor``: answers of earlier weights cannot be trained on.
    """

    weight_version: int | None = None
    oldest_version: int | None = None

    @property
    def evaluation(self) -> bool:
        """False."""
        return False


@dataclass(frozen=True)
class RolloutFnEvalInput(RolloutFnBaseInput):
    """An evaluation is wanted."""

    generate_state: Any = None
    weight_version: int | None = None
    hf_dir: str | None = None

    @property
    def evaluation(self) -> bool:
        """True."""
        return True


RolloutFnInput: TypeAlias = RolloutFnTrainInput | RolloutFnEvalInput


@dataclass
class RolloutFnTrainOutput:
    """Samples by prompt group, and metrics to log."""

    samples: list[Group]
    metrics: dict[str, Any] | None = None


@dataclass
class RolloutFnEvalOutput:
    """By dataset: ``{"rewards": [...], "truncated": [...], "samples": [...]}``; and metrics to log."""

    data: dict[str, dict[str, Any]]
    metrics: dict[str, Any] | None = None


RolloutFnOutput: TypeAlias = RolloutFnTrainOutput | RolloutFnEvalOutput


@dataclass(frozen=True)
class GenerateFnInput:
    """What a generate function gets: a sample to complete, and how."""

    state: Any
    sample: Sample
    sampling_params: dict[str, Any]
    evaluation: bool = False

    @property
    def args(self) -> Namespace:
        """The run's arguments."""
        found: Namespace = self.state.args
        return found


@dataclass
class GenerateFnOutput:
    """The completed sample, or the several that one execution made."""

    samples: Sample | list[Sample] = field(default_factory=list)


def as_output(result: Any, *, evaluation: bool) -> RolloutFnOutput:
    """A rollout function's result in its full form: a bare list or dict is wrapped."""
    if evaluation:
        return result if isinstance(result, RolloutFnEvalOutput) else RolloutFnEvalOutput(data=result)
    return result if isinstance(result, RolloutFnTrainOutput) else RolloutFnTrainOutput(samples=result)


def call_rollout_fn(fn: Callable[..., Any], *args: Any, evaluation: bool, **kwargs: Any) -> RolloutFnOutput:
    """Call a rollout function of the ``fn(args, rollout_id, data_source, evaluation=...)`` kind."""
    return as_output(fn(*args, **kwargs, evaluation=evaluation), evaluation=evaluation)


RolloutFn: TypeAlias = Callable[[RolloutFnInput], RolloutFnOutput | Awaitable[RolloutFnOutput]]
