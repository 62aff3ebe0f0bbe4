#!/usr/bin/env bash
# GRPO with dynamic sampling as Miles' scripts write it, small enough for a CPU: a tiny Qwen3 model is made, taught what an
# answer looks like, and trained for some rollouts with a reward and a filter of our own (recipe_code.py).
# Usage: examples/recipe/run-qwen3-tiny-grpo.sh [further flags of train.py for the GRPO run, which win]
#   RECIPE_DIR   where everything goes (default: runs/recipe-DATE)
#   PYTHON       the interpreter (default: .venv/bin/python)
#   WARM_STEPS   steps of supervised fine-tuning beforehand (default: 240)
# What is not here: no ray start, no ray job submit, no pkill. Ctrl-C ends all that was started.
set -euo pipefail

SCRIPT_DIR="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
REPOSITORY="$(cd -- "$SCRIPT_DIR/../.." && pwd)"
PYTHON="${PYTHON:-$REPOSITORY/.venv/bin/python}"
RECIPE_DIR="$(realpath -m "${RECIPE_DIR:-$REPOSITORY/runs/recipe-$(date +%Y%m%d-%H%M%S)}")"
case $PYTHON in */*) PYTHON="$(realpath -s "$PYTHON")" ;; esac # a plain name is looked up on PATH
cd "$REPOSITORY"
WARM_STEPS="${WARM_STEPS:-240}"
export OMP_NUM_THREADS=1
# Where --custom-rm-path and the other paths of functions are looked for.
export PYTHONPATH="$SCRIPT_DIR${PYTHONPATH:+:$PYTHONPATH}"

# The architecture, as scripts/models/*.sh state it. It is checked against the model's config.json.
MODEL_ARGS=(
   --swiglu
   --num-layers 2
   --hidden-size 128
   --ffn-hidden-size 256
   --num-attention-heads 4
   --group-query-attention
   --num-query-groups 2
   --kv-channels 32
   --use-rotary-position-embeddings
   --disable-bias-linear
   --normalization "RMSNorm"
   --norm-epsilon 1e-6
   --rotary-base 10000
   --vocab-size 320
   --qk-layernorm
)

CKPT_ARGS=(
   --hf-checkpoint "$RECIPE_DIR/warm"
   --ref-load "$RECIPE_DIR/warm"
   --load "$RECIPE_DIR/checkpoints"
   --save "$RECIPE_DIR/checkpoints"
   --save-interval 4
   --save-hf "$RECIPE_DIR/trained-{rollout_id}"
)

ROLLOUT_ARGS=(
   --prompt-data "$RECIPE_DIR/data/train.jsonl"
   --input-key prompt
   --label-key label
   --apply-chat-template
   --rollout-shuffle
   --num-rollout 8
   --rollout-batch-size 16
   --n-samples-per-prompt 8
   --rollout-max-response-len 32
   --rollout-temperature 1

   --over-sampling-batch-size 24
   --dynamic-sampling-filter-path miles.rollout.filter_hub.dynamic_sampling_filters.check_reward_nonzero_std

   --global-batch-size 64
   --num-steps-per-rollout 2
   --balance-data
)

EVAL_ARGS=(
   --eval-interval 4
   --eval-prompt-data sums "$RECIPE_DIR/data/heldout.jsonl@[0:64]"
   --n-samples-per-eval-prompt 1
   --eval-max-response-len 32
   --eval-top-p 1
)

PERF_ARGS=(
   --tensor-model-parallel-size 1
   --pipeline-model-parallel-size 1
   --context-parallel-size 1
   --expert-model-parallel-size 1
   --expert-tensor-parallel-size 1

   --recompute-granularity full
   --recompute-method uniform
   --recompute-num-layers 1

   --use-dynamic-batch-size
   --max-tokens-per-gpu 2048
)

GRPO_ARGS=(
   --advantage-estimator grpo
   --use-kl-loss
   --kl-loss-coef 0.001
   --kl-loss-type low_var_kl
   --entropy-coef 0.00
   --eps-clip 0.2
   --eps-clip-high 0.28
)

OPTIMIZER_ARGS=(
   --optimizer adam
   --lr 5e-4
   --lr-decay-style constant
   --weight-decay 0.1
   --adam-beta1 0.9
   --adam-beta2 0.98
)

WANDB_ARGS=(
   # --use-wandb
   # --wandb-project miles-dev
   # --wandb-group qwen3-tiny
)

SGLANG_ARGS=(
   --rollout-num-gpus-per-engine 1
   --sglang-mem-fraction-static 0.1
   --sglang-max-total-tokens 16384
)

MISC_ARGS=(
   --attention-dropout 0.0
   --hidden-dropout 0.0
   --accumulate-allreduce-grads-in-fp32
   --attention-softmax-in-fp32
)

CUSTOM_ARGS=(
   --custom-rm-path recipe_code.reward
   --rollout-sample-filter-path recipe_code.leave_out_unfinished
   --custom-rollout-log-function-path recipe_code.log_rollout
)

if [ ! -e "$RECIPE_DIR/warm/config.json" ]; then
   "$PYTHON" examples/arithmetic/prepare.py "$RECIPE_DIR/data" --sft-conversations $((WARM_STEPS * 64))
   "$PYTHON" train.py \
      --actor-num-gpus-per-node 1 \
      "${MODEL_ARGS[@]}" \
      --hf-checkpoint "$RECIPE_DIR/data/model" \
      --save "$RECIPE_DIR/sft/checkpoints" --save-hf "$RECIPE_DIR/warm" --run-dir "$RECIPE_DIR/sft" \
      --loss-type sft_loss --rollout-function-path miles.rollout.sft_rollout.generate_rollout --debug-train-only \
      --prompt-data "$RECIPE_DIR/data/sft.jsonl" --input-key messages --rollout-shuffle \
      --rollout-batch-size 64 --global-batch-size 64 --num-rollout "$WARM_STEPS" --log-interval 50 \
      --calculate-per-token-loss --use-dynamic-batch-size --max-tokens-per-gpu 4096 \
      --lr 2e-3 --lr-warmup-iters 20 --lr-decay-style constant --weight-decay 0.0 --adam-beta2 0.98
fi

exec "$PYTHON" train.py \
   --actor-num-nodes 1 \
   --actor-num-gpus-per-node 1 \
   --colocate \
   --run-dir "$RECIPE_DIR/grpo" \
   "${MODEL_ARGS[@]}" \
   "${CKPT_ARGS[@]}" \
   "${ROLLOUT_ARGS[@]}" \
   "${OPTIMIZER_ARGS[@]}" \
   "${GRPO_ARGS[@]}" \
   "${WANDB_ARGS[@]}" \
   "${PERF_ARGS[@]}" \
   "${EVAL_ARGS[@]}" \
   "${SGLANG_ARGS[@]}" \
   "${MISC_ARGS[@]}" \
   "${CUSTOM_ARGS[@]}" \
   "$@"
