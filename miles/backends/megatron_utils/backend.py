"""The Megatron backend: megatron.core's model, data parallelism, optimizer and schedule behind ``TrainBackend``.

Consumes packed micro-batches and loss functions; produces optimizer steps, full weights and checkpoints. Invariants:
parameters are views into the buffers of the data-parallel wrapper for as long as the backend lives, also across
``sleep``; what a step sums is what the loss functions return, over micro-batches and data-parallel ranks.
"""

from __future__ import annotations

import contextlib
import logging
import math
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from miles.backends.base import (
    LogitsFunction,
    LossFunction,
    MicroBatch,
    ModelTag,
    ParallelState,
    StepOutcome,
    TrainBackend,
    TrainedObjects,
)
from miles.backends.checkpoint_layout import REFERENCE, FoundCheckpoint, is_hf_directory
from miles.backends.hf_directory import HFDirectory
from miles.backends.lora.files import check_checkpoint, check_reference
from miles.backends.lora.values import is_below
from miles.backends.megatron_utils import passes
from miles.backends.megatron_utils.checkpoint import TrainState, load_checkpoint, save_checkpoint
from miles.backends.megatron_utils.errors import NonFiniteGradients, UnsupportedSetting
from miles.backends.megatron_utils.families import read_shape, weight_rules
from miles.backends.megatron_utils.lora import Adapters, weights_checksum
from miles.backends.megatron_utils.megatron_training import provide_get_args
from miles.backends.megatron_utils.model import build_model, padded_vocab, transformer_config
from miles.backends.megatron_utils.mtp import make_mtp
from miles.backends.megatron_utils.optimizer import (
    build_optimizer,
    build_scheduler,
    clip_gradients,
    gradient_norm,
    has_optimizer,
    reset_optimizer,
    wrap_data_parallel,
)
from miles.backends.megatron_utils.parallel import init_parallel, leave_parallel
from miles.backends.megatron_utils.routing_replay import make_replay
from miles.backends.megatron_utils.sleeping import fall_asleep
from miles.backends.megatron_utils.sources import (
    Source,
    choose_source,
    moved_reference,
    reference_source,
    teacher_source,
)
from miles.backends.megatron_utils.stages import Stage, check_experts
from miles.backends.megatron_utils.value_head import NAME as VALUE_HEAD
from miles.backends.megatron_utils.weights import full_tensors, load_hf_weights
from miles.backends.training_utils.hooks import call_init_hook
from miles.backends.training_utils.loss_hub.settings import moves_reference, needs_reference, needs_teacher
from miles.backends.training_utils.rendezvous import rank_device
from miles.backends.training_utils.sleeping import SleepingMemory
from miles.utils.lora import ADAPTER_DIRECTORY, LoraSettings

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class MegatronBackend(TrainBackend):
    """See the module's docstring. ``args``: the resolved flags. ``torch.distributed`` is initialised.

    A critic beside an actor has that one's ``parallel`` groups, and a value head in place of the vocabulary.
    """

    def __init__(self, args: Namespace, role: str = "actor", parallel: ParallelState | None = None) -> None:
        if args.params_dtype not in DTYPES:
            raise UnsupportedSetting(
                f"parameters of type {args.params_dtype} are not built",
                evidence=f"known: {', '.join(DTYPES)}",
                advice="Use --bf16, or nothing for float32 on a CPU.",
            )
        self.args = args
        self.role = role
        self.dtype = DTYPES[args.params_dtype]
        self.device = rank_device(args.device)
        self.shape = read_shape(args.hf_config)
        self._owns_groups = parallel is None
        if parallel is not None:
            self.parallel = parallel
        if self.is_critic:
            self.shape = replace(self.shape, tied=False)
        if self.is_critic or not getattr(args, "mtp_num_layers", None):
            self.shape = replace(self.shape, mtp_layers=0)
        rules = weight_rules(self.shape, padded_vocab(args, self.shape.vocab))
        self.rules = [rule for rule in rules if not (self.is_critic and rule.megatron == VALUE_HEAD)]

    @property
    def is_critic(self) -> bool:
        """It gives values, not log-probs."""
        return self.role == "critic"

    # Building and loading

    def init(self) -> int:
        """See ``TrainBackend.init``."""
        args = self.args
        if self._owns_groups:
            provide_get_args(args)
            if getattr(args, "deterministic_mode", False):
                torch.use_deterministic_algorithms(True)
            self.parallel = init_parallel(args)
        sequence_parallel = bool(getattr(args, "sequence_parallel", False))
        check_experts(self.shape, self.parallel, sequence_parallel=sequence_parallel)
        self._memory = SleepingMemory(args)
        if self._owns_groups:
            call_init_hook(args)
        source = choose_source(args)
        self.config = transformer_config(args, self.shape, self.dtype)
        self.stage = Stage.of(self.config, self.shape, self.parallel)
        model = self._build_model()
        layers = self.stage.layers[self.stage.rank]
        self._replay = None if self.is_critic else make_replay(args, model, self.shape.experts, self.parallel, layers)
        self._mtp = make_mtp(args, model, self.shape.mtp_layers, stages=self.parallel.pp_size)
        self._logits_of = self._make_logits_of()
        if source.resumes is None or source.adapter is not None:
            self._load_weights(model, source.weights, without_head=self.is_critic and not source.is_own)
        self.adapters = self._make_adapters(model, source)
        self.model = wrap_data_parallel(args, model)
        self.optimizer = build_optimizer(args, self.model) if has_optimizer(args) else None
        self.scheduler = build_scheduler(args, self.optimizer) if self.optimizer is not None else None
        start = 0 if source.resumes is None else self._resume(source.resumes)
        self.frozen: dict[ModelTag, Any] = {}
        if needs_reference(args) and not (self.adapters and is_below(self.adapters.base, reference_source(args))):
            self.frozen["ref"] = self._build_frozen(moved_reference(args, source) or reference_source(args))
        if needs_teacher(args):
            self.frozen["teacher"] = self._build_frozen(teacher_source(args))
        self._remember_below(source)
        return start

    def _make_logits_of(self) -> passes.LogitsOf:
        return passes.make_logits_of(
            self.device,
            self.shape.vocab,
            self.parallel,
            multiple=passes.row_multiple(self.args, self.parallel),
            padded=getattr(self.args, "qkv_format", None) == "bshd",
            replay=self._replay,
            mtp=self._mtp,
        )

    def _build_model(self) -> Any:
        return build_model(self.args, self.shape, self.config, is_critic=self.is_critic)

    def _make_adapters(self, model: Any, source: Source) -> Adapters | None:
        """With ``--lora-rank``. Where a run goes on, they get their values with the optimizer's state."""
        settings = LoraSettings.from_args(self.args)
        if settings is None:
            return None
        if source.adapter is not None:
            settings = replace(settings, adapter_path=None)
        adapters = Adapters(model, self.rules, settings, stage=self.stage, parallel=self.parallel, base=source.weights)
        if source.adapter is not None:
            check_checkpoint(source.adapter, settings, adapters.checksum)
            if source.resumes is None:
                state = TrainState(self.shape, self.parallel, adapters, is_adapter=True)
                load_checkpoint(source.adapter, state, generators=False)
        return adapters

    def _remember_below(self, source: Source) -> None:
        """What checkpoints of adapters say of the weights below and of the reference; it must not have changed."""
        adapters = self.adapters
        if adapters is None:
            return
        reference = None
        if needs_reference(self.args):
            frozen, parts = self.frozen.get("ref"), (self.rules, self.stage, self.parallel)
            reference = adapters.checksum if frozen is None else weights_checksum(frozen, *parts)
            if source.adapter is not None and source.resumes is not None:
                check_reference(source.adapter, reference)
        adapters.below = replace(adapters.below, apart=source.apart, reference=reference)

    def _build_frozen(self, source: Path) -> Any:
        model = self._build_model()
        self._load_weights(model, source)
        return model.requires_grad_(False).eval()

    def _load_weights(self, model: Any, source: Path, *, without_head: bool = False) -> None:
        """From a Hugging Face directory, or one of checkpoints, which may be without a critic's value head."""
        if is_hf_directory(source):
            directory = HFDirectory(source)
            load_hf_weights(model, self.rules, directory, stage=self.stage, parallel=self.parallel)
        else:
            load_checkpoint(source, replace(self._state(model), without_head=without_head), generators=False)

    def _resume(self, found: FoundCheckpoint) -> int:
        args = self.args
        with_optimizer = self.optimizer is not None and not getattr(args, "no_load_optim", False)
        state = self._state(self.model.module, with_optimizer=with_optimizer)
        loaded = load_checkpoint(found.directory, state, generators=not getattr(args, "no_load_rng", False))
        if not with_optimizer and self.optimizer is not None:
            # Parameters that the optimizer keeps in float32 are still those from before.
            self.optimizer.reload_model_params()
        if not loaded.generators:
            logger.info("random generators are fresh: the checkpoint has none for these ranks, or was told to")
        rollout_id = found.rollout_id if loaded.rollout_id is None else loaded.rollout_id
        return 0 if rollout_id is None else rollout_id + 1

    def _state(self, model: Any, *, with_optimizer: bool = False) -> TrainState:
        """Of a model; of the adapters alone, where the one that is trained has some."""
        is_adapter = self._adapted(model)
        held = self.adapters if is_adapter else model
        if not with_optimizer:
            return TrainState(self.shape, self.parallel, held, is_adapter=is_adapter)
        return TrainState(self.shape, self.parallel, held, self.optimizer, self.scheduler, is_adapter=is_adapter)

    def _adapted(self, model: Any) -> bool:
        trained = getattr(self, "model", None)
        return trained is not None and model is trained.module and self.adapters is not None

    # Computing

    def forward_only(
        self, batches: Sequence[MicroBatch], function: LogitsFunction, *, model: ModelTag = "actor"
    ) -> list[Any]:
        """See ``TrainBackend.forward_only``."""
        self._memory.check_awake("compute", level=2)
        is_below = model == "ref" and model not in self.frozen and self.adapters is not None
        with self.adapters.switch.off() if is_below and self.adapters is not None else contextlib.nullcontext():
            return passes.forward_only(self._model(model), batches, function, self._logits_of)

    def _model(self, tag: ModelTag) -> Any:
        if tag == "actor" or (tag == "ref" and tag not in self.frozen and self.adapters is not None):
            return self.model
        assert tag in self.frozen, f"init was not told that a model {tag!r} is needed"
        return self.frozen[tag]

    def train_step(self, batches: Sequence[MicroBatch], loss_function: LossFunction) -> StepOutcome:
        """See ``TrainBackend.train_step``.

        Raises:
            NonFiniteGradients: NaN or infinity in them, unless ``--no-check-for-nan-in-loss-and-grad`` is given;
                then the step is left out.
        """
        self._memory.check_awake("train")
        self.model.zero_grad_buffer()
        if self.optimizer is not None:
            self.optimizer.zero_grad()
        metrics = passes.forward_backward(self.model, batches, loss_function, self._logits_of)
        if self._replay is not None:
            self._replay.end_step()
        if self.optimizer is None or self.scheduler is None:
            return StepOutcome(metrics, gradient_norm(self.model), 0.0, stepped=False)
        self.optimizer.prepare_grads()
        grad_norm = float(self.optimizer.get_grad_norm())
        rates = tuple(float(group["lr"]) for group in self.optimizer.param_groups)
        stepped = math.isfinite(grad_norm)
        if stepped:
            clip_gradients(self.optimizer, grad_norm)
            self.optimizer.step_with_ready_grads()
            self.scheduler.step(1)  # counts the steps that were taken, as Megatron-LM does
        else:
            self._report_non_finite(grad_norm)
        return StepOutcome(metrics, grad_norm, rates[0], stepped, rates)

    def reset_optimizer(self) -> None:
        """See ``TrainBackend.reset_optimizer``."""
        self._memory.check_awake("reset the optimizer")
        if self.optimizer is not None:
            reset_optimizer(self.optimizer)

    def _report_non_finite(self, grad_norm: float) -> None:
        """The norm is the same on all ranks, and so is what they do about it."""
        parameters = self.model.module.named_parameters()
        trained = ((name, parameter) for name, parameter in parameters if parameter.requires_grad)
        bad = [name for name, parameter in trained if not parameter.main_grad.isfinite().all()]
        evidence = f"global norm: {grad_norm}; on this rank in {len(bad)} parameters: {', '.join(bad[:5]) or 'none'}"
        if getattr(self.args, "check_for_nan_in_loss_and_grad", True):
            raise NonFiniteGradients(
                "the gradients of this step are not finite",
                evidence=evidence,
                advice="Look for rewards, advantages or log-probs that are not finite, or lower --lr; "
                "--no-check-for-nan-in-loss-and-grad leaves such steps out.",
                grad_norm=grad_norm,
            )
        logger.warning("a step is left out, its gradients are not finite: %s", evidence)

    # Weights and checkpoints

    def objects(self, model: ModelTag = "actor") -> TrainedObjects:
        """See ``TrainBackend.objects``."""
        return TrainedObjects([self._model(model)], self.optimizer, self.scheduler)

    def hf_weights(self, *, only_first: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
        """See ``TrainBackend.hf_weights``. Works while asleep at level 1."""
        self._memory.check_awake("hand on weights", level=2)
        merge = None if self.adapters is None else self.adapters.merge
        return full_tensors(
            self.model.module,
            self.rules,
            stage=self.stage,
            parallel=self.parallel,
            merge=merge,
            only_first=only_first,
        )

    def local_weights(self, model: ModelTag = "actor", *, trained: bool = False) -> list[torch.Tensor]:
        """See ``TrainBackend.local_weights``."""
        self._memory.check_awake("hand on weights", level=2)
        module = self.model.module if model == "actor" else self._model(model)
        return [parameter.data for parameter in module.parameters() if parameter.requires_grad or not trained]

    def save(self, directory: Path, *, rollout_id: int) -> None:
        """See ``TrainBackend.save``.

        Raises:
            CannotWriteCheckpoint: The disk is full, or forbids it.
        """
        self._memory.check_awake("save")
        with_optimizer = self.optimizer is not None and not getattr(self.args, "no_save_optim", False)
        state = self._state(self.model.module, with_optimizer=with_optimizer)
        generators = not getattr(self.args, "no_save_rng", False)
        save_checkpoint(directory, state, rollout_id=rollout_id, generators=generators)
        if self.adapters is not None:
            self.adapters.write(directory / ADAPTER_DIRECTORY)
        if moves_reference(self.args) and "ref" in self.frozen:
            (directory / REFERENCE).mkdir(exist_ok=True)
            save_checkpoint(
                directory / REFERENCE, self._state(self.frozen["ref"]), rollout_id=rollout_id, generators=False
            )

    # Memory

    def sleep(self, level: int) -> None:
        """See ``TrainBackend.sleep``."""
        fall_asleep(self._memory, level, self.model, self.optimizer, self.frozen.values())

    def wake_up(self) -> None:
        """See ``TrainBackend.wake_up``."""
        self._memory.wake_up()

    def close(self) -> None:
        """See ``TrainBackend.close``."""
        self._memory.close()
        if self._owns_groups:
            leave_parallel()
