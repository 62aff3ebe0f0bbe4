"""The tables of ``docs/ifbench.md``, made of the registry.

``python -m miles.rollout.rm_hub.ifbench_checks.document`` writes them into the page; the rest of it is written by hand.
"""

from __future__ import annotations

from pathlib import Path

from miles.rollout.rm_hub.ifbench_checks import BUILT, REFUSED, Instruction

PAGE = Path(__file__).parents[4] / "docs" / "ifbench.md"
SOURCES = {
    "IFEval": "Zhou et al. 2023",
    "IFBench": "Pyatkin et al. 2025, for evaluation",
    "IFTrain": "Pyatkin et al. 2025, for training",
}
FIRST, AFTER = "## IFEval", "## What counts as what"


def tables() -> str:
    """Part of the page: from the first table to what comes after the last."""
    parts = []
    for source, published in SOURCES.items():
        rows = [_row(found) for found in sorted(BUILT.values(), key=lambda found: found.id) if found.source == source]
        parts.append(f"## {source}\n\n{published}. {len(rows)} instructions, all of them built.\n")
        parts.append("\n".join(["| id | arguments | what is checked |", "|---|---|---|", *rows]) + "\n")
    refused = [f"| `{name}` | {why} |" for name, why in sorted(REFUSED.items())]
    parts.append("\n".join(["## Refused", "", "| id | why |", "|---|---|", *refused]) + "\n")
    return "\n".join(parts) + "\n"


def renewed(page: str) -> str:
    """A page with its tables made anew."""
    begin, _, rest = page.partition(FIRST + "\n")
    return begin + tables() + AFTER + rest.partition(AFTER)[2]


def _row(found: Instruction) -> str:
    names = ", ".join(f"`{name}`" for name in found.kinds)
    meaning = found.meaning.replace("|", "\\|").replace("*", "\\*").replace("<", "\\<")
    needs = f" (needs {found.needs})" if found.needs else ""
    return f"| `{found.id}` | {names} | {meaning[:-1]}{needs} |"


if __name__ == "__main__":
    PAGE.write_text(renewed(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
