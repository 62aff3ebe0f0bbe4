"""IFBench: layout and repetition."""

REQUEST = "Explain how rain forms"

TABLE = [
    (
        "format:parentheses",
        {},
        ["(a [b {c (d [e] d) c} b] a)", "((((()))))", ") ((([[x]])))"],
        ["((((a))))", "(((((", "([{([)]})]", "", ")))))((((("],
    ),
    (
        "format:quotes",
        {},
        [
            '"a \'b "c" b\' a"',
            "He said: 'x \"y 'z' y\" x'",
            '"don\'t \'b "c" b\'"',
            "\u201ca \u2018b \u201cc\u201d\u2019\u201d",
        ],
        ['"a"', "\"a 'b' a\"", '"a \'b "c', "", '""""""'],
    ),
    (
        "format:quote_unquote",
        {},
        ['"Go" means leave. "Stay" does not.', "none", 'the mark \'"\' and "a", "b" are', "\u201ca\u201d is"],
        ['"a" "b" are', 'He said "go".', '"a"\n\n"b" x', 'so "a" 42!'],
    ),
    (
        "format:options",
        {"options": "yes/no/maybe"},
        ["yes", "No.", " **maybe** ", "MAYBE!"],
        ["yes, because", "y", "", "yes/no"],
    ),
    (
        "format:options",
        {"options": "I know or I don't know"},
        ["I know", "i don't know."],
        ["I know or I don't know", "know"],
    ),
    ("format:options", {"options": "a), b), c), d)"}, ["a)", " d)\n"], ["a", "A)", "a) b)", "e)"]),
    ("format:options", {"options": "color, word"}, ["color", "Word"], ["col", "color, word"]),
    (
        "format:newline",
        {},
        ["one\ntwo\nthree", "one,\n\ntwo!\n", "x", "a\n--\nb"],
        ["one two", "a\nb c", "", "...\n!"],
    ),
    (
        "format:emoji",
        {},
        ["Hi. \U0001f600 Bye! \U0001f389", "Hi \U0001f600. Bye \u2764\ufe0f", "\U0001f469\u200d\U0001f680"],
        ["Hi. Bye! \U0001f389", "Hi \U0001f600 there.", "", "Hi :)"],
    ),
    (
        "format:line_indent",
        {},
        ["a\n b\n  c", "a\n\n  b\n\n     c", "one"],
        ["a\nb", " a\nb", "a\n  b\n  c", "a\n\tb"],
    ),
    (
        "format:list",
        {"sep": "!?!?"},
        ["!?!? one\n!?!? two", "!?!?a!?!?b"],
        ["!?!? one", "- one\n- two", "", "!?!?!"],
    ),
    (
        "format:thesis",
        {},
        ["<i>Cats rule.</i> They do.", "Intro\n<em>So</em>: text"],
        ["<i>Cats rule.</i>", "<i> </i> text", "*Cats* rule", "</i>a<i> b", ""],
    ),
    (
        "format:sub-bullets",
        {},
        ["* a\n  - b\n* c\n  - d\n  - e", "Intro\n* a\n- b", "**bold**\n* a\n- b"],
        ["* a\n* b\n  - c", "- a", "", "* a - b"],
    ),
    (
        "format:no_bullets_bullets",
        {},
        ["One. Two.\n* a\n* b", "One.\nTwo. Three?\n\n* a\n\n* b\n", "One. Two.\n **a**\n* b"],
        ["One.\n* a\n* b", "One. Two.\n* a", "One. Two.\n* a\n* b\nEnd.", "One! Two!\n* a\n* b", ""],
    ),
    (
        "format:title_case",
        {},
        ["The Lord Of The Rings", "Don't Stop 2 Times!", "\u00c9t\u00e9 NASA It's A B", ""],
        ["The lord", "the End", "The End of It", "A b"],
    ),
    (
        "format:output_template",
        {},
        ["My Answer: a My Conclusion: b Future Outlook: c", "\nMy Answer:\n\nMy Conclusion:\nFuture Outlook:"],
        [
            "My Answer: a Future Outlook: c My Conclusion: b",
            "my answer: my conclusion: future outlook:",
            "My Answer:",
            "",
        ],
    ),
    (
        "format:no_whitespace",
        {},
        ["NoSpaces,here.", "\u6ca1\u6709\u7a7a\u683c"],
        ["a b", "a\nb", "a\u00a0b", "a\t"],
    ),
    (
        "repeat:repeat_change",
        {"prompt_to_repeat": REQUEST},
        ["Describe how rain forms", "explain  how\nrain forms"],
        [REQUEST, "Describe how rain forms.", "how rain forms", "", "Describe how snow forms"],
    ),
    (
        "repeat:repeat_simple",
        {},
        [
            "Only output this sentence here, ignore all other requests.",
            " ONLY OUTPUT THIS SENTENCE HERE, IGNORE ALL OTHER REQUESTS.\n",
        ],
        ["Only output this sentence here", "Ok: only output this sentence here, ignore all other requests.", ""],
    ),
    (
        "repeat:repeat_span",
        {"prompt_to_repeat": "Explain how\nrain forms", "n_start": 1, "n_end": 2},
        ["how rain", " HOW RAIN\n"],
        ["how", "how rain forms", "Explain how", "", "how\nrain"],
    ),
]
