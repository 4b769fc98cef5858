"""python -m pytest tests/test_rewards.py -q

What counts as an answer, what counts as right, and what was tried to be counted as right without being so.
"""
import random
import string
import time

import pytest

from rewards import VERIFIERS, Reward, extract_answer, fold, score, well_formed


@pytest.mark.parametrize("text, found", [
    ("<think>t</think><answer>7</answer>", "7"),
    ("<answer>7</answer>", "7"),
    ("<think>t</think> so <answer> a\n b </answer> then", "a\n b"),            # text around it, lines in it
    ("<think>t</think><answer></answer>", ""),
    ("<think>t</think>7", None),
    ("", None),
    ("<think>t</think><answer>7", None),                                       # never closed
    ("<think>t</think>7</answer>", None),
    ("<think>t</think></answer>7<answer>", None),
    ("<think>t</think><answer>7</answer><answer>8</answer>", None),            # two
    ("<think>t</think><answer>7</answer><answer>7</answer>", None),
    ("<think>t</think><answer>7</answer><answer>8", None),
    ("<think>t</think><answer><answer>7</answer></answer>", None),             # one in the other
    ("<think>t</think><answer>7<answer>8</answer>", None),
    ("<think>t</think><answer>7</answer></answer>", None),
    ("<think>t</think></answer><answer>7</answer>", None),
    ("<think><answer>7</answer></think>", None),                               # in thought alone
    ("<think>I think <answer>7</answer>", None),                               # in a thought that never ends
    ("<think><answer>7</answer></think><answer>8</answer>", "8"),
    ("<think>t</think><answer>7</answer></think>", None),                      # thought after all
    ("<think>t</think><answer>7</think></answer>", None),
    ("<think>t</think><Answer>7</Answer>", None),
    ("<think>t</think>< answer>7</ answer>", None)])
def test_the_answer_is_the_one_given_after_the_thinking(text, found):
    assert extract_answer(text) == found


@pytest.mark.parametrize("text, good", [
    ("<think>t</think><answer>7</answer>", True),
    ("  <think>\nt\n</think>\n\n<answer>\n7\n</answer>\n", True),
    ("<think></think><answer></answer>", True),
    ("", False),
    ("7", False),
    ("<answer>7</answer>", False),
    ("<think>t</think>", False),
    ("<think>t</think>7", False),
    ("<think>t</think>so<answer>7</answer>", False),                           # words between, before, after
    ("so <think>t</think><answer>7</answer>", False),
    ("<think>t</think><answer>7</answer>.", False),
    ("t</think><answer>7</answer>", False),
    ("<think>t<answer>7</answer></think>", False),
    ("<answer>7</answer><think>t</think>", False),
    ("<think>t</think><answer>7</answer><answer>8</answer>", False),           # each tag once
    ("<think>t</think><think>t</think><answer>7</answer>", False),
    ("<think><think>t</think><answer>7</answer>", False),
    ("<think>t</think></think><answer>7</answer>", False),
    ("<think>t</think><answer><answer>7</answer>", False),
    ("<think>t</think><answer>7</think></answer>", False)])
def test_the_form_is_one_thought_then_one_answer_and_nothing_else(text, good):
    assert well_formed(text) is good


CASES = {
    "choice": [
        ("B", "B", 1), ("b", "B", 1), ("(B)", "B", 1), ("(b)", "b", 1), ("B.", "B", 1), ("B)", "B", 1), ("B: left", "B", 1),
        ("B. to the left", "B", 1), ("(B) to the left", "B", 1), ("B. A plane", "B", 1), ("B", "B. left", 1), ("B", " (B) ", 1),
        ("B. in the U.S.", "B", 1),                                            # letters in an option's own words
        ("A", "B", 0), ("A. B", "B", 0), ("", "B", 0), ("left", "B", 0), ("Because", "B", 0), ("8", "B", 0), ("B", "", 0),
        ("B or C", "B", 0), ("B, C", "B", 0), ("BC", "B", 0), ("B/C", "B", 0), ("B and C", "C", 0), ("B\nC", "B", 0),
        ("B. C", "B", 0), ("B) C)", "B", 0), ("(B) (C)", "B", 0), ("(B)(C)", "B", 0),
        ("A. left B. right", "A", 0), ("A. left B. right C. top", "B", 0), ("A. left\nB. right", "A", 0),  # the list copied
        ("(A)(B)(C)(D)", "A", 0), ("A.B.C.D", "A", 0), ("A:B:C", "A", 0), ("A.left B.right", "A", 0), ("A. left;B. right", "A", 0),
        ("B. the U.S. flag", "B", 1), ("B. at 10 a.m. sharp", "B", 1), ("B.left", "B", 1),
        ("(A) left (B) right", "A", 0), ("A) left B) right", "A", 0), ("A: left B: right", "A", 0),
        ("one of A, B, C or D", "A", 0), ("a letter between A and D", "A", 0), ("all of the above", "A", 0)],
    "count": [
        ("7", "7", 1), ("07", "7", 1), ("7.0", "7", 1), ("7.", "7", 1), (" 7\n", "7", 1), ("+7", "7", 1), ("-3", "-3", 1),
        ("-0", "0", 1), ("7", "7.0", 1), ("0", "0", 1), ("７", "7", 1),
        ("8", "7", 0), ("77", "7", 0), ("7.5", "7", 0), ("-7", "7", 0), ("", "7", 0), ("", "0", 0), ("seven", "7", 0),
        ("7 or 8", "7", 0), ("7 8", "7", 0), ("7, 8", "7", 0), ("7-8", "7", 0), ("7birds", "7", 0), ("7", "many", 0),
        ("7e0", "7", 0), ("0x7", "7", 0), ("7.0.0", "7", 0), ("--7", "7", 0), ("6+1", "7", 0), (".", "0", 0), ("²", "2", 0),
        ("a correct number between 0 and 10", "7", 0), ("between 0 and 10", "7", 0), ("0 1 2 3 4 5 6 7 8 9", "7", 0),
        ("the number of birds", "7", 0), ("7 is the answer", "7", 0), ("9" * 5000, "7", 0), ("7." + "0" * 5000, "7", 1)],
    "open": [
        ("red ball", "red ball", 1), ("Red  BALL.", "red ball", 1), ("red-ball", "red ball", 1), ("\tred\nball", "red ball", 1),
        ("“red ball”", "red ball", 1), ("ﬁsh", "fish", 1), ("STRASSE", "straße", 1), ("e\u0301cole", "\u00e9cole", 1), ("7", "7", 1),
        ("红色", "红色。", 1),
        ("ball", "red ball", 0), ("red ball", "ball", 0), ("redball", "red ball", 0), ("ball red", "red ball", 0), ("", "red", 0),
        ("red", "", 0), ("", "", 0), ("...", "!", 0), ("", "?", 0), ("rouge", "red", 0), ("é", "e", 0),
        ("दिन", "दान", 0), ("กิน", "กัน", 0),                                    # vowels that are written as marks are letters
        ("red or blue", "red", 0), ("red, blue", "red", 0), ("red red", "red", 0), ("one of red, blue and green", "red", 0),
        ("a velocity very close to the speed of light", "0.999 c", 0), ("the right answer", "red", 0)]}


@pytest.mark.parametrize("domain, predicted, answer, right", [(d, *case) for d, cases in CASES.items() for case in cases],
                         ids=lambda x: x[:30] if isinstance(x, str) else str(x))
def test_what_is_right(domain, predicted, answer, right):
    """Of the verifier alone, and inside a response, whose reward is 0.9 for this and 0.1 for its form."""
    found = VERIFIERS[domain](predicted, answer)
    assert type(found) is float and found == right
    if "<" not in predicted:
        assert score(f"<think>t</think><answer>{predicted}</answer>", answer, domain).accuracy == right


def test_every_verifier_is_in_the_table():
    assert set(CASES) == set(VERIFIERS)


@pytest.mark.parametrize("text, weight, expected", [
    ("<think>t</think><answer>7</answer>", 0.1, (1.0, 1.0, 1.0)),
    ("<think>t</think><answer>8</answer>", 0.1, (0.1, 0.0, 1.0)),              # wrong, in good form
    ("<answer>7</answer>", 0.1, (0.9, 1.0, 0.0)),                              # right, in bad form
    ("7", 0.1, (0.0, 0.0, 0.0)), ("", 0.1, (0.0, 0.0, 0.0)),
    ("<think>t</think><answer>8</answer>", 0.0, (0.0, 0.0, 1.0)),              # 0: form is no part of the total, but told
    ("<answer>7</answer>", 0.0, (1.0, 1.0, 0.0)),
    ("<answer>7</answer>", 0.25, (0.75, 1.0, 0.0)), ("<think>t</think><answer>8</answer>", 0.25, (0.25, 0.0, 1.0))])
def test_the_total_weighs_accuracy_and_form(text, weight, expected):
    got = score(text, "7", "count", weight)
    assert isinstance(got, Reward) and (got.total, got.accuracy, got.format) == pytest.approx(expected)
    if weight == 0.1:
        assert score(text, "7", "count") == got, "a tenth is the default"


def test_an_answer_that_was_forced_is_graded_like_any_other():
    """What a thinker out of time has written, with the piece that was written for it."""
    assert score("<think>one, two, thr</think><answer>7</answer>", "7", "count") == score(
        "<think>seven</think><answer>7</answer>", "7", "count")


def test_a_domain_without_a_verifier_raises_and_is_named():
    with pytest.raises(ValueError, match="'geometry'.*choice, count, open"):
        score("<think>t</think><answer>7</answer>", "7", "geometry")
    with pytest.raises(ValueError):
        score("no answer at all", "7", "")


def junk(seed=0, n=1500):
    """Strings that a model might write: pieces of answers, tags, other scripts, control characters, halves of surrogates."""
    r = random.Random(seed)
    pieces = ["<think>", "</think>", "<answer>", "</answer>", "A", "B.", "(C)", "7", "7.0", "-", ".", " ", "\n", "\x00", "\ud800",
              "\u0300", "½", "²", "٧", "𝟕", "é", "雪", "नमस्ते", "🙂", "\\", "(", ")", "[", "*", "+", "?", "{1}", "nan", "inf", "1e9", "0x7", "None"]
    yield from ["", " ", "\x00", "(", "\ufffd" * 50, "7" * 4300, "9" * 4301, "-" + "1" * 20000, "A" * 20000, " " * 20000, "\n" * 20000]
    for _ in range(n):
        yield "".join(r.choice(pieces) for _ in range(r.randrange(1, 12)))
    for _ in range(n):
        yield "".join(r.choice(string.printable) for _ in range(r.randrange(1, 30)))
    for _ in range(n):
        yield "".join(chr(r.randrange(0x110000)) for _ in range(r.randrange(1, 8)))


@pytest.mark.parametrize("domain", VERIFIERS)
def test_no_string_makes_a_verifier_raise_or_leave_its_range(domain):
    """A verifier that raises ends the step, or drops the sample: int() of more than 4300 digits did."""
    failed = []
    for text in junk():
        for answer in ("B", "7", "red ball", ""):
            for call in (lambda: VERIFIERS[domain](text, answer), lambda: VERIFIERS[domain](answer, text),
                         lambda: score(text, answer, domain).total,
                         lambda: score(f"<think></think><answer>{text}</answer>", answer, domain).total):
                try:
                    value = call()
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


def test_what_is_right_is_right_of_itself():
    """Each verifier grants its own answers, so that no sample is impossible."""
    for domain, answers in (("choice", "ABCDEFGH"), ("count", map(str, range(-5, 200))), ("open", ("red ball", "Él", "दिन", "3.5 m"))):
        for answer in answers:
            assert score(f"<think>t</think><answer>{answer}</answer>", answer, domain).total == pytest.approx(1.0)


def test_folding_what_is_folded_changes_nothing():
    for text in junk(2, 300):
        assert fold(fold(text)) == fold(text)


@pytest.mark.parametrize("loop", ["<answer>", "</think><answer></answer>", "<think>", "</answer>", " ", "</think> "])
def test_a_model_that_repeats_itself_is_graded_quickly(loop):
    """Models do loop. Tags are counted before patterns are tried, which would try each opening with each closing."""
    text = "<think>" + loop * (60000 // len(loop))
    start = time.process_time()
    assert score(text, "7", "count").total == 0
    assert time.process_time() - start < 0.3
