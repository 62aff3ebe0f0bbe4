"""Flags: the optimizer and its schedule."""

from __future__ import annotations

from miles.flags.flag import Flag, grouped, integer, number, refused, switch, text

GROUP = "optimizer"
PRECISION = (
    "optimizer state in lower precision is that of Transformer Engine, which needs CUDA and is no package of ours"
)
SAMPLES = "the schedule counts optimizer steps: use the flag with iters in its name"

FLAGS: tuple[Flag, ...] = (
    *grouped(
        GROUP,
        "contract",
        text("--optimizer", "adam", "the optimizer", choices=("adam", "sgd")),
        number("--lr", 1e-6, "learning rate"),
        text(
            "--lr-decay-style",
            "constant",
            "how it decays",
            choices=("constant", "linear", "cosine", "inverse-square-root", "WSD"),
        ),
        integer("--lr-warmup-iters", 0, "steps of linear warm-up"),
        number("--min-lr", 0.0, "where decay ends"),
        number("--weight-decay", 0.1, "decoupled weight decay"),
        number("--adam-beta1", 0.9, "decay of the first moment"),
        number("--adam-beta2", 0.98, "decay of the second moment"),
        number("--clip-grad", 1.0, "largest norm of the gradient (0: any)"),
        switch("--optimizer-cpu-offload", "Adam's state is in host memory, and it computes there"),
        switch("--overlap-cpu-optimizer-d2h-h2d", "its copies run ahead of what it computes"),
        refused(switch("--use-precision-aware-optimizer", "optimizer state in lower precision"), PRECISION),
    ),
    *grouped(
        GROUP,
        "megatron",
        number("--adam-eps", 1e-8, "epsilon of Adam"),
        number("--sgd-momentum", 0.9, "momentum of SGD"),
        integer("--lr-decay-iters", None, "steps until --min-lr (unset: all of them)"),
        number("--lr-warmup-fraction", None, "share of the decay steps that warm up"),
        number("--lr-warmup-init", 0.0, "learning rate at the start of warm-up"),
        integer("--lr-wsd-decay-iters", None, "steps of WSD's annealing"),
        text(
            "--lr-wsd-decay-style",
            "exponential",
            "how WSD anneals",
            choices=("exponential", "linear", "cosine", "minus_sqrt"),
        ),
        number("--decoupled-lr", None, "learning rate of the embedding and the output layer (unset: --lr)"),
        number("--decoupled-min-lr", None, "where theirs ends (unset: --min-lr)"),
        switch("--apply-wd-to-qk-layernorm", "weight decay for the norms of queries and keys, too"),
        number("--start-weight-decay", None, "weight decay at the start"),
        number("--end-weight-decay", None, "weight decay at the end"),
        text(
            "--weight-decay-incr-style", "constant", "how weight decay grows", choices=("constant", "linear", "cosine")
        ),
        refused(
            switch(
                "--override-opt-param-scheduler",
                "the schedule of the flags, not of the checkpoint",
                also=("--override-opt_param-scheduler",),
            ),
            "",
            only=(True,),
        ),
        switch(
            "--use-checkpoint-opt-param-scheduler",
            "the schedule of the checkpoint, not of the flags",
            also=("--use-checkpoint-opt_param-scheduler",),
        ),
        refused(
            switch("--use-distributed-optimizer", "optimizer state is sharded over data-parallel ranks"),
            "",
            only=(True,),
        ),
        refused(switch("--accumulate-allreduce-grads-in-fp32", "gradients are summed in float32"), "", only=(True,)),
        refused(integer("--lr-warmup-samples", 0, "warm-up in samples"), SAMPLES, only=(0,)),
        refused(integer("--lr-decay-samples", None, "decay in samples"), SAMPLES),
        refused(integer("--lr-wsd-decay-samples", None, "annealing in samples"), SAMPLES),
        refused(
            integer("--train-iters", None, "steps in all"), "computed from --num-rollout and --num-steps-per-rollout"
        ),
        refused(
            integer("--train-samples", None, "samples in all"), "computed from --num-rollout and --rollout-batch-size"
        ),
    ),
)
