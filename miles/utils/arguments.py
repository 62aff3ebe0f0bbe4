"""``args``, as user code knows it: a namespace with the reference system's attribute names, made of the config."""

from __future__ import annotations

import argparse
import copy
import logging
import sys
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from miles.utils.eval_config import EvalDatasetConfig

logger = logging.getLogger(__name__)


class Arguments(argparse.Namespace):
    """The run's values as attributes, one object per process.

    A change stays in the process that makes it, and is logged once per attribute. A feature that is not built has the
    value that says so (``num_experts`` is None).
    """

    __slots__ = ("_frozen", "_told")

    def __getattr__(self, name: str) -> Any:
        off = _features_off()
        if name in off:
            return off[name]
        raise AttributeError(f"there is no argument {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self.__slots__:
            self._tell(name, value)
        super().__setattr__(name, value)

    def _tell(self, name: str, value: Any) -> None:
        try:
            frozen, told = self._frozen, self._told
        except AttributeError:
            return  # being made
        if name not in told and (name not in frozen or frozen[name] != value):
            told.add(name)
            logger.warning("args.%s is changed by code; the change stays in this process", name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, argparse.Namespace) and vars(self) == vars(other)

    __hash__ = None  # mutable

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in vars(self).items())})"


@cache
def _features_off() -> dict[str, Any]:
    from miles.flags.table import table

    return table().absent()


def namespace(config: Mapping[str, Any]) -> Arguments:
    """``args`` of a config. It shares nothing with the config, which stays as it is."""
    values = copy.deepcopy(dict(config))
    if isinstance(values.get("eval_datasets"), list):  # user code reads attributes of each
        values["eval_datasets"] = [EvalDatasetConfig(**entry) for entry in values["eval_datasets"]]
    args = Arguments(**values)
    args._told = set()
    args._frozen = copy.deepcopy(dict(config))
    return args


def parse_args(add_custom_arguments: Callable[[argparse.ArgumentParser], object] | None = None) -> Arguments:
    """Read ``sys.argv`` in this process: for programs that are written for the reference system.

    Args:
        add_custom_arguments: Adds flags of the program's own to the parser.

    Raises:
        FlagProblems: Everything that is wrong with the flags.
    """
    from miles.flags.entry import resolve_argv
    from miles.flags.problems import FlagProblems

    resolved = resolve_argv(sys.argv[1:], [add_custom_arguments] if add_custom_arguments else [])
    for notice in resolved.notices:
        logger.info("%s", notice)
    if resolved.problems:
        raise FlagProblems(resolved.problems)
    return namespace(resolved.config)
