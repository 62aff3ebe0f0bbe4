"""Training with FSDP2 on transformers' own models: pure data parallel, parameters sharded over all ranks.

Consumes micro-batches and functions of logits; produces gradients summed over micro-batches and ranks, optimizer steps
and full weights. Waits for nothing but collectives of the process group it was given. Invariants: between calls all
parameters are sharded and no gradient is left; the schedule counts the steps that were taken.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn import functional

from miles.backends.base import (
    LogitsFunction,
    LossFunction,
    LossOutput,
    MicroBatch,
    ModelTag,
    ParallelState,
    StepOutcome,
    TrainBackend,
    TrainedObjects,
)
from miles.backends.checkpoint_layout import REFERENCE, TRACKER, holds_adapter
from miles.backends.fsdp_utils.checkpoint import (
    Progress,
    RankState,
    checkpoint_directory,
    is_checkpoint,
    load_checkpoint,
    load_weights,
    save_checkpoint,
    save_weights,
    weights_beside,
    weights_directory,
)
from miles.backends.fsdp_utils.errors import BadModelDirectory, FsdpFlagRefused, NotFinite
from miles.backends.fsdp_utils.lora import Adapters, weights_checksum
from miles.backends.fsdp_utils.model import ModelOptions, build_model, fsdp_modules
from miles.backends.fsdp_utils.optimizer import ShardedOptimizer
from miles.backends.fsdp_utils.packing import packed_layout
from miles.backends.fsdp_utils.settings import settings_of
from miles.backends.fsdp_utils.shards import named_shards
from miles.backends.fsdp_utils.weights import full_weights, load_hf_weights
from miles.backends.lora.files import check_checkpoint, check_reference, weights_apart
from miles.backends.lora.values import is_below
from miles.backends.training_utils.hooks import call_init_hook
from miles.backends.training_utils.loss_hub.settings import moves_reference
from miles.backends.training_utils.rendezvous import rank_device
from miles.backends.training_utils.sleeping import SleepingMemory
from miles.backends.training_utils.storages import distinct_storages
from miles.utils.lora import ADAPTER_DIRECTORY, LoraSettings

logger = logging.getLogger(__name__)


class FSDPBackend(TrainBackend):
    """See the module's docstring.

    Args:
        args: The run's resolved flags.
        role: "actor"; there is no other.

    Raises:
        FsdpFlagRefused: A flag cannot be honoured.
    """

    def __init__(self, args: Any, role: str = "actor") -> None:
        if role != "actor":
            raise FsdpFlagRefused(
                f"--train-backend fsdp trains no {role}",
                evidence="it trains the actor only",
                advice="Use --train-backend megatron, or an --advantage-estimator without a critic.",
            )
        self.args = args
        self.settings = settings_of(args)
        self.device = rank_device(self.settings.device)
        rank, size = dist.get_rank(), dist.get_world_size()
        self._mesh = _mesh(self.settings.device, size, self.settings.replicas)
        self.parallel = ParallelState(
            rank=rank, world_size=size, dp_rank=rank, dp_size=size, dp_group=dist.group.WORLD if size > 1 else None
        )
        self._model: Any = None
        self._frozen: dict[ModelTag, Any] = {}
        self._adapters: Adapters | None = None
        self._optimizer: ShardedOptimizer | None = None
        self._memory = SleepingMemory(args)

    def init(self) -> int:
        """As the contract says."""
        settings = self.settings
        if settings.deterministic:
            torch.use_deterministic_algorithms(True)
        self._seed(settings.seed)
        call_init_hook(self.args)
        self._model = build_model(settings.loads.hf_checkpoint, self._mesh, self.device, self._options(trained=True))
        self._optimizer = ShardedOptimizer(
            self._model, settings.optimizer, settings.schedule, _shards_group(self._mesh)
        )
        start = self._load()
        reference = weights_directory(settings.loads.reference, settings.loads.ref_step)
        if settings.needs_reference and not (self._adapters and is_below(self._adapters.base, reference)):
            self._frozen["ref"] = self._make_reference()
        if settings.needs_teacher:
            source = cast("Path", settings.loads.teacher)
            self._frozen["teacher"] = self._make_frozen(source, settings.loads.teacher_step, "--opd-teacher-load")
        self._remember_reference()
        return start

    def forward_only(
        self, batches: Sequence[MicroBatch], function: LogitsFunction, *, model: ModelTag = "actor"
    ) -> list[Any]:
        """As the contract says."""
        self._memory.check_awake("compute", level=2)
        network = self._network(model)
        network.eval()
        without = self._adapters.switch.off() if self._adapters and self._stands_in(model) else contextlib.nullcontext()
        with torch.no_grad(), without:
            results = [function(self._logits(network, batch), batch) for batch in batches]
        _reshard(network)
        return results

    def train_step(self, batches: Sequence[MicroBatch], loss_function: LossFunction) -> StepOutcome:
        """As the contract says.

        Raises:
            NotFinite: The gradients are not, and ``--no-check-for-nan-in-loss-and-grad`` was not given.
        """
        self._memory.check_awake("train")
        optimizer = self._trained()
        self._model.train()
        metrics: dict[str, torch.Tensor] = {}
        for batch in batches:
            output = loss_function(self._logits(self._model, batch), batch)
            torch.autograd.backward(output.loss)
            _add(metrics, output)
        norm = optimizer.take_gradients()
        rate = optimizer.learning_rate
        if not self.settings.trains:
            optimizer.drop_gradients()
            return StepOutcome(metrics, norm, rate, stepped=False)
        if math.isfinite(norm):
            optimizer.step(norm)
            return StepOutcome(metrics, norm, rate)
        optimizer.drop_gradients()
        if self.settings.optimizer.check_finite:
            raise self._not_finite(norm)
        return StepOutcome(metrics, norm, rate, stepped=False)

    def reset_optimizer(self) -> None:
        """As the contract says."""
        self._memory.check_awake("reset the optimizer")
        self._trained().reset()

    def objects(self, model: ModelTag = "actor") -> TrainedObjects:
        """As the contract says. The optimizer works on this rank's rows of each parameter."""
        optimizer = self._trained()
        if not self.settings.trains:
            return TrainedObjects([self._network(model)], None, None)
        return TrainedObjects([self._network(model)], optimizer.torch_optimizer, optimizer.schedule)

    def hf_weights(self, *, only_first: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
        """As the contract says; a tied output layer is left out, as in the files."""
        self._memory.check_awake("hand on weights", level=2)
        return full_weights(self._model, self.settings.dtype, self.device, only_first=only_first)

    def local_weights(self, model: ModelTag = "actor", *, trained: bool = False) -> list[torch.Tensor]:
        """As the contract says."""
        self._memory.check_awake("hand on weights", level=2)
        network = self._network(model)
        _reshard(network)
        return [shard.to_local().detach() for _, shard in named_shards(network) if shard.requires_grad or not trained]

    def save(self, directory: Path, *, rollout_id: int) -> None:
        """As the contract says, in the form of ``checkpoint.py``."""
        self._memory.check_awake("save")
        optimizer = self._trained() if self.settings.save_optimizer else None
        rng = RankState.now() if self.settings.save_rng else None
        progress = Progress(rollout_id, self._trained().steps, self.settings.schedule.as_plain(), dist.get_world_size())
        save_checkpoint(directory, self._model, optimizer, rng, progress)
        if self._adapters is not None:
            self._adapters.write(directory / ADAPTER_DIRECTORY)
        if moves_reference(self.args) and "ref" in self._frozen:
            save_weights(directory / REFERENCE, self._frozen["ref"])

    def sleep(self, level: int) -> None:
        """As the contract says.

        Raises:
            CannotSleep: The disk is full, or does not work; what was awake still is.
        """
        optimizer, memory = self._trained(), self._memory
        optimizer.drop_gradients()
        if memory.level < 1:
            memory.put_away(distinct_storages(optimizer.tensors()))
            memory.level = 1
        if memory.level < level:
            models = [self._model, *self._frozen.values()]
            for model in models:
                _reshard(model)
            memory.put_away(distinct_storages(shard.to_local() for model in models for _, shard in named_shards(model)))
            memory.level = 2
        memory.give_back()

    def wake_up(self) -> None:
        """As the contract says."""
        self._memory.wake_up()

    def close(self) -> None:
        """Leave no file of a sleep behind."""
        self._memory.close()

    def _network(self, tag: ModelTag) -> Any:
        if tag == "actor" or self._stands_in(tag):
            return self._model
        assert tag in self._frozen, f"init was not told that a model {tag!r} is needed"
        return self._frozen[tag]

    def _stands_in(self, tag: ModelTag) -> bool:
        """The model without its adapters is the reference."""
        return tag == "ref" and tag not in self._frozen and self._adapters is not None

    def _trained(self) -> ShardedOptimizer:
        assert self._optimizer is not None, "init comes first"
        return self._optimizer

    def _options(self, *, trained: bool) -> ModelOptions:
        settings = self.settings
        return ModelOptions(
            storage=settings.storage if trained else settings.dtype,
            compute=settings.dtype,
            attention=settings.attention,
            gradient_checkpointing=settings.gradient_checkpointing,
            cpu_offload=settings.cpu_offload,
            trained=trained,
            lora=settings.lora if trained else None,
        )

    def _logits(self, network: Any, batch: MicroBatch) -> torch.Tensor:
        """float32 ``[T, V]``."""
        bounds, count = batch.cu_seqlens.tolist(), len(batch.tokens)
        padding = -count % self.settings.pad_to
        tokens, positions = (
            functional.pad(part.to(self.device), (0, padding)) for part in (batch.tokens, batch.position_ids)
        )
        extra: dict[str, Any] = {"packed": packed_layout(bounds, len(tokens), self.device)}
        if self.settings.attention == "flash_attention_2":
            extra = self._flash_arguments(bounds, len(tokens))
        output = network(input_ids=tokens[None], position_ids=positions[None], use_cache=False, **extra)
        return cast("torch.Tensor", output.logits[0, :count].float())

    def _flash_arguments(self, bounds: list[int], count: int) -> dict[str, Any]:
        """Those by which transformers tells flash attention where samples begin; padding is a sample of its own."""
        if bounds[-1] < count:
            bounds = [*bounds, count]
        starts = torch.tensor(bounds, dtype=torch.int32, device=self.device)
        longest = max(end - start for start, end in itertools.pairwise(bounds))
        return {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": longest, "max_length_k": longest}

    def _load(self) -> int:
        """Weights, and whatever else there is, into the new model and optimizer."""
        loads = self.settings.loads
        if self.settings.lora is not None:
            return self._load_adapted(self.settings.lora)
        if loads.load is None or not is_checkpoint(loads.load, loads.step):
            hf = loads.load is not None and (loads.load / "config.json").is_file()
            if loads.load is not None and not hf:
                logger.info("--load %s holds no checkpoint yet: this is a fresh start", loads.load)
            self._load_weights(
                self._model, cast("Path", loads.load) if hf else loads.reference, loads.ref_step, "--ref-load"
            )
            return 0
        return self._go_on(loads.load)

    def _load_adapted(self, lora: LoraSettings) -> int:
        """The weights below adapters, which a checkpoint of adapters says nothing of; then the adapters."""
        loads = self.settings.loads
        base, step, apart = loads.reference, loads.ref_step, False
        directory = None
        if loads.load is not None and is_checkpoint(loads.load, loads.step):
            directory = checkpoint_directory(loads.load, loads.step)
            if loads.finetune and not holds_adapter(directory):
                base, step, directory, apart = loads.load, loads.step, None, True
            elif holds_adapter(directory) and (found := weights_apart(directory)) is not None:
                base, step, apart = found, None, True
        elif loads.load is not None and (loads.load / "config.json").is_file():
            base, step, apart = loads.load, None, True
        elif loads.load is not None:
            logger.info("--load %s holds no checkpoint yet: this is a fresh start", loads.load)
        self._load_weights(self._model, base, step, "--ref-load")
        fresh = lora if directory is None else replace(lora, adapter_path=None)
        self._adapters = Adapters(self._model, fresh, weights_directory(base, step))
        self._adapters.below = replace(self._adapters.below, apart=apart)
        if directory is None:
            return 0
        if holds_adapter(directory):
            check_checkpoint(directory, lora, self._adapters.checksum)
        return self._go_on(cast("Path", loads.load))

    def _remember_reference(self) -> None:
        """What checkpoints of adapters say of the reference; it must not have changed where a run goes on."""
        loads, adapters = self.settings.loads, self._adapters
        if adapters is None or not self.settings.needs_reference:
            return
        frozen = self._frozen.get("ref")
        reference = adapters.checksum if frozen is None else weights_checksum(frozen)
        adapters.below = replace(adapters.below, reference=reference)
        if loads.load is not None and not loads.finetune and is_checkpoint(loads.load, loads.step):
            check_reference(checkpoint_directory(loads.load, loads.step), reference)

    def _go_on(self, root: Path) -> int:
        """From the checkpoint that is chosen; returns the next rollout's number."""
        loads = self.settings.loads
        optimizer = self._trained() if loads.optimizer and not loads.finetune else None
        rng = loads.rng and not loads.finetune
        progress = load_checkpoint(root, self._model, optimizer, step=loads.step, rng=rng)
        if optimizer is not None and progress.schedule != self.settings.schedule.as_plain():
            logger.info("the schedule follows this run's flags, not those that the checkpoint was made with")
        return 0 if loads.finetune else progress.rollout_id + 1

    def _load_weights(self, model: nn.Module, directory: Path, step: int | None, flag: str) -> None:
        """From a Hugging Face directory or a checkpoint of this backend."""
        if is_checkpoint(directory, step):
            load_checkpoint(directory, model, None, step=step, rng=False, below=True)
            return
        if not (directory / "config.json").is_file() and (directory / TRACKER).exists():
            raise BadModelDirectory(
                f"{flag} {directory} is not of a form that --train-backend fsdp reads",
                evidence="it holds a checkpoint in Megatron's torch_dist form",
                advice="Convert it to a Hugging Face directory with `miles convert`, and give that.",
            )
        load_hf_weights(model, directory)

    def _make_reference(self) -> nn.Module:
        """As the checkpoint that is resumed has it (``--ref-update-interval``), or as it was at the begin."""
        loads = self.settings.loads
        moved = None
        if moves_reference(self.args) and loads.load is not None and not loads.finetune:
            moved = weights_beside(loads.load, loads.step, REFERENCE)
        if moved is None:
            return self._make_frozen(loads.reference, loads.ref_step, "--ref-load")
        model = build_model(loads.hf_checkpoint, self._mesh, self.device, self._options(trained=False))
        load_weights(moved, model)
        return model

    def _make_frozen(self, source: Path, step: int | None, flag: str) -> nn.Module:
        hf = self.settings.loads.hf_checkpoint
        model = build_model(hf, self._mesh, self.device, self._options(trained=False))
        self._load_weights(model, source, step, flag)
        return model

    def _seed(self, seed: int) -> None:
        """Ranks hold different samples, and draw different numbers."""
        own = seed + self.parallel.dp_rank
        random.seed(own)
        np.random.seed(own % 2**32)  # user code may use the global generator
        torch.manual_seed(own)

    def _not_finite(self, norm: float) -> NotFinite:
        return NotFinite(
            f"the gradient norm of optimizer step {self._trained().steps} is {norm}",
            evidence="no weight was changed",
            advice="Lower --lr, look at the losses of the steps before, or leave such steps out with "
            "--no-check-for-nan-in-loss-and-grad.",
        )


def _mesh(device: str, world: int, replicas: int) -> DeviceMesh:
    """Shards over all ranks, or over those of each replica (``--dp-replicate-size``): ranks next to each other."""
    if replicas == 1:
        return init_device_mesh(device, (world,), mesh_dim_names=("dp",))
    if world % replicas:
        raise FsdpFlagRefused(
            f"--dp-replicate-size {replicas} does not divide the {world} ranks",
            evidence="each replica has as many ranks",
            advice="Give a divisor of the number of ranks.",
        )
    return init_device_mesh(device, (replicas, world // replicas), mesh_dim_names=("replicate", "dp"))


def _shards_group(mesh: DeviceMesh) -> dist.ProcessGroup:
    """Ranks that together have each number once."""
    return mesh.get_group("dp")


def _add(sums: dict[str, torch.Tensor], output: LossOutput) -> None:
    for name, value in output.metrics.items():
        sums[name] = sums[name] + value if name in sums else value.detach()


def _reshard(model: nn.Module) -> None:
    """A forward pass alone leaves the root gathered, and it would not see the next update."""
    for module in fsdp_modules(model):
        module.reshard()
