"""python -m pytest tests/test_judges.py -q

Verifiers of one's own: loading them, and asking many at once.
"""
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

import rewards
from flow import Reward, Sample
from plumbing import judges, ranks
from plumbing.judges import at_once, grade, load_verifier, load_verifiers

GOOD = "<think>t</think><answer>7</answer>"


# --------------------------------------------------------------------------------------------------
# loading

def test_a_verifier_is_loaded_from_a_file(tmp_path, monkeypatch):
    (tmp_path / "judge.py").write_text(
        "from dataclasses import dataclass\nWORTH = 0.5\n@dataclass\nclass A:\n    x: 'int' = 1\n"
        "def half(predicted, answer):\n"
        "    return WORTH * A().x if predicted == answer else 0\n")
    [(domain, half)] = load_verifiers(f"mine={tmp_path}/judge.py:half").items()
    monkeypatch.setitem(rewards.VERIFIERS, domain, half)
    assert rewards.score(GOOD, "7", "mine").accuracy == 0.5
    assert rewards.score(GOOD, "8", "mine").accuracy == 0


@pytest.mark.parametrize("source, spec, why", [
    ("", "judge.py:half", "half"), ("half = 1", "judge.py:half", "no function"),
    ("def half(:", "judge.py:half", "SyntaxError"),
    ("import no_such_thing", "judge.py:half", "no_such_thing"),
    ("raise SystemExit(3)", "judge.py:half", "SystemExit"), ("\x00", "judge.py:half", "null"),
    ("half = len", "none.py:half", "No such file"), ("half = len", "judge.py", "path.py:function"),
    ("half = len", "judge.py:", "judge.py:"), ("", "", "")])
def test_a_verifier_that_cannot_be_loaded_is_one_line(source, spec, why, tmp_path, monkeypatch):
    (tmp_path / "judge.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="^cannot load the verifier") as e:
        load_verifier(spec)
    assert why in str(e.value) and repr(spec) in str(e.value) and "\n" not in str(e.value)


# --------------------------------------------------------------------------------------------------
# many at once

def after(seconds, result):
    def call():
        time.sleep(seconds)
        if isinstance(result, Exception):
            raise result
        return result
    return call


def test_results_are_in_the_order_of_the_calls():
    """Whatever order they end in, and as one after another."""
    calls = [after(0.01 * (n * 7 % 5), n) for n in range(30)]
    assert at_once(calls, 8, 60) == at_once(calls, 1, 60) == list(range(30))
    assert at_once([], 8, 60) == []


@pytest.mark.parametrize("size", [1, 3, 8])
def test_as_many_run_at_once_as_the_pool_is_large(size):
    """Each call waits until `size` of them run, so fewer would never end; then it stays a little,
    so that more would be seen."""
    running, most, lock = 0, 0, threading.Lock()
    met = threading.Barrier(size)

    def call():
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        met.wait(60)
        time.sleep(0.02)
        with lock:
            running -= 1

    at_once([call] * 24, size, 60)
    assert most == size


def test_many_calls_that_wait_take_little_time():
    """24 answers of a judge that takes 0.2 s took 4.8 s."""
    start = time.monotonic()
    at_once([after(0.2, 1.0)] * 24, 8, 60)
    assert 0.6 <= time.monotonic() - start < 4


def test_what_is_late_or_fails_holds_up_nothing():
    error = KeyError("no")
    calls = [after(30, 0), after(0, 1), after(0, error), after(30, 3), after(0, 4), after(0, 5)]
    start = time.monotonic()
    late, one, failed, also_late, four, five = at_once(calls, 2, 0.3)
    assert time.monotonic() - start < 20
    assert (one, four, five) == (1, 4, 5) and failed is error
    assert isinstance(late, TimeoutError) and isinstance(also_late, TimeoutError)


def test_a_late_call_does_not_take_the_place_of_a_later_one():
    """It ends while others run: its result is dropped, theirs are kept."""
    calls = [after(1.5, n) if n % 3 == 0 else after(0.05, n) for n in range(12)]
    got = at_once(calls, 2, 1.0)
    assert [x for x in got if not isinstance(x, TimeoutError)] == [1, 2, 4, 5, 7, 8, 10, 11]


def test_judges_that_all_hang_do_not_outlast_the_patience_of_other_ranks(monkeypatch):
    """Each answer was given its judge_seconds, one round after another: 512 answers took over an
    hour, and the ranks that waited for them ended the run after half an hour."""
    assert judges.MOST_SECONDS < ranks.PATIENCE.total_seconds()
    monkeypatch.setattr(judges, "MOST_SECONDS", 0.5)
    begun = []
    hang = [lambda n=n: begun.append(n) or time.sleep(30) for n in range(100)]
    start = time.monotonic()
    first, *others, last = at_once([after(0, 1), *hang], 2, 0.2)
    assert time.monotonic() - start < 15
    assert first == 1 and all(isinstance(x, TimeoutError) for x in [*others, last])
    assert "judge_seconds" in str(others[0]) and "the verifiers of one step took 0.5 s" in str(last)
    assert len(begun) < 20


def test_a_judge_that_hangs_does_not_keep_the_program_from_ending():
    script = ("import time; from plumbing.judges import at_once; "
              "print(at_once([lambda: time.sleep(600)], 4, 0.2))")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True,
                          timeout=60, cwd=Path(rewards.__file__).parent)
    assert "no result within 0.2 s (judge_seconds)" in done.stdout and done.returncode == 0


# --------------------------------------------------------------------------------------------------
# grading

@dataclass
class Config:
    verifiers: str = "mine=my_file.py:judge,slow=my_file.py:slow"
    judges: int = 8
    judge_seconds: float = 0.5
    format_weight: float = 0.1


@dataclass
class Text:
    text: str


def question(domain, *answers):
    texts = [Text(f"<think>t</think><answer>{answer}</answer>") for answer in answers]
    return Sample("id", "?", "7", domain, "toy:0"), texts


def judge(predicted, answer):
    time.sleep(0.02 * (len(predicted) % 3))
    if predicted == "?":
        raise ConnectionError("the judge does not answer")
    if predicted == "page":
        raise ConnectionError("<html>\n" + "<p>\n" * 10_000)
    if predicted == "exit":
        sys.exit()
    if predicted == "array":
        return np.ones(1)
    return float(predicted == answer)


def slow(predicted, answer):
    time.sleep(3 if predicted == "7" else 0)
    return 0.5


@pytest.fixture
def ours(monkeypatch):
    monkeypatch.setitem(rewards.VERIFIERS, "mine", judge)
    monkeypatch.setitem(rewards.VERIFIERS, "slow", slow)


def graded(pairs, **how):
    return grade(pairs, Config(**how), rewards.score, rewards.VerifierError)


def test_answers_are_graded_as_one_after_another(ours):
    pairs = [question("mine", "7", "88", "7"), question("count", "7", "8", "777", "07"),
             question("mine", "999", "7"), question("count"), question("slow", "8")]
    verdicts = graded(pairs)
    assert verdicts == graded(pairs, judges=1)
    expected = [[1, 0, 1], [1, 0, 0, 1], [0, 1], [], [0.5]]
    assert [[x.accuracy for x in rewards] for rewards, _ in verdicts] == expected
    assert {why for _, why in verdicts} == {""}
    assert verdicts[0][0][0] == Reward(1.0, 1.0, 1.0)


def test_a_question_whose_judge_fails_or_is_late_is_ungraded_and_no_other(ours):
    verdicts = graded([question("mine", "7", "?"), question("slow", "8", "7", "8"),
                       question("mine", "7"), question("count", "7")])
    assert verdicts[0] == (None, "domain 'mine': ConnectionError: the judge does not answer")
    assert verdicts[1] == (None, "domain 'slow': no result within 0.5 s (judge_seconds)")
    assert [why for _, why in verdicts[2:]] == ["", ""]


def test_a_judge_that_exits_or_returns_no_number_leaves_an_answer_ungraded(ours):
    """sys.exit() in a judge ended the run with status 0 and without a word; an array of one number
    ended it with a traceback."""
    verdicts = graded([question("mine", "exit"), question("mine", "array"), question("mine", "7")])
    assert verdicts[0] == (None, "domain 'mine': SystemExit:")
    assert verdicts[1][1].startswith("domain 'mine': TypeError: ")
    assert verdicts[2][1] == ""


def test_why_an_answer_is_ungraded_is_one_short_line(ours):
    """The whole page that a judge's server had sent was printed."""
    [(_, why)] = graded([question("mine", "page")])
    assert why.startswith("domain 'mine': ConnectionError: <html> <p>") and len(why) <= 300


@pytest.mark.parametrize("specs, says", [
    ("a={0}:half,a={0}:half", "the domain 'a' has two verifiers"), ("={0}:half", "is not domain=")])
def test_a_list_of_verifiers_that_says_too_little_is_refused(tmp_path, specs, says):
    """Of two verifiers of a domain the last one was taken; an empty domain was a domain."""
    (tmp_path / "judge.py").write_text("half = len\nhere = __file__")
    with pytest.raises(ValueError, match=says):
        load_verifiers(specs.format(tmp_path / "judge.py"))


def test_a_domain_without_a_verifier_is_no_ungraded_answer(ours):
    with pytest.raises(ValueError, match="no verifier for domain 'geometry'"):
        graded([question("geometry", "7")])
