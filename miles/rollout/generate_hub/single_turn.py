"""One request per sample: the default generate function."""

from __future__ import annotations

from miles.rollout.base_types import GenerateFnInput, GenerateFnOutput
from miles.rollout.generate_utils.generate_endpoint_utils import (
    compute_prompt_ids_from_sample,
    compute_request_payload,
    generate_url,
    update_sample_from_response,
)
from miles.utils.http_utils import post


async def generate(input: GenerateFnInput) -> GenerateFnOutput:  # noqa: A002 - the name that tells this form apart
    """Complete a sample; one that was aborted goes on from the tokens that it has.

    A sample without room for another token is ``TRUNCATED`` without a request.
    """
    state, args, sample = input.state, input.args, input.sample
    input_ids = list(sample.tokens) if sample.response_length else compute_prompt_ids_from_sample(state, sample)
    payload, status = compute_request_payload(
        args,
        input_ids,
        input.sampling_params,
        generated=sample.response_length,
        multimodal_inputs=sample.multimodal_inputs,
    )
    if payload is None:
        assert status is not None
        sample.tokens, sample.status = input_ids, status
        if sample.rollout_log_probs is None:
            sample.rollout_log_probs = []
        return GenerateFnOutput(samples=sample)
    headers = {"X-SMG-Routing-Key": sample.routing_key} if sample.routing_key else None
    output = await post(generate_url(args), payload, max_retries=state.request_retries, headers=headers)
    update_sample_from_response(
        args, sample, payload, output, tokenizer=state.tokenizer, update_loss_mask=sample.loss_mask is not None
    )
    return GenerateFnOutput(samples=sample)
