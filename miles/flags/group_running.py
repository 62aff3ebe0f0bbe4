"""Flags: faults, what is shown and kept, debugging, and what is ours alone."""

from __future__ import annotations

from miles.flags.flag import Flag, grouped, integer, number, path, refused, switch, text

FAULTS = "the controller recovers all parts by itself, with --use-fault-tolerance (docs/recovery.md)"
DUMPER = "not built yet: the tensor dumper"
DASHBOARD = "not built yet: the dashboard"
CI = "for the reference system's own tests"

_FAULTS: tuple[Flag, ...] = (
    *grouped(
        "fault tolerance",
        "contract",
        switch("--use-fault-tolerance", "a process that dies is started again, and the run goes on (docs/recovery.md)"),
        integer("--rollout-health-check-first-wait", 0, "seconds until an engine that is ready, or goes on, is judged"),
        integer("--rollout-health-check-interval", 30, "seconds between heartbeats of engines and router"),
        integer("--rollout-health-check-timeout", 30, "seconds in which one is to be answered, as is its repetition"),
    ),
    *grouped(
        "fault tolerance",
        "reference",
        refused(text("--ft-components", None, "what recovers", nargs="+"), FAULTS),
        refused(integer("--control-server-port", 0, "port of the control server"), FAULTS, only=(0,)),
        refused(switch("--mini-ft-controller-enable", "heal in a loop"), FAULTS),
        refused(number("--mini-ft-controller-poll-interval", 10.0, "seconds"), FAULTS),
        refused(number("--mini-ft-controller-resume-delay", 10.0, "seconds"), FAULTS),
        number("--trainer-heartbeat-checker-interval", 10.0, "seconds between heartbeats of the trainer's ranks"),
        number("--trainer-heartbeat-checker-timeout", 10.0, "seconds in which one is to be answered"),
        number("--trainer-heartbeat-checker-first-wait", 300.0, "seconds before the first, in which ranks load"),
        integer("--trainer-heartbeat-checker-failure-threshold", 3, "so many left out in a row end the rank"),
    ),
    *grouped(
        "fault tolerance",
        "ours",
        integer(
            "--recovery-interval",
            32,
            "rollouts that are trained on again at most when ranks die: after so many without a checkpoint in --save "
            "one is written to the run directory",
        ),
        number(
            "--recovery-stop-timeout",
            30.0,
            "seconds for which a rank of the trainer or the rollout manager may be stopped (SIGSTOP); after them it is "
            "killed and started again",
        ),
    ),
)

_DASHBOARD: tuple[Flag, ...] = grouped(
    "dashboard",
    "reference",
    refused(switch("--use-miles-dashboard", "dashboard"), DASHBOARD),
    refused(number("--dashboard-flush-interval", 5.0, "seconds"), DASHBOARD),
    refused(number("--dashboard-gpu-sample-interval", 1.0, "seconds"), DASHBOARD),
    refused(number("--dashboard-sglang-scrape-interval", 2.0, "seconds"), DASHBOARD),
    refused(text("--dashboard-sglang-scrape-mode", "auto", "source", choices=("auto", "router", "direct")), DASHBOARD),
    refused(text("--dashboard-sglang-metrics", None, "which"), DASHBOARD),
    refused(switch("--dashboard-forward-prometheus", "push"), DASHBOARD),
)

_PROFILING: tuple[Flag, ...] = (
    *grouped(
        "profiling",
        "contract",
        text(
            "--profile-target",
            ["train_overall"],
            "what is profiled, and what a step is: a rollout that is trained on, an optimizer step, or a pass over "
            "log-probs",
            nargs="+",
            choices=("train_overall", "train_actor", "train_log_probs"),
        ),
        switch("--use-pytorch-profiler", "write a trace of each profiled step to --tensorboard-dir (unset: traces/)"),
        integer("--profile-step-start", 10, "the first step that is profiled, from 0"),
        integer("--profile-step-end", 12, "the first step that is not any more"),
        path(
            "--memory-snapshot-path",
            "end of the name of each rank's memory recording",
            default="snapshot.pickle",
        ),
    ),
    *grouped(
        "profiling",
        "megatron",
        switch("--profile", "mark the profiled steps for nsys (CUDA), unless --use-pytorch-profiler is given"),
        integer("--profile-ranks", [0], "ranks that are profiled", nargs="+"),
    ),
    *grouped(
        "profiling",
        "reference",
        path("--memory-snapshot-dir", "directory of memory recordings, from the run directory on", default="."),
        integer("--memory-snapshot-num-steps", None, "trained rollouts that are recorded (unset: all)"),
        text("--memory-recorder", "torch", "of a GPU's memory, or the process's", choices=("torch", "memray")),
        switch("--record-memory-history", "record every allocation of the trainer's ranks"),
    ),
)

_DEBUGGING: tuple[Flag, ...] = (
    *grouped(
        "debugging",
        "contract",
        switch("--deterministic-mode", "deterministic numerics"),
        switch("--debug-rollout-only", "no trainer"),
        switch("--debug-train-only", "no engines"),
        path("--save-debug-rollout-data", "file of each rollout; holds {rollout_id}"),
        path("--load-debug-rollout-data", "files to train on in place of rollouts (no engines)"),
    ),
    *grouped(
        "debugging",
        "reference",
        number("--load-debug-rollout-data-subsample", None, "share of the loaded samples that is used"),
        integer("--debug-exit-after-rollout", None, "stop after that many rollouts; the schedule stays"),
        path("--save-debug-train-data", "file of each rank's train data; holds {rollout_id} and {rank}"),
        path("--dump-details", "directory for rollout data, train data and trajectories"),
        switch("--check-weight-update-equal", "engines must hold exactly the trainer's weights after an update"),
        switch("--debug-skip-weight-update", "engines keep the weights that they were started with"),
        switch("--debug-disable-optimizer", "passes and gradients only: no optimizer, no schedule, no step"),
        refused(
            text("--check-weight-update-selector", "all", "which model", choices=("all", "target", "draft")),
            "not built yet: draft models",
            only=("all",),
        ),
        text(
            "--check-weight-update-skip-list", None, "do not compare the engine's parameters named like this", nargs="+"
        ),
        refused(
            switch("--check-weight-update-allow-quant-error", "tolerance"),
            "weights are compared bit by bit; leave quantised parameters out by --check-weight-update-skip-list",
        ),
        refused(
            switch("--check-lora-weight-equal", "adapters"),
            "engines hold weights with adapters merged in: --check-weight-update-equal compares these",
        ),
        path("--save-debug-trajectory-data", "file of each rollout's answers as text by role; holds {rollout_id}"),
        refused(
            path("--save-debug-event-data", "directory of the run's events"),
            "events of a run are always in events.jsonl of its run directory",
        ),
        refused(integer("--ci-inject-rollout-data-start-rollout-id", None, "first rollout of the data"), CI),
        refused(number("--ci-inject-rollout-data-min-match-ratio", 0.9, "share of prompts that must match"), CI),
        *(
            refused(text(f"--dumper-{name}", "/tmp/dumper" if name == "dir" else None, name), DUMPER)  # noqa: S108
            for name in ("dir", "inference", "fwd-only", "fwd-bwd", "source-patcher-config-inference")
        ),
        refused(switch("--dumper-enable", "dump tensors"), DUMPER),
        refused(text("--dumper-source-patcher-config-train", None, "patcher"), DUMPER),
        switch(
            "--save-local-weight-checksum", "SHA-256 of each rank's weights after each rollout, in the run directory"
        ),
        refused(switch("--enable-event-analyzer", "rules at each step"), "not built yet"),
        refused(switch("--enable-witness", "witnesses of passes"), "not built yet"),
        refused(integer("--witness-buffer-size", 1048576, "ids"), "not built yet"),
        refused(
            switch("--debug-deterministic-collective", "reductions in order"),
            "gloo's reductions have one order; NCCL's is that of --deterministic-mode",
        ),
        refused(
            text("--env-report", "", "report of the reference's launcher"),
            "the environment is recorded in the run directory",
        ),
        *(
            refused(switch(f"--ci-{name}", name), CI)
            for name in (
                "test",
                "disable-kl-checker",
                "disable-logprobs-checker",
                "disable-weight-update-checker",
                "save-model-hash",
                "check-model-hash",
            )
        ),
        *(
            refused(text(f"--ci-{name}", None, name), CI)
            for name in (
                "ft-test-actions",
                "inject-rollout-data-path",
                "save-grad-norm",
                "load-grad-norm",
            )
        ),
    ),
)

_HOOKS: tuple[Flag, ...] = grouped(
    "hooks",
    "reference",
    path(
        "--custom-config-path", "YAML file of further values, keys as in the resolved config; base64:... is taken too"
    ),
    refused(switch("--freeze-indexer", "sparse attention's indexer"), "not built yet: sparse attention"),
    text("--custom-megatron-init-path", None, "function called on each rank before its model is built"),
    text("--custom-megatron-before-log-prob-hook-path", None, "function called before each pass over log-probs"),
    text("--custom-megatron-before-train-step-hook-path", None, "function called before each optimizer step"),
    text("--custom-megatron-post-save-hook-path", None, "function called on rank 0 after each checkpoint"),
)

_OURS: tuple[Flag, ...] = grouped(
    "runtime",
    "ours",
    path("--run-dir", "directory of this run: config, logs, metrics, journals (unset: a new one in ./runs)"),
    text("--device", "auto", "where models run", choices=("auto", "cuda", "cpu")),
    switch("--train-async", "generate while training; train_async.py gives it"),
    switch("--dry-run", "show placement, ports, command lines and environment, and start nothing"),
    text("--resume", None, "auto: go on from the newest checkpoint in --save, if there is one", choices=("auto",)),
    Flag(("--env",), "env", "append", default=[], help="KEY=VALUE for all processes; may be repeated"),
    text(
        "--launcher",
        None,
        "how agents are started (unset: ssh with --hosts or --hostfile, slurm in an allocation, else local)",
        choices=("local", "ssh", "slurm", "external"),
    ),
    text("--hosts", None, "machines: node[1-4],alice@other:2222 (docs/clusters.md)"),
    path("--hostfile", "file of machines, as OpenMPI and DeepSpeed have it (docs/clusters.md)"),
    text(
        "--controller-host", None, "address[:port] at which nodes reach this machine (unset: that on the way to them)"
    ),
    text("--interface", None, "network interface of nodes, or its address (unset: the one towards the controller)"),
    switch("--sync-code", "copy the code to each host with rsync, for the length of the run"),
    text("--remote-python", None, "Python of hosts (unset: the same path as here)"),
    path("--ssh-config", "configuration of ssh in place of yours (ssh -F)"),
    integer("--hosts-at-once", 64, "hosts that are being started at the same time"),
    integer("--nodes", None, "nodes whose agents somebody else starts, with --launcher external (unset: 1)"),
    switch("--skip-preflight", "start whatever the check of the nodes says"),
    number("--start-timeout", 120.0, "seconds in which a node has to join"),
)

FLAGS: tuple[Flag, ...] = (*_FAULTS, *_DASHBOARD, *_PROFILING, *_DEBUGGING, *_HOOKS, *_OURS)
