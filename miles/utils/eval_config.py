"""Which data sets are evaluated, and how: ``--eval-config`` or ``--eval-prompt-data`` and the ``--eval-*`` flags.

For each setting the data set's own entry comes first, then ``eval.defaults`` of the file, then the ``--eval-*`` flag,
then the flag of training.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from miles_agents.errors import ConfigError


class BadEvalConfig(ConfigError):
    """The description of evaluation data sets cannot be used."""

    code = "E-DATA-010"


@dataclass
class EvalDatasetConfig:
    """One data set to evaluate.

    Attributes:
        n_samples_per_eval_prompt: Answers per prompt.
        metadata_overrides: Added to each sample's metadata.
    """

    name: str
    path: str
    rm_type: str | None = None
    custom_generate_function_path: str | None = None
    input_key: str = "prompt"
    label_key: str | None = "label"
    tool_key: str | None = None
    metadata_key: str = "metadata"
    n_samples_per_eval_prompt: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    max_response_len: int | None = None
    min_new_tokens: int | None = None
    max_prompt_len: int | None = None
    max_context_len: int | None = None
    apply_chat_template: bool | None = None
    stop: list[str] | None = None
    stop_token_ids: list[int] | None = None
    metadata_overrides: dict[str, Any] = field(default_factory=dict)


_FLAGS: Mapping[str, tuple[str, ...]] = {
    "input_key": ("eval_input_key", "input_key"),
    "label_key": ("eval_label_key", "label_key"),
    "tool_key": ("eval_tool_key", "tool_key"),
    "metadata_key": ("metadata_key",),
    "n_samples_per_eval_prompt": ("n_samples_per_eval_prompt",),
    "temperature": ("eval_temperature", "rollout_temperature"),
    "top_p": ("eval_top_p", "rollout_top_p"),
    "top_k": ("eval_top_k", "rollout_top_k"),
    "max_response_len": ("eval_max_response_len", "rollout_max_response_len"),
    "min_new_tokens": ("eval_min_new_tokens",),
    "max_prompt_len": ("eval_max_prompt_len", "rollout_max_prompt_len"),
    "max_context_len": ("eval_max_context_len", "rollout_max_context_len"),
    "stop": ("rollout_stop",),
    "stop_token_ids": ("rollout_stop_token_ids",),
}


Entries: TypeAlias = tuple[dict[str, Any], list[dict[str, Any]]]
"""``eval.defaults`` and ``eval.datasets`` as they are written."""


def eval_datasets(args: Any) -> list[EvalDatasetConfig]:
    """The data sets that the flags name; none without a flag. Of a run: those that were checked at its start.

    Raises:
        BadEvalConfig: The file or the flag cannot be used.
    """
    known = vars(args).get("eval_datasets")
    if known is not None:
        return [entry if isinstance(entry, EvalDatasetConfig) else EvalDatasetConfig(**entry) for entry in known]
    return resolve_entries(vars(args), read_entries(vars(args)))


def read_entries(values: Mapping[str, Any]) -> Entries:
    """What the file of ``--eval-config`` says, or ``--eval-prompt-data``.

    Raises:
        BadEvalConfig.
    """
    if values.get("eval_config"):
        return _from_file(str(values["eval_config"]))
    return {}, _from_flag(values.get("eval_prompt_data") or [])


def resolve_entries(values: Mapping[str, Any], entries: Entries) -> list[EvalDatasetConfig]:
    """The entries with all settings that they leave to defaults and flags. Pure.

    Raises:
        BadEvalConfig: A setting is unknown or of the wrong kind, or two data sets have one name.
    """
    defaults, found = entries
    names = [str(entry["name"]) for entry in found]
    double = sorted({name for name in names if names.count(name) > 1})
    if double:
        raise BadEvalConfig(
            f"two evaluation data sets are called {double[0]}",
            evidence=f"the names are: {', '.join(names)}",
            advice="Give each a name of its own: metrics have it.",
        )
    return [_resolved(values, defaults, entry) for entry in found]


def _from_flag(values: list[str]) -> list[dict[str, Any]]:
    if len(values) == 1:
        return [{"name": "aime", "path": values[0]}]
    if len(values) % 2:
        raise BadEvalConfig(
            "--eval-prompt-data takes pairs of a name and a path",
            evidence=f"{len(values)} values: {' '.join(values)}",
            advice="Write --eval-prompt-data NAME PATH [NAME PATH ...].",
        )
    return [{"name": name, "path": path} for name, path in zip(values[::2], values[1::2], strict=True)]


def _from_file(source: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    config = _parse(source)
    section = config.get("eval", config)
    entries = section.get("datasets") if isinstance(section, dict) else None
    if not isinstance(entries, list) or not all(
        isinstance(e, dict) and e.get("name") and e.get("path") for e in entries
    ):
        raise BadEvalConfig(
            f"--eval-config {source[:200]} names no data sets",
            evidence=f"its eval.datasets is {str(entries)[:200]}",
            advice="Give eval.datasets a list of entries with name and path.",
        )
    defaults = section.get("defaults") or {}
    if not isinstance(defaults, dict):
        raise _unreadable(source, ValueError(f"eval.defaults is {str(defaults)[:200]}, not a mapping"))
    return defaults, entries


def _parse(source: str) -> dict[str, Any]:
    try:
        if source.startswith("base64:"):
            text = base64.b64decode(source.removeprefix("base64:")).decode()
        else:
            text = Path(source).read_text(encoding="utf-8")
        config = json.loads(text) if text.lstrip().startswith("{") else _yaml(text)
    except (OSError, ValueError) as error:
        raise _unreadable(source, error) from error
    if not isinstance(config, dict):
        raise _unreadable(source, ValueError(f"it is a {type(config).__name__}, not a mapping"))
    return config


def _yaml(text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def _unreadable(source: str, error: Exception) -> BadEvalConfig:
    return BadEvalConfig(
        f"--eval-config {source[:200]} cannot be read", evidence=str(error), advice="Give a YAML or JSON file."
    )


def _resolved(values: Mapping[str, Any], defaults: dict[str, Any], entry: dict[str, Any]) -> EvalDatasetConfig:
    given = {**defaults, **{name: value for name, value in entry.items() if value is not None}}
    unknown = sorted(set(given) - set(_KINDS))
    if unknown:
        raise BadEvalConfig(
            f"evaluation data set {entry['name']}: unknown settings {', '.join(unknown)}",
            evidence=f"known are: {', '.join(sorted(_KINDS))}",
            advice="Correct the spelling.",
        )
    for name, value in given.items():
        if value is not None and not _is_of(_KINDS[name], value):
            raise BadEvalConfig(
                f"evaluation data set {entry['name']}: {name} is not {_KINDS[name]}",
                evidence=f"it is {value!r}",
                advice="Correct the value.",
            )
    for name, flags in _FLAGS.items():
        typed = [values.get(flag) for flag in flags]
        value = next((v for v in typed if v is not None), None)
        if given.get(name) is None and value is not None:
            given[name] = value
    return EvalDatasetConfig(**{name: value for name, value in given.items() if value is not None})


_TEXT, _COUNT, _NUMBER, _SWITCH = "a text", "a whole number", "a number", "true or false"
_MAPPING = "a mapping that JSON can hold"
_KINDS: Mapping[str, str] = {
    **dict.fromkeys(("name", "path", "rm_type", "custom_generate_function_path"), _TEXT),
    **dict.fromkeys(("input_key", "label_key", "tool_key", "metadata_key"), _TEXT),
    **dict.fromkeys(("n_samples_per_eval_prompt", "top_k", "max_response_len", "min_new_tokens"), _COUNT),
    **dict.fromkeys(("max_prompt_len", "max_context_len"), _COUNT),
    **dict.fromkeys(("temperature", "top_p"), _NUMBER),
    "apply_chat_template": _SWITCH,
    "stop": "a list of texts",
    "stop_token_ids": "a list of whole numbers",
    "metadata_overrides": _MAPPING,
}


def _is_of(kind: str, value: Any) -> bool:
    if kind == _SWITCH or isinstance(value, bool):
        return kind == _SWITCH and isinstance(value, bool)
    if kind.startswith("a list"):
        inner = _TEXT if kind.endswith("texts") else _COUNT
        return isinstance(value, list) and all(_is_of(inner, one) for one in value)
    if kind == _MAPPING:
        return isinstance(value, dict) and _is_plain(value)
    return isinstance(value, {_TEXT: str, _COUNT: int, _NUMBER: int | float}[kind])


def _is_plain(value: Any) -> bool:
    """YAML also makes dates, and lists that hold themselves."""
    try:
        json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        return False
    return True
