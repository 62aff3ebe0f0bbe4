"""The ``f1`` reward: overlap of words with the label, as SQuAD (Rajpurkar et al. 2016) and HotpotQA (2018) score it."""

from __future__ import annotations

import re
import string
from collections import Counter

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_ALL_OR_NOTHING = ("yes", "no", "noanswer")


def normalize_answer(s: str) -> str:
    """Lower case, without punctuation and articles, one space between words."""
    return " ".join(_ARTICLES.sub(" ", s.lower().translate(_PUNCTUATION)).split())


def f1_score(prediction: str | None, ground_truth: str | None) -> tuple[float, float, float]:
    """F1, precision and recall of a response's words, each in 0 to 1. ``yes`` and ``no`` are right or wrong as a whole.

    A missing response or label scores 0.
    """
    nothing = (0.0, 0.0, 0.0)
    if prediction is None or ground_truth is None:
        return nothing
    given, expected = normalize_answer(prediction), normalize_answer(str(ground_truth))
    if given != expected and (given in _ALL_OR_NOTHING or expected in _ALL_OR_NOTHING):
        return nothing
    words, wanted = given.split(), expected.split()
    common = sum((Counter(words) & Counter(wanted)).values())
    if not common:
        return nothing
    precision, recall = common / len(words), common / len(wanted)
    return 2 * precision * recall / (precision + recall), precision, recall
