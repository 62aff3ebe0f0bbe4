"""Which name a misspelt one is meant for: by letters, and by parts in any order, cut short or spelled out. Pure."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence
from functools import lru_cache

ALIKE, ALIKE_UNLIKELY = 0.72, 0.8
"""From this on two names are told as alike; 1 is the same."""
_SHORT = 2
"""Parts of so few letters are the same, or not alike."""
_CUT = 3
"""So many letters are enough to know a part by its beginning."""
_SPELLED_OUT = {
    "lr": "learning rate",
    "wd": "weight decay",
    "tp": "tensor model parallel",
    "pp": "pipeline model parallel",
    "cp": "context parallel",
    "ep": "expert model parallel",
    "etp": "expert tensor parallel",
    "hf": "huggingface",
    "rm": "reward model",
    "len": "length",
    "num": "number",
    "eps": "epsilon",
    "mtp": "multi token prediction",
    "opd": "on policy distillation",
    "tis": "truncated importance sampling",
    "coef": "coefficient",
}
"""What people write for parts of names, and the other way round."""


def most_alike(name: str, names: Collection[str], unlikely: Collection[str] = ()) -> str | None:
    """The one of ``names`` that ``name`` was meant for; None: none looks like it. One that is ``unlikely`` has to look
    more like it. Of one or two letters alone nothing can be told."""
    if len(name.strip("-")) <= _SHORT:
        return None
    alike = {known: _alike(name, known) for known in names}
    there = {known: a for known, a in alike.items() if a >= (ALIKE_UNLIKELY if known in unlikely else ALIKE)}
    best = [known for known, a in there.items() if a == max(there.values())]
    return max(best, key=lambda known: (known not in unlikely, _letters(name, known)), default=None)


def _alike(name: str, known: str) -> float:
    typed = name.strip("-").lower().replace("_", "-").split("-")
    meant = known.strip("-").split("-")
    return max(_letters_if_alike(name, known), *(_by_parts(a, b) for a in _forms(typed) for b in _forms(meant)))


def _forms(parts: Sequence[str]) -> list[tuple[str, ...]]:
    """The parts as they are, and spelled out."""
    out = tuple(word for part in parts for word in _SPELLED_OUT.get(part, part).split())
    return [tuple(parts)] if out == tuple(parts) else [tuple(parts), out]


def _by_parts(typed: Sequence[str], meant: Sequence[str]) -> float:
    """Each part with the one that it is most alike to: the share of letters in parts that found each other."""
    pairs = sorted(
        ((_letters_of_parts(a, b), i, j) for i, a in enumerate(typed) for j, b in enumerate(meant)), key=_last
    )
    left, right = set(range(len(typed))), set(range(len(meant)))
    found = 0.0
    for alike, i, j in pairs:
        if i in left and j in right:
            left.remove(i)
            right.remove(j)
            found += alike * (len(typed[i]) + len(meant[j]))
    return found / max(1, sum(map(len, typed)) + sum(map(len, meant)))


def _last(pair: tuple[float, int, int]) -> tuple[float, int]:
    return -pair[0], abs(pair[1] - pair[2])


@lru_cache(maxsize=1 << 15)
def _letters_of_parts(one: str, other: str) -> float:
    if one == other:
        return 1.0
    shorter, longer = sorted((one, other), key=len)
    if len(shorter) <= _SHORT:
        return 0.0
    if len(shorter) >= _CUT and longer.startswith(shorter):
        return 0.95
    return _letters_if_alike(one, other)


def _letters_if_alike(one: str, other: str) -> float:
    """0 where they are not; most pairs are told apart by their lengths, or by which letters they have."""
    matcher = difflib.SequenceMatcher(None, one, other, autojunk=False)
    if matcher.real_quick_ratio() < ALIKE or matcher.quick_ratio() < ALIKE:
        return 0.0
    alike = matcher.ratio()
    return alike if alike >= ALIKE else 0.0


def _letters(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other, autojunk=False).ratio()
