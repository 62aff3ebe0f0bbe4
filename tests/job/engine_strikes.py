"""What a test brings that wants an engine to die, or to stop, in the middle of a rollout, once.

``--custom-rm-path engine_strikes.reward`` with ``--env STRIKE=nth,signal``: when the rollout manager grades for the nth
time, an engine gets the signal, with all processes below it.
"""

from __future__ import annotations

import os
import signal

import psutil
from user_code import letter_share

_answers: list[int] = []


async def reward(args, sample, **kwargs):
    """``user_code.letter_share``."""
    _answers.append(sample.index)
    nth, name = os.environ["STRIKE"].split(",")
    if len(_answers) == int(nth):
        _strike(signal.Signals[name])
    return await letter_share(args, sample, **kwargs)


def _strike(number):
    """This process and engines have the same agent."""
    beside = [one for parent in psutil.Process().parents() for one in parent.children()]
    engine = next(one for one in beside if any("launch_engine" in word for word in one.cmdline()))
    for one in (engine, *engine.children(recursive=True)):
        os.kill(one.pid, number)
