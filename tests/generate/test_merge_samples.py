"""Turns that were generated one by one, as one sample."""

import pytest
from support.tiny_models import tiny_model

from miles.rollout.generate_utils.sample_utils import merge_samples
from miles.utils.processing_utils import load_tokenizer
from miles.utils.types import BadSample, Sample


def turn(tokens, made, **more):
    return Sample(
        tokens=list(tokens), response_length=made, rollout_log_probs=[-1.0] * made, index=3, **more
    )  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(tiny_model()))


def test_what_lies_between_turns_counts_for_nothing(tokenizer):
    first = turn([1, 2, 65, 66], 2, weight_versions=["1"], metadata={"a": 1}, non_generation_time=1.0)
    second = turn([1, 2, 65, 66, 90, 67], 1, weight_versions=["2"], metadata={"b": 2}, loss_mask=[1])
    second.status, second.reward, second.non_generation_time = Sample.Status.COMPLETED, 0.5, 2.0
    for sample, cached in ((first, 1), (second, 4)):
        sample.prefix_cache_info.add({"cached_tokens": cached, "prompt_tokens": 5})
        sample.spec_info.add({"spec_verify_ct": 1, "completion_tokens": 2})
    merged = merge_samples([first, second], tokenizer)
    merged.validate()
    assert merged.tokens == second.tokens and merged.response_length == 4
    assert merged.loss_mask == [1, 1, 0, 1] and merged.rollout_log_probs == [-1.0, -1.0, 0.0, -1.0]
    assert merged.response == tokenizer.decode([65, 66, 90, 67])
    assert (merged.status, merged.reward, merged.weight_versions) == (Sample.Status.COMPLETED, 0.5, ["1", "2"])
    assert merged.metadata == {"a": 1, "b": 2} and merged.non_generation_time == 3.0
    assert merged.prefix_cache_info.cached_tokens == 5 and merged.prefix_cache_info.total_prompt_tokens == 10
    assert merged.spec_info.spec_verify_ct == 2 and first.response_length == 2 and first.loss_mask is None


def test_one_sample_is_a_copy_of_itself(tokenizer):
    first = turn([1, 65], 1, response="said")
    merged = merge_samples([first], tokenizer)
    assert merged is not first and merged.response == "said" and merged.loss_mask == [1]


@pytest.mark.parametrize("tokens", [[1, 2, 65, 67, 90, 67], [1, 2, 65], [9]])
def test_a_turn_that_does_not_go_on_from_the_one_before_is_refused(tokenizer, tokens):
    with pytest.raises(BadSample, match="does not go on"):
        merge_samples([turn([1, 2, 65, 66], 2), turn(tokens, 1)], tokenizer)
    with pytest.raises(BadSample, match="no samples"):
        merge_samples([], tokenizer)
