"""IFBench: counts and ratios."""

REFERENCE = "the quick brown fox jumps over the lazy dog"
KEYWORDS = {"keyword1": "ant", "keyword2": "bee", "keyword3": "cat", "keyword4": "dog", "keyword5": "eel"}
COUNTED = "ant " + "bee " * 2 + "cat " * 3 + "dog " * 5 + "eel " * 7

TABLE = [
    (
        "count:word_count_range",
        {"min_words": 2, "max_words": 3},
        ["one two", "one two three", "don't"],
        ["one", "a b c d", "", "..."],
    ),
    ("count:word_count_range", {"min_words": 2.0, "max_words": 2}, ["one two", "\u00e9t\u00e9 1"], ["a", "a b c"]),
    (
        "count:unique_word_count",
        {"N": 3},
        ["one two three", "One, one; two (three)"],
        ["one One ONE two", "a b !", "", "- * - a b"],
    ),
    (
        "count:conjunctions",
        {"small_n": 3},
        ["this and that, or this but...", "AND (but) yet", "for nor so"],
        ["and And AND, and", "sandy butter fort", "and/or", ""],
    ),
    (
        "count:person_names",
        {"N": 2},
        ["Emma met Liam.", "**Zoe** and Leo's"],
        ["Emma and emma, Emma", "Emmanuel Liams", "", "EMMA LIAM"],
    ),
    (
        "count:numbers",
        {"N": 2},
        ["1 and 2", "1,000.5 or 3", "a1b2", "\u0661 \u0662"],
        ["one two", "1", "1 2 3", "1-2", ""],
    ),
    (
        "count:punctuation",
        {},
        ["a. b, c! d? e; f: g?!", "What!? . , ; : ! ?", "a\u203d .,!?;:"],
        ["a. b, c; f: g?!", ".,!?;:", "", ". , ; : ?! ?"],
    ),
    (
        "count:words_japanese",
        {"N": 2},
        ["this \u3053\u308c is \u65e5\u672c", "one", "price 42 was \u30a2", "a -- b \u30ab"],
        ["this is", "\u3053\u308c is", "a \u30a2 b c", "one \ud55c\uad6d"],
    ),
    (
        "count:pronouns",
        {"N": 3},
        ["She gave it to them.", "she/her/hers", "I'm who you're"],
        ["The cat sat on a mat.", "She saw Bob", "", "item herald theyre"],
    ),
    (
        "count:keywords_multiple",
        KEYWORDS,
        [COUNTED, COUNTED.upper() + "antler dogma"],
        [COUNTED + "ant", COUNTED.replace("eel", "eels"), "", COUNTED[4:]],
    ),
    (
        "ratio:stop_words",
        {"percentage": 25},
        ["Cats chase mice quickly", "The cats chase mice", "1 2 3"],
        ["The cat and the dog", "He was", "", "!!!"],
    ),
    (
        "ratio:overlap",
        {"reference_text": REFERENCE, "percentage": 50},
        ["the quick brown fox jumps high up there", "over the lazy cat"],
        [REFERENCE, "nothing of it here", "", "two words"],
    ),
    (
        "ratio:overlap",
        {"reference_text": REFERENCE, "percentage": 100},
        [REFERENCE, "the quick brown"],
        ["the quick red", "The Quick Brown"],
    ),
    (
        "ratio:sentence_type",
        {},
        ["One. Two. Three?", "Why? Dr. No came. He left. Wow!"],
        ["One. Two?", "One! Two!", "", "One? Two?"],
    ),
    (
        "ratio:sentence_balance",
        {},
        ["One. Two? Three!", 'He said "Go." Why? Ha! \U0001f600 So! Who? Me.'],
        ["One. Two?", "One. Two? Three! Four!", "", "no marks"],
    ),
    (
        "ratio:sentence_words",
        {},
        ["I am one. We go on. Be at it.", "Ab cd! Ef gh? Ij kl."],
        ["I am one. We go on. I go to.", "I am one. We go on. Go.", "I am one. We go on.", ""],
    ),
]
