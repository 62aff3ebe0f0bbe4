"""The Megatron model computes what Hugging Face's does."""

import pytest
import torch
from safetensors.torch import load_file
from support.hf_reference import hf_log_probs, load_hf_model
from support.megatron_cases import TokenLogProbs, make_backend, micro_batch, sequences, weights_of
from support.ranks import run_ranks
from support.tiny_models import ARCHITECTURES, tiny_model


def log_probs_of(path, samples, changed):
    ours = make_backend(path, **changed)
    return ours.forward_only([micro_batch(samples)], TokenLogProbs(ours.parallel))[0]


def reference_log_probs(path, samples):
    model = load_hf_model(path)
    with torch.no_grad():
        return [hf_log_probs(model, sample) for sample in samples]


MODELS = [(architecture, tied, shards) for architecture in ARCHITECTURES for tied, shards in ((True, 1), (False, 3))]


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize(("architecture", "tied", "shards"), MODELS)
def test_log_probs_equal_hugging_face(architecture, tied, shards, tp_size):
    path, samples = tiny_model(architecture, tied=tied, shards=shards), sequences()
    expected = run_ranks(1, reference_log_probs, path, samples, distributed=False)[0]
    for result in run_ranks(tp_size, log_probs_of, path, samples, {"tensor_model_parallel_size": tp_size}):
        for ours, theirs in zip(result, expected, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_packing_changes_nothing():
    path, samples = tiny_model("qwen3"), sequences(8)
    together, alone = run_ranks(1, packed_and_alone, path, samples)[0]
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other, atol=2e-6, rtol=0)


def packed_and_alone(path, samples):
    ours = make_backend(path)
    log_probs = TokenLogProbs(ours.parallel)
    together = ours.forward_only([micro_batch(samples)], log_probs)[0]
    alone = ours.forward_only([micro_batch([sample]) for sample in samples], log_probs)
    return together, [values[0] for values in alone]


VARIANTS = {
    "scaled rotary frequencies": ("llama", {"rope_scaling": "llama3"}, {}),
    "heads wider than the hidden size": ("qwen3", {"head_dim": 24}, {}),
    "no grouped queries": ("qwen3", {"kv_heads": 4}, {"tensor_model_parallel_size": 2}),
    "fewer key-value heads than ranks": ("qwen2", {"kv_heads": 1}, {"tensor_model_parallel_size": 2}),
    "rows that fill no rank": ("qwen2", {"vocab": 301}, {"tensor_model_parallel_size": 2}),
    "no rows that pad": ("qwen2", {"vocab": 301}, {"make_vocab_size_divisible_by": 1}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_equal_hugging_face(name):
    architecture, shape, changed = VARIANTS[name]
    path, samples = tiny_model(architecture, **shape), sequences(longest=90)
    expected = run_ranks(1, reference_log_probs, path, samples, distributed=False)[0]
    for result in run_ranks(changed.get("tensor_model_parallel_size", 1), log_probs_of, path, samples, changed):
        for ours, theirs in zip(result, expected, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def bf16_log_probs(path, samples):
    model = load_hf_model(path, dtype=torch.bfloat16)
    with torch.no_grad():
        return [hf_log_probs(model, sample) for sample in samples]


def test_bf16_is_as_near_to_hugging_face_as_its_own_rounding():
    path, samples = tiny_model("qwen3"), sequences()
    exact = torch.cat(run_ranks(1, reference_log_probs, path, samples, distributed=False)[0])
    theirs = torch.cat(run_ranks(1, bf16_log_probs, path, samples, distributed=False)[0])
    ours = torch.cat(run_ranks(1, log_probs_of, path, samples, {"params_dtype": "bfloat16"})[0])
    assert (ours - exact).abs().mean() < 1.5 * (theirs - exact).abs().mean()


def handed_on(path, changed):
    return weights_of(make_backend(path, **changed))


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_weights_that_are_handed_on_are_those_of_the_files(architecture, tp_size):
    path = tiny_model(architecture, tied=architecture == "qwen2", vocab=301, kv_heads=4, shards=2)
    expected = {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}
    for weights in run_ranks(tp_size, handed_on, path, {"tensor_model_parallel_size": tp_size}):
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[name], expected[name]) for name in expected)
