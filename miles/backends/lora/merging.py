"""A checkpoint's adapter merged into the Hugging Face directory that it belongs to, without a model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from miles.backends.hf_directory import HFDirectory, OpenedDirectory
from miles.backends.lora.files import base_checksum, check_base, read_adapter
from miles.backends.lora.values import bit_sum, merged
from miles.utils.lora import ADAPTER_DIRECTORY

_MASK = (1 << 64) - 1


class MergedModel:
    """What an export takes for a backend.

    Args:
        directory: The weights below.
        checkpoint: A directory that holds an adapter.

    Raises:
        BadAdapter: It belongs to other weights.
    """

    device = torch.device("cpu")

    def __init__(self, directory: HFDirectory, checkpoint: Path) -> None:
        self._directory = directory
        config, self._pairs = read_adapter(checkpoint / ADAPTER_DIRECTORY)
        self._scaling = config["lora_alpha"] / config["r"]
        self._dtype = self._find_dtype(checkpoint)

    def hf_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """As ``TrainBackend.hf_weights``."""
        with self._directory.opened() as opened:
            for name in self._names():
                weight = opened.tensor(name).to(self._dtype)
                pair = self._pairs.get(name.removesuffix(".weight"))
                yield name, weight if pair is None else merged(weight, pair, self._scaling)

    def _names(self) -> list[str]:
        """Those that a backend has: no copies, nothing that is computed."""
        copies = ("lm_head.weight",) if self._directory.config().get("tie_word_embeddings") else ()
        return sorted(name for name in self._directory.names if not name.endswith(("rotary_emb.inv_freq", *copies)))

    def _find_dtype(self, checkpoint: Path) -> torch.dtype:
        """That of the run: the one in which the weights are those that the adapter was trained on."""
        own = self._directory.common_dtype()
        with self._directory.opened() as opened:
            if own != torch.bfloat16 and self._checksum(opened, torch.bfloat16) == base_checksum(checkpoint):
                return torch.bfloat16
            check_base(checkpoint, self._checksum(opened, own))
        return own

    def _checksum(self, opened: OpenedDirectory, dtype: torch.dtype) -> int:
        total = sum(int(bit_sum(opened.tensor(name).to(dtype))) for name in self._names()) & _MASK
        return total - (1 << 64) if total >> 63 else total
