"""IFEval: keywords, letters, language, case, punctuation, begin and end."""

# ruff: noqa: RUF001 - letters of other alphabets are what is tested

ENGLISH = "the weather in london was rather pleasant this week and everybody went outside"
FRENCH = "Le temps à Londres était plutôt agréable cette semaine et tout le monde est sorti."
RUSSIAN = "На этой неделе погода была хорошая."
QUESTION = "Write a poem.\nMake it short."

TABLE = [
    # id, kwargs, responses that follow, responses that do not
    (
        "keywords:existence",
        {"keywords": ["apple", "C++"]},
        ["An apple in C++", "PINEAPPLES and c++17", "c++\n```\napple\n```"],
        ["An apple in C", "C++ only", "", "app le C++"],
    ),
    (
        "keywords:frequency",
        {"keyword": "sun", "frequency": 2, "relation": "at least"},
        ["sun sun", "Sunday and the sun", "SUN,sun;sunsun"],
        ["sun", "son and son", "", "s u n sun"],
    ),
    (
        "keywords:frequency",
        {"keyword": "sun", "frequency": 2, "relation": "less than"},
        ["sun", "none"],
        ["sun sun", "Sunday sun"],
    ),
    (
        "keywords:forbidden_words",
        {"forbidden_words": ["bad", "c++", "not good"]},
        ["badly done", "a c+ + grade", "good, not bad_"],
        ["Bad!", "in C++.", "it is not good", "«bad»"],
    ),
    (
        "keywords:letter_frequency",
        {"letter": "A", "let_frequency": 3, "let_relation": "at least"},
        ["banana", "A a A"],
        ["ab", "á à a"],
    ),
    (
        "keywords:letter_frequency",
        {"letter": "#", "let_frequency": 1, "let_relation": "less than"},
        ["no hash", "♯"],
        ["#", "a # b"],
    ),
    (
        "language:response_language",
        {"language": "fr"},
        [FRENCH, "12345"],  # no language can be told
        [ENGLISH, "これは日本語の文章です。"],
    ),
    ("language:response_language", {"language": "zh"}, ["今天天气很好。我们一起去公园散步吧。"], [ENGLISH]),
    (
        "change_case:english_capital",
        {},
        [ENGLISH.upper(), ENGLISH.upper() + " 42!"],
        [ENGLISH, RUSSIAN.upper(), ENGLISH.upper() + " and", "12"],
    ),
    (
        "change_case:english_lowercase",
        {},
        [ENGLISH, "\n" + ENGLISH + "?"],
        [ENGLISH.title(), FRENCH.lower(), RUSSIAN.lower(), "Ok " + ENGLISH],
    ),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "at least"},
        ["NASA and ESA", "I AM here", "STATE-OF-THE-ART IT"],
        ["NASA", "Nasa and Esa", "STATE-OF-THE-ART", "12 34"],
    ),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "less than"},
        ["NASA", ""],
        ["NASA ESA", "A B C"],
    ),
    ("punctuation:no_comma", {}, ["no comma", "a; b", "a\u060c b"], ["a, b", "1,000", ","]),
    (
        "startend:end_checker",
        {"end_phrase": "That is all."},
        ["Yes. That is all.", "THAT IS ALL.\n", '"So: that is all."'],
        ["That is all", "That is all. Bye", ""],
    ),
    ("startend:quotation", {}, ['"all of it"', ' "a" and "b" \n', '""'], ['"a', 'a"', '"', "\u201ca\u201d", "'a'"]),
    (
        "combination:two_responses",
        {},
        ["one\n******\ntwo", "******one******two******", "a *** b ****** c"],
        ["one", "one****** one ", "a******b******c", "a************b", "******"],
    ),
    (
        "combination:repeat_prompt",
        {"prompt_to_repeat": QUESTION},
        [QUESTION + "\n\nRoses are red", "  " + QUESTION.upper()],
        ["Roses. " + QUESTION, QUESTION.replace("\n", " "), "Write"],
    ),
]
