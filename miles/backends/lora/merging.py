"""A checkpoint's adapter merged into the Hugging Face directory that it belongs to, without a model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from miles.backends.hf_directory import MTP_LAYERS, HFDirectory, OpenedDirectory
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
        self._names, self._dtype = self._find_base(checkpoint)

    def hf_weights(self, *, only_first: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
        """As ``TrainBackend.hf_weights``."""
        del only_first  # there is one rank
        with self._directory.opened() as opened:
            for name in self._names:
                weight = opened.tensor(name).to(self._dtype)
                pair = self._pairs.get(name.removesuffix(".weight"))
                yield name, weight if pair is None else merged(weight, pair, self._scaling)

    def _all_names(self) -> list[str]:
        """Those that a backend has: no copies, nothing that is computed."""
        copies = ("lm_head.weight",) if self._directory.config().get("tie_word_embeddings") else ()
        return sorted(name for name in self._directory.names if not name.endswith(("rotary_emb.inv_freq", *copies)))

    def _find_base(self, checkpoint: Path) -> tuple[list[str], torch.dtype]:
        """The run's weights below: with these, in this dtype, the adapter was trained. A run may have left out the
        layers that predict further tokens (``--mtp-num-layers``); an export of it has none."""
        every, own = self._all_names(), self._directory.common_dtype()
        further = [name for name in every if name.startswith(MTP_LAYERS)]
        others = [name for name in every if not name.startswith(MTP_LAYERS)]
        wanted = base_checksum(checkpoint)
        with self._directory.opened() as opened:
            for dtype in dict.fromkeys((torch.bfloat16, own)):
                total = self._sum(opened, others, dtype)
                if further and _signed(total) == wanted:
                    return others, dtype
                total += self._sum(opened, further, dtype)
                if _signed(total) == wanted:
                    return every, dtype
        check_base(checkpoint, _signed(total))
        return every, own

    def _sum(self, opened: OpenedDirectory, names: list[str], dtype: torch.dtype) -> int:
        return sum(int(bit_sum(opened.tensor(name).to(dtype))) for name in names)


def _signed(total: int) -> int:
    """As a sum of int64 comes out."""
    total &= _MASK
    return total - (1 << 64) if total >> 63 else total
