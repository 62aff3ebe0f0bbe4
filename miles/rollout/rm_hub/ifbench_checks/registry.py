"""Which instructions there are, by id: those with a check, and those that are refused."""

from __future__ import annotations

import difflib
import importlib.util
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, get_type_hints

from miles.rollout.rm_hub.ifbench_checks.arguments import PARSERS, BadArgument

Check = Callable[..., bool]
_C = TypeVar("_C", bound=Check)


class BadInstruction(ValueError):
    """An instruction that cannot be checked; the message says why.

    Attributes:
        advice: What can be done about it.
    """

    def __init__(self, why: str, advice: str) -> None:
        super().__init__(why)
        self.advice = advice


@dataclass(frozen=True)
class Instruction:
    """An instruction that can be checked.

    Attributes:
        id: As data name it.
        source: Who published it: IFEval, IFBench or IFTrain.
        check: From a response and arguments to whether the response follows it. Never raises.
        kinds: Its arguments and what they have to be.
        optional: Those that may be left out.
        needs: A package that it needs; empty: none.
    """

    id: str
    source: str
    check: Check
    kinds: Mapping[str, Any]
    optional: frozenset[str]
    needs: str = ""

    @property
    def meaning(self) -> str:
        """What a response has to be."""
        return " ".join((inspect.getdoc(self.check) or "").split())

    def arguments(self, given: Mapping[str, Any], prompt: str) -> dict[str, Any]:
        """What the check gets: those of ``given`` that it knows and that are not null.

        A request to repeat that is not given is the prompt.

        Raises:
            BadInstruction: One is missing, or not what it has to be.
        """
        found = {}
        for name, kind in self.kinds.items():
            value = given.get(name)
            if value is None and name == "prompt_to_repeat":
                value = prompt or None
            if value is None:
                if name not in self.optional:
                    raise BadInstruction(f"{self.id} lacks {name!r}", f"It takes: {', '.join(self.kinds)}.")
                continue
            try:
                found[name] = PARSERS[kind](value)
            except BadArgument as error:
                raise BadInstruction(
                    f"{name!r} of {self.id} is not {error}; it is {str(value)[:100]!r}", "Correct the row."
                ) from None
        return found


BUILT: dict[str, Instruction] = {}
"""By id."""

_WITHDRAWN = "its authors left it out of their own table of checks, and no data was published for it"
REFUSED: dict[str, str] = {
    "keywords:key_sentences": _WITHDRAWN,
    "detectable_content:rephrase_paragraph": _WITHDRAWN,
    "detectable_format:rephrase": _WITHDRAWN,
    "multi-turn:constrained_start": _WITHDRAWN,
}
"""Why an instruction that was published has no check, by id."""


def instruction(name: str, source: str, needs: str = "") -> Callable[[_C], _C]:
    """Enter a check under an id. Its arguments are those of the function behind the response."""

    def enter(check: _C) -> _C:
        _, *parameters = inspect.signature(check).parameters.values()
        hints = get_type_hints(check)
        optional = frozenset(found.name for found in parameters if found.default is not found.empty)
        BUILT[name] = Instruction(
            name, source, check, {found.name: hints[found.name] for found in parameters}, optional, needs
        )
        return check

    return enter


def find(name: str) -> Instruction:
    """The instruction of an id.

    Raises:
        BadInstruction: There is none, it is refused, or a package that it needs is not installed.
    """
    if name in REFUSED:
        raise BadInstruction(f"instruction {name!r} is refused: {REFUSED[name]}", "Leave such rows out.")
    if name not in BUILT:
        near = difflib.get_close_matches(name, BUILT, 3, 0.6)
        hint = f"near ids: {', '.join(near)}" if near else "no id is near it"
        raise BadInstruction(f"there is no instruction {name!r} ({hint})", "docs/ifbench.md has all ids.")
    found = BUILT[name]
    if found.needs and importlib.util.find_spec(found.needs) is None:
        raise BadInstruction(
            f"instruction {name!r} needs the package {found.needs}, which is not installed",
            "Install it: pip install 'miles[ifbench]'.",
        )
    return found
