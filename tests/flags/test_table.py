"""Every flag that anybody documents is known, and either honoured or refused with a reason."""

from collections import Counter

import pytest
from support.flag_contract import CHOICES, CONTRACT, NOT_BUILT, REFERENCE

from miles.flags.flag import TAKES_NO_VALUE
from miles.flags.megatron_names import megatron_flags
from miles.flags.parse import parse
from miles.flags.table import spellings, table

ROWS = [line.split(" | ") for line in CONTRACT.splitlines()]
KINDS = {"int": "int", "float": "float", "str": "str", "enum": "str", "path": "path", "flag": "switch"}
# Types of paths that the contract calls str, and the other way round.
ALSO_PATH = {"--prompt-data", "--memory-snapshot-path", "--tensorboard-dir"}


@pytest.mark.parametrize(("name", "kind", "default"), ROWS, ids=[row[0] for row in ROWS])
def test_the_contract_holds(name, kind, default):
    flag = table().by_name[name]
    assert flag.source == "contract"
    assert len(flag.help) > 2
    assert flag.group
    if kind == "<module> <fn>":
        assert (flag.kind, flag.nargs, flag.default) == ("str", "*", None)
        return
    if kind.endswith("+"):
        assert flag.nargs == "+"
    wanted = KINDS[kind.rstrip("+")]
    if name == "--no-check-for-nan-in-loss-and-grad":
        assert (flag.kind, flag.dest, flag.default) == ("off", "check_for_nan_in_loss_and_grad", True)
        return
    assert flag.kind == ("path" if name in ALSO_PATH else wanted)
    assert flag.default == typed_default(default, wanted)
    if kind == "enum" and name in CHOICES:
        assert CHOICES[name] <= set(flag.choices)


def typed_default(text, kind):
    if text == "-":
        return None
    if text.startswith("["):
        return [text.strip("[]")]
    return {"int": int, "float": float, "switch": lambda word: word == "on"}.get(kind, str)(text)


def test_what_the_contract_has_and_is_not_built_is_exactly_this():
    found = {name for name, *_ in ROWS if table().by_name[name].only is not None}
    assert found == set(NOT_BUILT)


def test_every_flag_of_megatron_is_known_by_all_its_names():
    rows = megatron_flags()
    assert len(rows) == 651
    assert [name for row in rows for name in row.names if name not in table().by_name] == []


def test_every_flag_of_the_reference_system_is_known():
    assert len(REFERENCE) > 280
    assert [name for name in REFERENCE if name not in table().by_name] == []


def test_names_are_unique_and_well_formed():
    counts = Counter(name for flag in table().flags for name in spellings(flag))
    assert [name for name, count in counts.items() if count > 1] == []
    assert [name for name in counts if not name.startswith("--")] == []


def test_every_refused_value_has_a_reason():
    without = [
        flag.name
        for flag in table().flags
        if flag.only is not None and not flag.reason and not (flag.kind in TAKES_NO_VALUE or len(flag.only) == 1)
    ]
    assert without == []
    assert [flag.name for flag in table().flags if flag.reason.strip(" .:") == "not built yet"] == []


def test_every_flag_of_ours_has_help_and_a_default_of_its_kind():
    for flag in table().flags:
        if flag.source == "megatron" and flag.only == ():
            continue
        assert flag.help, flag.name
        if flag.choices and flag.default is not None and flag.nargs is None:
            assert flag.default in flag.choices, flag.name
        if flag.kind in {"switch", "off"}:
            assert isinstance(flag.default, bool), flag.name


def test_a_refused_flag_is_refused_by_name_with_its_reason():
    refused = [flag for flag in table().flags if flag.only == ()]
    assert len(refused) > 500
    for flag in refused:
        value = () if flag.kind in TAKES_NO_VALUE else ("1",)
        found = parse([flag.name, *value], table()).problems
        assert {problem.flag for problem in found} == {flag.name}
        assert any(flag.reason in problem.what for problem in found), flag.name


@pytest.mark.parametrize("flag", [flag for flag in table().flags if flag.only], ids=lambda flag: flag.name)
def test_a_flag_that_is_fixed_takes_what_is_done_anyway(flag):
    value = flag.only[0]
    words = (
        [] if flag.kind in TAKES_NO_VALUE else [str(word) for word in (value if isinstance(value, list) else [value])]
    )
    value = value if flag.nargs is None or isinstance(value, list) else [value]
    parsed = parse([flag.name, *words], table())
    assert parsed.problems == []
    assert parsed.typed == {flag.dest: value}


def test_defaults_are_those_of_the_table_and_say_nothing_for_what_is_refused():
    defaults = table().defaults()
    assert defaults["lr"] == 1e-6
    assert defaults["check_for_nan_in_loss_and_grad"] is True
    assert defaults["pipeline_model_parallel_size"] == 1
    assert not {"moe_latent_size", "moe_deepep_num_sms", "fp8"} & set(defaults)
    assert table().absent()["moe_latent_size"] is None
    assert "moe_deepep_num_sms" not in table().absent()


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("--rollout-batchsize", "--rollout-batch-size"),
        ("--colocated", "--colocate"),
        ("--num-rollouts", "--num-rollout"),
        ("--lerning-rate", "--lr"),
        ("--learning-rate", "--lr"),
        ("--min-learning-rate", "--min-lr"),
        ("--gloabl-batch-size", "--global-batch-size"),
        ("--batch-size-rollout", "--rollout-batch-size"),
        ("--num-samples-per-prompt", "--n-samples-per-prompt"),
        ("--temperature-rollout", "--rollout-temperature"),
        ("--rollout-max-reponse-len", "--rollout-max-response-len"),
        ("--rollout-max-response-length", "--rollout-max-response-len"),
        ("--kl-loss-coeff", "--kl-loss-coef"),
        ("--adv-estimator", "--advantage-estimator"),
        ("--tp-size", "--tensor-model-parallel-size"),
        ("--ep-size", "--expert-model-parallel-size"),
        ("--huggingface-checkpiont", "--hf-checkpoint"),
        ("--grad-clip", "--clip-grad"),
        ("--weigth_decay", "--weight-decay"),
        ("--custom-reward-path", "--custom-rm-path"),
        ("--fullyasync", "--fully-async"),
        ("--update-weight-interval", "--update-weights-interval"),
        ("--ref-model", "--ref-load"),
    ],
)
def test_the_nearest_name(typed, meant):
    assert table().nearest(typed) == meant


@pytest.mark.parametrize("typed", ["--xyzzy", "--foo-bar", "--verbose", "--gpus", "--frobnicate", "--no", "--"])
def test_a_name_like_no_other_has_no_nearest(typed):
    assert table().nearest(typed) is None
