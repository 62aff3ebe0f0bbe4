"""The Megatron model computes what Hugging Face's does."""

import pytest
import torch
from support.hf_reference import hf_log_probs, load_hf_model
from support.megatron_cases import TokenLogProbs, make_backend, micro_batch, sequences
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
