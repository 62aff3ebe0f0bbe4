"""The rollout manager from prompts to train data, on scripted engines over HTTP."""

import numpy as np
import pytest
from support.rollout_cases import Answer, adds, make_config, manager, servers, sums, text_of, write_jsonl

from miles.utils.data import AllPromptsTooLong


async def test_a_rollout_becomes_train_data_with_group_relative_rewards(tmp_path):
    def half_right(payload, prompt):
        right = adds(payload, prompt).text
        return Answer(right if next(turn) % 2 else "\\boxed{-1}")

    turn = iter(range(1000))
    config = make_config(prompt_data=sums(tmp_path / "p.jsonl"), run_dir=str(tmp_path))
    with servers(half_right) as fake, manager(config) as rollout:
        facts = await rollout.start(fake.targets, fake.router.url, "secret")
        assert facts == {"dataset_size": 8, "num_rollout_per_epoch": 2, "num_too_long": 0, "max_prompt_len": None}
        batch = await rollout.generate(0)
        assert batch.num_samples == 8
        [part] = [rollout.shipped[ref] for ref in batch.refs]
        assert part["tokens"].dtype == np.int32
        assert sorted(set(part["per_sample"]["raw_reward"])) == [0, 1]
        assert part["per_token"]["rollout_log_probs"].shape == (part["response_lengths"].sum(),)
        assert abs(sum(part["per_sample"]["rewards"])) < 1e-6
        assert batch.metrics["rollout/raw_reward"] == 0.5
        assert rollout.ledger() == "4 taken = 0 trained + 0 filtered + 0 returned + 4 open"
        assert await rollout.trained(0) == 4
        assert rollout.shipped == {}
        assert rollout.ledger() == "4 taken = 4 trained + 0 filtered + 0 returned + 0 open"


async def test_prompts_that_are_too_long_are_told_at_the_start(tmp_path):
    data = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "1" * n + "+1=", "label": "0"} for n in (1, 1, 1, 9, 20)])
    config = make_config(
        prompt_data=data, run_dir=str(tmp_path), rollout_max_prompt_len=8, rollout_batch_size=2, global_batch_size=4
    )
    with manager(config) as rollout:
        facts = await rollout.start([], "", "")
    assert facts == {"dataset_size": 3, "num_rollout_per_epoch": 1, "num_too_long": 2, "max_prompt_len": 8}
    shorter = manager(config | {"rollout_max_prompt_len": 3})
    with shorter as rollout, pytest.raises(AllPromptsTooLong, match="longer than 3 tokens"):
        await rollout.start([], "", "")


async def test_supervised_samples_need_no_engine(tmp_path):
    chats = [
        {"prompt": [{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": f"<{i}>"}]} for i in range(8)
    ]
    config = make_config(
        prompt_data=write_jsonl(tmp_path / "p.jsonl", chats), label_key=None, run_dir=str(tmp_path),
        rollout_function_path="miles.rollout.sft_rollout.generate_rollout", n_samples_per_prompt=1,
        global_batch_size=4, loss_type="sft_loss", advantage_estimator="grpo",
    )  # fmt: skip
    with manager(config) as rollout:
        await rollout.start([], "", "")
        batch = await rollout.generate(0)
        [part] = [rollout.shipped[ref] for ref in batch.refs]
        learnt = part["tokens"][: part["total_lengths"][0]][-part["response_lengths"][0] :]
        mask = part["loss_masks"][: part["response_lengths"][0]]
        assert text_of(learnt[mask == 1], with_special=True) == "<0><|im_end|>"
        assert mask.tolist() == [1, 1, 1, 1, 0]


@pytest.mark.parametrize("n", [1, 2])
async def test_an_evaluation_gives_accuracy_and_examples(tmp_path, n):
    config = make_config(
        prompt_data=sums(tmp_path / "p.jsonl"), run_dir=str(tmp_path), n_samples_per_eval_prompt=n,
        eval_prompt_data=["sums", sums(tmp_path / "e.jsonl", 4)], eval_interval=1,
    )  # fmt: skip
    with servers(adds) as fake, manager(config) as rollout:
        await rollout.start(fake.targets, fake.router.url, "secret")
        result = await rollout.evaluate(0)
    assert result.metrics["eval/sums"] == 1.0
    assert result.metrics["eval/sums-truncated_ratio"] == 0.0
    assert ("eval/sums-pass@2" in result.metrics) == (n == 2)
    assert result.examples[0]["prompt"] == "0+1="
    assert len(fake.requests) == 4 * n
