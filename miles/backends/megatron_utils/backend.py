"""The Megatron backend: megatron.core's model, data parallelism, optimizer and schedule behind ``TrainBackend``.

Consumes packed micro-batches and loss functions; produces optimizer steps, full weights and checkpoints. Invariants:
parameters are views into the buffers of the data-parallel wrapper for as long as the backend lives, also across
``sleep``; what a step sums is what the loss functions return, over micro-batches and data-parallel ranks.
"""

from __future__ import annotations

import logging
import math
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from miles.backends.base import LogitsFunction, LossFunction, MicroBatch, ModelTag, StepOutcome, TrainBackend
from miles.backends.hf_directory import HFDirectory
from miles.backends.megatron_utils import passes
from miles.backends.megatron_utils.errors import NonFiniteGradients, UnsupportedSetting
from miles.backends.megatron_utils.families import read_shape, weight_rules
from miles.backends.megatron_utils.model import build_model, padded_vocab, transformer_config
from miles.backends.megatron_utils.optimizer import build_optimizer, build_scheduler, clip_gradients, wrap_data_parallel
from miles.backends.megatron_utils.parallel import init_parallel, leave_parallel
from miles.backends.megatron_utils.weights import full_tensors, load_hf_weights

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class MegatronBackend(TrainBackend):
    """See the module's docstring. ``args``: the resolved flags. ``torch.distributed`` is initialised."""

    def __init__(self, args: Namespace, role: str = "actor") -> None:
        if args.params_dtype not in DTYPES:
            raise UnsupportedSetting(
                f"parameters of type {args.params_dtype} are not built",
                evidence=f"known: {', '.join(DTYPES)}",
                advice="Use --bf16, or nothing for float32 on a CPU.",
            )
        self.args = args
        self.role = role
        self.dtype = DTYPES[args.params_dtype]
        self.device = torch.device(args.device)
        self.shape = read_shape(args.hf_config)
        self.rules = weight_rules(self.shape, padded_vocab(args, self.shape.vocab))

    # Building and loading

    def init(self) -> int:
        """See ``TrainBackend.init``."""
        self.parallel = init_parallel(self.args)
        self._logits_of = passes.make_logits_of(self.device, self.shape.vocab, self.parallel.tp_rank)
        model = self._build_model()
        self._load_hf(model, Path(self.args.hf_checkpoint))
        self.model = wrap_data_parallel(self.args, model)
        self.optimizer = build_optimizer(self.args, self.model)
        self.scheduler = build_scheduler(self.args, self.optimizer)
        self.reference: Any = None
        return 0

    def _build_model(self) -> Any:
        return build_model(self.args, self.shape, transformer_config(self.args, self.shape, self.dtype))

    def _load_hf(self, model: torch.nn.Module, path: Path) -> None:
        load_hf_weights(
            model, self.rules, HFDirectory(path), tp_rank=self.parallel.tp_rank, tp_size=self.parallel.tp_size
        )

    # Computing

    def forward_only(
        self, batches: Sequence[MicroBatch], function: LogitsFunction, *, model: ModelTag = "actor"
    ) -> list[Any]:
        """See ``TrainBackend.forward_only``."""
        return passes.forward_only(self._model(model), batches, function, self._logits_of)

    def _model(self, tag: ModelTag) -> Any:
        if tag == "actor":
            return self.model
        assert self.reference is not None, "init was not told that a reference model is needed"
        return self.reference

    def train_step(self, batches: Sequence[MicroBatch], loss_function: LossFunction) -> StepOutcome:
        """See ``TrainBackend.train_step``.

        Raises:
            NonFiniteGradients: NaN or infinity in them, unless ``--no-check-for-nan-in-loss-and-grad`` is given;
                then the step is left out.
        """
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        metrics = passes.forward_backward(self.model, batches, loss_function, self._logits_of)
        self.optimizer.prepare_grads()
        grad_norm = float(self.optimizer.get_grad_norm())
        learning_rate = float(self.optimizer.param_groups[0]["lr"])
        stepped = math.isfinite(grad_norm)
        if stepped:
            clip_gradients(self.optimizer, grad_norm)
            self.optimizer.step_with_ready_grads()
        else:
            self._report_non_finite(grad_norm)
        self.scheduler.step(1)
        return StepOutcome(metrics, grad_norm, learning_rate, stepped)

    def _report_non_finite(self, grad_norm: float) -> None:
        """The norm is the same on all ranks, and so is what they do about it."""
        parameters = self.model.module.named_parameters()
        bad = [name for name, parameter in parameters if not parameter.main_grad.isfinite().all()]
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

    # Weights

    def hf_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """See ``TrainBackend.hf_weights``."""
        return full_tensors(self.model.module, self.rules, self.parallel.tp_group)

    def save(self, directory: Path, *, rollout_id: int) -> None:
        raise NotImplementedError

    def sleep(self, level: int) -> None:
        raise NotImplementedError

    def wake_up(self) -> None:
        raise NotImplementedError

    def close(self) -> None:
        """See ``TrainBackend.close``."""
        leave_parallel()
