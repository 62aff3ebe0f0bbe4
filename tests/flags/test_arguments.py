"""args, as user code has it."""

import argparse
import copy
import logging

import pytest
from support.flag_cases import config

from miles.utils.arguments import namespace


def test_it_has_the_values_and_shares_none():
    values = config()
    args = namespace(values)
    assert isinstance(args, argparse.Namespace)
    assert vars(args) == values
    args.hf_config["hidden_size"] = 1
    assert values["hf_config"]["hidden_size"] == 1024


def test_a_change_stays_here_and_is_told_once(caplog):
    values = config()
    args = namespace(values)
    with caplog.at_level(logging.WARNING):
        args.lr = 1.0
        args.lr = 2.0
        args.mine = 3
        args.colocate = True  # as it was
    assert [record.getMessage().split()[0] for record in caplog.records] == ["args.lr", "args.mine"]
    assert (args.lr, args.mine) == (2.0, 3)
    assert values["lr"] == 1e-6
    assert namespace(values).lr == 1e-6


def test_what_is_not_built_is_off_and_what_is_nothing_is_told():
    args = namespace(config())
    assert args.num_experts is None
    assert args.multi_latent_attention is False
    assert not hasattr(args, "no_such_thing")
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = args.no_such_thing
    assert getattr(args, "mine", 7) == 7


def test_copies_are_equal_and_apart():
    args = namespace(config())
    other = copy.deepcopy(args)
    assert other == args
    other.lr = 5.0
    assert args.lr == 1e-6
    assert "lr=1e-06" in repr(args)
