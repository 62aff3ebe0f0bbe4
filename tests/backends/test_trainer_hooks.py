"""Functions of the user inside the trainer, on real backends: when they are called, with what, and what they change."""

import pytest
import torch
from support import trainer_functions
from support.ranks import run_ranks
from support.rollout_steps import train, trained, trainer_of, weights_of
from support.tiny_models import tiny_model

from miles.backends.training_utils.loss_hub.user_functions import BadLossFunction
from miles.rollout.hooks import BadHookResult, HookFailed
from miles.utils.misc import CannotLoad

HERE = "support.trainer_functions"
pytestmark = pytest.mark.full
every_backend = pytest.mark.parametrize("kind", ["megatron", "fsdp"])
HOOKS = {
    "custom_megatron_init_path": f"{HERE}.on_init",
    "custom_megatron_before_log_prob_hook_path": f"{HERE}.before_log_prob",
    "custom_megatron_before_train_step_hook_path": f"{HERE}.before_step",
    "rollout_data_postprocess_path": f"{HERE}.only_args",
    "use_kl_loss": True,
    "train_id": 7,
}


@every_backend
def test_each_is_called_in_its_place_with_what_it_works_on(kind):
    ranks = run_ranks(2, _record, kind, tiny_model("qwen3"), {**HOOKS, "global_batch_size": 4})
    wanted = [
        ("init", True, 7),
        ("log_prob", "ref_", True, True),
        ("log_prob", "", True, True),
        ("postprocess", 7),
        ("step", 5, 0, True, True, 1),
        ("step", 5, 1, True, True, 1),
    ]
    assert ranks == [wanted, wanted]


def _record(kind, path, changed):
    trainer = trainer_of(kind, path, **changed)
    train(trainer, 5)
    trainer.backend.close()
    return trainer_functions.seen


@every_backend
def test_rollout_data_can_be_changed_before_training(kind):
    path = tiny_model("qwen3")
    changed = {"rollout_data_postprocess_path": f"{HERE}.first_tokens_only"}
    (metrics,), weights = run_ranks(1, trained, kind, path, changed)[0]
    (plain,), others = run_ranks(1, trained, kind, path, {})[0]
    assert metrics["rollout/advantages"] != pytest.approx(plain["rollout/advantages"])
    assert metrics["train/grad_norm"] != pytest.approx(plain["train/grad_norm"])
    assert any(not torch.equal(weights[name], others[name]) for name in others)


RAISING = [
    ("custom_megatron_init_path", {}),
    ("custom_megatron_before_log_prob_hook_path", {}),
    ("custom_megatron_before_train_step_hook_path", {}),
    ("rollout_data_postprocess_path", {}),
    ("custom_loss_function_path", {"loss_type": "custom_loss"}),
    ("custom_tis_function_path", {"use_tis": True}),
    ("custom_pg_loss_reducer_function_path", {}),
]


@every_backend
def test_an_exception_comes_with_the_users_traceback_first_and_names_the_flag(kind):
    told = run_ranks(1, _tell_all, kind, tiny_model("qwen3"), RAISING)[0]
    if kind == "megatron":
        told |= run_ranks(1, _tell_all, kind, tiny_model("qwen3"), [("custom_model_provider_path", {})])[0]
    for dest, text in told.items():
        head, _, rest = text.partition("\n\n")
        assert head.startswith("Traceback (most recent call last):\n"), dest
        first_frame = head.splitlines()[1]
        assert "trainer_functions.py" in first_frame, (dest, first_frame)
        assert head.endswith('KeyError: "the user\'s own mistake"'), dest
        assert rest.startswith(f"--{dest.replace('_', '-')} {HERE}.broken raised KeyError"), dest
        assert "E-HOOK-002" in rest


def _tell_all(kind, path, cases):
    return {dest: _tell(kind, path, {dest: f"{HERE}.broken", **more}) for dest, more in cases}


def _tell(kind, path, changed):
    trainer = None
    try:
        trainer = trainer_of(kind, path, **changed)
        train(trainer)
    except HookFailed as error:
        return str(error)
    finally:
        _leave(trainer)
    return "nothing was raised"


def _leave(trainer):
    from megatron.core import parallel_state

    if trainer is not None:
        trainer.backend.close()
    elif parallel_state.is_initialized():
        parallel_state.destroy_model_parallel()


def test_an_async_function_is_refused_before_anything_is_built():
    error = run_ranks(1, _refused, tiny_model("qwen3"))[0]
    assert "--custom-megatron-init-path" in error
    assert "async" in error


def _refused(path):
    with pytest.raises(CannotLoad) as caught:
        trainer_of("fsdp", path, custom_megatron_init_path=f"{HERE}.in_async")
    return str(caught.value)


def test_rollout_data_of_another_length_is_told():
    text = run_ranks(1, _bad_data, tiny_model("qwen3"))[0]
    assert "--rollout-data-postprocess-path" in text
    assert "advantages has 7 entries for 8 samples" in text


def _bad_data(path):
    trainer = trainer_of("fsdp", path, rollout_data_postprocess_path=f"{HERE}.too_short")
    with pytest.raises(BadHookResult) as caught:
        train(trainer)
    return str(caught.value)


@pytest.mark.parametrize(
    ("function", "optimizer"),
    [("frozen_embedding", "sgd"), ("without_stages", "adam")],
)
def test_a_model_of_the_users_is_trained(function, optimizer):
    path = tiny_model("qwen3", tied=False)
    changed = {"custom_model_provider_path": f"{HERE}.{function}", "optimizer": optimizer, "lr": 1e-3}
    before, after = run_ranks(1, _before_and_after, path, changed)[0]
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {"model.embed_tokens.weight"}


def _before_and_after(path, changed):
    trainer = trainer_of("megatron", path, **changed)
    before = weights_of(trainer)
    train(trainer)
    return before, weights_of(trainer)


def test_a_provider_that_gives_no_model_is_told():
    assert "--custom-model-provider-path" in run_ranks(1, _no_model, tiny_model("qwen3"))[0]


def _no_model(path):
    with pytest.raises(BadHookResult) as caught:
        trainer_of("megatron", path, custom_model_provider_path=f"{HERE}.no_model")
    return str(caught.value)


def test_a_spec_of_the_users_builds_the_layers():
    path = tiny_model("qwen3")
    spec = [HERE, "doubling_spec"]
    once, twice, plain = (
        run_ranks(1, trained, "megatron", path, changed)[0][0][0]["rollout/log_probs"]
        for changed in ({"spec": spec, "scale": 1.0}, {"spec": spec, "scale": 2.0}, {})
    )
    assert once == plain
    assert abs(twice - plain) > 1e-3


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"qkv_format": "bshd"},
        {"data_pad_size_multiplier": 16},
        {"tensor_model_parallel_size": 2},
    ],
    ids=["packed", "padded", "tail", "tp2"],
)
def test_a_custom_loss_of_log_probabilities_equals_supervised_training(changed):
    """At the rollout's temperature, on every layout."""
    path = tiny_model("qwen3")
    size = changed.get("tensor_model_parallel_size", 1)
    own = {"loss_type": "custom_loss", "custom_loss_function_path": f"{HERE}.log_prob_loss", **changed}
    (metrics,), weights = run_ranks(size, trained, "megatron", path, own)[0]
    (wanted,), others = run_ranks(1, trained, "megatron", path, {"loss_type": "sft_loss"})[0]
    assert metrics["train/loss"] == pytest.approx(wanted["train/loss"], rel=1e-5)
    assert metrics["train/grad_norm"] == pytest.approx(wanted["train/grad_norm"], rel=1e-5)
    assert metrics["train/entropy"] > 0
    for name, tensor in others.items():
        torch.testing.assert_close(weights[name], tensor, atol=1e-5, rtol=0)


def test_a_correction_with_another_result_is_told_what_to_return():
    assert "--custom-tis-function-path" in run_ranks(1, _bad_correction, tiny_model("qwen3"))[0]


def _bad_correction(path):
    trainer = trainer_of("fsdp", path, use_tis=True, custom_tis_function_path=f"{HERE}.three_things")
    with pytest.raises(BadLossFunction) as caught:
        train(trainer)
    return str(caught.value)
