"""Rules: ``--sglang-config``, the groups of engines of a run, each with settings of its own.

The file has ``server_groups``, a list; or ``models`` (or ``sglang``), a list of which each entry has such a list. A
group has ``num_gpus``, and may have ``worker_type``, ``num_gpus_per_engine`` and ``overrides``: arguments of SGLang.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from miles.flags.draft import Draft
from miles.flags.flag import Flag, Plain
from miles.flags.parse import convert
from miles.flags.problems import listed, shown

DEST = "sglang_config"
GROUPS = "engine_groups"
"""Key of the resolved config: a list of ``{"num_engines", "num_gpus_per_engine", "overrides"}``; None: all alike."""
_OF_GROUP = ("worker_type", "num_gpus", "num_gpus_per_engine", "overrides")
_OF_MODEL = ("name", "model_path", "update_weights", "num_gpus_per_engine", "server_groups")
_NOT_BUILT = {
    "prefill": "not built yet: prefill and decode apart",
    "decode": "not built yet: prefill and decode apart",
    "placeholder": "not built yet: GPUs that are kept free",
}
_SIZE = "it is num_gpus_per_engine of the group"
_DECIDED = {"tp_size": _SIZE, "tensor_parallel_size": _SIZE}
_ONLY_ONE = ("pp_size", "dp_size")


@dataclass(frozen=True)
class _Where:
    """Notes problems with the place in the file."""

    draft: Draft
    place: str

    def problem(self, what: str, *, allowed: str = "", advice: str, value: Plain = "") -> None:
        text = f"{self.place}: {what}" if self.place else what
        self.draft.problem(DEST, text, allowed=allowed, advice=advice, value=shown(value) or None)

    def inside(self, name: str) -> _Where:
        return _Where(self.draft, f"{self.place}.{name}" if self.place else name)


def resolve_groups(draft: Draft) -> None:
    """Fill ``engine_groups``, and the number of GPUs that the file asks for."""
    draft[GROUPS] = None
    if not draft[DEST] or not draft.generates:
        return
    facts, where = draft.facts.engines, _Where(draft, "")
    if facts.topology_error or facts.arguments_error:
        where.problem(
            facts.topology_error or f"SGLang's arguments cannot be checked: {facts.arguments_error}",
            allowed="a YAML file with server_groups",
            advice="Correct the file." if facts.topology_error else "Install SGLang.",
        )
        return
    for other in ("prefill_num_servers", "rollout_external"):
        if draft.values.get(other):
            where.problem(
                f"it cannot be combined with {draft.flag(other)}", advice=f"Leave out it or {draft.flag(other)}."
            )
    groups = _groups(where, facts.topology)
    if not groups:
        return
    total = sum(group["num_engines"] * group["num_gpus_per_engine"] for group in groups)
    _add_up(draft, where, total)
    draft[GROUPS] = groups


def _add_up(draft: Draft, where: _Where, total: int) -> None:
    world = draft["actor_num_nodes"] * draft["actor_num_gpus_per_node"]
    if draft["colocate"]:
        if draft.trains and total != world:
            where.problem(
                f"its groups have {total} GPUs in all, the trainer, which shares them, has {world}",
                allowed=f"{world} in all",
                advice="Change num_gpus of the groups.",
            )
    elif "rollout_num_gpus" in draft.typed and draft["rollout_num_gpus"] != total:
        where.problem(
            f"its groups have {total} GPUs in all, and there is {draft.flag('rollout_num_gpus')} "
            f"{draft['rollout_num_gpus']}",
            allowed=f"{draft['rollout_num_gpus']} in all",
            advice=f"Leave {draft.flag('rollout_num_gpus')} out, or change num_gpus of the groups.",
        )
    draft["rollout_num_gpus"] = total


def _groups(where: _Where, topology: Any) -> list[dict[str, Any]]:
    if not isinstance(topology, dict):
        where.problem("does not hold server_groups", allowed="server_groups: [...]", advice="Correct the file.")
        return []
    models_key = next((key for key in ("models", "sglang") if key in topology), None)
    _only(where, topology, ("server_groups", *([models_key] if models_key else [])))
    if models_key is None:
        return _of_list(where.inside("server_groups"), topology.get("server_groups"), None)
    models = topology[models_key]
    if isinstance(models, dict):
        models = [models]
    inside = where.inside(models_key)
    if not isinstance(models, list) or not models or not all(isinstance(model, dict) for model in models):
        inside.problem("is no list of models", allowed="one model", advice="Correct the file.")
        return []
    if len(models) > 1:
        names = ", ".join(str(model.get("name") or place) for place, model in enumerate(models))
        inside.problem(f"not built yet: several models ({names})", allowed="one model", advice="Leave the others out.")
    found = [_of_model(inside.inside(str(place)), model) for place, model in enumerate(models)]
    return found[0]


def _of_model(where: _Where, model: dict[str, Any]) -> list[dict[str, Any]]:
    _only(where, model, _OF_MODEL)
    path, trained = model.get("model_path"), where.draft["hf_checkpoint"]
    if path not in (None, trained):
        where.inside("model_path").problem(
            "not built yet: a model other than the one that is trained",
            value=path,
            allowed=str(trained),
            advice="Leave model_path out.",
        )
    if model.get("update_weights", True) is not True:
        where.inside("update_weights").problem(
            "not built yet: engines whose weights stay as they are", allowed="true", advice="Leave it out."
        )
    return _of_list(where.inside("server_groups"), model.get("server_groups"), model.get("num_gpus_per_engine"))


def _of_list(where: _Where, groups: Any, per_engine: Any) -> list[dict[str, Any]]:
    if not isinstance(groups, list) or not groups:
        where.problem("there is no group", allowed="a list of groups", advice="Add one with num_gpus.")
        return []
    found = [_group(where.inside(str(place)), group, per_engine) for place, group in enumerate(groups)]
    return [group for group in found if group is not None]


def _group(where: _Where, group: Any, per_engine: Any) -> dict[str, Any] | None:
    if not isinstance(group, dict):
        where.problem("is no group", allowed="num_gpus: N", advice="Correct the file.")
        return None
    _only(where, group, _OF_GROUP)
    kind = group.get("worker_type", "regular")
    if kind != "regular":
        where.inside("worker_type").problem(
            _NOT_BUILT.get(str(kind), "there is no such type"),
            value=kind,
            allowed="regular",
            advice="Leave the group out, or make it regular.",
        )
    size = group.get("num_gpus_per_engine", per_engine or where.draft["rollout_num_gpus_per_engine"])
    gpus = group.get("num_gpus")
    numbers = [("num_gpus", gpus), ("num_gpus_per_engine", size)]
    bad = [(name, value) for name, value in numbers if type(value) is not int or value < 1]
    for name, value in bad:
        where.inside(name).problem(
            "is no number of GPUs" if value is not None else "is missing",
            value=value,
            allowed="1 or more",
            advice="Correct the file.",
        )
    overrides = _overrides(where.inside("overrides"), group.get("overrides"))
    if bad:
        return None
    if gpus % size:
        where.inside("num_gpus").problem(
            f"{gpus} GPUs cannot be divided into engines of {size}",
            allowed=f"a multiple of {size}",
            advice="Change it, or num_gpus_per_engine.",
        )
        return None
    return {"num_engines": gpus // size, "num_gpus_per_engine": size, "overrides": overrides}


def _overrides(where: _Where, overrides: Any) -> dict[str, Plain]:
    if overrides is None:
        return {}
    if not isinstance(overrides, dict):
        where.problem("is no mapping", allowed="argument: value", advice="Correct the file.")
        return {}
    known = where.draft.facts.engines.arguments
    found = {}
    for key, value in overrides.items():
        name = str(key).removeprefix("--").replace("-", "_")
        why, converted = _checked(name, value, known)
        if why:
            where.inside(str(key)).problem(why, value=value, advice="Leave it out, or correct it.")
        else:
            found[name] = converted
    return found


def _checked(name: str, value: Any, known: Mapping[str, Flag]) -> tuple[str, Plain]:
    """What is wrong with an override, or its value."""
    flag = known.get(name)
    if name in _DECIDED:
        return _DECIDED[name], None
    if flag is None:
        return "the installed SGLang has no such argument", None
    if flag.status == "refused":
        return f"refused: {flag.reason}", None
    if name in _ONLY_ONE and value != 1:
        return "not built yet: weight updates reach engines that are tensor parallel only", None
    try:
        if isinstance(value, list) and flag.nargs:
            return "", [convert(flag, item) for item in value]
        return "", convert(flag, value)
    except ValueError as error:
        return f"{error}: {listed(flag.choices) if flag.choices else flag.kind}", None


def _only(where: _Where, found: dict[Any, Any], known: tuple[str, ...]) -> None:
    for key in found:
        if key not in known:
            where.inside(str(key)).problem("there is no such key", allowed=listed(known), advice="Correct the file.")
