"""Train data is cut into parts that hold every sample once, travel, and come back as they were."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.plain_losses import random_train_data

from miles.backends.training_utils.data import RankData, response_rows
from miles.utils.train_data import BadTrainData, split_train_data
from miles_agents.wire.codec import decode, encode

CPU = torch.device("cpu")


def flags(**changed):
    given_ = {
        "dp_size": 2,
        "global_batch_size": 2,
        "use_dynamic_batch_size": True,
        "max_tokens_per_gpu": 40,
        "micro_batch_size": 1,
        "balance_data": False,
    }
    return SimpleNamespace(**given_ | changed)


@st.composite
def train_data(draw, min_samples=2):
    """As a conversion returns it, with columns of all kinds."""
    count = draw(st.integers(min_samples, 10))
    prompts = draw(st.lists(st.integers(1, 9), min_size=count, max_size=count))
    responses = draw(st.lists(st.integers(0, 9), min_size=count, max_size=count))
    numbers = st.integers(0, 1000)
    return {
        "tokens": [
            draw(st.lists(numbers, min_size=p + r, max_size=p + r)) for p, r in zip(prompts, responses, strict=True)
        ],
        "response_lengths": responses,
        "loss_masks": [draw(st.lists(st.integers(0, 1), min_size=r, max_size=r)) for r in responses],
        "rollout_log_probs": [[-0.25 * i for i in range(r)] for r in responses],
        "rewards": [0.5 * i for i in range(count)],
        "raw_reward": list(range(count)),
        "truncated": [False] * count,
        "rollout_ids": list(range(count)),
        "weight_versions": [["1"] * (i % 2) for i in range(count)],
        "round_number": 7,
    }


@given(train_data(), st.integers(1, 4), st.booleans(), st.booleans())
def test_parts_travel_and_hold_every_sample_as_it_was(data, dp_size, dynamic, balance):
    args = flags(dp_size=dp_size, use_dynamic_batch_size=dynamic, balance_data=balance)
    seen = []
    for part in split_train_data(args, data):
        rank = RankData.from_wire(decode(*encode(part), libraries="import"))
        assert rank.shared == {"round_number": 7}
        for local, place in enumerate(rank.partition):
            seen.append(place)
            assert rank.tokens[local].tolist() == data["tokens"][place]
            assert rank.loss_masks[local].tolist() == data["loss_masks"][place]
            assert rank.columns["rollout_log_probs"][local].tolist() == data["rollout_log_probs"][place]
            for name in ("rewards", "raw_reward", "truncated", "rollout_ids", "weight_versions"):
                assert rank.columns[name][local] == data[name][place]
    num_steps = len(data["tokens"]) // 2
    assert sorted(seen) == list(range(num_steps * 2))


@given(train_data(), st.integers(1, 3))
def test_all_ranks_know_what_a_step_is_divided_by(data, dp_size):
    parts = split_train_data(flags(dp_size=dp_size), data)
    steps = [[(step["num_rollouts"], step["num_tokens"]) for step in part["steps"]] for part in parts]
    assert all(own == steps[0] for own in steps)
    trained = [max(sum(mask), 1) for mask in data["loss_masks"]]
    assert steps[0] == [(2, float(sum(trained[i : i + 2]))) for i in range(0, len(trained) - 1, 2)]


def test_siblings_share_their_mask_total():
    data = {
        "tokens": [[1, 2, 3], [1, 2, 3, 4], [1, 2]],
        "response_lengths": [2, 3, 1],
        "loss_masks": [[1, 1], [1, 0, 1], [1]],
        "rollout_ids": [5, 5, 6],
    }
    (part,) = split_train_data(flags(dp_size=1), data)
    by_place = dict(zip(part["partition"].tolist(), part["per_sample"]["rollout_mask_sums"].tolist(), strict=True))
    assert by_place == {0: 4.0, 1: 4.0, 2: 1.0}


def test_masks_that_are_not_whole_numbers_survive():
    data = {"tokens": [[1, 2, 3]], "response_lengths": [2], "loss_masks": [[0.5, 1.0]]}
    (part,) = split_train_data(flags(dp_size=1, global_batch_size=1), data)
    assert RankData.from_wire(part).loss_masks[0].tolist() == [0.5, 1.0]


def test_whole_numbers_of_tokens_stay_what_they_are():
    large = 2**53 + 1  # no float holds it
    data = GOOD | {"ids": [[large, 1], [-2]], "kinds": [np.array([True, False]), np.array([True])]}
    data |= {"mixed": [[1, 2], [0.5]], "rollout_log_probs": [[-1, -2], [0]]}
    (part,) = split_train_data(flags(dp_size=1), data)
    assert {name: values.dtype for name, values in part["per_token"].items()} == {
        "ids": np.int64, "kinds": np.int64, "mixed": np.float32, "rollout_log_probs": np.float32,
    }  # fmt: skip
    columns = RankData.from_wire(part).columns
    first = part["partition"].tolist().index(0)
    assert columns["ids"][first].tolist() == [large, 1]
    assert columns["kinds"][first].tolist() == [1, 0]


def test_whole_numbers_of_samples_do_not_wrap():
    (part,) = split_train_data(flags(dp_size=1), GOOD | {"small": [2**62, 1], "large": [2**63, 1]})
    assert sorted(part["per_sample"]["small"].tolist()) == [1, 2**62]
    assert sorted(part["per_sample"]["large"].tolist()) == [1.0, 2.0**63]


def test_responses_without_tokens_do_not_make_whole_numbers_of_the_others():
    data = {"tokens": [[1], [1, 2]], "response_lengths": [0, 1], "loss_masks": [[], [1]]}
    for values, dtype in (([[], [7]], np.int64), ([[], [0.5]], np.float32)):
        (part,) = split_train_data(flags(dp_size=1), data | {"x": values})
        assert part["per_token"]["x"].dtype == dtype
        assert part["per_token"]["x"].tolist() == values[1]


def test_what_is_no_list_goes_to_all_ranks():
    shared = {"number": 7, "name": "a", "table": {"rows": [1, 2, 3]}, "scale": np.array(0.5)}
    for part in split_train_data(flags(), GOOD | shared):
        assert part["shared"] == shared


def test_a_dynamic_batch_size_overrules_the_flag():
    data = {
        "tokens": [[1, 2]] * 3, "response_lengths": [1] * 3, "loss_masks": [[1]] * 3, "dynamic_global_batch_size": 3,
    }  # fmt: skip
    (part,) = split_train_data(flags(dp_size=1), data)
    assert [step["num_rollouts"] for step in part["steps"]] == [3]


GOOD = {"tokens": [[1, 2, 3], [4, 5]], "response_lengths": [2, 1], "loss_masks": [[1, 1], [1]]}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"loss_masks": [[1], [1]]}, "loss_masks of sample 0 does not fit"),
        ({"response_lengths": [3, 1], "loss_masks": [[1] * 3, [1]]}, "a prompt token is needed"),
        ({"rollout_log_probs": [[-1.0, -1.0], [-1.0, -2.0]]}, "rollout_log_probs of sample 1"),
        ({"rollout_log_probs": [[-1.0, -1.0], None]}, "only some samples have rollout_log_probs"),
        ({"response_lengths": [2]}, "differ in length"),
        ({"rewards": [1.0]}, "rewards has 1 entries for 2 samples"),
        ({"rewards": np.ones(3)}, "rewards has 3 entries for 2 samples"),
        ({"metadata": []}, "metadata has 0 entries for 2 samples"),
        ({"loss_masks": [[1, 1], [256]]}, "loss_masks of sample 1 holds what is no number from 0 to 1"),
        ({"loss_masks": [[1, -1], [1]]}, "loss_masks of sample 0 holds"),
        ({"loss_masks": [[1, float("nan")], [1]]}, "loss_masks of sample 0 holds"),
        ({"loss_masks": [[1, 1], [1.5]]}, "loss_masks of sample 1 holds"),
        ({"loss_masks": [[1, None], [1]]}, "loss_masks of sample 0 holds"),
        ({"loss_masks": [[[1], [1]], [1]]}, "loss_masks of sample 0 holds"),
    ],
)
def test_what_does_not_fit_is_named(changed, words):
    with pytest.raises(BadTrainData) as caught:
        split_train_data(flags(dp_size=1), GOOD | changed)
    assert words in str(caught.value)


def test_a_missing_list_is_named():
    with pytest.raises(BadTrainData, match="no loss_masks"):
        split_train_data(flags(dp_size=1), {"tokens": [[1]], "response_lengths": [0]})


def test_a_micro_batch_is_packed_and_its_rows_predict_the_responses():
    (part,) = split_train_data(flags(dp_size=1), GOOD)
    rank = RankData.from_wire(part)
    batch = rank.micro_batch([1, 0] if rank.partition == [0, 1] else [0, 1], CPU)
    assert batch.tokens.tolist() == [4, 5, 1, 2, 3]
    assert batch.position_ids.tolist() == [0, 1, 0, 1, 2]
    assert batch.cu_seqlens.tolist() == [0, 2, 5]
    rows, targets = response_rows(batch)
    assert rows.tolist() == [0, 2, 3]
    assert targets.tolist() == [5, 2, 3]


def test_an_empty_micro_batch_predicts_nothing():
    (part,) = split_train_data(flags(dp_size=1), GOOD)
    batch = RankData.from_wire(part).micro_batch([], CPU)
    rows, targets = response_rows(batch)
    assert batch.tokens.shape == (1,)
    assert rows.numel() == targets.numel() == 0


def test_parts_are_compact():
    tokens = [list(range(100))] * 8
    data = {"tokens": tokens, "response_lengths": [50] * 8, "loss_masks": [[1] * 50] * 8}
    (part,) = split_train_data(flags(dp_size=1, max_tokens_per_gpu=100), data)
    assert part["tokens"].dtype == np.int32
    assert part["tokens"].shape == (800,)
    assert part["loss_masks"].dtype == np.int8


class TestRoutedExperts:
    """``[T_i - 1, layers, k]`` of each sample travel with it."""

    ARGS = {"use_rollout_routing_replay": True}

    def data(self):
        data = random_train_data(3)
        rows = [len(tokens) - 1 for tokens in data["tokens"]]
        experts = [np.full((n, 3, 2), i, np.int32) for i, n in enumerate(rows)]
        return data | {"rollout_routed_experts": experts}

    def test_each_rank_gets_those_of_its_samples(self):
        for part in split_train_data(flags(dp_size=2, **self.ARGS), self.data()):
            data = RankData.from_wire(part)
            assert part["routed_experts"].dtype == np.int32
            for place, tokens, experts in zip(data.partition, data.tokens, data.routed_experts, strict=True):
                assert experts.shape == (len(tokens) - 1, 3, 2) and (experts == place).all()
            seen = data.as_dict()
            assert [len(e) for e in seen["rollout_routed_experts"]] == [len(t) - 1 for t in data.tokens]
            data.take_over(seen)

    def test_a_sample_without_any_is_routed_by_the_trainer(self):
        data = self.data()
        data["rollout_routed_experts"][2] = None
        parts = [RankData.from_wire(part) for part in split_train_data(flags(dp_size=1, **self.ARGS), data)]
        at = parts[0].partition.index(2)
        assert (parts[0].routed_experts[at] == -1).all()
        assert len(parts[0].routed_experts[at]) == len(data["tokens"][2]) - 1

    def test_a_run_that_replays_none_carries_none(self):
        assert "routed_experts" not in split_train_data(flags(), self.data())[0]
        assert "rollout_routed_experts" not in split_train_data(flags(), self.data())[0]["objects"]

    @pytest.mark.parametrize("bad", ["rows", "layers", "kind"])
    def test_those_of_another_shape_are_refused(self, bad):
        data = self.data()
        value = data["rollout_routed_experts"][1]
        changed = {"rows": value[:-1], "layers": value[:, :2], "kind": value.astype(np.float32)}[bad]
        data["rollout_routed_experts"][1] = changed
        with pytest.raises(BadTrainData, match="rollout_routed_experts of sample 1"):
            split_train_data(flags(**self.ARGS), data)
