"""The Hugging Face implementation of a model directory, to compare with."""

from __future__ import annotations

from pathlib import Path

import torch


def load_hf_model(path: Path, *, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """In evaluation mode, with eager attention; a padding token is a token like others, with all of its gradient.

    Fails if a weight is missing or left over."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, attn_implementation="eager", output_loading_info=True
    )
    problems = {key: value for key, value in info.items() if value}
    assert not problems, problems
    model.get_input_embeddings().padding_idx = None
    return model.eval()


def hf_parameters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """By the names of files: transformers fuses the experts of a layer in memory."""
    found: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        value = parameter.detach()
        if name.endswith("experts.gate_up_proj"):
            for expert, both in enumerate(value):
                gate, up = both.chunk(2)
                prefix = name.removesuffix("gate_up_proj") + f"{expert}."
                found |= {prefix + "gate_proj.weight": gate, prefix + "up_proj.weight": up}
        elif name.endswith("experts.down_proj"):
            prefix = name.removesuffix("down_proj")
            found |= {f"{prefix}{expert}.down_proj.weight": one for expert, one in enumerate(value)}
        else:
            found[name] = value
    return found


def hf_log_probs(model: torch.nn.Module, sequence: list[int]) -> torch.Tensor:
    """Of each token given those before it, float32 ``[len(sequence) - 1]``, with gradient."""
    ids = torch.tensor([sequence])
    logits = model(ids).logits.float().log_softmax(-1)
    return logits[0, :-1].gather(-1, ids[0, 1:, None]).squeeze(-1)
