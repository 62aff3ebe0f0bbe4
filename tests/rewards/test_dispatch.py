"""Which reward a sample gets, what it is called with, and what is told where it cannot be."""

import random

import pytest
from support.rollout_cases import make_args

from miles.rollout.rm_hub import REWARDS, BadLabel, NoReward, async_rm, batched_async_rm, deterministic_random
from miles.rollout.rm_hub.grader_pool import close_grader_pool
from miles.utils.misc import function_registry
from miles.utils.types import RewardSpec, Sample


@pytest.fixture(autouse=True)
def clean():
    yield
    close_grader_pool()


THOUGHT = "hm</think><channel|>"
CASES = [
    # --rm-type, response, label, metadata, reward
    ("math", "\\boxed{4}", "4", {}, 1),
    ("math", "4", "4", {}, 0),
    (" math ", "\\boxed{4}", "4", {}, 1),
    ("deepscaler", THOUGHT + "\\boxed{4}", "4", {}, 1),
    ("deepscaler", "\\boxed{4}", "4", {}, 0),
    ("gemma_math", THOUGHT + "\\boxed{4}", "4", {}, 1),
    ("gemma_math", "\\boxed{4}", "4", {}, 1),
    ("dapo", "Answer: 4", "4", {}, {"score": 1.0, "acc": True, "pred": "4"}),
    ("dapo", "Answer: 5", "4", {}, {"score": -1.0, "acc": False, "pred": "5"}),
    ("dapo", "\\boxed{4}", "4", {}, {"score": -1.0, "acc": False, "pred": "[INVALID]"}),
    ("f1", "Paris", "the Paris", {}, 1.0),
    ("f1", "Paris, France", "Paris", {}, pytest.approx(2 / 3)),
    ("f1", "x", None, {}, 0.0),
    ("gpqa", "Answer: B", "B", {}, 1.0),
    ("gpqa", "Answer: B", "x", {"correct_letter": "B"}, 1.0),
    ("gpqa", "it is red", "red", {"choices": ["red", "blue"]}, 1.0),
    ("boxed_math", "\\boxed{4}", "4", {}, 0),  # no box in the box
    ("boxed_math", "\\boxed{\\boxed{4}}", "4", {}, 0),  # the last box that begins holds 4, and no box
    ("boxed_f1", "so it is \\boxed{Paris}", "Paris", {}, 1.0),
    ("boxed_f1", "so it is Paris", "Paris", {}, 0.0),
    ("boxed_f1", "\\boxed{London}\\boxed{Paris}", "Paris", {}, 1.0),
    ("boxed_f1", "\\boxed{Paris", "Paris", {}, 0.0),
    ("boxed_gpqa", "A B C \\boxed{D} A", "D", {}, 1.0),
    ("boxed_gpqa", "A B C D", "D", {}, 0.0),
    ("boxed_dapo", "\\boxed{Answer: 4}", "4", {}, {"score": 1.0, "acc": True, "pred": "4"}),
    ("boxed_dapo", "Answer: 4", "4", {}, {"score": -1.0, "acc": False, "pred": "[INVALID]"}),
    ("math", "Paris", "Paris", {"rm_type": "f1"}, 1.0),  # the row's comes before the flag's
    ("math", "Paris", "Paris", {"rm_type": " f1"}, 1.0),
    ("math", "\\boxed{Paris}", "Paris", {"rm_type": "boxed_f1"}, 1.0),
    ("f1", "Paris", "Paris", {"rm_type": None}, 1.0),
    ("f1", "Paris", "Paris", {"rm_type": ""}, 1.0),
    (None, "Paris", "Paris", {"rm_type": "f1"}, 1.0),
    ("f1", "Paris", "Paris", None, 1.0),
]


@pytest.mark.parametrize(("kind", "response", "label", "metadata", "reward"), CASES, ids=range(len(CASES)))
async def test_rewards(kind, response, label, metadata, reward):
    sample = Sample(response=response, label=label, metadata=metadata)
    found = await async_rm(make_args(rm_type=kind), sample)
    assert found == reward
    assert sample.response == response


SEEDED = [
    # tokens, response, sha256(str(tokens) + response)[0] % 2 as the command line tool sha256sum has it
    ([], "", 1),
    ([], "a", 1),
    ([], "b", 0),
    ([], "hello", 1),
    ([], "Hello", 0),
    ([], "hello ", 1),
    ([], "The answer is 4.", 0),
    ([], "\\boxed{4}", 1),
    ([], "\u65e5\u672c", 1),
    ([], "\xbd", 0),
    ([], "0", 0),
    ([], "-0", 0),
    ([], "[1]", 0),
    ([1], "", 0),
    ([1], "a", 1),
    ([1, 2], "", 0),
    ([1, 2], "a", 0),
    ([2, 1], "a", 1),
    ([1, 2, 3], "The answer is 4.", 0),
    ([1, 2, 3], "The answer is 5.", 1),
    ([151644, 872, 198], "ok", 1),
    ([151644, 872, 198], "OK", 0),
    ([0], "0", 0),
    ([0, 0], "0", 0),
    ([10], "x", 1),
    ([1, 0], "x", 0),
    ([7], "yes", 1),
    ([7], "no", 0),
    ([8], "yes", 0),
    ([8], "no", 1),
    ([9], '{"a": 1}', 1),
    ([100000], ", 2]", 1),
]


@pytest.mark.parametrize(("tokens", "response", "reward"), SEEDED)
async def test_deterministic_random(tokens, response, reward):
    sample = Sample(tokens=tokens, response=response)
    assert await async_rm(make_args(rm_type="deterministic_random"), sample) == reward
    assert deterministic_random(sample, response) == reward
    assert deterministic_random(sample, "\ud800") in (0, 1)


async def test_random_is_fair():
    random.seed(1)
    found = [await async_rm(make_args(rm_type="random"), Sample()) for _ in range(200)]
    assert set(found) == {0, 1}
    assert 60 < sum(found) < 140


async def test_who_comes_first():
    async def mine(args, sample, **kwargs):
        return kwargs.get("bonus", 3.0)

    async def theirs(args, sample, **kwargs):
        return 5.0

    sample = Sample(response="Paris", label="Paris", metadata={"rm_type": "f1"})
    with function_registry.temporary("mine", mine), function_registry.temporary("theirs", theirs):
        assert await async_rm(make_args(rm_type="math"), sample) == 1.0
        assert await async_rm(make_args(rm_type="math", custom_rm_path="mine"), sample) == 3.0
        assert await async_rm(make_args(custom_rm_path="mine"), sample, bonus=4.0) == 4.0
        sample.reward_spec = RewardSpec(rm_type="math")
        assert await async_rm(make_args(rm_type="f1"), sample) == 0
        assert await async_rm(make_args(custom_rm_path="mine"), sample) == 3.0
        sample.reward_spec = RewardSpec(rm_type="math", custom_rm_path="theirs")
        assert await async_rm(make_args(custom_rm_path="mine"), sample) == 5.0
        assert await async_rm(make_args(rm_type="f1"), sample) == 5.0


async def test_several_samples():
    async def group(args, samples, **kwargs):
        return [len(samples)] * len(samples)

    samples = [Sample(response="Paris", label=label) for label in ("Paris", "London", "Paris")]
    assert await batched_async_rm(make_args(rm_type="f1"), samples) == [1.0, 0.0, 1.0]
    with function_registry.temporary("group", group):
        assert await batched_async_rm(make_args(custom_rm_path="group"), samples) == [3, 3, 3]
    assert await batched_async_rm(make_args(rm_type="f1"), samples, inplace_set_reward_field=True) is None
    assert [sample.reward for sample in samples] == [1.0, 0.0, 1.0]
    with pytest.raises(ValueError, match="has a reward already"):
        await batched_async_rm(make_args(rm_type="f1"), samples, inplace_set_reward_field=True)
    samples[1].metadata["rm_type"] = "nonsense"
    with pytest.raises(NoReward, match="nonsense"):
        await batched_async_rm(make_args(rm_type="f1"), samples)


@pytest.mark.parametrize(
    ("kind", "metadata", "told"),
    [
        ("mth", {}, "Did you mean math?"),
        ("boxed_gqpa", {}, "Did you mean gpqa?"),
        ("boxed_", {}, "is no reward"),
        ("xyzzy", {}, "Choose one of them"),
        (None, {}, "neither --rm-type nor --custom-rm-path"),
        ("", {}, "no reward is chosen"),
        ("  ", {}, "no reward is chosen"),
        ("math", {"rm_type": "maths"}, "metadata\\[\"rm_type\"\\] 'maths' of sample 7 of prompt group 3"),
        ("math", {"rm_type": 3}, "is no reward"),
    ],
)
async def test_types_that_there_are_not(kind, metadata, told):
    with pytest.raises(NoReward, match=told) as caught:
        await async_rm(make_args(rm_type=kind), Sample(metadata=metadata, index=7, group_index=3))
    assert isinstance(caught.value, NotImplementedError)  # what users may catch
    for reward in REWARDS:
        assert reward in caught.value.evidence


@pytest.mark.parametrize(
    ("kind", "label", "metadata", "told"),
    [
        ("dapo", "four", {}, "--rm-type dapo: it has to be a number"),
        ("dapo", None, {}, "has to be a number"),
        ("boxed_dapo", "four", {}, "--rm-type boxed_dapo"),
        ("deepscaler", None, {}, "text or a number"),
        ("gemma_math", ["4"], {}, "text or a number"),
        ("math", "four", {"rm_type": "dapo"}, 'dapo \\(metadata\\["rm_type"\\]\\)'),
    ],
)
async def test_labels_that_cannot_be_used(kind, label, metadata, told):
    sample = Sample(prompt="How many?", label=label, metadata=metadata, index=7, group_index=3)
    with pytest.raises(BadLabel, match=told) as caught:
        await async_rm(make_args(rm_type=kind), sample)
    assert "sample 7 of prompt group 3" in caught.value.what
    assert str(label) in caught.value.evidence
    assert "How many?" in caught.value.evidence
    assert caught.value.fields["flag"] == "--label-key"
    assert await async_rm(make_args(rm_type="math"), Sample(response="\\boxed{4}", label="4")) == 1
