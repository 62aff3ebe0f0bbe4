"""What flags of this backend do inside the model: which attention runs, in which dtypes, and what is whole when."""

from __future__ import annotations

import pytest
import torch
from support.ranks import run_ranks
from support.rollout_steps import train, trainer_of
from support.tiny_models import tiny_model
from torch.overrides import TorchFunctionMode

pytestmark = pytest.mark.full
LAYERS = 3


class CountAttention(TorchFunctionMode):
    """Calls of torch's attention."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.calls += function is torch.nn.functional.scaled_dot_product_attention
        return function(*args, **(kwargs or {}))


def whole_layers(model):
    """How many layers have their parameters whole at this moment."""
    from torch.distributed.tensor import DTensor

    return sum(not isinstance(layer.mlp.up_proj.weight, DTensor) for layer in model.model.layers)


def look_at_gradients(optimizer, seen):
    for gradient in (p.grad for group in optimizer.param_groups for p in group["params"]):
        seen["gradients"].add(str(gradient.dtype))
        # What was added up in bfloat16 has its few bits, whatever holds it.
        seen["summed in float32"] |= not torch.equal(gradient.bfloat16().to(gradient.dtype), gradient)


def observed(path, flags):
    """Of one rollout with one training step."""
    trainer = trainer_of("fsdp", path, **flags)
    (model,), optimizer = trainer.backend.objects().model, trainer.backend.objects().optimizer
    seen = {"whole": set(), "layers": set(), "gradients": set(), "summed in float32": False}

    def note(_module, _inputs, output):
        seen["whole"].add(whole_layers(model))
        seen["layers"].add(str(output.dtype))

    for layer in model.model.layers:
        layer.mlp.register_forward_hook(note)
    optimizer.register_step_pre_hook(lambda *_: look_at_gradients(optimizer, seen))
    with CountAttention() as counted:
        train(trainer)
    state = {str(value.dtype) for one in optimizer.state.values() for value in one.values() if value.dim()}
    shards = sum(p.to_local().numel() for p in model.parameters()) / sum(p.numel() for p in model.parameters())
    found = {
        **seen,
        "attention": counted.calls,
        "masters": {str(p.dtype) for p in model.parameters()},
        "state": state,
        "handed on": {str(tensor.dtype) for _, tensor in trainer.backend.hf_weights()},
        "whole after": whole_layers(model),
        "shards": shards,
    }
    trainer.backend.close()
    return found


@pytest.mark.parametrize(("name", "runs"), [("sdpa", True), ("eager", False)])
def test_the_attention_that_is_named_runs(name, runs):
    (found,) = run_ranks(1, observed, tiny_model("qwen3", layers=LAYERS), {"attn_implementation": name})
    assert (found["attention"] > 0) == runs


FLOAT, HALF = "torch.float32", "torch.bfloat16"
DTYPES = {
    "float32, activations computed again": ({"gradient_checkpointing": True}, [FLOAT] * 5),
    "bfloat16 over float32 masters": ({"params_dtype": "bfloat16"}, [HALF, FLOAT, FLOAT, FLOAT, HALF]),
    "bfloat16 alone": ({"params_dtype": "bfloat16", "keep_fp32_master": False}, [HALF] * 5),
}
"""Of computing, gradients, masters, the optimizer's state, and what engines get."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] * (name == "bfloat16 alone")) for name in DTYPES]
)
def test_dtypes_are_those_of_the_flags_and_one_layer_is_whole_at_a_time(name):
    flags, expected = DTYPES[name]
    path = tiny_model("qwen3", layers=LAYERS, dtype=getattr(torch, flags.get("params_dtype", "float32")))
    for found in run_ranks(2, observed, path, {**flags, "optimizer": "adam", "lr": 1e-3}):
        told = [found[what] for what in ("layers", "gradients", "masters", "state", "handed on")]
        assert told == [{one} for one in expected]
        assert found["summed in float32"] == (expected[1] == FLOAT)
        # The next one may be on its way while one computes.
        assert found["whole"] <= {1, 2}
        assert found["whole after"] == 0
        assert found["shards"] < 0.6
