"""Rules of asynchronous training: 39, 40 and 55 of the reference's list."""

import pytest
from support.flag_cases import outcome

RECIPE = (
    "--hf-checkpoint M --prompt-data D --rollout-batch-size 8 --n-samples-per-prompt 4 --rollout-max-response-len 64 "
    "--rm-type math --actor-num-gpus-per-node 2 --rollout-num-gpus 1"
)
FULLY = "--train-async --fully-async "

REFUSED = [
    ("--fully-async", "--fully-async", "train_async.py"),
    ("--train-async --colocate", "--colocate", "at the same time"),
    (FULLY + "--partial-rollout", "--partial-rollout", "--fully-async"),
    (FULLY + "--rollout-function-path my.fn", "--rollout-function-path", "takes its place"),
    (FULLY + "--rollout-all-samples-process-path my.fn", "--rollout-all-samples-process-path", "all samples"),
    (FULLY + "--true-on-policy-mode", "--true-on-policy-mode", "none is on-policy"),
    ("--train-async --true-on-policy-mode", "--true-on-policy-mode", "none is on-policy"),
    (FULLY + "--keep-old-actor", "--keep-old-actor", "--use-rollout-logprobs"),
    (FULLY + "--pause-generation-mode abort", "--pause-generation-mode", "retract, in_place"),
    (FULLY + "--async-max-concurrent-samples 3", "--async-max-concurrent-samples", "4 or more"),
    (FULLY + "--async-data-buffer-capacity-factor 0", "--async-data-buffer-capacity-factor", "above 0"),
    (FULLY + "--max-weight-staleness -1", "--max-weight-staleness", "0 or more"),
    ("--train-async --advantage-estimator ppo", "--advantage-estimator", "older weights"),
    ("--train-async --update-weights-interval 0", "--update-weights-interval", "1 or more"),
]


@pytest.mark.parametrize(("flags", "flag", "words"), REFUSED)
def test_what_does_not_go_together_is_told(flags, flag, words):
    problems = outcome(flags, recipe=RECIPE).problems
    assert [flag] == [problem.flag for problem in problems]
    assert words in " ".join(problems[0].lines())


@pytest.mark.parametrize("flags", ["--debug-train-only", "--debug-rollout-only", "--loss-type sft_loss"])
def test_where_one_side_is_left_out_it_is_the_ordinary_loop(flags):
    resolved = outcome(f"--train-async {flags}", recipe=RECIPE)
    assert resolved.problems == ()
    assert resolved.config["train_async"] is False
    assert [notice for notice in resolved.notices if "nothing overlaps" in notice]


@pytest.mark.parametrize(
    "flags",
    [
        "--train-async --update-weights-interval 3",
        "--train-async --advantage-estimator ppo --use-tis",
        "--train-async --advantage-estimator ppo --use-rollout-logprobs",
        "--train-async --advantage-estimator ppo --keep-old-actor",
        FULLY + "--max-weight-staleness 0 --async-max-concurrent-samples 4 --pause-generation-mode in_place",
    ],
)
def test_what_does_resolves(flags):
    resolved = outcome(flags, recipe=RECIPE)
    assert resolved.problems == ()
    assert resolved.config["train_async"] is True
