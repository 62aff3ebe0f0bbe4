"""``--keep-old-actor`` and ``--ref-update-interval`` on both backends: which weights a log-prob is of, by a plain
implementation on Hugging Face models that are given the weights of that moment."""

import itertools
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from support.hf_reference import load_hf_model
from support.plain_losses import plain_log_probs, plain_loss
from support.ranks import RanksFailed, run_ranks
from support.tiny_models import tiny_model
from support.trained_rollouts import args_of, backend_of, data_of

from miles.backends.training_utils.checkpoints import commit_checkpoint
from miles.backends.training_utils.data import RankData
from miles.backends.training_utils.old_weights import OldWeights
from miles.backends.training_utils.rollout_trainer import RolloutTrainer
from miles.backends.training_utils.timers import Timers
from miles.utils.train_data import split_train_data

LAYOUTS = [
    ("megatron", 1, 1),
    ("fsdp", 2, 1),
    pytest.param("megatron", 2, 1, marks=pytest.mark.long),
    pytest.param("megatron", 2, 2, marks=pytest.mark.full),
    pytest.param("fsdp", 1, 1, marks=pytest.mark.long),
]
KEPT = {"keep_old_actor": True, "train_async": True, "use_kl_loss": False}
MADE_BY = [[["1"]] * 8, [["1"], ["2"]] * 4, [["2"], ["2", "3"]] * 4]
"""Of each rollout's samples: the versions that engines reported."""


class Counting:
    """A backend that says how often each sample went through its passes without gradient."""

    def __init__(self, backend):
        self.backend, self.passes, self.num_batches = backend, Counter(), 0

    def __getattr__(self, name):
        return getattr(self.backend, name)

    def forward_only(self, batches, function, **model):
        self.passes.update(place for batch in batches for place in batch.sample_positions)
        self.num_batches += len(batches)
        return self.backend.forward_only(batches, function, **model)


class Run:
    """A trainer's rank, without engines: what it computes goes to files."""

    def __init__(self, path, kind, root, **flags):
        self.args = args_of(path, kind, save_debug_train_data=f"{root}/{{rollout_id}}_{{rank}}.pt", **flags)
        self.backend = backend_of(kind, self.args)
        self.start = self.backend.init()
        self.counting = Counting(self.backend)
        self.trainer = RolloutTrainer(self.args, self.counting, Timers(self.backend.device))
        self.root = root

    def weights(self):
        return {name: tensor.clone() for name, tensor in self.backend.hf_weights()}

    def train(self, rollout_id, made_by=None):
        """Metrics, and the columns that the rollout was trained with, by sample."""
        data = data_of(rollout_id) | ({} if made_by is None else {"weight_versions": made_by})
        parts = split_train_data(self.args, data)
        rank = self.backend.parallel.rank
        metrics = self.trainer.train(rollout_id, lambda: parts[self.backend.parallel.dp_rank])
        columns = torch.load(f"{self.root}/{rollout_id}_{rank}.pt")["rollout_data"]
        return metrics, columns


def by_sample(found, name):
    """Of all ranks' columns together."""
    columns = [columns for _, columns in found]
    return {place: c[name][i].tolist() for c in columns for i, place in enumerate(c["partition"])}


def kept(path, kind, root, sizes):
    run = Run(path, kind, root, **KEPT, **sizes, offload_train_target="disk", offload_train_disk_dir=f"{root}/asleep")
    old, weights, found = run.trainer.old_weights, {}, []
    for rollout_id, made_by in enumerate(MADE_BY):
        version = rollout_id + 1
        old.keep(version)
        weights[version] = run.weights()
        run.counting.passes.clear()
        found.append(run.train(rollout_id, made_by))
        # Weights of a version are for its own samples.
        assert set(run.counting.passes.values()) == {1}
        run.backend.sleep(2)
        old.sleep(2)
        run.backend.wake_up()
    old.keep(4)
    left = old.versions
    before = {name: tensor.clone() for name, tensor in run.weights().items()}
    with old.in_place(2):
        restored = all(torch.equal(tensor, weights[2][name]) for name, tensor in run.weights().items())
    same = all(torch.equal(tensor, before[name]) for name, tensor in run.weights().items())
    old.close()
    run.backend.close()
    return found, weights, left, restored and same


def expected(path, weights, changed):
    """Log-probs of each rollout's samples by the version that made them, and the first step's loss."""
    args, rollouts = args_of(path, "fsdp", **changed), []

    def of(version, data):
        module = load_hf_model(path)
        module.load_state_dict(weights[version], strict=False)
        return module, plain_log_probs(args, lambda tokens: module(tokens[None]).logits[0].float(), data)

    for rollout_id, made_by in enumerate(MADE_BY):
        data = data_of(rollout_id)
        found = {version: of(version, data)[1] for version in {int(said[-1]) for said in made_by}}
        own, _ = of(rollout_id + 1, data)
        data["log_probs"] = [found[int(said[-1])][i] for i, said in enumerate(made_by)]
        data["ref_log_probs"] = data["log_probs"]
        model = lambda tokens, own=own: own(tokens[None]).logits[0].float()  # noqa: E731
        rollouts.append((data["log_probs"], float(plain_loss(args, model, data, range(4))["ppo_kl"].detach())))
    return rollouts


@pytest.mark.parametrize(("kind", "world", "tp"), LAYOUTS)
def test_old_log_probs_are_those_of_the_weights_that_generated(kind, world, tp, tmp_path):
    path = tiny_model("qwen3")
    sizes = {"dp_size": world // tp, "tensor_model_parallel_size": tp}
    ranks = run_ranks(world, kept, path, kind, tmp_path, sizes)
    wanted = run_ranks(1, expected, path, ranks[0][1], KEPT, distributed=False)[0]
    for rollout_id, (log_probs, _) in enumerate(wanted):
        found = by_sample([rank[0][rollout_id] for rank in ranks], "log_probs")
        for place, values in enumerate(log_probs):
            torch.testing.assert_close(torch.tensor(found[place]), torch.tensor(values), atol=2e-5, rtol=0)
    # A ratio that is not 1 before anything was trained on: the actor is newer than what generated.
    assert abs(wanted[0][1]) < 1e-6 < min(abs(kl) for _, kl in wanted[1:])
    for _, _, left, restored in ranks:
        assert left == [2, 3, 4]
        assert restored


def one_step(path, kind, root, sizes):
    """Rollout 1 of ``MADE_BY`` as one step, whose loss must be that of the actor over the old weights."""
    run = Run(path, kind, root, **KEPT, **sizes, num_steps_per_rollout=1, global_batch_size=8)
    run.trainer.old_weights.keep(1)
    run.train(0, MADE_BY[0])
    run.trainer.old_weights.keep(2)
    weights = run.weights()
    metrics, columns = run.train(1, MADE_BY[1])
    run.backend.close()
    return metrics, columns, weights


def plain_step(path, weights, log_probs):
    args, data = args_of(path, "fsdp", **KEPT), data_of(1) | {"log_probs": log_probs, "ref_log_probs": log_probs}
    module = load_hf_model(path)
    module.load_state_dict(weights, strict=False)
    metrics = plain_loss(args, lambda tokens: module(tokens[None]).logits[0].float(), data, range(8))
    return {name: float(torch.as_tensor(value).detach()) for name, value in metrics.items()}


@pytest.mark.parametrize("kind", ["megatron", "fsdp"])
def test_the_loss_is_that_of_the_actor_over_them(kind, tmp_path):
    path = tiny_model("qwen3")
    metrics, columns, weights = run_ranks(1, one_step, path, kind, tmp_path, {"dp_size": 1})[0]
    log_probs = by_sample([(metrics, columns)], "log_probs")
    wanted = run_ranks(
        1, plain_step, path, weights, [log_probs[i] for i in range(8)], distributed=False
    )[0]  # fmt: skip
    for name in ("loss", "pg_loss", "ppo_kl", "pg_clipfrac"):
        assert metrics[f"train/{name}"] == pytest.approx(wanted[name], rel=1e-3, abs=1e-5), name


def unknown(made_by):
    """On two ranks: of the second one's samples it is not known, or not kept, what made them."""
    weights = [torch.ones(2)]
    old = OldWeights(lambda: weights, SimpleNamespace(train_async=False), torch.device("cpu"))
    for version in (1, 2, 3):
        old.keep(version)
    row = np.zeros(2, np.int64)
    columns = {"weight_versions": [["3"], made_by if dist.get_rank() else ["2"]]}
    data = RankData([row, row], [1, 1], [torch.ones(1), torch.ones(1)], columns, {}, [0, 1], [], [])
    old.by_version(data)


@pytest.mark.parametrize(("made_by", "told"), [([], "not known"), (["1"], "version 1"), (["default"], "not known")])
def test_all_ranks_say_whose_weights_are_missing(made_by, told):
    with pytest.raises(RanksFailed, match="E-TRAIN-031") as failed:
        run_ranks(2, unknown, made_by)
    assert told in str(failed.value)


def split_unevenly(made_by):
    """On two ranks with a sample per micro-batch: how many micro-batches each version gets, and of which samples."""
    weights = [torch.ones(2)]
    old = OldWeights(lambda: weights, SimpleNamespace(train_async=False), torch.device("cpu"))
    for version in (1, 2):
        old.keep(version)
    said = [[version] for version in made_by[dist.get_rank()]]
    row, count = np.zeros(2, np.int64), len(said)
    forward = [[i] for i in range(count)]
    data = RankData(
        [row] * count, [1] * count, [torch.ones(1)] * count, {"weight_versions": said}, {}, list(range(count)),
        [], forward,
    )  # fmt: skip
    return old.by_version(data)


def test_ranks_have_as_many_micro_batches_of_each_version():
    ranks = run_ranks(2, split_unevenly, [["1", "2", "1", "1"], ["2", "2", "2", "2"]])
    assert ranks == [{1: [[0], [2], [3]], 2: [[1], [], [], []]}, {1: [[], [], []], 2: [[0], [1], [2], [3]]}]


LENGTHS = st.lists(st.lists(st.integers(2, 30), min_size=1, max_size=4), min_size=1, max_size=6)


@given(LENGTHS, st.data())
@settings(deadline=None)
def test_some_samples_are_packed_within_what_all_needed(lengths, draw):
    numbers = itertools.count()
    forward = [[next(numbers) for _ in batch] for batch in lengths]
    tokens = [torch.zeros(length, dtype=torch.int32) for batch in lengths for length in batch]
    count = len(tokens)
    data = RankData(tokens, [1] * count, [torch.ones(1)] * count, {}, {}, list(range(count)), [], forward)
    wanted = draw.draw(st.sets(st.integers(0, count - 1)))
    packed = data.packed(sorted(wanted))
    assert sorted(i for batch in packed for i in batch) == sorted(wanted)
    assert len(packed) <= sum(1 for batch in forward if wanted & set(batch))
    for batch in packed:
        assert 0 < sum(len(tokens[i]) for i in batch) <= max(map(sum, lengths))
        assert len(batch) <= max(map(len, lengths))


MOVES = {"ref_update_interval": 2, "kl_loss_coef": 0.5, "use_kl_loss": True, "optimizer": "adam", "lr": 1e-2}


def moving(path, kind, root, sizes, resume):
    """Four rollouts, or the last one alone from the checkpoint after the third."""
    flags = MOVES | sizes | {"load": str(root) if resume else None}
    run = Run(path, kind, root / ("resumed" if resume else "through"), **flags)
    found, weights = [], {0: run.weights()}
    for rollout_id in range(run.start, 4):
        found.append(run.train(rollout_id))
        weights[rollout_id + 1] = run.weights()
        if rollout_id == 2:
            commit_checkpoint(
                root, 2, lambda place: run.backend.save(place, rollout_id=2), run.backend.device
            )  # fmt: skip
    run.backend.close()
    return run.start, found, weights


def reference_log_probs(path, weights):
    args, found = args_of(path, "fsdp"), []
    for rollout_id, moment in enumerate((0, 0, 2, 2)):
        module = load_hf_model(path)
        module.load_state_dict(weights[moment], strict=False)
        model = lambda tokens, module=module: module(tokens[None]).logits[0].float()  # noqa: E731
        found.append(plain_log_probs(args, model, data_of(rollout_id)))
    return found


@pytest.mark.parametrize(("kind", "world", "tp"), LAYOUTS)
def test_the_reference_moves_every_so_many_rollouts_and_is_in_checkpoints(kind, world, tp, tmp_path):
    path = tiny_model("qwen3")
    sizes = {"dp_size": world // tp, "tensor_model_parallel_size": tp}
    through = run_ranks(world, moving, path, kind, tmp_path, sizes, False)
    wanted = run_ranks(1, reference_log_probs, path, through[0][2], distributed=False)[0]
    for rollout_id, values in enumerate(wanted):
        found = by_sample([rank[1][rollout_id] for rank in through], "ref_log_probs")
        for place, row in enumerate(values):
            torch.testing.assert_close(torch.tensor(found[place]), torch.tensor(row), atol=2e-5, rtol=0)
    for (_, before, weights), (start, after, finals) in zip(
        through, run_ranks(world, moving, path, kind, tmp_path, sizes, True), strict=True
    ):
        assert start == 3
        assert all(torch.equal(tensor, weights[4][name]) for name, tensor in finals[4].items())
        for one, other in itertools.zip_longest(before[3][1]["ref_log_probs"], after[0][1]["ref_log_probs"]):
            assert torch.equal(one, other)


def from_the_begin(path, kind, root):
    """The checkpoint of a run whose reference moved, gone on without that: the reference is --ref-load's again."""
    run = Run(path, kind, root / "again", **MOVES | {"ref_update_interval": None, "load": str(root), "dp_size": 1})
    _, columns = run.train(run.start)
    run.backend.close()
    return columns["ref_log_probs"], columns["partition"]


@pytest.mark.full
@pytest.mark.parametrize("kind", ["megatron", "fsdp"])
def test_without_the_flag_a_resumed_run_has_the_reference_of_the_begin(kind, tmp_path):
    path = tiny_model("qwen3")
    _, _, weights = run_ranks(1, moving, path, kind, tmp_path, {"dp_size": 1}, False)[0]
    found, partition = run_ranks(1, from_the_begin, path, kind, tmp_path)[0]
    wanted = run_ranks(1, reference_log_probs, path, {0: weights[0], 2: weights[0]}, distributed=False)[0][3]
    for place, values in zip(partition, found, strict=True):
        torch.testing.assert_close(values, torch.tensor(wanted[place]), atol=2e-5, rtol=0)
