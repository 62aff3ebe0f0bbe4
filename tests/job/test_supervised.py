"""Supervised training, conversion of its checkpoint both ways, a run with the converted one as reference."""

import json
import subprocess
import sys

import pytest
from safetensors.torch import load_file
from support.recorded_rollouts import write_rollouts
from support.tiny_models import tiny_model
from support.training_runs import environment, train

pytestmark = [pytest.mark.full, pytest.mark.timeout(900)]


def convert(*words):
    subprocess.run(
        [sys.executable, "-m", "miles_launcher.cli", "convert", *map(str, words)],
        check=True, timeout=300, env=environment(), stdout=subprocess.DEVNULL,
    )  # fmt: skip


def weights(directory):
    return {name: value for path in directory.glob("*.safetensors") for name, value in load_file(path).items()}


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert [name for name, value in theirs.items() if not value.equal(ours[name])] == []


def test_supervised_training_then_conversion_then_a_reference_from_the_checkpoint(tmp_path):
    model = tiny_model("qwen3", hidden=64, layers=2)
    chats = [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}!"}]}
        for n in range(32)
    ]
    data = tmp_path / "chats.jsonl"
    data.write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    sft = train(
        tmp_path, model=model, loss_type="sft_loss", prompt_data=data, input_key="messages", num_rollout=12,
        rollout_batch_size=16, n_samples_per_prompt=1, custom_rm_path=None, save=tmp_path / "ckpt",
        save_hf=tmp_path / "hf-{rollout_id}", run_dir=tmp_path / "sft", rollout_num_gpus=None,
        rollout_max_response_len=None, sglang_max_total_tokens=None, label_key=None,
    )  # fmt: skip
    assert sft.code == 0, sft.output
    losses = [row["train/loss"] for row in sft.rows()]
    assert losses[-1] < 0.7 * losses[0]
    assert (tmp_path / "hf-11" / ".complete").exists()

    convert("torch-dist-to-hf", tmp_path / "ckpt", tmp_path / "converted", "--hf-checkpoint", model)
    assert_same(weights(tmp_path / "converted"), weights(tmp_path / "hf-11"))
    convert("hf-to-torch-dist", tmp_path / "converted", tmp_path / "reference")
    convert("torch-dist-to-hf", tmp_path / "reference", tmp_path / "again", "--hf-checkpoint", model)
    assert_same(weights(tmp_path / "again"), weights(tmp_path / "hf-11"))

    recorded = write_rollouts(tmp_path / "recorded", rollouts=2)
    tuned = train(
        tmp_path, model=tmp_path / "hf-11", colocate=True, load_debug_rollout_data=recorded, num_rollout=2,
        ref_load=tmp_path / "reference", use_kl_loss=True, kl_loss_coef=0.1, kl_loss_type="low_var_kl",
        run_dir=tmp_path / "tuned",
    )  # fmt: skip
    assert tuned.code == 0, tuned.output
    first, second = (row["train/kl_loss"] for row in tuned.rows())
    assert abs(first) < 1e-6  # the reference is where training begins
    assert second > 1e-6
