"""Supervised training, the debug modes, conversion of checkpoints, memory that goes to disk: through ``train.py``."""

import json
import subprocess
import sys

import pytest
from safetensors.torch import load_file
from support.recorded_rollouts import write_rollouts
from support.tiny_models import tiny_model
from support.training_runs import environment, train

pytestmark = [pytest.mark.full, pytest.mark.timeout(400)]


def convert(*words):
    subprocess.run(
        [sys.executable, "-m", "miles_launcher.cli", "convert", *map(str, words)],
        check=True, timeout=120, env=environment(), stdout=subprocess.DEVNULL,
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


def test_what_was_generated_alone_is_trained_on_alone_by_both_backends_with_the_same_numbers(tmp_path):
    recorded = f"{tmp_path}/recorded/{{rollout_id}}.pt"
    generated = train(
        tmp_path, debug_rollout_only=True, num_rollout=2, save_debug_rollout_data=recorded, run_dir=tmp_path / "g"
    )
    assert generated.code == 0, generated.output
    assert "train/loss" not in generated.rows()[0]
    found = {}
    for backend in ("megatron", "fsdp"):
        trained = train(
            tmp_path, train_backend=backend, colocate=True, load_debug_rollout_data=recorded, num_rollout=2,
            run_dir=tmp_path / backend,
        )  # fmt: skip
        assert trained.code == 0, trained.output
        assert trained.rewards() == pytest.approx(generated.rewards())
        found[backend] = [
            row[name]
            for row in trained.rows()
            for name in ("train/grad_norm", "train/entropy_loss", "train/train_rollout_logprob_abs_diff")
        ]
    first, second = ({backend: rows[part] for backend, rows in found.items()} for part in (slice(3), slice(3, 6)))
    assert first["megatron"] == pytest.approx(first["fsdp"], rel=1e-5, abs=1e-5)
    # Adam's first step takes the sign of each gradient, also of those that are zero but for rounding.
    assert second["megatron"] == pytest.approx(second["fsdp"], rel=1e-2, abs=1e-5)
    assert found["megatron"][2] < 1e-4  # the engine's log-probabilities are the trainer's


@pytest.mark.parametrize("backend", ["megatron", "fsdp"])
def test_a_trainer_that_sleeps_on_disk_gives_its_memory_back_and_trains_on(tmp_path, backend):
    model = tiny_model("qwen3", hidden=256, layers=4)
    done = train(
        tmp_path, model=model, colocate=True, train_backend=backend, offload_train_target="disk", num_rollout=2,
        rollout_batch_size=2, n_samples_per_prompt=4, timeout_s=380,
    )  # fmt: skip
    assert done.code == 0, done.output
    assert "SGLang gives no memory back on a CPU" in done.output
    for row in done.rows():
        assert row["perf/trainer_rss_asleep"] < row["perf/trainer_rss_awake"] - 20 * (1 << 20)
        assert row["train/train_rollout_logprob_abs_diff"] < 1e-4
    assert not list((done.run_dir / "offload").rglob("*"))
