"""PPO with a critic over a few rollouts: through the Megatron backend, and by a plain implementation on Hugging Face
models with a value head, one sample at a time."""

import torch

from miles.backends.megatron_utils.backend import MegatronBackend
from miles.backends.megatron_utils.value_head import NAME
from miles.backends.training_utils.critic import Critic, critic_args
from miles.backends.training_utils.rollout_trainer import RolloutTrainer
from miles.backends.training_utils.timers import Timers
from miles.utils.train_data import split_train_data
from support.hf_reference import load_hf_model
from support.plain_losses import plain_log_probs, plain_loss
from support.trained_rollouts import args_of, data_of

PPO = {
    "advantage_estimator": "ppo",
    "gamma": 0.95,
    "lambd": 0.9,
    "value_clip": 0.01,
    "use_kl_loss": False,
    "critic_lr": 0.05,
    "critic_load": None,
    "critic_save": None,
    "critic_lr_warmup_iters": 0,
}
NAMES = ("value_loss", "value_clipfrac")


def trained_ppo(path, changed, seeds):
    """Metrics of each rollout, the actor's weights, and the value head where it is."""
    args = args_of(path, "megatron", **PPO | changed)
    backend = MegatronBackend(args)
    assert backend.init() == 0
    own = critic_args(args)
    critic = MegatronBackend(own, role="critic", parallel=backend.parallel)
    assert critic.init() == 0
    trainer = RolloutTrainer(args, backend, Timers(backend.device), Critic(own, critic))
    metrics = []
    for number, seed in enumerate(seeds):
        part = split_train_data(args, data_of(seed))[backend.parallel.dp_rank]
        metrics.append(trainer.train(number, lambda part=part: part))
    head = dict(critic.model.module.named_parameters()).get(NAME)
    weights = {name: tensor.clone() for name, tensor in backend.hf_weights()}
    return metrics, weights, None if head is None else head.detach().clone()


def plain_ppo(path, changed, seeds):
    """The same numbers."""
    args = args_of(path, "megatron", **PPO | changed)
    actor, critic = load_hf_model(path), load_hf_model(path)
    head = torch.zeros(actor.config.hidden_size, requires_grad=True)
    return_metrics = []
    for seed in seeds:
        data = data_of(seed)
        data["log_probs"] = plain_log_probs(args, lambda t: actor(t[None]).logits[0].float(), data)
        data["ref_log_probs"] = data["log_probs"]
        with torch.no_grad():
            data["values"] = [values.tolist() for values in _values(critic, head, data)]
        data["advantages"], data["returns"] = _gae(args, data)
        critic_steps = [_critic_step(args, critic, head, data, range(n, n + 4)) for n in (0, 4)]
        actor_steps = [_actor_step(args, actor, data, range(n, n + 4)) for n in (0, 4)]
        found = {f"train/critic-{name}": _mean(critic_steps, name) for name in (*NAMES, "grad_norm")}
        found |= {f"train/{name}": _mean(actor_steps, name) for name in ("loss", "pg_loss", "pg_clipfrac", "grad_norm")}
        return_metrics.append(found)
    return return_metrics, {n: p.detach() for n, p in actor.named_parameters()}, head.detach()[None]


def _mean(steps, name):
    return sum(float(step[name]) for step in steps) / len(steps)


def _values(critic, head, data):
    """``[R_i]`` of each sample: of the state before each response token."""
    for tokens, response in zip(data["tokens"], data["response_lengths"], strict=True):
        hidden = critic.model(torch.tensor([tokens])).last_hidden_state[0]
        yield (hidden @ head)[len(tokens) - response - 1 : len(tokens) - 1]


def _gae(args, data):
    advantages, returns = [], []
    for values, mask, reward in zip(data["values"], data["loss_masks"], data["rewards"], strict=True):
        trained = [t for t, m in enumerate(mask) if m]
        a, r, later, running = [0.0] * len(mask), [0.0] * len(mask), 0.0, 0.0
        for t in reversed(trained):
            delta = (reward if t == trained[-1] else 0.0) + args.gamma * later - values[t]
            running = delta + args.gamma * args.lambd * running
            a[t], r[t], later = running, running + values[t], values[t]
        advantages.append(a)
        returns.append(r)
    return advantages, returns


def _critic_step(args, critic, head, data, places):
    critic.zero_grad()
    head.grad = None
    metrics = dict.fromkeys(NAMES, 0.0)
    found = list(_values(critic, head, data))
    for i in places:
        total = max(sum(data["loss_masks"][i]), 1)
        for t, mask in enumerate(data["loss_masks"][i]):
            if mask:
                value, old, target = found[i][t], data["values"][i][t], data["returns"][i][t]
                held = old + (value - old).clamp(-args.value_clip, args.value_clip)
                loss = torch.maximum((held - target) ** 2, (value - target) ** 2)
                metrics["value_loss"] = metrics["value_loss"] + loss / total / len(places)
                moved = float(abs(value.detach() - old) > args.value_clip)
                metrics["value_clipfrac"] += moved / total / len(places)
    metrics["value_loss"].backward()
    parameters = [p for p in [*critic.parameters(), head] if p.grad is not None]
    metrics["grad_norm"] = sum(float(p.grad.square().sum()) for p in parameters) ** 0.5
    metrics["value_loss"] = metrics["value_loss"].detach()
    with torch.no_grad():
        for parameter in parameters:
            parameter.sub_(args.critic_lr * parameter.grad)
    return metrics


def _actor_step(args, actor, data, places):
    actor.zero_grad()
    metrics = plain_loss(args, lambda t: actor(t[None]).logits[0].float(), data, places)
    metrics["loss"].backward()
    metrics = {name: float(torch.as_tensor(value).detach()) for name, value in metrics.items()}
    metrics["grad_norm"] = sum(float(p.grad.square().sum()) for p in actor.parameters()) ** 0.5
    with torch.no_grad():
        for parameter in actor.parameters():
            parameter.sub_(args.lr * parameter.grad)
    return metrics
