"""How a model is spread over ranks: sizes fit the ranks, the model and each other, and all that do not are told."""

from dataclasses import replace

import pytest
from support.flag_cases import FACTS, MODEL, QWEN3, config, outcome, problems, with_directory

EXPERTS = QWEN3 | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 100,
    "tie_word_embeddings": False,
}
MOE = with_directory("M", replace(MODEL, config=EXPERTS))
EIGHT = "--actor-num-gpus-per-node 8"


@pytest.mark.parametrize(
    ("flags", "replicas"),
    [
        ("", 8),
        ("--pipeline-model-parallel-size 2", 4),
        ("--context-parallel-size 2 --tensor-model-parallel-size 2", 2),
        ("--pipeline-model-parallel-size 2 --context-parallel-size 2 --tensor-model-parallel-size 2", 1),
    ],
)
def test_ranks_that_share_samples_count_once(flags, replicas):
    assert config(f"{EIGHT} {flags}")["dp_size"] == replicas


def test_a_batch_is_divided_by_replicas_not_by_ranks():
    recipe = f"{EIGHT} --global-batch-size 4"
    assert "--global-batch-size" in problems(recipe)
    assert config(f"{recipe} --context-parallel-size 2")["dp_size"] == 4


def test_experts_take_their_ranks_from_those_that_have_other_samples():
    assert config(f"{EIGHT} --expert-model-parallel-size 2", facts=MOE)["dp_size"] == 8


@pytest.mark.parametrize(
    ("flags", "flag", "words"),
    [
        ("--pipeline-model-parallel-size 3", "--pipeline-model-parallel-size", "groups of 3"),
        (
            "--tensor-model-parallel-size 4 --context-parallel-size 4",
            *("--tensor-model-parallel-size", "groups of 16, with --context-parallel-size 4"),
        ),
        ("--pipeline-model-parallel-size 8", "--pipeline-model-parallel-size", "28 layers cannot"),
        ("--pipeline-model-parallel-size 0", "--pipeline-model-parallel-size", "out of range"),
        ("--expert-model-parallel-size 2", "--expert-model-parallel-size", "no experts"),
        ("--expert-tensor-parallel-size 2", "--expert-tensor-parallel-size", "no experts"),
        ("--decoder-first-pipeline-num-layers 2", "--decoder-first-pipeline-num-layers", "there is one stage"),
        (
            "--pipeline-model-parallel-size 4 --decoder-last-pipeline-num-layers 2",
            *("--decoder-last-pipeline-num-layers", "28 layers leave 26 for the 3 other"),
        ),
        (
            "--pipeline-model-parallel-size 2 --decoder-first-pipeline-num-layers 28",
            *("--decoder-first-pipeline-num-layers", "leave 0 for the 1 other"),
        ),
        (
            "--context-parallel-size 2 --loss-type custom_loss --custom-loss-function-path my.loss",
            *("--context-parallel-size", "a part of each sequence"),
        ),
        ("--context-parallel-size 2 --qkv-format bshd", "--qkv-format", "not built yet: padded batches with context"),
        (
            "--tensor-model-parallel-size 2 --sequence-parallel --distribute-saved-activations "
            "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
            *("--distribute-saved-activations", "--sequence-parallel"),
        ),
    ],
)
def test_what_does_not_fit_is_told(flags, flag, words):
    found = problems(f"{EIGHT} {flags}")
    assert list(found) == [flag]
    assert words in found[flag]


@pytest.mark.parametrize(
    ("flags", "flag", "words"),
    [
        ("--expert-model-parallel-size 4", "--expert-model-parallel-size", "6 experts cannot be divided by 4"),
        ("--expert-tensor-parallel-size 8", "--expert-tensor-parallel-size", "100 columns of an expert cannot"),
        ("--expert-tensor-parallel-size 2", "--expert-tensor-parallel-size", "all or nothing"),
        (
            "--expert-tensor-parallel-size 2 --tensor-model-parallel-size 4 --sequence-parallel",
            *("--expert-tensor-parallel-size", "all or nothing of --tensor-model-parallel-size 4"),
        ),
        ("--tensor-model-parallel-size 2", "--tensor-model-parallel-size", "need sequence parallelism"),
        (
            "--expert-model-parallel-size 2 --expert-tensor-parallel-size 2 --pipeline-model-parallel-size 4",
            *("--expert-model-parallel-size", "groups of 16, with --expert-tensor-parallel-size 2 and"),
        ),
    ],
)
def test_what_does_not_fit_a_model_with_experts_is_told(flags, flag, words):
    found = problems(f"{EIGHT} {flags}", facts=MOE)
    assert list(found) == [flag]
    assert words in found[flag]


def test_engines_would_not_tie_the_output_layer_of_a_model_with_experts():
    tied = with_directory("M", replace(MODEL, config=EXPERTS | {"tie_word_embeddings": True}))
    assert "tie_word_embeddings" in problems(facts=tied)["--hf-checkpoint"]
    assert outcome("--debug-train-only --load-debug-rollout-data F --num-rollout 1", facts=tied).problems == ()


def test_all_that_is_wrong_is_told_at_once():
    found = problems(
        "--actor-num-gpus-per-node 6 --tensor-model-parallel-size 4 --pipeline-model-parallel-size 3 "
        "--expert-model-parallel-size 5",
        facts=MOE,
    )
    assert set(found) == {
        "--tensor-model-parallel-size",
        "--pipeline-model-parallel-size",
        "--expert-model-parallel-size",
    }


def test_stages_of_different_sizes():
    assert config("--pipeline-model-parallel-size 2 --decoder-first-pipeline-num-layers 10")["dp_size"] == 1
    both = "--decoder-first-pipeline-num-layers 10 --decoder-last-pipeline-num-layers 6"
    assert config(f"{EIGHT} --pipeline-model-parallel-size 4 {both}")["dp_size"] == 2


def test_fsdp_refuses_every_size_but_one():
    sizes = ["tensor-model", "pipeline-model", "context", "expert-model", "expert-tensor"]
    typed = " ".join(f"--{name}-parallel-size 2" for name in sizes)
    more = "--sequence-parallel --decoder-first-pipeline-num-layers 1"
    assert set(problems(f"--train-backend fsdp {typed} {more}")) == {
        word for word in f"{typed} {more}".split() if word[0] == "-"
    }


def test_sequence_parallelism_of_one_rank_is_off_and_told():
    found = outcome("--sequence-parallel")
    assert found.problems == ()
    assert found.config["sequence_parallel"] is False
    assert "--sequence-parallel has no effect with --tensor-model-parallel-size 1" in found.notices
    assert config("--sequence-parallel --tensor-model-parallel-size 2")["sequence_parallel"] is True


def test_kernels_that_are_not_there_are_told():
    typed = outcome("--moe-grouped-gemm --moe-permute-fusion", facts=MOE)
    assert typed.problems == ()
    assert [notice for notice in typed.notices if notice.startswith("--moe-grouped-gemm, --moe-permute-fusion have no")]


def test_a_run_that_trains_nothing_has_no_sizes_to_check():
    assert (
        outcome("--debug-rollout-only --pipeline-model-parallel-size 3 --rollout-num-gpus 1", facts=FACTS).problems
        == ()
    )
