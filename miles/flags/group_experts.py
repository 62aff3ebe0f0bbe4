"""Flags: a mixture of experts. Its shape is that of ``config.json``, and what is typed is compared with it; how tokens
find their experts is fixed, because engines compute the same."""

from __future__ import annotations

from miles.flags.flag import Flag, grouped, integer, number, refused, switch, text
from miles.flags.megatron_refused import MOE

GROUP = "mixture of experts"
BALANCE = "not built yet: losses that balance experts"

FLAGS: tuple[Flag, ...] = grouped(
    GROUP,
    "megatron",
    integer("--num-experts", None, "experts of a layer"),
    integer("--moe-ffn-hidden-size", None, "width within an expert"),
    integer("--moe-router-topk", None, "experts that each token is given to"),
    text("--moe-layer-freq", None, "layers with experts: 2 is every other one, or a list such as [0]*3+[1]*45"),
    switch("--moe-router-pre-softmax", "softmax over all experts, before some are chosen"),
    switch("--moe-grouped-gemm", "experts as one kernel; here each is computed by itself, with the same numbers"),
    switch("--moe-permute-fusion", "tokens are sorted by one kernel; here by several, with the same numbers"),
    refused(
        text(
            "--moe-token-dispatcher-type",
            "alltoall",
            "how tokens get to their experts",
            choices=("allgather", "alltoall", "flex"),
        ),
        "sequences differ in length from rank to rank, which only alltoall can do without DeepEP",
        only=("alltoall",),
    ),
    refused(
        text("--moe-token-drop-policy", "probs", "which tokens are dropped", choices=("probs", "position")),
        "no token is dropped: engines drop none",
        only=("probs",),
    ),
    refused(
        text("--moe-router-score-function", "softmax", "how experts are weighed", choices=("softmax", "sigmoid")),
        MOE + " (weighed by a sigmoid)",
        only=("softmax",),
    ),
    refused(
        text("--moe-router-dtype", None, "type of the router's numbers", choices=("fp32", "fp64")),
        "routers compute in float32, as those of engines do",
        only=("fp32",),
    ),
    refused(
        text(
            "--moe-router-load-balancing-type",
            "aux_loss",
            "how experts are kept equally busy; with a coefficient of 0, not at all",
            choices=("aux_loss", "seq_aux_loss", "global_aux_loss", "sinkhorn", "none"),
            nargs="+",
        ),
        BALANCE + " (and routers that balance by themselves, which engines do not)",
        only=("aux_loss", "seq_aux_loss", "global_aux_loss", "none"),
    ),
    refused(
        number("--moe-aux-loss-coeff", 0.0, "weight of the loss that balances experts", nargs="+"),
        BALANCE,
        only=(0.0,),
    ),
)
