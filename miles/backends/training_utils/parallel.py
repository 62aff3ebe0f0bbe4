"""This rank's place, for user code: ``get_parallel_state().tp.group``, ``.cp.size``, ``.dp_rank`` and so on."""

from __future__ import annotations

from miles.backends.base import GroupInfo, ParallelState
from miles_agents.errors import UserCodeError

__all__ = ["GroupInfo", "NoParallelState", "ParallelState", "get_parallel_state", "set_parallel_state"]


class NoParallelState(UserCodeError):
    """Asked for where there is no trainer: a rank has its place once its process groups are up."""

    code = "E-TRAIN-013"


_state: ParallelState | None = None


def set_parallel_state(state: ParallelState) -> None:
    """The trainer does, when its backend is ready."""
    global _state
    _state = state


def get_parallel_state() -> ParallelState:
    """Of this process.

    Raises:
        NoParallelState: It is no rank of a trainer, or not yet.
    """
    if _state is None:
        raise NoParallelState(
            "there is no parallel state in this process",
            evidence="get_parallel_state() was called before a trainer's rank was ready, or outside of one",
            advice="Call it in functions that the trainer calls; in a test, call set_parallel_state(ParallelState()).",
        )
    return _state
