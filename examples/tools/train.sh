#!/usr/bin/env bash
# GRPO with a calculator: examples/tools/train.sh MODEL_DIR DATA.jsonl [more flags]
# MODEL_DIR: a Hugging Face model whose chat template knows tools and writes calls as Qwen2.5 and Qwen3 do.
# DATA.jsonl: rows with "prompt" (a list of messages, or text) and "label".
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
export PYTHONPATH="$root/examples/tools${PYTHONPATH:+:$PYTHONPATH}"
exec python "$root/train.py" \
    --hf-checkpoint "$1" --prompt-data "$2" --input-key prompt --label-key label "${@:3}" \
    --custom-generate-function-path miles.rollout.generate_hub.multi_turn.generate \
    --generate-max-turns 4 \
    --generate-tool-specs-path calculator.TOOLS \
    --generate-tool-call-parser qwen25 \
    --generate-execute-tool-function-path calculator.execute \
    --generate-tool-timeout 10 \
    --custom-rm-path calculator.reward \
    --log-multi-turn
