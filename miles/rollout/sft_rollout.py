"""Supervised fine-tuning as a rollout function: samples straight from the data, without an engine.

A prompt that is a list of messages is trained on its assistant messages; one that is text, on its label.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from miles.rollout.base_types import RolloutFnTrainOutput
from miles.rollout.data_source import DataSource
from miles.utils.mask_utils import BadConversation, MultiTurnLossMaskGenerator
from miles.utils.processing_utils import shared_tokenizer
from miles.utils.types import Sample, SampleStatus


def generate_rollout(
    args: Namespace, rollout_id: int, data_source: DataSource, evaluation: bool = False
) -> RolloutFnTrainOutput:
    """``rollout_batch_size`` groups with tokens, loss masks and reward 0.

    Raises:
        BadConversation: A row holds nothing to learn, or an evaluation is asked for.
    """
    if evaluation:
        raise BadConversation(
            "the supervised rollout function makes no answers to evaluate",
            evidence="--rollout-function-path miles.rollout.sft_rollout.generate_rollout",
            advice="Give --eval-function-path, or leave out --eval-interval.",
        )
    tokenizer = shared_tokenizer(args.hf_checkpoint, args.chat_template_path)
    masks = MultiTurnLossMaskGenerator(tokenizer, args.loss_mask_type, args.apply_chat_template_kwargs)
    groups = data_source.get_samples(args.rollout_batch_size)
    for group in groups:
        for sample in group:
            complete(sample, tokenizer, masks, args)
    return RolloutFnTrainOutput(samples=groups)


def complete(sample: Sample, tokenizer: Any, masks: MultiTurnLossMaskGenerator, args: Any) -> None:
    """Make a sample of its data: the response begins with the first token that is learnt."""
    if isinstance(sample.prompt, str):
        tokens, mask = _pair(sample, tokenizer)
    else:
        tokens, mask = masks.get_loss_mask(sample.prompt, sample.metadata.get("tools"))
    limit = args.rollout_max_context_len
    if limit is not None:
        tokens, mask = tokens[:limit], mask[:limit]
    if not any(mask):
        raise BadConversation(
            f"sample {sample.index} has nothing to learn",
            evidence=f"none of its {len(tokens)} tokens is an answer's"
            + (f", within --rollout-max-context-len {limit}" if limit is not None else ""),
            advice="Check --input-key and --label-key, and the limit.",
        )
    start = mask.index(1)
    sample.tokens = tokens
    sample.loss_mask = mask[start:]
    sample.response_length = len(tokens) - start
    sample.response = str(tokenizer.decode(tokens[start:]))
    sample.reward = 0.0
    sample.status = SampleStatus.COMPLETED


def _pair(sample: Sample, tokenizer: Any) -> tuple[list[int], list[int]]:
    if not isinstance(sample.label, str) or not sample.label:
        raise BadConversation(
            f"sample {sample.index} is a text without a label to learn",
            evidence=f"its prompt is {str(sample.prompt)[:200]!r}",
            advice="Give --label-key the column of the answers, or --input-key a column of conversations.",
        )
    prompt = [int(i) for i in tokenizer.encode(sample.prompt, add_special_tokens=False)]
    answer = [int(i) for i in tokenizer.encode(sample.label, add_special_tokens=False)]
    end = tokenizer.eos_token_id
    if end is not None and answer[-1:] != [end]:
        answer.append(int(end))
    return prompt + answer, [0] * len(prompt) + [1] * len(answer)
