"""What has to be alike for two workers to come from one zygote. Pure.

A variable is read by loaders, allocators and imports once, when the zygote starts; a worker that needs another value
then needs another zygote. ``is_late`` names those that are known to be read when they are used, or by our own code
after the fork, and that differ by rank or run: they are set after the fork.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

LATE_NAMES = frozenset(
    {
        "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "GROUP_RANK", "GROUP_WORLD_SIZE",
        "ROLE_RANK", "ROLE_WORLD_SIZE", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT",
        "PWD", "OLDPWD", "SHLVL", "_",
    }
)  # fmt: skip
"""Those of torchrun, and what shells leave behind."""

LATE_PREFIXES = ("MILES_", "NCCL_", "GLOO_", "WANDB_", "TORCHELASTIC_")
"""Families that are read when a process group or a tracker is made."""

LATE_SUFFIX = "_proxy"
"""``http_proxy`` and its like, in any case of letters: read per connection."""


def is_late(name: str) -> bool:
    """Whether this variable may be set after the imports."""
    return name in LATE_NAMES or name.startswith(LATE_PREFIXES) or name.lower().endswith(LATE_SUFFIX)


def profile_environment(env: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """What of a worker's environment has to be there when its zygote is executed; sorted."""
    return tuple(sorted((name, value) for name, value in env.items() if not is_late(name)))


@dataclass(frozen=True, slots=True)
class Profile:
    """Of a zygote, and of the workers that it can make. Two with equal fields are one.

    Attributes:
        python: The interpreter.
        cwd: Where it is executed: ``python -m`` finds modules there.
        env: ``profile_environment`` of its workers. Never shown: it may hold secrets.
        modules: What it imports beside the runtime, sorted, without repeats.
        sys_path: Entries behind its own, where a module is not found without them; else empty.
    """

    python: str
    cwd: Path
    env: tuple[tuple[str, str], ...]
    modules: tuple[str, ...] = ()
    sys_path: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """For people: the modules, and a mark that tells apart profiles with the same ones."""
        text = repr((self.python, str(self.cwd), self.env, self.modules, self.sys_path))
        mark = hashlib.sha256(text.encode()).hexdigest()[:6]
        return f"{'+'.join(self.modules) or 'runtime'}-{mark}"
