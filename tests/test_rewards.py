"""python -m pytest tests/test_rewards.py -q

What counts as an answer, what counts as right, and which tricks do not count as right.
"""
import doctest
import itertools
import os
import random
import signal
import string
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import rewards
from rewards import (
    VERIFIERS,
    Reward,
    VerifierError,
    extract_answer,
    fold,
    garbled,
    score,
    well_formed,
)

pytestmark = pytest.mark.method

GOOD = "<think>t</think><answer>7</answer>"


def test_the_examples_in_the_docstrings_are_right():
    result = doctest.testmod(rewards)
    assert result.attempted > 0 and result.failed == 0


def answering(answer, thought="t"):
    """A well-formed response."""
    return f"<think>{thought}</think><answer>{answer}</answer>"


@pytest.mark.parametrize("text, answer", [
    ("<think>t</think><answer>7</answer>", "7"),
    ("<answer>7</answer>", "7"),
    ("<think>t</think> so <answer> a\n b </answer> then", "a\n b"),  # other text around it
    ("<think>t</think><answer></answer>", ""),
    ("<think>t</think>7", None),
    ("", None),
    ("<think>t</think><answer>7", None),  # never closed
    ("<think>t</think>7</answer>", None),
    ("<think>t</think></answer>7<answer>", None),
    ("<think>t</think><answer>7</answer><answer>8</answer>", None),  # two
    ("<think>t</think><answer>7</answer><answer>7</answer>", None),
    ("<think>t</think><answer>7</answer><answer>8", None),
    ("<think>t</think><answer><answer>7</answer></answer>", None),  # one in the other
    ("<think>t</think><answer>7<answer>8</answer>", None),
    ("<think>t</think><answer>7</answer></answer>", None),
    ("<think>t</think></answer><answer>7</answer>", None),
    ("<think><answer>7</answer></think>", None),  # only thought
    ("<think>I think <answer>7</answer>", None),  # still thinking
    ("<think><answer>7</answer></think><answer>8</answer>", "8"),
    ("<think>t</think><answer>7</answer></think>", None),  # it was part of the thinking
    ("<think>t</think><answer>7</think></answer>", None),
    ("<think>t</think><Answer>7</Answer>", None),
    ("<think>t</think>< answer>7</ answer>", None),
    # A box in the answer is the answer.
    ("<think>t</think><answer>It is \\boxed{7}.</answer>", "7"),
    ("<think>t</think><answer><|begin_of_box|> 7 <|end_of_box|></answer>", "7"),
    ("<think>t</think>So \\boxed{7}", "7"),
    ("<think>t</think><|begin_of_box|>7<|end_of_box|>", "7"),  # without tags
    ("<think>t</think>\\boxed{\\frac{1}{\\sqrt{2}}}", "\\frac{1}{\\sqrt{2}}"),
    ("<think>t</think><answer>\\boxed{}</answer>", ""),
    # Braces in braces, and LaTeX's \\{ and \\}, which are none.
    ("<think>t</think>\\boxed{\\frac{\\sqrt{\\frac{1}{2}}}{3}}", "\\frac{\\sqrt{\\frac{1}{2}}}{3}"),
    ("<think>t</think>\\boxed{{{{{{7}}}}}} {x}", "{{{{{7}}}}}"),
    ("<think>t</think>\\boxed{\\left\\{1 \\right.} }", "\\left\\{1 \\right."),
    # A box in the thinking is not.
    ("<think>\\boxed{6}, no: </think><answer>7</answer>", "7"),
    ("<think>t</think><answer>\\boxed{7} or \\boxed{8}</answer>", None),
    ("<think>t</think>\\boxed{7} \\boxed{7}", None),
    ("<think>t</think>\\boxed {7}", "7"), ("<think>t</think>\\boxed {8} \\boxed{7}", None),
    ("<think>t</think><answer>\\boxed{\\boxed{7}}</answer>", None),
    ("<think>t</think><answer><|begin_of_box|>7<|begin_of_box|>8<|end_of_box|><|end_of_box|></answer>",
     None),
    ("<think>t</think><answer><|begin_of_box|>7<|end_of_box|> \\boxed{8}</answer>", None),
    ("<think>t</think>\\boxed{8}<answer>7</answer>", None),
    ("<think>t</think><answer>7</answer>\\boxed{7}", None),
    ("<think>t</think><answer>\\boxed{7</answer>}", None), ("<think>t</think>\\boxed{7", None),
    ("<think>t</think><|begin_of_box|>7", None), ("<think>t</think>7<|end_of_box|>", None),
    ("<think>t</think><|end_of_box|>7<|begin_of_box|>", None),
    ("<think>t</think><answer>\\boxed{7}", None), ("<think>\\boxed{7}</think>", None),
    ("<think>\\boxed{7}", None)])
def test_the_answer_is_the_one_given_after_the_thinking(text, answer):
    assert extract_answer(text) == answer


@pytest.mark.parametrize("text, expected", [
    ("<think>t</think><answer>7</answer>", True),
    ("  <think>\nt\n</think>\n\n<answer>\n7\n</answer>\n", True),
    ("<think></think><answer></answer>", True),
    ("", False),
    ("7", False),
    ("<answer>7</answer>", False),
    ("<think>t</think>", False),
    ("<think>t</think>7", False),
    ("<think>t</think>so<answer>7</answer>", False),  # text between, before and after
    ("so <think>t</think><answer>7</answer>", False),
    ("<think>t</think><answer>7</answer>.", False),
    ("t</think><answer>7</answer>", False),
    ("<think>t<answer>7</answer></think>", False),
    ("<answer>7</answer><think>t</think>", False),
    ("<think>t</think><answer>7</answer><answer>8</answer>", False),  # each tag once
    ("<think>t</think><think>t</think><answer>7</answer>", False),
    ("<think><think>t</think><answer>7</answer>", False),
    ("<think>t</think></think><answer>7</answer>", False),
    ("<think>t</think><answer><answer>7</answer>", False),
    ("<think>t</think><answer>7</think></answer>", False)])
def test_the_form_is_one_thought_then_one_answer_and_nothing_else(text, expected):
    assert well_formed(text) is expected


CASES = {
    "choice": [
        ("B", "B", 1), ("b", "B", 1), ("(B)", "B", 1), ("(b)", "b", 1), ("B.", "B", 1),
        ("B)", "B", 1), ("B: left", "B", 1), ("B. to the left", "B", 1),
        ("(B) to the left", "B", 1), ("B. A plane", "B", 1), ("B", "B. left", 1), ("B", " (B) ", 1),
        ("B. in the U.S.", "B", 1),  # letters in the option's text
        ("A", "B", 0), ("A. B", "B", 0), ("", "B", 0), ("left", "B", 0), ("Because", "B", 0),
        ("8", "B", 0), ("B", "", 0), ("B or C", "B", 0), ("B, C", "B", 0), ("BC", "B", 0),
        ("B/C", "B", 0), ("B and C", "C", 0), ("B\nC", "B", 0), ("B. C", "B", 0), ("B) C)", "B", 0),
        ("(B) (C)", "B", 0), ("(B)(C)", "B", 0), ("A. left B. right", "A", 0),
        ("A. left B. right C. top", "B", 0), ("A. left\nB. right", "A", 0),  # the options copied
        ("(A)(B)(C)(D)", "A", 0), ("A.B.C.D", "A", 0), ("A:B:C", "A", 0),
        ("A.left B.right", "A", 0), ("A. left;B. right", "A", 0),
        ("B. the U.S. flag", "B", 1), ("B. at 10 a.m. sharp", "B", 1), ("B.left", "B", 1),
        ("(A) left (B) right", "A", 0), ("A) left B) right", "A", 0), ("A: left B: right", "A", 0),
        ("one of A, B, C or D", "A", 0), ("a letter between A and D", "A", 0),
        ("all of the above", "A", 0),
        # Another letter, joined or in a row; an option after a mark without a space.
        *[(text, "A", 0) for text in (
            "(A) and (C)", "A) or C)", "A) and C)", "A. or C.", "A. and B", "A. C. D.",
            "(A) (C) (D)", "A. left。B. right", "A. 左。B. 右", "A. left、B. right",
            "A. left/B. right", "A. left|B. right")],
        ("B. C++", "B", 1), ("D. A+", "D", 1), ("D. A-", "D", 1), ("D. A and C", "D", 1),
        ("B. U.S.", "B", 1), ("B. J. K.", "B", 1), ("B. A.C. current", "B", 1),
        ("B. Turn the A/C. off", "B", 1), ("B. and then C", "B", 1), ("***B***", "B", 1)],
    "count": [
        ("7", "7", 1), ("07", "7", 1), ("7.0", "7", 1), ("7.", "7", 1), (" 7\n", "7", 1),
        ("+7", "7", 1), ("-3", "-3", 1), ("-0", "0", 1), ("7", "7.0", 1), ("0", "0", 1),
        ("７", "7", 1),
        ("8", "7", 0), ("77", "7", 0), ("7.5", "7", 0), ("-7", "7", 0), ("", "7", 0), ("", "0", 0),
        ("seven", "7", 0), ("7 or 8", "7", 0), ("7 8", "7", 0), ("7, 8", "7", 0), ("7-8", "7", 0),
        ("7birds", "7", 0), ("7", "many", 0), ("7e0", "7", 0), ("0x7", "7", 0), ("7.0.0", "7", 0),
        ("--7", "7", 0), ("6+1", "7", 0), (".", "0", 0), ("²", "2", 0),
        ("a correct number between 0 and 10", "7", 0), ("between 0 and 10", "7", 0),
        ("0 1 2 3 4 5 6 7 8 9", "7", 0), ("the number of birds", "7", 0),
        ("7 is the answer", "7", 0), ("9" * 5000, "7", 0), ("7." + "0" * 5000, "7", 1),
        ("1{,}200", "1200", 1), ("$1{,}200$", "1200", 1), ("1\u202f500", "1500", 1),
        ("1\u2009500", "1500", 1), ("1 500", "1500", 0), ("***3***", "3", 1),
        *[(f"{minus}3", "-3", 1) for minus in "\u2010\u2011\u2012\ufe63"]],
    "open": [
        ("red ball", "red ball", 1), ("Red  BALL.", "red ball", 1), ("red-ball", "red ball", 1),
        ("\tred\nball", "red ball", 1), ("“red ball”", "red ball", 1), ("ﬁsh", "fish", 1),
        ("STRASSE", "straße", 1), ("e\u0301cole", "\u00e9cole", 1), ("7", "7", 1),
        ("红色", "红色。", 1),
        ("ball", "red ball", 0), ("red ball", "ball", 0), ("redball", "red ball", 0),
        ("ball red", "red ball", 0), ("", "red", 0), ("red", "", 0), ("", "", 0), ("...", "!", 0),
        ("", "?", 0), ("rouge", "red", 0), ("é", "e", 0), ("दिन", "दान", 0),
        ("กิน", "กัน", 0),  # vowels written as marks are letters
        ("red or blue", "red", 0), ("red, blue", "red", 0), ("red red", "red", 0),
        ("one of red, blue and green", "red", 0),
        ("a velocity very close to the speed of light", "0.999 c", 0),
        ("the right answer", "red", 0),
        # A minus was taken for a hyphen before a currency, and for a bullet before a space.
        *[(f"-{text}", text, 0) for text in ("$45", "€5", "½", "∞")], ("$45", "-$45", 0),
        *[(f"- {text}", text, 0) for text in ("3.2%", "5 °C", "5 million", "5 points", "$45")],
        ("-$45", "- $45", 1), ("- red", "red", 1), ("***red***", "red", 1),
        ("100 to 200", "$100 to $200", 0), ("3 and 4", "$3 and $4", 0),     # these are no formulas
        ("$100 to $200", "$100 to $200", 1), ("$.50 or $.75", ".50 or .75", 0)],
    "math": [
        ("42", "42.0", 1), ("42", " 42 ", 1), ("+42", "42", 1), ("-3", "\u22123", 1),
        ("1/2", "0.5", 1), ("\\frac{1}{2}", "1/2", 1), (".5", "1/2", 1),
        ("-\\dfrac{3}{4}", "-0.75", 1), ("\\frac{-3}{4}", "-0.75", 1), ("50%", "0.5", 1),
        ("50\\%", "1/2", 1), ("50 percent", "50%", 1), ("1e3", "1000", 1),
        ("1.5 \\times 10^{3}", "1500", 1), ("1.5 x 10^-3", "0.0015", 1), ("10^3", "1000", 1),
        ("2*10**3", "2000", 1), ("1,234,567", "1234567", 1), ("1{,}234", "1234", 1),
        ("$1,200.50", "1200.5", 1), ("$7$", "7", 1), ("3 million", "3000000", 1), ("5 km", "5", 1),
        ("5", "5 km", 1), ("5 km", "5 km", 1), ("9.8 m/s^2", "9.8 m/s^2", 1),
        ("9.8\\,\\text{m/s}^2", "9.8", 1), ("7 birds", "7 Bird", 1),
        ("60 km/h", "60", 1), ("90^\\circ", "90°", 1), ("90 degrees", "90°", 1), ("x = 7", "7", 1),
        ("7.", "7", 1), ("0", "0.0", 1), ("-0", "0", 1), ("1000000.5", "1000000", 1),
        ("0.3333333", "1/3", 1), ("x + 1", "x+1", 1), ("2x", "2x", 1),
        ("\\sqrt{2}", "\\sqrt{2}", 1),
        ("1000002", "1000000", 0), ("0.333", "1/3", 0), ("1e-9", "0", 0), ("1e-9", "2e-9", 0),
        ("1", "1.5", 0), ("-7", "7", 0), ("50%", "50", 0), ("5 km", "5 m", 0), ("5 MW", "5 mW", 0),
        ("3 million", "3", 0), ("2x", "2", 0), ("2π", "2", 0), ("2i", "2", 0),
        ("2\\sqrt{3}", "2", 0), ("x-1", "x+1", 0),
        ("3 or 4", "3", 0), ("3 or", "3", 0), ("3, 4", "3", 0), ("3,4", "34", 0),
        ("12,34", "1234", 0), ("1,2345", "12345", 0), ("3-4", "3", 0), ("3 to 4", "3", 0),
        ("3 4", "3", 0), ("3/4/5", "0.75", 0), ("1/0", "1", 0), ("1/0", "1/0", 1),
        ("1e999", "1", 0), ("--7", "7", 0), ("nan", "7", 0),
        ("inf", "7", 0), ("between 0 and 10", "7", 0), ("about 7", "7", 0), ("10²", "102", 0),
        ("", "", 0), ("", "0", 0), ("7 or more", "7", 0),
        ("a velocity very close to the speed of light", "0.999 c", 0), ("1" * 20000, "1", 0),
        ("7" + " " * 20000, "7", 1),
        # What stands before "=" is a name. It was any text, even one that denies the value.
        *[(text, "5", 0) for text in (
            "x != 5", "x \\not= 5", "not x = 5", "x is not = 5", "maybe 4, x = 5",
            "Either 3, 4 or else x = 5", "x is 4 or y = 5", "three or x = 5", "x \\neq 4, x = 5",
            "a: 3, b = 5", "x: 3; y = 5", "x? 4. x = 5", "x | 4 | x = 5", "x mod 7 = 5",
            "x 4 = 5", "x (not) = 5", "i != 5", "\\theta \\neq 4, \\theta = 5", "x ~= 5")],
        *[(text, "5", 1) for text in (
            "x_1 = 5", "x_{1} = 5", "f(g(2)) = 5", "P(A or B) = 5", "P(A \\cap B) = 5", "f'(2) = 5",
            "\\angle 1 = 5", "\\frac{10}{2} = 5", "\\log_2 32 = 5", "\\sin 30° = 5", "n! = 5",
            "No. of birds = 5", "Area of triangle ABC = 5", "AB \\cdot CD = 5", "∠ABC = 5",
            "\\max\\{a,b\\} = 5", "\\operatorname{lcm}(5,1) = 5", "S_{\\triangle ABC} = 5")],
        # One full stop is a sentence's.
        ("0.5.", "0.5", 1), ("x = 0.5.", "0.5", 1), ("50%.", "0.5", 1), ("$7.5$.", "7.5", 1),
        ("0.75.", "\\frac{3}{4}", 1), ("\\sqrt{2}.", "\\sqrt{2}", 1), ("$x+1$.", "x+1", 1),
        ("(1,2).", "(1,2)", 1), ("Yes.", "Yes", 1), ("Yes", "Yes.", 1), ("5..", "5", 0),
        ("5.5.", "5", 0),
        # Whole numbers are compared exactly; it was to 28 digits.
        ("1267650600228229401496703205377", "1267650600228229401496703205376", 0),
        ("10^29", "1" + "0" * 28 + "1", 0), ("10^29", "1" + "0" * 29, 1),
        ("2^{100}", "1267650600228229401496703205376", 1),
        ("1, 2, and 3", "\\{1,2,3\\}", 1), ("2, 3, or 4", "2,3,4", 1), ("3", "\\log_2 8", 1),
        ("\\log_2 8", "3", 1), ("\\log_2(8)", "3", 1), ("\\log_{2}3", "\\log_2 3", 1),
        ("\\frac{\\ln 3}{\\ln 2}", "\\log_2 3", 1), ("\\log_2 8", "8", 0), ("\\log_2 8", "2", 0),
        ("5 lakhs", "5", 0), ("5 crores", "5", 0), ("5 lakhs", "500000", 1),
        # A currency before or after its amount, as a sign or in words.
        *[(text, "€5", 1) for text in ("5€", "5 €", "5 euros", "5 EUR")], ("12€", "12", 1),
        ("US$12", "12", 1), ("$5", "€5", 0), ("5 dollars", "€5", 0), ("5 cents", "$5", 0),
        ("5$", "-$5", 0), ("12 ℃", "12", 1), ("12 ℃", "12 °C", 1), ("5 ppm", "5", 1),
        ("12 sec", "12", 1), ("90\\degree", "90°", 1),
        *[(f"x{minus}3", "x-3", 1) for minus in "\u2010\u2011\u2012\ufe63"],
        ("1\u202f500", "1500", 1), ("1\u2009500", "1500", 1), ("***x+1***", "x+1", 1),
        ("$ 5 $ cm", "5 cm", 1), ("$$7$$", "7", 1)],
    "chart": [
        ("100", "100", 1), ("101", "100", 1), ("102.5", "100", 1), ("97.5", "100", 1),
        ("41", "40", 1), ("-101", "-100", 1), ("1,010", "1000", 1), ("1e3", "1,010", 1),
        ("2010", "2010", 1), ("2010.0", "2010", 1), ("1,950", "1,949", 1), ("1500", "1510", 1),
        ("3000", "3010", 1), ("2011.0", "2010.5", 1),
        ("25%", "0.25", 1), ("25%", "25", 1), ("25", "25%", 1), ("25%", "25.2%", 1),
        ("Germany", "germany", 1), ("Red-line.", "red line", 1),
        ("103", "100", 0), ("97", "100", 0), ("2011", "2010", 0), ("1899", "1900", 0),
        ("1901", "1900", 0), ("2099", "2100", 0), ("2010.4", "2010", 0),
        ("-100", "100", 0), ("25%", "2500", 0), ("0.1", "0", 0), ("100 or 101", "100", 0),
        ("95-105", "100", 0), ("between 0 and 200", "100", 0), ("France", "Germany", 0),
        ("Germany or France", "Germany", 0), ("2009, 2010", "2010", 0), ("", "2010", 0),
        ("", "", 0),
        ("45.2.", "45.3", 1), ("1.2M.", "1.2 million", 1), ("5.5.", "5", 0), ("5 lakhs", "5", 0),
        ("5 crores", "5", 0), ("500000", "5 lakhs", 1),
        # 2015/2016 was a quotient near 1, and only "2010" alone was a year.
        ("2016/2017", "2015/2016", 0), ("1", "2015/2016", 0), ("2015/2016", "1", 0),
        ("2015/2016", "2015/2016", 1), ("2018/20", "2019/20", 0), ("2019/20", "2019/20", 1),
        *[("2011", text, 0) for text in ("2010.0", "Year = 2010", "2010 year", "(2010)", "2010.")],
        *[("2010", text, 1) for text in ("2010.0", "Year = 2010", "2010 year", "(2010)", "2010.")],
        *[("2015", text, 1) for text in ("2,010", "2010 km")],
        *[(text, "$45 million", 1) for text in (
            "45 million dollars", "45 million USD", "US$45 million", "45 million $", "$45M")],
        *[(text, "$45", 1) for text in ("45 dollars", "45 USD", "45$", "45 US dollars")],
        ("€45", "$45", 0), ("45 euros", "$45", 0),
        *[(text, "45", 0) for text in ("4%5", "45%%", "%45%", "4% 5")], ("%45", "45", 1),
        ("45%%", "0.45", 0),
        *[(f"-{text}", text, 0) for text in ("$45", "€5", "½", "∞")], ("$45", "-$45", 0),
        *[(f"- {text}", text, 0) for text in ("3.2%", "5 °C", "5 million", "5 points")],
        ("- red", "red", 1), ("***45%***", "45%", 1)],
    "ocr": [
        ("STOP", "STOP", 1), (" two \n lines", "two lines", 1), ("e\u0301", "\u00e9", 1),
        ("出口", "出口", 1), ("43", "43.0", 0.5), ("x+1", "x+2", 1 - 1 / 3),
        ("STOP", "stop", 0), ("STOP", "SHOP", 0.75), ("STO", "STOP", 0.75),
        ("STOPS", "STOP", 1 - 1 / 5), ("kitten", "sitting", 1 - 3 / 7),
        ("hello world", "helloworld", 1 - 1 / 11), ("ab", "ba", 0), ("", "STOP", 0), ("", "", 0),
        ("STOP", "", 0), ("x" * 20000, "x" * 20000, 1),
        ("x" * 20000, "x" * 20001, 0), ("x" * 9999, "x" * 10000, 0.9999),
        ("5 6", "$5 $6", 0.6), ("***STOP***", "STOP", 1), ("1\u2009500", "1 500", 1)],
    "grounding": [
        ("[0, 0, 10, 10]", "[0,0,10,10]", 1), ("[[0,0,10,10]]", "[0,0,10,10]", 1),
        ("[0.0,0,10,6]", "[0,0,10,10]", 1), ("[-5,-5,5,5]", "[-5,-5,5,5]", 1),
        ("[20,20,30,30] [0,0,10,10]", "[[0,0,10,10],[20,20,30,30]]", 1),
        ("[0,0,10,10]\n[20,20,30,30]", "[0,0,10,10]; [20,20,30,30]", 1),
        ("[0,0,10,10]", "[0,0,10,10],[20,20,30,30]", 0.5),
        ("[0,0,10,10],[20,20,30,30]", "[0,0,10,10]", 0.5),  # too few, too many
        ("[0,0,10,10],[0,0,10,10]", "[0,0,10,10]", 0.5),
        ("[0,0,10,10],[0,0,10,10]", "[0,0,10,10],[0,0,10,10]", 1),  # one-to-one
        ("[0,0,10,10]," * 9 + "[0,0,10,10]", "[0,0,10,10]", 0.1),
        ("[0,0,1,1]," * 101 + "[0,0,1,1]", "[0,0,1,1]", 0),
        # To take the best pair first would leave the second box without one.
        ("[0,0,100,100],[0,0,100,60]", "[0,0,100,95],[0,0,100,160]", 1),
        ("[0,0,10,5]", "[0,0,10,10]", 0), ("[0,0,10,4]", "[0,0,10,10]", 0),
        ("[20,20,30,30]", "[0,0,10,10]", 0),  # 0.5 is not above 0.5
        ("[10,10,0,0]", "[10,10,0,0]", 0), ("[10,10,0,0]", "[0,0,10,10]", 0),
        ("[5,5,5,5]", "[5,5,5,5]", 0),  # inverted, empty
        ("[0,0,10,10],[10,10,0,0]", "[0,0,10,10]", 0.5),
        ("[0,0,10,10] or [20,20,30,30]", "[0,0,10,10]", 0), ("", "", 0), ("[]", "[]", 0),
        ("[0,0,10]", "[0,0,10,10]", 0), ("[0,0,10,10,10]", "[0,0,10,10]", 0),
        ("0,0,10,10", "[0,0,10,10]", 0), ("[0,0,nan,10]", "[0,0,10,10]", 0),
        ("left of the ball [0,0,10,10]", "[0,0,10,10]", 0), ("[0,0,1e9999,10]", "[0,0,10,10]", 0),
        ("between 0 and 10", "[0,0,10,10]", 0),
        # Fractions as data sets write them: with more than 9 decimals, or without the zero.
        ("[0.3333333333333333, 0.25, 0.75, 0.875]", "[0.3333333333333333, 0.25, 0.75, 0.875]", 1),
        ("[.1,.2,.5,.9]", "[0.1,0.2,0.5,0.9]", 1), ("***[1,2,3,4]***", "[1,2,3,4]", 1),
        ('[{"bbox_2d": [0, 0, 10, 10], "label": "dog [1]"}]', "[0,0,10,10]", 1),
        ('{"label": "dog {1}", "bbox_2d": [0, 0, 10, 10]}', "[0,0,10,10]", 1)],
    "time": [
        ("12.5-17", "12.5-17", 1), ("from 12.5 to 17", "12.5-17", 1),
        ("From 12.5s to 17 seconds.", "12.5 - 17", 1), ("12.5 – 17 s", "12.5-17", 1),
        ("0:12-0:17", "12-17", 1), ("00:00:12 to 00:00:17", "12-17", 1),
        ("1:02:03-1:02:10", "3723-3730", 1), ("0:12.5 until 0:17.0", "12.5-17", 1),
        ("75:30-76:00", "4530-4560", 1), ("10-15", "10-20", 0.5), ("10-30", "10-20", 0.5),
        ("15-25", "10-20", 1 / 3), ("0-100", "10-20", 0.1),
        ("20-30", "10-20", 0), ("20-10", "10-20", 0), ("20-10", "20-10", 0), ("12-12", "12-12", 0),
        ("12", "10-20", 0), ("", "10-20", 0), ("", "", 0), ("10-20 or 30-40", "10-20", 0),
        ("10-20, 30-40", "10-20", 0), ("10-20-30", "10-20", 0),
        ("10-20" + " " * 20000 + "or 30-40", "10-20", 0), ("between 0 and 10", "0-10", 1),
        ("0:75-0:80", "75-80", 0), ("about 10-20", "10-20", 0), ("nan-20", "10-20", 0),
        ("the whole video", "10-20", 0), ("9" * 400 + "-" + "9" * 401, "10-20", 0),
        *[(f"12{to}17", "12-17", 1) for to in ("\u2010", "\u2011", "\u2012", "\ufe63", "\u301c")],
        ("12.333333333333334-17.666666666666668", "12.333333333333334-17.666666666666668", 1),
        ("12 -> 17", "12-17", 1), ("***1-2***", "1-2", 1), ("12 > 17", "12-17", 0)]}


@pytest.mark.parametrize("domain, predicted, answer, expected", [
    (domain, *case) for domain, cases in CASES.items() for case in cases],
    ids=lambda x: x[:30] if isinstance(x, str) else str(x))
def test_what_is_right(domain, predicted, answer, expected):
    """By the verifier alone, and inside a response, whose accuracy it is."""
    value = VERIFIERS[domain](predicted, answer)
    assert type(value) is float and value == expected
    if "<" not in predicted:
        assert score(answering(predicted), answer, domain).accuracy == expected


# In the forms that models and data sets write: (predicted, gold answers that it is, and is not).
FORMS = {
    "choice": [
        *[(text, ["B"], ["A", "C"]) for text in (
            "**B**", "__B__", "*B*", "_(B)_", "`B`", "$B$", "$$B$$", "\\(B\\)", "\\text{(B)}",
            "\\mathrm{B}", "$\\textbf{B}$", "\\boxed{B}", "{B}", "“B”", "'B'", "Ｂ", "B。",
            "（Ｂ）", "[B]", "【B】", "**B.** a red car", "**B**. a red car", "B．红色的车",
            "B：红色", "B、红色", "[B] a red car", "B - a red car", "(B). a red car", "b) a car",
            "B. John F. Kennedy", "B. J. K. Rowling", "(B) Philip C. Jones", "B. At 10 a.m. sharp",
            "B. Washington D.C. in winter", "B. He gets an A. She gets a B.", "B. E. coli",
            "B. Jackson 5, M. Jackson", "B. x = 3", "B. Vitamin C.")],
        *[(text, [], ["A", "B"]) for text in (
            "A) or B)", "**A** or **B**", "$A$, $B$", "[A] [B]", "A、B", "(A) left\n(B) right",
            "A. yes B. no", "B. A", "The answer is (B).", "B a red car", "B,", "a red car")]],
    "count": [
        *[(text, ["3", "3.0", "03"], ["30", "-3"]) for text in (
            "**3**", "`3`", "$3$", "\\(3\\)", "\\text{3}", "\\mathbf{3}", "\\boxed{3}", "３", "3。",
            '"3"', "“3”", "**3**.", "+3", "3.00")],
        ("−2", ["-2"], ["2"]), ("1,000,000", ["1000000"], ["1"]), ("$1,200$", ["1200"], []),
        *[(text, [], ["3", "2", "4"]) for text in (
            "three", "3 birds", "~3", "3+", "<3", "≥3", "3k", "3x", "3%", "3 dozen", "3 - 4", "1/3",
            "2.999999999", "3 or more", "**2** or **3**")]],
    "open": [
        ("3.5", ["3.5", "3.50", "+3.5", "$3.5$"], ["-3.5", "35", "3 5", "3,5", "3:5"]),
        ("-5 °C", ["−5°C", "-5 ° c"], ["5 °C", "-5 C"]), ("C", [], ["C++", "C#"]),
        ("C ++", ["C++", "c++"], ["C", "C#", "C+"]), ("A+", ["a +"], ["A-", "A", "A*"]),
        (">5", ["> 5"], ["<5", "5", "=5"]), ("$100", ["$ 100"], ["€100", "100", "100%"]),
        ("a > b", ["A>B"], ["a < b", "a b"]), ("x+1", ["x + 1"], ["x-1", "x*1"]),
        ("5²", [], ["52", "5"]), ("½", [], ["12"]), ("1/2", [], ["1.2", "12", "1 2"]),
        ("x = 5", ["x=5"], ["x != 5", "x ≠ 5"]), ("x≠5", ["x != 5"], ["x = 5"]),
        ("O-", ["O -", "o−"], ["O", "O+"]), ("7\u200b apples", ["7 apples"], ["apples"]),
        (".5", ["0.5"], ["5", "-.5"]), ("- 5", ["-5"], ["5"]), ("left → right", [], ["left right"]),
        ("**red** ball", ["red ball", "`Red-ball`", "\\text{red ball}", "“red ball”"], ["red"])],
    "math": [
        ("1/2", ["\\frac12", "\\tfrac{1}{2}", "½", "\\left(\\frac{1}{2}\\right)", "{1}/{2}", "0.5",
                 "\\frac{ 1 }{ 2 }", "\\displaystyle\\frac{1}{2}", "\\frac{-1}{-2}", "50%", ".50",
                 "\\frac{1,000}{2,000}", "P(A) = 0.5", "2^{-1}"], ["2", "12", "-1/2", "50"]),
        ("2.5", ["2\\frac{1}{2}", "2\\frac12", "2½", "2 1/2", "\\frac52"], ["21/2", "-2.5", "1"]),
        ("1024", ["2^{10}", "2**10", "1,024", "1{,}024", "1\\,024", "32^2"], ["210", "2^{11}"]),
        ("2\\sqrt{3}", ["\\sqrt{12}", "2√3", "x=2\\sqrt3", "2 \\sqrt { 3 }", "3.4641016"],
         ["2", "3", "\\sqrt{3}", "2\\sqrt{2}"]),
        ("\\frac{\\pi}{2}", ["π/2", "0.5\\pi", "1.5707963"], ["\\pi", "2", "1.57"]),
        ("(x+1)^2", ["x^2+2x+1", "(1+x)(x+1)"], ["x^2+1", "(x-1)^2", "4"]),
        ("x \\ge 5", ["x ≥ 5", "x>=5", "x\\geq 5"], ["x > 5", "x \\le 5", "5"]),
        ("-2,1", ["1,-2", "x = 1 or x = -2", "\\{-2, 1\\}"], ["1", "-2", "2,1", "-2,1,3"]),
        ("\\left[0,1\\right)", ["[0,1)", "[0, 1)"], ["[0,1]", "(0,1)", "0"]),
        ("(1,4.5)", ["\\left(1,\\frac{9}{2}\\right)"], ["(4.5,1)", "1", "[1,4.5]"]),
        ("4i+3", ["3+4i"], ["3", "4i-3"]), ("\\emptyset", ["∅", "\\varnothing"], ["0"]),
        ("-\\infty", ["-∞"], ["∞", "0"]), ("204_5", ["204_{5}"], ["204", "204_6"]),
        ("\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}",
         ["\\begin{bmatrix} 1 & 2 \\\\ 3 & 4 \\end{bmatrix}"],
         ["\\begin{pmatrix}1&2\\\\3&5\\end{pmatrix}"]),
        ("15 cm^2", ["15", "15\\text{ cm}^2", "15 cm²", "15 cm^{2}"], ["15 cm", "15 m^2", "152"]),
        ("9.8 m s^{-1}", ["9.8"], ["9.8 m"]), ("25 square centimeters", ["25"], ["25 cm"]),
        ("60^\\circ", ["60", "60°", "60 degrees", "m\\angle ABC = 60^{\\circ}"], ["60%", "6"]),
        ("\\$5.00", ["5", "$5"], ["€5", "5 cm"]), ("5 \\Omega", ["5 Ω", "5"], ["5 m"]),
        ("5", ["AB = 5", "f(2) = 5", "\\text{Area} = 5", "5 units", "5 birds", "-(-5)", "{5}",
               "\\textbf{5}", "\\sqrt{25}", "$$5$$", "\\(5\\)", "5\\mathrm{~cm}", "x = 5", "5 USD"],
         ["5n", "5a", "5k", "5 n", "5m", "5x", "5!", "5 dozen", "5 hundred", "5 thirds", "5 maybe",
          "5 squared", "5 factorial", "5 sin", "5 thousandths", "5 minus", "5 more", "5 or 6",
          "5 6", "[4,5]", "5 \\pm 1", "x > 5", "x = 5 = 6", "4 = 5", "--5", "5 = 5 = 5", "5.1",
          "2 + 3 4", "5 (or 6)", "between 4 and 6", "The answer is 5", "five", "5e-400"]),
        ("12345678", ["12,345,678"], ["12345670", "12345677"]), ("1e-400", [], ["0", "1e-399"]),
        ("1.2 trillion", ["1200000000000"], ["1.2"]), ("3 \\cdot 10^8", ["3e8", "3·10⁸"], ["30^8"]),
        ("Yes", ["\\text{Yes}", "yes"], ["No"]), ("no solution", ["No solution"], ["0"]),
        ("5 kg", [], ["5 m", "5 g"]), ("3 apples", ["3 apple"], ["3 oranges"])],
    "chart": [
        ("1.2M", ["1200000", "1.2 million", "$1.2M"], ["1.2", "12", "1.2k"]),
        ("12k", ["12000", "12K"], ["12"]), ("3.5 trillion", ["3500000000000"], ["3.5"]),
        ("100 hundred", ["10000"], ["100"]), ("> 50%", ["> 50 %"], ["< 50%", "50%"]),
        ("4500%", [], ["45"]), ("25%", ["25", "0.25", "25 percent"], ["2500", "0.0025"]),
        ("C", [], ["C++"]), ("+5 pp", ["5 pp"], ["-5 pp"]), ("23 years", ["23"], ["23 kg", "2"]),
        ("45 million", [], ["45"]), ("2010", ["2,010"], ["2011"]), ("45n", [], ["45"])],
    "ocr": [(text, ["STOP"], []) for text in ("**STOP**", "`STOP`", "```\nSTOP\n```", "ＳＴＯＰ")],
    "grounding": [
        *[(text, ["[10,20,110,220]"], ["[10,20,110,100]", "[[10,20,110,220],[0,0,5,5]]"])
          for text in (
            '{"bbox_2d": [10, 20, 110, 220], "label": "dog"}', "**[10, 20, 110, 220]**",
            '```json\n[\n\t{"bbox_2d": [10, 20, 110, 220], "label": "dog"}\n]\n```',
            "{'label': 'dog', 'bbox_2d': [10, 20, 110, 220]}", "(10,20),(110,220)",
            "<|object_ref_start|>dog<|object_ref_end|><|box_start|>(10,20),(110,220)<|box_end|>",
            "<ref>dog</ref><box>(10,20),(110,220)</box>", "[10,\n20,\n110,\n220].",
            "［10, 20, 110, 220］")],
        ("[10,20,110,220] or [0,0,5,5]", [], ["[10,20,110,220]"])],
    "time": [
        *[(text, ["24.3-30.4", "[24.3, 30.4]", "between 24.3 and 30.4"], ["0-24.3", "40-50"])
          for text in (
            "[24.3, 30.4]", "(24.3, 30.4)", "[24.3 s, 30.4 s]", "[24.3, 30.4] seconds",
            "[24.3 - 30.4]", "between 24.3 and 30.4 seconds", "Between 0:24.3 and 0:30.4",
            "24.3 ~ 30.4", "24.3～30.4", "**24.3 - 30.4**", "24.3s–30.4s", "24.3 → 30.4",
            "00:00:24.300 --> 00:00:30.400", "“24.3-30.4”", "24.3−30.4秒")],
        *[(text, [], ["24-30"]) for text in (
            "24, 30", "24 and 30", "between 24 - 30", "[24]", "[24, 30], [40, 50]", "[24, 30",
            "from about 24 to 30", "start: 24, end: 30")]]}


@pytest.mark.parametrize("domain, predicted, right, wrong", [
    (domain, *row) for domain, rows in FORMS.items() for row in rows],
    ids=lambda x: ascii(x)[:30] if isinstance(x, str) else "")
def test_an_answer_may_be_written_in_many_forms(domain, predicted, right, wrong):
    """Of 419 such answers 128 were graded wrong: what stood in bold or in dollars was refused, and
    signs, symbols and any word after a number were overlooked."""
    for answer in right:
        assert abs(VERIFIERS[domain](predicted, answer) - 1) < 0.05, answer
    for answer in wrong:
        if domain == "grounding":
            assert VERIFIERS[domain](predicted, answer) <= 0.5, answer
        else:
            assert VERIFIERS[domain](predicted, answer) == 0, answer
            if domain not in ("choice", "count"):     # their gold answers are never so written
                assert VERIFIERS[domain](answer, predicted) == 0, answer


FORMULAS = {
    "products": [
        ("2(3)", ["6", "2 (3)", "2\\left(3\\right)", "x = 2(3)", "2(3) cm"], ["5", "23"]),
        ("(3)(4)", ["12", "(3)4", "(4)3", "-(-3)(4)"], ["7", "-12"]), ("10(5)", ["50"], ["15"]),
        ("2(\\frac12)", ["1", "2(1/2)"], ["2.5"]), ("2[3]", ["6"], ["5"]), ("2{3}", [], ["5"]),
        ("\\frac{6}{2}\\frac{4}{2}", ["6"], ["5"]), ("2\\binom{4}{2}", ["12"], ["8"]),
        ("2(3)(4)", ["24", "2(3(4))"], ["9", "14", "10"]), ("x2(3)", ["6x"], ["5x"]),
        ("2^{2(3)}", ["64"], ["32"]), ("\\sqrt{2(8)}", ["4"], ["\\sqrt{10}"]),
        ("1,2(3)", ["1,6"], ["1,5"]), ("5(1)", ["5"], ["6"]), ("0(2)", ["0"], ["2"]),
        ("(1/2)(3)", ["3/2"], ["7/2"]), ("2\\frac{1}{2}", ["2.5", "2 \\frac{1}{2}"], ["1"]),
        ("2\\frac{1}{2}\\pi", ["2.5\\pi"], ["\\pi"]), ("2\\frac12(3)", ["7.5"], ["3", "5.5"]),
        ("2\\frac{4}{3}", [], ["10/3"]), ("2 4/3", [], ["10/3"]), ("6/2(1+2)", [], ["1", "9"]),
        ("(1,2)(3)", [], ["(1,2)"]), ("R-r", ["-r+R"], ["r-R"])],
    "units": [
        ("\\frac{1}{3}\\pi r^2 h", ["\\frac{\\pi r^2 h}{3}"], ["\\frac{1}{3}\\pi r^2"]),
        ("\\pi r^2", ["\\pi r^2 cm^2"], ["\\pi r^2 h", "\\pi r^2 h cm^3"]),
        ("a+b", [], ["(a+b) h"]), ("x^2", ["x^2 ft"], ["x^2 g", "x^2 m g", "x^2 mg", "x^{2} C"]),
        ("n^2", ["n^{2} km/h"], ["n^2 s"]), ("x+1", ["(x+1) cm"], ["(x+1) L"]),
        ("\\alpha^2", [], ["\\alpha^2 h"]), ("\\pi", ["\\pi cm"], ["\\pi h", "\\pi N", "1 cm"]),
        ("\\frac{\\pi}{3}", ["\\frac{\\pi}{3} s"], ["\\frac{\\pi}{3} h"]),
        ("2t+1", ["(2t+1) m/s", "(2t+1) seconds"], []), ("10\\sqrt{3}", ["10\\sqrt{3} N"], []),
        ("12\\pi\\text{ cm}", ["12\\pi", "12π cm", "12πcm", "A = 12π"], ["12", "12\\pi m"]),
        ("25\\pi \\text{ square units}", ["25\\pi"], ["25"]), ("2\\pi rad", ["2\\pi"], ["2"]),
        ("120\\pi", ["120\\pi\\text{ in}^3", "120\\pi \\text{ m}^3"], ["120\\pi r^3"]),
        ("5", ["5 h", "5 m"], ["5 a"]), ("5 million kW", ["5000000"], [])],
    "degrees": [
        ("\\cos 60°", ["1/2", "\\cos(60^\\circ)", "\\cos 60 degrees", "\\cos\\frac{\\pi}{3}"],
         ["-0.95241298", "\\cos 60"]),
        ("1", ["\\tan(45^\\circ)", "\\tan{45^{\\circ}}", "\\sin^2 90^\\circ", "2\\sin 30^\\circ"],
         ["1.6197751905438615"]),
        ("30°, 60°", ["30^\\circ,60^\\circ", "60° or 30°", "30,60"], ["30°, 61°"]),
        ("180^\\circ - x", ["180^\\circ-x", "180°-x"], ["180^\\circ+x"]),
        ("30^\\circ + 45^\\circ", ["75^\\circ", "75"], ["76^\\circ"]),
        ("30° < x < 60°", ["30^\\circ<x<60^\\circ"], ["30° < x < 61°"]),
        ("30°15'", [], ["45", "450"]), ("10\\tan 45^\\circ m", ["10"], ["10\\tan 45 m"]),
        ("60°", ["60 deg", "60"], ["\\frac{1}{2}"]), ("5", ["\\sin 30° = 5"], [])],
    "thousands": [
        ("1,000+1", ["1,001", "1001"], ["1", "2"]), ("1,000\\pi", ["1000\\pi"], ["\\pi"]),
        ("\\frac{1,000}{3}", ["1000/3"], ["1/3"]), ("\\sqrt{1,000,000}", ["1,000"], ["1"]),
        ("1,200x + 3,400y", ["1200x+3400y"], []), ("x > 1,000", ["x > 1000"], ["x > 1"]),
        ("(1,200)", ["(1, 200)"], []), ("100,200,300", ["100, 200, 300"], ["600"])],
    "repeating": [
        ("0.\\overline{3}", ["1/3", "0.33333333"], ["0.3", "3", "1/30"]),
        ("0.1\\overline{6}", ["1/6"], ["1/60"]), ("6.\\overline{6}", ["20/3"], ["6.6"]),
        ("-0.\\bar{6}", ["-2/3"], ["2/3"]), ("0.\\overline{3}x", ["\\frac{x}{3}"], ["x"]),
        ("2 0.\\overline{3}", [], ["7/3", "2/3"])],
    "words": [
        ("june 20", ["\\text{June 20}"], ["June 21", "July 20"]),
        ("10 percents", ["10%"], ["10"]), ("10 percentages", [], ["10"])]}


@pytest.mark.parametrize("predicted, right, wrong", [
    row for rows in FORMULAS.values() for row in rows],
    ids=lambda x: ascii(x)[:30] if isinstance(x, str) else "")
def test_a_formula_means_what_its_writer_means(predicted, right, wrong):
    """math-verify added 2 and 3 in 2(3), took degrees for radians and R for r; a variable such as h
    was dropped as a unit, but cm after pi was none. 1,000 in a formula was two numbers, a repeating
    decimal no number, and "percents" a unit that may be left out."""
    math = VERIFIERS["math"]
    for answer in right:
        assert math(predicted, answer) == math(answer, predicted) == 1, answer
    for answer in wrong:
        assert math(predicted, answer) == math(answer, predicted) == 0, answer


def test_every_verifier_is_in_the_table():
    assert set(CASES) == set(VERIFIERS)


@pytest.mark.parametrize("text, weight, expected", [
    ("<think>t</think><answer>7</answer>", 0.1, (1.0, 1.0, 1.0)),
    ("<think>t</think><answer>8</answer>", 0.1, (0.1, 0.0, 1.0)),  # wrong, in good form
    ("<answer>7</answer>", 0.1, (0.9, 1.0, 0.0)),  # right, in bad form
    ("7", 0.1, (0.0, 0.0, 0.0)), ("", 0.1, (0.0, 0.0, 0.0)),
    # 0: form is no part of the total, but told
    ("<think>t</think><answer>8</answer>", 0.0, (0.0, 0.0, 1.0)),
    ("<answer>7</answer>", 0.0, (1.0, 1.0, 0.0)),
    ("<answer>7</answer>", 0.25, (0.75, 1.0, 0.0)),
    ("<think>t</think><answer>8</answer>", 0.25, (0.25, 0.0, 1.0))])
def test_the_total_weighs_accuracy_and_form(text, weight, expected):
    got = score(text, "7", "count", weight)
    assert isinstance(got, Reward)
    assert (got.total, got.accuracy, got.format) == pytest.approx(expected)
    if weight == 0.1:
        assert score(text, "7", "count") == got, "0.1 is the default"


def test_an_answer_that_was_forced_is_graded_like_any_other():
    """A response out of thinking budget, with the forced </think><answer> in it."""
    forced = score("<think>one, two, thr</think><answer>7</answer>", "7", "count")
    assert forced == score("<think>seven</think><answer>7</answer>", "7", "count")


def test_a_domain_without_a_verifier_raises_and_is_named():
    with pytest.raises(ValueError, match="'geometry'.*choice, count, open"):
        score(GOOD, "7", "geometry")
    with pytest.raises(ValueError):
        score("no answer at all", "7", "")


# --------------------------------------------------------------------------------------------------
# any text at all

EXTREMES = ["", " ", "\x00", "(", "\ufffd" * 50, "7" * 4300, "9" * 4301, "-" + "1" * 20000,
            "A" * 20000, " " * 20000, "\n" * 20000]


def junk(seed=0, n=1500):
    """Texts that a model might write: pieces of answers, tags, other scripts, control characters,
    halves of surrogates."""
    r = random.Random(seed)
    pieces = [
        "<think>", "</think>", "<answer>", "</answer>", "A", "B.", "(C)", "7", "7.0", "-", ".", " ",
        "\n", "\x00", "\ud800", "\u0300", "½", "²", "٧", "𝟕", "é", "雪", "नमस्ते", "🙂", "\\", "(",
        ")", "[", "*", "+", "?", "{1}", "nan", "inf", "1e9", "0x7", "None"]
    yield from EXTREMES
    for _ in range(n):
        yield "".join(r.choice(pieces) for _ in range(r.randrange(1, 12)))
    for _ in range(n):
        yield "".join(r.choice(string.printable) for _ in range(r.randrange(1, 30)))
    for _ in range(n):
        yield "".join(chr(r.randrange(0x110000)) for _ in range(r.randrange(1, 8)))


@pytest.mark.parametrize("domain", VERIFIERS)
def test_no_text_makes_a_verifier_raise_or_leave_its_range(domain):
    """A verifier that raises drops the sample. int() of more than 4300 digits raised."""
    verify, failed, golds = VERIFIERS[domain], [], ("B", "7", "red ball", "")
    for text, answer in [*itertools.product(EXTREMES, golds), *zip(junk(), itertools.cycle(golds))]:
        calls = [(verify, text, answer), (verify, answer, text), (score, text, answer, domain),
                 (score, f"<think></think><answer>{text}</answer>", answer, domain)]
        for function, *arguments in calls:
            try:
                value = function(*arguments)
                value = value.total if isinstance(value, Reward) else value
                if not (type(value) is float and 0 <= value <= 1):
                    failed.append((text[:40], len(text), answer, value))
            except Exception as e:
                failed.append((text[:40], len(text), answer, repr(e)[:80]))
    assert not failed, f"{len(failed)} calls, the first: {failed[:3]}"


@pytest.mark.parametrize("domain", VERIFIERS)
def test_an_empty_prediction_is_never_right(domain):
    for answer in [answer for _, answer, _ in CASES[domain]] + list(junk(1, 300)):
        for empty in ("", " ", "\n\t"):
            assert VERIFIERS[domain](empty, answer) == 0, (empty, answer)


@pytest.mark.parametrize("domain, answers", [
    ("choice", "ABCDEFGH"), ("count", [str(n) for n in range(-5, 200)]),
    ("open", ("red ball", "Él", "दिन", "3.5 m")), ("math", ("1/3", "5 km", "1e-30", "2\\pi", "0")),
    ("chart", ("1987", "25%", "Peru", "0")), ("ocr", ("EXIT 7", "a")),
    ("grounding", ("[1,2,3,4]", "[1,2,3,4], [1,2,3,5.5]")), ("time", ("1-2.5", "0:59-1:01"))])
def test_every_gold_answer_is_right_of_itself(domain, answers):
    """Otherwise a sample would be impossible."""
    for answer in answers:
        assert score(answering(answer), answer, domain).total == pytest.approx(1.0)


def test_folding_what_is_folded_changes_nothing():
    for text in junk(2, 300):
        assert fold(fold(text)) == fold(text)


@pytest.mark.parametrize("loop", [
    "<answer>", "</think><answer></answer>", "<think>", "</answer>", " ", "</think> "])
def test_a_model_that_repeats_itself_is_graded_quickly(loop):
    """Models do loop. Tags are counted before patterns are searched for: a search would try each
    opening tag with each closing one."""
    text = "<think>" + loop * (60000 // len(loop))
    start = time.process_time()
    assert score(text, "7", "count").total == 0
    assert time.process_time() - start < 0.3


HEDGES = ["between 0 and 10", "a correct number between 0 and 10", "3 or 4", "3, 4", "3 4",
          "A. 3 B. 4 C. 5 D. 6", "one of 3, 4, 5", "3 (or 4)", "3\n4", "[3,3,4,4] or [4,4,5,5]",
          "3-4 or 4-5", "any", "the right answer", "3" + "\x00" + "4"]


@pytest.mark.parametrize("text", HEDGES)
@pytest.mark.parametrize("domain", [domain for domain in VERIFIERS if domain != "ocr"])
def test_hedging_is_wrong_in_every_domain(text, domain):
    """Except in ocr, whose distance makes each addition cost."""
    if domain == "time" and text == "between 0 and 10":
        return                                        # there it is one answer: an interval
    for answer in ("3", "4", "7", "A", "[3,3,4,4]", "3-4.5", "0-10"):
        assert VERIFIERS[domain](text, answer) == 0


def edit_distance_by_table(a, b):
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return row[-1]


def test_ocr_pays_by_the_edit_distance_of_the_usual_table():
    r = random.Random(0)
    for _ in range(1500):
        a, b = ("".join(r.choice("abcé") for _ in range(r.randrange(1, 75))) for _ in "ab")
        right = 1 - edit_distance_by_table(a, b) / max(len(a), len(b))
        assert VERIFIERS["ocr"](a, b) == VERIFIERS["ocr"](b, a) == right


# --------------------------------------------------------------------------------------------------
# garbled text

LOOPS = [
    "the ball is red. " * 40, "I see it.\n" * 60, "a" * 400, "wait, " * 200 + "wa",
    "x" * 50 + "so the answer is seven, " * 20 + "\n\n",
    "".join(f"line {i} of a long paragraph that says this and that; " for i in range(15)) * 9]
PROSE = [
    "The ball moves left. Then it stops. "
    + " ".join(f"At 0:{i:02d} I see nothing." for i in range(60)),
    "no, no, no, no!", "-" * 80 + "\n", "", "nothing. " * 10 + "A red ball.",
    "the ball is red. " * 40
    + "But at the end a blue one comes in from the left, so it is the blue one.",
    "\n".join(f"{i} | {i * i} | {i * i * i}" for i in range(100)), "ha " * 20,
    "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15"]
LATIN = "first the red ball moves to the left and then it stops " * 8
CHINESE = "".join(f"先看到第{c}个红球然后它向左移动。" for c in "一二三四五六七八")


@pytest.mark.parametrize("thought", LOOPS)
def test_a_loop_costs_the_format_and_not_the_accuracy(thought):
    assert garbled(thought)
    assert garbled(answering("7", thought)) and garbled(answering(thought))
    assert score(answering("7", thought), "7", "count") == Reward(0.9, 1.0, 0.0)


@pytest.mark.parametrize("thought", PROSE + [
    LATIN, CHINESE, CHINESE + " red ball " * 3, LATIN + "红球", LATIN + '"' + CHINESE + '"',
    LATIN + "“" + CHINESE + "”"])
def test_what_only_looks_like_a_loop_or_a_mixture_costs_nothing(thought):
    assert score(answering("7", f"{thought}. So."), "7", "count") == Reward(1.0, 1.0, 1.0)


@pytest.mark.parametrize("thought", [
    LATIN + "\n\n" + CHINESE, CHINESE + LATIN, "the ball 红球 moves 移动 to the 左边 " * 14 + ".",
    LATIN + "красный мяч " * 30 + "."])
def test_a_thought_that_goes_on_in_another_script_costs_the_format(thought):
    assert garbled(f"<think>{thought}</think>")
    assert score(answering("7", thought), "7", "count") == Reward(0.9, 1.0, 0.0)


# --------------------------------------------------------------------------------------------------
# time

@pytest.mark.parametrize("piece", [
    "7", "[0,0,1,1],", "A. ", " ", "(", "\\boxed{", "{", "\x00\ud800", "1:", "1,", "雪", '"', "“",
    "ab \n", "-", "\\frac{", "A))"])
def test_an_answer_of_a_megabyte_is_graded_in_bounded_time(piece):
    """By every verifier, alone and inside a response: nothing is quadratic in its length."""
    huge = piece * (10 ** 6 // len(piece))
    responses = (huge, "<think>t</think><answer>" + huge + "</answer>",
                 "<think>" + huge + "</think><answer>7</answer>")
    start = time.process_time()
    for domain in VERIFIERS:
        VERIFIERS[domain](huge, "7")
        for response in responses:
            score(response, "[0,0,1,1]", domain)
    assert time.process_time() - start < 10, "32 gradings of a megabyte"


def test_the_longest_texts_that_are_compared_take_a_moment():
    r = random.Random(0)
    a, b = ("".join(r.choice("abcdefgh ") for _ in range(9990)) for _ in "ab")
    boxes, shifted = (",".join(f"[{i},0,{i + 100},9]" for i in range(k, k + 100)) for k in (0, 3))
    start = time.process_time()
    assert 0 < VERIFIERS["ocr"](a + "x", b) < 1
    assert VERIFIERS["grounding"](boxes, shifted) > 0.9
    assert time.process_time() - start < 3


@pytest.mark.parametrize("piece", [
    "<answer>", "</answer>", "<answer></answer>", "</think>", "<think>", "\\boxed{", "\\boxed{}",
    "{", "{}", "{{a}", "\\", "<|begin_of_box|>", "<|end_of_box|>"])
@pytest.mark.parametrize("around", ["%s", "<answer>%s</answer>", "\\boxed{%s", "\\boxed{%s}"])
def test_an_answer_is_extracted_in_linear_time(piece, around):
    """It took 2.6 s for 80,000 characters of opening tags."""
    text = around % (piece * (200_000 // len(piece)))
    start = time.process_time()
    extract_answer(text)
    assert time.process_time() - start < 0.5


@pytest.mark.parametrize("domain, answer", [
    ("choice", "B"), ("count", "7"), ("open", "red ball"), ("math", "\\sqrt{2}"), ("chart", "45%"),
    ("ocr", "EXIT 7"), ("grounding", "[1,2,3,4]"), ("time", "1-2")])
def test_the_worst_answer_of_10000_characters_is_graded_in_a_tenth_of_a_second(domain, answer):
    """Each verifier alone; what the process for formulas does is limited by its own clock."""
    r = random.Random(domain)
    pieces = ["7", "[0,0,1,1],", "A. ", " ", "(", "\\boxed{", "{", "1:", "1,", "雪", '"', "-", "*",
              "**", "_a_", "$", "\\text{", "`", "\\", "^{", "9^", "²", "½", "1/2 ", " km", "x = ",
              "<ref>", "<box>", '{"bbox', "between 1 and ", "0:12-", "100,", ".5", "%", "~", "''",
              "(1,2),(3,4)", "\\frac{1}{2}", "“", "B) ", "\u0300", "1e9", "e", "million ", "$5"]
    texts = [piece * (10_000 // len(piece)) for piece in pieces]
    texts += ["B. " + "-" * 9_000 + "C1", "$5" + "\u2009" * 9_000, "5" + " or" * 3_000]
    for _ in range(20):
        some = [r.choice(pieces) * r.choice((1, 3, 1000)) for _ in range(4)]
        texts.append(("".join(some) * 10_000)[:10_000])
    for text in texts:
        for predicted, gold in ((text, answer), (answer, text)):
            start = time.process_time()
            VERIFIERS[domain](predicted, gold)
            assert time.process_time() - start < 0.1, ascii(text[:40])


# --------------------------------------------------------------------------------------------------
# the process for formulas

LONG_WORK = ("\\sqrt{2}", "[0,0,1,1]," * 29 + "[0,0,1,1]")      # seconds of math-verify's time


@pytest.mark.parametrize("formula", [
    "9^{9^{9^{9}}}", "9^9^9^9", "2^{99999999}", "(" * 500 + "1" + ")" * 500, "99999!", "9!!!!",
    "\\sqrt{" * 100 + "2" + "}" * 100, "{" * 400, "1+" * 4000 + "1",
    "\\left(" * 40 + "x" + "\\right)" * 40, "10^{10^{10}}", "\\frac{1}{" * 60 + "2" + "}" * 60])
def test_no_formula_stops_a_run(formula):
    """math-verify took seconds for the first, and for 500 parentheses."""
    start = time.monotonic()
    assert VERIFIERS["math"](formula, "\\sqrt{2}") == VERIFIERS["math"]("\\sqrt{2}", formula) == 0
    assert time.monotonic() - start < 20
    assert VERIFIERS["math"]("\\sqrt{8}", "2\\sqrt{2}") == 1


def test_a_formula_that_takes_too_long_is_wrong_and_the_next_one_is_graded():
    rewards.ask_worker.cache_clear()
    VERIFIERS["math"]("\\sqrt{8}", "2\\sqrt2")
    worker = rewards.WORKERS[os.getpid()]
    os.kill(worker.pid, signal.SIGPROF)                # what its own clock sends it
    worker.wait()
    assert VERIFIERS["math"]("\\sqrt{18}", "3\\sqrt2") == 1
    assert rewards.WORKERS[os.getpid()].pid != worker.pid
    assert VERIFIERS["math"](*LONG_WORK) == 0
    assert VERIFIERS["math"]("\\sqrt{27}", "3\\sqrt3") == 1


def test_many_threads_ask_for_formulas():
    """Each gets the answer to its own question."""
    rewards.ask_worker.cache_clear()
    questions = [(f"\\sqrt{{{n * n * 2}}}", f"{n + n % 2}\\sqrt2") for n in range(2, 40)]
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda question: VERIFIERS["math"](*question), questions))
    assert got == [float(n % 2 == 0) for n in range(2, 40)]


SCRIPT = """
import os, sys, threading, time, rewards
assert rewards.VERIFIERS["math"]("sqrt(8)", "2sqrt(2)") == 1
print(rewards.WORKERS[os.getpid()].pid, flush=True)
{end}
"""
BUSY = f"threading.Thread(target=rewards.verify_math, args={LONG_WORK!r}, daemon=True).start(); "


@pytest.mark.parametrize("end", [
    "pass", "os._exit(1)",
    BUSY + "time.sleep(0.3); os.kill(os.getpid(), 9)",
    "os.fork() or rewards.verify_math('sqrt(18)', '3sqrt(2)') == 1 or os.abort()"])
def test_no_process_is_left_behind(end):
    """However the run ends, and if it forks: the child asks a process of its own."""
    done = subprocess.run([sys.executable, "-c", SCRIPT.format(end=end)], capture_output=True,
                          text=True, timeout=60, cwd=Path(rewards.__file__).parent)
    worker = int(done.stdout.split()[0])
    for _ in range(100):
        try:
            state = Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return
        if state == "Z":                               # it has ended; nobody has asked yet
            return
        time.sleep(0.1)
    raise AssertionError("the process for formulas is still there")


def test_without_math_verify_a_formula_is_ungraded_and_the_remedy_named(tmp_path, monkeypatch):
    """The real worker, in a Python without its packages. It is not called wrong."""
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    bare.chmod(0o755)
    monkeypatch.setattr(rewards, "WORKERS", {})
    monkeypatch.setattr(rewards.sys, "executable", str(bare))
    with pytest.raises(VerifierError, match="'math'.*No module named.*pip install -r"):
        score(answering("\\sqrt{50}"), "5\\sqrt2", "math")
    assert score(answering("5 cm"), "5", "math").accuracy == 1


def test_a_formula_whose_process_fails_is_ungraded(monkeypatch):
    """Where the process could not start, or was killed, every formula was graded as wrong."""
    rewards.ask_worker.cache_clear()
    monkeypatch.setattr(rewards, "WORKERS", {})
    monkeypatch.setattr(rewards.sys, "executable", "/bin/false")
    for _ in range(2):                                     # nothing of it is remembered
        with pytest.raises(VerifierError, match="math_worker.py cannot compare.*: exit status 1"):
            score(answering("\\sqrt{50}"), "5\\sqrt2", "math")


def test_formulas_are_compared_under_a_limit_of_memory():
    """`ulimit -v`: a process may not raise its own limit, so the one for formulas did not start."""
    script = ("import resource, rewards; "
              "resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30)); "
              "print(rewards.VERIFIERS['math']('0.5', '1/2'))")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True,
                          timeout=120, cwd=Path(rewards.__file__).parent)
    assert done.stdout == "1.0\n", done.stderr


# --------------------------------------------------------------------------------------------------
# verifiers of one's own

def use_as_mine(monkeypatch, verifier):
    monkeypatch.setitem(VERIFIERS, "mine", verifier)


@pytest.mark.parametrize("wrong", [None, "1.0", 1.5, -0.1, float("nan"), [1]])
def test_a_verifier_that_returns_no_score_leaves_the_answer_ungraded(wrong, monkeypatch):
    use_as_mine(monkeypatch, lambda predicted, answer: wrong)
    with pytest.raises(VerifierError, match="'mine'"):
        score(GOOD, "7", "mine")


@pytest.mark.parametrize("right", [0, 1, 0.25, True])
def test_a_verifier_of_ones_own_scores(right, monkeypatch):
    use_as_mine(monkeypatch, lambda predicted, answer: right)
    got = score(GOOD, "7", "mine")
    assert got.accuracy == right and type(got.accuracy) is float
    assert score("no answer", "7", "mine").accuracy == 0


# --------------------------------------------------------------------------------------------------
# what GLM-4.1V's released reward code (glmv_reward) gets wrong: each made a whole domain's reward
# noise, and none stopped a run

def test_equal_numbers_are_equal_without_a_judge():
    """Its numeric branch called sympify(text, strict=True), which raises for any text: 42 and 42.0
    were left to the judge, or wrong."""
    for a, b in (("42", "42.0"), ("0.5", "1/2"), ("1e3", "1000")):
        assert VERIFIERS["math"](a, b) == VERIFIERS["math"](b, a) == 1


def test_every_domain_can_be_right():
    """Its general verifier asked the judge for 1.0 or 0.0, and then searched its reply for the word
    Correct: no answer was ever right."""
    for domain, cases in CASES.items():
        assert any(score(answering(predicted), answer, domain).accuracy == 1
                   for predicted, answer, _ in cases), domain


def test_a_verifier_that_raises_is_not_a_wrong_answer(monkeypatch):
    """Its geoquest prompt lacked fields that its own code demanded: each call raised, and each
    raise was graded 0."""
    prompt = "{question}"
    use_as_mine(monkeypatch, lambda predicted, answer: prompt.format(label=answer))
    with pytest.raises(VerifierError, match="'mine'.*KeyError.*question") as e:
        score(GOOD, "7", "mine")
    assert isinstance(e.value.__cause__, KeyError)
    assert not issubclass(VerifierError, ValueError), "ValueError ends the run, this drops a sample"


def test_a_judges_prose_is_no_score(monkeypatch):
    """It took "1.0" anywhere in the judge's reply for a yes. Here a reply must be made a number."""
    use_as_mine(monkeypatch, lambda predicted, answer: "Not 1.0, since it is wrong: 0.0")
    with pytest.raises(VerifierError):
        score(GOOD, "7", "mine")


def test_loops_are_looked_for():
    """Its detector of repetitions was written and never called."""
    looping = score(answering("7", LOOPS[0]), "7", "count")
    assert looping.total < score(GOOD, "7", "count").total


def test_nothing_read_of_nothing_is_no_division_by_zero():
    """It divided the edit distance by the longer length, which is 0 for two empty texts. The raise
    was graded 0 by accident; here it is 0 by rule."""
    assert score("<think>t</think><answer></answer>", "", "ocr").accuracy == 0


def test_a_letter_in_a_word_is_no_unit():
    """It searched for units as substrings ("m", "s", "A"), so that nearly any text had one and went
    to the judge."""
    assert VERIFIERS["math"]("same", "7") == VERIFIERS["math"]("5 apples", "5 m") == 0
    assert VERIFIERS["math"]("5 m", "5 m") == VERIFIERS["math"]("5 apples", "5") == 1


def test_whole_numbers_may_have_a_point():
    """Its counting compared strings of digits: 1.0 was not 1."""
    assert VERIFIERS["count"]("1.0", "1") == VERIFIERS["count"]("07", "7") == 1


def test_tolerance_is_small_and_relative():
    """It allowed 0.9 in one domain, where 1.5 passed for 1. It added 1e-6 to the divisor, so that
    1e-13 passed for 0."""
    assert VERIFIERS["math"]("1.5", "1") == VERIFIERS["math"]("1e-13", "0") == 0
    assert VERIFIERS["math"]("1.1e-13", "1e-13") == 0


def test_only_years_are_exact():
    """It took any two whole numbers from 1000 to 3000 for years: 1500 read as 1510 was wrong. Nor
    must 2010 pass as 2011."""
    assert VERIFIERS["chart"]("1500", "1510") == 1 and VERIFIERS["chart"]("2010", "2011") == 0


def test_one_box_is_one_answer():
    """It preferred an older kind of box to a newer one, and the outer of two nested ones: it graded
    one of several guesses."""
    for predicted in (r"\boxed{7}<|begin_of_box|>8<|end_of_box|>",
                      "<|begin_of_box|><|begin_of_box|>7<|end_of_box|><|end_of_box|>"):
        assert score(answering(predicted), "7", "count").accuracy == 0


def test_boxes_have_a_verifier():
    """Its release has none for grounding, although the paper's Table 1 has: matched boxes over all
    boxes."""
    assert VERIFIERS["grounding"]("[0,0,9,9] [50,50,60,60]", "[0,0,10,10]") == 0.5
