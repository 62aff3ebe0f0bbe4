"""What the machine, the files and the data say: gathered once, so that what is made of it is pure.

``gather`` reads; everything else here is data. Nothing raises: what cannot be read becomes a line that says why.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from miles.backends.checkpoint_layout import (
    DamagedCheckpoint,
    backend_of,
    find_checkpoint,
    holds_adapter,
    rollout_of,
)
from miles.flags.engine_facts import EngineFacts, look_at_engines
from miles.flags.hook_facts import why_not_found
from miles.flags.path_facts import path_errors, why_not_exported, why_unwritable
from miles.flags.prompt_facts import DataFacts, read_data
from miles.flags.row_checks import row_checks, training_checks
from miles.flags.slurm_facts import SlurmFacts, slurm_facts
from miles.flags.tracking_facts import TrackingFacts, look_at_tracking
from miles.utils.eval_config import BadEvalConfig, Entries, EvalDatasetConfig, read_entries, resolve_entries
from miles.utils.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from miles.utils.prompt_columns import Columns
from miles_agents.agent.inventory import DriverNvml, read_gpus, usable_cores
from miles_agents.errors import MilesError

MODEL_PATHS = ("hf_checkpoint", "ref_load", "load", "save", "critic_load", "opd_teacher_load")
WRITTEN = ("save", "critic_save", "run_dir", "dump_details", "offload_train_disk_dir", "tensorboard_dir", "wandb_dir")
NAMED_FILES = ("chat_template_path",)
HOOKS = (
    "rollout_function_path",
    "eval_function_path",
    "custom_generate_function_path",
    "custom_rm_path",
    "data_source_path",
    "dynamic_sampling_filter_path",
    "buffer_filter_path",
    "rollout_sample_filter_path",
    "custom_rollout_log_function_path",
    "custom_eval_rollout_log_function_path",
    "custom_loss_function_path",
    "custom_tis_function_path",
    "custom_pg_loss_reducer_function_path",
    "custom_reward_post_process_path",
    "custom_convert_samples_to_train_data_path",
    "rollout_all_samples_process_path",
    "rollout_data_postprocess_path",
    "custom_model_provider_path",
    "custom_megatron_init_path",
    "custom_megatron_before_log_prob_hook_path",
    "custom_megatron_before_train_step_hook_path",
    "custom_megatron_post_save_hook_path",
    "generate_tool_specs_path",
    "generate_execute_tool_function_path",
    "custom_agent_function_path",
)


@dataclass(frozen=True)
class CheckpointFacts:
    """A checkpoint: the ``--train-backend`` that reads it, and the rollout after which it was written.

    ``rollout_id`` is None for weights alone, as ``miles convert`` writes them. ``adapter``: it is one of LoRA, without
    the weights below.
    """

    backend: str
    rollout_id: int | None
    adapter: bool = False


@dataclass(frozen=True)
class DirectoryFacts:
    """A directory that may hold a Hugging Face model or checkpoints.

    Attributes:
        exists: It is a directory.
        config: Its ``config.json``; None: it has none, or ``config_error`` says why it cannot be used.
        config_error: Empty if there is nothing to say.
        has_tokenizer: It has a tokenizer's file.
        has_weights: It has safetensors.
        newest: The checkpoint that the tracker file names, or that the directory is; None: there is none.
        steps: Backends of the checkpoints below it, by rollout.
        adapters: Of those, the ones that are adapters of LoRA.
        is_checkpoint: It is the directory of a checkpoint itself.
        checkpoint_error: Why the checkpoint that the tracker file names cannot be used.
    """

    exists: bool = False
    config: dict[str, Any] | None = None
    config_error: str = ""
    has_tokenizer: bool = False
    has_weights: bool = False
    newest: CheckpointFacts | None = None
    steps: Mapping[int, str] = field(default_factory=dict)
    adapters: frozenset[int] = frozenset()
    is_checkpoint: bool = False
    checkpoint_error: str = ""


@dataclass(frozen=True)
class EvalSet:
    """A data set of evaluations, with the columns that it uses."""

    path: str
    input_key: str
    label_key: str | None
    metadata_key: str = "metadata"
    tool_key: str | None = "tools"
    rm_type: str | None = None
    added: Mapping[str, Any] = field(default_factory=dict)
    """To each row's metadata."""
    generate: str | None = None
    """Its own generate function."""

    @property
    def kinds(self) -> Columns:
        """What its columns have to hold."""
        return Columns(
            self.input_key, self.label_key, self.metadata_key, self.tool_key,
            prompt_flag="--eval-input-key", label_flag="--eval-label-key", tool_flag="--eval-tool-key",
        )  # fmt: skip


@dataclass(frozen=True)
class Facts:
    """All that rules may know beyond the flags.

    Attributes:
        directories: By path, as typed.
        data: By path, as typed, slice included.
        eval_sets: What is evaluated.
        eval_file: What the file of ``--eval-config`` says: ``eval.defaults`` and ``eval.datasets``.
        eval_error: Why that cannot be told.
        export_error: Why no Hugging Face directory can be written to ``--save-hf``.
        unwritable: Why a path cannot be written to, by path; what is absent can be.
        path_errors: Why a file cannot be written or read in the middle of the run, by dest.
        missing_files: Paths that were named and do not exist.
        hook_errors: Why user code cannot be found, by dotted path.
        gpus: GPUs that this process may use.
        torch_has_cuda: The installed torch is not the CPU build.
        cores: CPU cores that this process may use.
        tracking: What trackers find.
        engines: What --sglang-config says, and SGLang's arguments.
        adapter: ``adapter_config.json`` of ``--lora-adapter-path``.
        adapter_error: Why there is none.
        hostfile: Its text, and why there is none.
        slurm: The allocation that the run stands in.
        default_run_dir: Where a run without ``--run-dir`` writes.
        cwd: What relative paths are relative to.
    """

    directories: Mapping[str, DirectoryFacts] = field(default_factory=dict)
    data: Mapping[str, DataFacts] = field(default_factory=dict)
    eval_sets: tuple[EvalSet, ...] = ()
    eval_file: Entries | None = None
    eval_error: str = ""
    export_error: str = ""
    unwritable: Mapping[str, str] = field(default_factory=dict)
    path_errors: Mapping[str, str] = field(default_factory=dict)
    missing_files: frozenset[str] = frozenset()
    hook_errors: Mapping[str, str] = field(default_factory=dict)
    gpus: int = 0
    gpu_fault: str = ""
    torch_has_cuda: bool = False
    cores: int = 1
    tracking: TrackingFacts = field(default_factory=TrackingFacts)
    engines: EngineFacts = field(default_factory=EngineFacts)
    adapter: Mapping[str, Any] | None = None
    adapter_error: str = ""
    hostfile: tuple[str, str] = ("", "")
    slurm: SlurmFacts = field(default_factory=SlurmFacts)
    default_run_dir: str = "/tmp/run"  # noqa: S108  # a value for tests, never used by gather
    cwd: str = "/"


def gather(values: Mapping[str, Any], *, run_dir: str) -> Facts:
    """Look at everything that these values name. ``run_dir``: where a run without ``--run-dir`` writes."""
    gpus, fault = _count_gpus()
    columns = [values.get("input_key"), values.get("label_key"), values.get("metadata_key")]
    rm_type, custom = values.get("rm_type"), values.get("custom_rm_path")
    entries, sets, error = _evaluated(values)
    wanted: dict[str, list[Any]] = {}
    kinds: dict[str, list[Columns]] = {}
    if path := values.get("prompt_data"):
        wanted[path] = columns
        checks = training_checks(values)
        kinds[path] = [Columns(str(columns[0]), columns[1], columns[2], values.get("tool_key"), **checks)]
    for found in sets:
        wanted[found.path] = [*wanted.get(found.path, ()), found.input_key, found.label_key]
        kinds.setdefault(found.path, []).append(
            replace(found.kinds, **row_checks(found.rm_type or rm_type, custom, found.added))
        )
    adapter, adapter_error = _read_adapter(values.get("lora_adapter_path"))
    directories = {path: look_at(Path(path)) for key in MODEL_PATHS if (path := values.get(key))}
    written = [path for key in WRITTEN if (path := values.get(key))]
    hooks = dict.fromkeys([*(values.get(key) for key in HOOKS), *(found.generate for found in sets)])
    named_files = [path for key in NAMED_FILES if (path := values.get(key))]
    return Facts(
        directories=directories,
        data={path: read_data(path, [str(key) for key in keys if key], kinds[path]) for path, keys in wanted.items()},
        eval_sets=tuple(sets),
        eval_file=entries if values.get("eval_config") else None,
        eval_error=error,
        export_error=why_not_exported(values.get("save_hf") or ""),
        unwritable={path: reason for path in [*written, run_dir] if (reason := why_unwritable(Path(path)))},
        path_errors=path_errors(values, run_dir),
        missing_files=frozenset(path for path in named_files if not Path(path).is_file()),
        hook_errors={path: reason for path in hooks if path and (reason := why_not_found(path))},
        gpus=gpus,
        gpu_fault=fault,
        torch_has_cuda=_torch_has_cuda(),
        cores=usable_cores(),
        tracking=look_at_tracking(values),
        engines=look_at_engines(values),
        adapter=adapter,
        adapter_error=adapter_error,
        hostfile=_read_text(values.get("hostfile")),
        slurm=slurm_facts(os.environ),
        default_run_dir=run_dir,
        cwd=os.getcwd(),
    )


def look_at(path: Path) -> DirectoryFacts:
    """What a directory holds, as far as file names and ``config.json`` tell."""
    try:
        names = {entry.name for entry in path.iterdir()}
    except OSError:
        return DirectoryFacts()
    config, error = _read_config(path / "config.json") if "config.json" in names else (None, "")
    newest, checkpoint_error = _newest(path)
    rollouts = {name: rollout for name in sorted(names) if (rollout := rollout_of(name)) is not None}
    return DirectoryFacts(
        exists=True,
        config=config,
        config_error=error,
        has_tokenizer=bool(names & {"tokenizer.json", "tokenizer.model"}) or {"vocab.json", "merges.txt"} <= names,
        has_weights=any(name.endswith(".safetensors") for name in names),
        newest=newest,
        steps={rollout: backend for name, rollout in rollouts.items() if (backend := backend_of(path / name))},
        adapters=frozenset(rollout for name, rollout in rollouts.items() if holds_adapter(path / name)),
        is_checkpoint=backend_of(path) is not None,
        checkpoint_error=checkpoint_error,
    )


def _read_adapter(path: str | None) -> tuple[dict[str, Any] | None, str]:
    if not path:
        return None, ""
    absent = [name for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS) if not (Path(path) / name).is_file()]
    if absent:
        return None, f"it has no {absent[0]}"
    return _read_config(Path(path) / ADAPTER_CONFIG)


def _read_text(path: str | None) -> tuple[str, str]:
    if not path:
        return "", ""
    try:
        return Path(path).read_text(encoding="utf-8"), ""
    except (OSError, ValueError) as error:
        return "", f"it cannot be read: {error}"


def _read_config(path: Path) -> tuple[dict[str, Any] | None, str]:
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        return None, f"{path.name} cannot be read: {error}"
    return (config, "") if isinstance(config, dict) else (None, f"{path.name} is not a JSON object")


def _newest(path: Path) -> tuple[CheckpointFacts | None, str]:
    try:
        found = find_checkpoint(path)
    except DamagedCheckpoint as error:
        return None, f"{error.what}: {error.evidence}"
    except OSError as error:
        return None, f"its checkpoints cannot be told: {error}"
    if found is None:
        return None, ""
    backend = backend_of(found.directory)
    if backend is None:
        return None, f"{found.directory.name} is incomplete, or no checkpoint"
    return CheckpointFacts(backend, found.rollout_id, holds_adapter(found.directory)), ""


def _count_gpus() -> tuple[int, str]:
    try:
        return len(read_gpus(DriverNvml(), os.environ.get("CUDA_VISIBLE_DEVICES"))), ""
    except MilesError as error:
        return 0, f"{error.what}: {error.evidence}"


def _torch_has_cuda() -> bool:
    try:
        return not importlib.metadata.version("torch").endswith("+cpu")
    except importlib.metadata.PackageNotFoundError:
        return False


def _evaluated(values: Mapping[str, Any]) -> tuple[Entries | None, list[EvalSet], str]:
    try:
        entries = read_entries(values)
        sets = resolve_entries(values, entries)
    except BadEvalConfig as error:
        return None, [], f"{error.what}: {error.evidence}"
    return entries, [_eval_set(one) for one in sets], ""


def _eval_set(found: EvalDatasetConfig) -> EvalSet:
    return EvalSet(
        found.path, found.input_key, found.label_key, found.metadata_key, found.tool_key, found.rm_type, _added(found),
        found.custom_generate_function_path,
    )  # fmt: skip


def _added(found: EvalDatasetConfig) -> dict[str, Any]:
    """To the metadata of each row of evaluation data."""
    return {**found.metadata_overrides, **({"rm_type": found.rm_type} if found.rm_type else {})}
