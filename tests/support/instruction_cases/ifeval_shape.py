"""IFEval: length, contents, layout."""

TABLE = [
    (
        "length_constraints:number_words",
        {"num_words": 3, "relation": "at least"},
        ["one two three", "don't stop", "a-b_c d e"],
        ["one two", "... !!! ???", ""],
    ),
    ("length_constraints:number_words", {"num_words": 3, "relation": "less than"}, ["one two", ""], ["a b c", "a,b,c"]),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 3, "relation": "at least"},
        ["One. Two! Three?", "one. two. three", "\u4e00\u3002\u4e8c\u3002\u4e09"],
        ["Dr. Smith met J. R. Jones. Then he left.", "Pi is 3.14. e.g. that", "Wait... what?", ""],
    ),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 2, "relation": "less than"},
        ["One.", 'He said "Go!" and left.'],
        ["One. Two.", "One? Yes"],
    ),
    (
        "length_constraints:number_paragraphs",
        {"num_paragraphs": 2},
        ["one\n***\ntwo", "***\none *** two\n***", "one***two"],
        ["one\n\ntwo", "one\n***\n\n***\ntwo", "a***b***c", ""],
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Then"},
        ["One.\n\nThen two.", 'One.\n\n"then, two', "One.\n\n\n\n**Then** two"],
        ["One.\nThen two.", "Then.\n\nOne", "One.\n\nThenceforth", "One.\n\nTwo\n\nThen", ""],
    ),
    (
        "detectable_content:number_placeholders",
        {"num_placeholders": 2},
        ["[name], [address]", "[a [b] c] and []", "```\n[x] = [y]\n```"],
        ["[name]", "(name) (address)", "[a\nb] [c]", "[[[[", ""],
    ),
    (
        "detectable_content:postscript",
        {"postscript_marker": "P.S."},
        ["Bye.\nP.S. more", "p. s. more", "so p.s."],
        ["PS: more", "P.S more", ""],
    ),
    (
        "detectable_content:postscript",
        {"postscript_marker": "P.P.S"},
        ["P.P.S more", "p. p. s. more"],
        ["P.S. more", "PPS"],
    ),
    (
        "detectable_content:postscript",
        {"postscript_marker": "Note (*)"},
        ["Note (*) well", "note (*)"],
        ["Note", "Note ( )"],
    ),
    (
        "detectable_format:number_bullet_lists",
        {"num_bullets": 2},
        ["* one\n* two", "  - one\n- two\ntext", "Title\n---\n* a\n\n* b\n***\n**bold** text"],
        ["* one", "* a\n* b\n- c", "\u2022 a\n\u2022 b", "1. a\n2. b", ""],
    ),
    (
        "detectable_format:constrained_response",
        {},
        ["My answer is yes.", "Well: My answer is maybe. ", "```\nMy answer is no.\n```"],
        ["my answer is yes.", "My answer is yes", "Yes."],
    ),
    (
        "detectable_format:number_highlighted_sections",
        {"num_highlights": 2},
        ["*one* and *two*", "**one** *two*", "*a**b*"],
        ["*one*", "**one**", "* a\n* b", "****", "*a\nb* *c"],
    ),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "SECTION", "num_sections": 2},
        ["SECTION 1\na\nSECTION 2\nb", "SECTION1 SECTION2 SECTION3"],
        ["SECTION 1\na", "Section 1\nSection 2", "SECTION A SECTION B", ""],
    ),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "PARTIE (", "num_sections": 1},
        ["PARTIE (1)", "x PARTIE ( 2"],
        ["PARTIE 1", "PARTIE"],
    ),
    (
        "detectable_format:json_format",
        {},
        ['{"a": [1, null]}', '```json\n{"a": 1}\n```', ' "text" ', "1" * 5000],
        ["{'a': 1}", 'Here: {"a": 1}', "", '{"a": 1', "[" * 100_000],
    ),
    (
        "detectable_format:title",
        {},
        ["<<A title>>\ntext", "text\n  <<<x>>>", "<<a>> b>>"],
        ["<A title>", "<<>>", "<< \n >>", "<<a\nb>>", ">> a <<", ""],
    ),
]
