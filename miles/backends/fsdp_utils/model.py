"""From a Hugging Face directory to a sharded model: built without memory, sharded, then filled shard by shard."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from miles.backends.fsdp_utils import packing
from miles.backends.fsdp_utils.errors import BadModelDirectory
from miles.backends.fsdp_utils.lora import attach
from miles.backends.hf_directory import read_config as read_json_config
from miles.utils.lora import LoraSettings

ARCHITECTURES = ("qwen2", "qwen3", "llama")
_OURS = {"sdpa": packing.SDPA, "eager": packing.EAGER}


@dataclass(frozen=True)
class ModelOptions:
    """How a model is built.

    Attributes:
        storage: Dtype of trained shards. float32 under a bfloat16 ``compute`` keeps master weights.
        compute: Dtype of gathered parameters and activations.
        trained: False: no gradients.
        lora: Adapters are trained in place of the weights, which are kept in ``compute``.
    """

    storage: torch.dtype
    compute: torch.dtype
    attention: str
    gradient_checkpointing: bool = False
    cpu_offload: bool = False
    trained: bool = True
    lora: LoraSettings | None = None


def build_model(directory: Path, mesh: DeviceMesh, device: torch.device, options: ModelOptions) -> nn.Module:
    """The causal language model of ``directory``'s ``config.json``, sharded over ``mesh``; its weights are not set.

    Raises:
        UnreadableModelDirectory: There is no ``config.json``.
        BadModelDirectory: It is of another architecture.
    """
    config = read_config(directory)
    packing.register()
    attention = _OURS.get(options.attention, options.attention)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, dtype=options.storage if options.lora is None else options.compute, attn_implementation=attention
        )
    model.tie_weights()
    # Else torch leaves out what this token's embedding gets as an input, and a model may well write it.
    model.get_input_embeddings().padding_idx = None
    if options.gradient_checkpointing and options.trained:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.requires_grad_(options.trained)
    if options.lora is not None:
        attach(model, options.lora, options.storage)
    _shard(model, mesh, options)
    model.to_empty(device="cpu" if options.cpu_offload else device)
    _fill_buffers(model, device)
    return cast("nn.Module", model)


def read_config(directory: Path) -> Any:
    """The directory's configuration, without a look at the network.

    Raises:
        UnreadableModelDirectory, BadModelDirectory: As ``build_model`` says.
    """
    kind = read_json_config(directory).get("model_type")
    if kind not in ARCHITECTURES:
        raise BadModelDirectory(
            f"{directory} holds a model of an architecture that --train-backend fsdp does not know",
            evidence=f"model_type is {kind}; known: {', '.join(ARCHITECTURES)}",
            advice="Use a model of a known architecture.",
        )
    config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True)
    if any(layer != "full_attention" for layer in getattr(config, "layer_types", None) or ()):
        raise BadModelDirectory(
            f"{directory} holds a model with sliding-window attention, which --train-backend fsdp does not do",
            evidence=f"layer_types: {', '.join(sorted(set(config.layer_types)))}",
            advice="Use a model with full attention in all layers.",
        )
    return config


def fsdp_modules(model: nn.Module) -> Iterator[FSDPModule]:
    """The parts that are gathered as one, the root among them."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            yield module


def _shard(model: Any, mesh: DeviceMesh, options: ModelOptions) -> None:
    mixed = options.compute != options.storage
    policy = MixedPrecisionPolicy(param_dtype=options.compute, reduce_dtype=torch.float32) if mixed else None
    keywords: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": policy or MixedPrecisionPolicy(),
        "offload_policy": CPUOffloadPolicy() if options.cpu_offload else OffloadPolicy(),
    }
    for layer in model.model.layers:
        fully_shard(layer, **keywords)
    fully_shard(model, **keywords)
    for module in fsdp_modules(model):
        # Losses bring their own divisors: gradients are sums over ranks, not means.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def _fill_buffers(model: Any, device: torch.device) -> None:
    """The only ones are the rotary frequencies: they follow from the configuration and are in no file."""
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config=model.config).to(device)
    empty = [name for name, _ in model.named_buffers() if not name.startswith("model.rotary_emb.")]
    if empty:
        raise BadModelDirectory(
            "the model has buffers that no weight file holds",
            evidence=", ".join(empty),
            advice="Use a model of a known architecture with a known version of transformers.",
        )
