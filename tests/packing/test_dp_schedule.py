"""Every sample exactly once, no micro-batch over budget, all ranks in step: for any rollout and any parallel sizes."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from miles.utils.dp_schedule import (
    BadBatchSizes,
    ScheduleConfig,
    build_dp_schedule,
    build_forward_schedule,
    has_full_schedule_config,
)
from miles.utils.seqlen_balancing import first_fit_decreasing_pack
from miles.utils.train_data import split_train_data

TINY = {
    "hidden_size": 8,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 16,
    "vocab_size": 32,
}


def flags(**changed):
    return SimpleNamespace(
        **{"use_dynamic_batch_size": True, "max_tokens_per_gpu": 64, "micro_batch_size": 2, "balance_data": False}
        | changed
    )


@st.composite
def rollouts(draw):
    """Lengths of samples, rollout ids (some shared), and rollouts per step."""
    sizes = draw(st.lists(st.integers(1, 3), min_size=1, max_size=24))
    ids = [rollout for rollout, size in enumerate(sizes) for _ in range(size)]
    lengths = draw(st.lists(st.integers(1, 90), min_size=len(ids), max_size=len(ids)))
    return lengths, ids, draw(st.integers(1, len(sizes)))


configs = st.builds(
    ScheduleConfig,
    dp_size=st.integers(1, 5),
    cp_size=st.sampled_from([1, 2]),
    vpp_size=st.sampled_from([1, 2]),
    microbatch_group_size_per_vp_stage=st.integers(1, 3),
)
any_flags = st.builds(
    flags,
    use_dynamic_batch_size=st.booleans(),
    max_tokens_per_gpu=st.integers(1, 100),
    micro_batch_size=st.integers(1, 5),
    balance_data=st.booleans(),
    qkv_format=st.sampled_from(["thd", "bshd"]),
)


@given(rollouts(), configs, any_flags, st.booleans())
def test_every_step_has_each_of_its_samples_once_in_equal_numbers_of_micro_batches(rollout, cfg, args, by_cost):
    lengths, ids, per_step = rollout
    weights = [float(length**2) for length in lengths] if by_cost else None
    schedule = build_dp_schedule(args, cfg, lengths, global_batch_size=per_step, rollout_indices=ids, weights=weights)

    num_steps = max(ids) // per_step + 1 if (max(ids) + 1) % per_step == 0 else (max(ids) + 1) // per_step
    assert len(schedule.num_microbatches) == num_steps
    assert schedule.num_rollouts == [per_step] * num_steps
    assert {len(mine) for mine in schedule.micro_batch_indices} == {sum(schedule.num_microbatches)}
    assert all(count % cfg.group == 0 for count in schedule.num_microbatches)
    first = 0
    for step, count in enumerate(schedule.num_microbatches):
        trained = [
            schedule.partitions[rank][i]
            for rank in range(cfg.dp_size)
            for micro_batch in schedule.micro_batch_indices[rank][first : first + count]
            for i in micro_batch
        ]
        wanted = [i for i, rollout_id in enumerate(ids) if rollout_id // per_step == step]
        assert sorted(trained) == wanted
        first += count
    kept = [i for partition in schedule.partitions for i in partition]
    assert sorted(kept + schedule.dropped) == list(range(len(ids)))


@given(rollouts(), configs, any_flags)
def test_no_micro_batch_is_larger_than_allowed_unless_it_is_one_sample(rollout, cfg, args):
    lengths, ids, per_step = rollout
    schedule = build_dp_schedule(args, cfg, lengths, global_batch_size=per_step, rollout_indices=ids)
    for partition, micro_batches in zip(schedule.partitions, schedule.micro_batch_indices, strict=True):
        for micro_batch in micro_batches:
            tokens = sum(lengths[partition[i]] for i in micro_batch)
            if args.use_dynamic_batch_size:
                assert len(micro_batch) <= 1 or tokens <= args.max_tokens_per_gpu * cfg.cp_size
            else:
                assert len(micro_batch) <= args.micro_batch_size


@example(([1, 1, 1, 3], [0, 1, 1, 1], 2), ScheduleConfig(2), flags(balance_data=True, max_tokens_per_gpu=2))
@given(rollouts(), configs, any_flags)
def test_a_micro_batch_is_empty_only_where_a_step_has_fewer_samples_than_micro_batches(rollout, cfg, args):
    lengths, ids, per_step = rollout
    schedule = build_dp_schedule(args, cfg, lengths, global_batch_size=per_step, rollout_indices=ids)
    first = 0
    for count in schedule.num_microbatches:
        step = [m for mine in schedule.micro_batch_indices for m in mine[first : first + count]]
        assert all(step) or max(map(len, step)) == 1
        first += count


@given(
    st.lists(st.lists(st.integers(1, 50), max_size=12), min_size=1, max_size=4), st.integers(1, 80), st.integers(1, 3)
)
def test_forward_passes_have_each_sample_once_and_ranks_in_step(lengths, budget, group):
    schedule = build_forward_schedule(lengths, budget, group)
    assert len({len(mine) for mine in schedule}) == 1
    assert len(schedule[0]) % group == 0
    for own, mine in zip(lengths, schedule, strict=True):
        assert sorted(i for micro_batch in mine for i in micro_batch) == list(range(len(own)))
        assert all(len(m) <= 1 or sum(own[i] for i in m) <= budget for m in mine)


def test_forward_passes_take_the_micro_batches_of_training_unless_fewer_would_do():
    lengths = [[6, 4, 5, 5], [9, 9]]
    training = [[[0, 2], [1, 3]], [[0], [1]]]
    assert build_forward_schedule(lengths, 11, like=training) == training
    assert build_forward_schedule(lengths, 10, like=training) == [[[0, 1], [2, 3]], [[0], [1]]]  # 11 would be too many
    assert build_forward_schedule(lengths, 20, like=training) == [[[0, 1, 2, 3]], [[0, 1]]]


def test_rollouts_that_do_not_fill_a_step_are_named():
    schedule = build_dp_schedule(
        flags(), ScheduleConfig(dp_size=1), [5] * 5, global_batch_size=2, rollout_indices=[0, 1, 2, 3, 4]
    )
    assert schedule.num_rollouts == [2, 2]
    assert schedule.dropped == [4]


def test_a_smaller_last_step_is_made_on_request():
    args = flags(allow_partial_train_step=True)
    schedule = build_dp_schedule(
        args, ScheduleConfig(dp_size=2), [5] * 5, global_batch_size=2, rollout_indices=[0, 1, 2, 3, 4]
    )
    assert schedule.num_rollouts == [2, 2, 1]
    assert schedule.dropped == []


def test_too_few_rollouts_are_refused():
    with pytest.raises(BadBatchSizes, match="3 rollouts do not make an optimizer step of 4"):
        build_dp_schedule(flags(), ScheduleConfig(1), [5] * 3, global_batch_size=4, rollout_indices=[0, 1, 2])


def test_dynamic_batches_without_a_budget_are_refused():
    with pytest.raises(BadBatchSizes, match="token budget"):
        build_dp_schedule(
            flags(max_tokens_per_gpu=None), ScheduleConfig(1), [5], global_batch_size=1, rollout_indices=[0]
        )


def test_balancing_makes_ranks_even():
    lengths = [60, 50, 40, 30, 5, 5, 5, 5]
    spread = {}
    for balance in (False, True):
        schedule = build_dp_schedule(
            flags(balance_data=balance, use_dynamic_batch_size=False, micro_batch_size=1),
            ScheduleConfig(dp_size=2),
            lengths,
            global_batch_size=8,
            rollout_indices=list(range(8)),
        )
        sums = [sum(lengths[i] for i in partition) for partition in schedule.partitions]
        spread[balance] = max(sums) - min(sums)
    assert spread == {False: 20, True: 0}


@given(rollouts(), configs, any_flags, st.booleans())
def test_the_same_rollout_gets_the_same_schedule(rollout, cfg, args, by_cost):
    lengths, ids, per_step = rollout
    weights = [float(length**2) for length in lengths] if by_cost else None
    first, second = (
        build_dp_schedule(args, cfg, given, global_batch_size=per_step, rollout_indices=ids, weights=weights)
        for given in (lengths, np.array(lengths, np.int32))
    )
    assert first == second


@given(rollouts(), configs, any_flags)
def test_micro_batches_are_never_more_than_first_fit_needs(rollout, cfg, args):
    lengths, ids, per_step = rollout
    args.use_dynamic_batch_size = True
    capacity = args.max_tokens_per_gpu * cfg.cp_size
    schedule = build_dp_schedule(args, cfg, lengths, global_batch_size=per_step, rollout_indices=ids)
    for step, count in enumerate(schedule.num_microbatches):
        mine = [length for length, rollout_id in zip(lengths, ids, strict=True) if rollout_id // per_step == step]
        first_fit = len(first_fit_decreasing_pack(mine, capacity))
        align = cfg.dp_size * cfg.group
        assert count * cfg.dp_size <= -(-first_fit // align) * align


@settings(max_examples=300)
@given(rollouts(), configs, st.integers(1, 100))
def test_balanced_ranks_are_no_less_even_than_ranks_that_are_dealt_in_turn(rollout, cfg, budget):
    lengths, ids, _ = rollout

    def heaviest(balance):
        args = flags(balance_data=balance, max_tokens_per_gpu=budget)
        schedule = build_dp_schedule(args, cfg, lengths, global_batch_size=max(ids) + 1, rollout_indices=ids)
        return max(sum(lengths[i] for i in partition) for partition in schedule.partitions)

    assert heaviest(True) <= heaviest(False)


def test_ranks_that_are_balanced_have_their_heavy_micro_batches_at_the_same_time():
    lengths = [60, 5, 50, 40, 30, 20, 7, 3]
    schedule = build_dp_schedule(
        flags(balance_data=True, max_tokens_per_gpu=60),
        ScheduleConfig(dp_size=2),
        lengths,
        global_batch_size=8,
        rollout_indices=list(range(8)),
    )
    for partition, micro_batches in zip(schedule.partitions, schedule.micro_batch_indices, strict=True):
        sums = [sum(lengths[partition[i]] for i in micro_batch) for micro_batch in micro_batches]
        assert sums == sorted(sums, reverse=True)


def test_static_micro_batches_are_even_when_balanced_and_consecutive_else():
    lengths = [9, 8, 7, 6, 5, 4, 3, 2]
    found = {}
    for balance in (False, True):
        schedule = build_dp_schedule(
            flags(balance_data=balance, use_dynamic_batch_size=False, micro_batch_size=2),
            ScheduleConfig(dp_size=2),
            lengths,
            global_batch_size=8,
            rollout_indices=list(range(8)),
        )
        found[balance] = sorted(
            sorted(partition[i] for i in micro_batch)
            for partition, micro_batches in zip(schedule.partitions, schedule.micro_batch_indices, strict=True)
            for micro_batch in micro_batches
        )
    assert found[False] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert [sum(lengths[i] for i in micro_batch) for micro_batch in found[True]] == [11] * 4


def test_samples_of_padded_micro_batches_are_alike_when_balanced():
    lengths = [9, 1, 8, 2, 9, 1, 8, 2]
    args = flags(balance_data=True, use_dynamic_batch_size=False, micro_batch_size=2)
    args.qkv_format = "bshd"
    schedule = build_dp_schedule(
        args, ScheduleConfig(dp_size=2), lengths, global_batch_size=8, rollout_indices=list(range(8))
    )
    by_rank = [
        [[lengths[partition[i]] for i in micro_batch] for micro_batch in micro_batches]
        for partition, micro_batches in zip(schedule.partitions, schedule.micro_batch_indices, strict=True)
    ]
    assert sorted(by_rank) == [[[8, 8], [2, 2]], [[9, 9], [1, 1]]]


@pytest.mark.parametrize(
    ("lengths", "costs", "budget", "ranks", "fullest"),
    [
        ([10, 10, 10, 10], [100.0, 1.0, 1.0, 98.0], 30, [100.0, 100.0], 30),
        ([10, 10, 10, 10], [100.0, 1.0, 1.0, 98.0], 20, [99.0, 101.0], 20),  # three together are over the budget
        ([20, 20, 20], [100.0, 50.0, 50.0], 30, [100.0, 100.0], 40),  # two micro-batches cannot keep to it
    ],
)
def test_costs_rule_within_the_token_budget_if_they_can(lengths, costs, budget, ranks, fullest):
    schedule = build_dp_schedule(
        flags(max_tokens_per_gpu=budget),
        ScheduleConfig(dp_size=2),
        lengths,
        global_batch_size=len(lengths),
        rollout_indices=list(range(len(lengths))),
        weights=costs,
    )
    assert sorted(sum(costs[i] for i in partition) for partition in schedule.partitions) == ranks
    assert max(len(m) * lengths[0] for mine in schedule.micro_batch_indices for m in mine) == fullest


def test_ranks_that_would_be_even_in_cost_are_not_taken_if_they_break_the_token_budget():
    """99 and 1 to one rank, 34, 33 and 33 to the other: but of these no two share a micro-batch, and each has two."""
    lengths, costs = [12, 12, 12, 12, 5], [99.0, 34.0, 33.0, 33.0, 1.0]
    schedule = build_dp_schedule(
        flags(max_tokens_per_gpu=20), ScheduleConfig(2), lengths, global_batch_size=5, rollout_indices=list(range(5)),
        weights=costs,
    )  # fmt: skip
    assert schedule.num_microbatches == [2]
    for partition, micro_batches in zip(schedule.partitions, schedule.micro_batch_indices, strict=True):
        assert max(sum(lengths[partition[i]] for i in micro_batch) for micro_batch in micro_batches) <= 20


@pytest.mark.parametrize(
    ("lengths", "budget", "dp_size", "heaviest"),
    [([39, 42, 41, 42, 38], 33, 2, 118), ([8, 10, 9, 8, 8, 10, 7, 4], 4, 3, 23)],
)
def test_ranks_that_are_even_when_dealt_in_turn_stay_so_when_balanced(lengths, budget, dp_size, heaviest):
    """Each sample is a micro-batch; what balances them finds 119 and 24."""
    count = len(lengths)
    for balance in (False, True):
        schedule = build_dp_schedule(
            flags(balance_data=balance, max_tokens_per_gpu=budget), ScheduleConfig(dp_size), lengths,
            global_batch_size=count, rollout_indices=list(range(count)),
        )  # fmt: skip
        assert max(sum(lengths[i] for i in partition) for partition in schedule.partitions) == heaviest


def test_one_giant_has_a_rank_that_is_otherwise_nearly_idle():
    lengths = [98, 1, 1, *[10] * 30]
    schedule = build_dp_schedule(
        flags(balance_data=True, max_tokens_per_gpu=40),
        ScheduleConfig(dp_size=4),
        lengths,
        global_batch_size=33,
        rollout_indices=list(range(33)),
    )
    assert sorted(sum(lengths[i] for i in partition) for partition in schedule.partitions) == [100, 100, 100, 100]
    assert schedule.num_microbatches == [3]


def test_a_schedule_unpacks_and_takes_sizes_as_a_mapping():
    sizes = {"dp_size": 2, "cp_size": 1, "vpp_size": None, "microbatch_group_size_per_vp_stage": 4}
    assert has_full_schedule_config(sizes)
    assert not has_full_schedule_config({"dp_size": 2})
    assert not has_full_schedule_config(None)
    schedule = build_dp_schedule(flags(), sizes, [5] * 4, global_batch_size=2, rollout_indices=[0, 1, 2, 3])
    partitions, micro_batches, counts, num_rollouts = schedule
    assert sorted(partitions[0] + partitions[1]) == [0, 1, 2, 3]
    assert counts == [1, 1]
    assert num_rollouts == [2, 2]
    assert micro_batches == [[[0], [1]], [[0], [1]]]


def train_data(lengths, ids):
    """What a rollout is converted to: each response is half of its sample, every third of its tokens masked."""
    responses = [length // 2 for length in lengths]
    return {
        "tokens": [list(range(length)) for length in lengths],
        "response_lengths": responses,
        "loss_masks": [[int(i % 3 != 0) for i in range(response)] for response in responses],
        "rewards": [float(i) for i in range(len(lengths))],
        "rollout_ids": ids,
    }


def weight_in_the_gradient(args, lengths, ids):
    """By sample: its step, what the step's loss is divided by, and what is divided by its own mask."""
    found = {}
    for part in split_train_data(args, train_data(lengths, ids)):
        for number, step in enumerate(part["steps"]):
            for i in (i for micro_batch in step["micro_batches"] for i in micro_batch):
                place = int(part["partition"][i])
                assert place not in found
                found[place] = (
                    number,
                    step["num_rollouts"],
                    step["num_tokens"],
                    float(part["per_sample"]["rollout_mask_sums"][i]),
                    float(part["per_sample"]["rewards"][i]),
                )
    return found


@given(rollouts(), st.integers(1, 4), any_flags, st.booleans())
def test_no_schedule_changes_what_a_sample_weighs_in_the_gradient(rollout, dp_size, args, by_flops):
    lengths, ids, per_step = rollout
    common = {"global_batch_size": per_step, "log_probs_max_tokens_per_gpu": None, "hf_config": TINY}
    plain = flags(dp_size=1, use_dynamic_batch_size=False, micro_batch_size=1, balance_by_flops=False, **common)
    args = SimpleNamespace(**vars(args), dp_size=dp_size, balance_by_flops=by_flops, **common)
    assert weight_in_the_gradient(args, lengths, ids) == weight_in_the_gradient(plain, lengths, ids)
