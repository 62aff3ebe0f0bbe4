"""GRPO and supervised losses and their gradients equal a plain implementation of the formulas."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.plain_losses import HIDDEN, VOCAB, assert_close, flags, plain_loss, random_train_data, tiny_model_of
from support.ranks import run_ranks
from support.tiny_backend import TinyBackend, make_parallel, tiny_logits, tiny_parameters

from miles.backends.base import MicroBatch, ParallelState
from miles.backends.training_utils.data import RankData, StepPlan
from miles.backends.training_utils.loss_hub.advantages import compute_advantages_and_returns
from miles.backends.training_utils.loss_hub.losses import LOSS_COLUMNS, BadLossFunction, Losses
from miles.backends.training_utils.loss_hub.settings import UnsupportedLoss
from miles.utils.train_data import split_train_data

CPU = torch.device("cpu")
STEPS = 2


def of_plain(args, data, count=8):
    """Per step: metrics, and gradients of all parameters."""
    found = []
    for step in range(count // args.global_batch_size):
        parameters = {n: v.requires_grad_() for n, v in tiny_parameters(VOCAB, HIDDEN, args.seed).items()}
        groups = sorted(set(data["rollout_ids"]))[step * args.global_batch_size :][: args.global_batch_size]
        places = [i for i, r in enumerate(data["rollout_ids"]) if r in groups]
        if not places:
            continue
        metrics = plain_loss(args, tiny_model_of(parameters), data, places)
        if isinstance(metrics["loss"], torch.Tensor):
            metrics["loss"].backward()
        gradients = {n: torch.zeros_like(v) if v.grad is None else v.grad for n, v in parameters.items()}
        found.append((metrics, gradients))
    return found


def of_ours(args, data):
    """The same, from all ranks' parts one after the other in this process."""
    ranks = [RankData.from_wire(part) for part in split_train_data(args, data)]
    losses = Losses(args, ParallelState())
    found = []
    for step in range(len(ranks[0].steps)):
        parameters = {n: v.requires_grad_() for n, v in tiny_parameters(VOCAB, HIDDEN, args.seed).items()}
        metrics = {}
        for rank in ranks:
            compute_advantages_and_returns(args, ParallelState(), rank)
            for samples in rank.steps[step].micro_batches:
                batch = rank.micro_batch(samples, CPU, LOSS_COLUMNS)
                output = losses.for_step(rank.steps[step])(
                    tiny_logits(parameters, batch.tokens, batch.position_ids), batch
                )
                output.loss.backward()
                for name, value in output.metrics.items():
                    metrics[name] = metrics.get(name, 0.0) + value
        found.append((metrics, {n: v.grad for n, v in parameters.items()}))
    return found


def assert_same(args, found, wanted):
    assert len(found) == len(wanted)
    for (metrics, gradients), (plain_metrics, plain_gradients) in zip(found, wanted, strict=True):
        names = ["loss"] if args.loss_type == "sft_loss" else list(plain_metrics)
        if not args.use_kl_loss and "kl_loss" in names:
            names.remove("kl_loss")
        assert_close(metrics, {name: plain_metrics[name] for name in names}, args)
        for name, gradient in plain_gradients.items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-5, atol=1e-5, msg=name)


any_flags = st.fixed_dictionaries(
    {
        "dp_size": st.integers(1, 3),
        "use_dynamic_batch_size": st.booleans(),
        "micro_batch_size": st.integers(1, 3),
        "balance_data": st.booleans(),
        "calculate_per_token_loss": st.booleans(),
        "use_kl_loss": st.booleans(),
        "kl_loss_type": st.sampled_from(["k1", "k2", "k3", "low_var_kl"]),
        "eps_clip_c": st.sampled_from([None, 1.1, 3.0]),
        "entropy_coef": st.sampled_from([0.0, 0.1]),
        "rollout_temperature": st.sampled_from([1.0, 0.7]),
        "log_probs_chunk_size": st.sampled_from([-1, 3]),
        "loss_type": st.sampled_from(["policy_loss", "policy_loss", "policy_loss", "sft_loss"]),
        "advantage_estimator": st.sampled_from(["grpo", "gspo"]),
        "use_opsm": st.booleans(),
        "use_tis": st.booleans(),
    }
)


@settings(max_examples=60, deadline=None)
@given(any_flags, st.integers(0, 10**6), st.booleans())
def test_loss_and_gradient_equal_the_formula(changed, seed, siblings):
    args = flags(**changed)
    data = random_train_data(seed, siblings=siblings)
    assert_same(args, of_ours(args, data), of_plain(args, data))


def on_ranks(changed, seed):
    """Loss and gradients of the first step, by way of a backend's training step."""
    args = flags(**changed)
    backend = TinyBackend(args)
    backend.init()
    (part,) = [
        part for part in split_train_data(args, random_train_data(seed)) if part["dp_rank"] == backend.parallel.dp_rank
    ]
    data = RankData.from_wire(part)
    compute_advantages_and_returns(args, backend.parallel, data)
    losses = Losses(args, backend.parallel)
    batches = [data.micro_batch(samples, CPU, LOSS_COLUMNS) for samples in data.steps[0].micro_batches]
    outcome = backend.train_step(batches, losses.for_step(data.steps[0]))
    return {n: float(v) for n, v in outcome.metrics.items()}, {n: v.grad for n, v in backend.parameters.items()}


@pytest.mark.parametrize(("dp_size", "tp_size"), [(1, 1), (2, 1), (1, 2)])
@pytest.mark.parametrize("dynamic", [True, False])
def test_loss_and_gradient_equal_the_formula_on_ranks(dp_size, tp_size, dynamic):
    changed = {"dp_size": dp_size, "tp_size": tp_size, "use_dynamic_batch_size": dynamic, "micro_batch_size": 2}
    args = flags(**changed)
    answers = run_ranks(dp_size * tp_size, on_ranks, changed, 11)
    metrics, gradients = of_plain(args, random_train_data(11))[0]
    summed = {name: sum(a[0][name] for a in answers[::tp_size]) for name in metrics}
    assert_close(summed, metrics, (dp_size, tp_size))
    rows = VOCAB // tp_size
    for rank, (_, found) in enumerate(answers):
        shard = {**gradients, "out": gradients["out"][(rank % tp_size) * rows :][:rows]}
        for name, gradient in shard.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-5, msg=f"{name} of rank {rank}")


def normalised_on_ranks(changed, seed):
    args = flags(**changed)
    parallel = make_parallel(1)
    data = RankData.from_wire(split_train_data(args, random_train_data(seed))[parallel.dp_rank])
    compute_advantages_and_returns(args, parallel, data)
    return list(zip(data.partition, data.columns["advantages"], strict=True))


def test_normalised_advantages_are_the_same_on_two_ranks_as_on_one():
    one = dict(run_ranks(1, normalised_on_ranks, {"dp_size": 1, "normalize_advantages": True}, 5)[0])
    answers = run_ranks(2, normalised_on_ranks, {"dp_size": 2, "normalize_advantages": True}, 5)
    two = dict(answers[0] + answers[1])
    assert one.keys() == two.keys()
    for place, values in one.items():
        torch.testing.assert_close(two[place], values)
    masks = random_train_data(5)["loss_masks"]
    trained = torch.cat([values[torch.tensor(masks[i]) > 0] for i, values in one.items() if len(values)])
    torch.testing.assert_close(trained.mean(), torch.tensor(0.0), atol=1e-5, rtol=0)
    torch.testing.assert_close(trained.var(), torch.tensor(1.0), atol=1e-4, rtol=0)


def test_engine_distances_and_effective_sample_size_are_reported():
    data = random_train_data(2)
    data["rollout_log_probs"] = data["log_probs"]
    (metrics, _) = of_ours(flags(), data)[0]
    assert float(metrics["train_rollout_logprob_abs_diff"]) == 0
    assert float(metrics["train_rollout_kl"]) == 0
    assert 0 < float(metrics["ess_ratio"]) <= 1


def test_truncated_importance_sampling_weighs_losses_by_the_distance_to_the_engine():
    data = random_train_data(4)
    plain, _ = of_ours(flags(use_kl_loss=False, entropy_coef=0.0), data)[0]
    corrected, _ = of_ours(flags(use_kl_loss=False, entropy_coef=0.0, use_tis=True, tis_clip=1e9), data)[0]
    shifted = {**data, "rollout_log_probs": [[x - 0.5 for x in own] for own in data["log_probs"]]}
    doubled, _ = of_ours(flags(use_kl_loss=False, entropy_coef=0.0, use_tis=True, tis_clip=1e9), shifted)[0]
    bounded, _ = of_ours(flags(use_kl_loss=False, entropy_coef=0.0, use_tis=True, tis_clip=1.25), shifted)[0]
    assert_close({"x": doubled["pg_loss"]}, {"x": float(plain["pg_loss"]) * 2.718281828**0.5}, "uniform weight")
    assert_close({"x": bounded["pg_loss"]}, {"x": float(plain["pg_loss"]) * 1.25}, "clipped weight")
    assert float(corrected["pg_loss"]) != pytest.approx(float(plain["pg_loss"]))
    assert {"tis", "tis_clipfrac", "tis_abs", "ois"} <= doubled.keys()


def custom_loss(args, batch, logits, sum_of_sample_mean):
    """A user's: the square of the logits of response tokens."""
    assert logits.shape[0] == 1
    values, end = [], 0
    for total, response in zip(batch["total_lengths"], batch["response_lengths"], strict=True):
        end += total
        values.append(logits[0, end - response - 1 : end - 1].square().sum(-1))
    loss = sum_of_sample_mean(torch.cat(values)) * args.scale
    return loss, {"squares": loss.detach()}


def test_a_custom_loss_gets_what_the_reference_gives_it():
    path = "training.test_losses.custom_loss"
    args = flags(loss_type="custom_loss", custom_loss_function_path=path, scale=3.0, dp_size=2)
    data = random_train_data(10)
    metrics, _ = of_ours(args, data)[0]
    parameters = tiny_parameters(VOCAB, HIDDEN, args.seed)
    wanted = 0.0
    for i in range(4):
        tokens, response, mask = torch.tensor(data["tokens"][i]), data["response_lengths"][i], data["loss_masks"][i]
        logits = tiny_logits(parameters, tokens, torch.arange(len(tokens)))  # before the temperature
        rows = logits[len(tokens) - response - 1 : len(tokens) - 1].square().sum(-1)
        wanted += 3.0 * float((rows * torch.tensor(mask)).sum()) / max(sum(mask), 1) / 4
    assert_close(metrics, {"loss": wanted, "squares": wanted}, "custom")


def wrong_loss(args, batch, logits, sum_of_sample_mean):
    return logits.sum()


def test_a_custom_loss_that_returns_something_else_is_told_what_to_return():
    args = flags(loss_type="custom_loss", custom_loss_function_path="training.test_losses.wrong_loss")
    with pytest.raises(BadLossFunction, match="something else than a loss"):
        of_ours(args, random_train_data(10))


def test_a_missing_column_is_named():
    data = random_train_data(10)
    del data["rollout_log_probs"]
    with pytest.raises(BadLossFunction, match="rollout_log_probs"):
        of_ours(flags(use_rollout_logprobs=True), data)


@pytest.mark.parametrize(
    ("changed", "flag"),
    [
        ({"advantage_estimator": "a2c"}, "--advantage-estimator a2c"),
        ({"kl_loss_type": "k4"}, "--kl-loss-type k4"),
        ({"eps_clip_c": 0.5}, "--eps-clip-c 0.5"),
        ({"loss_type": "value_loss"}, "--loss-type value_loss"),
        ({"use_tis": True, "use_rollout_logprobs": True}, "--use-tis"),
    ],
)
def test_what_is_not_built_is_refused_by_name(changed, flag):
    with pytest.raises(UnsupportedLoss) as caught:
        Losses(flags(**changed), ParallelState())
    assert flag in str(caught.value)


def shifted_reducer(total_lengths, response_lengths, loss_masks, per_token):
    """A user's: the plain sum over tokens that count, whatever the sample, over a constant."""
    assert sum(response_lengths) == sum(len(mask) for mask in loss_masks)
    return lambda values: (values * torch.cat(loss_masks)).sum() / 100


def test_a_custom_reducer_replaces_the_mean_of_the_policy_loss_only():
    path = "training.test_losses.shifted_reducer"
    args = flags(custom_pg_loss_reducer_function_path=path, use_kl_loss=False, entropy_coef=0.0, dp_size=2)
    data = random_train_data(6)
    found, _ = of_ours(args, data)[0]
    # A sum over tokens is what the per-token loss is, but for its divisor.
    by_token, _ = of_ours(flags(use_kl_loss=False, entropy_coef=0.0, calculate_per_token_loss=True), data)[0]
    num_tokens = sum(max(sum(mask), 1) for mask in data["loss_masks"][:4])
    assert_close({"x": found["pg_loss"]}, {"x": float(by_token["pg_loss"]) * num_tokens / 100 / 4}, "reducer")


def halving_correction(args, **given):
    """A user's: half of the loss, and the first token of each sample does not count."""
    masks = [mask * (torch.arange(len(mask)) > 0) for mask in given["loss_masks"]]
    return given["pg_loss"] * 0.5, masks, {"halved": torch.ones_like(given["pg_loss"])}


def test_a_custom_correction_changes_numerators_only():
    path = "training.test_losses.halving_correction"
    data = random_train_data(8)
    args = flags(use_tis=True, custom_tis_function_path=path, use_kl_loss=False, entropy_coef=0.0)
    found, _ = of_ours(args, data)[0]
    first_out = {**data, "loss_masks": [[0, *mask[1:]] if mask else [] for mask in data["loss_masks"]]}
    first_out["rollout_mask_sums"] = [sum(mask) for mask in data["loss_masks"]]
    wanted, _ = of_ours(flags(use_kl_loss=False, entropy_coef=0.0), first_out)[0]
    assert_close({"x": found["pg_loss"]}, {"x": float(wanted["pg_loss"]) * 0.5}, "correction")
    assert "halved" in found


def test_the_engines_log_probabilities_can_be_the_old_ones():
    data = random_train_data(11)
    swapped = {**data, "rollout_log_probs": data["log_probs"], "log_probs": data["rollout_log_probs"]}
    found = of_ours(flags(use_rollout_logprobs=True), swapped)
    assert_same(flags(), found, of_plain(flags(), data))


def test_without_a_pass_for_old_log_probabilities_the_ratio_is_one():
    data = random_train_data(11)
    metrics, _ = of_ours(flags(skip_actor_forward_only=True), data)[0]
    assert float(metrics["ppo_kl"]) == 0
    assert float(metrics["pg_clipfrac"]) == 0


def test_the_unbiased_kl_has_the_ratio_in_it():
    data = random_train_data(11)
    plain, _ = of_ours(flags(kl_loss_type="k2", skip_actor_forward_only=True), data)[0]
    same, _ = of_ours(flags(kl_loss_type="k2", skip_actor_forward_only=True, use_unbiased_kl=True), data)[0]
    other, _ = of_ours(flags(kl_loss_type="k2", use_unbiased_kl=True), data)[0]
    assert_close(same, {"kl_loss": plain["kl_loss"]}, "the ratio is 1")
    assert float(other["kl_loss"]) != pytest.approx(float(plain["kl_loss"]))


@pytest.mark.parametrize(
    ("function", "kept"), [("vanilla_tis_function", [0.5, 1.0, 2.0]), ("icepop_function", [0.0, 1.0, 0.0])]
)
def test_stock_corrections_bound_or_drop_what_is_far_off(function, kept):
    from miles.backends.training_utils.loss_hub import corrections

    engine = [torch.zeros(3)]
    trainer = [torch.tensor([0.25, 1.0, 4.0]).log()]
    loss, masks, metrics = getattr(corrections, function)(
        flags(tis_clip=2.0, tis_clip_low=0.5),
        pg_loss=torch.ones(3),
        train_log_probs=trainer,
        rollout_log_probs=engine,
        loss_masks=[torch.ones(3)],
    )
    torch.testing.assert_close(loss, torch.tensor(kept))
    torch.testing.assert_close(metrics["tis_clipfrac"], torch.tensor([1.0, 0.0, 1.0]))
    assert len(masks) == 1


@pytest.mark.parametrize("changed", [{"kl_loss_type": "k3"}, {"kl_loss_type": "k1", "use_unbiased_kl": True}])
def test_what_is_not_trained_leaves_gradients_finite(changed):
    """Also where a token that does not count is further from the reference than an exponential can say."""
    args = flags(advantage_estimator="grpo", use_kl_loss=True, kl_loss_coef=0.1, **changed)
    log_probs = torch.tensor([-2.0, -300.0, -2.0])
    batch = MicroBatch(
        tokens=torch.tensor([1, 2, 4, 3, 5]),
        position_ids=torch.arange(5),
        cu_seqlens=torch.tensor([0, 5], dtype=torch.int32),
        total_lengths=[5],
        response_lengths=[3],
        loss_masks=[torch.tensor([1.0, 0.0, 1.0])],
        sample_positions=[0],
        columns={"advantages": [torch.ones(3)], "log_probs": [log_probs], "ref_log_probs": [torch.full((3,), -2.0)]},
    )
    logits = torch.zeros(5, 8)
    logits[2, 3] = -200.0
    logits.requires_grad_()
    output = Losses(args, ParallelState()).for_step(StepPlan([[0]], 1, 2.0))(logits, batch)
    output.loss.backward()
    assert output.loss.isfinite()
    assert logits.grad.isfinite().all()
