"""The run's flags as this backend needs them: typed, frozen, and refused here where they cannot be honoured."""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from miles.backends.fsdp_utils.errors import FsdpFlagRefused
from miles.backends.fsdp_utils.schedule import Schedule, schedule_of
from miles.backends.training_utils.loss_hub.settings import needs_reference, needs_teacher
from miles.utils.lora import LoraSettings

logger = logging.getLogger(__name__)

_SIZES = (
    ("tensor_model_parallel_size", "--tensor-model-parallel-size"),
    ("pipeline_model_parallel_size", "--pipeline-model-parallel-size"),
    ("context_parallel_size", "--context-parallel-size"),
    ("expert_model_parallel_size", "--expert-model-parallel-size"),
    ("expert_tensor_parallel_size", "--expert-tensor-parallel-size"),
)
_ATTENTION = ("flash_attention_2", "sdpa", "eager")
_OPTIMIZERS = ("adam", "sgd")


@dataclass(frozen=True)
class OptimizerSettings:
    """``--optimizer`` and what belongs to it. ``clip_grad`` 0: no clipping."""

    name: str
    betas: tuple[float, float]
    eps: float
    momentum: float
    clip_grad: float
    check_finite: bool


@dataclass(frozen=True)
class LoadSettings:
    """Where weights and state come from, and what is left out (``--no-load-optim`` and the like)."""

    hf_checkpoint: Path
    load: Path | None
    ref_load: Path | None
    step: int | None
    ref_step: int | None
    teacher: Path | None
    teacher_step: int | None
    optimizer: bool
    rng: bool
    finetune: bool

    @property
    def reference(self) -> Path:
        """Where the weights of a fresh start, and those of the reference model, come from."""
        return self.ref_load or self.hf_checkpoint


@dataclass(frozen=True)
class FsdpSettings:
    """All of it. ``dtype`` is that of computing and of what engines get, ``storage`` that of trained shards.
    ``pad_to``: micro-batches have a multiple of so many tokens. ``replicas``: of the whole set of shards."""

    device: str
    dtype: torch.dtype
    storage: torch.dtype
    attention: str
    gradient_checkpointing: bool
    cpu_offload: bool
    pad_to: int
    replicas: int
    trains: bool
    seed: int
    deterministic: bool
    needs_reference: bool
    needs_teacher: bool
    save_optimizer: bool
    save_rng: bool
    lora: LoraSettings | None
    optimizer: OptimizerSettings
    schedule: Schedule
    loads: LoadSettings


def settings_of(args: Any) -> FsdpSettings:
    """Of the run's resolved flags.

    Raises:
        FsdpFlagRefused: One of them cannot be honoured. Its first line names the flag.
    """
    _refuse_other_parallelism(args)
    device = args.device
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[args.params_dtype]
    return FsdpSettings(
        device=device,
        dtype=dtype,
        storage=torch.float32 if getattr(args, "keep_fp32_master", True) in (True, None) else dtype,
        attention=_attention(args, device),
        gradient_checkpointing=bool(getattr(args, "gradient_checkpointing", False)),
        cpu_offload=_cpu_offload(args, device),
        pad_to=int(getattr(args, "data_pad_size_multiplier", None) or 1),
        replicas=int(getattr(args, "dp_replicate_size", None) or 1),
        trains=not getattr(args, "debug_disable_optimizer", False),
        seed=args.seed,
        deterministic=bool(getattr(args, "deterministic_mode", False)),
        needs_reference=needs_reference(args),
        needs_teacher=needs_teacher(args),
        save_optimizer=not (getattr(args, "no_save_optim", False) or getattr(args, "debug_disable_optimizer", False)),
        save_rng=not getattr(args, "no_save_rng", False),
        lora=LoraSettings.from_args(args),
        optimizer=_optimizer(args),
        schedule=schedule_of(args),
        loads=_loads(args),
    )


def process_group_backend(args: Any) -> str:
    """What ``torch.distributed`` is initialised with: host tensors need a backend too, where state goes to the host."""
    if args.device == "cpu":
        return "gloo"
    cpu = getattr(args, "fsdp_cpu_backend", "gloo")
    return f"cpu:{cpu},cuda:nccl" if cpu else "nccl"


def _refuse_other_parallelism(args: Any) -> None:
    for name, flag in _SIZES:
        size = getattr(args, name, 1) or 1
        if size != 1:
            raise FsdpFlagRefused(
                f"{flag} {size} does not go with --train-backend fsdp",
                evidence="FSDP2 here shards over data-parallel ranks only",
                advice=f"Leave {flag} out, or use --train-backend megatron.",
            )


def _attention(args: Any, device: str) -> str:
    """The contract's default, flash attention, becomes what device and packages have; typed, it is refused."""
    name = getattr(args, "attn_implementation", None) or "flash_attention_2"
    if name not in _ATTENTION:
        raise FsdpFlagRefused(
            f"--attn-implementation {name} is not known",
            evidence=f"known: {', '.join(_ATTENTION)}",
            advice="Give one of the known ones.",
        )
    is_installed = importlib.util.find_spec("flash_attn") is not None
    if name != "flash_attention_2" or (device != "cpu" and is_installed):
        return name
    lacks = "a GPU" if device == "cpu" else "the package flash-attn"
    if "attn_implementation" in (getattr(args, "explicit_flags", None) or ()):
        raise FsdpFlagRefused(
            f"--attn-implementation flash_attention_2 needs {lacks}",
            evidence=f"the device of this run is {device}",
            advice="Leave it out, or give sdpa or eager.",
        )
    logger.info("--attn-implementation: sdpa, since flash_attention_2 needs %s", lacks)
    return "sdpa"


def _cpu_offload(args: Any, device: str) -> bool:
    if not getattr(args, "fsdp_cpu_offload", False):
        return False
    if device == "cpu":
        logger.info("--fsdp-cpu-offload: nothing to do, since this run computes on the CPU")
        return False
    if not getattr(args, "fsdp_cpu_backend", "gloo"):
        raise FsdpFlagRefused(
            "--fsdp-cpu-offload needs a backend for tensors on the host",
            evidence="--fsdp-cpu-backend is empty",
            advice="Give --fsdp-cpu-backend gloo.",
        )
    if getattr(args, "offload_train", True) and getattr(args, "offload_train_target", "cpu") == "disk":
        raise FsdpFlagRefused(
            "--fsdp-cpu-offload does not go with --offload-train-target disk",
            evidence="it keeps parameters in pinned memory of the host, which cannot shrink",
            advice="Leave one of them out.",
        )
    return True


def _optimizer(args: Any) -> OptimizerSettings:
    name = getattr(args, "optimizer", "adam")
    if name not in _OPTIMIZERS:
        raise FsdpFlagRefused(
            f"--optimizer {name} does not go with --train-backend fsdp",
            evidence=f"known: {', '.join(_OPTIMIZERS)}",
            advice="Give one of the known ones.",
        )
    return OptimizerSettings(
        name=name,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=getattr(args, "adam_eps", 1e-8),
        momentum=getattr(args, "sgd_momentum", 0.9),
        clip_grad=args.clip_grad or 0.0,
        check_finite=bool(getattr(args, "check_for_nan_in_loss_and_grad", True)),
    )


def _loads(args: Any) -> LoadSettings:
    def path(name: str) -> Path | None:
        value = getattr(args, name, None)
        return Path(value) if value else None

    return LoadSettings(
        hf_checkpoint=Path(args.hf_checkpoint),
        load=path("load"),
        ref_load=path("ref_load"),
        step=getattr(args, "ckpt_step", None),
        ref_step=getattr(args, "ref_ckpt_step", None),
        teacher=path("opd_teacher_load"),
        teacher_step=getattr(args, "opd_teacher_ckpt_step", None),
        optimizer=not (getattr(args, "no_load_optim", False) or getattr(args, "debug_disable_optimizer", False)),
        rng=not getattr(args, "no_load_rng", False),
        finetune=bool(getattr(args, "finetune", False)),
    )
