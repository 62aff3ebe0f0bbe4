"""Machines of a run as they are written: ``--hosts`` with ranges, and files in the formats of OpenMPI and DeepSpeed.

Pure: text in, ``Host``s or ``HostProblem``s out. A file may say more of a host than those formats know:

    # name            slots               further words, all optional
    node-1            slots=8 max_slots=8
    alice@gpu[2-4]    slots=8 port=2222 python=/opt/venv/bin/python env.NCCL_SOCKET_IFNAME=eth1
    10.0.0.9          user=alice env.NOTE="two words"
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

MAX_HOSTS = 65536
_SSH_PORT = 22
MAX_NAME = 64
_WORD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_ADDRESS = re.compile(r"[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*")
_VARIABLE = re.compile(r"[A-Za-z_]\w*")
_RANGE = re.compile(r"([0-9]+)(?:-([0-9]+))?")


@dataclass(frozen=True, slots=True)
class Host:
    """One machine.

    Attributes:
        name: Its node's name in the run: that of the host, where it can be one.
        host: As ssh takes it: a name, an address, or an alias of the user's ssh configuration.
        slots: Devices that it offers; None: all of its GPUs, or the run's number of CPU slots.
        user, port: For ssh; unset: what the user's ssh configuration says.
        python: Interpreter there; unset: that of the run.
        env: Variables of everything that runs there.
    """

    name: str
    host: str
    slots: int | None = None
    user: str | None = None
    port: int | None = None
    python: str | None = None
    env: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """As the config holds it."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class HostProblem:
    """What is wrong. ``line``: in the file, from 1; 0 in ``--hosts``."""

    text: str
    line: int = 0

    def __str__(self) -> str:
        return f"line {self.line}: {self.text}" if self.line else self.text


class _Wrong(ValueError):
    """What is wrong with a word."""


def parse_hosts(text: str) -> tuple[list[Host], list[HostProblem]]:
    """Of ``--hosts``: ``node[1-4],alice@other:2222``."""
    hosts: list[Host] = []
    problems: list[HostProblem] = []
    try:
        for word in split_words(text):
            user, name, port = _parts(word)
            hosts += [_host(one, user=user, port=port) for one in expand(name)]
            if len(hosts) > MAX_HOSTS:
                raise _Wrong(f"more than {MAX_HOSTS} hosts")
        if not hosts:
            raise _Wrong("it names no host")
    except _Wrong as wrong:
        problems.append(HostProblem(str(wrong)))
    twice = _twice([(host, 0) for host in hosts])
    return ([], problems + twice) if problems or twice else (hosts, [])


def parse_hostfile(text: str) -> tuple[list[Host], list[HostProblem]]:
    """Of a file: one host, or one range of hosts, in each line; ``#`` begins a comment."""
    found: list[tuple[Host, int]] = []
    problems: list[HostProblem] = []
    for number, line in enumerate(text.removeprefix("\ufeff").splitlines(), 1):
        try:
            words = shlex.split(line, comments=True)
            if not words:
                continue
            name, further = words[0], dict(_fields(words[1:]))
            user, name, port = _parts(name)
            if port is not None and port < _SSH_PORT:  # a machine file of MPICH: so many processes
                raise _Wrong(f"{words[0]!r}: write slots={port} if that many devices are meant, port={port} for a port")
            found += [(_host(one, **{"user": user, "port": port, **further}), number) for one in expand(name)]
            if len(found) > MAX_HOSTS:
                raise _Wrong(f"more than {MAX_HOSTS} hosts")
        except ValueError as wrong:  # also of shlex: a quotation without end
            problems.append(HostProblem(str(wrong), number))
    problems += _twice(found)
    if not found and not problems:
        problems.append(HostProblem("it names no host"))
    return ([], problems) if problems else ([host for host, _ in found], [])


def split_words(text: str) -> list[str]:
    """At commas outside of brackets."""
    words, depth = [""], 0
    for letter in text:
        depth += {"[": 1, "]": -1}.get(letter, 0)
        if letter == "," and depth == 0:
            words.append("")
        else:
            words[-1] += letter
    return [word.strip() for word in words if word.strip()]


def expand(word: str) -> list[str]:
    """``r[1-2]n[01,07-08]``: as Slurm writes lists of nodes; zeros in front are kept. Raises ValueError."""
    head, bracket, rest = word.partition("[")
    if not bracket:
        if "]" in word:
            raise _Wrong(f"{word!r}: a bracket is closed that was not opened")
        return [word]
    inside, closed, tail = rest.partition("]")
    if not closed:
        raise _Wrong(f"{word!r}: a bracket is not closed")
    numbers = list(_numbers(inside, word))
    ends = expand(tail)
    if len(numbers) * len(ends) > MAX_HOSTS:
        raise _Wrong(f"{word!r}: more than {MAX_HOSTS} hosts")
    return [head + number + end for number in numbers for end in ends]


def _numbers(inside: str, word: str) -> Iterator[str]:
    for part in inside.split(","):
        match = _RANGE.fullmatch(part.strip())
        if match is None:
            raise _Wrong(f"{word!r}: {part!r} is neither a number nor a range such as 1-4")
        first, last = match[1], match[2] or match[1]
        if int(last) < int(first):
            raise _Wrong(f"{word!r}: the range {part} ends before it begins")
        if int(last) - int(first) >= MAX_HOSTS:
            raise _Wrong(f"{word!r}: more than {MAX_HOSTS} hosts")
        for number in range(int(first), int(last) + 1):
            yield str(number).zfill(len(first))


def _parts(word: str) -> tuple[str | None, str, int | None]:
    """User, host (perhaps with ranges), port."""
    user, at, name = word.rpartition("@")
    if at and not _WORD.fullmatch(user):
        raise _Wrong(f"{word!r}: {user!r} is no user name")
    if _ADDRESS.fullmatch(name):
        return user or None, name, None
    if name.startswith("[") and (inside := name[1:].partition("]"))[1] and _ADDRESS.fullmatch(inside[0]):
        if inside[2] and not inside[2].startswith(":"):
            raise _Wrong(f"{word!r}: write an address of IPv6 with a port as [ADDRESS]:PORT")
        return user or None, inside[0], _port(inside[2][1:], word) if inside[2] else None
    if name.count(":") > 1:
        raise _Wrong(f"{word!r} is no address of IPv6; with a port it is written as [ADDRESS]:PORT")
    name, colon, port = name.partition(":")
    return user or None, name, _port(port, word) if colon else None


def _port(text: str, word: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise _Wrong(f"{word!r}: {text!r} is no port from 1 to 65535")
    return int(text)


def _fields(words: list[str]) -> Iterator[tuple[str, Any]]:
    """Of the words behind a host's name."""
    env: dict[str, str] = {}
    most: int | None = None
    slots: int | None = None
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise _Wrong(f"{word!r} is not KEY=VALUE")
        if key in ("slots", "max_slots", "max-slots"):
            if not value.isdecimal() or int(value) < 1:
                raise _Wrong(f"{word!r}: a number from 1 is needed")
            slots, most = (int(value), most) if key == "slots" else (slots, int(value))
        elif key == "port":
            yield "port", _port(value, word)
        elif key == "user" and _WORD.fullmatch(value):
            yield "user", value
        elif key == "python" and value:
            yield "python", value
        elif key.startswith("env.") and _VARIABLE.fullmatch(key[4:]):
            env[key[4:]] = value
        else:
            raise _Wrong(f"{word!r} is not understood; known are slots=, max_slots=, user=, port=, python=, env.NAME=")
    if slots is not None and most is not None and most < slots:
        raise _Wrong(f"slots={slots} is more than max_slots={most}")
    yield "slots", slots if slots is not None else most
    yield "env", env


def _host(host: str, **further: Any) -> Host:
    if _ADDRESS.fullmatch(host):
        return Host(f"ip6-{host.replace(':', '-').strip('-')}", host, **further)
    if not _WORD.fullmatch(host):
        raise _Wrong(f"{host!r} is no host name")
    name = host.lstrip("_")
    if len(name) > MAX_NAME or not name:
        raise _Wrong(f"{host!r} cannot name a node: 1 to {MAX_NAME} letters are needed; use an alias of ssh's")
    return Host(name, host, **further)


def _twice(found: list[tuple[Host, int]]) -> list[HostProblem]:
    first: dict[str, int] = {}
    problems = []
    for host, line in found:
        if host.name in first:
            where = f", first in line {first[host.name]}" if line else ""
            problems.append(HostProblem(f"{host.host} is named twice{where}", line))
        first.setdefault(host.name, line)
    return problems
