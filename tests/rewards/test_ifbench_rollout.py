"""``ifbench`` in rollouts of the real manager."""

import json

import pytest
from support.rollout_cases import Answer, make_config, manager, servers

from miles.rollout.rm_hub.ifbench import CannotCheck
from miles.utils.http_utils import close_http_client


@pytest.fixture(autouse=True)
def clean():
    yield
    close_http_client()


def rows(path, metadata):
    lines = [{"prompt": f"{n}+1=", "label": "", "metadata": {**metadata, "record_id": n}} for n in range(16)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def says(payload, prompt):
    return Answer("two, or more" if prompt.strip()[0] in "13579" else "two", ends=False)


async def generated(tmp_path, metadata):
    config = make_config(prompt_data=rows(tmp_path / "p.jsonl", metadata), run_dir=str(tmp_path), rm_type="ifbench")
    with servers(says) as fake, manager(config) as rollout:
        await rollout.start(fake.targets, fake.router.url, "secret")
        [part] = [rollout.shipped[ref] for ref in (await rollout.generate(0)).refs]
        return part["per_sample"]["raw_reward"]


async def test_rewards_arrive_in_the_train_data(tmp_path):
    rewards = await generated(tmp_path, {"instruction_id_list": ["punctuation:no_comma"]})
    assert set(rewards) == {0.0, 1.0}


async def test_a_row_that_cannot_be_checked_ends_the_rollout(tmp_path):
    with pytest.raises(CannotCheck, match=r"record \d+: there is no instruction 'punctuation:no_coma'"):
        await generated(tmp_path, {"instruction_id_list": ["punctuation:no_coma"]})
