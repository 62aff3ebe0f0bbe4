"""A run whose adapter stands on other weights than its reference goes on with both, or not at all."""

import json
import shutil

import pytest
import torch
from support.lora_runs import Run, resumed_run, two_checkpoints, whole_run
from support.ranks import RanksFailed, run_ranks
from support.tiny_models import tiny_model

pytestmark = pytest.mark.full
MOSTLY = ["megatron", pytest.param("fsdp", marks=pytest.mark.long)]
BELOW = {"use_kl_loss": True, "kl_loss_coef": 0.5}


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """By backend and whether there is a reference: a run begun on ``--load``, with the model as reference."""
    made = {}

    def get(kind, reference=True):
        if (kind, reference) not in made:
            root = tmp_path_factory.mktemp("begun")
            below = root / "below"
            shutil.copytree(tiny_model("qwen3", seed=5), below)
            changed = {**BELOW, "use_kl_loss": reference, "load": str(below)}
            expected = run_ranks(1, whole_run, tiny_model("qwen3"), kind, changed, root / "save")[0]
            made[kind, reference] = root, expected
        return made[kind, reference]

    return get


def goes_on(path, kind, changed, root):
    run = Run(path, kind, {**changed, "load": str(root)})
    frozen = sorted(run.frozen)
    run.backend.close()
    return frozen, *resumed_run(path, kind, changed, root)


@pytest.mark.parametrize("kind", MOSTLY)
@pytest.mark.parametrize("reference", [True, pytest.param(False, marks=pytest.mark.long)])
def test_it_goes_on_bit_for_bit_with_the_same_flags(begun, kind, reference):
    root, (saved, last) = begun(kind, reference)
    changed = {**BELOW, "use_kl_loss": reference}
    frozen, start, middle, end = run_ranks(1, goes_on, tiny_model("qwen3"), kind, changed, root / "save")[0]
    assert frozen == ["ref"] * reference
    assert start == 1
    assert_same(middle, saved)
    assert_same(end, last)


@pytest.mark.parametrize("kind", MOSTLY)
def test_another_reference_is_refused_and_weights_that_are_gone_are_named(begun, kind, tmp_path):
    root, _ = begun(kind)
    for reference in (root / "below", tiny_model("qwen3", seed=9)):
        told = refused(kind, {**BELOW, "ref_load": str(reference)}, root / "save")
        assert "the reference model is not the one" in told
        assert "--ref-load" in told
    shutil.copytree(root / "save", tmp_path / "moved")
    config = tmp_path / "moved" / "iter_0000000" / "adapter" / "adapter_config.json"
    about = json.loads(config.read_text())
    assert about["base_model_name_or_path"] == str(root / "below")
    config.write_text(json.dumps({**about, "base_model_name_or_path": str(tmp_path / "gone")}))
    assert f"are not at {tmp_path / 'gone'}" in refused(kind, BELOW, tmp_path / "moved")


def refused(kind, changed, root):
    with pytest.raises(RanksFailed, match="E-MODEL-004") as failure:
        run_ranks(1, weights_of, tiny_model("qwen3"), kind, changed, root)
    return str(failure.value)


@pytest.mark.parametrize("kind", MOSTLY)
def test_finetuning_takes_another_reference(begun, kind):
    root, (saved, _) = begun(kind)
    changed = {**BELOW, "ref_load": str(tiny_model("qwen3", seed=9)), "finetune": True}
    weights = run_ranks(1, weights_of, tiny_model("qwen3"), kind, changed, root / "save")[0]
    assert_same(weights, saved)


def begun_on_a_checkpoint(path, kind, root):
    """Adapters on the older of two checkpoints without any; saved, then trained on. Weights at both times."""
    two_checkpoints(path, kind, root / "below")
    changed = {"load": str(root / "below"), "ckpt_step": 0, "finetune": True}
    return whole_run(path, kind, changed, root / "save")


@pytest.mark.parametrize("kind", [pytest.param("megatron", marks=pytest.mark.long), "fsdp"])
def test_it_goes_on_upon_the_checkpoint_that_it_was_begun_on_and_not_the_newest(tmp_path, kind):
    saved, last = run_ranks(1, begun_on_a_checkpoint, tiny_model("qwen3"), kind, tmp_path)[0]
    start, middle, end = run_ranks(1, resumed_run, tiny_model("qwen3"), kind, {}, tmp_path / "save")[0]
    assert start == 1
    assert_same(middle, saved)
    assert_same(end, last)


def weights_of(path, kind, changed, root):
    return Run(path, kind, {**changed, "load": str(root)}).weights()
