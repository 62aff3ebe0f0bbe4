"""The critic's last layer: one number per token, on every tensor-parallel rank."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own name for it
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig

NAME = "output_layer.weight"
"""Of its weight in a GPTModel, where a language model has its vocabulary."""


class ValueHead(torch.nn.Module):
    """In place of a GPTModel's output layer. It begins with zeros: a fresh critic says 0 of everything.

    The weight is the same on all tensor-parallel ranks. With sequence parallelism each of them sees some tokens only;
    megatron.core then adds up the gradients of weights that are marked so.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
        self.weight = torch.nn.Parameter(torch.zeros(1, config.hidden_size, dtype=config.params_dtype, device=device))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]  # megatron.core asks
        self._gathers = config.sequence_parallel

    def forward(self, hidden: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        """``[rows, 1, H]`` (of this rank) -> ``[rows, 1, 1]`` (of all tensor-parallel ranks)."""
        values = F.linear(hidden, self.weight)
        if self._gathers:
            # All ranks go on with all rows: each keeps the gradient of its own.
            values = gather_from_sequence_parallel_region(values, tensor_parallel_output_grad=False)
        return values, None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: dict[str, Any] | None = None, **_: Any
    ) -> dict[str, Any]:
        """For checkpoints: not cut, the same on all tensor-parallel ranks."""
        from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

        state = self.state_dict(prefix="", keep_vars=True)
        tensors: dict[str, Any] = make_sharded_tensors_for_checkpoint(state, prefix, {}, sharded_offsets)
        return tensors
