"""Flags: the model, where weights come from, and checkpoints."""

from __future__ import annotations

from miles.flags.flag import Flag, grouped, integer, path, refused, switch, text

GROUP = "model and checkpoints"

FLAGS: tuple[Flag, ...] = (
    *grouped(
        GROUP,
        "contract",
        text("--train-backend", "megatron", "what trains", choices=("megatron", "fsdp")),
        path("--hf-checkpoint", "Hugging Face model directory: config, tokenizer, weights"),
        path("--ref-load", "reference model: a torch_dist checkpoint or a Hugging Face directory"),
        path("--load", "checkpoint to resume from"),
        path("--save", "directory that checkpoints are written to"),
        integer(
            "--save-interval",
            None,
            "rollouts between checkpoints (the last one always)",
            also=("--persistent-save-interval",),
        ),
        text("--model-name", None, "family by whose names weights go, if config.json has another architecture"),
        text("--spec", None, "module and function that give the spec of the layers", nargs="*"),
    ),
    *grouped(
        GROUP,
        "megatron",
        switch("--finetune", "load weights only: no optimizer, schedule, RNG or iteration"),
        integer("--ckpt-step", None, "which checkpoint of --load (unset: the latest)"),
        switch("--no-save-optim", "checkpoints hold weights only"),
        switch("--no-load-optim", "do not load the optimizer's state"),
        switch("--no-load-rng", "do not load random number generators"),
        switch("--no-save-rng", "checkpoints hold no random number generators"),
        switch("--exit-on-missing-checkpoint", "--load without a checkpoint is an error, and no fresh start"),
        refused(
            text(
                "--ckpt-format",
                "torch_dist",
                "format of checkpoints",
                choices=("torch", "torch_dist", "torch_dcp", "fsdp_dtensor"),
            ),
            "checkpoints are torch_dist, which every parallel layout can read",
            only=("torch_dist",),
        ),
        refused(switch("--auto-detect-ckpt-format", "find the format out"), "", only=(True,)),
        refused(switch("--use-dist-ckpt", "use torch_dist checkpoints"), "", only=(True,)),
        refused(
            switch("--async-save", "save in the background"),
            "a checkpoint counts when it is on the disk of all ranks, and the run waits for that",
        ),
        refused(
            text("--tokenizer-type", None, "kind of tokenizer"),
            "the tokenizer is that of --hf-checkpoint",
            only=("HuggingFaceTokenizer",),
        ),
        refused(path("--tokenizer-model", "tokenizer directory"), "the tokenizer is that of --hf-checkpoint"),
        integer("--seed", 1234, "seed of training (engines: plus their rank)"),
    ),
    *grouped(
        GROUP,
        "reference",
        integer("--ref-ckpt-step", None, "which checkpoint of --ref-load (unset: the latest)"),
        path("--save-hf", "also export a Hugging Face directory at each save; may hold {rollout_id}"),
        refused(
            text("--megatron-to-hf-mode", "raw", "who converts weights", choices=("raw", "bridge")),
            "bridge needs Transformer Engine and Megatron-Bridge; raw is our own table",
            only=("raw",),
        ),
        path(
            "--save-trigger-sentinel", "a file that asks for a checkpoint, looked for after each rollout, then removed"
        ),
        switch("--low-memory-resume", "optimizer state is on the CPU while it is loaded"),
        text("--custom-model-provider-path", None, "function that builds the model"),
    ),
)
