"""Hugging Face models whose routers are told the experts, and what an engine with other routers would have recorded."""

from __future__ import annotations

import numpy as np
import torch

from support.trained_rollouts import data_of

SEED, EXPERTS, K, LAYERS = 7, 4, 2, 2


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
