"""What is started: an actor that has some modules."""

from __future__ import annotations

import importlib

from miles_agents import Actor, endpoint


class HasModules(Actor):
    """Imports them in its constructor, where they are not there already."""

    def __init__(self, modules: list[str]) -> None:
        for name in modules:
            importlib.import_module(name)

    @endpoint
    def ready(self) -> bool:
        """Answers."""
        return True
