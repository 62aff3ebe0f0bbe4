"""A config while it is being made: rules read and write its values, and note what is wrong."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from miles.flags.facts import DirectoryFacts, Facts
from miles.flags.flag import Plain
from miles.flags.problems import Problem, shown
from miles.tracking.secrets import shown_value


@dataclass
class Draft:
    """Values by dest: defaults, what was typed, and what rules derive.

    Attributes:
        values: All of them.
        typed: Dests that the user gave.
        spelled: How they were typed.
        facts: What is known beyond the flags.
        problems: What keeps the run from starting.
        notices: What the user should know although the run can start.
        misread: Flags that were typed with something that cannot be read.
    """

    values: dict[str, Plain]
    typed: frozenset[str]
    spelled: dict[str, str]
    facts: Facts
    problems: list[Problem] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    misread: frozenset[str] = frozenset()

    def __getitem__(self, dest: str) -> Any:
        return self.values[dest]

    def __setitem__(self, dest: str, value: Plain) -> None:
        self.values[dest] = value

    def flag(self, dest: str) -> str:
        """How the user would type it, or did."""
        return self.spelled.get(dest, "--" + dest.replace("_", "-"))

    def directory(self, dest: str) -> DirectoryFacts:
        """What is known of the directory that this flag names."""
        return self.facts.directories.get(self.values[dest] or "", DirectoryFacts())

    def problem(self, dest: str, what: str, *, allowed: str = "", advice: str, value: Plain = None) -> None:
        """Note that the run cannot start. What could not be read is told already, and not missing."""
        if self.flag(dest) in self.misread:
            return
        given = self.values.get(dest) if value is None else value
        text = "" if isinstance(given, bool) else shown_value(dest, shown(given))
        problem = Problem(self.flag(dest), text, what, allowed, advice)
        if problem not in self.problems:
            self.problems.append(problem)

    def notice(self, text: str) -> None:
        """Tell the user something."""
        if text not in self.notices:
            self.notices.append(text)

    @property
    def trains(self) -> bool:
        """There is a trainer."""
        return not self.values["debug_rollout_only"]

    @property
    def generates(self) -> bool:
        """There are engines."""
        return not self.values["debug_train_only"]
