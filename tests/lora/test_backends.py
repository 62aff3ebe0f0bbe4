"""What else a backend does with adapters: how they begin, what they begin on, sleep, dropout, and what they refuse."""

import pytest
import torch
from safetensors.torch import load_file
from support.lora_cases import layers_of, lora_flags, write_adapter
from support.lora_runs import Run, two_checkpoints
from support.ranks import RanksFailed, run_ranks
from support.tiny_models import tiny_model

from miles.backends.lora.files import read_adapter as ours

pytestmark = pytest.mark.full
SP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}


def begun(path, kind, changed, out):
    run = Run(path, kind, changed)
    run.adapters.write(out)
    files = load_file(path / "model.safetensors")
    same = all(torch.equal(tensor, files[name]) for name, tensor in run.weights().items())
    return same, run.adapters.checksum


@pytest.mark.parametrize("lora_type", ["lora", pytest.param("canonical_lora", marks=pytest.mark.long)])
def test_fresh_adapters_change_nothing_and_are_the_same_in_every_layout(tmp_path, lora_type):
    path, changed = tiny_model("qwen3"), {"lora_type": lora_type}
    found = {}
    for name, kind, world, layout in (("fsdp", "fsdp", 2, {"dp_size": 2}), ("megatron", "megatron", 2, SP2)):
        answers = run_ranks(world, begun, path, kind, {**changed, **layout}, tmp_path / name)
        assert [same for same, _ in answers] == [True] * world
        found[name] = (ours(tmp_path / name)[1], {checksum for _, checksum in answers})
    pairs, other = found["fsdp"][0], found["megatron"][0]
    assert found["fsdp"][1] == found["megatron"][1]
    assert len(found["fsdp"][1]) == 1
    assert set(pairs) == set(other) == set(layers_of(path, [name.rpartition(".")[2] for name in pairs]))
    firsts = set()
    for name, (a, b) in pairs.items():
        assert torch.equal(a, other[name][0])
        assert torch.equal(b, other[name][1])
        assert not b.any()
        bound = a.shape[1] ** -0.5
        assert 0.8 * bound < float(a.abs().max()) <= bound
        firsts.add(float(a[0, 0]))
    assert len(firsts) == (2 * 4 if lora_type == "lora" else 2 * 7), "each matrix has numbers of its own"


def slept(path, kind, changed, directory):
    """Numbers after each level, and after waking and training on; beside a run that never sleeps."""
    target = {"offload_train_target": "disk", "offload_train_disk_dir": str(directory)}
    run = Run(path, kind, {**changed, **target})
    run.train([0])
    before = run.weights()
    run.backend.sleep(1)
    assert all(torch.equal(value, before[name]) for name, value in run.weights().items())
    run.backend.sleep(2)
    run.backend.wake_up()
    assert all(torch.equal(value, before[name]) for name, value in run.weights().items())
    run.train([1])
    return run.everything()


def awake(path, kind, changed):
    run = Run(path, kind, changed)
    run.train([0, 1])
    return run.everything()


@pytest.mark.parametrize(
    ("kind", "changed"),
    [("megatron", SP2), ("fsdp", {"dp_size": 2}), pytest.param("megatron", {"dp_size": 2}, marks=pytest.mark.long)],
)
def test_who_sleeps_wakes_up_as_it_was(tmp_path, kind, changed):
    path = tiny_model("qwen3")
    rested = run_ranks(2, slept, path, kind, changed, tmp_path)
    for found, expected in zip(rested, run_ranks(2, awake, path, kind, changed), strict=True):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(found[name], value), name


def dropped(path, kind, changed):
    """Whether passes without training drop nothing, training does, and ranks go on with the same adapters."""
    run = Run(path, kind, {**changed, "lora_dropout": 0.5})
    first = run.backend.forward_only(batches(), last_logit)
    again = run.backend.forward_only(batches(), last_logit)
    run.train([0])
    return first == again, run.weights()["model.layers.1.self_attn.o_proj.weight"], replicated(run)


def batches():
    from support.megatron_cases import micro_batches, sequences

    return micro_batches(sequences(2), 2)


def last_logit(logits, batch):
    return float(logits.double().sum())


def replicated(run):
    """Of a Megatron run: what all tensor-parallel ranks have."""
    if run.kind == "fsdp":
        return {}
    named = run.backend.model.module.named_parameters()
    return {
        name: p.detach().clone()
        for name, p in named
        if ".adapter." in name and not getattr(p, "tensor_model_parallel", False)
    }


@pytest.mark.parametrize(
    ("kind", "changed"),
    [
        ("megatron", SP2),
        pytest.param("fsdp", {"dp_size": 2}, marks=pytest.mark.long),
        pytest.param("megatron", {"tensor_model_parallel_size": 2}, marks=pytest.mark.long),
    ],
)
def test_dropout_is_of_training_alone_and_ranks_agree(kind, changed):
    path = tiny_model("qwen3")
    (same, weight, held), (_, other, held_too) = run_ranks(2, dropped, path, kind, changed)
    without = run_ranks(2, undropped, path, kind, changed)[0]
    assert same
    assert torch.equal(weight, other)
    assert not torch.equal(weight, without)
    assert held.keys() == held_too.keys()
    assert len(held) == (8 if kind == "megatron" else 0)
    assert all(torch.equal(value, held_too[name]) for name, value in held.items())


def undropped(path, kind, changed):
    run = Run(path, kind, changed)
    run.train([0])
    return run.weights()["model.layers.1.self_attn.o_proj.weight"]


def references(path, kind, other):
    """Which second models there are, and what the reference says with and without."""
    found = []
    for reference in (path, other):
        run = Run(path, kind, {"ref_load": str(reference), "load": str(path)})
        run.train([0])
        found.append((sorted(run.frozen), run.backend.forward_only(batches(), last_logit, model="ref")))
        run.backend.close()
    return found


@pytest.mark.parametrize("kind", ["megatron", "fsdp"])
def test_another_reference_is_a_second_model(kind):
    path, other = tiny_model("qwen3"), tiny_model("qwen3", seed=5)
    [(none, own), (one, theirs)] = run_ranks(1, references, path, kind, other)[0]
    assert (none, one) == ([], ["ref"])
    plain = run_ranks(1, said, path, kind)[0]
    torch.testing.assert_close(torch.tensor(own), torch.tensor(plain), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        torch.tensor(theirs), torch.tensor(run_ranks(1, said, other, kind)[0]), rtol=1e-6, atol=1e-6
    )


def on_the_newest(path, kind, root, step):
    """Adapters on a run's newest checkpoint; the reference is that of ``step``. Which second models there are."""
    below = {"load": str(root), "finetune": True, "ref_load": str(root), "ref_ckpt_step": step}
    run = Run(path, kind, below)
    return sorted(run.frozen)


@pytest.mark.parametrize("kind", [pytest.param("megatron", marks=pytest.mark.long), "fsdp"])
def test_another_checkpoint_of_the_same_directory_is_another_reference(tmp_path, kind):
    path = tiny_model("qwen3")
    run_ranks(1, two_checkpoints, path, kind, tmp_path)
    for step, frozen in ((0, ["ref"]), (1, []), (None, [])):
        assert run_ranks(1, on_the_newest, path, kind, tmp_path, step) == [frozen]


def said(path, kind):
    return Run(path, kind, {"lora_rank": 0}).backend.forward_only(batches(), last_logit)


def begins(path, kind, changed):
    Run(path, kind, changed)


@pytest.mark.parametrize("kind", ["megatron", "fsdp"])
def test_adapters_that_do_not_fit_are_refused(tmp_path, kind):
    path = tiny_model("qwen3")
    apart = write_adapter(tmp_path / "apart", path, kind="canonical_lora")
    larger = write_adapter(tmp_path / "larger", tiny_model("qwen3", layers=3))
    for given, words in ((apart, "different A matrices"), (larger, "7 layers differ")):
        with pytest.raises(RanksFailed, match="E-MODEL-004") as failure:
            run_ranks(1, begins, path, kind, {"lora_adapter_path": str(given)})
        assert words in str(failure.value)


def test_a_critic_is_trained_whole(tmp_path):
    from support.trained_rollouts import args_of

    from miles.backends.training_utils.critic import critic_args

    adapter = tmp_path / "iter_0000000" / "adapter"
    adapter.mkdir(parents=True)
    for file in (adapter.parent / "metadata.json", adapter / "adapter_config.json"):
        file.write_text("{}")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("0")
    args = args_of(tiny_model("qwen3"), "megatron", critic_load=None, critic_lr=None, **lora_flags())
    assert (critic_args(args).lora_rank, args.lora_rank) == (0, 3)
    args.load = str(tmp_path)
    assert critic_args(args).ref_load == args.ref_load, "an adapter has no layers to begin with"
