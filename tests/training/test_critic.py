"""PPO: actor and critic learn what a plain implementation of the formulas learns, on every layout of ranks."""

from types import SimpleNamespace

import pytest
import torch
from support.megatron_cases import save_backend
from support.plain_losses import assert_close
from support.ppo_rollouts import PPO, plain_ppo, trained_ppo
from support.ranks import run_ranks
from support.tiny_models import tiny_model
from support.trained_rollouts import args_of, data_of

from miles.backends.checkpoint_layout import TRACKER, iteration_name
from miles.backends.megatron_utils.backend import MegatronBackend
from miles.backends.megatron_utils.value_head import NAME
from miles.backends.training_utils.critic import Critic, CriticElsewhere, check_same_start, critic_args
from miles.backends.training_utils.data import RankData
from miles.utils.train_data import split_train_data

SEEDS = (7, 8)
LAYOUTS = {
    "one rank": {},
    "DP 2": {"dp_size": 2},
    "SP 2": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "TP 2": {"tensor_model_parallel_size": 2},
    "PP 2": {"pipeline_model_parallel_size": 2},
    "CP 2": {"context_parallel_size": 2},
}


@pytest.fixture(scope="module")
def expected():
    path = tiny_model("qwen3")
    return path, *run_ranks(1, plain_ppo, path, {}, SEEDS, distributed=False)[0]


@pytest.mark.full
@pytest.mark.parametrize("name", LAYOUTS)
def test_actor_and_critic_learn_what_the_formulas_say(expected, name):
    path, metrics, weights, head = expected
    layout = {"dp_size": 1, **LAYOUTS[name]}
    world = 1 if name == "one rank" else 2
    heads = []
    for found_metrics, found, found_head in run_ranks(world, trained_ppo, path, layout, SEEDS):
        for ours, theirs in zip(found_metrics, metrics, strict=True):
            assert_close(ours, theirs, name)
        for key, tensor in found.items():
            torch.testing.assert_close(tensor, weights[key], rtol=1e-5, atol=1e-5, msg=key)
        heads += [] if found_head is None else [found_head]
    assert heads
    for found_head in heads:
        assert head.abs().max() > 1e-3
        torch.testing.assert_close(found_head, head, rtol=1e-4, atol=1e-5)


def test_the_critic_learns_alone_for_as_long_as_it_is_told(expected):
    path, metrics, *_ = expected
    found, weights, _ = run_ranks(1, trained_ppo, path, {"dp_size": 1, "num_critic_only_steps": 2}, SEEDS)[0]
    assert_close(found[0], {k: v for k, v in metrics[0].items() if "critic" in k}, "alone")
    assert not [name for name in found[0] if name.startswith("train/pg")]
    untrained = run_ranks(1, trained_ppo, path, {"dp_size": 1}, ())[0][1]
    assert all(torch.equal(weights[name], tensor) for name, tensor in untrained.items())


def saved_and_loaded(path, root, layout):
    """Values of a trained critic, of one that its checkpoint gives, and of one that begins from an actor's; on a stage
    without logits, of none. Then those of the first two after they have trained on."""
    args = args_of(path, "megatron", **PPO, **layout, dp_size=1, optimizer="adam", save=str(root / "actor"))
    actor = MegatronBackend(args)
    actor.init()
    part = RankData.from_wire(split_train_data(args, data_of(7))[0])

    def begun(own):
        backend = MegatronBackend(own, role="critic", parallel=actor.parallel)
        start = backend.init()
        return Critic(own, backend), start

    def values_of(critic):
        critic.fill_values(part)
        return [v.clone() for v in part.columns.get("values", ())]

    first, start = begun(critic_args(args))
    assert start == 0
    assert not any(v.any() for v in values_of(first))
    part.columns["returns"] = [torch.ones(length) for length in part.response_lengths]
    first.train(0, part, lambda number: None)
    trained = values_of(first)
    save_backend(first.backend, root / "actor_critic", 3)
    save_backend(actor, root / "actor", 3)
    args.load = str(root / "actor")
    again, start = begun(critic_args(args))
    loaded = values_of(again)
    args.load, args.ref_load = None, str(root / "actor")
    fresh, fresh_start = begun(critic_args(args))
    backbone = dict(fresh.backend.model.module.named_parameters())
    same = all(torch.equal(backbone[n], p) for n, p in actor.model.module.named_parameters() if n != NAME)
    # Beside an actor that begins anew, a critic that was trained before keeps its head.
    args.ref_load, args.critic_load, args.finetune = None, str(root / "actor_critic"), True
    pretrained, pretrained_start = begun(critic_args(args))
    kept = values_of(pretrained)
    gone_on = []
    for critic in (first, again):
        values_of(critic)
        critic.train(1, part, lambda number: None)
        gone_on.append(values_of(critic))
    return (trained, loaded, kept, *gone_on), (start, fresh_start, pretrained_start), same


def assert_goes_on(values, starts, same):
    trained, loaded, kept, through, resumed = values
    for ours, theirs in ((loaded, trained), (kept, trained), (resumed, through)):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert not trained or any(v.any() for v in trained)
    assert (starts, same) == ((4, 0, 0), True)


@pytest.mark.full
def test_a_critic_goes_on_from_its_own_checkpoint_and_begins_from_an_actors(tmp_path):
    for tied in (True, False):
        path = tiny_model("qwen3", tied=tied)
        (found,) = run_ranks(1, saved_and_loaded, path, tmp_path / str(tied), {})
        assert found[0][0]
        assert_goes_on(*found)


@pytest.mark.full
@pytest.mark.parametrize("name", ["SP 2", *(pytest.param(name, marks=pytest.mark.long) for name in ("PP 2", "CP 2"))])
def test_a_critic_over_several_ranks_goes_on_from_its_own_checkpoint(tmp_path, name):
    """Its head is the same on all ranks that have it, and in the checkpoint once."""
    found = run_ranks(2, saved_and_loaded, tiny_model("qwen3"), tmp_path, LAYOUTS[name])
    assert [bool(values[0]) for values, *_ in found] == [name != "PP 2", True]
    for one in found:
        assert_goes_on(*one)


def test_checkpoints_of_different_rollouts_are_refused():
    args = SimpleNamespace(load="/run/critic")
    check_same_start(5, 5, args)
    check_same_start(5, 0, args)
    with pytest.raises(CriticElsewhere) as caught:
        check_same_start(5, 3, args)
    assert "/run/critic" in str(caught.value.evidence)


def test_a_critic_that_is_ahead_of_its_actor_goes_on_with_the_actors_rollout(tmp_path):
    """Its checkpoint is written first: a run may have ended between the two."""
    for root, saved in (("run", (3,)), ("run_critic", (3, 4))):
        for rollout_id in saved:
            (tmp_path / root / iteration_name(rollout_id)).mkdir(parents=True)
        (tmp_path / root / TRACKER).write_text(str(saved[-1]))
    given = {"load": str(tmp_path / "run/"), "save": None, "lr": 1.0, "ckpt_step": None, "critic_load": None}
    found = critic_args(SimpleNamespace(**given))
    assert (found.load, found.ckpt_step) == (str(tmp_path / "run_critic"), 3)
    # So does the one that is named, where it has that rollout; else it is taken as it is, and compared.
    named = given | {"critic_load": str(tmp_path / "run_critic"), "load": str(tmp_path / "run"), "ckpt_step": 3}
    assert critic_args(SimpleNamespace(**named)).ckpt_step == 3
    found = critic_args(SimpleNamespace(**given | {"critic_load": str(tmp_path / "elsewhere")}))
    assert (found.load, found.ckpt_step) == (str(tmp_path / "elsewhere"), None)
    # Without checkpoints of its own it begins with the actor's layers.
    found = critic_args(SimpleNamespace(**given | {"load": str(tmp_path / "run_critic")}))
    assert (found.load, found.ckpt_step) == (None, None)
    assert found.ref_load == str(tmp_path / "run_critic" / iteration_name(4))


def test_a_run_that_goes_on_finds_its_critic_where_it_saved_it(tmp_path):
    """``--resume auto``: ``--load`` is then ``--save``, whatever ``--critic-load`` the run began with."""
    for root, saved in (("run", (7,)), ("critics", (3, 7)), ("pretrained", (3,))):
        for rollout_id in saved:
            (tmp_path / root / iteration_name(rollout_id)).mkdir(parents=True)
        (tmp_path / root / TRACKER).write_text(str(saved[-1]))
    run, critics = str(tmp_path / "run"), str(tmp_path / "critics")
    given = {"load": run, "save": run, "critic_save": critics, "lr": 1.0, "ckpt_step": None, "critic_load": None}
    for began in (None, str(tmp_path / "pretrained")):
        found = critic_args(SimpleNamespace(**given | {"critic_load": began}))
        assert (found.load, found.ckpt_step, found.save) == (critics, 7, critics)
    # A run that only begins with weights takes the critic that is named.
    found = critic_args(SimpleNamespace(**given | {"finetune": True, "critic_load": str(tmp_path / "pretrained")}))
    assert (found.load, found.ckpt_step) == (str(tmp_path / "pretrained"), None)
