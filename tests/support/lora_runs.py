"""Runs of a real backend with adapters: rollouts, saves, and all that decides how they go on. In ranks."""

import random
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from miles.backends.checkpoint_layout import TRACKER, iteration_name
from miles.backends.training_utils.checkpoints import commit_checkpoint
from miles.backends.training_utils.rollout_trainer import RolloutTrainer
from miles.backends.training_utils.timers import Timers
from miles.utils.train_data import split_train_data
from support.lora_cases import lora_flags
from support.trained_rollouts import args_of, backend_of, data_of

ADAM = {"optimizer": "adam", "lr": 1e-2, "adam_beta1": 0.9, "adam_beta2": 0.98, "adam_eps": 1e-8, "clip_grad": 1.0}


class Run:
    """A backend with the flags that it was made of."""

    def __init__(self, path, kind, changed):
        self.kind = kind
        self.args = args_of(path, kind, **{**ADAM, **lora_flags(), "dp_size": 1, **changed})
        self.backend = backend_of(kind, self.args)
        self.start = self.backend.init()
        self.trainer = RolloutTrainer(self.args, self.backend, Timers(self.backend.device))

    @property
    def adapters(self):
        return self.backend.adapters if self.kind == "megatron" else self.backend._adapters

    @property
    def frozen(self):
        return self.backend.frozen if self.kind == "megatron" else self.backend._frozen

    def train(self, rollout_ids):
        for rollout_id in rollout_ids:
            parts = split_train_data(self.args, data_of(rollout_id))
            self.trainer.train(rollout_id, lambda parts=parts: parts[self.backend.parallel.dp_rank])

    def save(self, root, rollout_id):
        directory = Path(root) / iteration_name(rollout_id)
        if dist.get_rank() == 0:
            directory.mkdir(parents=True)
        dist.barrier()
        self.backend.save(directory, rollout_id=rollout_id)
        dist.barrier()
        if dist.get_rank() == 0:
            (Path(root) / TRACKER).write_text(str(rollout_id))
        dist.barrier()

    def weights(self):
        return {name: tensor.clone() for name, tensor in self.backend.hf_weights()}

    def everything(self):
        """Weights, the optimizer's numbers on this rank, and what the generators give next."""
        found = self.weights()
        for i, tensor in enumerate(self.optimizer_tensors()):
            found[f"optimizer {i}"] = tensor.detach().clone()
        found["draws"] = torch.tensor([random.random(), np.random.rand(), float(torch.rand(()))])
        return found

    def optimizer_tensors(self):
        if self.kind == "fsdp":
            optimizer = self.backend._optimizer
            yield from optimizer.tensors()
            yield torch.tensor(optimizer.steps)
            return
        for part in self.backend.optimizer.chained_optimizers:
            for group in part.optimizer.param_groups:
                for parameter in group["params"]:
                    yield parameter
                    yield from part.optimizer.state[parameter].values()


def whole_run(path, kind, changed, root):
    """Saved in the middle."""
    run = Run(path, kind, changed)
    run.train([0])
    run.save(root, 0)
    middle = run.weights()
    run.train([1])
    return middle, run.everything()


def resumed_run(path, kind, changed, root):
    run = Run(path, kind, {**changed, "load": str(root)})
    middle = run.weights()
    run.train([run.start])
    return run.start, middle, run.everything()


def started_weights(path, kind, changed):
    run = Run(path, kind, changed)
    return run.start, run.weights()


def two_checkpoints(path, kind, root):
    """Of one run without adapters, whose weights differ."""
    run = Run(path, kind, {"lora_rank": 0, "save": str(root)})
    for rollout_id in (0, 1):
        run.train([rollout_id])
        commit_checkpoint(
            root, rollout_id, lambda place, of=rollout_id: run.backend.save(place, rollout_id=of), run.backend.device
        )  # fmt: skip
    run.backend.close()
