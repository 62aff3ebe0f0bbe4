"""What the job asks of nodes and engines."""

import pytest

from miles.backends.sglang_utils.environment import engine_environment
from miles.training.parts import _spawn_trainer, _start_rollout, engine_seed, placement_requests, trainer_env
from miles.training.recovery import pinned
from miles_controller import Placement
from miles_controller.placement import Slot


def config(**changed):
    return {
        "device": "cpu", "debug_rollout_only": False, "debug_train_only": False, "colocate": False, "world_size": 4,
        "rollout_num_engines": 2, "rollout_num_gpus_per_engine": 2, "seed": 1234, "load": None, **changed,
    }  # fmt: skip


def test_colocated_engines_share_the_trainers_devices():
    trainer, engines = placement_requests(config(colocate=True))
    assert (trainer.num_ranks, engines.num_ranks, engines.devices_per_rank) == (4, 2, 2)
    assert engines.colocate_with == "trainer"


def test_each_side_alone_has_only_its_own_devices():
    assert [r.name for r in placement_requests(config(debug_train_only=True, colocate=True))] == ["trainer"]
    (engines,) = placement_requests(config(debug_rollout_only=True, colocate=True))
    assert engines.colocate_with is None


def test_gpus_are_never_shared_unless_colocated_and_cores_are():
    assert not any(r.oversubscribe for r in placement_requests(config(device="cuda")))
    assert all(r.oversubscribe for r in placement_requests(config()))


def test_a_resumed_run_draws_other_answers_than_its_begin(tmp_path):
    assert engine_seed(config()) == engine_seed(config(load=str(tmp_path))) == 1234
    for rollout_id in (2, 5):
        (tmp_path / f"iter_{rollout_id:07d}").mkdir()
        (tmp_path / f"iter_{rollout_id:07d}" / "metadata.json").write_text("{}")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("5")
    seeds = {engine_seed(config(load=str(tmp_path), ckpt_step=step)) for step in (None, 2)}
    assert len(seeds | {1234}) == 3
    assert engine_seed(config(load=str(tmp_path), finetune=True)) == 1234
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_deterministic_ranks_on_gpus_tell_their_libraries():
    """--deterministic-mode; what --train-env-vars gives comes first."""
    inherited = {"NCCL_CUMEM_ENABLE": "1"}
    assert trainer_env(config(device="cuda"), inherited) == {}
    found = trainer_env(config(device="cuda", deterministic_mode=True, train_env_vars={"NCCL_ALGO": "Tree"}), inherited)
    assert found == {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_ALGO": "Tree"}
    assert "NCCL_ALGO" not in trainer_env(config(deterministic_mode=True))


def test_trainer_and_engines_agree_on_how_nccl_shares_memory():
    """Ranks that differ in it cannot be in one group: "invalid argument" when it is made."""
    engines = engine_environment("cuda", index=0, tp_size=1, colocate=False, inherited={})
    ranks = trainer_env(config(device="cuda"), {})
    assert ranks["NCCL_CUMEM_ENABLE"] == engines["NCCL_CUMEM_ENABLE"] == "0"
    # With symmetric memory SGLang sets its own to 1, whatever it finds.
    for inherited in ({}, {"NCCL_CUMEM_ENABLE": "0"}):
        found = trainer_env(config(device="cuda", sglang_enable_symm_mem=True), inherited)
        assert found["NCCL_CUMEM_ENABLE"] == "1"
    assert "NCCL_CUMEM_ENABLE" not in trainer_env(config(device="cuda", colocate=True), {}), "there is no such group"
    assert "NCCL_CUMEM_ENABLE" not in trainer_env(config(), {})


@pytest.mark.parametrize("recovers", [True, False])
async def test_what_is_stopped_is_brought_back_only_with_fault_tolerance(recovers):
    policies = {}

    class Controller:
        async def spawn(self, name, *_, policy, **__):
            policies[name] = policy

    given = config(
        use_fault_tolerance=recovers, recovery_stop_timeout=7.0, device="cuda", world_size=1, train_backend="megatron"
    )
    await _start_rollout(Controller(), given)
    await _spawn_trainer(Controller(), given, Placement((), {"trainer": (((Slot("node-0", (0,), 0, 0)),),)}, "node-0"))
    assert {name: policy.stopped_timeout_s for name, policy in policies.items()} == dict.fromkeys(
        ("rollout", "trainer"), 7.0 if recovers else None
    )


def test_ranks_that_begin_again_take_what_the_run_began_with(tmp_path):
    """Not what it has written to the same directory since."""
    for rollout_id in (2, 5):
        (tmp_path / f"iter_{rollout_id:07d}").mkdir()
        (tmp_path / f"iter_{rollout_id:07d}" / "metadata.json").write_text("{}")
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    tracker.write_text("2")
    found = pinned(config(load=str(tmp_path), critic_load=str(tmp_path / "iter_0000005")))
    tracker.write_text("5")
    assert found == {**config(load=str(tmp_path), critic_load=str(tmp_path / "iter_0000005")), "ckpt_step": 2}
    assert pinned(config()) == config()


def test_over_several_nodes_each_has_its_share_of_the_trainer():
    (trainer, _) = placement_requests(config(num_nodes=3, actor_num_gpus_per_node=2))
    assert (trainer.num_ranks, trainer.ranks_per_node) == (4, 2)
    (trainer, _) = placement_requests(config(num_nodes=1, actor_num_gpus_per_node=2))
    assert trainer.ranks_per_node is None
