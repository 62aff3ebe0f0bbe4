"""What ends a training job, and how that is told."""

from __future__ import annotations

from miles.rollout.hooks import HookFailed
from miles.training.exit_codes import EXIT_BAD_CONFIG, EXIT_FAILED
from miles_agents.errors import ConfigError, MilesError, PeerFault, UserCodeError
from miles_agents.wire.remote_error import RemoteError


class JobPartDied(PeerFault):
    """A process that the job cannot do without has ended."""

    code = "E-JOB-001"


class CheckpointsDisagree(ConfigError):
    """The ranks would begin at different rollouts, or the trainer's checkpoint has no matching rollout state."""

    code = "E-JOB-002"


def first_of(error: BaseException) -> BaseException:
    """The error to tell when several came together: the user's own first, then one of ours that says what to do, and
    the death of a process last, as it is mostly the consequence of another."""
    if not isinstance(error, BaseExceptionGroup):
        return error
    errors = [first_of(one) for one in error.exceptions]
    return min(errors, key=_rank)


def _rank(error: BaseException) -> int:
    if isinstance(error, HookFailed | UserCodeError):
        return 0
    if isinstance(error, JobPartDied):
        return 3
    if isinstance(error, PeerFault):
        return 2
    return 1 if isinstance(error, Exception) else 4


def exit_code(error: BaseException) -> int:
    """0 for none is the caller's; 2 if changing a flag or an argument is the user's move, else 1."""
    return EXIT_BAD_CONFIG if isinstance(error, ConfigError) else EXIT_FAILED


def story(error: BaseException) -> str:
    """What a person reads when the run has failed: the user's own traceback first, if their code raised."""
    if not isinstance(error, MilesError):
        return f"{type(error).__name__}: {error}"
    if isinstance(error, RemoteError):
        return f"{error.remote_traceback.rstrip()}\n\n{error}"
    return str(error)
