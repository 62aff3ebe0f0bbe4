"""What the rollout manager loads before its first rollout: data source, rollout function, evaluation function."""

from __future__ import annotations

import os
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

from miles.rollout.base_types import RolloutFnConstructorInput
from miles.rollout.data_source import DataSource, RolloutDataSource
from miles.rollout.hooks import Hook, load_hook
from miles.rollout.inference_rollout.compatibility import load_rollout_function
from miles.rollout.journal import Journal
from miles.rollout.tracked_source import TrackedDataSource
from miles.utils.misc import load_function

DEFAULT_ROLLOUT = "miles.rollout.inference_rollout.inference_rollout_common.InferenceRolloutFn"
FULLY_ASYNC = "miles.rollout.fully_async_rollout.FullyAsyncRolloutFn"
FUNCTION_ROLLOUT = "miles.rollout.sglang_rollout.generate_rollout"
DEFAULT_SOURCE = "miles.rollout.data_source.RolloutDataSourceWithBuffer"
_HOOK_FLAGS = (
    "custom_rm_path", "custom_reward_post_process_path", "custom_convert_samples_to_train_data_path",
    "rollout_sample_filter_path", "rollout_all_samples_process_path", "custom_rollout_log_function_path",
    "custom_eval_rollout_log_function_path", "dynamic_sampling_filter_path", "custom_generate_function_path",
)  # fmt: skip


@dataclass(frozen=True)
class Loaded:
    """All of it. Without ``--eval-function-path``, the rollout function evaluates."""

    source: TrackedDataSource
    rollout_function: Hook
    eval_function: Hook

    @property
    def keeps_groups_open(self) -> bool:
        """Whether groups that were taken outlive the call of the rollout function that took them."""
        return bool(getattr(self.rollout_function.function, "keeps_groups_open", False))

    @property
    def dataset_size(self) -> int | None:
        """Prompts of the data set, without those that are too long; None if the data source has none."""
        dataset = getattr(self.source.inner, "dataset", None)
        return None if dataset is None else len(dataset)

    @property
    def num_too_long(self) -> int:
        """Prompts of the data set that were left out because they are longer than ``--rollout-max-prompt-len``."""
        return int(getattr(getattr(self.source.inner, "dataset", None), "num_dropped", 0))


def load_all(args: Namespace) -> Loaded:
    """Load everything that the flags name, also hooks that are called late: a wrong path is told at the start.

    Raises:
        CannotLoad, ImportFailed, HookFailed, and what data sets and tokenizers raise.
    """
    for name in _HOOK_FLAGS:
        load_hook(getattr(args, name), "--" + name.replace("_", "-"))
    source = TrackedDataSource(_data_source(args))
    if args.fully_async:
        source.bound_staleness(args.max_weight_staleness)
    made_with = RolloutFnConstructorInput(args, source)
    if args.load_debug_rollout_data:
        rollout = Hook("--load-debug-rollout-data", args.load_debug_rollout_data, lambda _: None)
    else:
        default = FULLY_ASYNC if args.fully_async else DEFAULT_ROLLOUT
        default = FUNCTION_ROLLOUT if os.environ.get("MILES_USE_LEGACY_ROLLOUT_V1") == "1" else default
        rollout = load_rollout_function(made_with, args.rollout_function_path or default)
    path = args.eval_function_path
    evaluation = load_rollout_function(made_with, path, "--eval-function-path") if path else rollout
    if args.run_dir:
        source.attach(Journal(Path(args.run_dir) / "journal" / "rollout.jsonl"))
    return Loaded(source, rollout, evaluation)


def _data_source(args: Namespace) -> DataSource:
    if args.load_debug_rollout_data:
        return _NoPrompts(args)
    path = args.data_source_path or DEFAULT_SOURCE
    found = load_function(path, flag="--data-source-path")
    if str(getattr(found, "__module__", "")).startswith("miles."):
        made: DataSource = found(args)
        return made
    made = Hook("--data-source-path", path, found).call(args)
    if not callable(getattr(made, "get_samples", None)):
        raise Hook("--data-source-path", path, found).bad_result(
            made, "a data source, with get_samples and add_samples"
        )
    return made


class _NoPrompts(RolloutDataSource):
    """In place of a data source where all samples come from files."""

    def __init__(self, args: Namespace) -> None:
        without = Namespace(**vars(args))
        without.rollout_global_dataset = False
        super().__init__(without)
