"""Every sample exactly once, no micro-batch over budget, all ranks in step: for any rollout and any parallel sizes."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles.utils.dp_schedule import BadBatchSizes, ScheduleConfig, build_dp_schedule, build_forward_schedule
from miles.utils.seqlen_balancing import first_fit_decreasing, get_seqlen_balanced_partitions, split_in_two


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


@given(st.lists(st.integers(0, 100), min_size=1, max_size=40), st.integers(1, 8), st.booleans())
def test_balanced_partitions_have_every_item_once(weights, parts, equal):
    if len(weights) < parts or (equal and len(weights) % parts):
        with pytest.raises(ValueError, match="cannot be"):
            get_seqlen_balanced_partitions(weights, parts, equal)
        return
    found = get_seqlen_balanced_partitions(weights, parts, equal)
    assert len(found) == parts
    assert all(found)
    assert sorted(i for part in found for i in part) == list(range(len(weights)))
    if equal:
        assert len({len(part) for part in found}) == 1
    else:
        sums = [sum(weights[i] for i in part) for part in found]
        # A known bound of any such greedy method: nobody is ahead by more than the heaviest item.
        assert max(sums) - min(sums) <= max(weights) or min(map(len, found)) == 1


@given(st.lists(st.integers(1, 100), max_size=40), st.integers(1, 100))
def test_first_fit_uses_no_two_bins_where_one_would_do(lengths, capacity):
    bins = first_fit_decreasing(lengths, capacity)
    assert sorted(i for bin_ in bins for i in bin_) == list(range(len(lengths)))
    sums = [sum(lengths[i] for i in bin_) for bin_ in bins]
    assert all(total <= capacity or len(bin_) == 1 for total, bin_ in zip(sums, bins, strict=True))
    smallest = sorted(sums)[:2]
    assert len(smallest) < 2 or sum(smallest) > capacity


@given(st.lists(st.integers(0, 9), min_size=2, max_size=9))
def test_both_halves_get_something(weights):
    first, second = split_in_two(range(len(weights)), weights)
    assert first
    assert second
    assert sorted(first + second) == list(range(len(weights)))
