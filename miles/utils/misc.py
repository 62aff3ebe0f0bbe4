"""Loading what a dotted path names, and other small things that user code imports from here."""

from __future__ import annotations

import importlib
import inspect
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

from miles_agents.errors import ConfigError, UserCodeError


class CannotLoad(ConfigError):
    """A path to user code leads nowhere."""

    code = "E-HOOK-001"


class ImportFailed(UserCodeError):
    """A module of the user raised while it was imported. Its traceback is the cause."""

    code = "E-HOOK-005"


NOT_BUILT = {
    "miles.rollout.checkpoint_eval": "evaluation of checkpoints",
    "miles.rollout.session": "the session server",
    "miles.backends.training_utils.loss_hub.opd": "distillation over several tokens of a position",
    "miles.router": "a router other than SGLang's",
    "miles_plugins": "plugins",
}
"""Modules that user code may name and that are not here, with what they are for. It is asked about what cannot be found
only, so that a package stands for those of its modules that are missing."""


def not_built(module: str) -> str:
    """That a module which cannot be found is not built yet, and what it is; empty: we do not know of it."""
    for known, purpose in NOT_BUILT.items():
        if (module + ".").startswith(known + "."):
            return f"not built yet: {purpose} ({module})"
    return ""


class FunctionRegistry:
    """Names that stand for callables of this process, in place of an importable path."""

    def __init__(self) -> None:
        self._known: dict[str, Any] = {}

    def get(self, name: str) -> Any | None:
        """What the name stands for."""
        return self._known.get(name)

    def register(self, name: str, function: Any) -> None:
        """Let the name stand for this from now on."""
        self._known[name] = function

    @contextmanager
    def temporary(self, name: str, function: Any) -> Iterator[None]:
        """Let the name stand for this inside the block."""
        before = self._known.get(name)
        self._known[name] = function
        try:
            yield
        finally:
            if before is None:
                self._known.pop(name, None)
            else:
                self._known[name] = before


function_registry = FunctionRegistry()


def load_function(path: str | None, *, sync_required: bool = False, flag: str = "") -> Any:
    """What ``package.module.name`` names: a function or class. None for an empty path.

    Args:
        path: The path; names of ``function_registry`` come first.
        sync_required: Refuse an ``async def``.
        flag: Whose value it is, for the error.

    Raises:
        CannotLoad: No such module or name, with what is missing.
        ImportFailed: The module raised while it was imported.
    """
    if not path:
        return None
    found = function_registry.get(path)
    if found is None:
        found = _import(path, flag)
    if sync_required and inspect.iscoroutinefunction(found):
        raise CannotLoad(
            f"{_of(flag, path)} is an async function",
            evidence=f"{path} is declared with async def",
            advice="Give a function that is declared with def.",
            flag=flag,
        )
    return found


def _of(flag: str, path: str) -> str:
    return f"{flag} {path}" if flag else path


def _import(path: str, flag: str) -> Any:
    module_name, _, name = path.rpartition(".")
    if not module_name or not name:
        raise CannotLoad(
            f"{_of(flag, path)} is not a path to a function",
            evidence="it has no dot, so it names no module",
            advice="Write it as package.module.function.",
            flag=flag,
        )
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name + ".").startswith(error.name + "."):
            raise _import_failed(path, flag, module_name, error) from error
        raise CannotLoad(
            f"{_of(flag, path)} cannot be loaded",
            evidence=not_built(module_name) or f"there is no module {error.name}",
            advice="Leave the flag out, or give a function of yours."
            if not_built(module_name)
            else "Check the spelling, and that PYTHONPATH has the directory that the module is in.",
            flag=flag,
        ) from error
    except (Exception, SystemExit) as error:  # a module that ends its process does not end ours
        raise _import_failed(path, flag, module_name, error) from error
    if not hasattr(module, name):
        there = [n for n in vars(module) if not n.startswith("_") and callable(getattr(module, n))]
        raise CannotLoad(
            f"{_of(flag, path)} cannot be loaded",
            evidence=f"{getattr(module, '__file__', module_name)} has no {name}; it has {', '.join(there[:20])}",
            advice="Check the spelling.",
            flag=flag,
        )
    return getattr(module, name)


def _import_failed(path: str, flag: str, module: str, error: BaseException) -> ImportFailed:
    import traceback

    # The first frames are those of the import machinery and this module.
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "importlib" not in f.filename]
    text = "".join([*traceback.format_list(frames[1:]), *traceback.format_exception_only(error)]).rstrip()
    lacks = not_built(error.name or "") if isinstance(error, ModuleNotFoundError) else ""
    return ImportFailed(
        f"{_of(flag, path)}: importing {module} raised {type(error).__name__}: {error}",
        evidence=f"{text}\n{lacks}" if lacks else text,
        advice="Do without that module."
        if lacks
        else "Repair the module; `python -c 'import " + module + "'` shows the same.",
        flag=flag,
    )


class SingletonMeta(type):
    """A class with one instance per process: the first call makes it, later calls return it."""

    _instances: dict[type, Any] = {}
    _lock = Lock()

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        """The instance; arguments count for the first call only."""
        with SingletonMeta._lock:
            if cls not in SingletonMeta._instances:
                SingletonMeta._instances[cls] = super().__call__(*args, **kwargs)
            return SingletonMeta._instances[cls]

    @staticmethod
    def clear_instances(cls_to_clear: type) -> None:
        """Forget the instance of a class."""
        with SingletonMeta._lock:
            SingletonMeta._instances.pop(cls_to_clear, None)


def get_free_port(start_port: int = 10000, consecutive: int = 1) -> int:
    """The first port from ``start_port`` on that is free now, with so many free ones from it on.

    Another process may take it before you do: whatever lives longer than a test should lease its ports instead.
    """
    port = start_port
    while port + consecutive <= 65536:
        taken = next((p for p in range(port, port + consecutive) if not _is_free(p)), None)
        if taken is None:
            return port
        port = taken + 1
    raise OSError(f"no {consecutive} free ports from {start_port} on")


def _is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
        return True


def should_run_periodic_action(
    rollout_id: int, interval: int | None, num_rollout_per_epoch: int | None = None, num_rollout: int | None = None
) -> bool:
    """Whether what happens every ``interval`` rollouts, at the end of an epoch and after the last one, is due."""
    if interval is None:
        return False
    if num_rollout is not None and rollout_id == num_rollout - 1:
        return True
    step = rollout_id + 1
    return step % interval == 0 or (bool(num_rollout_per_epoch) and step % int(num_rollout_per_epoch or 1) == 0)
