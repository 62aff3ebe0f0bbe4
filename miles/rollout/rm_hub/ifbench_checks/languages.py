"""What needs a trained model or a dictionary: the language of a text, syllables, whether a word is a verb.

The packages are an extra (``pip install 'miles[ifbench]'``); they carry their data with them and load it on first use.
"""

from __future__ import annotations

import importlib
import threading
import warnings
from functools import lru_cache
from typing import Any

MOST_CHARACTERS = 10_000
"""Of a text, for its language: as many as langdetect looks at."""
_loading = threading.Lock()


@lru_cache(maxsize=1)
def _detectors() -> tuple[Any, Any]:
    library: Any = importlib.import_module("langdetect.detector_factory")
    factory = library.DetectorFactory()
    factory.load_profile(library.PROFILES_DIRECTORY)
    factory.seed = 0  # it would draw at random
    return library, factory


def is_language(text: str, code: str) -> bool:
    """Whether a text is in a language; one in which no language can be told is. The same text has the same answer."""
    with _loading:
        library, factory = _detectors()
    detector = factory.create()
    detector.append(text[:MOST_CHARACTERS])
    try:
        found = detector.detect()
    except library.LangDetectException:
        return True
    return bool(found == code or (code == "zh" and found in ("zh-cn", "zh-tw")))


def syllables(word: str) -> int:
    """How many syllables an English word has, by dictionary, or else by its vowels; a number has none."""
    with _loading:
        library: Any = importlib.import_module("syllapy")
    return int(library.count(word))


@lru_cache(maxsize=1)
def _tagger() -> Any:
    library: Any = importlib.import_module("textblob.en")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves the closing of its lexicon to the collector
        library.tag("a")
    return library.tag


def begins_with_verb(words: str) -> bool:
    """Whether the first word of an English sentence is a verb, by its place there."""
    with _loading:
        found = _tagger()(words)
    return bool(found) and str(found[0][1]).startswith("VB")
