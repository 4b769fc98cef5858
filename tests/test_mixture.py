"""python -m pytest tests/test_mixture.py -q

Domains in set proportions: what is refused, what is drawn, on one rank and two, after a restart.
"""
import json
import random
from collections import Counter
from types import SimpleNamespace

import pytest
from runs import (
    SHORT,
    alone,
    ended,
    flags,
    launched,
    metrics,
    question,
    refused,
    rollouts,
    state,
    write,
)

from curriculum import Curriculum, has_signal
from plumbing.mixture import mixed, shares

SAMPLES = [SimpleNamespace(id=f"q{i}", domain=("count", "open", "ocr")[i % 5 % 3])
           for i in range(200)]
DOMAIN = {sample.id: sample.domain for sample in SAMPLES}
GRADES = {sample.id: (i % 9, 8) for i, sample in enumerate(SAMPLES)}
THREE = {"count": 2.0, "open": 1.0, "ocr": 0.7}


@pytest.mark.method
@pytest.mark.parametrize("text, found", [
    ("", {}), ("count:2,open:1,ocr:0.7", THREE), ("ocr:1e2, open:3 ,count:0.1",
                                                  {"ocr": 100.0, "open": 3.0, "count": 0.1})])
def test_shares_are_read(text, found):
    assert shares(text, SAMPLES) == found


@pytest.mark.method
@pytest.mark.parametrize("text, says", [
    ("count:2", "count, ocr, open"), ("count:2,open:1,ocr:1,plot:1", "count, ocr, open"),
    ("count", "'count' is not domain:share"), ("count:2,open:,ocr:1", "'open:'"),
    ("count:2,open:x,ocr:1", "'open:x'"), ("count:2,open:0,ocr:1", "'open:0'"),
    ("count:2,open:-1,ocr:1", "'open:-1'"), ("count:nan,open:1,ocr:1", "'count:nan'"),
    ("count:inf,open:1,ocr:1", "'count:inf'"), (":1", "':1'"),
    ("count:2,count:1,open:1,ocr:1", "'count' has two shares")])
def test_bad_shares_are_refused(text, says):
    with pytest.raises(ValueError) as e:
        shares(text, SAMPLES)
    assert f"--mixture={text}: " in str(e.value) and says in str(e.value)


@pytest.mark.method
def test_without_shares_all_samples_are_in_one_curriculum():
    one = mixed(Curriculum, SAMPLES, {}, "0", GRADES, True)
    assert isinstance(one, Curriculum) and one.domains == DOMAIN
    assert one.draw(30) == Curriculum(list(DOMAIN), "0", GRADES).draw(30)


def steps(curriculum, rng, n):
    """Each draws as many as the ratio says, and notes what came back. -> what was drawn"""
    drawn = []
    for _ in range(n):
        ids = curriculum.draw(curriculum.expanded(6, 2))
        groups = [[float(rng.random() < 0.7) for _ in range(8)] for _ in ids]
        for id, group in zip(ids, groups):
            curriculum.update(id, sum(group), 8)
        curriculum.note_valid(sum(map(has_signal, groups)), len(ids))
        drawn += ids
    return drawn


@pytest.mark.method
@pytest.mark.parametrize("text", ["count:2,open:1,ocr:0.7", "ocr:5,open:1,count:1",
                                  "open:1,ocr:1,count:1", "count:0.05,open:0.6,ocr:0.35"])
def test_the_shares_are_kept_in_any_thousand_draws(text):
    """With tiers and oversampling together."""
    wanted = shares(text, SAMPLES)
    curriculum = mixed(Curriculum, SAMPLES, wanted, "0", GRADES, True)
    drawn = steps(curriculum, random.Random(0), 400)
    assert len(drawn) > 2000
    for start in (0, 700, len(drawn) - 1000):
        count = Counter(DOMAIN[id] for id in drawn[start:start + 1000])
        for domain, share in wanted.items():
            assert abs(count[domain] / 1000 - share / sum(wanted.values())) <= 0.005
    for size in (10, 37):                                  # also in a single step
        count = Counter(DOMAIN[id] for id in curriculum.draw(size))
        for domain, share in wanted.items():
            assert abs(count[domain] - size * share / sum(wanted.values())) <= 2


@pytest.mark.method
def test_small_shares_are_kept_from_the_start():
    """Twenty domains of one percent and one of eighty: in fifty draws ten are of the small ones."""
    samples = [SimpleNamespace(id=f"{domain}-{i}", domain=domain)
               for domain in ["large", *(f"d{i}" for i in range(20))] for i in range(9)]
    wanted = {domain: 0.01 for domain in {sample.domain for sample in samples}} | {"large": 0.8}
    curriculum = mixed(Curriculum, samples, wanted, "0", None, True)
    count = Counter()
    for step in range(1, 101):
        count.update(id.split("-")[0] for id in curriculum.draw(10))
        for domain, share in wanted.items():
            assert abs(count[domain] - share * 10 * step) <= (11 if domain == "large" else 1)
    assert abs(count["large"] - 800) <= 1


@pytest.mark.method
def test_each_domain_has_tiers():
    """Of each domain, questions that are half right are drawn more often than mastered ones."""
    grades = {id: ((4, 8)[i % 2], 8) for i, id in enumerate(DOMAIN)}
    curriculum = mixed(Curriculum, SAMPLES, THREE, "0", grades, True)
    drawn = Counter(id for _ in range(100) for id in curriculum.draw(20))
    for domain in THREE:
        ids = [id for id in DOMAIN if DOMAIN[id] == domain]
        half = sum(drawn[id] for id in ids if grades[id][0] == 4)
        assert half > 2.5 * sum(drawn[id] for id in ids if grades[id][0] == 8)
    assert {curriculum.tier(id) for id in DOMAIN} == {2, 4}


@pytest.mark.method
def test_a_restored_mixture_goes_on_as_if_never_stopped():
    """In the middle of an epoch of each domain, with one question dropped, through JSON."""
    a = mixed(Curriculum, SAMPLES, THREE, "0", GRADES, True)
    steps(a, random.Random(0), 30)
    a.drop("q3", "too long")
    b = mixed(Curriculum, SAMPLES, THREE, "0", GRADES, True)
    b.load_state_dict(json.loads(json.dumps(a.state_dict())))
    assert b.state_dict() == a.state_dict() and dict(b.dropped) == {"q3": "too long"}
    assert [a.rate(id) for id in DOMAIN] == [b.rate(id) for id in DOMAIN]
    assert a.peek(13) == b.peek(13)
    assert steps(a, random.Random(1), 50) == steps(b, random.Random(1), 50)
    assert a.state_dict() == b.state_dict()


@pytest.mark.method
def test_a_peek_is_the_next_draw():
    a = mixed(Curriculum, SAMPLES, THREE, "0", GRADES, True)
    for n in (1, 7, 30, 90, 3):
        assert a.peek(n) == a.peek(n) == a.draw(n)


@pytest.mark.method
def test_where_a_domain_is_gone_the_others_keep_their_proportions():
    curriculum = mixed(Curriculum, SAMPLES, THREE, "0", None, True)
    curriculum.draw(50)
    for id in DOMAIN:
        if DOMAIN[id] == "open":
            curriculum.drop(id, "?")
    count = Counter(DOMAIN[id] for id in curriculum.draw(1000))
    assert count["open"] == 0 and count["count"] / count["ocr"] == pytest.approx(2 / 0.7, rel=0.02)
    for id in set(DOMAIN) - set(curriculum.dropped):
        curriculum.drop(id, "?")
    assert curriculum.peek(3) == [] and len(curriculum.dropped) == len(curriculum.ids)
    with pytest.raises(ValueError, match="no sample is left"):
        curriculum.draw(1)


@pytest.mark.method
def test_what_one_domain_learns_moves_the_others_half_as_far():
    """Of the two levels, the one of all questions."""
    curriculum = mixed(Curriculum, SAMPLES, THREE, "0", {id: (4, 8) for id in DOMAIN}, True)
    curriculum.update("q0", 8, 8)                          # estimated 0.5: each level +0.05
    odds = {id: curriculum.rate(id) / (1 - curriculum.rate(id)) for id in ("q5", "q1")}
    assert DOMAIN["q0"] == DOMAIN["q5"] == "count" and DOMAIN["q1"] == "open"
    assert odds["q5"] == pytest.approx(2.718281828 ** 0.1)
    assert odds["q1"] == pytest.approx(2.718281828 ** 0.05)


def test_a_run_draws_its_mixture_on_one_rank_and_two_and_after_a_restart(run, tmp_path):
    """One question in four is of the domain that a third of the draws come from. The log says what
    was drawn."""
    path = write(tmp_path / "q.jsonl", *[question(i, domain="open" if i % 4 else "choice")
                                         for i in range(12)])
    how = {**run.how, **SHORT, "model": run.model, "data": path, "mixture": "choice:1,open:2",
           "sft_steps": 0, "rl_steps": 4, "prompts_per_step": 6, "save_every": 1, "eval_every": 0}
    alone(**{**how, "out_dir": tmp_path / "whole"})
    alone(**{**how, "rl_steps": 2, "out_dir": tmp_path / "parts"})
    alone(**{**how, "out_dir": tmp_path / "parts"})
    two = ended(launched(*flags(**{**how, "sp": 1, "out_dir": tmp_path / "two"})))
    assert two.code == 0, two.err
    recorded = rollouts(tmp_path / "whole")
    assert recorded == rollouts(tmp_path / "parts")        # rl_steps was raised
    assert [row["tiers"] for row in recorded] == [
        row["tiers"] for row in rollouts(tmp_path / "two")]
    assert all(sum(row["tiers"]) == 12 for row in recorded)
    whole = state(tmp_path / "whole")["curriculum"]
    assert state(tmp_path / "parts")["curriculum"] == whole
    other = state(tmp_path / "two")["curriculum"]
    assert other["drawn"] == whole["drawn"]
    for domain in ("choice", "open"):
        assert other["parts"][domain]["queue"] == whole["parts"][domain]["queue"]
        assert other["parts"][domain]["recent"] == whole["parts"][domain]["recent"]
    rows = metrics(tmp_path / "whole", "rl")
    drawn = sum(round(6 * row["oversample"]) for row in rows)
    assert sum(whole["drawn"].values()) == drawn
    of_open = sum(row["drawn_open"] * 6 * row["oversample"] for row in rows)
    assert of_open == pytest.approx(whole["drawn"]["open"])
    assert abs(of_open - drawn * 2 / 3) <= 1
    assert all(row["drawn_open"] + row["drawn_choice"] == pytest.approx(1) for row in rows)
    refused({**how, "mixture": "open:1", "out_dir": tmp_path / "none"}, "--mixture=open:1",
            "choice, open")
    refused({**how, "mixture": "choice:2,open:1", "out_dir": tmp_path / "whole"},
            "another configuration", "mixture")
