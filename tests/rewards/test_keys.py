"""Which number of a reward counts: in training, in evaluations, after the user's own processing."""

import pytest
from support.rollout_cases import make_args

from miles.rollout.hooks import BadHookResult, close_hook_pool
from miles.rollout.rewards import eval_reward, post_process_rewards
from miles.utils.misc import function_registry
from miles.utils.types import BadSample, Sample


@pytest.fixture(autouse=True)
def clean():
    yield
    close_hook_pool()


DAPO = {"score": 1.0, "acc": True, "pred": "4"}


def sample(reward, index=0):
    return Sample(index=index, group_index=0, reward=reward)


async def raw(reward, **values):
    return (await post_process_rewards(make_args(**values), [sample(reward), sample(reward, 1)]))[0]


async def test_training_takes_the_reward_or_its_entry():
    assert await raw(0.5) == [0.5, 0.5]
    assert await raw(True) == [1.0, 1.0]
    assert await raw("0.5") == [0.5, 0.5]
    assert await raw(DAPO, reward_key="score") == [1.0, 1.0]
    assert await raw(DAPO, reward_key="acc") == [1.0, 1.0]


@pytest.mark.parametrize(
    ("reward", "key", "told"),
    [
        (DAPO, None, "give --reward-key"), (DAPO, "pred", None), (DAPO, "scores", "no entry 'scores'"),
        (1.0, "score", "no entry"), ("good", None, "no number"), (float("nan"), None, "no number"),
        (float("inf"), None, "no number"), ([1], None, "no number"),
        ({"score": float("nan")}, "score", "no number"), ({"score": None}, "score", "no number"),
    ],
)  # fmt: skip
async def test_what_cannot_be_trained_on_is_told(reward, key, told):
    if told is None:
        assert await raw(reward, reward_key=key) == [4.0, 4.0]
        return
    with pytest.raises(BadSample, match=told):
        await raw(reward, reward_key=key)


def test_evaluations_take_the_reward_or_its_entry():
    def found(reward, **values):
        return eval_reward(make_args(**values), sample(reward))

    assert found(0.5) == found(0.5, eval_reward_key="acc") == 0.5
    assert found(DAPO, eval_reward_key="acc") is True
    assert found(DAPO, reward_key="score") == 1.0
    assert found(DAPO, reward_key="score", eval_reward_key="acc") is True
    assert found(DAPO, custom_eval_rollout_log_function_path="mine") == DAPO
    with pytest.raises(BadSample, match="has several values"):
        found(DAPO)
    with pytest.raises(BadSample, match="no entry 'points'"):
        found(DAPO, eval_reward_key="points")


async def test_the_users_own_processing_replaces_it():
    samples = [sample(DAPO), sample(DAPO, 1)]
    seen = []

    def mine(args, given):
        seen.append((args.reward_key, given))
        return [1.0, 2.0], [-0.5, 0.5]

    with function_registry.temporary("mine", mine):
        args = make_args(custom_reward_post_process_path="mine")
        assert await post_process_rewards(args, samples) == ([1.0, 2.0], [-0.5, 0.5])
        assert seen == [(None, samples)]
        with pytest.raises(BadHookResult, match="returned a tuple"):
            await post_process_rewards(args, samples[:1])
