"""Why a flag of Megatron-LM's parser is refused: each by name, with what is missing or is used instead.

Flags that the same missing feature keeps out have the same reason up to a bracket, so that a recipe which needs the
feature is told of it once. What a flag asks for beside that stands in the bracket.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from miles.flags.group_optimizer import PRECISION

MOE = "not built yet: other experts and routers than those of Qwen3-MoE"
MLA = "not built yet: multi-latent attention"
MTP = "not built yet: multi-token prediction on a pipeline stage of its own"
PIPELINE = "not built yet: other pipelines than one stage on each rank"
CONTEXT = "not built yet: other kinds of context parallel"
FAMILY = "not built yet: model families beyond Qwen2, Qwen3, Qwen3-MoE and Llama"
WINDOW = "not built yet: sliding-window attention"
SINKS = "not built yet: attention sinks"
LINEAR = "not built yet: linear attention and state-space layers"
SPARSE = "not built yet: sparse attention"
VISION = "not built yet: vision models"
LOW_PRECISION = "not built yet: FP8 and FP4"
FLOAT16 = "not built yet: float16 and its loss scaling"
MUON = "not built yet: the Muon optimizer"
LOW_STATE = PRECISION
HALF_AWAY = "not built yet: other ways of having the optimizer on the CPU than all of Adam (--optimizer-cpu-offload)"
ENGINE = "SGLang generates, and has settings of its own: see --sglang-*"
DATASET = "prompts come from --prompt-data, and are packed as they are"
TOKENIZER = "the tokenizer is that of --hf-checkpoint"
RETRIEVAL = "Megatron-LM's BERT and retrieval models are not trained here"
OWN_RL = "it belongs to Megatron-LM's own RL loop, which ours replaces"
OWN_FSDP = "parameters are sharded by --train-backend fsdp, not by Megatron-LM's FSDP"
TE_OVERLAP = "not built yet: layers of Transformer Engine (whose kernels overlap tensor-parallel communication)"
NCCL = "not built yet: NCCL's settings by group; NCCL_* variables reach it by --train-env-vars"
GRAPHS = "sequences differ in length from batch to batch, which CUDA graphs cannot hold"
WEIGHTS = "weights are loaded from a directory, not drawn"
ROLLOUTS = "the training loop counts rollouts: see --num-rollout and --debug-exit-after-rollout"
OWN_LOG = "metrics.jsonl, the console and the trackers log the run, each rollout and step by itself"
RESTART = "the controller recovers ranks, with --use-fault-tolerance; Megatron-LM's own recovery is not used"
RERUN = "gradients that are not finite end the run at once; Megatron-LM's rerun machine is not used"
STRAGGLER = "durations of each rank are in the metrics; Megatron-LM's straggler detection is not used"
FORMAT = "checkpoints are torch_dist, written and read in one way that every parallel layout can read"
SHAPE_FROM_CONFIG = "the model's shape is that of config.json in --hf-checkpoint"

_WORDS: tuple[tuple[str, str], ...] = (
    (
        MOE,
        "moe-extended-tp overlap-moe-expert-parallel-comm moe-shared-expert-intermediate-size "
        "moe-shared-expert-gate moe-shared-expert-overlap "
        "moe-router-padding-for-quantization moe-router-padding-for-fp8 moe-router-num-groups "
        "moe-router-group-topk moe-router-topk-scaling-factor "
        "moe-router-enable-expert-bias moe-router-bias-update-rate "
        "moe-router-force-load-balancing moe-use-legacy-grouped-gemm moe-z-loss-coeff "
        "moe-input-jitter-eps moe-enable-deepep moe-flex-dispatcher-backend "
        "moe-per-layer-logging moe-expert-capacity-factor moe-pad-expert-input-to-capacity "
        "moe-layer-recompute moe-router-fusion moe-apply-probs-on-input moe-latent-size "
        "moe-deepep-num-sms moe-hybridep-num-sms moe-use-upcycling "
        "moe-upcycling-granularity "
        "ep-overlap-early-attn-memory-release use-fused-weighted-squared-relu",
    ),
    ("it is --use-routing-replay", "moe-enable-routing-replay"),
    (
        PIPELINE,
        "pipeline-model-parallel-comm-backend overlap-p2p-communication-warmup-flush "
        "microbatch-group-size-per-virtual-pipeline-stage account-for-embedding-in-pipeline-split "
        "account-for-loss-in-pipeline-split "
        "pipeline-model-parallel-layout num-layers-per-virtual-pipeline-stage "
        "num-virtual-stages-per-pipeline-rank no-overlap-p2p-communication no-scatter-gather-tensors-in-pipeline "
        "use-ring-exchange-p2p",
    ),
    (PIPELINE + " (its stages start together)", "no-align-grad-reduce no-align-param-gather"),
    (PIPELINE + " (its last stage)", "defer-embedding-wgrad-compute wgrad-deferral-limit"),
    (PIPELINE + " (it is the order of its ranks)", "use-tp-pp-dp-mapping"),
    (CONTEXT, "hierarchical-context-parallel-sizes max-seqlen-per-dp-cp-rank hybrid-context-parallel cp-comm-type"),
    ("it saves memory at no cost: it is on", "no-clone-scatter-output-in-embedding"),
    (MTP, "mtp-standalone"),
    (
        MLA,
        "multi-latent-attention q-lora-rank kv-lora-rank qk-head-dim qk-pos-emb-head-dim v-head-dim mscale "
        "mscale-all-dim cache-mla-latents rope-type",
    ),
    (MLA + " (and the clipping of its logits)", "qk-clip qk-clip-alpha qk-clip-threshold log-max-attention-logit"),
    (FAMILY + " (weights of norms are around zero)", "apply-layernorm-1p"),
    (FAMILY + " (pairs of neighbours are rotated)", "rotary-interleaved"),
    (FAMILY + " (attention with a gate)", "attention-output-gate"),
    (FAMILY + " (queries and keys of length one)", "qk-l2-norm"),
    (FAMILY + " (layers without rotation)", "no-rope-freq"),
    (FAMILY + " (residuals after the norm)", "apply-residual-connection-post-layernorm"),
    (
        FAMILY + " (other activations than SwiGLU)",
        "activation-func-clamp-value glu-linear-offset openai-gelu squared-relu quick-geglu",
    ),
    (FAMILY + " (T5: relative positions)", "relative-attention-num-buckets relative-attention-max-distance"),
    (
        FAMILY + " (layers of different shapes)",
        "heterogeneous-layers-config-path heterogeneous-layers-config-encoded-json",
    ),
    (
        FAMILY + " (T5: encoder and decoder)",
        "encoder-num-layers decoder-num-layers encoder-seq-length decoder-seq-length",
    ),
    (WINDOW, "window-size window-attn-skip-freq"),
    (
        LINEAR,
        "experimental-attention-variant linear-attention-freq linear-conv-kernel-dim linear-key-head-dim "
        "linear-value-head-dim linear-num-key-heads linear-num-value-heads is-hybrid-model mamba-state-dim "
        "mamba-head-dim mamba-num-groups mamba-num-heads disable-mamba-mem-eff-path hybrid-attention-ratio "
        "hybrid-mlp-ratio hybrid-override-pattern",
    ),
    (
        SPARSE,
        "dsa-indexer-n-heads dsa-indexer-head-dim dsa-indexer-topk dsa-indexer-loss-coeff dsa-indexer-use-sparse-loss",
    ),
    (
        VISION,
        "mrope-section num-classes img-h img-w num-channels patch-dim classes-fraction data-per-class-fraction "
        "no-data-sharding head-lr-mult vision-pretraining vision-pretraining-type vision-backbone-type "
        "swin-backbone-type mask-type mask-factor iter-per-epoch dino-local-img-size dino-local-crops-number "
        "dino-head-hidden-size dino-bottleneck-size dino-freeze-last-layer dino-norm-last-layer "
        "dino-warmup-teacher-temp dino-teacher-temp dino-warmup-teacher-temp-epochs",
    ),
    (
        LOW_PRECISION,
        "fp8-format fp8-recipe fp8-quantizer-factory fp8-margin fp8-interval fp8-amax-history-len "
        "fp8-amax-compute-algo no-fp8-wgrad first-last-layers-bf16 num-layers-at-start-in-bf16 "
        "num-layers-at-end-in-bf16 fp4-format fp4-recipe fp4-param-gather fp4-quantizer-factory "
        "reuse-grad-buf-for-mxfp8-param-ag keep-fp8-transpose-cache fp8-param-gather te-precision-config-file",
    ),
    (LOW_PRECISION + " (and the kernels of Kitchen)", "use-kitchen-attention kitchen-attention-backend"),
    (
        FLOAT16,
        "loss-scale initial-loss-scale min-loss-scale loss-scale-window hysteresis no-log-loss-scale-to-tensorboard",
    ),
    (
        MUON,
        "muon-momentum muon-no-split-qkv muon-use-nesterov muon-scale-mode muon-fp32-matmul-prec "
        "muon-num-ns-steps muon-tp-mode muon-extra-scale-factor",
    ),
    (
        HALF_AWAY,
        "optimizer-offload-fraction use-torch-optimizer-for-cpu-offload no-pin-cpu-grads no-pin-cpu-params",
    ),
    (LOW_STATE, "main-grads-dtype main-params-dtype exp-avg-dtype exp-avg-sq-dtype"),
    (
        "not built yet: activations on the CPU; --recompute-granularity saves their memory",
        "cpu-offloading-num-layers fine-grained-activation-offloading offload-modules min-offloaded-tensor-size",
    ),
    (
        TE_OVERLAP,
        "tp-comm-overlap no-tp-comm-bulk-wgrad no-tp-comm-bulk-dgrad no-tp-comm-overlap-ag no-tp-comm-overlap-rs "
        "tp-comm-overlap-rs-dgrad tp-comm-bootstrap-backend tp-comm-overlap-cfg no-tp-comm-split-ag "
        "no-tp-comm-split-rs delay-wgrad-compute",
    ),
    (TE_OVERLAP.partition(" (")[0], "use-te-activation-func te-rng-tracker symmetric-ar-type"),
    (TE_OVERLAP.partition(" (")[0] + " (batch-invariant attention)", "batch-invariant-mode"),
    (
        NCCL,
        "high-priority-stream-groups nccl-communicator-config-path use-nccl-ub disable-symmetric-registration "
        "use-sharp sharp-enabled-group",
    ),
    (
        ("engines take the parameters right after the step: there is no forward pass that could hide their gathering"),
        "overlap-param-gather overlap-param-gather-with-optimizer-step create-all-gather-group",
    ),
    ("losses are summed over ranks, not averaged, so that each loss divides as it must", "ddp-average-in-collective"),
    ("not built yet: several instances of the distributed optimizer", "num-distributed-optimizer-instances"),
    (
        OWN_FSDP,
        "fsdp-manual-registration use-megatron-fsdp data-parallel-sharding-strategy outer-dp-sharding-strategy "
        "fsdp-double-buffer enable-full-sharding-in-hsdp use-torch-fsdp2 torch-fsdp2-no-reshard-after-forward "
        "no-strict-fsdp-dtensor-load no-gradient-reduce-div-fusion suggested-communication-unit-size "
        "init-model-with-meta-device",
    ),
    ("megatron-core does not read it any more", "no-async-tensor-model-parallel-allreduce onnx-safe lazy-mpu-init"),
    (
        "losses are computed from logits by functions of ours, in float32",
        "cross-entropy-loss-fusion cross-entropy-fusion-impl",
    ),
    (
        "megatron-core's own layers cast residuals back to the layers' type: it has no effect",
        "fp32-residual-connection",
    ),
    (
        "attention computes its scores in float32 as it is: dividing them by the layer's number is for float16",
        "apply-query-key-layer-scaling",
    ),
    (
        WEIGHTS,
        "no-initialization use-cpu-initialization embedding-init-method-std data-parallel-random-init "
        "init-method-xavier-uniform",
    ),
    (
        GRAPHS,
        "enable-cuda-graph cuda-graph-warmup-steps external-cuda-graph cuda-graph-impl cuda-graph-scope "
        "moe-pad-experts-for-cuda-graph-inference",
    ),
    (
        "engines would compute another model: positions are those of config.json",
        "rotary-seq-len-interpolation-factor",
    ),
    (
        "rotary positions are those of config.json; there is no other position embedding to leave out",
        "no-position-embedding",
    ),
    (
        (
            "layers are compiled where that helps, and nothing depends on it: TORCHDYNAMO_DISABLE=1 in "
            "--train-env-vars turns it off"
        ),
        "disable-jit-fuser",
    ),
    ("the models here are megatron-core's", "use-legacy-models"),
    ("nothing experimental of megatron-core is used", "enable-experimental"),
    (
        "the resolved configuration is written to the run directory",
        "config-logger-dir yaml-cfg dump-param-to-param-group-map",
    ),
    (
        ENGINE,
        "flash-decode inference-fuse-tp-communication mlp-chunks-for-prefill inference-rng-tracker "
        "inference-batch-times-seqlen-threshold max-tokens-to-oom use-legacy-static-engine inference-max-requests "
        "inference-max-seq-length inference-max-batch-size inference-dynamic-batching "
        "inference-dynamic-batching-buffer-size-gb inference-dynamic-batching-paused-buffer-size-gb "
        "inference-dynamic-batching-block-size inference-dynamic-batching-max-requests "
        "inference-dynamic-batching-max-tokens inference-dynamic-batching-num-cuda-graphs "
        "inference-dynamic-batching-track-paused-request-events decode-only-cuda-graphs "
        "inference-dynamic-batching-unified-memory-level nccl-all-reduce-for-prefill enable-chunked-prefill "
        "disable-chunked-prefill inference-dynamic-batching-cuda-graph-max-tokens "
        "inference-dynamic-batching-cuda-graph-mixed-prefill-count inference-logging-step-interval "
        "inference-wandb-logging inference-coordinator-port",
    ),
    (
        DATASET,
        "dataloader-type full-validation multiple-validation-sets data-path split train-data-path valid-data-path "
        "test-data-path data-args-path per-split-data-args-path per-dataset-sequences-path "
        "dataloader-fast-cache-load dataloader-defer-npy-index-mmap data-cache-path no-mmap-bin-files mock-data "
        "sample-rate mask-prob short-seq-prob num-workers reset-position-ids reset-attention-mask eod-mask-loss "
        "no-create-attention-mask-in-dataloader num-dataset-builder-threads object-storage-cache-path "
        "mid-level-dataset-surplus allow-ambiguous-pad-tokens fim-data fim-rate fim-spm-rate fim-split-sample "
        "fim-fragment-rate fim-no-prefix fim-prefix-token fim-middle-token fim-suffix-token fim-pad-token "
        "fim-eod-token exit-signal-handler-for-dataloader",
    ),
    (
        "supervised training is --loss-type sft_loss, with the chat template of --hf-checkpoint",
        "sft sft-tokenizer-prompt-format",
    ),
    (
        TOKENIZER,
        "no-use-tokenizer-model-from-checkpoint-args vocab-file merge-file vocab-extra-ids tokenizer-metadata "
        "tokenizer-special-tokens legacy-tokenizer tiktoken-pattern tiktoken-num-special-tokens "
        "tiktoken-special-tokens tokenizer-sentencepiece-legacy tokenizer-hf-use-fast "
        "tokenizer-hf-include-special-tokens",
    ),
    (
        RETRIEVAL,
        "bert-no-binary-head ict-head-size biencoder-projection-dim biencoder-shared-query-context-model ict-load "
        "bert-load query-in-block-prob use-one-sent-docs retriever-report-topk-accuracies retriever-score-scaling "
        "embedding-path indexer-batch-size indexer-log-interval bert-embedder-type output-bert-embeddings "
        "titles-data-path evidence-data-path block-data-path",
    ),
    (
        OWN_RL,
        "perform-rl-step rl-prompts-per-eval grpo-prompts-per-step grpo-group-size grpo-iterations "
        "grpo-clamp-eps-lower grpo-clamp-eps-upper grpo-kl-beta grpo-entropy-term-weight "
        "grpo-filter-groups-with-same-reward langrl-inference-server-type "
        "langrl-inference-server-conversation-template langrl-external-server langrl-env-config "
        "rl-default-temperature rl-default-top-p rl-default-top-k rl-offload-optimizer-during-inference "
        "rl-offload-kv-cache-during-training rl-remove-kv-cache-during-training rl-reset-cuda-graphs "
        "rl-partial-rollouts rl-inference-logprobs-is-correction rl-importance-sampling-truncation-coef "
        "rl-use-sequence-packing rl-sequence-packing-max-sequences-per-bin rl-sequence-packing-algo "
        "rl-training-cuda-graphs rl-inference-tensor-model-parallel-size "
        "rl-inference-pipeline-model-parallel-size rl-inference-expert-model-parallel-size "
        "rl-inference-expert-tensor-model-parallel-size rl-inference-model-unified-memory-level "
        "rl-offload-inference-model-weights-when-idle refit-method rl-verify-model-weights-swap "
        "rl-parallel-generation-tasks rl-skip-bos-token",
    ),
    ("a rollout gives the batch: see --global-batch-size", "rampup-batch-size decrease-batch-size-if-needed"),
    (
        "memory goes back to the device with --offload-train; nothing is emptied between steps",
        "empty-unused-memory-level",
    ),
    (
        ROLLOUTS,
        "exit-interval eval-iters skip-train iterations-to-skip phase-transition-iterations train-sync-interval",
    ),
    (
        "stopping is orderly by SIGINT or SIGTERM; a deadline is the scheduler's",
        "exit-duration-in-mins exit-signal-handler exit-signal",
    ),
    (
        "Python's own collector runs: ranks wait for no collection of each other",
        "manual-gc manual-gc-interval no-manual-gc-eval",
    ),
    ("only Megatron-LM's own tests use it", "test-mode fake-process-group"),
    ("ranks are placed by the launcher", "local-rank"),
    ("--distributed-timeout-minutes is the deadline of every collective", "distributed-timeout-seconds-after-init"),
    (
        OWN_LOG,
        "log-progress timing-log-level timing-log-option log-validation-ppl-to-tensorboard "
        "log-memory-interval log-device-memory-used log-num-zeros-in-grad "
        "no-barrier-with-level-1-timing log-world-size-to-tensorboard logging-level log-energy "
        "run-workload-inspector-server app-tag-run-name app-tag-run-version",
    ),
    (
        OWN_LOG + " (NVIDIA's one_logger is not among them)",
        "no-one-logger one-logger-project one-logger-run-name one-logger-async",
    ),
    (STRAGGLER, "log-straggler straggler-ctrlr-port straggler-minmax-count disable-straggler-on-startup"),
    (
        RERUN,
        "rerun-mode error-injection-rate error-injection-type check-for-spiky-loss check-for-large-grads "
        "result-rejected-tracker-filename",
    ),
    (
        "--check-weight-update-equal compares weights, on trainer and engines",
        "check-weight-hash-across-dp-replicas-interval",
    ),
    (
        RESTART,
        "inprocess-restart inprocess-max-iterations inprocess-monitor-thread-interval "
        "inprocess-monitor-process-interval inprocess-progress-watchdog-interval inprocess-heartbeat-interval "
        "inprocess-soft-timeout inprocess-hard-timeout inprocess-heartbeat-timeout inprocess-barrier-timeout "
        "inprocess-completion-timeout inprocess-last-call-wait inprocess-termination-grace-time "
        "inprocess-granularity inprocess-active-world-size inprocess-empty-cuda-cache enable-ft-package "
        "calc-ft-timeouts ft-num-warmup-iters adlr-autoresume adlr-autoresume-interval replication "
        "replication-jump replication-factor",
    ),
    (
        "not built yet: checkpoints that only live in memory or on local disks",
        "non-persistent-save-interval non-persistent-ckpt-type non-persistent-global-ckpt-dir "
        "non-persistent-local-ckpt-dir non-persistent-local-ckpt-algo",
    ),
    (
        FORMAT,
        "ckpt-convert-format ckpt-convert-save ckpt-convert-update-legacy-dist-opt-format "
        "no-ckpt-fully-parallel-save ckpt-fully-parallel-load ckpt-assume-constant-structure "
        "dist-ckpt-save-pre-mcore-014 dist-ckpt-optim-fully-reshardable "
        "distrib-optim-fully-reshardable-mem-efficient dist-ckpt-format ckpt-fully-parallel-save "
        "load-main-params-from-ckpt",
    ),
    ("a checkpoint that does not fit is an error that names what differs", "dist-ckpt-strictness"),
    ("not built yet: saving in the background", "use-persistent-ckpt-worker"),
    ("not built yet: deleting older checkpoints", "save-retain-interval"),
    ("not built yet: gradients on disk", "save-wgrads-interval save-dgrads-interval"),
    ("checkpoints are on local or shared disks: multi-storage clients are not used", "disable-msc"),
    ("use --ref-load, or --load with --finetune", "pretrained-checkpoint"),
    (SHAPE_FROM_CONFIG, "use-checkpoint-args use-mp-args-from-checkpoint-args"),
    (
        "biases and norms have no weight decay; --apply-wd-to-qk-layernorm gives it to norms of queries and keys",
        "no-weight-decay-cond-type",
    ),
)


@cache
def reasons() -> Mapping[str, str]:
    """Reason by name, with dashes."""
    return {f"--{name}": reason for reason, names in _WORDS for name in names.split()}
