"""Addresses: ``tcp://host:port`` between nodes, ``unix:///path`` within one; and where it is safe to listen."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Literal

from miles_agents.errors import ConfigError, EnvironmentFault

MAX_SOCKET_PATH_BYTES = 107
"""Of a unix socket's path, as the kernel has it."""


class InsecureAddress(ConfigError):
    """A tcp address without keys, without an allow list, or on every interface unasked."""

    code = "E-ADDR-001"


class UnsafeDirectory(EnvironmentFault):
    """The directory of a unix socket is missing, not ours, or open to others."""

    code = "E-ADDR-002"


class BadAddress(ConfigError):
    """Neither ``tcp://host:port`` nor ``unix:///path``, the wrong one of them, or a path too long for a socket."""

    code = "E-ADDR-003"


class AddressUnavailable(EnvironmentFault):
    """The system does not let us listen on an address (in use, not ours, no permission)."""

    code = "E-ADDR-004"


def split_address(address: str, scheme: Literal["tcp", "unix"]) -> str:
    """What follows the scheme: ``host:port``, or the absolute path of a socket.

    Raises:
        BadAddress: another scheme, a missing host or port, a path that is relative, abstract or too long.
    """
    found, separator, rest = address.partition("://")
    problem = ""
    if not separator or found != scheme:
        problem = f"the scheme is not {scheme}"
    elif scheme == "tcp" and not all(rest.rpartition(":")):
        problem = "a tcp address needs a host and a port"
    elif scheme == "unix" and (not rest.startswith("/") or "\0" in rest):
        problem = "a unix address needs an absolute path (abstract sockets have no permissions)"
    elif scheme == "unix" and len(os.fsencode(rest)) > MAX_SOCKET_PATH_BYTES:
        problem = f"the path has {len(os.fsencode(rest))} bytes, more than the {MAX_SOCKET_PATH_BYTES} of a socket"
    if problem:
        raise BadAddress(
            f"{address!r} is not an address that we can use",
            evidence=problem,
            advice="Use tcp://HOST:PORT between machines, unix:// with a short absolute path within one.",
        )
    return rest


def check_socket_directory(socket_path: Path) -> None:
    """The directory of ``socket_path`` must be ours and closed to everybody else.

    Raises:
        UnsafeDirectory: missing, a link, owned by another user, or group or others may enter it.
    """
    directory = socket_path.parent
    try:
        facts = directory.lstat()
    except OSError as error:
        problem = f"{type(error).__name__}: {error.strerror}"
    else:
        mode = stat.S_IMODE(facts.st_mode)
        if not stat.S_ISDIR(facts.st_mode):
            problem = "it is not a directory (links are not followed)"
        elif facts.st_uid != os.geteuid():
            problem = f"it belongs to user id {facts.st_uid}, we are {os.geteuid()}"
        elif mode & 0o077:
            problem = f"its mode is {mode:04o}, others can reach the socket"
        else:
            return
    raise UnsafeDirectory(
        f"cannot put a socket into {directory}",
        evidence=problem,
        advice=f"Create it for yourself only: mkdir -m 0700 {directory}",
    )
