"""What tests need of the machine beyond an interpreter, and what happens where it is not there.

``@pytest.mark.needs("hosts")``: where continuous integration runs (``CI`` is set) such a test runs although a program
is missing, and fails with its name; elsewhere it is left out, and the report counts and names it. So it is everywhere
where the machine does not allow what the test does, which no package can mend.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from support.netns import NotAllowed, missing_for_hosts, missing_for_ssh
from support.slurm_cluster import missing_for_slurm

NEEDS: Mapping[str, Callable[[], Sequence[str]]] = {
    "hosts": missing_for_hosts,
    "slurm": missing_for_slurm,
    "ssh": missing_for_ssh,
}
"""What is missing here, by the name of the need."""

LeftOut = list[tuple[str, str]]
"""Test and reason."""


def split(
    items: Sequence[Any], environ: Mapping[str, str], needs: Mapping[str, Callable[[], Sequence[str]]] = NEEDS
) -> tuple[list[Any], LeftOut, list[Any]]:
    """The tests that run; those left out with their reasons, and as items."""
    kept, left_out, out = [], [], []
    for item in items:
        names = [name for mark in item.iter_markers("needs") for name in mark.args]
        missing = [thing for name in names for thing in needs[name]()]
        if missing and (not environ.get("CI") or any(isinstance(thing, NotAllowed) for thing in missing)):
            left_out.append((item.nodeid, ", ".join(missing)))
            out.append(item)
        else:
            kept.append(item)
    return kept, left_out, out


def report(left_out: LeftOut) -> list[str]:
    """For the end of a session: by reason, how many, and which."""
    lines = []
    for reason in dict.fromkeys(reason for _, reason in left_out):
        tests = sorted({test for test, why in left_out if why == reason})
        lines += [
            f"{len(tests)} tests left out, because this machine lacks: {reason}",
            *(f"  {test}" for test in tests),
        ]
    return lines
