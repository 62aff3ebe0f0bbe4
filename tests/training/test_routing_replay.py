"""Replay of routing: a rollout in each layout against a Hugging Face model whose routers are told which experts to take."""

import functools

import numpy as np
import pytest
import torch
from support.hf_reference import load_hf_model
from support.plain_losses import assert_close, plain_log_probs
from support.ranks import run_ranks
from support.tiny_models import tiny_model
from support.trained_rollouts import args_of, data_of, plain_steps, trained

pytestmark = pytest.mark.full

SEED, EXPERTS, K, LAYERS = 7, 4, 2, 2
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


class Routed:
    """A Hugging Face model as a function of a sample's tokens; ``experts``: ``[T, layers, k]`` by these tokens."""

    def __init__(self, module):
        self.module, self.experts, self.seen = module, None, []
        self.gates = [layer.mlp.gate for layer in module.model.layers if hasattr(layer.mlp, "gate")]
        self.numbers = [i for i, layer in enumerate(module.model.layers) if hasattr(layer.mlp, "gate")]
        for number, gate in zip(self.numbers, self.gates, strict=True):
            gate.register_forward_hook(lambda gate, args, output, n=number: self._route(n, output))

    def __call__(self, tokens):
        self.chosen = None if self.experts is None else self.experts[tuple(tokens.tolist())]
        self.now = np.full((len(tokens), LAYERS, K), -1)
        self.seen.append((tuple(tokens.tolist()), self.now))
        return self.module(tokens[None]).logits[0].float()

    def _route(self, number, output):
        logits, _, own = output
        known = own
        if self.chosen is not None:
            told = torch.as_tensor(self.chosen[:, number])
            known = torch.where(told[:, :1] < 0, own, told)
        self.now[:, number] = known.numpy()
        weights = logits.float().softmax(-1).gather(-1, known)
        return logits, weights / weights.sum(-1, keepdim=True), known

    def routes_of(self, data):
        """What it chooses by itself."""
        self.experts, self.seen = None, []
        with torch.no_grad():
            for tokens in data["tokens"]:
                self(torch.tensor(tokens))
        return dict(self.seen)


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


def with_last(data, experts):
    """Rows for the last tokens, which the model chooses itself."""
    rows = [np.concatenate([part, np.full((1, LAYERS, K), -1)]) for part in experts]
    return {tuple(tokens): part for tokens, part in zip(data["tokens"], rows, strict=True)}


def foreign_experts():
    """Of an engine that chose at random, and has not recorded everything."""
    rng = np.random.default_rng(5)
    found = []
    for tokens in data_of(SEED)["tokens"]:
        rows = rng.permuted(np.tile(np.arange(EXPERTS), (len(tokens) - 1, LAYERS, 1)), axis=-1)[..., :K]
        rows[rng.random(len(rows)) < 0.2] = -1
        found.append(rows.astype(np.int32))
    return found


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


@pytest.mark.parametrize(("dense", "name", "replayed"), cases())
def test_training_goes_through_the_experts_that_were_recorded(dense, name, replayed):
    path, flags, more, means, weights = expected(dense)[replayed]
    layout = {"dp_size": 1, **flags, **LAYOUTS[name]}
    for metrics, found in run_ranks(size_of(layout), trained, path, "megatron", layout, SEED, more):
        assert_close(metrics, means, name)
        assert set(found) == set(weights)
        for key, tensor in found.items():
            torch.testing.assert_close(tensor, weights[key], rtol=2e-5, atol=2e-5, msg=key)
