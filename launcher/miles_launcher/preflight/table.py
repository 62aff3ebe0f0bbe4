"""What a person sees of findings: one table, worst first, and a last line that says what follows."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from miles_launcher.preflight.facts import Examined
from miles_launcher.preflight.findings import ORDER, Finding
from miles_launcher.preflight.gpus import models

_STYLE = {"error": "bold red", "warning": "yellow", "note": "dim"}
_SHOWN_HOSTS = 4


def table(findings: Sequence[Finding]) -> Table:
    """One row per finding."""
    shown = Table(show_edge=False, pad_edge=False, expand=False)
    for title in ("", "host", "what", "evidence", "what to do"):
        shown.add_column(title, overflow="fold")
    for finding in findings:
        severity = Text(finding.severity, style=_STYLE[finding.severity])
        # Text, not str: rich would read [brackets] as markup.
        shown.add_row(severity, *map(Text, (_hosts(finding.hosts), finding.what, finding.evidence, finding.advice)))
    return shown


def report(examined: Examined, findings: Sequence[Finding]) -> RenderableType:
    """The hosts in short, the table, the verdict."""
    parts: list[RenderableType] = [hosts(examined)]
    if findings:
        parts += [Text(), table(findings)]
    parts += [Text(), Text(verdict(examined, findings), style="bold")]
    return Group(*parts)


def hosts(examined: Examined) -> Table:
    """One row per host: what it is."""
    shown = Table(show_edge=False, pad_edge=False)
    for title in ("host", "name", "Python", "torch", "GPUs", "cores", "memory", "addresses"):
        shown.add_column(title, overflow="fold")
    for report in examined.hosts:
        facts = report.facts or {}
        gpus = models(report.facts) if report.facts is not None else []
        memory = facts.get("cgroup")
        about = facts.get("host")
        addresses = [address for found in facts.get("interfaces", {}).values() for address in found]
        shown.add_row(
            report.name,
            about["hostname"] if about else "-",
            about["python"] if about else "-",
            facts.get("packages", {}).get("torch") or "-",
            f"{len(gpus)} x {gpus[0]}" if gpus else "-",
            str(memory["cores"]) if memory else "-",
            f"{memory['memory_bytes'] / (1 << 30):.0f} GiB" if memory else "-",
            " ".join(a for a in addresses if not a.startswith(("127.", "::1", "fe80:"))) or "-",
        )
    return shown


def verdict(examined: Examined, findings: Sequence[Finding]) -> str:
    """One line."""
    counts = {severity: sum(finding.severity == severity for finding in findings) for severity in ORDER}
    told = ", ".join(f"{count} {severity}{'s' * (count != 1)}" for severity, count in counts.items() if count)
    places = f"{len(examined.hosts)} host{'s' * (len(examined.hosts) != 1)}"
    return f"{places}: {told or 'nothing is wrong'}"


def _hosts(names: tuple[str, ...]) -> str:
    shown = ", ".join(names[:_SHOWN_HOSTS])
    return shown + (f" and {len(names) - _SHOWN_HOSTS} more" if len(names) > _SHOWN_HOSTS else "")
