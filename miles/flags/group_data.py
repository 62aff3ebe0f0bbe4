"""Flags: prompts, batches, and the functions that replace parts of the rollout."""

from __future__ import annotations

from miles.flags.flag import Flag, grouped, integer, json_value, number, off, path, refused, switch, text

GROUP = "data and batches"
BUFFER = "not built yet: an external rollout buffer service"
SESSION = "not built yet: the session server"
DELTA = "not built yet: weights as deltas on disk"
P2P = "not built yet: peer-to-peer weight transfer"

FLAGS: tuple[Flag, ...] = (
    *grouped(
        GROUP,
        "contract",
        path("--prompt-data", "JSONL (or Parquet) file with prompts; PATH@[a:b] takes rows a to b"),
        text("--input-key", "prompt", "column of the prompt"),
        text("--label-key", "label", "column of the label"),
        text("--metadata-key", "metadata", "column of the metadata"),
        switch("--apply-chat-template", "prompts are lists of messages, rendered by the tokenizer's template"),
        switch("--rollout-shuffle", "shuffle prompts in each epoch"),
        integer("--num-rollout", None, "iterations in all (unset: --num-epoch epochs of the data)"),
        integer("--rollout-batch-size", None, "prompts per rollout"),
        integer("--n-samples-per-prompt", 1, "responses per prompt: the group"),
        integer("--global-batch-size", None, "samples per optimizer step (unset: from the other three)"),
        integer("--num-steps-per-rollout", 1, "optimizer steps per rollout"),
        integer("--over-sampling-batch-size", None, "prompts asked for at a time in dynamic sampling"),
        switch("--balance-data", "give data-parallel ranks equal numbers of tokens"),
        switch("--partial-rollout", "go on with aborted responses in the next rollout"),
    ),
    *grouped(
        GROUP,
        "reference",
        integer("--num-epoch", None, "epochs of the data, where --num-rollout is not given"),
        integer("--start-rollout-id", None, "first rollout (unset: what the checkpoint says)"),
        integer("--rollout-seed", 42, "seed of shuffling and of sampling"),
        text("--data-source-path", "miles.rollout.data_source.RolloutDataSourceWithBuffer", "class of the data source"),
        off(
            "--disable-rollout-global-dataset",
            "rollout_global_dataset",
            "do not read --prompt-data: the data source has its own",
        ),
        json_value("--apply-chat-template-kwargs", {}, "arguments of the chat template, a JSON object"),
        text("--tool-key", "tools", "column of the tools"),
        text("--rollout-function-path", None, "class or function that replaces the rollout"),
        text("--custom-generate-function-path", None, "function that replaces the generation of a sample"),
        text(
            "--loss-mask-type",
            "qwen",
            "how chat turns are masked in supervised training",
            choices=("qwen", "qwen3", "distill_qwen"),
        ),
        integer(
            "--data-pad-size-multiplier",
            128,
            "a micro-batch has a multiple of so many tokens, on each tensor-parallel rank (on a CPU unless given: 1)",
        ),
        integer("--log-probs-max-tokens-per-gpu", None, "token budget of forward passes (unset: --max-tokens-per-gpu)"),
        integer("--update-weight-buffer-size", 512 * 1024**2, "bytes of a bucket of a weight update"),
        text(
            "--pause-generation-mode",
            "retract",
            "what happens to running requests in a weight update",
            choices=("abort", "retract", "in_place"),
        ),
        switch("--mask-offpolicy-in-partial-rollout", "tokens of older weights do not count in the loss"),
        text("--rollout-all-samples-process-path", None, "function over all samples, dropped ones too"),
        switch("--disable-rollout-trim-samples", "keep samples beyond a multiple of the batch"),
        switch("--use-dynamic-global-batch-size", "the batch is as large as the rollout"),
        switch("--allow-partial-train-step", "samples beyond a multiple of the batch make a last, smaller step"),
        switch("--balance-by-flops", "even out FLOPs of micro-batches, not tokens"),
        path("--chat-template-path", "file of a chat template that replaces the tokenizer's"),
        refused(
            json_value("--multimodal-keys", None, "columns of images and other media"),
            "not built yet: training on images, video and sound; prompts of text need no such flag",
        ),
        refused(
            text("--object-store-backend", "shm", "how rollout data travels"),
            "rollout data travels through the shared memory of the runtime's store",
        ),
        refused(
            json_value("--mooncake-store-init-kwargs", None, "arguments of Mooncake"),
            "rollout data travels through the runtime's store",
        ),
        refused(
            integer("--mooncake-replica-num", 1, "copies of each object"),
            "rollout data travels through the runtime's store",
        ),
        text(
            "--rollout-submission-granularity",
            None,
            "what makes room for another prompt: a group that is finished (unset), or so many samples",
            choices=("group", "sample"),
        ),
        switch("--fully-async", "generate all the time, also while weights change (train_async.py)"),
        integer("--max-weight-staleness", None, "weight versions that the oldest token of an answer may lag"),
        integer("--async-max-concurrent-samples", None, "samples under way at most (unset: those of a rollout)"),
        number("--async-data-buffer-capacity-factor", 2.0, "groups that wait at most, in rollouts"),
        text(
            "--async-unused-samples-handler",
            "drop",
            "what happens to groups that are too old: dropped, or generated again",
            choices=("retry", "drop"),
        ),
        text("--custom-async-data-buffer-path", None, "class of what lies between generation and training"),
        integer("--update-weights-interval", 1, "rollouts between weight updates (train_async.py)"),
        refused(
            text(
                "--update-weight-transfer-mode",
                "broadcast",
                "how weights travel",
                choices=("broadcast", "p2p", "disk-delta"),
            ),
            "not built yet: disk-delta and p2p",
            only=("broadcast",),
        ),
        refused(path("--update-weight-disk-dir", "directory of deltas"), DELTA),
        refused(path("--update-weight-local-checkpoint-dir", "checkpoint that deltas patch"), DELTA),
        refused(text("--update-weight-delta-encoding", "xor", "format of deltas", choices=("xor", "overwrite")), DELTA),
        refused(
            text(
                "--update-weight-delta-checksum",
                "xxh3-128",
                "digest of deltas",
                choices=("xxh3-128", "blake3", "adler32"),
            ),
            DELTA,
        ),
        refused(text("--custom-update-weight-post-write-path", None, "hook after deltas are written"), DELTA),
        refused(integer("--p2p-transfer-num-workers", 4, "threads"), P2P),
        refused(number("--p2p-transfer-timeout", 30.0, "seconds per transfer"), P2P),
        switch("--rollout-external", "use engines that run already; none is started or ended"),
        text("--rollout-external-engine-addrs", None, "HOST:PORT of each of them", nargs="+"),
        refused(switch("--pin-rollout-manager-to-head", "the rollout manager runs on the head node"), "", only=(True,)),
        refused(text("--rollout-buffer-url", None, "address of the service"), BUFFER),
        refused(integer("--fetch-trajectory-retry-times", -1, "tries"), BUFFER),
        refused(number("--min-batch-collection-ratio", 1, "share to wait for"), BUFFER),
        refused(text("--rollout-task-type", "math", "kind of task"), BUFFER),
        refused(text("--use-session-server", False, "serve sessions", nargs="?"), SESSION),
        refused(text("--session-server-ip", None, "address"), SESSION),
        refused(integer("--session-server-port", None, "port or range", nargs="+"), SESSION),
        refused(text("--tito-model", "default", "token-in-token-out family"), SESSION),
        refused(text("--session-message-matcher", "strict", "how histories match"), SESSION),
        refused(
            text("--session-sample-picker-path", "miles.rollout.session.v2.picker_hub.drop_retries", "hook"), SESSION
        ),
        refused(
            text(
                "--session-sample-postprocessor-path",
                "miles.rollout.session.v2.postprocessor_hub.default_postproc",
                "hook",
            ),
            SESSION,
        ),
        refused(
            text("--http-proxy", None, "proxy of requests"),
            "engines are reached without one; clients of your own code read http_proxy, which all processes get",
        ),
        refused(
            switch("--use-distributed-post", "spread requests over nodes"),
            "one client of the rollout manager sends all requests, and there are no others to share them",
        ),
    ),
)
