"""The trainer: one rank of the model that is trained, as an actor.

Consumes: the config; batches by reference from the store; weight updates, sleeps and wakes as the job orders them.
Produces: metrics, checkpoints, weights for engines. Waits for: the other ranks, in collectives, each with the timeout
of ``--distributed-timeout-minutes``; the store, with the deadline of the call.

Invariants: every endpoint but ``rendezvous``, ``progress`` and ``after_save`` is collective: all ranks are called, in
the same order, and run it on their main thread. After ``train`` returns, the weights are those of the whole rollout. A
checkpoint either counts, complete, or has left no trace.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import logging
import os
import random
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from miles.backends.base import TrainBackend
from miles.backends.training_utils.checkpoints import commit_checkpoint
from miles.backends.training_utils.critic import SUFFIX, Critic, check_same_start, critic_args, has_critic
from miles.backends.training_utils.hooks import TrainerHooks
from miles.backends.training_utils.loss_hub.settings import LossSettings
from miles.backends.training_utils.profiling import MemoryRecorder
from miles.backends.training_utils.rendezvous import Rendezvous
from miles.backends.training_utils.rollout_trainer import RolloutTrainer
from miles.backends.training_utils.timers import Timers
from miles.backends.weight_update.messages import WeightUpdate
from miles.utils.spans import Span
from miles_agents import Actor, Ref, endpoint, store
from miles_agents.errors import ConfigError, InternalError

log = logging.getLogger(__name__)

BACKENDS = {
    "megatron": ("miles.backends.megatron_utils.backend", "MegatronBackend"),
    "fsdp": ("miles.backends.fsdp_utils.backend", "FSDPBackend"),
}


class NotReady(InternalError):
    """An endpoint of the trainer was called before ``init``, or in a state that it is not for."""

    code = "E-TRAIN-009"


class NowhereToSave(ConfigError):
    """A checkpoint was asked for without ``--save``."""

    code = "E-TRAIN-010"


class Trainer(Actor):
    """See the module's docstring.

    Args:
        config: The run's resolved config: plain values by the flags' names.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        from miles.utils.arguments import namespace

        self.args = namespace(dict(config))
        self._rendezvous = Rendezvous()
        self._backend: TrainBackend | None = None
        self._trainer: RolloutTrainer | None = None
        self._critic: Critic | None = None
        self._senders: dict[str, Any] = {}
        self._timers = Timers(torch.device("cpu"))
        self._recorder: MemoryRecorder | None = None
        self._asleep = 0
        self._rollout_id = -1

    @endpoint(thread="io")
    def rendezvous(self) -> tuple[str, int]:
        """On rank 0: where ``init`` of all ranks is to go."""
        return self._rendezvous.listen()

    @endpoint(thread="io")
    def progress(self) -> dict[str, Any]:
        """What the rank is at: ``phase``, ``rollout_id``, ``step`` of ``num_steps``. Answers during collectives."""
        step, steps = self._trainer.step_of if self._trainer is not None else (0, 0)
        return {"phase": self._timers.phase, "rollout_id": self._rollout_id, "step": step, "num_steps": steps}

    @endpoint(thread="io")
    def spans(self) -> list[Span]:
        """What this rank did since it was last asked, for the trace of the run. Answers during collectives."""
        return self._timers.spans.take()

    @endpoint
    def init(self, host: str, port: int) -> dict[str, Any]:
        """Meet the other ranks, build the model and load weights. Returns ``start_rollout_id``.

        Raises:
            UnsupportedLoss: A flag asks for what there is not.
            CannotLoad, ImportFailed: A function of the user's cannot be had.
            NoMemoryRecorder, CannotProfile: Memory cannot be recorded.
            NoRendezvous: The ranks do not find each other.
        """
        LossSettings.from_args(self.args)
        TrainerHooks.of(self.args)  # before anything is waited for
        if self.args.device == "cpu":
            torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        self._recorder = MemoryRecorder(self.args, int(os.environ.get("RANK", "0")))
        _seed(int(self.args.seed))
        self._rendezvous.join(host, port, self.args)
        backend = self.make_backend()
        start = backend.init()
        self._timers = Timers(backend.device)
        self._backend = backend
        if has_critic(self.args):
            self._critic = self._make_critic(backend, start)
        self._trainer = RolloutTrainer(self.args, backend, self._timers, self._critic)
        return {"start_rollout_id": start}

    def make_backend(self) -> TrainBackend:
        """What ``--train-backend`` names; imported only now, as each needs much."""
        module, name = BACKENDS[self.args.train_backend]
        backend: TrainBackend = getattr(importlib.import_module(module), name)(self.args)
        return backend

    def _make_critic(self, actor: TrainBackend, start: int) -> Critic:
        """With the actor's groups. Only the Megatron backend has critics."""
        from miles.backends.megatron_utils.backend import MegatronBackend

        args = critic_args(self.args)
        backend = MegatronBackend(args, role="critic", parallel=actor.parallel)
        check_same_start(start, backend.init(), args)
        return Critic(args, backend)

    @property
    def _backends(self) -> list[TrainBackend]:
        """The critic's first: its checkpoint is there when the actor's counts."""
        found = [] if self._critic is None else [self._critic.backend]
        return found if self._backend is None else [*found, self._backend]

    @endpoint
    def train(self, rollout_id: int, refs: list[Ref]) -> dict[str, float]:
        """Train on a rollout.

        Args:
            rollout_id: Which.
            refs: By data-parallel rank, each to a part of ``split_train_data``. The rollout manager removes them.

        Returns:
            ``train/``, ``perf/`` and ``rollout/`` metrics, over all ranks; times are of this rank.
        """
        backend, trainer = self._ready()
        self._wake()
        self._rollout_id = rollout_id
        ref = refs[backend.parallel.dp_rank]
        metrics = trainer.train(rollout_id, lambda: store.get(ref))
        if self._recorder is not None:
            self._recorder.rollout_done()
        return metrics

    @endpoint(thread="io")
    def last_steps(self) -> list[dict[str, float]]:
        """``train/...`` of each optimizer step of the last rollout, of which ``train`` gives the means."""
        return [] if self._trainer is None else self._trainer.last_steps

    @endpoint
    def save(self, rollout_id: int, directory: str | None = None) -> str:
        """Write a checkpoint below ``--save``, or below a directory for recovery; returns its own directory.

        Raises:
            CannotSave: Nothing has changed on the disk.
        """
        backend, _ = self._ready()
        if not (directory or getattr(self.args, "save", None)):
            raise NowhereToSave("there is no place for a checkpoint", advice="Give --save.")
        self._wake()
        path = ""
        with self._timers.measure("save_model"):
            for part in self._backends:
                root = directory or self.args.save
                if part is not backend:
                    root = directory + SUFFIX if directory else critic_args(self.args).save
                path = str(commit_checkpoint(Path(root), rollout_id, partial(_write, part, rollout_id), part.device))
        return path

    @endpoint
    def export_hf(self, path: str) -> None:
        """Write the weights as a Hugging Face directory, which engines and ``transformers`` load."""
        from miles.backends.hf_export import export_hf

        backend, _ = self._ready()
        self._wake()
        with self._timers.measure("export_hf"):
            export_hf(backend, self.args, Path(path))

    @endpoint
    def after_save(self, rollout_id: int, path: str, hf_path: str | None) -> None:
        """``--custom-megatron-post-save-hook-path``: called on rank 0 when checkpoint and export are on disk.

        Raises:
            HookFailed: It raised.
        """
        _, trainer = self._ready()
        if trainer.hooks.after_save is not None:
            with self._timers.measure("post_save_hook"):
                trainer.hooks.after_save.call(self.args, rollout_id, path, hf_path)

    @endpoint
    def update_weights(self, update: WeightUpdate) -> dict[str, float]:
        """Give the engines these weights. Returns seconds by part."""
        from miles.backends.weight_update.sender import kind_of, make_sender

        backend, trainer = self._ready()
        if self._asleep > 1:
            self._wake()
        sender = self._senders.get(kind_of(update))
        if sender is None:
            # Ranks that begin anew are in no group, whatever engines were in with those before them.
            update = replace(update, new_group=True)
            sender = self._senders[kind_of(update)] = make_sender(backend.parallel, update, backend.device)
        with self._timers.measure("update_weights"):
            weights = backend.hf_weights(only_first=sender.reads_only_first)
            seconds: dict[str, float] = sender.send(update, weights, backend.local_weights())
        if trainer.old_weights is not None:
            with self._timers.measure("keep_old_actor"):
                trainer.old_weights.keep(update.version)
        return seconds

    @endpoint
    def sleep(self, level: int) -> dict[str, float]:
        """Give memory back: 1, gradients and optimizer state; 2, parameters too. Returns resident bytes of this process
        before and after (``rss_before``, ``rss_after``), and those of the GPU."""
        backend, trainer = self._ready()
        before = _memory("before", backend.device)
        if level > self._asleep:
            with self._timers.measure("sleep"):
                for part in self._backends:
                    part.sleep(level)
                if trainer.old_weights is not None:
                    trainer.old_weights.sleep(level)
            self._asleep = level
        _give_back(backend.device)
        return before | _memory("after", backend.device)

    @endpoint
    def wake_up(self) -> dict[str, float]:
        """Take everything back, as it was. Returns the same as ``sleep``."""
        backend, _ = self._ready()
        before = _memory("before", backend.device)
        self._wake()
        return before | _memory("after", backend.device)

    def close(self) -> None:
        """Process groups and the backend's files are given back."""
        for sender in self._senders.values():
            sender.close()
        for part in self._backends:
            part.close()
        if self._trainer is not None and self._trainer.old_weights is not None:
            self._trainer.old_weights.close()
        if self._recorder is not None:
            self._recorder.close()
        self._rendezvous.leave()

    def _ready(self) -> tuple[TrainBackend, RolloutTrainer]:
        if self._backend is None or self._trainer is None:
            raise NotReady("the trainer was called before init", advice="Call init on all ranks first.")
        return self._backend, self._trainer

    def _wake(self) -> None:
        if self._asleep:
            with self._timers.measure("wake_up"):
                for part in self._backends:
                    part.wake_up()
            self._asleep = 0


def _write(backend: TrainBackend, rollout_id: int, directory: Path) -> None:
    backend.save(directory, rollout_id=rollout_id)


def _seed(seed: int) -> None:
    """The same on all ranks; a backend goes on from here where ranks must differ, and loads what a checkpoint holds."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # the global generator is what user code draws from
    torch.manual_seed(seed)


def _give_back(device: torch.device) -> None:
    """Memory that is free in this process goes to the system."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.ipc_collect()  # type: ignore[no-untyped-call]  # buckets of a weight update that engines have let go of
        torch.cuda.empty_cache()
    else:
        ctypes.CDLL(None).malloc_trim(0)


def _memory(when: str, device: torch.device) -> dict[str, float]:
    numbers = {f"rss_{when}": float(psutil.Process().memory_info().rss)}
    if device.type == "cuda":
        numbers[f"gpu_{when}"] = float(torch.cuda.memory_reserved(device))
    return numbers
