"""Keys: what they accept, what they refuse, and that secrets stay secret."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles_agents.wire.keys import AgentKey, AllowList, ClientKeys, InvalidKey, KeyConflict, KeyPair

CONTROLLER = KeyPair.generate()
NODE = KeyPair.generate()


def bundle(**changes):
    return json.loads(AgentKey("run-1", "node-7", CONTROLLER.public, NODE).to_line()) | changes


def test_generated_pairs_differ_and_fit_together():
    pairs = [KeyPair.generate() for _ in range(5)]
    assert len({pair.public for pair in pairs} | {pair.secret for pair in pairs}) == 10
    assert all(KeyPair(pair.public, pair.secret) == pair for pair in pairs)


def test_no_text_of_a_key_shows_its_secret():
    key = AgentKey("run-1", "node-7", CONTROLLER.public, NODE)
    for text in (repr(NODE), str(NODE), repr(key), str(key), repr(ClientKeys(CONTROLLER.public, NODE))):
        assert NODE.secret not in text
    assert NODE.public in repr(key)


def test_a_pair_of_two_halves_is_refused_without_showing_the_secret():
    with pytest.raises(InvalidKey) as caught:
        KeyPair(CONTROLLER.public, NODE.secret)
    assert NODE.secret not in str(caught.value)


@pytest.mark.parametrize(
    "key",
    ["", "short", "x" * 41, "~" * 40, "é" * 40, CONTROLLER.public + "\n"],
    ids=["empty", "short", "too long", "not Z85", "not ASCII", "with a line end"],
)
def test_what_is_not_a_key_is_refused(key):
    for make in (
        lambda: KeyPair(key, NODE.secret),
        lambda: KeyPair(NODE.public, key),
        lambda: ClientKeys(key, NODE),
        lambda: AgentKey("run", "node", key, NODE),
        lambda: AllowList().add(key, "node"),
    ):
        with pytest.raises(InvalidKey):
            make()


printable = st.text(min_size=1).filter(str.isprintable)


@given(run_id=printable, node=printable)
def test_an_agent_key_survives_its_line(run_id, node):
    key = AgentKey(run_id, node, CONTROLLER.public, NODE)
    line = key.to_line()
    assert len(line.splitlines()) == 1
    assert AgentKey.from_line(line) == key
    assert AgentKey.from_line(line + "\n") == key


def test_an_agent_key_gives_the_keys_to_dial_with():
    assert AgentKey("r", "n", CONTROLLER.public, NODE).client_keys() == ClientKeys(CONTROLLER.public, NODE)


@pytest.mark.parametrize("name", ["", "two\nlines", "bell\x07"])
def test_names_must_be_plain_text(name):
    with pytest.raises(InvalidKey, match="run_id"):
        AgentKey(name, "node", CONTROLLER.public, NODE)
    with pytest.raises(InvalidKey, match="node"):
        AgentKey("run", name, CONTROLLER.public, NODE)


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[1]", "version"),
        ("null", "version"),
        (json.dumps(bundle(v=2)), "version"),
        (json.dumps({key: value for key, value in bundle().items() if key != "secret"}), "secret"),
        (json.dumps(bundle(node=5)), "node"),
        (json.dumps(bundle(secret="x")), "secret key"),
        (json.dumps(bundle(public=CONTROLLER.public)), "does not belong"),
        (json.dumps(bundle(controller_public="no")), "controller key"),
    ],
)
def test_a_broken_line_says_what_is_wrong_and_not_the_secret(line, hint):
    with pytest.raises(InvalidKey) as caught:
        AgentKey.from_line(line)
    assert hint in str(caught.value)
    assert NODE.secret not in str(caught.value)


@given(cut=st.integers(min_value=0, max_value=250))
def test_a_truncated_line_never_leaks_its_secret(cut):
    line = AgentKey("run-1", "node-7", CONTROLLER.public, NODE).to_line()
    with pytest.raises(InvalidKey) as caught:
        AgentKey.from_line(line[: min(cut, len(line) - 1)])
    assert NODE.secret not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_the_allow_list_knows_its_nodes():
    allow = AllowList()
    assert CONTROLLER.public not in allow
    allow.add(NODE.public, "node-7")
    allow.add(NODE.public, "node-7")
    assert NODE.public in allow
    assert "" not in allow
    assert allow.node_of(NODE.public) == "node-7"
    assert allow.node_of(CONTROLLER.public) is None
    assert len(allow) == 1


def test_a_node_may_have_two_keys_but_a_key_only_one_node():
    allow = AllowList()
    allow.add(NODE.public, "node-7")
    allow.add(CONTROLLER.public, "node-7")
    with pytest.raises(KeyConflict, match="node-8"):
        allow.add(NODE.public, "node-8")
    assert allow.node_of(NODE.public) == "node-7"


def test_a_revoked_key_is_a_stranger():
    allow = AllowList()
    allow.add(NODE.public, "node-7")
    assert allow.revoke(NODE.public) is True
    assert NODE.public not in allow
    assert allow.node_of(NODE.public) is None
    assert allow.revoke(NODE.public) is False
