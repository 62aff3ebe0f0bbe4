"""Responses that miss by little, or just follow: each tells a check from one with a sign or a number changed."""

from support.instruction_cases.bench_custom import CAPITALS, CITIES, HEAD, OPTIONS, QUIZ, STUDENTS

CITY_ROWS = CITIES.splitlines(keepends=True)
TALE = {"prompt_to_repeat": "Tell me more"}
SCORES = ("ID,Country,City,Year,Coun", "ID,Country,City,Year,Counts", "AD,Country,City,Year,Count")

TABLE = [
    ("count:words_japanese", {"N": 2}, ["a \u2014 b \u30ab"], ["a \u2014 b c"]),
    ("ratio:overlap", {"reference_text": "a b c d", "percentage": 100}, ["a b c"], ["a c d", "a b d", "a c c"]),
    (
        "ratio:sentence_type",
        {},
        ["Ants. Bees. Cats? Dogs. Eels? Foxes."],
        ["Ants. Bees. Cats. Dogs?", "Ants. Bees. Cats. Dogs. Eels. Foxes? Gnus?"],
    ),
    (
        "ratio:sentence_balance",
        {},
        ["Ants. Bees? Cats! Dogs. Eels? Foxes!"],
        [
            "Ants. Bees. Cats? Dogs!",
            "Ants. Bees? Cats? Dogs!",
            "Ants. Bees? Cats! Dogs!",
            "Ants. Bees. Cats? Dogs? Eels!",
            "Ants. Bees? Cats? Dogs! Eels!",
        ],
    ),
    ("ratio:sentence_words", {}, ["Ab. Cd. Ef."], ["Ab. Cd. Ef. Gh.", "Ab. Cd.", "Ab. Cd. Efg.", "A. Bcd. Ef."]),
    ("words:alphabet", {}, ["x y z a b"], ["d c", "b a", "a c", "\u00ff d e", "d \u00ff"]),
    ("sentence:alliteration_increment", {}, ["Ants. Big bees."], ["Ants. Bees run.", "Big bees. Cool cats."]),
    ("words:last_first", {}, ["Ant. Ant bee. Bee"], ["Zebra. Ant.", "Ant. Zebra."]),
    ("words:palindrome", {}, ["stats " * 10], ["stone " * 10, "drama " * 10]),
    (
        "words:words_position",
        {"keyword": "kat"},
        ["a kat b kat c"],
        ["a kat b ant c", "a kat b zoo c", "a ant b kat c", "a zoo b kat c", "a zoo b zoo c", "a ant b ant c"],
    ),
    (
        "sentence:increment",
        {"small_n": 2},
        ["Ants. A b c."],
        ["Ants. A b c d.", "Ants. A b.", "A b c. Ants.", "Ants. A b c. A b c d e f."],
    ),
    ("format:quotes", {}, ['x"a \'b"c"d\' e"y', "'a \"b 'c' d\" e'"], ["'a' \"b\" 'c'", "\"a 'b' c\""]),
    ("format:quote_unquote", {}, ["123...", "no quote"], ['say "', 'say "" then more', '"so" 12']),
    (
        "format:no_bullets_bullets",
        {},
        ["Ants. Bees.\n  * a\n \t\n  * b"],
        ["Is it? Is it so?\n* a\n* b", "Ants! Bees!\n* a\n* b"],
    ),
    ("format:title_case", {}, ["2b Or A"], ["b2b Test"]),
    ("repeat:repeat_simple", {}, ["ONLY output this sentence here, ignore all other requests."], ["zzz", "a"]),
    ("repeat:repeat_change", TALE, ["Tells me more"], ["Show me and", "Show me zoo", "Show me more more", "Show me"]),
    ("custom:mcq_count_length", {}, [QUIZ], [QUIZ.replace(OPTIONS, OPTIONS + "e) f\n"), QUIZ.replace("E) e", "")]),
    ("custom:european_capitals_sort", {}, [CAPITALS + ", ", CAPITALS + ","], [", ".join(CAPITALS.split(", ")[1:])]),
    (
        "custom:csv_city",
        {},
        [CITIES.strip()],
        [
            *(CITIES.replace("ID,Country,City,Year,Count", columns) for columns in SCORES),
            "".join(CITY_ROWS[:-1]),
            "".join(CITY_ROWS[:-1]) + "7,a,b,c\n",
            "".join(CITY_ROWS[:-1]) + "7,a,b,c,d,e\n",
        ],
    ),
    (
        "custom:csv_special_character",
        {},
        [HEAD + '1,Toys,"!",9,1\n' + "2,Toys,Acme,9,1\n" * 13],
        [HEAD.replace("Brand", '"Brand"') + "2,Toys,Acme,9,1\n" * 14],
    ),
    (
        "custom:csv_quotes",
        {},
        [STUDENTS],
        [STUDENTS.replace('"Art"', field) for field in ('!"Art"', '"Art"!', "!Art!", "~Art~")],
    ),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 1}, ["*a*"], ["* *", "** **", "*  *  *"]),
    ("startend:quotation", {}, ['"so"'], ['!so"', '"so!', "!so!", "~so~"]),
    (
        "copy:repeat_phrase",
        {"phrase": "one two three", "small_n": 1},
        ["one big three one"],
        ["one big three, one old three", "one big old", "one"],
    ),
    (
        "new:copy_span_idx",
        {"prompt_to_repeat": "abcdefgh", "n_start": 1, "n_end": 4},
        ["bcd", "bcde"],
        ["bc", "bcdef", "abcd", "cde"],
    ),
    ("detectable_format:sentence_hyphens", {}, ["So.-No."], ["So. No.", "So.-No. Yes."]),
    ("detectable_format:square_brackets", {}, ["[a] [b]"], ["(a]", "[a)", "[a] (b]", "{a}"]),
    ("keywords:keyword_specific_position", {"keyword": "kat", "n": 1, "m": 2}, ["a kat"], ["a zoo", "a ant", "kat a"]),
    (
        "count:count_increment_word",
        {"keyword1": "sun", "keyword2": "moon"},
        ["moon sun moon"],
        ["sun moon moon moon", "sun sun moon moon", "sun moon"],
    ),
    ("keywords:palindrome", {}, ["a level b"], ["stone", "drama", "aa b"]),
    (
        "count:counting_composition",
        {"n_sent": 2, "n_words": 2},
        ["A b. C d.***E f. G h.***I j. K l."],
        [
            "A b. C d. E f.***E f. G h.***I j. K l.",
            "A b.***E f. G h.***I j. K l.",
            "A b c. C d.***E f. G h.***I j. K l.",
            "Ants. C d.***E f. G h.***I j. K l.",
        ],
    ),
]
