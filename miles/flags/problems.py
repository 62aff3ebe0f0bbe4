"""What is wrong with a command line: all of it at once, each with flag, value, what is allowed and what to do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from miles_agents.errors import ConfigError, EnvironmentFault, InternalError, UserCodeError


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that keeps a run from starting.

    Attributes:
        flag: As typed, or the flag that would help.
        value: What it was given, as text; empty: nothing.
        what: What is wrong.
        allowed: What could stand there.
        advice: What to do.
    """

    flag: str
    value: str
    what: str
    allowed: str
    advice: str

    def lines(self) -> list[str]:
        """For a terminal without colours."""
        head = f"{self.flag} {self.value}".rstrip()
        return [
            f"{head}: {self.what}",
            *([f"  allowed: {self.allowed}"] if self.allowed else []),
            f"  what to do: {self.advice}",
        ]

    def as_dict(self) -> dict[str, str]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, str]) -> Problem:
        """What ``as_dict`` made."""
        return cls(**values)


REFUSED = "refused: "


def grouped(problems: Sequence[Problem]) -> list[Problem]:
    """One problem for all flags that the same missing feature keeps out: their reasons agree up to a bracket."""
    by_feature: dict[str, list[Problem]] = {}
    for problem in problems:
        by_feature.setdefault(_feature(problem), []).append(problem)
    found = []
    for problem in problems:
        feature = _feature(problem)
        alike = by_feature[feature]
        others = dict.fromkeys(other.flag for other in alike if other.flag != problem.flag)
        if not feature or not others:
            found.append(problem)
        elif problem is alike[0]:
            what = f"{feature}. For the same reason: {', '.join(others)}"
            found.append(replace(problem, what=what, allowed="", advice="Leave them out."))
    return found


def _feature(problem: Problem) -> str:
    """The missing feature that a refusal names; empty: it is about the flag itself."""
    return problem.what.partition(" (")[0] if problem.what.startswith(REFUSED + "not built yet: ") else ""


class FlagProblems(ConfigError):
    """Flags that cannot work. ``problems`` has all of them."""

    code = "E-FLAG-001"

    def __init__(self, problems: Sequence[Problem]) -> None:
        count = len(problems)
        super().__init__(
            f"{count} problem{'s' if count != 1 else ''} with the flags: "
            f"{', '.join(dict.fromkeys(p.flag for p in problems))}",
            evidence="\n".join(line for problem in problems for line in problem.lines()),
            advice="Correct the flags that are named; --help lists all of them.",
        )
        self.problems = tuple(problems)


class ResolverFailed(InternalError):
    """The process that reads the flags did not answer."""

    code = "E-FLAG-002"


class UserArgumentsFailed(UserCodeError):
    """User code that adds flags of its own could not be loaded or raised."""

    code = "E-FLAG-003"


class PassthroughUnreadable(EnvironmentFault):
    """The flags of the installed SGLang or sglang-router could not be read."""

    code = "E-FLAG-004"


def shown(value: Any) -> str:
    """A value as one would type it."""
    if isinstance(value, list):
        return " ".join(shown(item) for item in value)
    return "" if value is None else str(value)


def listed(values: Iterable[Any]) -> str:
    """``a, b or c``."""
    words = [str(value) for value in values]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}" if words else "none"
