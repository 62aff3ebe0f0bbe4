"""Rules: who gives rewards, and what of them is used."""

from dataclasses import replace

import pytest
from support.flag_cases import DATA, FACTS, config, outcome, problems, with_data

from miles.flags.facts import EvalSet
from miles.flags.group_reward import DICT_REWARDS, LABELLED, NO_BOX_IN_A_BOX, NUMBER_REWARDS, REWARDS
from miles.rollout import rm_hub


def test_flags_know_the_rewards_that_there_are():
    assert set(REWARDS) == set(rm_hub.REWARDS)
    assert set(NUMBER_REWARDS) | set(DICT_REWARDS) | {"remote_rm"} == set(REWARDS)
    assert set(LABELLED) | set(NO_BOX_IN_A_BOX) <= set(REWARDS)


@pytest.mark.parametrize("kind", [*NUMBER_REWARDS, "boxed_f1", "boxed_gpqa", "boxed_math"])
def test_built_ones(kind):
    assert config(f"--rm-type {kind}")["rm_type"] == kind


@pytest.mark.parametrize(
    ("kind", "told"),
    [("mth", "Did you mean math?"), ("boxed_gqpa", "Did you mean boxed_gpqa?"), ("Dapo", "dapo"), ("xyz", "Use one")],
)
def test_others_are_told_with_the_nearest_name(kind, told):
    assert "no such reward" in problems(f"--rm-type {kind}")["--rm-type"]
    assert told in problems(f"--rm-type {kind}")["--rm-type"]


def test_evaluation_data_may_name_theirs():
    facts = replace(FACTS, eval_sets=(EvalSet("D", "prompt", "label", rm_type="gppa"),))
    flags = "--eval-interval 2 --eval-config e.yaml"
    assert "evaluation data D: there is no such reward" in problems(flags, facts=facts)["--eval-config"]
    facts = replace(facts, eval_sets=(replace(facts.eval_sets[0], rm_type="remote_rm"),))
    assert "--rm-url" in problems(flags, facts=facts)["--rm-type"]
    config(flags + " --rm-url http://here", facts=facts)


def test_a_remote_one_needs_an_address():
    assert "--rm-url" in problems("--rm-type remote_rm")["--rm-type"]
    config("--rm-type remote_rm --rm-url http://here")
    for url in ("here", "here:80/rm", "ftp://here", "http://"):
        assert "no address" in problems(f"--rm-type remote_rm --rm-url {url}")["--rm-url"]


def test_a_dict_needs_a_key_and_a_number_has_none():
    assert "Give --reward-key score" in problems("--rm-type dapo")["--reward-key"]
    assert config("--rm-type dapo --reward-key score")["reward_key"] == "score"
    config("--rm-type dapo --custom-reward-post-process-path my.rewards")
    config("--rm-type dapo --custom-rm-path my.rm")
    for flag in ("--reward-key pred", "--reward-key score --eval-reward-key scores"):
        found = problems(f"--rm-type dapo {flag}")
        assert "score or acc" in found[flag.split()[-2]]
    assert "Leave it out" in problems("--rm-type math --reward-key score")["--reward-key"]
    rows_tell = with_data("D", replace(DATA, columns=("prompt", "label", "metadata"), absent={}))
    config("--rm-type math --reward-key score", facts=rows_tell)


def test_a_box_in_a_box_is_told():
    assert any("hardly any response is right" in notice for notice in outcome("--rm-type boxed_math").notices)
    assert not any("hardly any" in notice for notice in outcome("--rm-type boxed_gpqa").notices)


def test_somebody_must_give_it():
    none = {"without": ["--rm-type"]}
    assert "nothing gives rewards" in problems(**none)["--rm-type"]
    rows_tell = with_data("D", replace(DATA, columns=("prompt", "label", "metadata"), absent={}))
    config(facts=rows_tell, **none)
    for flags in ("--custom-rm-path my.rm", "--rollout-function-path my.rollout", "--debug-train-only"):
        config(flags, **none)


def test_clips_and_keys_follow():
    found = config("--eps-clip 0.1 --rm-type dapo --reward-key score")
    assert (found["eps_clip_high"], found["eval_reward_key"]) == (0.1, "score")
    assert config("--eps-clip-high 0.28")["eps_clip_high"] == 0.28


def test_the_end_token_is_part_of_the_last_word():
    def told(flags):
        return any("--rollout-skip-special-tokens leaves it out" in notice for notice in outcome(flags).notices)

    assert told("--rm-type f1")
    assert told("--rm-type dapo --reward-key score")
    assert not told("--rm-type f1 --rollout-skip-special-tokens")
    assert not told("--rm-type boxed_f1")
    assert not told("--rm-type math")
