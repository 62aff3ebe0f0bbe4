"""Built-in rewards in rollouts of the real manager: each type's numbers arrive in the train data."""

import pytest
from support.rollout_cases import Answer, make_config, manager, servers, sums

from miles.rollout.rm_hub import BadLabel
from miles.utils.http_utils import close_http_client


@pytest.fixture(autouse=True)
def clean():
    yield
    close_http_client()


def says(text):
    """Every second prompt's sum, in these words; else one more."""

    def script(payload, prompt):
        left, _, right = prompt.partition("=")[0].partition("+")
        total = int(left) + int(right)
        return Answer(text % (total + total % 2), ends=False)

    return script


async def generated(rollout, fake):
    """The train data of one rollout."""
    await rollout.start(fake.targets, fake.router.url, "secret")
    [part] = [rollout.shipped[ref] for ref in (await rollout.generate(0)).refs]
    return part


async def part_of(tmp_path, text, **values):
    config = make_config(prompt_data=sums(tmp_path / "p.jsonl", 16), run_dir=str(tmp_path), label_key="label", **values)
    with servers(says(text)) as fake, manager(config) as rollout:
        return await generated(rollout, fake)


@pytest.mark.parametrize(
    ("kind", "key", "text", "right", "wrong"),
    [
        ("math", None, "so \\boxed{%d}", 1.0, 0.0),
        ("dapo", "score", "Answer: %d", 1.0, -1.0),
        ("dapo", "acc", "Answer: %d", 1.0, 0.0),
        ("f1", None, "The %d.", 1.0, 0.0),
        ("boxed_f1", None, "it is \\boxed{%d}", 1.0, 0.0),
        ("deepscaler", None, "hm</think>\\boxed{%d}", 1.0, 0.0),
        ("gemma_math", None, "hm<channel|>\\boxed{%d}", 1.0, 0.0),
        ("gpqa", None, "it is %d", 1.0, 0.0),
    ],
)
async def test_each_type(tmp_path, kind, key, text, right, wrong):
    part = await part_of(tmp_path, text, rm_type=kind, reward_key=key)
    assert set(part["per_sample"]["raw_reward"]) == {right, wrong}


async def test_a_label_that_cannot_be_used_ends_the_rollout_with_its_row(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "1+1=", "label": "two"}\n' * 16)
    config = make_config(prompt_data=str(path), run_dir=str(tmp_path), rm_type="dapo", reward_key="score")
    told = pytest.raises(BadLabel, match="--rm-type dapo: it has to be a number")
    with servers(says("Answer: %d")) as fake, manager(config) as rollout, told as caught:
        await generated(rollout, fake)
    assert "'two'" in caught.value.evidence
