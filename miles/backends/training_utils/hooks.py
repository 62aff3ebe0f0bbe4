"""Functions of the user that a trainer's rank calls: loaded once, called where the passes run, on every rank.

All are ordinary functions; an ``async def`` is refused. What one raises comes out with the user's traceback first.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from miles.rollout.hooks import Hook
from miles.utils.misc import load_function


def trainer_hook(args: Any, dest: str) -> Hook | None:
    """The function that a flag names, by the flag's key; None if it is not given.

    Raises:
        CannotLoad, ImportFailed: Also for an async function.
    """
    path = getattr(args, dest, None)
    flag = "--" + dest.replace("_", "-")
    return Hook(flag, path, load_function(path, sync_required=True, flag=flag)) if path else None


def takes(function: Callable[..., Any], *args: Any, **kwargs: Any) -> bool:
    """Whether it can be called like this. What has no signature that can be read is taken to."""
    try:
        inspect.signature(function).bind(*args, **kwargs)
    except TypeError:
        return False
    except ValueError:
        return True
    return True


@dataclass(frozen=True)
class TrainerHooks:
    """Those around training. ``before_log_prob(args, model, store_prefix)``,
    ``before_train_step(args, rollout_id, step_id, model, optimizer, opt_param_scheduler)``,
    ``after_save(args, rollout_id, checkpoint_dir, hf_checkpoint_dir)``, ``postprocess(args[, rollout_data])``."""

    before_log_prob: Hook | None = None
    before_train_step: Hook | None = None
    after_save: Hook | None = None
    postprocess: Hook | None = None

    @classmethod
    def of(cls, args: Any) -> TrainerHooks:
        """Load them.

        Raises:
            CannotLoad, ImportFailed.
        """
        return cls(
            before_log_prob=trainer_hook(args, "custom_megatron_before_log_prob_hook_path"),
            before_train_step=trainer_hook(args, "custom_megatron_before_train_step_hook_path"),
            after_save=trainer_hook(args, "custom_megatron_post_save_hook_path"),
            postprocess=trainer_hook(args, "rollout_data_postprocess_path"),
        )


def call_init_hook(args: Any) -> None:
    """``--custom-megatron-init-path``: process groups are there and generators seeded, the model is not."""
    hook = trainer_hook(args, "custom_megatron_init_path")
    if hook is not None:
        hook.call(args)
