"""Flags: the model's shape, in Megatron's words. Not needed: the shape is that of ``config.json``, and what is typed is
compared with it."""

from __future__ import annotations

from miles.flags.flag import Flag, grouped, integer, number, off, refused, switch, text
from miles.flags.megatron_refused import FAMILY, MLA, SINKS

GROUP = "model shape"

FLAGS: tuple[Flag, ...] = grouped(
    GROUP,
    "megatron",
    integer("--num-layers", None, "layers"),
    integer("--hidden-size", None, "width"),
    integer("--ffn-hidden-size", None, "width within the MLP"),
    integer("--num-attention-heads", None, "query heads"),
    switch("--group-query-attention", "heads share keys and values"),
    integer("--num-query-groups", None, "key-value heads"),
    integer("--kv-channels", None, "width of a head"),
    integer("--vocab-size", None, "entries of the vocabulary"),
    integer("--max-position-embeddings", None, "longest context"),
    refused(
        text("--normalization", None, "kind of normalisation", choices=("LayerNorm", "RMSNorm")),
        FAMILY + " (LayerNorm)",
        only=("RMSNorm",),
    ),
    number("--norm-epsilon", None, "epsilon of the normalisation", dest="layernorm_epsilon"),
    refused(
        text(
            "--position-embedding-type",
            None,
            "kind of position embedding",
            choices=("learned_absolute", "rope", "mrope", "relative", "none"),
        ),
        FAMILY + " (other position embeddings than rotary ones)",
        only=("rope",),
    ),
    switch("--use-rotary-position-embeddings", "rotary position embeddings"),
    number("--rotary-base", None, "base of the rotary embedding"),
    refused(
        number("--rotary-percent", None, "share of a head that is rotated"),
        FAMILY + " (heads that are rotated in part)",
        only=(1.0,),
    ),
    switch("--use-rope-scaling", "Llama 3's scaling of rotary frequencies"),
    number("--rope-scaling-factor", None, "its factor", also=("--rotary-scaling-factor",)),
    switch("--swiglu", "gated MLP with SiLU"),
    off("--disable-bias-linear", "add_bias_linear", "linear layers without bias"),
    switch("--add-qkv-bias", "bias of the query, key and value projections"),
    switch("--qk-layernorm", "normalisation of queries and keys"),
    switch("--untie-embeddings-and-output-weights", "output layer of its own"),
    integer("--make-vocab-size-divisible-by", 128, "the vocabulary is padded to a multiple of this, times TP"),
    number("--attention-dropout", 0.0, "share of attention that training steps drop"),
    number("--hidden-dropout", 0.0, "share of hidden states that training steps drop"),
    integer("--seq-length", None, "at most the model's context; sequences have the length of their samples"),
    refused(integer("--padded-vocab-size", None, "padded vocabulary"), "computed from --make-vocab-size-divisible-by"),
    refused(number("--init-method-std", None, "scale of random weights"), "weights are loaded, not drawn"),
    refused(
        text("--softmax-type", "vanilla", "kind of softmax", choices=("vanilla", "off-by-one", "learnable")),
        SINKS,
        only=("vanilla",),
    ),
    refused(
        switch("--trust-remote-code", "run code of the model directory"),
        "not built yet: code of model directories in the trainer",
    ),
    *(
        refused(switch(name, "norm of Megatron forks for GLM-4"), FAMILY + " (norms after attention and MLP)")
        for name in ("--post-self-attn-layernorm", "--post-mlp-layernorm")
    ),
    *(
        refused(number(name, None, "of YaRN, in Megatron forks"), MLA + " (and its YaRN)")
        for name in ("--beta-fast", "--beta-slow")
    ),
    refused(integer("--original-max-position-embeddings", None, "of YaRN, in Megatron forks"), MLA + " (and its YaRN)"),
)
