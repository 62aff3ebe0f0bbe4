"""Calling user code: async functions on the loop that runs, ordinary ones in a pool; errors with the user's traceback.

Ordinary functions of our own run where they are called: they are short.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from typing import Any

from miles.utils.http_utils import RequestRefused
from miles.utils.misc import load_function
from miles_agents.errors import ConfigError, MilesError, UserCodeError

logger = logging.getLogger(__name__)
_PLUMBING = (
    "/asyncio/", "/concurrent/futures/", "/threading.py", "/contextlib.py", "miles/rollout/hooks.py",
    "miles/rollout/inference_rollout/compatibility.py",
)  # fmt: skip
POOL_THREADS = 32


class HookFailed(UserCodeError):
    """A function of the user raised. Its own traceback comes first."""

    code = "E-HOOK-002"

    def __str__(self) -> str:
        return f"{self.evidence}\n\n{self.what}\n  what to do: {self.advice}\n  code: {self.code} (docs/errors.md)"


class BadHookResult(ConfigError):
    """A function of the user returned something that its caller cannot use."""

    code = "E-HOOK-003"


_pool: ThreadPoolExecutor | None = None


def hook_pool() -> ThreadPoolExecutor:
    """Where ordinary functions of the user run. Used on the loop of user code only."""
    global _pool
    if _pool is None:
        _pool = ThreadPoolExecutor(POOL_THREADS, thread_name_prefix="hook")
    return _pool


def close_hook_pool(timeout_s: float = 5.0) -> None:
    """End the pool; what still runs in it is left to the process's end."""
    global _pool
    pool, _pool = _pool, None
    if pool is not None:
        pool.shutdown(wait=False, cancel_futures=True)
        for thread in list(pool._threads):
            thread.join(timeout_s)


@dataclass(frozen=True)
class Hook:
    """A function that a flag names.

    Attributes:
        flag: Such as ``--custom-rm-path``.
        path: The flag's value.
        function: What is called.
        origin: What the path names, if that is something else than ``function``: it decides how to call.
        may_block: Ours, too, is called in the pool.
    """

    flag: str
    path: str
    function: Callable[..., Any]
    origin: Any = None
    may_block: bool = False

    @property
    def is_async(self) -> bool:
        """Whether calling it gives a coroutine."""
        named = self.function if self.origin is None else self.origin
        call = getattr(named, "__call__", None)  # noqa: B004 - a callable object's own coroutine function
        return inspect.iscoroutinefunction(named) or inspect.iscoroutinefunction(call)

    @property
    def is_ours(self) -> bool:
        """Whether it is part of this code base."""
        named = self.function if self.origin is None else self.origin
        return str(getattr(named, "__module__", "") or "").partition(".")[0] == "miles"

    async def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call it.

        Raises:
            HookFailed: It raised. Errors of the runtime inside it come as they are.
        """
        try:
            if self.is_async or (self.is_ours and not self.may_block):
                result = self.function(*args, **kwargs)
            else:
                call = partial(copy_context().run, self.function, *args, **kwargs)
                result = await asyncio.get_running_loop().run_in_executor(hook_pool(), call)
            return await result if inspect.isawaitable(result) else result
        except MilesError as error:
            if isinstance(error, RequestRefused) and not self.is_ours:
                raise self.failed(error) from error
            raise
        except (Exception, SystemExit) as error:  # the exit of a hook is not that of the rollout manager
            raise self.failed(error) from error

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """Call it here and now, where there is no loop: in the trainer, on the thread of its passes.

        Raises:
            HookFailed: It raised. Errors of the runtime inside it come as they are.
        """
        try:
            return self.function(*args, **kwargs)
        except MilesError:
            raise
        except (Exception, SystemExit) as error:  # the exit of a hook is not that of the rank
            raise self.failed(error) from error

    def failed(self, error: BaseException) -> HookFailed:
        """The error for an exception of the function."""
        return HookFailed(
            f"{self.flag} {self.path} raised {type(error).__name__}: {str(error)[:500]}",
            evidence=users_traceback(error),
            advice="Repair the function; the lines above are its traceback.",
            flag=self.flag,
        )

    def bad_result(self, result: Any, wanted: str) -> BadHookResult:
        """The error for a result that cannot be used."""
        return BadHookResult(
            f"{self.flag} {self.path} returned a {type(result).__name__}",
            evidence=f"it returned {str(result)[:300]}; it must return {wanted}",
            advice="Correct the function.",
            flag=self.flag,
        )


def load_hook(path: str | None, flag: str) -> Hook | None:
    """The function that a flag names; None if the flag is not given.

    Raises:
        CannotLoad, ImportFailed.
    """
    return Hook(flag, path, load_function(path, flag=flag)) if path else None


def users_traceback(error: BaseException) -> str:
    """The traceback without the frames that led to the user's function; causes included."""
    told = traceback.TracebackException.from_exception(error)
    frames = list(told.stack)
    while len(frames) > 1 and any(part in frames[0].filename for part in _PLUMBING):
        frames.pop(0)
    told.stack = traceback.StackSummary.from_list(frames)
    return "".join(told.format()).rstrip()
