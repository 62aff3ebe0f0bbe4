"""``docs/ifbench.md``: all instructions with what they check. ``python -m ...ifbench_checks.document`` writes it."""

from __future__ import annotations

from pathlib import Path

from miles.rollout.rm_hub.ifbench_checks import BUILT, REFUSED, Instruction

PAGE = Path(__file__).parents[4] / "docs" / "ifbench.md"
SOURCES = {
    "IFEval": "the 25 of Zhou et al. 2023",
    "IFBench": "the 58 of Pyatkin et al. 2025, for evaluation",
    "IFTrain": "the 29 that IFBench's authors train with",
}

BEGIN = """\
# ifbench: instructions that can be checked

`--rm-type ifbench`, or `"rm_type": "ifbench"` in a row's metadata, gives 1.0 if a response follows every instruction of
its row, else 0.0. An empty response follows none. The response is looked at as it is: words between `<think>` and
`</think>` belong to it. Unless `--rollout-skip-special-tokens` is given, so does the token that ends it; a notice says so.

| in the row's metadata | |
|---|---|
| `instruction_id_list` | the ids, one or more |
| `kwargs` | a list with an object of arguments for each id, or one object for all; keys that an instruction does not know, and nulls, do not count |
| `prompt_text` | the request to repeat, where `prompt_to_repeat` is not among the arguments |
| `record_id` | told in errors |

```json
{"prompt": "Write about rain in at least 50 words, without commas.", "label": null, "metadata": {"record_id": 7,
 "instruction_id_list": ["length_constraints:number_words", "punctuation:no_comma"],
 "kwargs": [{"num_words": 50, "relation": "at least"}, {}]}}
```

A row with an id that is unknown or refused, or with an argument that is missing or of the wrong kind, is told with its line
before anything starts, and in data that a source of yours makes when the first response is rewarded (`CannotCheck`). An
argument that is missing is never drawn at random.

Four instructions need a package: `pip install 'miles[ifbench]'` (langdetect, syllapy, textblob; they carry their data with
them). All others need nothing, and nothing is fetched from anywhere. Every check takes time in proportion to the response.
"""

END = """\
## What counts as what

* A word is what the instruction's publication counts: runs of letters and digits where words are counted (`don't` is two),
  what stands between spaces where words are compared. Where a word's place counts, a contraction is two words.
* A sentence ends with `.`, `!`, `?` or an ellipsis before a space; not behind abbreviations (`Dr.`, `e.g.`, `U.S.`), initials
  and numbers of a list, and not with a line. What follows the last such mark is a sentence, too.
* Keywords are text, not patterns: `C++` is looked for as it is written.

## Where the published code decides otherwise

These checks were written from the descriptions. They differ from the published code, in other tokenizers and word lists a
little everywhere, and on purpose in these:

| id | published code | here |
|---|---|---|
| `ratio:sentence_type`, `ratio:sentence_balance` | a response without such sentences follows | it does not |
| `count:conjunctions` | `and` and `And` are two | one |
| `format:parentheses`, `format:quotes` | the innermost has to be closed; an apostrophe is a quote | all have to be closed; an apostrophe is none |
| `format:title_case` | `Don't` is not in title case | it is |
| `format:sub-bullets` | any `*` and `-`; without a bullet point it is followed | lines that begin with them; at least one bullet point |
| `format:no_bullets_bullets` | an empty line behind the first bullet point fails | empty lines do not count |
| `format:output_template` | the three labels in any order | in the order of the template |
| `sentence:alliteration_increment` | all alliterations of a sentence added up | the longest |
| `words:paragraph_last_first` | `Hello, ... hello` differ | they are the same word |
| `words:start_verb` | a tagger of NLTK | TextBlob's |
| `custom:european_capitals_sort` | without Kyiv | with or without |
| `custom:date_format_list` | month and day 0 are dates | they are not |
| `detectable_format:number_bullet_lists` | a rule (`---`) is a bullet point | it is not |
| `keywords:palindrome` | a single letter is one | three letters or more |
| `keywords:exclude_word_harder` | between spaces, in this case only | by itself, in whatever case |
| `count:counting_composition` | punctuation marks count as words | words only |
| `new:copy_span_idx` | without the last character | with or without |
| `count:count_unique` | punctuation may not repeat either | words only |
"""


def page() -> str:
    """The page's text."""
    parts = [BEGIN]
    for source, words in SOURCES.items():
        rows = [_row(found) for found in sorted(BUILT.values(), key=lambda found: found.id) if found.source == source]
        parts.append(f"## {source}\n\n{words[0].upper()}{words[1:]}. All {len(rows)} are built.\n")
        parts.append("\n".join(["| id | arguments | followed if |", "|---|---|---|", *rows]) + "\n")
    refused = [f"| `{name}` | {why} |" for name, why in sorted(REFUSED.items())]
    parts.append("\n".join(["## Refused", "", "| id | why |", "|---|---|", *refused]) + "\n")
    return "\n".join([*parts, END])


def _row(found: Instruction) -> str:
    names = ", ".join(f"`{name}`" for name in found.kinds)
    meaning = found.meaning.replace("|", "\\|").replace("*", "\\*").replace("<", "\\<")
    needs = f" (needs {found.needs})" if found.needs else ""
    return f"| `{found.id}` | {names} | {meaning[:-1]}{needs} |"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
