"""The debug modes, and memory that goes to disk: through ``train.py``."""

import pytest
from support.tiny_models import tiny_model
from support.training_runs import train

pytestmark = [pytest.mark.full, pytest.mark.timeout(900)]


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


@pytest.mark.parametrize("backend", ["megatron", pytest.param("fsdp", marks=pytest.mark.long)])
def test_a_trainer_that_sleeps_on_disk_gives_its_memory_back_and_trains_on(tmp_path, backend):
    model = tiny_model("qwen3", hidden=256, layers=4)
    done = train(
        tmp_path, model=model, colocate=True, train_backend=backend, offload_train_target="disk", num_rollout=2,
        rollout_batch_size=2, n_samples_per_prompt=4,
    )  # fmt: skip
    assert done.code == 0, done.output
    assert "SGLang gives no memory back on a CPU" in done.output
    for row in done.rows():
        assert row["perf/trainer_rss_asleep"] < row["perf/trainer_rss_awake"] - 20 * (1 << 20)
        assert row["train/train_rollout_logprob_abs_diff"] < 1e-4
    assert not list((done.run_dir / "offload").rglob("*"))
