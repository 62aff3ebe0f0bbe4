"""Loading an actor's class in its worker, and making the actor. Runs on the main thread; user code runs here."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from miles_agents.errors import ConfigError
from miles_agents.rpc.actor import Actor, endpoints_of
from miles_agents.rpc.errors import ActorFailedToStart
from miles_agents.rpc.host import ActorHost
from miles_agents.rpc.mesh import endpoint_to_plain

MAIN_ALIAS = "__miles_main__"
_loading: set[str] = set()


class ScriptNotGuarded(ConfigError):
    """The user's script starts its work when it is imported, so its workers would start it again."""

    code = "E-CALL-011"


def refuse_inside_loading_script() -> None:
    """For what only the user's own process may do: refused while a worker loads the script that defines its actor.

    Raises:
        ScriptNotGuarded: there is no ``if __name__ == "__main__":`` around it.
    """
    if _loading:
        module = sys.modules[MAIN_ALIAS]
        raise ScriptNotGuarded(
            f"the script {module.__file__} starts a controller when it is imported",
            evidence="a worker imports it to find the actor's class, and must not start the run again",
            advice='Put what the script does under `if __name__ == "__main__":`.',
        )


class NotAnActorClass(ConfigError):
    """What was given to spawn is not an actor class that another process could load."""

    code = "E-CALL-010"


def class_location(actor: type | str) -> dict[str, str]:
    """How a worker finds a class: by module, or by file for one that was defined in the script being run.

    Args:
        actor: An ``Actor`` subclass, or ``"package.module:Class"``, which is not imported here.

    Raises:
        NotAnActorClass: it could not be found again from another process.
    """
    if isinstance(actor, str):
        module, colon, qualname = actor.partition(":")
        if not (module and colon and qualname):
            raise _not_an_actor(repr(actor), "a string has to be 'package.module:Class'")
        return {"module": module, "qualname": qualname}
    if not (isinstance(actor, type) and issubclass(actor, Actor)):
        raise _not_an_actor(repr(actor), "it is not a subclass of Actor")
    if "<locals>" in actor.__qualname__:
        raise _not_an_actor(actor.__qualname__, "it is defined inside a function, where no other process can reach it")
    if actor.__module__ != "__main__":
        return {"module": actor.__module__, "qualname": actor.__qualname__}
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    if spec is not None:
        return {"module": str(spec.name), "qualname": actor.__qualname__}
    file = getattr(main, "__file__", None)
    if file is None:
        raise _not_an_actor(actor.__qualname__, "it was defined at an interactive prompt")
    return {"file": str(Path(file).resolve()), "qualname": actor.__qualname__}


def construct(
    host: ActorHost, preload: Sequence[str], where: dict[str, str], args: list[Any], kwargs: dict[str, Any]
) -> list[list[Any]]:
    """Load the class, make the actor, serve its endpoints. Returns the endpoints as plain values.

    ``preload``: modules to import before; there already if a zygote made this process.

    Raises:
        ActorFailedToStart: the class cannot be loaded. What the constructor itself raises passes through.
    """
    for name in preload:
        _import(name)
    cls = _load(where)
    endpoints = endpoints_of(cls)
    actor = cls(*args, **kwargs)
    host.serve(actor, endpoints)
    return [endpoint_to_plain(info) for info in endpoints.values()]


def _load(where: dict[str, str]) -> type[Actor]:
    target = where.get("module") or where.get("file", "")
    module = _load_file(target) if "file" in where else _import(target)
    try:
        found: Any = functools.reduce(getattr, where["qualname"].split("."), module)
    except AttributeError as error:
        raise _cannot_load(
            where, f"{error}", "Check the name; the worker may see another version of the file."
        ) from None
    if not (isinstance(found, type) and issubclass(found, Actor)):
        raise _cannot_load(where, f"it is {found!r}, not a subclass of Actor", "Derive the class from Actor.")
    return found


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
            evidence = f"no module named {error.name!r}; sys.path: {sys.path}"
            advice = "Install the package on this node, or set PYTHONPATH for the run."
            raise _cannot_load({"module": name, "qualname": ""}, evidence, advice) from None
        raise


def _load_file(path: str) -> ModuleType:
    """Run the user's script as a module of another name, so that ``if __name__ == '__main__'`` stays quiet."""
    if MAIN_ALIAS in sys.modules:
        return sys.modules[MAIN_ALIAS]
    spec = importlib.util.spec_from_file_location(MAIN_ALIAS, path)
    if spec is None or spec.loader is None or not Path(path).is_file():
        evidence = f"no file {path} on this node"
        advice = "Put the script on a shared file system, or the class into an installed package."
        raise _cannot_load({"file": path, "qualname": ""}, evidence, advice)
    module = importlib.util.module_from_spec(spec)
    sys.modules[MAIN_ALIAS] = module
    _loading.add(MAIN_ALIAS)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[MAIN_ALIAS]
        raise
    finally:
        _loading.discard(MAIN_ALIAS)
    return module


def _cannot_load(where: dict[str, str], evidence: str, advice: str) -> ActorFailedToStart:
    name = ":".join(part for part in (where.get("module") or where.get("file", ""), where["qualname"]) if part)
    return ActorFailedToStart(f"the worker cannot load {name}", evidence=evidence, advice=advice)


def _not_an_actor(what: str, why: str) -> NotAnActorClass:
    return NotAnActorClass(
        f"{what} cannot be spawned",
        evidence=why,
        advice="Define a subclass of Actor at the top level of a module, and give that or 'package.module:Class'.",
    )
