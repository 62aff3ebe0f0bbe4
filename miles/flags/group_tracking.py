"""Flags: what of a run is recorded, and by which trackers."""

from __future__ import annotations

from miles.flags.flag import Flag, grouped, integer, number, off, path, refused, switch, text

ALWAYS = "these metrics are always recorded"

FLAGS: tuple[Flag, ...] = (
    *grouped(
        "logging",
        "contract",
        switch("--use-wandb", "record metrics with Weights & Biases"),
        text("--wandb-project", None, "project (unset: WANDB_PROJECT, or miles)"),
        text("--wandb-group", None, "group that the run belongs to"),
        integer("--log-interval", 1, "rollouts between lines on the console"),
        text("--custom-rollout-log-function-path", None, "function that logs rollouts"),
        text("--custom-eval-rollout-log-function-path", None, "function that logs evaluations"),
        path(
            "--tensorboard-dir",
            "record metrics with TensorBoard, here; traces of --use-pytorch-profiler go here, too (unset: "
            "TENSORBOARD_DIR, or in the run directory)",
        ),
    ),
    *grouped(
        "logging",
        "reference",
        text("--wandb-mode", None, "where the run is kept", choices=("online", "offline", "disabled")),
        path("--wandb-dir", "directory of local files (unset: WANDB_DIR, or the run directory)"),
        text("--wandb-key", None, "API key; better WANDB_API_KEY, as others see command lines"),
        text("--wandb-host", None, "URL of another server (unset: WANDB_BASE_URL, or wandb.ai)"),
        text("--wandb-team", None, "team or user whose project it is (unset: WANDB_ENTITY)"),
        text("--wandb-run-id", None, "go on with this run (unset: that of the checkpoint, or a new one)"),
        text("--wandb-run-name", None, "name that is shown (unset: that of the group or run directory)"),
        off("--disable-wandb-random-suffix", "wandb_random_suffix", "the name as it is, without the run id behind it"),
        switch("--wandb-always-use-train-step", "optimizer steps in place of rollouts as axis of all curves"),
        switch("--log-multi-turn", "also measure turns of conversations (multi_turn/...)"),
        switch("--log-passrate", "also measure pass@k (passrate/...)"),
        text("--log-reward-category", None, "shares of the values of this key of dict rewards (error_cat/...)"),
        switch("--log-correct-samples", "also measure samples with reward 1 by themselves (correct_samples/...)"),
        switch("--use-mlflow", "record metrics with MLflow"),
        text("--mlflow-tracking-uri", None, "server or database (unset: MLFLOW_TRACKING_URI, or in the run directory)"),
        text("--mlflow-experiment-name", "miles", "experiment, created if need be"),
        text("--mlflow-run-name", None, "name that is shown (unset: that of the run directory)"),
        text("--mlflow-run-id", None, "go on with this run (unset: that of the checkpoint, or a new one)"),
        switch("--use-tensorboard", "record metrics with TensorBoard"),
        text("--tb-project-name", None, "directory below that of TensorBoard"),
        text("--tb-experiment-name", None, "directory below that of the project"),
        switch("--use-prometheus", "show the newest metrics to Prometheus, over HTTP"),
        integer("--prometheus-port", 9090, "port; 0 is a free one (unset: PROMETHEUS_PORT, or this)"),
        text("--prometheus-run-name", None, "label of all series (unset: name of the run directory)"),
        number("--mfu-peak-tflops", None, "what a GPU can do, in TFLOP/s: measures how much of it training uses"),
        text(
            "--ci-metric-checker-key", None, "metric of evaluations that has to reach the threshold, else the run fails"
        ),
        number("--ci-metric-checker-threshold", None, "what it has to reach in one evaluation at least"),
    ),
    *grouped(
        "logging",
        "ours",
        text("--prometheus-address", "127.0.0.1", "where to listen: who reaches it can read the metrics"),
    ),
    *grouped(
        "logging",
        "megatron",
        integer("--tensorboard-log-interval", 1, "rollouts between records of trackers; metrics.jsonl has all"),
        integer("--tensorboard-queue-size", 1000, "records that may wait for TensorBoard; then the oldest go"),
        switch("--log-params-norm", "also record the norm of all weights (train/params_norm), which gathers them"),
        *(
            refused(switch(name, help_text), ALWAYS, only=(True,))
            for name, help_text in (
                ("--log-throughput", "record TFLOP/s"),
                ("--log-timers-to-tensorboard", "record seconds by phase"),
                ("--log-memory-to-tensorboard", "record memory"),
            )
        ),
    ),
)
