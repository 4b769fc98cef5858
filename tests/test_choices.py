"""python -m pytest tests/test_choices.py -q

Lettered options in a question, and what they make of an answer. (tests/test_formats.py has options
beside the question.)
"""
import pytest
from test_formats import fails, write

import data
import rewards
from plumbing.choices import append_options, find_options, guess_domain

AB = {"A": "red", "B": "blue"}


@pytest.mark.parametrize("question, options", [
    ("Which? A. red B. blue", AB), ("Which?\nA) red\nB) blue", AB), ("Which? (A) red (B) blue", AB),
    ("Which? [A] red [B] blue", AB), ("Which?\nA: red\nB: blue", AB), ("Which? A.red, B.blue", AB),
    ("Which?\nA red\nB blue", AB), ("Which? A red B blue", AB),
    ("Which?\n**A.** red\n**B.** blue", AB), ("Is P(A) above P(B)?", {}),
    ("Which?\na) red\nb) blue", {"a": "red", "b": "blue"}),
    ("Which? (a) red (b) blue", {"a": "red", "b": "blue"}),
    ("哪个？\nA．red\nB．blue", AB), ("哪个？（A）red （B）blue", AB),
    ("Which?\nA. red\nB. blue\nAnswer with the letter.", AB),
    ("Who knows J. A. Smith? A. red B. blue", AB),         # his initial is no option
    ("Is (A) or (B) larger?\n- **A.** red\n- **B.** blue", AB),
    ("Which? A. red B. blue\nC. 3 D. 4", {**AB, "C": "3", "D": "4"}),
    ("Which letter is on the wall?", {}), ("Is A taller than B or C?", {}),
    ("At 9 A.M. what happens?", {}), ("Did B. come after C. did?", {}), ("A man walks. Why?", {})])
def test_the_options_that_a_question_lists(question, options):
    assert find_options(question) == options


@pytest.mark.parametrize("listed", [
    "A. red B. blue", "A) red\nB) blue", "(A) red (B) blue", "[A] red [B] blue", "A red\nB blue",
    "A: red\nB: blue", "a) red\nb) blue", "A red B blue"])
@pytest.mark.parametrize("answer", [
    "B", "b", "(B)", "B.", "[B]", "B)", "B. blue", "(B) blue", "B) Blue.", "B: blue", "B blue",
    "**B**", "Option B"])
def test_a_letter_alone_or_with_its_text_is_a_choice(tmp_path, listed, answer):
    record = {"video": "a.mp4", "question": f"Which?\n{listed}", "answer": answer}
    [sample] = data.load(write(tmp_path, "q.jsonl", record))
    assert (sample.answer.upper(), sample.domain) == ("B", "choice")
    assert rewards.VERIFIERS["choice"]("B", sample.answer) == 1


@pytest.mark.parametrize("question, answer, letter", [
    ("When?\nA. 10 A.M.\nB. 11 A.M.", "A. 10 A.M.", "A"),
    ("Who?\nA. Susan B. Anthony\nB. Rosa Parks\nC. Ann C. Lee", "B. Rosa Parks", "B"),
    ("Who?\nA. Susan B. Anthony\nB. Rosa Parks\nC. Ann C. Lee", "A. Susan B. Anthony", "A"),
    ("Who wrote it?\nA. A. A. Milne\nB. J. Shaw", "A. A. A. Milne", "A"),
    ("Which?\nA. Vitamin A.\nB. Vitamin B.", "A. Vitamin A.", "A"),
    ("Which?\nA. Plan B.\nB. Plan A.", "A. Plan B.", "A"),
    ("Which?\na) plan B.\nb) plan A.", "b) plan A.", "b"),
    ("Consider (A) the dog and (B) the cat. Which runs?\nA. the dog\nB. the cat", "B. the cat",
     "B")])
def test_an_initial_in_an_options_text_is_no_option(tmp_path, question, answer, letter):
    """It began another option, so that the load stopped, or read the other option's text."""
    record = {"video": "a.mp4", "question": question, "answer": answer}
    [sample] = data.load(write(tmp_path, "q.jsonl", record))
    assert (sample.answer, sample.domain) == (letter, "choice")


def test_the_question_may_go_on_after_its_last_option(tmp_path):
    """What follows was taken for the option's text: its own text did not fit, and options that are
    beside the question as well were listed twice."""
    question = "Which? Options: A. red, B. blue, C. green. Answer with a letter."
    record = {"video": "a.mp4", "question": question}
    for answer in ("C. green", "C. Green.", "(C) green", "C"):
        [sample] = data.load(write(tmp_path, "q.jsonl", {**record, "answer": answer}))
        assert (sample.answer, sample.domain) == ("C", "choice")
    fails(write(tmp_path, "q.jsonl", {**record, "answer": "C. gre"}), "does not fit the options")
    assert append_options(question, {"A": "red", "B": "blue", "C": "green"}) == question
    assert append_options(question, {"A": "red", "B": "blue", "C": "grey"}) != question
    options = {"A": "3", "B": "3.5"}                       # a decimal point ends no sentence
    assert append_options("Which? A. 3 B. 3.5 m", options) != "Which? A. 3 B. 3.5 m"


@pytest.mark.parametrize("answer", ["C", "F", "(Z)", "B. red", "(A) blue", "D. red"])
@pytest.mark.parametrize("domain", [None, "choice"])
def test_an_answer_that_no_option_has_is_refused(tmp_path, answer, domain):
    """A sample that nobody can be right about."""
    record = {"video": "a.mp4", "question": "Which?\nA. red\nB. blue", "answer": answer,
              "domain": domain}
    fails(write(tmp_path, "q.jsonl", record), f"line 1: the answer {answer!r}")


@pytest.mark.parametrize("question, answer, domain", [
    ("Which?\nA. red\nB. blue", "red", "open"),           # a text alone stays what it is
    ("How many?\nA. 3\nB. 4", "4", "count"), ("Which? A. x B. y", "y", "open"),
    ("Which? A. 1 B. 2 D. 4", "D", "choice"),              # a letter is missing, not this one
    ("Who? A. B. King\nB. Al", "A man in red", "open")])
def test_what_is_no_letter_is_no_choice(tmp_path, question, answer, domain):
    record = {"video": "a.mp4", "question": question, "answer": answer}
    [sample] = data.load(write(tmp_path, "q.jsonl", record))
    assert (sample.answer, sample.domain) == (answer, domain)


def test_a_given_domain_decides(tmp_path):
    record = {"video": "a.mp4", "question": "Which?\nA. red\nB. blue", "answer": "F"}
    [sample] = data.load(write(tmp_path, "q.jsonl", {**record, "domain": "ocr"}))
    assert (sample.answer, sample.domain) == ("F", "ocr")
    named = {**record, "domain": "choice", "answer": "blue"}
    [sample] = data.load(write(tmp_path, "q.jsonl", named))
    assert (sample.answer, sample.domain) == ("B", "choice")


@pytest.mark.parametrize("domain, answers", {
    "count": ["5", "-3", "+7", "007", "123456"],
    "math": ["5.5", "-3.5", ".5", "5.0", "1/2", "-3/4", "50%", "12.5 %", "50\\%", "1,234",
             "1,234,567.8", "-1,000", "1e5", "2.5E-3", "3 x 10^4", r"\frac{1}{2}", "1 1/2",
             "50 percent", "\u22123.5"],
    "open": ["five", "", "%", "-", ".", "/", "0:12", "3-5", "1.2.3", "2020/12/1", "1,23", "5 km",
             "x", "1/2/3", "Ann B", "e5", "no. 5", "[1, 2, 3, 4]"]}.items())
def test_the_domain_of_a_number(domain, answers):
    for answer in answers:
        assert guess_domain(answer) == domain, answer
        if answer:
            right = rewards.VERIFIERS[domain](answer, answer)
            assert right == 1.0 or domain == "open", (domain, answer)
