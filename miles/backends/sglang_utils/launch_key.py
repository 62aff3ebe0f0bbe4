"""How a key reaches a server that we launch: in the environment of its first instant, then through a pipe.

Services get argv and environment from the controller, encrypted on the way. What an environment holds stays readable in
``/proc/<pid>/environ`` for the life of a process, whatever it unsets. So the first thing that a launcher does is to put
the key into a pipe and to execute itself anew, same pid, without it. Afterwards only the process's memory has it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import NoReturn

KEY_VARIABLE = "MILES_ENGINE_KEY"
_PIPE_VARIABLE = "MILES_ENGINE_KEY_FD"


class Secret(str):
    """A text that does not show in logs: SGLang prints all its arguments when it starts."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "'***'"


def take_key(additions: Mapping[str, str]) -> Secret:
    """The key, empty if none was given. Executes this process anew first, with ``additions`` to its environment.

    Call it before anything is imported that is slow, or that reads the environment.
    """
    pipe = os.environ.pop(_PIPE_VARIABLE, "")
    if not pipe:
        _execute_anew({**os.environ, **additions})
    with open(int(pipe), encoding="utf-8") as file:
        return Secret(file.read())


def _execute_anew(env: dict[str, str]) -> NoReturn:
    reader, writer = os.pipe()
    os.write(writer, env.pop(KEY_VARIABLE, "").encode())  # far less than a pipe holds
    os.close(writer)
    os.set_inheritable(reader, True)
    env[_PIPE_VARIABLE] = str(reader)
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], env)  # noqa: S606  # becoming it is the point
