"""Layers for further tokens: trained beside the policy, as a plain implementation on Qwen2's layers does it."""

import functools

import pytest
import torch
from safetensors.torch import load_file
from support.plain_losses import assert_close, plain_log_probs
from support.ranks import run_ranks
from support.tiny_models import tiny_model
from support.trained_rollouts import args_of, backend_of, data_of, plain_steps, trained

from miles.backends.megatron_utils.errors import UnsupportedParallelism

pytestmark = pytest.mark.full

SEED, FACTOR = 7, 0.7
ON = {"enable_mtp_training": True, "mtp_loss_scaling_factor": FACTOR}
SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
LAYOUTS = {
    "one rank": {},
    "rows padded": {"qkv_format": "bshd", "use_dynamic_batch_size": False, "micro_batch_size": 2},
    "per token, computed twice": {"calculate_per_token_loss": True, "recompute_loss_function": True},
    "layers computed again": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
    "TP 2": {"tensor_model_parallel_size": 2},
    "SP 2, DP 2": {**SP, "dp_size": 2, "overlap_grad_reduce": True, "ddp_bucket_size": 2000},
    "CP 2": {"context_parallel_size": 2},
    "SP 2, CP 2": {**SP, "context_parallel_size": 2},
}
QUICK = {
    ("rows padded", 1),
    ("per token, computed twice", 1),
    ("layers computed again", 1),
    ("SP 2, DP 2", 2),
    ("CP 2", 2),
    ("TP 2", 1),
}
"""The other combinations are in the long tier."""


class Plain(torch.nn.Module):
    """A Qwen2 of transformers, and for each further layer one decoder layer of the same."""

    def __init__(self, path, args):
        from transformers import Qwen2Config, Qwen2ForCausalLM
        from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2RMSNorm

        super().__init__()
        config = Qwen2Config(**{k: v for k, v in args.hf_config.items() if k not in ("model_type", "architectures")})
        config._attn_implementation = "eager"
        self.qwen = Qwen2ForCausalLM(config).eval()
        count, hidden = args.hf_config["num_nextn_predict_layers"], config.hidden_size
        self.layers = torch.nn.ModuleList(Qwen2DecoderLayer(config, 0) for _ in range(count))
        for layer in self.layers:
            for name in ("token_layernorm", "hidden_layernorm", "final_layernorm"):
                setattr(layer, name, Qwen2RMSNorm(hidden, eps=config.rms_norm_eps))
            layer.input_proj = torch.nn.Linear(2 * hidden, hidden, bias=False)
        self.eval()
        weights = load_file(path / "model.safetensors")
        own = {name: value for name, value in weights.items() if "mtp_layers" not in name}
        self.qwen.load_state_dict(own, strict=not config.tie_word_embeddings)
        prefix = "model.mtp_layers."
        self.layers.load_state_dict({n.removeprefix(prefix): v for n, v in weights.items() if n.startswith(prefix)})

    def forward(self, tokens):
        return self.qwen(tokens[None]).logits[0].float()

    def further(self, tokens):
        """``[T - 1 - k, V]`` log-probs of each layer k from 1 on: row i is of token i + k + 1."""
        with torch.no_grad():
            hidden = self.qwen.model(tokens[None]).last_hidden_state
            embedded = self.qwen.model.embed_tokens(torch.cat([tokens, torch.zeros_like(tokens)]))
        places = torch.arange(len(tokens))[None]
        mask = torch.full((len(tokens), len(tokens)), float("-inf")).triu(1)[None, None]
        rope = self.qwen.model.rotary_emb(hidden, places)
        for k, layer in enumerate(self.layers, 1):
            inputs = (layer.hidden_layernorm(hidden), layer.token_layernorm(embedded[k : k + len(tokens)][None]))
            hidden = layer(layer.input_proj(torch.cat(inputs, -1)), attention_mask=mask, position_embeddings=rope)
            hidden = layer.final_layernorm(hidden)
            yield torch.nn.functional.linear(hidden[0], self.qwen.lm_head.weight.detach()).log_softmax(-1)

    def weights(self):
        found = {name: value.detach() for name, value in self.qwen.named_parameters()}
        return found | {f"model.mtp_layers.{name}": value.detach() for name, value in self.layers.named_parameters()}


def further_loss(args, model, data, places):
    """Mean over layers of -log p of the trained tokens, reduced as the policy's loss is."""
    total, ids = torch.zeros(()), {data["rollout_ids"][i] for i in places}
    num_tokens = sum(max(sum(data["loss_masks"][i]), 1) for i in places)
    for i in places:
        tokens, mask = torch.tensor(data["tokens"][i]), data["loss_masks"][i]
        divisor = num_tokens if args.calculate_per_token_loss else max(sum(mask), 1) * len(ids)
        start = len(tokens) - len(mask)
        for k, log_probs in enumerate(model.further(tokens), 1):
            for t, trained_ in enumerate(mask):
                if trained_ and start + t - 1 - k >= 0:
                    total = total - log_probs[start + t - 1 - k, tokens[start + t]] / divisor / len(model.layers)
    return FACTOR, "mtp_loss", total


def plain(path, changed):
    args, data = args_of(path, "fsdp", **changed), data_of(SEED)
    model = Plain(path, args)
    own = plain_log_probs(args, model, data)
    data |= {"log_probs": own, "ref_log_probs": own}
    means, _ = plain_steps(args, model, model, data, functools.partial(further_loss, args, model, data))
    return means, model.weights()


@functools.cache
def expected(layers, per_token):
    path = tiny_model("mimo", tied=layers == 1, mtp_layers=layers)
    flags = {**ON, "mtp_num_layers": layers, "calculate_per_token_loss": per_token}
    return path, flags, *run_ranks(1, plain, path, flags, distributed=False)[0]


def size_of(layout):
    names = ("dp_size", "tensor_model_parallel_size", "context_parallel_size")
    return layout.get(names[0], 1) * layout.get(names[1], 1) * layout.get(names[2], 1)


@pytest.mark.parametrize(
    ("name", "layers"),
    [pytest.param(n, k, marks=[pytest.mark.long] * ((n, k) not in QUICK)) for n in LAYOUTS for k in (1, 2)],
)
def test_a_rollout_gives_the_numbers_of_the_formula(name, layers):
    per_token = LAYOUTS[name].get("calculate_per_token_loss", False)
    path, flags, means, weights = expected(layers, per_token)
    layout = {"dp_size": 1, **flags, **LAYOUTS[name]}
    for metrics, found in run_ranks(size_of(layout), trained, path, "megatron", layout, SEED):
        assert_close(metrics, means, name)
        assert set(found) == set(weights)
        for key, tensor in found.items():
            torch.testing.assert_close(tensor, weights[key], rtol=2e-5, atol=2e-5, msg=key)


def test_the_model_learns_the_same_with_and_without_them():
    path = tiny_model("mimo", tied=True)
    layout = {"dp_size": 1, "mtp_num_layers": 1}
    cases = [{**ON, "mtp_loss_scaling_factor": 5.0}, {**ON, "mtp_loss_scaling_factor": 0.0}, {}, {"mtp_num_layers": 0}]
    found = [run_ranks(1, trained, path, "megatron", layout | case, SEED)[0] for case in cases]
    original = load_file(path / "model.safetensors")
    for (metrics, weights), case in zip(found, cases, strict=True):
        own = [name for name in weights if "mtp" in name]
        assert bool(own) == (case.get("mtp_num_layers") != 0)
        moved = [name for name in own if not torch.equal(weights[name], original[name])]
        assert len(moved) == (len(own) if case.get("mtp_loss_scaling_factor") == 5.0 else 0)
        assert ("train/mtp_loss" in metrics) == ("enable_mtp_training" in case)
        assert metrics["train/loss"] == found[0][0]["train/loss"]
        for name in weights.keys() - set(own):
            assert torch.equal(weights[name], found[0][1][name]), name


def resumed(path, save):
    """Weights that were saved, and those that another layout loads; what pipeline stages are refused with."""
    from support.megatron_cases import make_backend, weights_of

    from miles.backends.training_utils.checkpoints import commit_checkpoint

    flags = {"dp_size": 1, "mtp_num_layers": 1, **ON}
    first = make_backend(path, **flags, **SP)
    with torch.no_grad():
        for parameter in first.model.module.mtp.parameters():
            parameter.add_(0.25)
    before = weights_of(first)
    commit_checkpoint(save, 0, lambda directory: first.save(directory, rollout_id=0), first.device)
    first.close()
    second = make_backend(path, load=str(save), **flags, context_parallel_size=2)
    after = weights_of(second)
    second.close()
    try:
        make_backend(path, **flags, pipeline_model_parallel_size=2)
    except UnsupportedParallelism as error:
        return before, after, error.evidence
    return before, after, ""


def test_checkpoints_hold_them_and_stages_are_refused(tmp_path):
    path = tiny_model("mimo")
    original = load_file(path / "model.safetensors")
    for before, after, refused in run_ranks(2, resumed, path, tmp_path / "save"):
        assert "--pipeline-model-parallel-size 2" in refused
        assert any("mtp_layers.0.input_proj" in name for name in before)
        for name, value in before.items():
            torch.testing.assert_close(after[name], value, rtol=0, atol=0, msg=name)
            torch.testing.assert_close(value, original[name] + 0.25 * ("mtp_layers" in name), rtol=0, atol=1e-6)


ADAM = {"optimizer": "adam", "lr": 1e-2, "adam_eps": 1e-4}


def rollout(path, flags, number, seed, save=None):
    """Train one; what there is to train on is that of its number. Where it began, and weights before and after."""
    from miles.backends.training_utils.checkpoints import commit_checkpoint
    from miles.backends.training_utils.rollout_trainer import RolloutTrainer
    from miles.backends.training_utils.timers import Timers
    from miles.utils.train_data import split_train_data

    args = args_of(path, "megatron", **{"dp_size": 1, **ADAM, **flags})
    backend = backend_of("megatron", args)
    start = backend.init()
    before = {name: tensor.clone() for name, tensor in backend.hf_weights()}
    part = split_train_data(args, data_of(seed))[0]
    RolloutTrainer(args, backend, Timers(backend.device)).train(number, lambda: part)
    if save is not None:
        commit_checkpoint(save, number, lambda to: backend.save(to, rollout_id=number), backend.device)
    after = {name: tensor.clone() for name, tensor in backend.hf_weights()}
    backend.close()
    return start, before, after


def goes_on(path, save):
    """A run with these layers, and what goes on from its checkpoint with them and without."""
    mtp = {**ON, "mtp_num_layers": 1}
    _, _, saved = rollout(path, mtp, 0, 3, save)
    return saved, *(rollout(path, {**flags, "load": str(save)}, 1, 4) for flags in (mtp, {}))


def test_a_run_goes_on_without_them(tmp_path):
    saved, through, without = run_ranks(1, goes_on, tiny_model("mimo"), tmp_path / "save")[0]
    assert (through[0], without[0]) == (1, 1)
    assert set(without[1]) == {name for name in saved if "mtp" not in name} != set(saved)
    for name, tensor in without[1].items():
        assert torch.equal(tensor, saved[name]), name
        # The optimizer's state was taken over, too.
        assert torch.equal(without[2][name], through[2][name]), name
        assert not torch.equal(without[2][name], tensor), name
