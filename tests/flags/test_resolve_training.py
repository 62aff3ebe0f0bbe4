"""Rules: the loss, recomputation, the schedule."""

import pytest
from support.flag_cases import config, outcome, problems


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ("--loss-type custom_loss", "--loss-type"),
        ("--custom-loss-function-path my.loss", "--custom-loss-function-path"),
        ("--use-tis --use-rollout-logprobs", "--use-tis"),
        ("--allow-partial-train-step", "--allow-partial-train-step"),
        ("--use-tis --tis-clip -2", "--tis-clip"),
        ("--use-tis --tis-clip-low -1", "--tis-clip-low"),
        ("--use-tis --tis-clip-low 5 --tis-clip 2", "--tis-clip-low"),
        ("--log-probs-chunk-size -7", "--log-probs-chunk-size"),
        ("--log-probs-chunk-size 0", "--log-probs-chunk-size"),
        ("--balance-by-flops", "--balance-by-flops"),
        ("--use-dynamic-global-batch-size", "--use-dynamic-global-batch-size"),
        ("--skip-actor-forward-only --num-steps-per-rollout 2", "--skip-actor-forward-only"),
        ("--skip-actor-forward-only --loss-type sft_loss", "--skip-actor-forward-only"),
        ("--recompute-granularity full", "--recompute-granularity"),
        ("--recompute-granularity full --recompute-method uniform", "--recompute-granularity"),
        ("--recompute-granularity selective --recompute-num-layers 1", "--recompute-num-layers"),
        ("--recompute-method block", "--recompute-method"),
        ("--recompute-modules mlp", "--recompute-modules"),
        (
            "--recompute-granularity full --recompute-method block --recompute-num-layers 29",
            "--recompute-num-layers",
        ),
        ("--min-lr 1", "--min-lr"),
        ("--lr-warmup-init 1", "--lr-warmup-init"),
        ("--lr-warmup-fraction 0.1 --lr-warmup-iters 2", "--lr-warmup-fraction"),
        ("--lr-decay-style WSD", "--lr-decay-style"),
        ("--end-weight-decay 0.2", "--end-weight-decay"),
        ("--start-weight-decay 0.2 --weight-decay-incr-style linear", "--start-weight-decay"),
        ("--lr-decay-style linear --lr-warmup-iters 8", "--lr-warmup-iters"),
        ("--lr-decay-style linear --lr-warmup-iters 5 --lr-decay-iters 5", "--lr-warmup-iters"),
    ],
)
def test_what_does_not_go_together_is_told(flags, name):
    assert set(problems(flags)) == {name}


@pytest.mark.parametrize(
    "flags",
    [
        "--loss-type custom_loss --custom-loss-function-path my.loss",
        "--use-tis --tis-clip 3 --custom-tis-function-path my.tis",
        "--use-rollout-logprobs",
        "--use-dynamic-batch-size --max-tokens-per-gpu 512 --balance-by-flops --allow-partial-train-step",
        "--skip-actor-forward-only",
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
        "--recompute-granularity selective --recompute-modules core_attn",
        "--lr-decay-style cosine --lr-warmup-iters 2 --min-lr 1e-7",
        "--lr-decay-style WSD --lr-wsd-decay-iters 2",
        "--end-weight-decay 0.2 --weight-decay-incr-style cosine",
        "--lr-warmup-iters 100",
        "--min-lr 1 --debug-rollout-only",
    ],
)
def test_what_goes_together(flags):
    config(flags)


@pytest.mark.parametrize("flags", ["--kl-loss-coef 0.1", "--kl-loss-type k3", "--tis-clip 3"])
def test_a_flag_without_effect_is_told(flags):
    resolved = outcome(flags)
    assert not resolved.problems
    assert any("has no effect without" in notice for notice in resolved.notices)


def test_a_recipe_of_a_published_kind():
    """What recipes name although it is what is done anyway."""
    found = config(
        "--use-kl-loss --kl-loss-coef 0.0 --kl-loss-type low_var_kl --entropy-coef 0.0 --eps-clip 0.2 "
        "--eps-clip-high 0.28 --advantage-estimator grpo --optimizer adam --lr 1e-6 --lr-decay-style constant "
        "--weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.98 --attention-dropout 0.0 --hidden-dropout 0.0 "
        "--accumulate-allreduce-grads-in-fp32 --attention-softmax-in-fp32 --use-distributed-optimizer "
        "--pipeline-model-parallel-size 1 --context-parallel-size 1 --expert-model-parallel-size 1 "
        "--expert-tensor-parallel-size 1 --use-dynamic-batch-size --max-tokens-per-gpu 4096 --balance-data "
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1 "
        "--no-check-for-nan-in-loss-and-grad --no-rope-fusion --megatron-to-hf-mode raw"
    )
    assert found["attention_softmax_in_fp32"] is True
    assert found["apply_rope_fusion"] is False


def test_the_config_says_what_is_done_whether_or_not_it_is_typed():
    untyped = config()
    typed = config("--use-distributed-optimizer --no-rope-fusion --attention-softmax-in-fp32")
    keys = ("use_distributed_optimizer", "apply_rope_fusion", "attention_softmax_in_fp32")
    assert [untyped[key] for key in keys] == [typed[key] for key in keys] == [True, False, True]


def test_flags_that_were_typed_are_listed():
    assert "lr" in config("--lr 1")["explicit_flags"]
    assert "lr" not in config()["explicit_flags"]
