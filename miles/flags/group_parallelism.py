"""Flags: how a model is spread over ranks, and the memory and speed of its passes."""

from __future__ import annotations

from miles.flags.flag import Flag, grouped, integer, off, refused, switch, text, tri

ONE_GROUP = "all ranks are one group, which recovers as a whole (--use-fault-tolerance)"

GROUP = "parallelism and memory"
CPU_BACKEND = "gloo is PyTorch's backend for tensors on the CPU"

FLAGS: tuple[Flag, ...] = (
    *grouped(
        GROUP,
        "contract",
        integer("--tensor-model-parallel-size", 1, "tensor parallel: ranks that share each layer"),
        integer("--pipeline-model-parallel-size", 1, "pipeline parallel: stages that the layers are divided into"),
        integer("--context-parallel-size", 1, "context parallel: ranks that share each sequence"),
        integer("--expert-model-parallel-size", 1, "expert parallel: ranks that share each layer's experts"),
        integer("--expert-tensor-parallel-size", 1, "ranks that share each expert"),
        switch("--sequence-parallel", "norms and residuals, too, are shared by tensor-parallel ranks"),
        switch("--use-dynamic-batch-size", "fill micro-batches up to --max-tokens-per-gpu"),
        integer("--max-tokens-per-gpu", None, "token budget of a micro-batch on each GPU"),
        integer("--micro-batch-size", 1, "samples per micro-batch, without dynamic batches"),
        text(
            "--recompute-granularity",
            None,
            "which activations are computed again (Megatron)",
            choices=("full", "selective"),
        ),
        text("--recompute-method", None, "how layers are chosen, for full", choices=("uniform", "block")),
        integer("--recompute-num-layers", None, "layers per chunk (uniform), or layers (block)"),
        switch("--gradient-checkpointing", "activation recomputation (FSDP)"),
        switch("--fsdp-cpu-offload", "FSDP keeps parameters, gradients and optimizer on the CPU"),
        refused(
            text("--fsdp-cpu-backend", "gloo", "process groups of what is on the CPU"), CPU_BACKEND, only=("gloo",)
        ),
        text(
            "--attn-implementation",
            "flash_attention_2",
            "attention of FSDP models",
            choices=("flash_attention_2", "sdpa", "eager"),
        ),
    ),
    *grouped(
        GROUP,
        "megatron",
        refused(
            text(
                "--attention-backend",
                "auto",
                "attention of Megatron models",
                choices=("flash", "fused", "unfused", "local", "auto"),
            ),
            "PyTorch's scaled dot-product attention chooses its kernel, flash attention where there is CUDA",
            only=("auto", "flash"),
        ),
        text("--recompute-modules", None, "what selective recomputes (unset: core_attn)", nargs="+"),
        switch("--distribute-saved-activations", "full recomputation: tensor-parallel ranks share what it keeps"),
        integer("--decoder-first-pipeline-num-layers", None, "layers of the first stage (unset: as many as others)"),
        integer("--decoder-last-pipeline-num-layers", None, "layers of the last stage (unset: as many as others)"),
        switch("--bf16", "parameters in bfloat16 (the default on CUDA)"),
        refused(switch("--fp16", "parameters in float16"), "not built yet: float16 and its loss scaling; use --bf16"),
        refused(
            text(
                "--transformer-impl",
                None,
                "who implements the layers",
                choices=("local", "transformer_engine", "inference_optimized"),
            ),
            "Transformer Engine where it is installed, else our own layers; there is nothing to choose",
        ),
        refused(
            off("--disable-gloo-process-groups", "enable_gloo_process_groups", "no gloo groups"),
            "gloo groups carry what is on the CPU",
        ),
        refused(switch("--attention-softmax-in-fp32", "attention's softmax in float32"), "", only=(True,)),
        refused(switch("--use-mcore-models", "megatron-core models"), "", only=(True,)),
        *(
            refused(off(name, dest, "turns a fused kernel off"), "", only=(False,))
            for name, dest in (
                ("--no-masked-softmax-fusion", "masked_softmax_fusion"),
                ("--no-bias-gelu-fusion", "bias_gelu_fusion"),
                ("--no-bias-dropout-fusion", "bias_dropout_fusion"),
                ("--no-rope-fusion", "apply_rope_fusion"),
                ("--no-gradient-accumulation-fusion", "gradient_accumulation_fusion"),
            )
        ),
        refused(switch("--no-persist-layer-norm", "turns a fused kernel off"), "", only=(True,)),
        off(
            "--no-bias-swiglu-fusion",
            "bias_swiglu_fusion",
            "SwiGLU as separate operators, not compiled into one (CUDA)",
        ),
        switch(
            "--disable-bf16-reduced-precision-matmul", "sums of bfloat16 products in float32 throughout (CUDA, slower)"
        ),
        switch("--overlap-grad-reduce", "gradients are reduced over data-parallel ranks during the backward pass"),
        integer("--ddp-bucket-size", None, "parameters per bucket of --overlap-grad-reduce (unset: 40 million)"),
        integer("--ddp-num-buckets", None, "number of buckets of --overlap-grad-reduce, in place of their size"),
        switch("--grad-reduce-in-bf16", "bfloat16 parameters: their gradients are summed in bfloat16, too"),
        switch("--ddp-pad-buckets-for-high-nccl-busbw", "buckets are padded to multiples of 65536 elements"),
        switch(
            "--ddp-reduce-scatter-with-fp32-accumulation",
            "gradients travel as they are, and each rank sums its part in float32",
        ),
    ),
    *grouped(
        GROUP,
        "reference",
        text("--qkv-format", "thd", "batches are packed, or padded with a row per sample", choices=("thd", "bshd")),
        switch("--recompute-loss-function", "compute the loss again in the backward pass: it keeps less until then"),
        integer("--log-probs-chunk-size", -1, "tokens per chunk of log-probs"),
        refused(
            text("--linear-attention-backend", "fla", "kernels of linear attention", choices=("fla", "flashqla")),
            "not built yet: linear attention",
        ),
        refused(
            text("--miles-dsa-topk-backend", "torch", "top-k of sparse attention", choices=("torch", "flashinfer")),
            "not built yet: sparse attention",
        ),
        refused(
            text(
                "--dsa-attention-backend", "tilelang", "kernels of sparse attention", choices=("megatron", "tilelang")
            ),
            "not built yet: sparse attention",
        ),
        refused(
            switch("--allgather-cp", "context parallel by all-gather"), "not built yet: other kinds of context parallel"
        ),
        refused(switch("--indep-dp", "replicas are worlds of their own"), ONE_GROUP),
        refused(switch("--delay-split-train-data-by-dp", "ranks split the data"), ONE_GROUP),
        refused(switch("--rematerialize-param-from-master-weight", "rebuild parameters at wake-up"), "not built yet"),
        refused(switch("--check-rematerialize-param-from-master-weight", "check it"), "not built yet"),
        refused(
            text("--extra-high-precision-layers-hf", [], "layers not quantised", nargs="*"),
            "not built yet: quantised export",
        ),
        refused(
            text("--extra-high-precision-layers-megatron", [], "layers not quantised", nargs="*"),
            "not built yet: quantised export",
        ),
        refused(
            switch("--fsdp-state-dict-cpu-offload", "weights are gathered a few at a time, whatever this says"),
            "weights are gathered a few at a time",
            only=(True,),
        ),
        tri("--keep-fp32-master", "FSDP trains float32 masters of bfloat16 parameters", default=True),
        integer("--dp-replicate-size", 1, "FSDP: groups of ranks that each hold all shards"),
        refused(switch("--fp16-lm-cross-entropy", "cross entropy in float16"), "log-probs are computed in float32"),
    ),
)
