"""What the judge says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypeAlias

Severity: TypeAlias = Literal["error", "warning", "note"]
ORDER: tuple[Severity, ...] = ("error", "warning", "note")
_SHOWN = 8


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong (``error``: the run would fail), suspicious, or worth knowing.

    Attributes:
        check: Which one; docs/clusters.md has the list.
        hosts: Where; empty: everywhere, or nowhere in particular.
    """

    severity: Severity
    check: str
    hosts: tuple[str, ...]
    what: str
    evidence: str
    advice: str

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def ordered(findings: Iterable[Finding]) -> list[Finding]:
    """Errors first, else as they came; what is the same on several hosts is one finding."""
    alike: dict[tuple[str, ...], list[Finding]] = {}
    for finding in findings:
        alike.setdefault((finding.severity, finding.check, finding.what, finding.advice), []).append(finding)
    return sorted(map(_merged, alike.values()), key=lambda finding: ORDER.index(finding.severity))


def _merged(alike: list[Finding]) -> Finding:
    first = alike[0]
    hosts = tuple(dict.fromkeys(host for finding in alike for host in finding.hosts))
    if len({finding.evidence for finding in alike}) == 1:
        return replace(first, hosts=hosts)
    return replace(first, hosts=hosts, evidence=spread({", ".join(each.hosts): each.evidence for each in alike}))


def spread(values: Mapping[str, str]) -> str:
    """What hosts have, those with the same together: ``a, b: this; c: that``."""
    by_value: dict[str, list[str]] = {}
    for name, value in values.items():
        by_value.setdefault(value, []).append(name)
    return "; ".join(f"{', '.join(_few(names))}: {value}" for value, names in by_value.items())


def _few(names: list[str]) -> list[str]:
    return names if len(names) <= _SHOWN else [*names[:_SHOWN], f"{len(names) - _SHOWN} more"]
