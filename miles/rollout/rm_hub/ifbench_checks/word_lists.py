"""Words of English that checks count or know, and facts that some instructions ask for."""

from __future__ import annotations


def _words(*lines: str) -> tuple[str, ...]:
    return tuple(" ".join(lines).split())


CONJUNCTIONS = frozenset(_words("and but for nor or so yet"))
"""The seven coordinating conjunctions."""

PRONOUNS = frozenset(
    _words(
        "i you he she it we they my your his its our their mine yours hers ours theirs me him her us them myself",
        "yourself himself herself itself ourselves yourselves themselves this that these those who whom whose which",
        "what whoever whomever whichever whatever anybody anyone anything everybody everyone everything nobody",
        "nothing somebody someone something all any both each either neither none some",
    )
)

STOP_WORDS = frozenset(
    _words(
        # pronouns and determiners
        "i me my myself we our ours ourselves you your yours yourself yourselves he him his himself she her hers",
        "herself it its itself they them their theirs themselves who whom which what this that these those a an the",
        "some any all both each few more most other such no nor not only own same",
        # auxiliaries
        "am is are was were be been being have has had having do does did doing can will would should could",
        # prepositions, conjunctions, adverbs
        "of at by for with about against between into through during before after above below to from up down in",
        "out on off over under and but if or because as until while than too very so again further then once here",
        "there when where why how just now",
        # what is left of contractions
        "s t d ll m o re ve y don aren couldn didn doesn hadn hasn haven isn mightn mustn needn shan shouldn wasn",
        "weren won wouldn ain ma",
    )
)

PERSON_NAMES = frozenset(
    _words(
        "Emma Liam Sophia Jackson Olivia Noah Ava Lucas Isabella Mason Mia Ethan Charlotte Alexander Amelia",
        "Benjamin Harper Leo Zoe Daniel Chloe Samuel Lily Matthew Grace Owen Abigail Gabriel Ella Jacob Scarlett",
        "Nathan Victoria Elijah Layla Nicholas Audrey David Hannah Christopher Penelope Thomas Nora Andrew Aria",
        "Joseph Claire Ryan Stella Jonathan",
    )
)
"""Those that IFBench's instruction lists."""

NORTHERN_CAPITALS = _words(
    "Reykjavik Helsinki Oslo Tallinn Stockholm Riga Moscow Copenhagen Vilnius Minsk Dublin Berlin Amsterdam Warsaw",
    "London Brussels Kyiv Prague Luxembourg Paris Vienna Bratislava Budapest Vaduz Chisinau Bern Ljubljana Zagreb",
)
"""Europe's capitals north of 45 degrees, from north to south."""

BEFORE_NUMBERS = frozenset(_words("no nos fig figs vol vols p pp"))
"""Abbreviations, if a number follows."""

BEFORE_NAMES = frozenset(
    _words("mr mrs ms dr prof rev gen col capt lt sgt gov sen rep pres mt vs e.g i.e cf ca approx")
)
"""Abbreviations behind which a sentence goes on."""

ABBREVIATIONS = BEFORE_NAMES | frozenset(
    _words(
        "sr jr hon st ft al inc ltd co corp dept est ed eds viz jan feb mar apr jun jul aug sep sept oct nov dec",
        "a.m p.m ph.d m.d b.a m.a etc",
    )
)
"""Those, and others behind which a sentence may end."""

SENTENCE_STARTERS = frozenset(
    _words(
        "The A An In On At It He She We They You I This That These Those There Here But And Or So However When",
        "While If As After Before His Her Its Our Their My Your What Who Why How Where",
    )
)

LANGUAGES = frozenset(
    _words(
        "af ar bg bn ca cs cy da de el en es et fa fi fr gu he hi hr hu id it ja kn ko lt lv mk ml mr ne nl no pa",
        "pl pt ro ru sk sl so sq sv sw ta te th tl tr uk ur vi zh zh-cn zh-tw",
    )
)
"""Codes of the languages that langdetect tells apart, and zh for both of Chinese."""
