"""Ranks of a Megatron trainer that do nothing but send their random weights: ``torchrun -m gpu_bench.trainer_ranks``.

Takes ``TASK.json`` (see ``Task``) and the file for what the first rank finds: for each size of buckets the seconds by
part of each update, and how many bytes one moves.
"""

from __future__ import annotations

import faulthandler
import json
import os
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from gpu_bench.ipc import export_of
from gpu_bench.runs import last_words, under_way
from gpu_bench.updates import TURNS, WARM_UP, Updates
from main_job_bench.processes import RunFailed, environment, python
from miles.backends.weight_update.messages import EngineTarget, WeightUpdate
from miles_agents.worker.main import STACK_SIGNAL

_GROUP_S = 60.0


@dataclass(frozen=True)
class Task:
    """What the ranks are to do.

    Attributes:
        model: Directory whose ``config.json`` gives the shape.
        engines: Fields of ``EngineTarget``.
        version: Of the first update.
        export: Directory for the weights that were sent last; empty: none.
    """

    model: str
    engines: Sequence[dict[str, Any]]
    buckets: Sequence[int]
    device: str
    version: int
    export: str = ""


def updates_of(out: Path, name: str, task: Task, ranks: int, deadline_s: float) -> list[dict[str, Any]]:
    """Tensor-parallel ``ranks`` on the first GPUs send what ``task`` says. Other processes stay. Raises RunFailed."""
    asked, found = out / f"{name}.task.json", out / f"{name}.found.json"
    asked.write_text(json.dumps(asdict(task)))
    found.unlink(missing_ok=True)
    command = python("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m",
                     "gpu_bench.trainer_ranks", str(asked), str(found))  # fmt: skip
    env = environment(1 if task.device == "cpu" else 8, {"NCCL_CUMEM_ENABLE": "0"})
    log = out / f"{name}.trainer.log"
    with under_way(command, env, log) as process:
        try:
            code: int | None = process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            code = None
    if code != 0:
        why = f"exit code {code}" if code is not None else f"not done within {deadline_s:g} s"
        raise RunFailed(f"{name}: {why}: {last_words(log)}")
    rows: list[dict[str, Any]] = json.loads(found.read_text())
    return rows


class Trainer:
    """This rank's part of the model, without optimizer."""

    def __init__(self, model: Path, device: Any) -> None:
        import torch

        from miles.backends.megatron_utils.families import read_shape, weight_rules
        from miles.backends.megatron_utils.model import build_model, padded_vocab, transformer_config
        from miles.backends.megatron_utils.parallel import init_parallel
        from miles.backends.megatron_utils.stages import Stage

        size = int(os.environ["WORLD_SIZE"])
        args = Namespace(tensor_model_parallel_size=size, make_vocab_size_divisible_by=128, seed=1234)
        shape = read_shape(json.loads((model / "config.json").read_text()))
        self.rules = weight_rules(shape, padded_vocab(args, shape.vocab))
        self.parallel = init_parallel(args)
        config = transformer_config(args, shape, torch.bfloat16)
        self.stage = Stage.of(config, shape, self.parallel)
        self.module = build_model(args, shape, config).to(device)
        with torch.no_grad():
            for parameter in self.module.parameters():
                parameter.normal_(0.0, 0.02)

    def weights(self) -> Iterator[tuple[str, Any]]:
        """As ``TrainBackend.hf_weights``: collective."""
        from miles.backends.megatron_utils.weights import full_tensors

        return full_tensors(self.module, self.rules, stage=self.stage, parallel=self.parallel, only_first=True)

    def export(self, export: Path, model: Path) -> None:
        """The first rank writes the weights down, beside what ``model`` has of other files: collective."""
        weights = [(name, tensor.to("cpu", copy=True).contiguous()) for name, tensor in self.weights()]
        if int(os.environ["RANK"]) == 0:
            export_of(export, model, weights)

    def change(self) -> None:
        """Other weights than before."""
        import torch

        with torch.no_grad():
            for parameter in self.module.parameters():
                parameter.mul_(1 + 0.05 * torch.rand((), device=parameter.device).to(parameter.dtype))
        if torch.cuda.is_available():
            torch.cuda.synchronize()


def main(argv: list[str]) -> int:
    import torch
    import torch.distributed as dist

    faulthandler.register(STACK_SIGNAL, all_threads=True)
    task, rank = Task(**json.loads(Path(argv[0]).read_text())), int(os.environ["RANK"])
    on_gpu = task.device == "cuda"
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(seconds=_GROUP_S))
    trainer, version, rows = Trainer(Path(task.model), device), task.version, []
    targets = tuple(EngineTarget(**each) for each in task.engines)
    for bucket in task.buckets:
        updates = Updates(WeightUpdate(version, targets, "broadcast", bucket), device, parallel=trainer.parallel)
        found = []
        for _ in range(WARM_UP + TURNS):
            trainer.change()
            dist.barrier()
            found.append(updates.send(trainer.weights()))
        version = updates.version
        rows.append({"bucket": bucket, "num_bytes": updates.num_bytes, "seconds": found[WARM_UP:]})
        updates.close()
    if task.export:
        trainer.export(Path(task.export), Path(task.model))
    if rank == 0:
        Path(argv[1]).write_text(json.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
