"""Flags: rewards, filters, and what is done to samples before training."""

from __future__ import annotations

from miles.flags.flag import Flag, grouped, integer, number, switch, text

GROUP = "reward and filters"
NUMBER_REWARDS = ("math", "deepscaler", "gemma_math", "f1", "gpqa", "ifbench", "random", "deterministic_random")
"""They give a number for each sample."""
DICT_REWARDS = {"dapo": ("score", "acc")}
"""They give several values: the keys of those that are numbers."""
REWARDS = (*NUMBER_REWARDS, *DICT_REWARDS, "remote_rm")
"""All that ``--rm-type`` may name. ``miles.rollout.rm_hub`` has the same."""
LABELLED = ("math", "deepscaler", "gemma_math", "dapo", "f1")
"""They compare with the label."""
WORD_FOR_WORD = ("dapo", "f1", "ifbench")
"""They compare words up to the end of the response."""
NO_BOX_IN_A_BOX = ("math", "deepscaler", "gemma_math", "dapo")
"""They look for a box, or for words before an answer: with ``boxed_`` they rarely find any."""

FLAGS: tuple[Flag, ...] = (
    *grouped(
        GROUP,
        "contract",
        text(
            "--rm-type",
            None,
            f"built-in reward: {', '.join(REWARDS)}; also with boxed_ before it (docs/rewards.md)",
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
        text("--rollout-data-postprocess-path", None, "function on a rank's data, between advantages and training"),
    ),
    *grouped(
        GROUP,
        "ours",
        integer("--rm-max-retries", 8, "how often a request to --rm-url is repeated if nobody answers it"),
        number("--rm-timeout", 900.0, "seconds for a reward from --rm-url, all attempts together (each: a third)"),
    ),
)
