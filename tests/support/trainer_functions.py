"""What a user brings for the trainer: hooks, losses, models, with the reference's signatures."""

from __future__ import annotations

import torch

seen: list[tuple] = []


def on_init(args):
    seen.append(("init", torch.distributed.is_initialized(), args.train_id))


def before_log_prob(args, model, store_prefix):
    numbers = sum(parameter.numel() for part in model for parameter in part.parameters())
    seen.append(("log_prob", store_prefix, isinstance(model, list), numbers > 0))


def before_step(args, rollout_id, step_id, model, optimizer, opt_param_scheduler):
    rates = [group["lr"] for group in optimizer.param_groups]
    seen.append(("step", rollout_id, step_id, max(rates) > 0, opt_param_scheduler is not None, len(model)))


def only_args(args):
    seen.append(("postprocess", args.train_id))


def first_tokens_only(args, rollout_data):
    """Trains the first token of each response alone, and doubles what it is worth."""
    for i, mask in enumerate(rollout_data["loss_masks"]):
        mask[1:] = 0
        rollout_data["advantages"][i] = rollout_data["advantages"][i] * 2
    rollout_data["mine"] = [0.0] * len(rollout_data["tokens"])


def too_short(args, rollout_data):
    rollout_data["advantages"].pop()


def broken(*args, **kwargs):
    raise KeyError("the user's own mistake")


async def in_async(args):
    pass


def frozen_embedding(pre_process, post_process, vp_stage=None):
    """The usual model, whose embedding is not trained."""
    from megatron.training import get_args

    from miles.backends.megatron_utils.model_provider import get_model_provider_func

    model = get_model_provider_func(get_args())(pre_process, post_process, vp_stage)
    model.embedding.requires_grad_(False)
    return model


def without_stages(pre_process, post_process):
    return frozen_embedding(pre_process, post_process)


def no_model(pre_process, post_process):
    return torch.nn.Linear(2, 2)


def doubling_spec(args, config, vp_stage):
    """Our layers, with an MLP whose output is twice as large."""
    from megatron.core.transformer.mlp import MLP

    from miles.backends.megatron_utils.layer_spec import block_spec

    class DoubledMLP(MLP):
        def forward(self, *args, **kwargs):
            output, bias = super().forward(*args, **kwargs)
            return output * args_scale, bias

    args_scale = args.scale
    spec = block_spec(config)
    for layer in spec.layer_specs:
        layer.submodules.mlp.module = DoubledMLP
    assert vp_stage is None
    return spec


def three_things(args, **given):
    return given["pg_loss"], given["loss_masks"], {}, "and more"


def log_prob_loss(args, batch, logits, sum_of_sample_mean):
    """-log p of the responses, with what user code imports."""
    from miles.backends.training_utils.cp_utils import all_gather_with_cp, get_sum_of_sample_mean
    from miles.backends.training_utils.loss_hub.logit_processors import get_log_probs_and_entropy, get_responses
    from miles.backends.training_utils.parallel import get_parallel_state

    lengths = {name: batch[name] for name in ("unconcat_tokens", "total_lengths", "response_lengths", "max_seq_lens")}
    found = get_log_probs_and_entropy(logits, args=args, with_entropy=True, **lengths)
    parts = zip(get_responses(logits, args=args, **lengths), found["log_probs"], strict=True)
    if get_parallel_state().tp.size == 1:
        for (chunk, tokens), values in parts:
            wanted = chunk[:, :320].log_softmax(-1).gather(-1, tokens.long()[:, None])[:, 0]
            torch.testing.assert_close(values, wanted, atol=1e-5, rtol=1e-5)
    whole = [
        all_gather_with_cp(values, total, response)
        for values, total, response in zip(
            found["log_probs"], batch["total_lengths"], batch["response_lengths"], strict=True
        )
    ]
    flat = torch.cat(whole)
    reduce = get_sum_of_sample_mean(batch["total_lengths"], batch["response_lengths"], batch["loss_masks"])
    torch.testing.assert_close(reduce(flat), sum_of_sample_mean(flat))
    return -reduce(flat), {"entropy": sum_of_sample_mean(torch.cat(found["entropy"])), "rows": torch.tensor(1.0)}
