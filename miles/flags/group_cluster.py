"""Flags: nodes, GPUs, who shares them, and what leaves memory when."""

from __future__ import annotations

from miles.flags.flag import Flag, grouped, integer, json_value, path, refused, switch, text, tri

GROUP = "cluster"
STREAMED = "not built yet: optimizer state streamed from disk"

FLAGS: tuple[Flag, ...] = (
    *grouped(
        GROUP,
        "contract",
        integer("--actor-num-nodes", 1, "nodes of the trainer"),
        integer("--actor-num-gpus-per-node", 8, "GPUs (CPU: ranks) of the trainer per node"),
        integer(
            "--rollout-num-gpus", None, "GPUs of all engines (unset: what the trainer leaves; with --colocate its)"
        ),
        integer("--rollout-num-gpus-per-engine", 1, "tensor-parallel size of each engine"),
        switch("--colocate", "trainer and engines take turns on the same GPUs"),
        tri("--offload-train", "the trainer's state leaves memory while engines generate (default: with --colocate)"),
        tri("--offload-rollout", "engines release memory while the trainer works (default: with --colocate)"),
    ),
    *grouped(
        GROUP,
        "reference",
        integer("--num-gpus-per-node", None, "GPUs (CPU: slots) offered by each node (unset: what it has)"),
        switch("--offload", "both --offload-train and --offload-rollout"),
        text(
            "--offload-rollout-level",
            ["kv_cache", "weight"],
            "what engines release",
            nargs="+",
            choices=("kv_cache", "weight"),
        ),
        text("--offload-train-target", "cpu", "where the sleeping trainer's state goes", choices=("cpu", "disk")),
        path("--offload-train-disk-dir", "directory for --offload-train-target disk (unset: in the run directory)"),
        json_value("--train-env-vars", {}, "environment variables of the training ranks, a JSON object"),
        integer("--distributed-timeout-minutes", 10, "deadline of a collective"),
        text(
            "--distributed-backend",
            "nccl",
            "backend of the process groups (CPU: gloo)",
            choices=("nccl", "gloo"),
        ),
        integer("--critic-num-nodes", None, "nodes of PPO's critic: those of the actor, whose ranks it shares"),
        integer("--critic-num-gpus-per-node", None, "its GPUs per node: those of the actor"),
        refused(switch("--stream-optimizer-state-to-disk", "fp32 masters and moments live on disk"), STREAMED),
        refused(
            text(
                "--stream-optimizer-state-moment-dtype",
                "fp32",
                "dtype of moments on disk",
                choices=("fp32", "bf16", "fp16", "fp8e4m3", "fp8e5m2"),
            ),
            STREAMED,
        ),
        integer("--offload-train-disk-chunk-mb", 256, "MiB that a GPU's state goes through on its way to the disk"),
        refused(
            integer("--train-memory-margin-bytes", 1024**3, "margin registered with the memory saver"),
            "the trainer has no memory saver that would need it: what sleeps is copied out by itself",
        ),
    ),
)
