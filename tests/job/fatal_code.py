"""What a test brings that wants a rank of the trainer to die, or to stop, at one exact place, once.

``--custom-megatron-init-path fatal_code.plan`` with ``--env FATAL=rank,nth,signal,module:function,marker``: the rank
sends itself the signal when it enters the function for the nth time, unless the file ``marker`` is there already. With
one more word, ``rollout``, the signal is for the rollout manager, whose pid ``--custom-rm-path
fatal_code.noted_reward`` leaves in a file.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from pathlib import Path

from user_code import sync_letter_share


class BrokenRank(Exception):
    """A user's own error, in a rank of the trainer."""


def plan(args):
    """Arm the rank."""
    rank, nth, name, where, marker, *whom = os.environ["FATAL"].split(",")
    if int(rank) != int(os.environ["RANK"]) or Path(marker).exists():
        return
    module, function = where.split(":")
    found = importlib.import_module(module)
    for part in function.split("."):
        found = getattr(found, part)
    code, seen = found.__code__, []

    def entered(frame, event, _):
        if event == "call" and frame.f_code is code:
            seen.append(event)
            if len(seen) == int(nth):
                Path(marker).touch()
                struck = int(Path(f"{marker}.pid").read_text()) if whom else os.getpid()
                os.kill(struck, signal.Signals[name])

    sys.setprofile(entered)  # of this thread, which is the one that trains


_answers = []


def deadly_reward(args, sample, **kwargs):
    """``user_code.letter_share``, but at the 100th answer the rollout manager that grades sends itself a signal, once:
    ``FATAL=signal,marker``."""
    _answers.append(sample.index)
    name, marker = os.environ["FATAL"].split(",")
    if len(_answers) == 100 and not Path(marker).exists():
        Path(marker).touch()
        os.kill(os.getpid(), signal.Signals[name])
    return sync_letter_share(args, sample, **kwargs)


def noted_reward(args, sample, **kwargs):
    """``user_code.letter_share``, by a process whose pid is in a file."""
    if not _answers:
        _answers.append(sample.index)
        Path(os.environ["FATAL"].split(",")[4] + ".pid").write_text(str(os.getpid()))
    return sync_letter_share(args, sample, **kwargs)


def broken_step(args, rollout_id, step_id, model, optimizer, scheduler):
    """``--custom-megatron-before-train-step-hook-path``: raises in the second rollout."""
    if rollout_id == 1:
        raise BrokenRank(f"cannot train rollout {rollout_id}")
