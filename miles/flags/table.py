"""All flags, from all groups. Built once per process; imports neither torch nor argparse."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache, lru_cache, partial

from miles.flags import (
    group_algorithm,
    group_architecture,
    group_cluster,
    group_data,
    group_engines,
    group_experts,
    group_model,
    group_optimizer,
    group_parallelism,
    group_reward,
    group_running,
    group_sampling,
    group_tracking,
    retired,
)
from miles.flags.flag import Flag, Plain
from miles.flags.megatron_names import refused_megatron_flags
from miles.flags.similar import most_alike

OUR_GROUPS = (
    group_cluster,
    group_model,
    group_data,
    group_sampling,
    group_parallelism,
    group_algorithm,
    group_optimizer,
    group_reward,
    group_engines,
    group_running,
    group_tracking,
    group_architecture,
    group_experts,
    retired,
)


class Table:
    """Flags, found by name and by dest. Names are unique; several flags may share a dest."""

    def __init__(self, flags: Iterable[Flag]) -> None:
        self.flags = tuple(flags)
        self.by_name: Mapping[str, Flag] = {name: flag for flag in self.flags for name in spellings(flag)}
        by_dest: dict[str, Flag] = {}
        for flag in self.flags:
            if not flag.older:
                by_dest.setdefault(flag.dest, flag)
        self.by_dest: Mapping[str, Flag] = by_dest
        unlikely = {name for name, flag in self.by_name.items() if flag.status == "refused" or flag.older}
        self._most_alike = lru_cache(maxsize=256)(partial(most_alike, names=self.by_name, unlikely=unlikely))

    def nearest(self, name: str) -> str | None:
        """The known name that this one begins, if there is one such name, else the one that looks most like it."""
        begun = [known for known in self.by_name if known.startswith(name)]
        if len(begun) == 1:
            return begun[0]
        return self._most_alike(name)

    def defaults(self) -> dict[str, Plain]:
        """Default by dest, in the table's order. Left out are the flags of Megatron-LM that are refused, and those of
        installed packages, whose defaults are theirs."""
        values: dict[str, Plain] = {}
        for flag in self.flags:
            is_ours = flag.source not in {"sglang", "router"} and not flag.older
            if is_ours and (flag.source != "megatron" or flag.only != ()):
                values.setdefault(flag.dest, flag.default)  # the first of several with the same dest counts
        return values

    def absent(self) -> dict[str, Plain]:
        """Dest and default of Megatron-LM's flags that are refused, or older spellings, where it says that a feature is
        off."""
        return {
            flag.dest: flag.default
            for flag in self.flags
            if flag.source == "megatron"
            and (flag.only == () or flag.older)
            and (flag.default is None or flag.default is False)
        }

    def extended(self, flags: Iterable[Flag]) -> Table:
        """With further flags; those here keep the names that they have, unless they are only older spellings."""
        further = tuple(flags)
        known = {name for flag in further for name in spellings(flag)}
        kept = [flag for flag in self.flags if not (flag.older and set(flag.names) & known)]
        taken = {name for flag in kept for name in spellings(flag)}
        return Table((*kept, *(flag for flag in further if not set(spellings(flag)) & taken)))


def spellings(flag: Flag) -> tuple[str, ...]:
    """All that may be typed for a flag, the ``--no-`` twin of a tri-state one too."""
    if flag.kind != "tri":
        return flag.names
    return (*flag.names, *("--no-" + name.removeprefix("--") for name in flag.names))


@cache
def table() -> Table:
    """The flags that do not depend on what is installed."""
    ours = [flag for group in OUR_GROUPS for flag in group.FLAGS]
    names = {name for flag in ours for name in flag.names}
    return Table((*ours, *refused_megatron_flags(names)))
