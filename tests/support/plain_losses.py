"""Policy losses and supervised fine-tuning written from their formulas: one process, one sample at a time, nothing
shared with what is tested but the model."""

from __future__ import annotations

import math
import random
from types import SimpleNamespace

import torch

from support.tiny_backend import tiny_logits

VOCAB = 12
HIDDEN = 6


def flags(**changed):
    given = {
        "dp_size": 1,
        "tp_size": 1,
        "global_batch_size": 4,
        "use_dynamic_batch_size": True,
        "max_tokens_per_gpu": 30,
        "log_probs_max_tokens_per_gpu": None,
        "micro_batch_size": 1,
        "balance_data": False,
        "loss_type": "policy_loss",
        "advantage_estimator": "grpo",
        "eps_clip": 0.2,
        "eps_clip_high": 0.3,
        "eps_clip_c": None,
        "use_kl_loss": True,
        "kl_loss_coef": 0.1,
        "kl_loss_type": "low_var_kl",
        "kl_coef": 0.0,
        "gamma": 1.0,
        "lambd": 1.0,
        "use_opsm": False,
        "opsm_delta": 0.1,
        "use_opd": False,
        "opd_kl_coef": 1.0,
        "use_tis": False,
        "tis_clip": 1.3,
        "tis_clip_low": 0.6,
        "normalize_advantages": False,
        "use_rollout_logprobs": False,
        "entropy_coef": 0.05,
        "calculate_per_token_loss": False,
        "rollout_temperature": 0.8,
        "device": "cpu",
        "lr": 0.01,
        "seed": 3,
        "tiny_vocab": VOCAB,
        "tiny_hidden": HIDDEN,
    }
    return SimpleNamespace(**given | changed)


def random_train_data(seed, count=8, *, siblings=False, vocab=VOCAB):
    """Awkward on purpose: empty responses, masks with holes and without any token, ratios far from 1."""
    rng = random.Random(seed)
    data = {name: [] for name in ("tokens", "response_lengths", "loss_masks", "rewards")}
    columns = {name: [] for name in ("log_probs", "ref_log_probs", "rollout_log_probs")}
    for i in range(count):
        prompt, response = rng.randint(1, 5), rng.choice([0, 1, 2, 5, 9, 14])
        data["tokens"].append([rng.randrange(vocab) for _ in range(prompt + response)])
        data["response_lengths"].append(response)
        kept = rng.choice([0.0, 0.5, 1.0, 1.0])
        data["loss_masks"].append([int(rng.random() < kept) for _ in range(response)])
        data["rewards"].append(rng.choice([-1.0, -0.5, 0.0, 1.0]) + 0.01 * i)
        for column in columns.values():
            column.append([-2.5 + rng.gauss(0, 0.6) for _ in range(response)])
    ids = [i // 2 for i in range(count)] if siblings else list(range(count))
    return data | columns | {"rollout_ids": ids}


def plain_loss(args, model, data, places):
    """Loss of one step over the samples at ``places``, with gradient; and a few metrics.

    ``model``: logits [T, V] of the tokens [T] of one sample.
    """
    ids = [data["rollout_ids"][i] for i in places]
    total = {r: sum(sum(data["loss_masks"][i]) for i in places if data["rollout_ids"][i] == r) for r in ids}
    num_tokens = sum(max(sum(data["loss_masks"][i]), 1) for i in places)
    names = ("loss", "pg_loss", "entropy_loss", "kl_loss", "pg_clipfrac", "ppo_kl") + ("opsm_clipfrac",) * args.use_opsm
    sums = dict.fromkeys(names, 0.0)
    for i in places:
        divisor = num_tokens if args.calculate_per_token_loss else max(total[data["rollout_ids"][i]], 1) * len(set(ids))
        for t, values in enumerate(_tokens(args, model, data, i)):
            if data["loss_masks"][i][t]:
                for name, value in values.items():
                    sums[name] = sums[name] + value / divisor
    return sums


def tiny_model_of(parameters):
    """The backend's of these tests, whole."""
    return lambda tokens: tiny_logits(parameters, tokens, torch.arange(len(tokens)))


def plain_log_probs(args, model, data):
    """Of all samples' response tokens."""
    found = []
    for tokens, response in zip(map(torch.tensor, data["tokens"]), data["response_lengths"], strict=True):
        with torch.no_grad():
            p = torch.log_softmax(model(tokens).float() / args.rollout_temperature, -1)
        start = len(tokens) - response
        found.append([float(p[start + t - 1, tokens[start + t]]) for t in range(response)])
    return found


def _tokens(args, model, data, i):
    tokens, response = torch.tensor(data["tokens"][i]), data["response_lengths"][i]
    logits = model(tokens)
    p = torch.log_softmax(logits / args.rollout_temperature, -1)
    start = len(tokens) - response
    log_probs = [p[start + t - 1, tokens[start + t]] for t in range(response)]
    olds = data["rollout_log_probs" if args.use_rollout_logprobs else "log_probs"][i]
    mean = _mean_log_ratio(log_probs, olds, data["loss_masks"][i])
    for t in range(response):
        row, log_prob = p[start + t - 1], log_probs[t]
        entropy = -(row.exp() * row).sum()
        if args.loss_type == "sft_loss":
            yield {"loss": -log_prob}
            continue
        old, ref = olds[t], data["ref_log_probs"][i][t]
        ratio = torch.exp(-mean) if args.advantage_estimator == "gspo" else torch.exp(log_prob - old)
        advantage = data["advantages"][i][t] if "advantages" in data else data["rewards"][i]
        clipped = ratio.clamp(1 - args.eps_clip, 1 + args.eps_clip_high)
        pg = torch.maximum(-ratio * advantage, -clipped * advantage)
        clip = float(-clipped * advantage > -ratio * advantage)
        if args.eps_clip_c is not None and advantage < 0:
            pg = torch.minimum(pg, torch.tensor(-args.eps_clip_c * advantage))
        masked = args.use_opsm and advantage < 0 and float(mean.detach()) > args.opsm_delta
        pg = pg * 0.0 if masked else pg
        if args.use_tis:
            weight = math.exp(data["log_probs"][i][t] - data["rollout_log_probs"][i][t])
            pg = pg * min(max(weight, args.tis_clip_low), args.tis_clip)
        kl = _kl(args.kl_loss_type, log_prob - ref)
        loss = pg - args.entropy_coef * entropy + (args.kl_loss_coef * kl if args.use_kl_loss else 0.0)
        yield {
            "loss": loss,
            "pg_loss": pg,
            "entropy_loss": entropy,
            "kl_loss": kl,
            "pg_clipfrac": clip,
            "ppo_kl": mean if args.advantage_estimator == "gspo" else old - log_prob,
        } | ({"opsm_clipfrac": float(masked)} if args.use_opsm else {})


def _mean_log_ratio(log_probs, olds, mask):
    """Of old over new, over the trained tokens of a response."""
    kept = [old - new for new, old, m in zip(log_probs, olds, mask, strict=True) if m]
    return sum(kept) / max(len(kept), 1) if kept else torch.zeros(())


def _kl(kind, d):
    if kind == "k1":
        return d
    if kind == "k2":
        return d * d / 2
    k3 = torch.exp(-d) - 1 + d
    return k3 if kind == "k3" else k3.clamp(-10, 10)


def assert_close(found, wanted, what):
    """Metrics, to 1e-5."""
    for name, value in wanted.items():
        assert math.isclose(float(found[name]), float(torch.as_tensor(value).detach()), rel_tol=1e-5, abs_tol=1e-5), (
            what,
            name,
            found,
            wanted,
        )
