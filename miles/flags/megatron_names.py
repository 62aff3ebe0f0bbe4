"""Every flag of Megatron-LM's parser that no other table has: refused by name, with its type, choices and reason.

Names stand in ``megatron_names.json``, reasons in ``megatron_refused``. What says what is done anyway (a fusion off)
stands with the group that it belongs to, not here.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from miles.flags.flag import Flag, Kind, Plain, Source
from miles.flags.megatron_refused import reasons

GROUP = "Megatron-LM (refused)"

_KINDS: dict[str, Kind] = {"StoreTrue": "switch", "StoreFalse": "off", "BooleanOptional": "tri"}
_TYPES: dict[str, Kind] = {"int": "int", "float": "float", "bool": "yesno"}


@dataclass(frozen=True, slots=True)
class MegatronFlag:
    """A flag as Megatron-LM's parser has it.

    ``action``: argparse's, ``type``: the name of what converts a word, ``nargs``: None is one value, 0 none.
    """

    names: tuple[str, ...]
    dest: str
    action: str
    type: str | None
    default: Plain
    choices: tuple[Plain, ...]
    nargs: str | int | None

    @property
    def kind(self) -> Kind:
        """In our words."""
        return _KINDS.get(self.action) or _TYPES.get(self.type or "", "str")


@cache
def megatron_flags() -> tuple[MegatronFlag, ...]:
    """All flags of Megatron-LM's parser."""
    table = json.loads(files("miles.flags").joinpath("megatron_names.json").read_text())
    return tuple(
        MegatronFlag(tuple(names), dest, action, kind, default, tuple(choices or ()), nargs)
        for names, dest, action, kind, default, choices, nargs in table["flags"]
    )


def refused_megatron_flags(taken: Collection[str]) -> tuple[Flag, ...]:
    """A refused flag for each row of which no name is in ``taken``."""
    source: Source = "megatron"
    why = reasons()
    return tuple(
        Flag(
            row.names[:1] if row.kind == "tri" else row.names,
            row.dest,
            row.kind,
            row.default,
            group=GROUP,
            choices=row.choices,
            nargs=row.nargs if row.action == "Store" else None,
            source=source,
            only=(),
            reason=why[row.names[0]],
        )
        for row in megatron_flags()
        if not set(row.names) & set(taken)
    )
