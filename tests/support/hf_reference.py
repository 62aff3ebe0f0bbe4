"""The Hugging Face implementation of a model directory, to compare with."""

from __future__ import annotations

from pathlib import Path

import torch


def load_hf_model(path: Path, *, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """In evaluation mode, with eager attention. Fails if a weight is missing or left over."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, attn_implementation="eager", output_loading_info=True
    )
    problems = {key: value for key, value in info.items() if value}
    assert not problems, problems
    return model.eval()


def hf_log_probs(model: torch.nn.Module, sequence: list[int]) -> torch.Tensor:
    """Of each token given those before it, float32 ``[len(sequence) - 1]``, with gradient."""
    ids = torch.tensor([sequence])
    logits = model(ids).logits.float().log_softmax(-1)
    return logits[0, :-1].gather(-1, ids[0, 1:, None]).squeeze(-1)
