"""Formulas: what is read, as the library's own reader reads it, and what is no formula. Nothing is ever evaluated."""

import ast
import inspect
import time

import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st
from sympy.parsing.sympy_parser import implicit_multiplication_application, parse_expr, standard_transformations

from miles.rollout.rm_hub import algebra, formula, grader, math_compare, math_tex
from miles.rollout.rm_hub.algebra import expression_of, is_zero_difference
from miles.rollout.rm_hub.formula import MOST_DEPTH, NotAFormula, parse

TRANSFORMATIONS = (*standard_transformations, implicit_multiplication_application)


def read(text):
    return expression_of(parse(text))


def librarys(text):
    """The library's reader is Python's ``eval``: only for texts that stand here, or that are made here."""
    return parse_expr(text.replace("^", "**"), transformations=TRANSFORMATIONS)


SAME = [
    "1", "12.5", ".5", "3.", "2e3", "2e", "x", "2x", "x2", "xy", "x(x+1)", "2(3)", "(x)2", "x(1)(2)", "xy(2)", "-x",
    "--x", "+x", "2--3", "2*-3", "2/-3", "2^-1", "-2^2", "2^3^2", "(2^3)^2", "1/2x", "x^2y", "2^xy", "-x^2y", "a/b/c",
    "a-b-c", "a-(b-c)", "x!", "3!", "2^3!", "x!y", "sqrt(2)", "sqrt(2)x", "2sqrt(3)", "sqrt(x+1)", "sqrt(12)",
    "ln(2)", "pi", "2pi", "pi/2", "e^2", "x_1", "x_1+x_2", "ax_1", "mu*2", "um", "xi", "sqrt2", "pi2", "2.5.3", "oo",
    "((((x))))", "x**2", "3!/x", "(1+x)(1-x)",
]  # fmt: skip


@pytest.mark.parametrize("text", SAME)
def test_it_is_read_as_the_library_reads_it(text):
    assert sympy.simplify(read(text) - librarys(text)) in (0, sympy.nan)
    assert read(text) == librarys(text) or text in ("2e", "x2", "2.5.3")


NAMES = st.sampled_from(["x", "y", "pi", "2", "3", "10", "0.5", "xy"])
FORMULAS = st.recursive(
    NAMES,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["+", "-", "*", "/"]), inner).map("".join),
        st.tuples(st.sampled_from(["", "-", "sqrt", "2"]), inner).map(lambda parts: f"{parts[0]}({parts[1]})"),
        st.tuples(inner, st.sampled_from("23")).map(lambda parts: f"({parts[0]})^{parts[1]}"),
    ),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(FORMULAS)
def test_made_formulas_are_read_as_the_library_reads_them(text):
    ours, theirs = read(text), librarys(text)
    assert ours == theirs or sympy.simplify(ours - theirs) in (0, sympy.nan)


NO_FORMULA = [
    "", " ", "(", ")", "(x", "x)", "()", "x+", "*x", "x*", "x**", "2^", "^2", "x//2", "x%2", "x=1", "x<1", "x,y",
    "[x]", "{x}", "x.real", "'x'", '"x"', "x;y", "x:y", "@x", "x&y", "x|y", "~x", "x\\y", "`x`", "#x", "x\ny",
    "lambda:x", "λ:x", "x²", "½", "!x", "\x00", "\u202ex", "x\u200b", "sqrt()", "日本+", "1__2__",
    "(" * 41 + "x" + ")" * 41, "-(" * 100 + "x" + ")" * 100, "x" * 1001, "2^" * 100 + "2", "9" * 1001,
]  # fmt: skip


@pytest.mark.parametrize("text", NO_FORMULA)
def test_what_is_no_formula(text):
    with pytest.raises(NotAFormula):
        parse(text)
    assert not is_zero_difference(text, text)


BOMBS = [
    "9^9^9^9", "9^(9^(9^9))", "((((9^9)^9)^9)^9)^9", "9**9**9**9", "2^(10^10)", "(10^10)!", "9!!!!!", "99999!",
    "99999999!", "1e400", "1e-500", "2^1e300", "2^-1e300", "0.5^(9^9^9)", "(1/3)^(9^9)", "(x+1)^(9^9)", "pi^(9^9^9)",
    "(9^9^9)x", "1/(9^(9^9))", "sqrt(9^9^9)", "ln(9^9^9)", "x^(99999999)", "*".join(["9^999"] * 100), "oo^oo", "0^-1",
    "1/0", "0/0", "(" * 39 + "9^99" + ")^99" * 39,
]  # fmt: skip


@pytest.mark.parametrize("text", BOMBS)
def test_bombs_do_not_go_off(text):
    began = time.monotonic()
    is_zero_difference(text, "x")
    is_zero_difference(f"{text}+x", "x")
    assert time.monotonic() - began < 2.0


def test_depth_is_bounded_and_length_does_no_harm():
    assert read("(" * MOST_DEPTH + "x" + ")" * MOST_DEPTH) == sympy.Symbol("x")
    assert read("+".join(["x"] * 400)) == 400 * sympy.Symbol("x")
    assert read("-" * 900 + "x") == sympy.Symbol("x")
    assert read("x" * 900) == sympy.Symbol("x") ** 900


INJECTIONS = [
    "__import__('os').system('touch {file}')", "eval('1')", "exec('x=1')", "open('{file}','w')",
    "().__class__.__bases__", "print(1)", "input()", "exit()", "quit()", "breakpoint()", "Symbol('x')", "lambda x: x",
    "x if y else x", "[i for i in x]", "f'{{x}}'", "globals()", "test()", "os.system('touch {file}')", "import os",
    "id(1)", "S('x')", "sympify('x')", "N(x)", "\\input{{{file}}}", "\\write18{{touch {file}}}",
    "\\immediate\\write18{{touch {file}}}", "x.__class__", "x;import os", "x\\nimport os", "`touch {file}`",
    "$(touch {file})", "{{{{7*7}}}}", "sqrt.__globals__", "pi.func(1)", "ll(1)",
]  # fmt: skip


@pytest.mark.parametrize("text", INJECTIONS)
def test_nothing_in_an_answer_is_run(text, tmp_path, capfd):
    file = tmp_path / "made"
    text = text.format(file=file)
    for given_, expected in ((text, "x"), ("x", text), (f"x+{text}", f"{text}+y"), (f"\\frac{{{text}}}{{2}}", "x")):
        math_compare.equal_by_algebra(given_, expected)
        is_zero_difference(given_, expected)
    assert not file.exists()
    assert capfd.readouterr().out == ""


def test_no_text_is_handed_to_a_reader_that_evaluates():
    for module in (algebra, formula, grader, math_compare, math_tex):
        tree = ast.parse(inspect.getsource(module))
        called = {
            node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            for node in ast.walk(tree)
            if isinstance(node, ast.Call)
        }
        assert not called & {
            "eval",
            "exec",
            "parse_expr",
            "sympify",
            "S",
            "lambdify",
            "__import__",
            "getattr",
        }
        assert "parse_expr" not in inspect.getsource(module)
