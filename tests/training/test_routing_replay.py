"""Replay of routing: a rollout in each layout against a Hugging Face model whose routers are told the experts."""

import functools

import numpy as np
import pytest
import torch
from support.hf_reference import load_hf_model
from support.plain_losses import assert_close, plain_log_probs
from support.ranks import run_ranks
from support.routed_models import LAYERS, SEED, Routed, foreign_experts, with_last
from support.tiny_models import tiny_model
from support.trained_rollouts import args_of, backend_of, data_of, plain_steps, trained

from miles.backends.training_utils.data import RankData
from miles.backends.training_utils.rollout_trainer import RolloutTrainer
from miles.backends.training_utils.routing import Routing
from miles.backends.training_utils.timers import Timers
from miles.utils.train_data import split_train_data

pytestmark = pytest.mark.full

SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
MOE_AGAIN = {"recompute_granularity": "selective", "recompute_modules": ["moe"]}
LAYOUTS = {
    "one rank": {},
    "other packing in the pass before": {"log_probs_max_tokens_per_gpu": 70},
    "rows padded": {"qkv_format": "bshd", "use_dynamic_batch_size": False, "micro_batch_size": 2},
    "layers computed again": FULL,
    "experts computed again": MOE_AGAIN,
    "DP 2": {"dp_size": 2},
    "SP 2": {**SP, "log_probs_max_tokens_per_gpu": 70},
    "CP 2": {"context_parallel_size": 2},
    "EP 2, PP 2, layers computed again": {
        "expert_model_parallel_size": 2,
        "dp_size": 2,
        "pipeline_model_parallel_size": 2,
        **FULL,
    },
    "EP 2, SP 2, CP 2": {"expert_model_parallel_size": 2, "context_parallel_size": 2, **SP},
    "SP 2, rows padded": {**SP, "qkv_format": "bshd", "use_dynamic_batch_size": False, "micro_batch_size": 2},
}
QUICK = {
    ("SP 2", "own"),
    ("SP 2", "engine's"),
    ("EP 2, PP 2, layers computed again", "own"),
    ("EP 2, PP 2, layers computed again", "engine's"),
    ("EP 2, SP 2, CP 2", "own"),
    ("rows padded", "own"),
    ("other packing in the pass before", "own"),
    ("experts computed again", "engine's"),
}
"""With experts in all layers; the other combinations are in the long tier."""


def size_of(layout):
    return (
        layout.get("dp_size", 1)
        * layout.get("tensor_model_parallel_size", 1)
        * layout.get("pipeline_model_parallel_size", 1)
        * layout.get("context_parallel_size", 1)
    )


def told(path, changed, experts=None):
    """Numbers of the formula. ``experts``: of each sample; None: those of the model before the first step."""
    args, data = args_of(path, "fsdp", **changed), data_of(SEED)
    model = Routed(load_hf_model(path))
    reference = plain_log_probs(args, model, data)
    before = model.routes_of(data)
    replayed = before if experts is None else with_last(data, experts)
    model.experts = replayed
    data |= {"ref_log_probs": reference, "log_probs": plain_log_probs(args, model, data)}
    means, weights = plain_steps(args, model.module, model, data)
    after = model.routes_of(data)
    moved = sum(int((np.sort(before[key]) != np.sort(after[key])).any(-1).sum()) for key in before)
    return means, weights, moved, before


@functools.cache
def expected(dense_layers):
    """By what is replayed: path, flags, further columns, metrics and weights."""
    path = tiny_model("qwen3_moe", layers=LAYERS, mlp_only_layers=dense_layers)
    own, engine = {"use_routing_replay": True, "lr": 3.0}, {"use_rollout_routing_replay": True}
    experts = foreign_experts()
    means, weights, moved, _ = run_ranks(1, told, path, own, distributed=False)[0]
    assert moved > 5, "replay would show nothing"
    found = {"own": (path, own, {}, means, weights)}
    means, weights, _, _ = run_ranks(1, told, path, engine, experts, distributed=False)[0]
    return found | {"engine's": (path, engine, {"rollout_routed_experts": experts}, means, weights)}


def cases():
    for dense in ((), (1,)):
        for name in LAYOUTS:
            for replayed in ("own", "engine's"):
                tier = [] if not dense and (name, replayed) in QUICK else [pytest.mark.long]
                yield pytest.param(dense, name, replayed, marks=tier, id=f"{name}-{replayed}-dense{list(dense)}")


@pytest.mark.parametrize(("dense", "name", "replayed"), list(cases()))
def test_training_goes_through_the_experts_that_were_recorded(dense, name, replayed):
    path, flags, more, means, weights = expected(dense)[replayed]
    layout = {"dp_size": 1, **flags, **LAYOUTS[name]}
    for metrics, found in run_ranks(size_of(layout), trained, path, "megatron", layout, SEED, more):
        assert_close(metrics, means, name)
        assert set(found) == set(weights)
        for key, tensor in found.items():
            torch.testing.assert_close(tensor, weights[key], rtol=2e-5, atol=2e-5, msg=key)


def chosen(path):
    """By sample, what a Hugging Face model chooses: ``[T, layers, k]``, in order of numbers."""
    found = Routed(load_hf_model(path)).routes_of(data_of(SEED))
    return [np.sort(found[tuple(tokens)]) for tokens in data_of(SEED)["tokens"]]


def recorded(path, changed):
    """By sample, what this rank keeps of the pass for old log-probs."""
    args = args_of(path, "megatron", dp_size=1, use_routing_replay=True, **changed)
    backend = backend_of("megatron", args)
    backend.init()
    data = RankData.from_wire(split_train_data(args, data_of(SEED))[0])
    data.routing = Routing.of(args, None)
    with data.recording():
        batches = [data.micro_batch(samples, backend.device, routed=True) for samples in data.forward]
        backend.forward_only(batches, lambda logits, batch: None)
    return {data.partition[i]: experts.numpy() for i, experts in data.routing.recorded.items()}


@pytest.mark.parametrize("layout", [SP, {"context_parallel_size": 2}, SP | {"qkv_format": "bshd"}], ids=str)
def test_each_rank_keeps_what_it_needs_in_any_packing(layout):
    path = tiny_model("qwen3_moe", layers=LAYERS)
    wanted = run_ranks(1, chosen, path, distributed=False)[0]
    padded = {"use_dynamic_batch_size": False, "micro_batch_size": 3} if "qkv_format" in layout else {}
    ranks = run_ranks(2, recorded, path, layout | padded)
    for sample, experts in enumerate(wanted):
        known = [rank[sample][..., 0] >= 0 for rank in ranks]
        shares = "context_parallel_size" in layout
        assert (known[0] ^ known[1]).all() if shares else (known[0] & known[1]).all()
        for rank, of_rank in zip(ranks, known, strict=True):
            np.testing.assert_array_equal(np.sort(rank[sample])[of_rank], experts[of_rank])


def engine_of(path, changed):
    """A rollout as an engine with other routers made it: experts, and log-probs of the responses."""
    args, data = args_of(path, "fsdp", **changed), data_of(SEED)
    model = Routed(load_hf_model(path))
    model.experts = with_last(data, foreign_experts())
    return {"rollout_routed_experts": foreign_experts(), "rollout_log_probs": plain_log_probs(args, model, data)}


def test_an_engine_that_chose_other_experts_gave_the_trainers_log_probs():
    path, name = tiny_model("qwen3_moe", layers=LAYERS), "train/train_rollout_logprob_abs_diff"
    engine = run_ranks(1, engine_of, path, {}, distributed=False)[0]
    found = {}
    for replays in (True, False):
        flags = {"dp_size": 1, "use_rollout_routing_replay": replays, "global_batch_size": 8}
        found[replays] = run_ranks(1, trained, path, "megatron", flags, SEED, engine)[0][0][name]
    assert found[True] < 1e-6 and found[False] > 1e-3, found


@pytest.mark.parametrize("layout", [{}, FULL | {"bf16": True, "params_dtype": "bfloat16"}], ids=["float32", "bfloat16"])
def test_replay_of_its_own_choice_changes_no_bit(layout):
    path = tiny_model("qwen3_moe", layers=LAYERS)
    flags = {"dp_size": 1, "global_batch_size": 8, **layout}
    plain, replayed = (
        run_ranks(1, trained, path, "megatron", flags | {"use_routing_replay": replays}, SEED)[0]
        for replays in (False, True)
    )
    numbers = [name for name in plain[0] if name.startswith("train/")]
    assert len(numbers) > 5 and {n: plain[0][n] for n in numbers} == {n: replayed[0][n] for n in numbers}
    assert all(torch.equal(tensor, replayed[1][name]) for name, tensor in plain[1].items())


def refusals(path, cases):
    """What each case's experts are refused with."""
    from miles.backends.megatron_utils.errors import UnsupportedSetting
    from miles.backends.megatron_utils.families import Experts
    from miles.backends.megatron_utils.routing_replay import RoutingReplay
    from miles.backends.training_utils.routing import BadRoutedExperts

    found, args = {}, args_of(path, "megatron", dp_size=1, use_rollout_routing_replay=True)
    backend = backend_of("megatron", args)
    backend.init()
    trainer = RolloutTrainer(args, backend, Timers(backend.device))
    for name, experts in cases.items():
        part = split_train_data(args, data_of(SEED) | ({"rollout_routed_experts": experts} if experts else {}))[0]
        try:
            trainer.train(0, functools.partial(dict, part))
        except BadRoutedExperts as error:
            found[name] = error.evidence
    try:
        RoutingReplay(torch.nn.Linear(2, 2), Experts(4, 2, 8, True, (0,)), None, layers=range(2), again=False)
    except UnsupportedSetting as error:
        found["no routers"] = error.evidence
    return found


def test_experts_that_do_not_fit_are_refused():
    good = foreign_experts()
    cases = {"none": None}
    for name, row in {"twice": [1, 1], "half": [-1, 2], "too high": [1, 4], "below": [-2, 1]}.items():
        changed = [part.copy() for part in good]
        changed[0][0, 0] = row
        cases[name] = changed
    cases["one layer"] = [part[:, :1] for part in good]
    cases["three each"] = [np.concatenate([p, p[..., :1]], -1) for p in good]
    found = run_ranks(1, refusals, tiny_model("qwen3_moe", layers=LAYERS), cases)[0]
    shown = {"twice": "[1, 1]", "half": "[-1, 2]", "too high": "[1, 4]", "below": "[-2, 1]"}
    for name, words in shown.items():
        assert words in found[name]
    assert "--use-rollout-routing-replay" in found["none"] and "1, 2)" in found["one layer"]
    assert "three each" in found and "in layers []" in found["no routers"]
