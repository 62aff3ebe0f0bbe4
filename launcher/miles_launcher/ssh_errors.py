"""Why a host cannot be used, as an error of its own kind each, from what ssh or the host said. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from miles_agents.errors import ConfigError, EnvironmentFault, MilesError


class HostUnreachable(EnvironmentFault):
    """ssh does not get through to a host."""

    code = "E-SSH-001"


class LoginRefused(EnvironmentFault):
    """A host does not let the user in without a question."""

    code = "E-SSH-002"


class HostKeyRefused(EnvironmentFault):
    """ssh does not know a host's key, or knows another one."""

    code = "E-SSH-003"


class NoPython(EnvironmentFault):
    """The interpreter of the run is not on a host, or too old there."""

    code = "E-SSH-004"


class PackagesMissing(EnvironmentFault):
    """What the run needs is not installed on a host."""

    code = "E-SSH-005"


class CodeDiffers(EnvironmentFault):
    """The code on a host is not the code here."""

    code = "E-SSH-006"


class VersionsDiffer(EnvironmentFault):
    """A package has another version on a host than here."""

    code = "E-SSH-007"


class HostEnded(EnvironmentFault):
    """What was started on a host ended before its agent had joined."""

    code = "E-SSH-008"


class CodeNotCopied(EnvironmentFault):
    """rsync could not copy the code to a host."""

    code = "E-SSH-009"


class HostsFailed(EnvironmentFault):
    """Several hosts cannot be used."""

    code = "E-SSH-010"


class NoCommonAddress(ConfigError):
    """It is not clear at which address hosts reach this machine."""

    code = "E-SSH-011"


class NotShared(ConfigError):
    """A directory that several hosts have to see is not the same one on all."""

    code = "E-SSH-012"


class NoDirectory(EnvironmentFault):
    """A host's home directory cannot be written."""

    code = "E-SSH-013"


_KEY = re.compile(r"Host key verification failed|REMOTE HOST IDENTIFICATION HAS CHANGED|host key is known")
_LOGIN = re.compile(
    r"Permission denied \(|Permission denied, please|Too many authentication failures|No supported authentication"
)
_NO_PYTHON = re.compile(r"not found|No such file|cannot execute|Permission denied|Exec format error", re.IGNORECASE)
SSH_FAILED = 255


def from_exit(host: str, code: int, tail: str, *, python: str) -> MilesError:
    """Of a start whose ssh has ended. ``tail``: the last lines on its stderr."""
    how = f"ssh exited with code {code}" if code >= 0 else f"ssh was killed by signal {-code}"
    evidence = f"{how}; it wrote last:\n{tail}"
    if code == SSH_FAILED and _KEY.search(tail):
        return HostKeyRefused(
            f"{host}: ssh does not accept its host key",
            evidence=evidence,
            advice=f"Make sure that it is the right machine, then log in once by hand (ssh {host}) or correct "
            "known_hosts.",
        )
    if code == SSH_FAILED and _LOGIN.search(tail):
        return LoginRefused(
            f"{host}: login refused",
            evidence=evidence,
            advice=f"`ssh -o BatchMode=yes {host} true` has to work: load your key into the agent (ssh-add), or name "
            "key and user in your ssh configuration.",
        )
    if code == SSH_FAILED:
        return HostUnreachable(
            f"{host}: ssh does not get through",
            evidence=evidence,
            advice=f"`ssh -o BatchMode=yes {host} true` has to work: check name, port, network and ProxyJump.",
        )
    if code in (126, 127) and _NO_PYTHON.search(tail):
        return NoPython(
            f"{host}: {python} cannot be run",
            evidence=evidence,
            advice="Name the interpreter there with --remote-python, or python= in the hostfile.",
        )
    return HostEnded(
        f"{host}: what was started there ended before its agent had joined",
        evidence=evidence,
        advice="Look at the lines above; what the host's login shell prints or runs may be the cause, too.",
    )


def from_host(host: str, facts: Mapping[str, Any], here: Mapping[str, str]) -> MilesError:
    """Of what the host said itself (``remote_start``). ``here``: digests of our files."""
    kind, text = str(facts.get("error")), str(facts.get("text"))
    if kind == "python":
        return NoPython(f"{host}: its Python is too old", evidence=text, advice="Name another with --remote-python.")
    if kind == "modules":
        return PackagesMissing(
            f"{host}: packages are missing",
            evidence=text,
            advice="Install them there, name the interpreter that has them with --remote-python, or, for code of ours, "
            "give --sync-code.",
        )
    if kind == "versions":
        return VersionsDiffer(
            f"{host}: packages have other versions than here",
            evidence=text,
            advice="Install the same versions on all machines.",
        )
    if kind == "code":
        return CodeDiffers(
            f"{host}: its code is not the code here",
            evidence=_difference(facts.get("files") or {}, here) + f"; found in {facts.get('places')}",
            advice="Use the same directory on a shared filesystem, update the copy there, or give --sync-code.",
        )
    if kind in ("rsync", "copy"):
        return CodeNotCopied(
            f"{host}: the code cannot be copied", evidence=text, advice="Install rsync there, or leave --sync-code out."
        )
    return NoDirectory(
        f"{host}: {text.partition(':')[0]}", evidence=text, advice="Make the home directory there writable."
    )


def not_copied(host: str, text: str) -> CodeNotCopied:
    """rsync ended with an error."""
    return CodeNotCopied(
        f"{host}: the code cannot be copied",
        evidence=text,
        advice="Look at what rsync says; it uses the same ssh as everything else.",
    )


def all_failed(failed: Mapping[str, MilesError], num_hosts: int) -> MilesError:
    """One error of all: that of the host, if it is only one."""
    if len(failed) == 1:
        return next(iter(failed.values()))
    lines = [f"{error.what} [{error.code}]: {_last_line(error.evidence)}" for error in failed.values()]
    advice = dict.fromkeys(error.advice for error in failed.values() if error.advice)
    return HostsFailed(
        f"{len(failed)} of {num_hosts} hosts cannot be used",
        evidence="\n".join(lines),
        advice=" ".join(advice),
        hosts=sorted(failed),
    )


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def _difference(there: Mapping[str, str], here: Mapping[str, str]) -> str:
    names = sorted(name for name in {*there, *here} if there.get(name) != here.get(name))
    shown = ", ".join(
        f"{name} ({'missing there' if name not in there else 'only there' if name not in here else 'changed'})"
        for name in names[:5]
    )
    return f"{len(names)} files differ: {shown}" + (", ..." if len(names) > 5 else "")
