"""Adapters of tiny models, written and trained without any of the code that is tested: weights ``W + s * B A``, where
gradients flow into A and B."""

import json

import torch
from safetensors.torch import load_file, save_file

from support.hf_reference import load_hf_model
from support.plain_losses import plain_log_probs, plain_loss
from support.trained_rollouts import args_of, backend_of, data_of

ATTENTION, DENSE = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
ALL = ATTENTION + DENSE
JOINED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
PREFIX = "base_model.model."


def lora_flags(**changed):
    given = {
        "lora_rank": 3, "lora_alpha": 5, "lora_dropout": 0.0, "lora_type": "lora", "target_modules": "all-linear",
        "exclude_modules": None, "lora_adapter_path": None,
    }  # fmt: skip
    return given | changed


def layers_of(model, targets):
    """Names of linear layers, with their weights' shapes."""
    weights = load_file(model / "model.safetensors")
    names = [name.removesuffix(".weight") for name in weights]
    return {name: tuple(weights[f"{name}.weight"].shape) for name in names if name.rpartition(".")[2] in targets}


def sharer(name, targets, kind):
    parent, _, last = name.rpartition(".")
    group = next((group for group in JOINED if last in group), (last,))
    return name if kind == "canonical_lora" else f"{parent}.{next(one for one in group if one in targets)}"


def write_adapter(path, model, *, targets=ALL, kind="lora", rank=3, alpha=5, seed=0):
    """Random numbers in A and B, as ``peft`` would save them."""
    generator = torch.Generator().manual_seed(seed)
    tensors, shared = {}, {}
    for name, (rows, columns) in layers_of(model, targets).items():
        one = sharer(name, targets, kind)
        if one not in shared:
            shared[one] = torch.randn(rank, columns, generator=generator) * columns**-0.5
        tensors[f"{PREFIX}{name}.lora_A.weight"] = shared[one].clone()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = torch.randn(rows, rank, generator=generator) * 0.2
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": list(targets), "bias": "none"}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def read_adapter(path):
    """``{layer: (A, B)}`` of a directory in ``peft``'s layout."""
    tensors = load_file(path / "adapter_model.safetensors")
    names = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
    pairs = {name: [tensors[f"{name}.lora_{half}.weight"] for half in "AB"] for name in names}
    assert len(tensors) == 2 * len(pairs)
    return {name.removeprefix(PREFIX): pair for name, pair in pairs.items()}


def merged(model, pairs, scaling):
    """All weights of the directory, with what adapters add."""
    weights = load_file(model / "model.safetensors")
    for name, (a, b) in pairs.items():
        weights[f"{name}.weight"] = (weights[f"{name}.weight"].double() + scaling * b.double() @ a.double()).float()
    return weights


class PlainLora:
    """A Hugging Face model whose layers have the adapters of a directory, of which layers of one input share A."""

    def __init__(self, model, adapter, *, targets=ALL, kind="lora", scaling=5 / 3):
        self.module, self.scaling = load_hf_model(model), scaling
        self.model = model
        pairs = read_adapter(adapter)
        self.sharers = {name: sharer(name, targets, kind) for name in pairs}
        self.a = {name: pairs[name][0].clone().requires_grad_() for name in dict.fromkeys(self.sharers.values())}
        self.b = {name: pair[1].clone().requires_grad_() for name, pair in pairs.items()}

    @property
    def trained(self):
        return [*self.a.values(), *self.b.values()]

    def pairs(self):
        return {name: (self.a[self.sharers[name]], b) for name, b in self.b.items()}

    def logits(self, tokens):
        changes = {name: self.scaling * b @ a for name, (a, b) in self.pairs().items()}
        weights = {}
        for name, weight in self.module.named_parameters():
            weights[name] = weight.detach() + self._change(name, weight, changes)
        output = torch.func.functional_call(self.module, weights, (tokens[None],))
        return output.logits[0].float()

    def _change(self, name, weight, changes):
        """transformers joins the experts of a layer in memory."""
        layer = name.rpartition(".")[0]
        if ".experts." not in name:
            return changes.get(layer, 0.0) if name.endswith(".weight") else 0.0
        joined = ("gate_proj", "up_proj") if name.endswith("gate_up_proj") else ("down_proj",)
        zero = torch.zeros(weight.shape[1] // len(joined), weight.shape[2])
        experts = range(weight.shape[0])
        return torch.stack([torch.cat([changes.get(f"{layer}.{i}.{one}", zero) for one in joined]) for i in experts])


def plain_lora(path, adapter, changed, seed, targets=ALL, kind="lora"):
    """The rollout of ``trained_rollouts.plain``, where adapters alone learn and the reference has none."""
    args, data = args_of(path, "fsdp", **changed), data_of(seed)
    model, below = PlainLora(path, adapter, targets=targets, kind=kind), load_hf_model(path)
    with torch.no_grad():
        data["log_probs"] = plain_log_probs(args, model.logits, data)
        data["ref_log_probs"] = plain_log_probs(args, lambda tokens: below(tokens[None]).logits[0].float(), data)
    return lora_steps(args, model, data)


def lora_steps(args, model, data):
    """Two steps of gradient descent on a ``PlainLora``: mean metrics, merged weights, and the adapter's pairs."""
    steps = []
    for first in (0, 4):
        for parameter in model.trained:
            parameter.grad = None
        metrics = plain_loss(args, model.logits, data, range(first, first + 4))
        metrics["loss"].backward()
        norm = sum(float(p.grad.square().sum()) for p in model.trained) ** 0.5
        steps.append({name: float(torch.as_tensor(value).detach()) for name, value in metrics.items()})
        steps[-1]["grad_norm"] = norm
        with torch.no_grad():
            for parameter in model.trained:
                parameter.sub_(args.lr * parameter.grad)
    means = {f"train/{name}": (steps[0][name] + steps[1][name]) / 2 for name in steps[0]}
    pairs = {name: [half.detach() for half in pair] for name, pair in model.pairs().items()}
    return means, merged(model.model, pairs, model.scaling), pairs


def frozen_of(kind, backend):
    """Copies of all numbers of this rank that are not an adapter's."""
    model = backend.model.module if kind == "megatron" else backend._model
    local = (lambda p: p) if kind == "megatron" else (lambda p: p.to_local())
    named = model.named_parameters()
    return {name: local(p.detach()).clone() for name, p in named if ".adapter." not in name}


def started(path, kind, changed):
    backend = backend_of(kind, args_of(path, kind, **changed))
    backend.init()
    return backend
