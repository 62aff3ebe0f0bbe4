"""Recorded rollouts trained on in every layout, and again after a restart: the numbers are those of one GPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gpu_bench.compare import METRICS, apart, rollout_rows, weights, weights_apart
from gpu_bench.model import SHAPES, model
from gpu_bench.recorded import recorded
from gpu_bench.rehearsal import is_rehearsal, shape
from gpu_bench.results import Results
from gpu_bench.runs import Run, together
from gpu_bench.training import flags
from main_job_bench.processes import RunFailed

LAYOUTS: dict[str, tuple[str, ...]] = {
    "tp2": ("--tensor-model-parallel-size", "2", "--sequence-parallel"),
    "pp2": ("--pipeline-model-parallel-size", "2"),
    "cp2": ("--context-parallel-size", "2"),
    "dp2": (),
}
ROLLOUTS = 3
_DENSE, _MOE = "layers8", "moe"
_RUN_S = 170.0
_NOISE = ("--max-tokens-per-gpu", "1024")
"""Other micro-batches on one GPU: the same sums in another order, which is the difference that bfloat16 makes."""


def trained(out: Path, name: str, kind: str, *more: str, gpus: tuple[int, ...] = (), backend: str = "megatron") -> Run:
    """A run on recorded rollouts, without engines."""
    template = recorded(out, SHAPES[shape(kind)].vocab)
    arguments = flags(
        out, backend, out / f"run-{name}", "--debug-train-only", "--load-debug-rollout-data", template,
        "--rollout-max-response-len", "128", "--num-rollout", str(ROLLOUTS), *more, shape=kind,
    )  # fmt: skip
    return Run(name, arguments, gpus)


def exported(out: Path, name: str) -> tuple[str, ...]:
    """Flags that leave the weights in ``export-NAME``."""
    return (
        "--save", str(out / f"save-{name}"), "--save-interval", "1000", "--no-save-optim",
        "--save-hf", str(out / f"export-{name}"),
    )  # fmt: skip


def layouts(results: Results) -> None:
    """Megatron over two GPUs, and variations on one, against one GPU. In bfloat16: on GPUs there is nothing else."""
    out = results.out
    results.add("float32", "not run", note="the trainer computes in bfloat16 on GPUs, no flag changes that")
    noise = ("--max-tokens-per-gpu", "64") if is_rehearsal() else _NOISE
    ones = [
        trained(out, "layout-one", _DENSE, *exported(out, "layout-one"), gpus=(0,)),
        trained(out, "layout-noise", _DENSE, *noise, *exported(out, "layout-noise"), gpus=(1,)),
        trained(out, "layout-moe", _MOE, *exported(out, "layout-moe"), gpus=(1,)),
    ]
    side_by_side(results, ones)
    compared(results, "other micro-batches on one GPU (noise)", "layout-noise", "layout-one", _DENSE)
    spread = [(name, _DENSE, LAYOUTS[name]) for name in LAYOUTS] + [
        ("ep2", _MOE, ("--expert-model-parallel-size", "2"))
    ]
    for part in (spread[:3], spread[3:]):
        side_by_side(
            results,
            [
                trained(
                    out,
                    f"layout-{name}",
                    kind,
                    *more,
                    "--actor-num-gpus-per-node",
                    "2",
                    *exported(out, f"layout-{name}"),
                )
                for name, kind, more in part
            ],
        )
        for name, kind, _ in part:
            compared(results, name, f"layout-{name}", "layout-moe" if kind == _MOE else "layout-one", kind)


def side_by_side(results: Results, runs: Sequence[Run]) -> None:
    """At the same time; in a rehearsal, on few cores, one after the other. What fails is a finding."""
    groups = [[each] for each in runs] if is_rehearsal() else [list(runs)]
    for group in groups:
        try:
            together(results.out, group, _RUN_S)
        except RunFailed as error:
            results.add(", ".join(each.name for each in group), "failed", note=str(error)[:600])


def compared(results: Results, what: str, ours: str, theirs: str, kind: str = "") -> None:
    """Rows about each metric and, with ``kind``, the weights in the end. Relative; a run without rows is told."""
    out = results.out
    mine, other = rollout_rows(out / f"run-{ours}"), rollout_rows(out / f"run-{theirs}")
    if not mine or not other:
        results.add(f"{what}: compared", "nothing", note=f"rollouts: {len(mine)} and {len(other)}")
        return
    for name in METRICS:
        found = apart(mine, other, name)
        if found is None:
            results.add(f"{what}: {name}", "not comparable", note=f"rollouts: {len(mine)} and {len(other)}")
        else:
            values = ", ".join(f"{float(row[name]):.6g}" for row in mine)
            results.add(f"{what}: {name}, first rollout apart by", found[0], note=f"worst {found[1]:.3g}; {values}")
    directories = [out / f"export-{name}" for name in (ours, theirs)]
    if kind and all(directory.exists() for directory in directories):
        first = weights(model(out, kind))
        between, moved = weights_apart(weights(directories[0]).items(), weights(directories[1]), first)
        results.add(f"{what}: weights apart by", between, note=f"relative; training moved them by {moved:.3g}")


def resume(results: Results) -> None:
    """Four rollouts, and two and two with a checkpoint between: the same numbers, with deterministic kernels; where
    there are none, as near as two runs of the same are."""
    for name, kernels in (("deterministic", ("--deterministic-mode",)), ("usual", ())):
        if resumed(results, name, ("--num-rollout", "4", *kernels)):
            return
    raise RuntimeError("no run ended well; see its log")


def resumed(results: Results, kernels: str, more: Sequence[str]) -> bool:
    """With these kernels; whether there was anything to compare."""
    out, save = results.out, results.out / f"save-resumed-{kernels}"
    first, again, whole = (f"resume-{kernels}-{part}" for part in ("first", "again", "whole"))
    stopped = ("--save", str(save), "--save-interval", "2", "--debug-exit-after-rollout", "2")
    side_by_side(results, [trained(out, first, _DENSE, *more, *stopped, gpus=(0,))])
    if not rollout_rows(out / f"run-{first}"):
        return False
    going_on = ("--save", str(save), "--load", str(save))
    runs = [trained(out, again, _DENSE, *more, *going_on, gpus=(0,)), trained(out, whole, _DENSE, *more, gpus=(0,))]
    side_by_side(results, runs)
    wanted = rollout_rows(out / f"run-{whole}")
    found = [*rollout_rows(out / f"run-{first}"), *rollout_rows(out / f"run-{again}")]
    results.add("rollouts, whole and resumed", f"{len(wanted)}, {len(found)}", note=f"{kernels} kernels")
    for name in METRICS:
        differences = apart(found, wanted, name)
        results.add(
            f"{name}: apart by", "not comparable" if differences is None else differences[1],
            note=", ".join(f"{row.get(name, 0.0):.8g}" for row in found),
        )  # fmt: skip
    return bool(wanted) and len(wanted) == len(found)


def cpu_offload(results: Results) -> None:
    """Adam in host memory (``--optimizer-cpu-offload``) gives what Adam on the GPU gives."""
    out = results.out
    runs = [
        trained(out, "adam-gpu", _DENSE, *exported(out, "adam-gpu"), gpus=(0,)),
        trained(out, "adam-cpu", _DENSE, "--optimizer-cpu-offload", *exported(out, "adam-cpu"), gpus=(0,)),
    ]
    side_by_side(results, runs)
    compared(results, "Adam in host memory", "adam-cpu", "adam-gpu", _DENSE)
