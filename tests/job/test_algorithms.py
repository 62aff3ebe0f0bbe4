"""Each kind of advantages trains a model from end to end: real Megatron-core or FSDP2, real SGLang."""

import pytest
from support.tiny_models import tiny_model
from support.training_runs import train

pytestmark = [pytest.mark.full, pytest.mark.timeout(600)]

RUNS = {
    "gspo, masked": {"advantage_estimator": "gspo", "use_opsm": True, "num_steps_per_rollout": 2},
    "ppo, with a critic": {
        "advantage_estimator": "ppo", "critic_lr": 5e-3, "num_critic_only_steps": 1, "lambd": 0.9,
        "normalize_advantages": True, "save": "models", "save_interval": 6,
    },
    "reinforce++, with KL in rewards, on FSDP": {
        "train_backend": "fsdp", "advantage_estimator": "reinforce_plus_plus", "normalize_advantages": True,
        "kl_coef": 0.01,
    },
}  # fmt: skip


IN_SHORT = "ppo, with a critic"


@pytest.mark.parametrize(
    "flags",
    [pytest.param(flags, id=name, marks=[pytest.mark.long] * (name != IN_SHORT)) for name, flags in RUNS.items()],
)
def test_the_reward_rises(tmp_path, flags):
    done = train(tmp_path, colocate=True, num_rollout=6, **flags)
    assert done.code == 0, done.output
    rewards = done.rewards()
    assert len(rewards) == 6
    assert rewards[0] < 0.35, done.output
    assert max(rewards[-2:]) > rewards[0] + 0.2, done.output
    if "save" in flags:
        assert {one.name for one in tmp_path.glob("models*")} == {"models", "models_critic"}
        assert all((tmp_path / root / "iter_0000005").is_dir() for root in ("models", "models_critic"))


@pytest.mark.long
def test_a_student_comes_closer_to_its_teacher(tmp_path):
    done = train(
        tmp_path, colocate=True, num_rollout=6, advantage_estimator="on_policy_distillation",
        opd_type="megatron", opd_teacher_load=tiny_model("qwen3", seed=5, hidden=64, layers=2), custom_rm_path=None,
    )  # fmt: skip
    assert done.code == 0, done.output
    kls = [row["train/opd_reverse_kl"] for row in done.rows()]
    assert done.rewards() == [0.0] * 6  # nothing but the teacher judges
    assert min(kls[-2:]) < 0.85 * kls[0], done.output
