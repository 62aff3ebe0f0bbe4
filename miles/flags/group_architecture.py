"""Flags: the model's shape, in Megatron's words. Not needed: the shape is that of ``config.json``, and what is typed is
compared with it."""

from __future__ import annotations

from miles.flags.flag import Flag, grouped, integer, number, off, refused, switch, text

GROUP = "model shape"
EXACT = "the model's shape is that of --hf-checkpoint"

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
    text("--normalization", None, "kind of normalisation", choices=("LayerNorm", "RMSNorm")),
    number("--norm-epsilon", None, "epsilon of the normalisation", dest="layernorm_epsilon"),
    text(
        "--position-embedding-type",
        None,
        "kind of position embedding",
        choices=("learned_absolute", "rope", "mrope", "relative", "none"),
    ),
    switch("--use-rotary-position-embeddings", "rotary position embeddings"),
    number("--rotary-base", None, "base of the rotary embedding"),
    number("--rotary-percent", None, "share of a head that is rotated"),
    switch("--use-rope-scaling", "Llama 3's scaling of rotary frequencies"),
    number("--rope-scaling-factor", None, "its factor", also=("--rotary-scaling-factor",)),
    switch("--swiglu", "gated MLP with SiLU"),
    off("--disable-bias-linear", "add_bias_linear", "linear layers without bias"),
    switch("--add-qkv-bias", "bias of the query, key and value projections"),
    switch("--qk-layernorm", "normalisation of queries and keys"),
    switch("--untie-embeddings-and-output-weights", "output layer of its own"),
    integer("--make-vocab-size-divisible-by", 128, "the vocabulary is padded to a multiple of this, times TP"),
    refused(
        number("--attention-dropout", 0.0, "dropout of attention"),
        "log-probs must repeat: there is no dropout",
        only=(0.0,),
    ),
    refused(
        number("--hidden-dropout", 0.0, "dropout of hidden states"),
        "log-probs must repeat: there is no dropout",
        only=(0.0,),
    ),
    refused(
        integer("--seq-length", None, "length of training sequences"),
        "sequences have the length of their samples: see --rollout-max-context-len",
    ),
    refused(integer("--padded-vocab-size", None, "padded vocabulary"), "computed from --make-vocab-size-divisible-by"),
    refused(number("--init-method-std", None, "scale of random weights"), "weights are loaded, not drawn"),
    refused(text("--softmax-type", "vanilla", "kind of softmax"), EXACT, only=("vanilla",)),
    refused(switch("--trust-remote-code", "run code of the model directory"), "not built yet"),
)
