"""A rollout of two GRPO steps, trained through a real backend and by a plain implementation on Hugging Face models."""

from argparse import Namespace

import torch

from miles.backends.training_utils.rollout_trainer import RolloutTrainer
from miles.backends.training_utils.timers import Timers
from miles.utils.train_data import split_train_data
from support import backend_cases, megatron_cases
from support.hf_reference import hf_parameters, load_hf_model
from support.plain_losses import flags, plain_log_probs, plain_loss, random_train_data

GRADIENT_DESCENT = {"optimizer": "sgd", "sgd_momentum": 0.0, "lr": 0.1, "weight_decay": 0.0, "clip_grad": 0.0}


def args_of(path, kind, **changed):
    cases = megatron_cases if kind == "megatron" else backend_cases
    known = vars(cases.backend_args(path)) | {"hf_config": vars(megatron_cases.backend_args(path))["hf_config"]}
    known |= {"ref_load": str(path), "num_steps_per_rollout": 2}
    return Namespace(**known | vars(flags()) | GRADIENT_DESCENT | {"seed": 1234} | changed)


def backend_of(kind, args):
    if kind == "megatron":
        return megatron_cases.MegatronBackend(args)
    from miles.backends.fsdp_utils.backend import FSDPBackend

    return FSDPBackend(args)


def trained(path, kind, changed, seed, more=None):
    """``more``: further columns of the train data."""
    args = args_of(path, kind, **changed)
    backend = backend_of(kind, args)
    assert backend.init() == 0
    parts = split_train_data(args, data_of(seed) | (more or {}))
    trainer = RolloutTrainer(args, backend, Timers(backend.device))
    metrics = trainer.train(0, lambda: parts[backend.parallel.dp_rank])
    return metrics, {name: tensor.clone() for name, tensor in backend.hf_weights()}


def data_of(seed):
    """What the trainer computes itself is left out."""
    data = random_train_data(seed, vocab=300)
    return {name: values for name, values in data.items() if name not in ("log_probs", "ref_log_probs")}


def plain(path, changed, seed):
    args, data = args_of(path, "fsdp", **changed), data_of(seed)
    module = load_hf_model(path)

    def model(tokens):
        return module(tokens[None]).logits[0].float()

    own = plain_log_probs(args, model, data)
    return plain_steps(args, module, model, data | {"log_probs": own, "ref_log_probs": own})


def plain_steps(args, module, model, data, more=None):
    """Two steps of torch's own optimizer on ``module``, whose logits ``model`` computes of a sample's tokens. ``more``:
    of a step's samples a factor, the name of a metric, and what it is the value of, for a further part of the loss."""
    optimizer, steps = plain_optimizer(args, module), []
    for first in range(0, 8, args.global_batch_size):
        module.zero_grad()
        places = range(first, min(first + args.global_batch_size, 8))
        metrics = plain_loss(args, model, data, places)
        total = metrics["loss"]
        if more is not None:
            factor, name, value = more(places)
            metrics[name] = value
            total = total + factor * value
        total.backward()
        norm = sum(float(p.grad.square().sum()) for p in module.parameters()) ** 0.5
        steps.append({name: float(torch.as_tensor(value).detach()) for name, value in metrics.items()})
        steps[-1]["grad_norm"] = norm
        if args.clip_grad:
            torch.nn.utils.clip_grad_norm_(module.parameters(), args.clip_grad)
        optimizer.step()
    means = {f"train/{name}": (steps[0][name] + steps[1][name]) / 2 for name in steps[0]}
    return means, hf_parameters(module)


def plain_optimizer(args, module):
    """torch's own. As in Megatron, what has one dimension is not decayed."""
    parameters = list(module.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": args.weight_decay},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    if args.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=args.lr, momentum=args.sgd_momentum)
    return torch.optim.AdamW(groups, lr=args.lr, betas=(args.adam_beta1, args.adam_beta2), eps=args.adam_eps)
