"""Flags of the trainer on real backends: what each changes, and that it changes nothing else."""

import json
import math

import pytest
import torch
from support import backend_cases
from support.ranks import RanksFailed, run_ranks
from support.rollout_steps import assert_same_weights, train, trained, trainer_of, weights_of
from support.tiny_models import tiny_model

from miles.backends.base import LossOutput

pytestmark = pytest.mark.full
every_backend = pytest.mark.parametrize("kind", ["megatron", "fsdp"])


@pytest.mark.parametrize(
    ("size", "changed"),
    [
        (1, {}),
        (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
        (2, {"pipeline_model_parallel_size": 2}),
        (1, {"use_dynamic_batch_size": False, "micro_batch_size": 2, "data_pad_size_multiplier": 8}),
    ],
    ids=["plain", "tp2 sequence parallel", "pp2", "wider"],
)
def test_padded_batches_train_as_packed_ones(size, changed):
    path = tiny_model("qwen3")
    (packed,), wanted = run_ranks(1, trained, "megatron", path, {})[0]
    for metrics, found in run_ranks(size, _padded, path, {**changed, "qkv_format": "bshd"}):
        assert metrics["train/loss"] == pytest.approx(packed["train/loss"], abs=1e-5)
        assert metrics["train/grad_norm"] == pytest.approx(packed["train/grad_norm"], rel=1e-5)
        assert_same_weights(found, wanted, 1e-5)


def _padded(path, changed):
    """What the model is given are rows of one sample each, all of the same length."""
    trainer = trainer_of("megatron", path, **changed)
    shapes = []

    def note(module, args, kwargs):
        shapes.append(tuple(kwargs["input_ids"].shape))

    trainer.backend.model.module.register_forward_pre_hook(note, with_kwargs=True)
    metrics = train(trainer)
    found = weights_of(trainer)
    trainer.backend.close()
    multiple = changed.get("data_pad_size_multiplier", 1) * changed.get("tensor_model_parallel_size", 1)
    assert any(rows > 1 for rows, _ in shapes)
    assert all(width % multiple == 0 for _, width in shapes)
    return metrics, found


@every_backend
def test_packed_batches_are_filled_up_to_a_multiple(kind):
    path = tiny_model("qwen3")
    _, wanted = run_ranks(1, trained, kind, path, {})[0]
    lengths, found = run_ranks(1, _filled_up, kind, path)[0]
    assert lengths
    assert all(length % 16 == 0 for length in lengths)
    assert_same_weights(found, wanted, 1e-6)


def _filled_up(kind, path):
    trainer = trainer_of(kind, path, data_pad_size_multiplier=16)
    lengths = []
    model = trainer.backend.objects().model[0]
    model.register_forward_pre_hook(lambda *seen: lengths.append(seen[2]["input_ids"].shape[1]), with_kwargs=True)
    train(trainer)
    found = weights_of(trainer)
    trainer.backend.close()
    return lengths, found


@every_backend
@pytest.mark.parametrize("loss_type", ["policy_loss", "sft_loss"])
def test_a_loss_that_is_computed_twice_is_the_same(kind, loss_type):
    path = tiny_model("qwen3")
    once, wanted, _ = run_ranks(1, _count_losses, kind, path, {"loss_type": loss_type})[0]
    twice, found, metrics = run_ranks(
        1, _count_losses, kind, path, {"loss_type": loss_type, "recompute_loss_function": True}
    )[0]
    assert twice == 2 * once > 0
    assert_same_weights(found, wanted, 1e-7)
    assert math.isfinite(metrics["train/loss"])


def _count_losses(kind, path, changed):
    trainer = trainer_of(kind, path, **changed)
    calls = []
    plain = trainer.losses.log_probs

    def counted(*args, **kwargs):
        calls.append(torch.is_grad_enabled())
        return plain(*args, **kwargs)

    trainer.losses.log_probs = counted
    metrics = train(trainer)
    weights = weights_of(trainer)
    trainer.backend.close()
    return sum(calls), weights, metrics


def test_entropy_is_shown_where_it_is_asked_for():
    path = tiny_model("qwen3")
    flags = ({"loss_type": "sft_loss"}, {"loss_type": "sft_loss", "observe_training_entropy": True})
    (plain,), weights = run_ranks(1, trained, "fsdp", path, flags[0])[0]
    (watched,), same = run_ranks(1, trained, "fsdp", path, flags[1])[0]
    assert "train/entropy_loss" not in plain
    assert 0 < watched["train/entropy_loss"] < math.log(320)
    assert_same_weights(same, weights, 0)
    (policy,), _ = run_ranks(1, trained, "megatron", path, {"use_rollout_entropy": True})[0]
    assert policy["rollout/entropy"] == pytest.approx(policy["train/entropy_loss"], rel=0.5)
    assert policy["rollout/entropy"] > 0


@every_backend
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_an_optimizer_that_forgets_begins_anew_with_each_rollout(kind, optimizer):
    """Two rollouts equal two runs of one rollout each, the second from the weights of the first."""
    path = tiny_model("qwen3")
    shared = {"optimizer": optimizer, "sgd_momentum": 0.9, "lr": 1e-2, "lr_decay_style": "linear", "num_rollout": 4}
    forgetful, rates = run_ranks(1, _two_rollouts, kind, path, {**shared, "reset_optimizer_states": True})[0]
    anew = run_ranks(1, _restarted, kind, path, shared)[0]
    remembering, same_rates = run_ranks(1, _two_rollouts, kind, path, shared)[0]
    assert_same_weights(forgetful, anew, 1e-6)
    assert any((forgetful[name] - remembering[name]).abs().max() > 1e-4 for name in anew)
    assert rates == same_rates
    assert rates[0] > rates[1], "the schedule goes on"


def _two_rollouts(kind, path, changed):
    trainer = trainer_of(kind, path, **changed)
    rates = [train(trainer, number, seed=3 + number)["train/lr-pg_0"] for number in range(2)]
    weights = weights_of(trainer)
    trainer.backend.close()
    return weights, rates


def _restarted(kind, path, changed):
    """The second rollout's step by a trainer whose optimizer has not stepped, at the same rate and from the same
    weights: those are copied into it."""
    first = trainer_of(kind, path, **changed)
    train(first, 0, seed=3)
    rate = first.backend.objects().optimizer.param_groups[0]["lr"] if kind == "megatron" else None
    parameters = [p.detach().clone() for part in first.backend.objects().model for p in part.parameters()]
    first.backend.close()
    rate = changed["lr"] * (1 - 1 / changed["num_rollout"]) if rate is None else rate
    second = trainer_of(kind, path, **{**changed, "lr": rate, "lr_decay_style": "constant"})
    with torch.no_grad():
        for part in second.backend.objects().model:
            for parameter, value in zip(part.parameters(), parameters, strict=True):
                parameter.copy_(value)
    train(second, 1, seed=4)
    weights = weights_of(second)
    second.backend.close()
    return weights


@pytest.mark.parametrize(
    ("kind", "changed"),
    [("megatron", {}), ("megatron", {"tensor_model_parallel_size": 2}), ("fsdp", {})],
    ids=["megatron", "tp2", "fsdp"],
)
def test_without_an_optimizer_gradients_are_computed_and_nothing_moves(kind, changed):
    path = tiny_model("qwen3")
    for optimizer in ("adam", "sgd"):
        shared = {**changed, "optimizer": optimizer, "lr": 1e-3}
        (wanted,), _ = run_ranks(2, trained, kind, path, shared)[0]
        for metrics, before, after in run_ranks(2, _unmoved, kind, path, {**shared, "debug_disable_optimizer": True}):
            assert metrics["train/grad_norm"] == pytest.approx(wanted["train/grad_norm"], rel=1e-5)
            assert metrics["train/loss"] == pytest.approx(wanted["train/loss"], rel=1e-5)
            assert_same_weights(after, before, 0)


def _unmoved(kind, path, changed):
    trainer = trainer_of(kind, path, **changed)
    before = weights_of(trainer)
    metrics = train(trainer)
    assert trainer.backend.objects().optimizer is None
    trainer.backend.sleep(2)
    trainer.backend.wake_up()
    after = weights_of(trainer)
    trainer.backend.close()
    return metrics, before, after


def test_replicas_of_shards_train_as_shards_over_all_ranks(tmp_path):
    path = tiny_model("qwen3", vocab=323)
    flags = {"optimizer": "adam", "lr": 1e-3, "clip_grad": 0.1}
    (plain, _), wanted = run_ranks(4, trained, "fsdp", path, flags, 2)[0]
    for (metrics, _), found in run_ranks(4, trained, "fsdp", path, {**flags, "dp_replicate_size": 2}, 2):
        assert metrics["train/grad_norm"] == pytest.approx(plain["train/grad_norm"], rel=1e-5)
        assert metrics["train/loss"] == pytest.approx(plain["train/loss"], rel=1e-5)
        assert_same_weights(found, wanted, 1e-6)
    sharded, resumed = run_ranks(4, _resharded, path, flags, tmp_path)[0]
    assert sharded < 0.6
    assert_same_weights(resumed, wanted, 1e-6)


def _resharded(path, flags, directory):
    """With replicas a rank holds half of the weights. What they save goes on without them."""
    from pathlib import Path

    import torch.distributed as dist

    trainer = trainer_of("fsdp", path, **flags, dp_replicate_size=2)
    parameters = list(trainer.backend.objects().model[0].parameters())
    part = sum(p.to_local().numel() for p in parameters) / sum(p.numel() for p in parameters)
    train(trainer, 0, seed=3)
    target = Path(directory) / "iter_0000000"
    target.mkdir(exist_ok=True)
    dist.barrier()
    trainer.backend.save(target, rollout_id=0)
    dist.barrier()
    (Path(directory) / "latest_checkpointed_iteration.txt").write_text("0")
    trainer.backend.close()
    again = trainer_of("fsdp", path, **flags, load=str(directory))
    train(again, 1, seed=4)
    weights = weights_of(again)
    again.backend.close()
    return part, weights


def test_replicas_that_do_not_divide_the_ranks_are_refused():
    with pytest.raises(RanksFailed, match="--dp-replicate-size 3 does not divide the 2 ranks"):
        run_ranks(2, trained, "fsdp", tiny_model("qwen3"), {"dp_replicate_size": 3})


@pytest.mark.parametrize(("keep", "dtype"), [(True, "torch.float32"), (False, "torch.bfloat16")])
def test_masters_of_bfloat16_parameters_can_be_done_without(keep, dtype):
    path = tiny_model("qwen3", dtype=torch.bfloat16)
    found, moved = run_ranks(1, _masters, path, keep)[0]
    assert found == {dtype}
    assert moved


def _masters(path, keep):
    trainer = trainer_of("fsdp", path, params_dtype="bfloat16", keep_fp32_master=keep)
    before = weights_of(trainer)
    train(trainer)
    after = weights_of(trainer)
    dtypes = {str(p.dtype) for p in trainer.backend.objects().model[0].parameters()}
    trainer.backend.close()
    return dtypes, any(not torch.equal(before[name], after[name]) for name in before)


@every_backend
def test_a_step_that_is_left_out_does_not_advance_the_schedule(kind):
    rates = run_ranks(1, _rates, kind, tiny_model("qwen3"))[0]
    # One step taken, one left out, one taken: the rate of the third is that of the second.
    assert rates == pytest.approx([1e-3, 0.75e-3, 0.75e-3, 0.5e-3])


def _rates(kind, path):
    flags = {"lr_decay_style": "linear", "num_rollout": 4, "lr": 1e-3, "check_for_nan_in_loss_and_grad": False}
    backend = trainer_of(kind, path, **flags).backend
    batch = backend_cases.micro_batch(backend_cases.sequences(2))
    rates = []
    for broken in (False, True, False, False):
        scale = math.nan if broken else 1.0
        outcome = backend.train_step([batch], lambda logits, _, s=scale: LossOutput(logits.square().mean() * s, {}))
        rates.append(outcome.learning_rate)
        assert outcome.stepped != broken
    backend.close()
    return rates


@every_backend
def test_checksums_of_weights_tell_when_they_change(tmp_path, kind):
    run_ranks(2, trained, kind, tiny_model("qwen3"), _checksums(tmp_path), 2)
    lines = [
        [
            json.loads(line)
            for line in (tmp_path / "weight_checksums" / f"rank0000{rank}.jsonl").read_text().splitlines()
        ]
        for rank in (0, 1)
    ]
    assert [[line["rollout_id"] for line in rank] for rank in lines] == [[0, 1], [0, 1]]
    first, second = (set(line["sha256"].values()) for line in lines[0])
    assert not first & second
    assert all(len(value) == 64 for value in first)
    # Megatron's ranks hold all weights, FSDP's each its own rows.
    assert (lines[0][1]["sha256"] == lines[1][1]["sha256"]) == (kind == "megatron")


def _checksums(tmp_path):
    return {"save_local_weight_checksum": True, "run_dir": str(tmp_path)}


@every_backend
def test_deterministic_mode_is_torchs_too(kind):
    assert run_ranks(1, _deterministic, kind, tiny_model("qwen3"))[0] == (False, True)


def _deterministic(kind, path):
    before = torch.are_deterministic_algorithms_enabled()
    trainer = trainer_of(kind, path, deterministic_mode=True)
    train(trainer)
    trainer.backend.close()
    return before, torch.are_deterministic_algorithms_enabled()


def test_speed_is_told_for_each_pass_and_as_a_share_of_the_peak():
    flags = {"use_kl_loss": True, "mfu_peak_tflops": 2.0}
    (metrics,), _ = run_ranks(1, trained, "fsdp", tiny_model("qwen3"), flags)[0]
    seconds = {name: metrics[f"perf/{name}_time"] for name in ("log_probs", "ref_log_probs", "actor_train")}
    flops = {name: metrics[f"perf/{name}_tflops"] * took for name, took in seconds.items()}
    assert flops["log_probs"] == pytest.approx(flops["ref_log_probs"])
    assert flops["actor_train"] == pytest.approx(3 * flops["log_probs"])
    assert metrics["perf/actor_train_mfu"] == pytest.approx(metrics["perf/actor_train_tflops"] / 2.0)
    (without,), _ = run_ranks(1, trained, "fsdp", tiny_model("qwen3"), {})[0]
    assert "perf/actor_train_mfu" not in without


def test_a_step_with_adapters_counts_less_than_three_passes():
    lora = {"lora_rank": 4, "lora_alpha": 4, "target_modules": "all-linear", "lora_type": "lora"}
    (metrics,), _ = run_ranks(1, trained, "fsdp", tiny_model("qwen3"), {"use_kl_loss": True, **lora})[0]
    seconds = {name: metrics[f"perf/{name}_time"] for name in ("log_probs", "ref_log_probs", "actor_train")}
    flops = {name: metrics[f"perf/{name}_tflops"] * took for name, took in seconds.items()}
    added = flops["log_probs"] - flops["ref_log_probs"]
    assert 0 < added < flops["log_probs"]
    # Attention's products have both gradients.
    assert 2 < (flops["actor_train"] - 3 * added) / flops["ref_log_probs"] < 2.2
