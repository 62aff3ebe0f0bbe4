"""A Megatron model without optimizer or data parallelism, to convert weights with."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from miles.backends.hf_directory import HFDirectory
from miles.backends.megatron_utils.checkpoint import TrainState, load_checkpoint
from miles.backends.megatron_utils.checkpoint_files import check_complete
from miles.backends.megatron_utils.errors import CheckpointMismatch
from miles.backends.megatron_utils.families import read_shape, weight_rules
from miles.backends.megatron_utils.model import build_model, padded_vocab, transformer_config
from miles.backends.megatron_utils.parallel import init_parallel
from miles.backends.megatron_utils.stages import Stage
from miles.backends.megatron_utils.weights import full_tensors, load_hf_weights

_ARGS = Namespace(tensor_model_parallel_size=1, make_vocab_size_divisible_by=128, seed=1234)


class StandaloneModel:
    """On the CPU, on the only rank of ``torch.distributed``.

    Args:
        further: Whether it has the layers that predict further tokens, if ``config.json`` says that there are some: a
            run may leave them out (``--mtp-num-layers``).
    """

    device = torch.device("cpu")

    def __init__(self, config: Mapping[str, Any], dtype: torch.dtype, *, further: bool = True) -> None:
        shape = read_shape(config)
        self.shape = shape if further else replace(shape, mtp_layers=0)
        self.rules = weight_rules(self.shape, padded_vocab(_ARGS, self.shape.vocab))
        self.parallel = init_parallel(_ARGS)
        config = transformer_config(_ARGS, self.shape, dtype)
        self.stage = Stage.of(config, self.shape, self.parallel)
        self.module = build_model(_ARGS, self.shape, config)

    def load_hf(self, directory: HFDirectory) -> None:
        """Weights of a Hugging Face directory."""
        load_hf_weights(self.module, self.rules, directory, stage=self.stage, parallel=self.parallel)

    def load_torch_dist(self, directory: Path) -> None:
        """Weights of a torch_dist checkpoint."""
        load_checkpoint(directory, TrainState(self.shape, self.parallel, self.module), generators=False)

    def hf_weights(self, *, only_first: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
        """As ``TrainBackend.hf_weights``."""
        return full_tensors(self.module, self.rules, stage=self.stage, parallel=self.parallel, only_first=only_first)


def has_further_layers(directory: Path) -> bool:
    """Whether a torch_dist checkpoint holds layers that predict further tokens."""
    return any(key.startswith("mtp.") for key in check_complete(directory).state_dict_metadata)


def checkpoint_dtype(directory: Path) -> torch.dtype:
    """Of the weights in a torch_dist checkpoint."""
    key = "embedding.word_embeddings.weight"
    entry = check_complete(directory).state_dict_metadata.get(key)
    if entry is None:
        raise CheckpointMismatch(
            f"the checkpoint {directory} is of no language model of ours",
            evidence=f"it has no {key}",
            advice="Give a checkpoint of --train-backend megatron.",
            path=str(directory),
        )
    properties: Any = entry
    dtype: torch.dtype = properties.properties.dtype
    return dtype
