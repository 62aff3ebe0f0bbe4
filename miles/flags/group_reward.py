"""Flags: rewards, filters, and what is done to samples before training."""

from __future__ import annotations

from miles.flags.flag import Flag, grouped, refused, switch, text

GROUP = "reward and filters"
BUILT_REWARDS = ("math", "random", "deterministic_random", "remote_rm")

FLAGS: tuple[Flag, ...] = (
    *grouped(
        GROUP,
        "contract",
        text(
            "--rm-type",
            None,
            "built-in reward: math, random, deterministic_random, remote_rm; also with boxed_ before it",
        ),
        text("--rm-url", None, "address for --rm-type remote_rm"),
        switch("--group-rm", "one reward call for all responses of a prompt"),
        text("--custom-rm-path", None, "reward function"),
        text("--dynamic-sampling-filter-path", None, "function that keeps or drops a finished group"),
        text("--buffer-filter-path", None, "function that takes groups out of the buffer"),
        text("--rollout-sample-filter-path", None, "function that takes samples out of the loss"),
    ),
    *grouped(
        GROUP,
        "reference",
        text("--reward-key", None, "key of the reward, where rewards are dicts"),
        text("--eval-reward-key", None, "as --reward-key, for evaluations"),
        text("--custom-reward-post-process-path", None, "function from rewards to advantages' base"),
        text("--custom-convert-samples-to-train-data-path", None, "function from samples to train data"),
        refused(text("--rollout-data-postprocess-path", None, "hook after advantages"), "not built yet"),
    ),
)
