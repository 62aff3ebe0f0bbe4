"""Adapters through ``train.py``: the reward rises, engines hold the merged weights to the bit, and what is saved is
what was learnt."""

import json

import pytest
from safetensors.torch import load_file
from support.lora_cases import merged, read_adapter
from support.tiny_models import tiny_model
from support.training_runs import train

pytestmark = [pytest.mark.full, pytest.mark.timeout(600)]
LORA = {"lora_rank": 8, "lora_alpha": 32, "target_modules": "all-linear", "lr": 3e-2}
KL = {"use_kl_loss": True, "kl_loss_coef": 0.001, "kl_loss_type": "low_var_kl"}
LAYOUTS = {
    "megatron, colocated, 1 rank": {"colocate": True},
    "megatron, colocated, SP 2": {
        "colocate": True, "actor_num_gpus_per_node": 2, "tensor_model_parallel_size": 2, "sequence_parallel": True,
    },
    "fsdp, disaggregated, 2 ranks": {"train_backend": "fsdp", "actor_num_gpus_per_node": 2},
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] * ("1 rank" not in name)) for name in LAYOUTS]
)
def test_the_reward_rises_and_engines_hold_the_merged_weights(tmp_path, name):
    model = tiny_model("qwen3", hidden=64, layers=2)
    done = train(
        tmp_path, model=model, check_weight_update_equal=True, num_rollout=6, save=tmp_path / "ckpt", save_interval=6,
        save_hf=tmp_path / "hf", timeout_s=580, **{**LORA, **KL, **LAYOUTS[name]},
    )  # fmt: skip
    assert done.code == 0, done.output
    assert [f"weight version {version} checked" in done.output for version in range(1, 9)] == [True] * 7 + [False]
    assert max(row["train/train_rollout_logprob_abs_diff"] for row in done.rows()) < 1e-4
    rewards = done.rewards()
    assert rewards[0] < 0.35, done.output
    assert rewards[-1] > rewards[0] + 0.25, done.output
    saved, below = load_file(tmp_path / "hf" / "model.safetensors"), load_file(model / "model.safetensors")
    pairs = read_adapter(tmp_path / "ckpt" / "iter_0000005" / "adapter")
    for key, value in merged(model, pairs, 32 / 8).items():
        assert (saved[key] - value).abs().max() <= 1e-5, key
    changed = {key.removesuffix(".weight") for key, value in saved.items() if not value.equal(below[key])}
    assert changed == set(pairs)
    assert len(pairs) == 2 * 7


@pytest.mark.long
def test_supervised_training_of_an_adapter(tmp_path):
    model = tiny_model("qwen3", hidden=64, layers=2)
    chats = [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}!"}]}
        for n in range(32)
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    done = train(
        tmp_path, model=model, loss_type="sft_loss", prompt_data=tmp_path / "chats.jsonl", input_key="messages",
        num_rollout=12, rollout_batch_size=16, n_samples_per_prompt=1, custom_rm_path=None, rollout_num_gpus=None,
        rollout_max_response_len=None, sglang_max_total_tokens=None, label_key=None, train_backend="fsdp",
        lora_dropout=0.05, **LORA,
    )  # fmt: skip
    assert done.code == 0, done.output
    losses = [row["train/loss"] for row in done.rows()]
    assert losses[-1] < 0.8 * losses[0]
