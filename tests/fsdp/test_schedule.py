"""The curves are those of megatron-core's scheduler for the same flags."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from support.backend_cases import backend_args
from support.ranks import run_ranks

from miles.backends.fsdp_utils.errors import FsdpFlagRefused
from miles.backends.fsdp_utils.schedule import schedule_of

BATCH = 16


def megatron_curve(args, steps):
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    total = args.num_rollout * args.num_steps_per_rollout
    decay = (args.lr_decay_iters or total) * BATCH
    fraction = args.lr_warmup_fraction
    optimizer = SimpleNamespace(param_groups=[{"lr": 0.0, "weight_decay": 0.0}])
    varying = getattr(args, "start_weight_decay", None) is not None
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=args.lr_warmup_init,
        max_lr=args.lr,
        min_lr=args.min_lr,
        lr_warmup_steps=fraction * decay if fraction is not None else args.lr_warmup_iters * BATCH,
        lr_decay_steps=decay,
        lr_decay_style=args.lr_decay_style,
        start_wd=args.start_weight_decay if varying else args.weight_decay,
        end_wd=args.end_weight_decay if varying else args.weight_decay,
        wd_incr_steps=total * BATCH,
        wd_incr_style=args.weight_decay_incr_style if varying else "constant",
        wsd_decay_steps=(getattr(args, "lr_wsd_decay_iters", None) or 0) * BATCH,
        lr_wsd_decay_style=getattr(args, "lr_wsd_decay_style", None),
    )
    curve = []
    for _ in range(steps):
        curve.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["weight_decay"]))
        scheduler.step(BATCH)
    return curve


CASES = [
    {"lr_decay_style": "constant"},
    {"lr_decay_style": "constant", "lr_warmup_iters": 4},
    {"lr_decay_style": "linear", "lr_warmup_iters": 3, "min_lr": 1e-5},
    {"lr_decay_style": "cosine", "lr_warmup_iters": 5, "lr_decay_iters": 15, "min_lr": 1e-4, "lr_warmup_init": 2e-4},
    {"lr_decay_style": "cosine", "lr_warmup_fraction": 0.25},
    {"lr_decay_style": "inverse-square-root", "lr_warmup_iters": 3, "min_lr": 5e-4},
    *(
        {"lr_decay_style": "WSD", "lr_wsd_decay_style": style, "lr_wsd_decay_iters": 6, "lr_warmup_iters": 2}
        for style in ("linear", "cosine", "exponential", "minus_sqrt")
    ),
    *(
        {
            "lr_decay_style": "constant",
            "start_weight_decay": 0.01,
            "end_weight_decay": 0.2,
            "weight_decay_incr_style": style,
        }
        for style in ("linear", "cosine")
    ),
]


@pytest.fixture(scope="module")
def megatron_curves():
    """By case. In the warm process: importing Megatron is slow, and warns."""
    (curves,) = run_ranks(1, _megatron_curves, distributed=False)
    return curves


def _megatron_curves():
    return [megatron_curve(case_args(case), 24) for case in CASES]


def case_args(flags):
    return backend_args(Path("none"), num_rollout=10, num_steps_per_rollout=2, **flags)


@pytest.mark.parametrize("case", range(len(CASES)))
def test_each_curve_is_megatron_s(case, megatron_curves):
    schedule = schedule_of(case_args(CASES[case]))
    found = [(schedule.learning_rate(step), schedule.weight_decay(step)) for step in range(24)]
    for ours, theirs in zip(found, megatron_curves[case], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-12, abs=1e-18)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"lr_decay_style": "stairs"}, "--lr-decay-style"),
        ({"min_lr": 1.0}, "--min-lr"),
        ({"lr_decay_style": "linear", "lr_warmup_iters": 10}, "warming up"),
        ({"lr_decay_style": "WSD"}, "--lr-wsd-decay-iters"),
    ],
)
def test_flags_that_make_no_curve_are_refused(flags, named):
    with pytest.raises(FsdpFlagRefused, match=named) as refused:
        schedule_of(backend_args(Path("none"), **flags))
    assert refused.value.code == "E-FSDP-001"
