"""``f1``: overlap of words after SQuAD's normalisation."""

import pytest

from miles.rollout.rm_hub.f1 import f1_score, normalize_answer

CASES = [
    # response, label, common words, words of the response, words of the label
    ("Paris", "Paris", 1, 1, 1),
    ("paris", "PARIS", 1, 1, 1),
    ("London", "Paris", 0, 1, 1),
    ("the Paris", "Paris", 1, 1, 1),
    ("a an the", "Paris", 0, 0, 1),
    ("a an the", "the", 0, 0, 0),  # nothing is left of either
    ("", "Paris", 0, 0, 1),
    ("Paris", "", 0, 1, 0),
    ("", "", 0, 0, 0),
    ("Paris, France", "Paris", 1, 2, 1),
    ("Paris", "Paris, France", 1, 1, 2),
    ("France Paris", "Paris France", 2, 2, 2),
    ("Paris Paris", "Paris", 1, 2, 1),  # a word counts as often as both have it
    ("Paris Paris", "Paris Paris Paris", 2, 2, 3),
    ("  Paris \n\t France ", "Paris France", 2, 2, 2),
    ("U.S.A.", "usa", 1, 1, 1),
    ("New-York", "New York", 0, 1, 2),  # a hyphen goes without a space in its place
    ("it's", "its", 1, 1, 1),
    ("theater", "theater", 1, 1, 1),  # articles are whole words
    ("then a", "then", 1, 1, 1),
    ("the-best", "thebest", 1, 1, 1),  # punctuation goes first
    ("$5,000", "5000", 1, 1, 1),
    ("3.14", "314", 1, 1, 1),
    ("50%", "50", 1, 1, 1),
    ("東京 タワー", "東京", 1, 2, 1),
    ("東京", "京東", 0, 1, 1),
    ("«Paris»", "Paris", 0, 1, 1),  # only ASCII punctuation goes
    ("Straße", "strasse", 0, 1, 1),
    ("\u00c9mile", "\u00e9mile", 1, 1, 1),
    ("yes", "yes", 1, 1, 1),
    ("Yes.", "yes", 1, 1, 1),
    ("No noanswer", "noanswer", 0, 2, 1),
    ("word " * 50_000, "word", 1, 50_000, 1),
    ("b " * 1000 + "a" * 100_000, "b", 1, 1001, 1),
]
ALL_OR_NOTHING = [
    ("yes it is", "yes"), ("yes", "yes it is"), ("no", "yes"), ("yes", "no"), ("no way", "no"),
    ("noanswer here", "noanswer"), ("no", "no way"), ("yes yes", "yes"),
]  # fmt: skip


@pytest.mark.parametrize(("response", "label", "common", "given", "wanted"), CASES, ids=range(len(CASES)))
def test_answers(response, label, common, given, wanted):
    f1, precision, recall = f1_score(response, label)
    if not common:
        assert (f1, precision, recall) == (0.0, 0.0, 0.0)
        return
    assert precision == common / given
    assert recall == common / wanted
    assert f1 == pytest.approx(2 * common / (given + wanted))


@pytest.mark.parametrize(("response", "label"), ALL_OR_NOTHING)
def test_yes_and_no_are_right_as_a_whole(response, label):
    assert f1_score(response, label) == (0.0, 0.0, 0.0)


def test_what_is_missing_scores_nothing():
    assert f1_score(None, "x") == f1_score("x", None) == f1_score(None, None) == (0.0, 0.0, 0.0)
    assert f1_score("5", 5)[0] == 1.0


def test_the_normal_form():
    assert normalize_answer(" The  quick, brown-fox! An a ") == "quick brownfox"
