"""All findings: about each host, about hosts that differ, about what lies between them. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from miles_launcher.preflight import gpus
from miles_launcher.preflight.facts import Examined, HostFacts
from miles_launcher.preflight.findings import Finding, Severity, ordered, spread
from miles_launcher.preflight.judge_host import judge_host
from miles_launcher.preflight.needs import Needs
from miles_launcher.preflight.network import is_loopback

CLOCK_S = 1.0
"""Clocks further apart than this make logs and file times of several hosts hard to read together."""

_MUST_BE_EQUAL = ("torch", "megatron-core", "sglang")
"""Ranks and engines of different versions of these exchange tensors that the other one reads differently."""

_FIREWALL = "Open the firewall between the hosts, or choose another interface: --interface, --controller-host."
_ELSEWHERE = "Choose an interface that other hosts reach: --interface, GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME."


def judge(examined: Examined, needs: Needs) -> list[Finding]:
    """What a person should know, worst first."""
    advice = "Try to log in there and to start the Python that is to be used."
    mute = [host for host in examined.hosts if host.facts is None]
    found = [Finding("error", "answers", (host.name,), "does not answer", host.error, advice) for host in mute]
    for name, facts in examined.answered:
        try:
            found += judge_host(name, facts, needs)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            what, evidence = "its answer makes no sense", f"{type(error).__name__}: {error}"
            found.append(Finding("error", "answers", (name,), what, evidence, "Use the same version on all hosts."))
    found += _enough_gpus(examined, needs)
    if len(examined.hosts) > 1:
        found += [*_differences(examined), *_clocks(examined)]
    found += [*_ports(examined, needs), *_unshared(examined, needs), *_links(examined)]
    return ordered(found)


def _enough_gpus(examined: Examined, needs: Needs) -> Iterator[Finding]:
    each = {name: gpus.count(facts) for name, facts in examined.answered}
    counts = {name: count for name, count in each.items() if count is not None}
    if sum(counts.values()) < needs.num_devices and len(counts) == len(examined.hosts):
        yield Finding(
            "error", "gpus", (), f"the run needs {needs.num_devices} GPUs, there are {sum(counts.values())}",
            spread({name: str(count) for name, count in counts.items()}), "Name more hosts, or ask for fewer GPUs.",
        )  # fmt: skip


def _differences(examined: Examined) -> Iterator[Finding]:
    """What should be the same everywhere; those that are not like most are named."""
    aspects: list[tuple[Severity, str, str, dict[str, str]]] = []

    def compare(severity: Severity, check: str, what: str, values: Mapping[str, str | None]) -> None:
        aspects.append((severity, check, what, {name: value for name, value in values.items() if value}))

    every = dict(examined.answered)
    hosts = {name: facts["host"] for name, facts in every.items() if "host" in facts}
    compare("error", "python", "Python", {n: ".".join(h["python"].split(".")[:2]) for n, h in hosts.items()})
    compare("error", "code", "our own code", {name: facts.get("code") for name, facts in every.items()})
    compare("note", "user", "the user", {name: host["user"] for name, host in hosts.items()})
    compare("warning", "platform", "the kind of machine", {n: h["platform"].split()[-1] for n, h in hosts.items()})
    for package in sorted({package for facts in every.values() for package in facts.get("packages", {})}):
        versions = {name: facts.get("packages", {}).get(package) for name, facts in every.items()}
        compare("error" if package in _MUST_BE_EQUAL else "warning", "packages", package, versions)
    compare("warning", "gpus", "the GPUs", {name: _models(facts) for name, facts in every.items()})
    compare("warning", "gpus", "the driver", {n: f["gpus"]["driver"] for n, f in every.items() if "gpus" in f})
    for label in sorted({label for facts in every.values() for label in facts.get("paths", {})} - {"tmp", "shm"}):
        seen = {n: f["paths"][label]["content"] for n, f in every.items() if label in f.get("paths", {})}
        compare("warning", "paths", f"what lies at --{label}", seen)
    for severity, check, what, values in aspects:
        (usual, _), *others = Counter(values.values()).most_common() or [("", 0)]
        if others:
            odd = tuple(name for name, value in values.items() if value != usual)
            advice = "Make them equal, or leave out the hosts that differ."
            yield Finding(severity, check, odd, f"{what} differs from the other hosts'", spread(values), advice)


def _models(facts: HostFacts) -> str:
    return ", ".join(f"{count} x {name}" for name, count in sorted(Counter(gpus.models(facts)).items()))


def _clocks(examined: Examined) -> Iterator[Finding]:
    for host in examined.hosts:
        if host.facts is not None and abs(host.clock_s) > CLOCK_S + host.clock_error_s:
            yield Finding(
                "warning", "clock", (host.name,), f"its clock is {host.clock_s:+.1f} s off this machine's",
                f"measured to {host.clock_error_s:.2f} s", "Start its time service (timedatectl set-ntp true, chrony).",
            )  # fmt: skip


def _ports(examined: Examined, needs: Needs) -> Iterator[Finding]:
    for name, facts in examined.answered[:1]:
        taken = [port for port, is_free in facts.get("ports", {}).items() if not is_free]
        if taken and needs.ports:
            yield Finding(
                "error", "ports", (name,), f"port {', '.join(taken)} is in use", "it cannot be bound",
                f"Find out by whom (ss -ltnp sport = :{taken[0]}), or choose another port.",
            )  # fmt: skip


def _unshared(examined: Examined, needs: Needs) -> Iterator[Finding]:
    for label, hosts in examined.unshared.items():
        yield Finding(
            "error" if label in needs.shared else "warning", "shared", tuple(hosts),
            f"--{label} is not the same directory on all hosts", spread(hosts),
            "Give a directory of a file system that all hosts share.",
        )  # fmt: skip


def _links(examined: Examined) -> Iterator[Finding]:
    """One finding for each target and purpose: a firewall or a wrong address shows as many broken pairs."""
    broken: dict[tuple[str, str, str], dict[str, str]] = {}
    for link in examined.links:
        if link.problem:
            broken.setdefault((link.target, link.purpose, link.address), {})[link.source] = link.problem
    for (target, purpose, address), sources in broken.items():
        yield Finding(
            "error", "reach", (target,), f"cannot be reached at {address}, which {purpose} would use",
            "from " + spread(sources), _ELSEWHERE if is_loopback(address) else _FIREWALL,
        )  # fmt: skip
