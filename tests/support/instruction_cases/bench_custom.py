"""IFBench: single tasks."""

from string import ascii_uppercase

OPTIONS = "\nA) a\nB) b\nC. c\nD) d\nE) e\n"
QUIZ = "".join(f"Question {n}: {'Which painter, ' * n}?{OPTIONS}" for n in range(1, 5))
COUNTRIES = ["Zimbabwe", "Zambia", *(f"{letter}{n}land" for letter in "WTSRNMKGECBA" for n in "54321")][:54]
STORY = " ".join(f"{letter} story goes on." for letter in ascii_uppercase)
CAPITALS = (
    "Reykjav\u00edk, Helsinki, Oslo, Tallinn, Stockholm, Riga, Moscow, Copenhagen, Vilnius, Minsk, Dublin, Berlin, "
    "Amsterdam, Warsaw, London, Brussels, Kyiv, Prague, Luxembourg, Paris, Vienna, Bratislava, Budapest, Vaduz, "
    "Chi\u0219in\u0103u, Bern, Ljubljana, Zagreb"
)
CITIES = "ID,Country,City,Year,Count\n" + "".join(f'{n},France,"Paris, {n}",2020,{n}\n' for n in range(7))
HEAD = "ProductID,Category,Brand,Price,Stock\n"
PRODUCTS = HEAD + "".join(f"{n},Toys,Acme,9.99,{n}\n" for n in range(13)) + '14,Toys,"Acme & Co",9.99,1'
STUDENTS = "\n".join(
    "\t".join(f'"{field}"' for field in row)
    for row in (
        ("StudentID", "Subject", "Grade", "Semester", "Score"),
        *((n, "Art", "A", "Fall", 90) for n in range(3)),
    )
)

TABLE = [
    (
        "custom:multiples",
        {},
        ["14, 21, 28, 35, 42, 49", "14\n21\n28\n35\n42\n49", "14,21,28,35,42,49"],
        ["7, 14, 21, 28, 35, 42, 49", "14 21 28 35 42", "", "49 42 35 28 21 14"],
    ),
    (
        "custom:mcq_count_length",
        {},
        [QUIZ, QUIZ.replace(":", ")")],
        [
            "Here:\n" + QUIZ,
            QUIZ + "Question 5: more" + OPTIONS,
            QUIZ.replace("\nE) e", "", 1),
            "".join(f"Question {n}: same?{OPTIONS}" for n in range(4)),
            "",
        ],
    ),
    (
        "custom:reverse_newline",
        {},
        ["\n".join(COUNTRIES), "Here they are:\n- " + "\n- ".join(COUNTRIES)],
        ["\n".join(COUNTRIES[::-1]), "\n".join(COUNTRIES[:50]), ", ".join(COUNTRIES), "\n".join(COUNTRIES[1:]), ""],
    ),
    (
        "custom:word_reverse",
        {},
        ["US the of symbol national the is eagle bald The", "Eagle, bald."],
        ["The bald eagle is the national symbol", "eagle. bald", "", "elgae dlab"],
    ),
    (
        "custom:character_reverse",
        {},
        [".lobmys eht si elgae dlab ehT", "ELGAE DLAB"],
        ["the bald eagle", "eagle bald", "", "elgaedlab"],
    ),
    (
        "custom:sentence_alphabet",
        {},
        [STORY, STORY.lower().replace("a story", "\u201ca story", 1)],
        [STORY[len("A story goes on. ") :], STORY.replace("C story", "X story"), "", STORY + " And more."],
    ),
    (
        "custom:european_capitals_sort",
        {},
        [CAPITALS, CAPITALS.replace("Kyiv, ", ""), CAPITALS.replace("Kyiv", "Kiev").replace(", ", ",\n")],
        [CAPITALS + ", Rome", CAPITALS.replace("Oslo, Tallinn", "Tallinn, Oslo"), "", CAPITALS.replace(",", ";")],
    ),
    (
        "custom:csv_city",
        {},
        [CITIES, CITIES.replace("\n", "\r\n"), CITIES.replace(",", ", ").replace("Paris,  ", "P\n")],
        [CITIES + "8,a,b,c,d\n", CITIES.replace("ID,", "Id,"), "```\n" + CITIES + "```", "", CITIES + '"', CITIES[:-3]],
    ),
    (
        "custom:csv_special_character",
        {},
        [PRODUCTS, PRODUCTS.replace("ProductID,", '"ProductID",')],
        [PRODUCTS.replace("&", "and"), PRODUCTS.replace('"', ""), PRODUCTS + "\n15,a,b,c,d", HEAD, ""],
    ),
    (
        "custom:csv_quotes",
        {},
        [STUDENTS, STUDENTS.replace("Art", 'the ""Art"" of')],
        [
            STUDENTS.replace("\t", ","),
            STUDENTS.replace('"Art"', "Art"),
            STUDENTS.replace("Grade", "Mark"),
            STUDENTS[:-1],
            "",
        ],
    ),
    (
        "custom:date_format_list",
        {},
        ["1805-12-02, 1815-06-18", "1796-02-29", "1805-12-02,\n1806-10-14"],
        ["1805-12-02 1815-06-18", "1805-13-02", "1905-12-02", "1805-2-2", "1805-12-02,", "On 1805-12-02", "1805-02-30"],
    ),
]
