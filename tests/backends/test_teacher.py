"""A teacher in the trainer (``--opd-type megatron``), on both backends: another model, which stays as it is."""

import pytest
import torch
from support.hf_reference import load_hf_model
from support.megatron_cases import save_backend
from support.plain_losses import plain_log_probs
from support.ranks import run_ranks
from support.tiny_models import tiny_model
from support.trained_rollouts import args_of, backend_of, data_of

from miles.backends.training_utils.data import RankData
from miles.backends.training_utils.rollout_trainer import RolloutTrainer
from miles.backends.training_utils.timers import Timers
from miles.utils.train_data import split_train_data

OPD = {
    "advantage_estimator": "on_policy_distillation", "use_opd": True, "opd_type": "megatron", "use_kl_loss": False,
    "opd_teacher_ckpt_step": None, "dp_size": 1,
}  # fmt: skip


def distilled(path, kind, teacher, root):
    """Log-probs of the teacher in one rollout and the next, the reverse KL that counted, and where weights went."""
    flags = OPD | {"opd_teacher_load": str(teacher)}
    if root is not None:
        saved = backend_of(kind, args_of(teacher, kind))
        saved.init()
        save_backend(saved, root, 3)
        saved.close()
        flags |= {"opd_teacher_load": str(root), "opd_teacher_ckpt_step": 3}
    args = args_of(path, kind, **flags)
    backend = backend_of(kind, args)
    backend.init()
    trainer = RolloutTrainer(args, backend, Timers(backend.device))
    before = {name: tensor.clone() for name, tensor in backend.hf_weights()}
    found, metrics = [], []
    for rollout_id in range(2):
        part = split_train_data(args, data_of(7))[0]
        metrics.append(trainer.train(rollout_id, lambda part=part: part))
        data = RankData.from_wire(part)
        trainer._log_probs(data, "teacher", "teacher_log_probs")
        values = data.columns["teacher_log_probs"]
        found.append([values[list(part["partition"]).index(i)].tolist() for i in range(len(values))])
        backend.sleep(2)
        backend.wake_up()
    moved = max(float((tensor - before[name]).abs().max()) for name, tensor in backend.hf_weights())
    return found, metrics, moved


def expected(path, teacher):
    args, data = args_of(path, "fsdp", **OPD), data_of(7)

    def of(model):
        module = load_hf_model(model)
        return plain_log_probs(args, lambda tokens: module(tokens[None]).logits[0].float(), data)

    return of(path), of(teacher), data["loss_masks"]


@pytest.mark.full
@pytest.mark.parametrize("kind", ["megatron", "fsdp"])
def test_a_teacher_is_frozen_and_its_log_probs_count(kind, tmp_path):
    path, teacher = tiny_model("qwen3"), tiny_model("qwen3", seed=3)
    root = tmp_path / "teacher" if kind == "megatron" else None
    found, metrics, moved = run_ranks(1, distilled, path, kind, teacher, root)[0]
    student, wanted, masks = run_ranks(1, expected, path, teacher, distributed=False)[0]
    for rollout in found:
        for ours, theirs in zip(rollout, wanted, strict=True):
            torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), atol=1e-5, rtol=0)
    assert moved > 1e-4
    kls = [
        sum((p - q) * m for p, q, m in zip(*row, strict=True)) / max(1, sum(row[2]))
        for row in zip(student, wanted, masks, strict=True)
    ]
    # Of the second rollout it is another one: the student has moved.
    wanted_kl = pytest.approx(sum(kls) / len(kls), rel=1e-4)
    assert [row["train/opd_reverse_kl"] == wanted_kl for row in metrics] == [True, False]
