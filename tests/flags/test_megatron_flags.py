"""All flags of Megatron-LM's parser: names, dests, types, defaults, choices and numbers of values, but for what is said
here to differ; and each is refused with a reason of its own."""

import json
from pathlib import Path

import pytest

from miles.flags.megatron_names import GROUP, megatron_flags
from miles.flags.megatron_refused import reasons
from miles.flags.table import spellings, table

ROWS = json.loads((Path(__file__).parent / "megatron_flags.json").read_text())["flags"]
KINDS = {"StoreTrue": "switch", "StoreFalse": "off", "BooleanOptional": "tri"}
TYPES = {"int": "int", "float": "float", "bool": "yesno"}

OF_THE_CONTRACT = """\
--expert-tensor-parallel-size 1 | --mtp-num-layers 0 | --mtp-loss-scaling-factor 0.2 | --weight-decay 0.1
--adam-beta2 0.98 | --micro-batch-size 1 | --lr-decay-style "constant" | --lr 1e-06 | --log-interval 1
"""
"""Defaults that the contract sets."""
FROM_THE_MODEL = (
    "--num-query-groups --norm-epsilon --normalization --position-embedding-type --rotary-base --rotary-percent "
    "--rope-scaling-factor --rotary-scaling-factor --init-method-std --transformer-impl --moe-router-topk "
    "--moe-layer-freq"
)
"""Unset means: what the model's config.json, or the installation, says."""
ON_OR_OFF_ANYWAY = (
    "--no-masked-softmax-fusion --no-bias-gelu-fusion --no-bias-dropout-fusion --no-rope-fusion "
    "--no-persist-layer-norm --no-gradient-accumulation-fusion --use-mcore-models --override-opt_param-scheduler "
    "--auto-detect-ckpt-format --use-dist-ckpt --attention-softmax-in-fp32 --accumulate-allreduce-grads-in-fp32 "
    "--use-distributed-optimizer --log-throughput --log-timers-to-tensorboard --log-memory-to-tensorboard"
)
"""Taken, because it is what is done."""
NO_DROPOUT = ["--hidden-dropout", "--attention-dropout"]
FALSE_FOR_NONE = ["--no-save-optim", "--no-save-rng", "--no-load-optim", "--no-load-rng"]
PATHS = ["--memory-snapshot-path", "--save", "--load", "--tokenizer-model", "--tensorboard-dir"]
ENUMS = ["--attention-backend", "--exit-signal"]
FEWER_CHOICES = {"--optimizer": {"adam", "sgd"}, "--tokenizer-type": set()}
OTHER_DEST = {
    "--use-mcore-models": "use_mcore_models",
    "--use-dist-ckpt": "use_dist_ckpt",
    "--rotary-scaling-factor": "rope_scaling_factor",
}


def expected_default(name, theirs):
    contract = dict(entry.strip().split() for entry in OF_THE_CONTRACT.replace("\n", "|").split("|") if entry.strip())
    if name in contract:
        return json.loads(contract[name])
    if name in FROM_THE_MODEL.split():
        return None
    if name in ON_OR_OFF_ANYWAY.split():
        return not theirs
    if name == "--moe-token-dispatcher-type":
        return "alltoall"  # the one that sequences of different lengths leave
    if name in NO_DROPOUT:
        return 0.0
    if name in FALSE_FOR_NONE:
        return False
    return "auto" if name == "--attention-backend" else theirs


def differences(row):
    names, dest, action, kind, default, choices, nargs = row
    name, flag = names[0], table().by_name[names[0]]
    kind = KINDS.get(action) or TYPES.get(kind or "", "str")
    if name in PATHS:
        kind = "path"
    if name == "--rotary-base":
        kind = "float"  # a base need not be whole
    wanted = {
        "dest": OTHER_DEST.get(name, dest),
        "kind": kind,
        "default": expected_default(name, default),
        "choices": set(flag.choices) if name in ENUMS else FEWER_CHOICES.get(name, set(choices or ())),
        "nargs": nargs if action == "Store" else None,
    }
    found = {key: getattr(flag, key) for key in wanted} | {"choices": set(flag.choices)}
    missing = [other for other in names if other not in spellings(flag)]
    return {key: (found[key], wanted[key]) for key in wanted if found[key] != wanted[key]} | (
        {"names": missing} if missing else {}
    )


def test_there_are_651_flags():
    assert len(ROWS) == len(megatron_flags()) == 651


def test_each_flag_has_the_type_and_default_of_megatron_or_those_that_are_said_to_differ():
    assert {row[0][0]: found for row in ROWS if (found := differences(row))} == {}


def test_every_refused_flag_has_a_reason_and_no_reason_is_left_over():
    refused = {flag.name: flag for flag in table().flags if flag.group == GROUP}
    assert {name: flag.reason for name, flag in refused.items()} == dict(reasons())
    assert len(refused) > 450


@pytest.mark.parametrize(
    "flag", [flag for flag in table().flags if flag.only is not None and flag.source == "megatron"]
)
def test_reasons_say_more_than_that_it_is_not_built(flag):
    is_what_is_done = flag.is_fixed and len(flag.only) == 1
    assert is_what_is_done or len(flag.reason) > 12
    assert flag.reason.strip(" .:") != "not built yet"
