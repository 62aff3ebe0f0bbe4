"""From what was typed and what is known to a config, or to all that is wrong. Pure: files and machine are facts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from miles.flags.draft import Draft
from miles.flags.facts import HOOKS, WRITTEN, Facts
from miles.flags.flag import Plain
from miles.flags.parse import Parsed
from miles.flags.path_facts import TEMPLATES
from miles.flags.problems import Problem, grouped
from miles.flags.ranges import check_ranges
from miles.flags.rules_algorithm import resolve_algorithm
from miles.flags.rules_async import resolve_async
from miles.flags.rules_data import resolve_batch, resolve_data, resolve_lengths
from miles.flags.rules_effect import tell_without_effect
from miles.flags.rules_engines import resolve_engines
from miles.flags.rules_eval import resolve_eval
from miles.flags.rules_generate import resolve_generate
from miles.flags.rules_lora import resolve_lora
from miles.flags.rules_model import resolve_checkpoints, resolve_model
from miles.flags.rules_mtp import resolve_mtp
from miles.flags.rules_nodes import resolve_nodes
from miles.flags.rules_parallel import resolve_parallel
from miles.flags.rules_replay import resolve_replay
from miles.flags.rules_reward import resolve_reward
from miles.flags.rules_run import resolve_backend, resolve_cluster, resolve_device, resolve_parts
from miles.flags.rules_tracking import resolve_tracking
from miles.flags.rules_trainer import resolve_trainer
from miles.flags.rules_training import resolve_training
from miles.flags.table import Table

RULES = (
    resolve_parts,
    resolve_nodes,
    resolve_device,
    resolve_backend,
    resolve_model,
    resolve_parallel,
    resolve_cluster,
    resolve_engines,
    resolve_batch,
    resolve_data,
    resolve_lengths,
    resolve_generate,
    resolve_algorithm,
    resolve_reward,
    resolve_eval,
    resolve_checkpoints,
    resolve_lora,
    resolve_training,
    resolve_trainer,
    resolve_replay,
    resolve_mtp,
    resolve_async,
    resolve_tracking,
)
"""In this order: each reads what those before it wrote."""

_MADE_ABSOLUTE = (
    "hf_checkpoint", "ref_load", "load", "save", "save_hf", "prompt_data", "eval_config", "critic_load",
    "opd_teacher_load", "lora_adapter_path", *WRITTEN,
)  # fmt: skip


@dataclass(frozen=True)
class Resolved:
    """The outcome. With problems, ``config`` is what it would have been as far as rules could tell; do not run it."""

    config: dict[str, Plain]
    problems: tuple[Problem, ...]
    notices: tuple[str, ...]


def with_defaults(parsed: Parsed, table: Table) -> dict[str, Plain]:
    """Every dest with its value: what was typed, else what user code's flags have, else the default."""
    return {**table.defaults(), **parsed.extra, **parsed.typed}


def resolve(parsed: Parsed, table: Table, facts: Facts) -> Resolved:
    """Derive and check everything."""
    draft = Draft(
        values=with_defaults(parsed, table),
        typed=frozenset(parsed.typed),
        spelled=dict(parsed.spelled),
        facts=facts,
        problems=list(parsed.problems),
        notices=list(parsed.notices),
        misread=frozenset(problem.flag for problem in parsed.problems),
    )
    check_ranges(draft, table)
    for rule in RULES:
        rule(draft)
    _check_hooks(draft)
    _resolve_environment(draft)
    _resolve_paths(draft)
    tell_without_effect(draft)
    draft["explicit_flags"] = sorted(parsed.typed)
    return Resolved(draft.values, tuple(grouped(draft.problems)), tuple(draft.notices))


def _check_hooks(draft: Draft) -> None:
    for dest in HOOKS:
        if dest in draft.typed and (why := draft.facts.hook_errors.get(draft[dest] or "")):
            draft.problem(
                dest,
                why,
                allowed="module.function",
                advice="Leave it out, or give a function of yours."
                if why.startswith("not built yet")
                else "Correct it, or add the directory of the module to PYTHONPATH.",
            )


def _resolve_environment(draft: Draft) -> None:
    """``env`` becomes a dict; ``--train-env-vars`` is one already."""
    draft["env"] = dict(entry.split("=", 1) for entry in draft["env"])
    variables = draft["train_env_vars"]
    if not isinstance(variables, dict) or not all(isinstance(value, str | int | float) for value in variables.values()):
        draft.problem(
            "train_env_vars",
            "not a JSON object of variables",
            allowed='such as {"NCCL_DEBUG": "INFO"}',
            advice="Give a JSON object.",
            value=str(variables),
        )
    else:
        draft["train_env_vars"] = {name: str(value) for name, value in variables.items()}
    for dest in ("apply_chat_template_kwargs",):
        if not isinstance(draft[dest], dict):
            draft.problem(
                dest, "not a JSON object", allowed="a JSON object", advice="Give a JSON object.", value=str(draft[dest])
            )


def _resolve_paths(draft: Draft) -> None:
    """Directories that are written can be; paths become absolute, because processes may work elsewhere."""
    if not draft["run_dir"]:
        draft["run_dir"] = draft.facts.default_run_dir
    for dest in WRITTEN:
        if why := draft.facts.unwritable.get(draft[dest] or ""):
            draft.problem(
                dest, f"cannot be written: {why}", allowed="a directory of yours", advice="Choose another directory."
            )
    for dest, why in draft.facts.path_errors.items():
        draft.problem(dest, why, allowed=_allowed_path(dest), advice="Correct the path.")
    if draft["offload_train_disk_dir"] is None:
        draft["offload_train_disk_dir"] = str(PurePosixPath(draft["run_dir"]) / "offload")
    for dest in dict.fromkeys(
        (
            *_MADE_ABSOLUTE,
            "save_debug_rollout_data",
            "load_debug_rollout_data",
            "save_debug_train_data",
            "save_debug_trajectory_data",
            "chat_template_path",
        )
    ):
        draft[dest] = _absolute(draft.facts.cwd, draft[dest])
    pairs: list[Any] = draft["eval_prompt_data"] or []
    if pairs and len(pairs) % 2 == 0:
        draft["eval_prompt_data"] = [
            _absolute(draft.facts.cwd, word) if place % 2 else word for place, word in enumerate(pairs)
        ]


def _allowed_path(dest: str) -> str:
    fields = " and ".join(f"{{{field}}}" for field in TEMPLATES.get(dest, ()))
    kind = "a directory" if dest == "memory_snapshot_dir" else "a file"
    return f"{kind} of yours" + (f"; its name may hold {fields}" if fields else "")


def _absolute(cwd: str, path: Plain) -> Plain:
    if not path or path.startswith("base64:"):
        return path
    return str(PurePosixPath(cwd) / path)
