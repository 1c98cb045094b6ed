"""core/verifiers.py: answers compared as numbers and formulas."""

import pytest

import core.verifiers


@pytest.mark.parametrize(
    "gold, text, right",
    [
        ("72", "So it is 72.", 1),
        ("72", "**72**", 1),
        ("18", "$18", 1),
        ("18", r"\$18", 1),
        ("18", "€18", 1),
        ("-3", "- 3", 1),
        ("1e6", "1000000", 1),
        ("3.5", "3 1/2", 1),
        ("3 1/2", "3", 0),
        ("0.5", "1/2", 1),
        ("1,234", "1234", 1),
        ("5", r"\[5\]", 1),
        ("5", "A: 5", 1),
        ("12", "at 7:30 I have 12", 1),
        ("12", "12:45", 0),
        ("(1, 2)", "(7, 2)", 0),
        ("(1, 2)", "(1,2)", 1),
        ("x=2, y=3", "x=7, y=3", 0),
        (r"2\sqrt{3}", r"2\sqrt{5}", 0),
        (r"$2\sqrt{3}$", r"2\sqrt{3}", 1),
        ("2x+1", "2x+5", 0),
        ("2x+1", "1 + 2x", 1),
        (r"\sqrt{2}", r"\sqrt{2}", 1),
        (r"\frac{\pi}{2}", r"#### \pi/2", 1),
        ("{1,2}", "{2,1}", 1),
        ("10, 20", "20", 0),
        ("12345678901234", "12345678901235", 0),
        ("5", "", 0),
        ("5", "five", 0),
        ("7", "3 + 4", 1),
        ("12", "3 4", 0),
        ("8", "2**3", 1),
        ("0", "1e-7", 0),
        ("-3.5", "It is -3 1/2.", 1),
        ("0.5", r"\frac{1}{2}", 1),
    ],
)
def test_answers_are_compared_whole_as_numbers_and_formulas(gold, text, right):
    assert core.verifiers.numeric([""], [text], [gold]) == [right]


@pytest.mark.parametrize("gold", ["12:30", "7:30 pm", "2024-05-01", "A0", "B33", "x", "five"])
def test_a_text_with_numbers_in_it_is_no_number(gold):
    with pytest.raises(ValueError, match="is not a number or formula"):
        core.verifiers.numeric([""], [gold], [gold])
