"""Log-probabilities, entropy and KL estimates, right under tensor parallelism. Needs torch only.

``LogProbs`` is one autograd function for both of what losses need of logits. It saves the logits that are there
already and one number per row, and computes the softmax again going backward, so that nothing of the size of the logits
is made but their gradient and one chunk. The logits are never changed.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

_CACHED_CHUNK, _SHARDED_CHUNK, _DEVICE_CHUNK = 1 << 19, 1 << 22, 1 << 27
MAX_LOG_RATIO = 20.0
KL_TYPES = ("k1", "k2", "k3", "low_var_kl")


def log_probs_and_entropy(
    logits: torch.Tensor,
    rows: torch.Tensor,
    targets: torch.Tensor,
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
    chunk_size: int = -1,
    with_entropy: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-probability of a target in some rows of the logits, and the entropy of these rows.

    Args:
        logits: ``[T, V / tp]``: this rank's shard of the vocabulary, shards in the order of ranks.
        rows: int64 ``[R]``: which rows; the same on all ranks of the group.
        targets: int64 ``[R]``: token of each row, counted in the whole vocabulary.
        temperature: What logits are divided by.
        vocab_size: Columns from here on are padding and have no probability.
        tp_group: Ranks that hold the other shards; None: there are none.
        chunk_size: Rows that are worked on at a time; -1: as many as suit the device.
        with_entropy: Compute it.

    Returns:
        float32 ``[R]`` log p(target), and float32 ``[R]`` H = -sum p log p (None unless asked for). Nats.
    """
    log_probs, entropy = LogProbs.apply(  # type: ignore[no-untyped-call]
        logits,
        rows,
        targets,
        _Shard(
            logits,
            tp_group,
            temperature=temperature,
            vocab_size=vocab_size,
            chunk_size=chunk_size,
            with_entropy=with_entropy,
        ),
    )
    return log_probs, entropy if with_entropy else None


class _Shard:
    """Which part of the vocabulary this rank has, and how to work on it."""

    def __init__(
        self,
        logits: torch.Tensor,
        group: dist.ProcessGroup | None,
        *,
        temperature: float,
        vocab_size: int | None,
        chunk_size: int,
        with_entropy: bool,
    ) -> None:
        self.group = group if group is not None and dist.get_world_size(group) > 1 else None
        rank = dist.get_rank(self.group) if self.group is not None else 0
        self.begin = rank * logits.shape[-1]
        self.width = logits.shape[-1]
        if vocab_size is not None:
            self.width = min(max(vocab_size - self.begin, 0), self.width)
        self.scale = 1.0 / temperature if temperature > 0 else 1.0
        self.chunk_size = chunk_size if chunk_size > 0 else max(self._suitable(logits.device) // logits.shape[-1], 1)
        self.with_entropy = with_entropy

    def scaled(self, logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """float32 ``[C, width]``: a copy that may be changed."""
        chosen = logits[:, : self.width].index_select(0, rows).float()
        return chosen.mul_(self.scale) if self.scale != 1.0 else chosen

    def place(self, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Column of each target here, and whether it is here at all."""
        local = targets - self.begin
        here = (local >= 0) & (local < self.width)
        return local.clamp(0, max(self.width - 1, 0)), here

    def reduce(self, values: torch.Tensor, op: Any) -> torch.Tensor:
        """Over all shards."""
        if self.group is not None:
            dist.all_reduce(values, op=op, group=self.group)
        return values

    def chunks(self, count: int) -> list[slice]:
        """Rows to work on at a time."""
        return [slice(start, min(start + self.chunk_size, count)) for start in range(0, count, self.chunk_size)]

    def _suitable(self, device: torch.device) -> int:
        """Numbers of a chunk. On a CPU it stays in the cache (a third of the time), unless ranks have to meet."""
        if device.type != "cpu":
            return _DEVICE_CHUNK
        return _CACHED_CHUNK if self.group is None else _SHARDED_CHUNK


class LogProbs(torch.autograd.Function):
    """See ``log_probs_and_entropy``. With p = softmax(z): d log p_t / dz_j = [j = t] - p_j, and
    dH / dz_j = -p_j (log p_j + H)."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, rows: torch.Tensor, targets: torch.Tensor, shard: _Shard) -> Any:
        """Returns log-probabilities and entropy (zeros if not asked for)."""
        log_probs = torch.zeros(rows.shape[0], dtype=torch.float32, device=logits.device)
        entropy, normaliser = torch.zeros_like(log_probs), torch.zeros_like(log_probs)
        for part in shard.chunks(rows.shape[0]):
            log_probs[part], entropy[part], normaliser[part] = _chunk_forward(logits, rows[part], targets[part], shard)
        ctx.save_for_backward(logits, rows, targets, normaliser, entropy)
        ctx.shard = shard
        ctx.set_materialize_grads(False)
        return log_probs, entropy

    @staticmethod
    def backward(ctx: Any, grad_log_probs: torch.Tensor | None, grad_entropy: torch.Tensor | None) -> Any:
        """Gradient of the logits: zero in rows that were not chosen."""
        logits, rows, targets, normaliser, entropy = ctx.saved_tensors
        shard: _Shard = ctx.shard
        gradient = torch.zeros_like(logits)
        view = gradient[:, : shard.width]
        for part in shard.chunks(rows.shape[0]):
            log_p = shard.scaled(logits, rows[part]).sub_(normaliser[part, None])
            p = log_p.exp()
            of_logits = torch.zeros_like(p)
            if grad_entropy is not None and shard.with_entropy:
                of_logits -= (log_p.add_(entropy[part, None])).mul_(p).mul_(grad_entropy[part, None])
            if grad_log_probs is not None:
                of_logits -= p.mul_(grad_log_probs[part, None])
                column, here = shard.place(targets[part])
                if shard.width:
                    of_logits.scatter_add_(1, column[:, None], (grad_log_probs[part] * here)[:, None])
            view.index_add_(0, rows[part], of_logits.mul_(shard.scale).to(gradient.dtype))
        return gradient, None, None, None


def _chunk_forward(
    logits: torch.Tensor, rows: torch.Tensor, targets: torch.Tensor, shard: _Shard
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probability, entropy and log of the normaliser."""
    z = shard.scaled(logits, rows)
    largest = z.amax(-1) if shard.width else z.new_full((z.shape[0],), -torch.inf)
    shard.reduce(largest, dist.ReduceOp.MAX)
    z.sub_(largest[:, None])
    column, here = shard.place(targets)
    sums = z.new_zeros(3 if shard.with_entropy else 2, z.shape[0])
    if shard.width:
        sums[0] = torch.where(here, z.gather(1, column[:, None])[:, 0], 0.0)
        e = z.exp()
        sums[1] = e.sum(-1)
        if shard.with_entropy:
            sums[2] = e.mul_(z).sum(-1)
    shard.reduce(sums, dist.ReduceOp.SUM)
    log_sum = sums[1].log()
    entropy = log_sum - sums[2] / sums[1] if shard.with_entropy else torch.zeros_like(log_sum)
    return sums[0] - log_sum, entropy, largest + log_sum


def compute_approx_kl(
    log_probs: torch.Tensor,
    base_log_probs: torch.Tensor,
    kl_type: str,
    importance_ratio: torch.Tensor | None = None,
) -> torch.Tensor:
    """Estimate of KL(policy || base) per token, from tokens that the policy chose; ``d = log_probs - base_log_probs``.

    k1: d. k2: d^2 / 2. k3: exp(-d) - 1 + d. low_var_kl: k3 with d held within 20 and the result within 10.
    Source: Schulman, Approximating KL divergence (2020).

    Args:
        log_probs: Of the policy, with gradient if wanted.
        base_log_probs: Of the base.
        kl_type: One of ``KL_TYPES``.
        importance_ratio: Probability under the policy over that when the token was chosen, multiplied in.

    Raises:
        ValueError: Unknown type.
    """
    d = log_probs.float() - base_log_probs.float()
    if kl_type == "k1":
        kl = d
    elif kl_type == "k2":
        kl = d.square() / 2
    elif kl_type in ("k3", "low_var_kl"):
        minus_d = -d
        if kl_type == "low_var_kl":
            minus_d = torch.nan_to_num(minus_d).clamp(-20, 20)
        kl = minus_d.exp() - 1 - minus_d
    else:
        raise ValueError(f"unknown KL type {kl_type!r}; known are {', '.join(KL_TYPES)}")
    if importance_ratio is not None:
        kl = kl * importance_ratio
    return kl.clamp(-10, 10) if kl_type == "low_var_kl" else kl


def likelihood_ratio(ppo_kl: torch.Tensor) -> torch.Tensor:
    """``exp(-ppo_kl)``, the exponent held within ``MAX_LOG_RATIO``."""
    return (-ppo_kl).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def compute_policy_loss(
    ppo_kl: torch.Tensor,
    advantages: torch.Tensor,
    eps_clip: float,
    eps_clip_high: float,
    eps_clip_c: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Per token: ``max(-r A, -clip(r, 1 - eps, 1 + eps_high) A)`` with ``r = exp(-ppo_kl)``, at most ``-c A`` where A
    is negative (dual clip); and whether the clip took effect (float).

    Sources: Schulman et al., Proximal policy optimization (2017); Ye et al., dual clip (2020).
    """
    ratio = likelihood_ratio(ppo_kl)
    plain = -ratio * advantages
    clipped = -ratio.clamp(1 - eps_clip, 1 + eps_clip_high) * advantages
    loss = torch.maximum(plain, clipped)
    if eps_clip_c is not None:
        loss = torch.where(advantages < 0, torch.minimum(-eps_clip_c * advantages, loss), loss)
    return loss, (clipped > plain).float()
