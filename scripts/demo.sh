#!/usr/bin/env bash
# The main job on this machine, from a bare checkout: sets up .venv, builds a small Qwen3 model and arithmetic problems,
# warms the model up with supervised fine-tuning, then trains it with GRPO until it can add. Needs Linux and Python
# 3.11; no GPU. Usage: scripts/demo.sh [further flags for the GRPO run]
#   DEMO_DIR   where everything goes (default: runs/demo-DATE)
#   PYTHON     the interpreter to build .venv with (default: python3.11, else a newer one on PATH)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

. scripts/environment.sh

say() { printf '\n=== %s\n' "$*"; }

say "Setting up $VENV"
install_environment demo
python=$VENV/bin/python
DEMO_DIR=$(realpath -m "${DEMO_DIR:-runs/demo-$(date +%Y%m%d-%H%M%S)}")
export OMP_NUM_THREADS=1

say "A small Qwen3 model with random weights, and sums to add: $DEMO_DIR"
"$python" examples/arithmetic/prepare.py "$DEMO_DIR"

OPTIMIZER_ARGS=(
    --optimizer adam
    --lr-decay-style constant
    --weight-decay 0.0
    --adam-beta1 0.9
    --adam-beta2 0.98
)

say "Supervised fine-tuning: what an answer looks like"
"$python" train.py \
    --run-dir "$DEMO_DIR/sft" \
    --hf-checkpoint "$DEMO_DIR/model" \
    --save "$DEMO_DIR/sft/checkpoints" --save-hf "$DEMO_DIR/warm" \
    --actor-num-gpus-per-node 1 \
    --loss-type sft_loss \
    --rollout-function-path miles.rollout.sft_rollout.generate_rollout \
    --debug-train-only \
    --prompt-data "$DEMO_DIR/sft.jsonl" --input-key messages \
    --rollout-shuffle \
    --rollout-batch-size 64 --global-batch-size 64 \
    --num-rollout 400 --log-interval 50 \
    --calculate-per-token-loss --use-dynamic-batch-size --max-tokens-per-gpu 4096 \
    --lr 2e-3 --lr-warmup-iters 20 "${OPTIMIZER_ARGS[@]}"

say "GRPO: right answers are rewarded"
"$python" train.py \
    --run-dir "$DEMO_DIR/grpo" \
    --hf-checkpoint "$DEMO_DIR/warm" \
    --save "$DEMO_DIR/checkpoints" --save-interval 10 --save-hf "$DEMO_DIR/trained-{rollout_id}" \
    --colocate --actor-num-gpus-per-node 1 \
    --prompt-data "$DEMO_DIR/train.jsonl" --input-key prompt --label-key label \
    --apply-chat-template --rollout-shuffle \
    --rm-type math \
    --rollout-batch-size 32 --n-samples-per-prompt 8 --global-batch-size 256 \
    --num-rollout 30 \
    --rollout-max-response-len 32 --rollout-temperature 1.0 \
    --eval-prompt-data sums "$DEMO_DIR/heldout.jsonl" --eval-interval 5 \
    --advantage-estimator grpo --eps-clip 0.2 \
    --use-dynamic-batch-size --max-tokens-per-gpu 8192 \
    --lr 3e-4 "${OPTIMIZER_ARGS[@]}" "$@"

cp "$DEMO_DIR/grpo/reward.png" "$DEMO_DIR/grpo/metrics.jsonl" "$DEMO_DIR/"
say "Done in $SECONDS s: $DEMO_DIR/reward.png, $DEMO_DIR/metrics.jsonl, checkpoints in $DEMO_DIR/checkpoints"
