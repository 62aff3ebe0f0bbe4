"""Command lines of ssh and rsync, and what a host is sent first. Reads our own code; starts nothing."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from miles_launcher import remote_start

PACKAGES = ("miles", "miles_controller", "miles_agents", "miles_launcher")
MODULES = ("zmq", "msgpack", "psutil", "uvloop", "aiohttp")
"""Without these no agent starts."""
VERSIONS = (
    "torch", "sglang", "sglang-router", "megatron-core", "transformers", "safetensors", "numpy", "pyzmq", "msgpack",
)  # fmt: skip
COPY_S = 600.0
OPTIONS = (
    "BatchMode=yes",  # nobody sits at a terminal to answer
    "ConnectTimeout=20",
    "ServerAliveInterval=15",
    "ServerAliveCountMax=8",
    "ClearAllForwardings=yes",
    "RemoteCommand=none",
    "PermitLocalCommand=no",
)


@dataclass(frozen=True, slots=True)
class Machine:
    """A host as the config has it (``miles.flags.hosts.Host``)."""

    name: str
    host: str
    slots: int | None = None
    user: str | None = None
    port: int | None = None
    python: str | None = None
    env: Mapping[str, str] = field(default_factory=dict)


def with_share(machine: Machine, slots: int | None) -> Machine:
    """A machine whose agent offers GPUs: only the first ones, as many as it names, else ``slots``; None: all."""
    own = machine.slots or slots
    if own is None:
        return machine
    return replace(machine, env={"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(own))), **machine.env})


@dataclass(frozen=True, slots=True)
class Ssh:
    """The user's ssh. ``config``: a file in place of the user's configuration."""

    config: str | None = None

    def options(self, machine: Machine) -> list[str]:
        """For ssh, before the host's name; rsync is given them, too."""
        words = ["-T", "-x", "-a"]
        words += ["-F", self.config] if self.config else []
        words += [word for option in OPTIONS for word in ("-o", option)]
        words += ["-l", machine.user] if machine.user else []
        words += ["-p", str(machine.port)] if machine.port else []
        return words

    def command(self, machine: Machine, words: str) -> tuple[str, ...]:
        """``words``: one string, which the login shell there reads."""
        return ("ssh", *self.options(machine), "--", machine.host, words)

    def resolved(self, machine: Machine) -> tuple[str, ...]:
        """Prints what ssh would do, among it ``hostname`` and ``proxyjump``; connects to nobody."""
        return ("ssh", "-G", *self.options(machine), "--", machine.host)

    def copy(self, machine: Machine, sources: Sequence[str], target: str, *, further: Sequence[str]) -> tuple[str, ...]:
        """rsync of code into a directory there."""
        host = f"[{machine.host}]" if ":" in machine.host else machine.host
        shell = shlex.join(["ssh", *self.options(machine)])
        rest = ("--exclude=__pycache__", *further, "-e", shell, "--", *sources, f"{host}:{target}/")
        return ("rsync", "-rlpt", *rest)


def start_words(python: str) -> str:
    """What the login shell there runs: the loader, in place of the shell."""
    return remote_words(python, ("-c", remote_start.LOADER))


def remote_words(python: str, arguments: Sequence[str]) -> str:
    """What the login shell there runs: Python, in place of the shell."""
    home, rest = ("~/", python[2:]) if python.startswith("~/") else ("", python)
    return f"exec {home}{shlex.quote(rest)} {shlex.join(arguments)}"


@dataclass(frozen=True, slots=True)
class OwnCode:
    """Our packages as they are here.

    Attributes:
        places: Directory of each.
        files: Digest of each file.
    """

    places: Mapping[str, Path]
    files: Mapping[str, str]

    @classmethod
    def read(cls) -> OwnCode:
        """Of those that this process would import."""
        places = {}
        for name in PACKAGES:
            spec = importlib.util.find_spec(name)
            if spec is not None and spec.origin:
                places[name] = Path(spec.origin).parent
        files: dict[str, str] = {}
        for place in places.values():
            files.update(remote_start.digests(place))
        return cls(places, files)

    @property
    def path(self) -> list[str]:
        """Where they lie, to be looked for on hosts with the same filesystem."""
        return list(dict.fromkeys(str(place.parent) for place in self.places.values()))


@dataclass(frozen=True, slots=True)
class Run:
    """What all hosts of a run are told alike.

    Attributes:
        modules: Needed beyond ours.
        shared: Directories in which a token was written, with the token: whoever reads it sees the same directory.
        flags: Of ``miles agent``, beyond those of one host.
        env: Of everything that runs there.
    """

    run_id: str
    run_dir: Path
    code: OwnCode
    copies_code: bool
    modules: tuple[str, ...]
    shared: Mapping[str, str]
    flags: tuple[str, ...]
    env: Mapping[str, str]
    cwd: str = field(default_factory=os.getcwd)

    @property
    def token_file(self) -> str:
        """Its name in each of the shared directories."""
        return f".miles-shared-{self.run_id}"


def header(run: Run, machine: Machine, mark: str, flags: Sequence[str]) -> bytes:
    """The first line for a host. ``mark``: what its answers begin with."""
    head: dict[str, Any] = {
        "code": Path(remote_start.__file__).read_text(encoding="utf-8"),
        "mark": mark,
        "run": run.run_id,
        "node": machine.name,
        "python": [3, 11],
        "packages": list(PACKAGES),
        "modules": list(run.modules),
        "versions": remote_start.versions(list(VERSIONS)),
        "fingerprint": remote_start.fingerprint(dict(run.code.files)),
        "path": run.code.path,
        "copies_code": run.copies_code,
        "copy_s": COPY_S,
        "cwd": run.cwd,
        "run_dir": str(run.run_dir),
        "shared": dict(run.shared),
        "token_file": run.token_file,
        "flags": ["--node", machine.name, *run.flags, *flags],
        "env": {**run.env, **machine.env},
    }
    return json.dumps(head).encode() + b"\n"


def python_of(machine: Machine, default: str | None) -> str:
    """The interpreter there."""
    return machine.python or default or sys.executable


def copies(run: Run, directory: str, ssh: Ssh, machine: Machine) -> list[tuple[str, ...]]:
    """The calls of rsync that bring our packages and the user's code: small files beside the command, no data."""
    ours = [str(place) for place in run.code.places.values()]
    kinds = ("*.py", "*.json", "*.jsonl", "*.yaml", "*.yml", "*.jinja", "*.txt", "*.toml")
    left_out = ("--exclude=.*", "--exclude=/runs/", "--exclude=node_modules")
    taken = ("--include=*/", *(f"--include={kind}" for kind in kinds), "--exclude=*")
    users = ("--max-size=1m", "--prune-empty-dirs", *left_out, *taken)
    return [
        ssh.copy(machine, ours, f"{directory}/lib", further=()),
        ssh.copy(machine, [f"{run.cwd}/"], f"{directory}/cwd", further=users),
    ]
