"""Advantage estimators as pure functions: numbers of one sample's response in, advantages and returns out.

Nothing here talks to other ranks or knows flags. All tensors are float32 on the CPU, ``[R_i]`` for sample i, ``m`` is
its loss mask, ``kl`` what ``--kl-coef`` is multiplied by (zeros if there is none).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

_CHUNK = 128


def grpo_returns(rewards: Sequence[float], lengths: Sequence[int]) -> list[torch.Tensor]:
    """GRPO and GSPO: every token has its response's reward, which is relative to the prompt's others already.

    Shao et al. 2024, "DeepSeekMath", outcome supervision.
    """
    return [
        torch.full((length,), float(reward), dtype=torch.float32)
        for reward, length in zip(rewards, lengths, strict=True)
    ]


def reinforce_plus_plus_baseline_advantages(
    rewards: Sequence[float], kls: Sequence[torch.Tensor], *, kl_coef: float
) -> list[torch.Tensor]:
    """``A_t = r - kl_coef kl_t``: the reward relative to its prompt's mean, less the KL of the token.

    Hu et al. 2025, "REINFORCE++", the variant with a group mean as baseline.
    """
    return [float(reward) - kl_coef * kl for reward, kl in zip(rewards, kls, strict=True)]


def reinforce_plus_plus_returns(
    rewards: Sequence[float],
    kls: Sequence[torch.Tensor],
    masks: Sequence[torch.Tensor],
    *,
    kl_coef: float,
    gamma: float,
) -> list[torch.Tensor]:
    """``G_t = q_t + gamma G_{t+1}`` with ``q_t = -kl_coef kl_t``, and the reward added at the last trained token.

    Tokens that are not trained take part in the sum and in the discount, as all tokens of the response do. A response
    of which nothing is trained has no place for its reward: its returns are those of the KL alone, and no loss reads
    them. Hu et al. 2025, "REINFORCE++".
    """
    shaped = []
    for reward, kl, mask in zip(rewards, kls, masks, strict=True):
        q = -kl_coef * kl.double()
        trained = mask.nonzero().flatten()
        if len(trained):
            q[trained[-1]] += float(reward)
        shaped.append(q)
    return [values.float() for values in _discounted(shaped, gamma)]


def gae(
    rewards: Sequence[float],
    values: Sequence[torch.Tensor],
    kls: Sequence[torch.Tensor],
    masks: Sequence[torch.Tensor],
    *,
    kl_coef: float,
    gamma: float,
    lambd: float,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Generalised advantage estimation over the trained tokens of each response: advantages and returns.

    With the K trained tokens k = 1..K only: ``q_k = -kl_coef kl_k``, the reward added to ``q_K``,
    ``delta_k = q_k + gamma V_{k+1} - V_k`` with ``V_{K+1} = 0`` (after a truncated answer, too),
    ``A_k = sum_j (gamma lambd)^j delta_{k+j}``, and ``Ret_k = A_k + V_k``. Tokens that are not trained have 0 of both.

    Schulman et al. 2016, "High-dimensional continuous control using generalized advantage estimation".
    """
    places = [mask.nonzero().flatten() for mask in masks]
    deltas = []
    for reward, value, kl, at in zip(rewards, values, kls, places, strict=True):
        v = value.double()[at]
        q = -kl_coef * kl.double()[at]
        if len(at):
            q[-1] += float(reward)
        deltas.append(q + gamma * torch.cat([v[1:], v.new_zeros(min(len(at), 1))]) - v)
    advantages, returns = [], []
    for found, value, at in zip(_discounted(deltas, gamma * lambd), values, places, strict=True):
        advantage = torch.zeros_like(value, dtype=torch.float64)
        advantage[at] = found
        total = torch.zeros_like(advantage)
        total[at] = found + value.double()[at]
        advantages.append(advantage.float())
        returns.append(total.float())
    return advantages, returns


def distilled(
    advantages: Sequence[torch.Tensor], reverse_kls: Sequence[torch.Tensor], *, coef: float
) -> list[torch.Tensor]:
    """On-policy distillation: ``A_t - coef (log p_student - log p_teacher)``, whatever A is.

    Agarwal et al. 2024, "On-policy distillation of language models"; the reverse KL of the sampled token.
    """
    return [a - coef * kl for a, kl in zip(advantages, reverse_kls, strict=True)]


def _discounted(rows: Sequence[torch.Tensor], weight: float) -> list[torch.Tensor]:
    """``S_t = x_t + weight S_{t+1}`` of each row, float64. All rows together, as many steps as chunks of the longest.

    Within a chunk the recurrence is one matrix product: ``S = x M`` with ``M[j, t] = weight^(j - t)`` for j >= t.
    """
    longest = max((len(row) for row in rows), default=0)
    if not longest:
        return [row.double() for row in rows]
    chunks = -(-longest // _CHUNK)
    # Padding goes to the end: what is behind a row's last element is zero and adds nothing.
    padded = torch.zeros(len(rows), chunks * _CHUNK, dtype=torch.float64)
    for number, row in enumerate(rows):
        padded[number, : len(row)] = row
    steps = torch.arange(_CHUNK, dtype=torch.float64)
    distance = steps[:, None] - steps[None, :]
    within = torch.where(distance >= 0, weight ** distance.clamp(min=0), 0.0)
    carried = weight ** (_CHUNK - steps)
    after = torch.zeros(len(rows), 1, dtype=torch.float64)
    for chunk in reversed(range(chunks)):
        part = slice(chunk * _CHUNK, (chunk + 1) * _CHUNK)
        padded[:, part] = padded[:, part] @ within + after * carried
        after = padded[:, chunk * _CHUNK : chunk * _CHUNK + 1]
    return [padded[number, : len(row)].clone() for number, row in enumerate(rows)]
