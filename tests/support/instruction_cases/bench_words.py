"""IFBench: words and sentences."""

PALINDROMES = "level radar civic kayak refer rotor madam tenet solos stats"

TABLE = [
    (
        "words:alphabet",
        {},
        ["Yes, zebras are big.", "a b c d e f g h i j k l m n o p q r s t u v w x y z a", "X-rays, you!"],
        ["a c", "a b d", "1 a b", "", "\u00e9 f"],
    ),
    (
        "words:vowel",
        {},
        ["a banana and an eel in", "mmm", " one go \n"],
        ["a e i o", "one\ntwo", "aeiou", "OUIA"],
    ),
    (
        "words:consonants",
        {},
        ["Strong winds blow hard", "first!", "rhythm, myth-"],
        ["a strong wind", "banana", "", "strong 42", "so"],
    ),
    (
        "words:palindrome",
        {},
        [PALINDROMES, PALINDROMES.upper().replace(" ", ", "), "level " * 10],
        [PALINDROMES[6:], "noon " * 10, "", "levels " * 10],
    ),
    (
        "words:prime_lengths",
        {},
        ["We see seven kings", "I'm... ok!", "x" * 97 + " " + "y" * 101],
        ["a cat", "four", "", "x" * 91],
    ),
    (
        "words:start_verb",
        {},
        ["Write a poem about it.", "Consider this case.", "Is this true?", "begin"],
        ["The cat sat.", "Here it is.", "Beautiful days", "42"],
    ),
    (
        "words:repeats",
        {"small_n": 2},
        ["the cat the dog", "a A b", ""],
        ["the The THE", "no, no! no.", "x x x"],
    ),
    (
        "words:odd_even_syllables",
        {},
        ["cat hello cat", "happy dog", "one"],
        ["cat dog", "hello happy", "cat hello happy"],
    ),
    (
        "words:last_first",
        {},
        ["I like cats. Cats like me! Me?", "One.", "Go \u201chome\u201d. HOME is far."],
        ["I like cats. Dogs too.", "A b. B c. D", "a b. !!! b."],
    ),
    (
        "words:paragraph_last_first",
        {},
        ["Hello, I say hello.", "So it is so\n\n**Yes**, yes!", "one"],
        ["Hello there", "so it is so\nyes no", "a b a b"],
    ),
    (
        "words:no_consecutive",
        {},
        ["The cat ran", "a b a b", "", "one"],
        ["big bears", "the cat can", "A, a"],
    ),
    (
        "words:keywords_specific_position",
        {"keyword": "moon", "n": 2, "m": 3},
        ["One. I saw moon rise.", "Dr. No. A full, Moon!"],
        ["I saw moon.", "One. The moon rose.", "One. I saw moons", "", "One. I don't moon"],
    ),
    (
        "words:words_position",
        {"keyword": "red"},
        ["A red car was red now.", "the RED one", "red red", "a red car"],
        ["red car was red", "a red", "a red big car", "", "red"],
    ),
    (
        "sentence:keyword",
        {"word": "moon", "N": 2},
        ["One. The Moon!", "Aha. b moon", "Why? moon. Yes."],
        ["The moon. One.", "One. Moonlight.", "moon", ""],
    ),
    (
        "sentence:increment",
        {"small_n": 2},
        ["One two. One two three four! a b c d e f?", "One.", "Go. It's only me"],
        ["One two. Three four.", "a b c. a", "a. a b c. a b c d"],
    ),
    (
        "sentence:alliteration_increment",
        {},
        ["Big cat. Bold bears. Tall tan tigers!", "One.", "No run here. See \u201cSally\u201d."],
        ["Bold bears. Big cat.", "Bold bears. Tall tigers.", "a b. c d."],
    ),
]
