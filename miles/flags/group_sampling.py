"""Flags: how responses are sampled, in rollouts and in evaluations."""

from __future__ import annotations

from miles.flags.flag import Flag, grouped, integer, number, path, refused, switch, text

SNAPSHOT = "not built yet: engines for evaluation only"
SAMPLING = "sampling"
EVAL = "evaluation"

FLAGS: tuple[Flag, ...] = (
    *grouped(
        SAMPLING,
        "contract",
        integer("--rollout-max-response-len", None, "most tokens of a response"),
        number("--rollout-temperature", 1.0, "temperature, also of the trainer's log-probs"),
        number("--rollout-top-p", 1.0, "top-p truncation"),
        integer("--rollout-top-k", -1, "top-k truncation (-1: none)"),
        text("--rollout-stop", None, "strings that end a response", nargs="+"),
        integer("--rollout-stop-token-ids", None, "tokens that end a response", nargs="+"),
    ),
    *grouped(
        SAMPLING,
        "reference",
        integer("--rollout-max-context-len", None, "most tokens of prompt and response together"),
        integer("--rollout-max-prompt-len", None, "longest prompt that is kept (unset: context - 1)"),
        switch("--rollout-skip-special-tokens", "leave special tokens out of the response's text"),
    ),
    *grouped(
        EVAL,
        "contract",
        text("--eval-prompt-data", None, "NAME PATH pairs of evaluation data", nargs="+"),
        integer("--eval-interval", None, "rollouts between evaluations"),
        integer("--n-samples-per-eval-prompt", 1, "responses per evaluation prompt"),
        integer("--eval-max-response-len", None, "as --rollout-max-response-len, which it is unless set"),
        number("--eval-temperature", None, "as --rollout-temperature, which it is unless set"),
        number("--eval-top-p", None, "as --rollout-top-p, which it is unless set"),
    ),
    *grouped(
        EVAL,
        "reference",
        path("--eval-config", "YAML file with eval.defaults and eval.datasets"),
        switch("--skip-eval-before-train", "no evaluation before the first rollout"),
        text("--eval-function-path", None, "class or function that replaces the evaluation"),
        text("--eval-input-key", None, "as --input-key, for evaluation data"),
        text("--eval-label-key", None, "as --label-key, for evaluation data"),
        text("--eval-tool-key", None, "as --tool-key, for evaluation data"),
        integer("--eval-top-k", None, "as --rollout-top-k, which it is unless set"),
        integer("--eval-max-prompt-len", None, "longest evaluation prompt"),
        integer("--eval-min-new-tokens", None, "fewest tokens of an evaluation response"),
        integer("--eval-max-context-len", None, "as --rollout-max-context-len, which it is unless set"),
        refused(integer("--eval-num-gpus", 0, "GPUs of engines for evaluation only"), SNAPSHOT, only=(0,)),
        refused(integer("--eval-num-gpus-per-engine", 1, "their tensor-parallel size"), SNAPSHOT, only=(1,)),
        refused(path("--eval-hf-dir", "where snapshots are staged"), SNAPSHOT),
        refused(integer("--eval-max-in-flight", 2, "evaluations at a time"), SNAPSHOT),
        refused(
            text(
                "--eval-overflow-policy",
                "backpressure",
                "what happens when they are too many",
                choices=("backpressure", "skip"),
            ),
            SNAPSHOT,
        ),
        refused(integer("--eval-keep-snapshots", 2, "snapshots that are kept"), SNAPSHOT),
    ),
)
