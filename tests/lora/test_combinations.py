"""Adapters with what else looks at a policy's weights: snapshots of the old policy, and routers that replay."""

import numpy as np
import pytest
import torch
from support.hf_reference import load_hf_model
from support.lora_cases import PlainLora, lora_flags, lora_steps, write_adapter
from support.lora_runs import Run
from support.plain_losses import assert_close, plain_log_probs
from support.ranks import run_ranks
from support.routed_models import LAYERS, SEED, Routed, foreign_experts, with_last
from support.tiny_models import tiny_model
from support.trained_rollouts import args_of, data_of, trained

from miles.utils.train_data import split_train_data

pytestmark = pytest.mark.full
SP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
KEPT = {"keep_old_actor": True, "train_async": True, "use_kl_loss": True}


def old_policy(path, kind, changed, root):
    """The same samples trained on three times; who is said to have made them, and what their old log-probs were."""
    run = Run(path, kind, {**KEPT, **changed, "save_debug_train_data": f"{root}/{{rollout_id}}_{{rank}}.pt"})
    old, found, weights = run.trainer.old_weights, [], {}
    for rollout_id, made_by in enumerate(("1", "1", "2")):
        old.keep(rollout_id + 1)
        weights[rollout_id + 1] = run.weights()
        data = data_of(SEED) | {"weight_versions": [[made_by]] * 8}
        part = split_train_data(run.args, data)[run.backend.parallel.dp_rank]
        run.trainer.train(rollout_id, lambda part=part: part)
        file = f"{root}/{rollout_id}_{run.backend.parallel.rank}.pt"
        columns = torch.load(file)["rollout_data"]
        found.append({name: torch.cat(columns[name]) for name in ("log_probs", "ref_log_probs")})
    with old.in_place(2):
        restored = run.weights()
    kept = sum(tensor.numel() for tensor in old._snapshots[2])
    trained_here = sum(tensor.numel() for tensor in run.backend.local_weights(trained=True))
    all_here = sum(tensor.numel() for tensor in run.backend.local_weights())
    same = all(torch.equal(tensor, weights[2][name]) for name, tensor in restored.items())
    moved = any(not torch.equal(tensor, weights[3][name]) for name, tensor in weights[2].items())
    run.backend.close()
    return found, same and moved, (kept, trained_here, all_here)


@pytest.mark.parametrize(
    ("kind", "changed"),
    [("megatron", SP2), ("fsdp", {"dp_size": 2}), pytest.param("megatron", {"dp_size": 2}, marks=pytest.mark.long)],
)
def test_the_old_policy_is_kept_as_adapters_alone(kind, changed, tmp_path):
    for (first, again, later), restored, (kept, own, whole) in run_ranks(
        2, old_policy, tiny_model("qwen3"), kind, changed, tmp_path
    ):
        # The actor has moved in between, the weights that are said to have generated have not.
        assert torch.equal(first["log_probs"], again["log_probs"])
        assert (later["log_probs"] - first["log_probs"]).abs().max() > 1e-3
        # The reference is below adapters, whichever of them are in place.
        assert torch.equal(first["ref_log_probs"], later["ref_log_probs"])
        assert restored
        assert kept == own < whole


class RoutedLora(PlainLora):
    """Its routers are told the experts of each sample, if anybody knows them."""

    def __init__(self, model, adapter):
        super().__init__(model, adapter)
        self.routed = Routed(self.module)
        plain = super().logits
        # ``Routed`` calls it by rows of tokens.
        self.routed.module = lambda rows: type("Output", (), {"logits": plain(rows[0])[None]})

    def logits(self, tokens):
        return self.routed(tokens)


def told(path, adapter, changed, experts):
    """Numbers of the formula. ``experts``: None: those of the policy before the first step."""
    args, data = args_of(path, "fsdp", **changed), data_of(SEED)
    model, below = RoutedLora(path, adapter), Routed(load_hf_model(path))
    below.chosen = None
    own = routes_of(model, data)
    model.routed.experts = own if experts is None else with_last(data, experts)
    with torch.no_grad():
        data["log_probs"] = plain_log_probs(args, model.logits, data)
        # The reference goes its own ways: it has no adapters, and other experts.
        data["ref_log_probs"] = plain_log_probs(args, below, data)
    found = lora_steps(args, model, data)
    after = routes_of(model, data)
    moved = sum(int((np.sort(own[key]) != np.sort(after[key])).any(-1).sum()) for key in own)
    return *found[:2], moved


def routes_of(model, data):
    """What the policy chooses by itself."""
    told, model.routed.experts = model.routed.experts, None
    found = model.routed.routes_of(data)
    model.routed.experts = told
    return found


@pytest.mark.parametrize(
    "layout",
    [
        {**SP2, "expert_model_parallel_size": 2},
        pytest.param({"pipeline_model_parallel_size": 2}, marks=pytest.mark.long),
    ],
    ids=["EP 2, SP 2", "PP 2"],
)
@pytest.mark.parametrize("replayed", ["own", "engine's"])
def test_routers_of_a_policy_with_adapters_replay_and_those_of_the_reference_do_not(tmp_path, layout, replayed):
    path = tiny_model("qwen3_moe", layers=LAYERS)
    adapter = write_adapter(tmp_path / "adapter", path)
    experts = None if replayed == "own" else foreign_experts()
    flags = {"use_routing_replay": True, "lr": 1.0} if experts is None else {"use_rollout_routing_replay": True}
    means, weights, moved = run_ranks(1, told, path, adapter, flags, experts, distributed=False)[0]
    assert moved > 5, "replay would show nothing"
    given = {"dp_size": 1, **flags, **layout, **lora_flags(lora_adapter_path=str(adapter))}
    more = {} if experts is None else {"rollout_routed_experts": experts}
    for metrics, found in run_ranks(2, trained, path, "megatron", given, SEED, more):
        assert_close(metrics, means, replayed)
        for name, tensor in weights.items():
            torch.testing.assert_close(found[name], tensor, rtol=2e-5, atol=2e-5, msg=name)
