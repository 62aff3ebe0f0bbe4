r"""TeX as plain text, by pylatexenc. Fractions and roots keep what they group: ``\frac{x+1}{2}`` is ``(x+1)/2``.

May take long on strange text, so that it runs in grader processes only. No file is ever read (``\input``).
"""

from __future__ import annotations

import functools
import re
from typing import Any

_SYMBOLS = (
    ("\u221a", "sqrt"), ("\u03c0", "pi"), ("\u221e", "inf"), ("\u222a", "U"), ("\u00b7", "*"), ("\u00d7", "*"),
    ("\u2212", "-"), ("^\u2218", ""),
)  # fmt: skip
_INTEGER = re.compile(r"-?\d+")
_TERM = re.compile(r"-?[\w.\u221a()]+")
_ONE_FACTOR = re.compile(r"\d+(\.\d+)?|[^\W\d_]|\u221a\([^()]*\)")


def plain_text(text: str) -> str:
    """Without commands of TeX, and with ASCII names for mathematical signs. Braces of groups stay."""
    if "\\" in text:
        text = _without_tex(text)
    for symbol, plain in _SYMBOLS:
        text = text.replace(symbol, plain)
    return text.strip()


def _without_tex(text: str) -> str:
    for other in ("\\tfrac", "\\dfrac", "\\cfrac"):
        text = text.replace(other, "\\frac")
    try:
        return str(_converter().latex_to_text(text))
    except Exception:  # noqa: BLE001 - boundary: a library at work on what a model wrote
        return text


@functools.cache
def _converter() -> Any:
    from pylatexenc import latex2text

    context = latex2text.get_default_latex_context_db()
    macros = [
        latex2text.MacroTextSpec("frac", simplify_repl=_fraction),
        latex2text.MacroTextSpec("sqrt", simplify_repl=_root),
    ]
    context.add_context_category("answers", prepend=True, macros=macros)
    return latex2text.LatexNodes2Text(
        latex_context=context, math_mode="text", keep_braced_groups=True, keep_braced_groups_minlen=0
    )


def _arguments(node: Any, converter: Any) -> list[str]:
    found = [] if node.nodeargd is None else node.nodeargd.argnlist
    return ["" if argument is None else converter.nodelist_to_text([argument]).strip(" {}") for argument in found]


def _fraction(node: Any, l2tobj: Any) -> str:
    """A space before it: ``3\\frac{1}{2}`` is a mixed number."""
    above, below = [*_arguments(node, l2tobj), "", ""][:2]
    if _INTEGER.fullmatch(above) and _INTEGER.fullmatch(below):
        return f" {above}/{below}"
    above = above if _TERM.fullmatch(above) and not _INTEGER.fullmatch(above) else f"({above})"
    return f" {above}/{below if _ONE_FACTOR.fullmatch(below) else f'({below})'}"


def _root(node: Any, l2tobj: Any) -> str:
    degree, radicand = ["", *_arguments(node, l2tobj)][-2:]
    return f"root^{degree}\u221a({radicand})" if degree else f"\u221a({radicand})"
