"""python -m pytest tests/test_evidence.py -q

The evidence: its rule, its runs, the runner, what it measures and the tables; the KL term that was
deleted, kept as a patch.
"""
import json
import math
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "experiments"))
import evidence  # noqa: E402
import evidence_tables as tables  # noqa: E402
import intervals  # noqa: E402
import measures  # noqa: E402
import rows  # noqa: E402
import visits  # noqa: E402
from runs import SHORT, flags  # noqa: E402

import data  # noqa: E402
import grpo  # noqa: E402
import toy  # noqa: E402
import train  # noqa: E402
from curriculum import Curriculum  # noqa: E402
from flow import Ranks  # noqa: E402
from plumbing import command_line  # noqa: E402

# --------------------------------------------------------------------------------------------------
# the rule

@pytest.mark.method
def test_the_quantiles_are_those_of_students_t():
    """By the integral of its density: 97.5% lies below."""
    assert set(intervals.T) == set(range(1, intervals.MOST))
    for freedom, quantile in intervals.T.items():
        x = np.linspace(0, quantile, 100_001)
        logs = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)
        density = math.exp(logs) / math.sqrt(freedom * math.pi) * (
            1 + x ** 2 / freedom) ** (-(freedom + 1) / 2)
        assert 0.5 + np.trapezoid(density, x) == pytest.approx(0.975, abs=2e-5)


@pytest.mark.method
def test_an_interval_by_hand():
    """Mean 2, deviation 1, three pairs: 2 ± 4.303 / sqrt(3)."""
    low, high = intervals.interval([1.0, 2.0, 3.0])
    assert (low, high) == pytest.approx((-0.4843, 4.4843), abs=1e-4)
    assert intervals.interval([5.0]) == (-math.inf, math.inf)
    assert not intervals.is_narrow([1.0, 2.0, 3.0], 4.96)  # the full width counts
    assert intervals.is_narrow([1.0, 2.0, 3.0], 4.98)


@pytest.mark.method
@pytest.mark.parametrize("differences, sign, least, said", [
    ([3, 4, 3], ">", 2, "seen"), ([3, 4, 3], "<", 2, "opposite"),
    ([-3, -4, -3], "<", 2, "seen"), ([-3, -4, -3], ">", 2, "opposite"),
    ([1, 2, 3], ">", 2, "not resolved"), ([1, 2, 3], "<", 2, "not resolved"),
    ([1, 2], ">", 2, "too few seeds"), ([], "=", 2, "too few seeds"),
    ([0.1, 0.12, 0.11], ">", 2, "seen"),                   # small, but not zero
    ([0.1, 0.2, 0.1], "=", 2, "seen"), ([-0.1, 0.2, 0.1], "=", 2, "seen"),
    ([3, 3.1, 3], "=", 2, "opposite"), ([-3, -3.1, -3], "=", 2, "opposite"),
    ([1.9, 2.1, 2.0], "=", 2, "not resolved"), ([0, 4, -4], "=", 2, "not resolved"),
    ([0, 0, 0], ">", 2, "not resolved"), ([0, 0, 0], "=", 2, "seen")])
def test_a_verdict_is_the_intervals_alone(differences, sign, least, said):
    assert intervals.verdict(differences, sign, least) == said


@pytest.mark.method
def test_seeds_are_added_until_the_interval_is_narrow():
    assert not intervals.is_finished([1.0, 1.0], 2)        # three at least
    assert intervals.is_finished([1.0, 1.1, 0.9], 2)
    assert not intervals.is_finished([1.0, 2.0, 3.0], 2)
    assert not intervals.is_finished([10.0, 11.0, 12.0], 2)        # whatever the mean is
    assert intervals.is_finished([10.0 * i for i in range(12)], 2)         # twelve at most
    needed = intervals.seeds_needed([1.0, 2.0, 3.0], 2)    # 2 * t * 1 / sqrt(n) < 2: n = 7
    assert needed == 7
    # Counted one at a time, differences that spread much took for ever.
    assert intervals.seeds_needed([0.0, 1e9, -1e9], 2) == pytest.approx(3.84e18, rel=1e-3)
    for spread in (0.1, 1.5, 3.1, 4.0, 10.0):
        n = intervals.seeds_needed([0.0, spread, -spread], 2)
        widths = [2 * intervals.quantile(n - 1) * spread / math.sqrt(n) for n in (max(n - 1, 3), n)]
        assert widths[1] < 2 and (n == 3 or widths[0] >= 2)
    assert 2 * intervals.T[5] / math.sqrt(6) > 2 > 2 * intervals.T[6] / math.sqrt(7)
    # More degrees of freedom than rows can have, from a table of Student's t.
    for freedom, t in ((10, 2.228), (12, 2.179), (20, 2.086), (60, 2.000), (1000, 1.962)):
        assert intervals.quantile(freedom) == pytest.approx(t, abs=2e-3)


@pytest.mark.method
def test_to_stop_by_width_keeps_the_verdict_honest():
    """docs/evidence.md: the interval holds the true difference in at least 90% of rows, so a
    difference that does not exist is seen in at most one row in twenty. To stop as soon as zero is
    excluded would see one in more than six."""
    random = np.random.default_rng(0)
    worst, most_seen, most_by_sign = 1.0, 0.0, 0.0
    quantiles = np.array([intervals.T[n - 1] for n in range(3, 13)])
    for deviation in (0.1, 0.3, 0.5, 0.8, 1.0, 3.0):       # of pairs, in smallest differences
        pairs = random.normal(0, deviation, (20_000, 12))  # no difference at all
        means = np.stack([pairs[:, :n].mean(1) for n in range(3, 13)], 1)
        spreads = np.stack([pairs[:, :n].std(1, ddof=1) for n in range(3, 13)], 1)
        halves = quantiles * spreads / np.sqrt(np.arange(3, 13))
        narrow = 2 * halves < 1
        narrow[:, -1] = True
        at = narrow.argmax(1), np.arange(len(pairs))
        mean, half = means[at[1], at[0]], halves[at[1], at[0]]
        worst = min(worst, float((abs(mean) <= half).mean()))
        most_seen = max(most_seen, float((mean > half).mean()))
        most_by_sign = max(most_by_sign, float((abs(means) > halves).any(1).mean()))
    assert 0.9 < worst < 0.95
    assert most_seen < 0.05
    assert most_by_sign > 1 / 6


# --------------------------------------------------------------------------------------------------
# the runs

def test_every_run_is_a_command_that_train_understands():
    for name, run in rows.RUNS.items():
        words = evidence.command(name, 3)
        assert words[0] == ("experiments/visits.py" if run.rule else "train.py")
        assert run.rule == "" or words[1] in ("uniform", *visits.RULES)
        options = [word for word in words if word.startswith("--") and "--kl=" not in word]
        assert run.kl == any("--kl=" in word for word in words)
        c = train.parse(options)
        command_line.check_training(c, Ranks())
        toy.parse_parts(c.data)
        assert c.seed == 3 and c.out_dir == f"OUT/{name}-3"
        for other in evidence.needed(name):
            assert other in rows.RUNS
            assert f"OUT/{other}-3/" in " ".join(words)
        if name.startswith("cold"):
            assert c.rl_steps == 0 and c.eval_every == 0
        elif c.mode == "train":
            assert c.rl_steps == 20 and c.sft_steps == 0


def test_every_row_compares_runs_that_are_there():
    for row in rows.ROWS:
        assert set(rows.runs_of(row)) <= rows.RUNS.keys()
        assert row.sign in (">", "<", "=") and row.least > 0 and row.why
    used = set()
    for row in rows.ROWS:
        for name in rows.runs_of(row):
            used |= {name, *evidence.needed(name)}
            used.update(*[evidence.needed(other) for other in evidence.needed(name)])
    assert used == set(rows.RUNS)                          # none is made for nothing


def test_accuracy_is_compared_on_a_thousand_questions():
    held_out = sum(data.is_held_out(f"toy:{seed}", 0.05) for seed in range(toy.SAMPLES))
    assert held_out >= 1000
    for row in rows.ROWS:
        if row.unit.startswith(rows.POINTS):
            for name in rows.runs_of(row):
                c = train.parse([x for x in rows.RUNS[name].arguments.split() if "--kl=" not in x])
                assert c.eval_samples == 1000
                assert c.mode == "eval" or c.eval_every or f"{name}-true" in rows.runs_of(row)


def test_tiers_can_matter_in_the_rows_about_them():
    """The first table compared runs in which no question came twice: with tiers and without they
    were one run."""
    ids = [f"q{i}" for i in range(128)]
    c = train.parse(rows.RUNS["follows"].arguments.split())
    assert not train.parse(rows.RUNS["uniform"].arguments.split()).tiers
    draws = []
    for tiers in (True, False):
        curriculum = Curriculum(ids, 0, {id: (i % 9, 8) for i, id in enumerate(ids)}, tiers)
        draws.append([curriculum.draw(c.prompts_per_step) for _ in range(c.rl_steps)])
    assert draws[0] != draws[1]
    assert c.prompts_per_step * c.rl_steps > 2 * len(ids)


# --------------------------------------------------------------------------------------------------
# the KL term

@pytest.fixture(scope="module")
def code_with_kl(tmp_path_factory):
    """The directory of the code with kl.diff applied, as its row has it."""
    folder = tmp_path_factory.mktemp("kl")
    evidence.copy_code_with_kl(folder)
    return folder


def test_the_kl_term_is_the_k3_estimate_and_nothing_where_the_models_are_one(code_with_kl):
    """exp(d) - d - 1, d = reference - model: 0 and without gradient at equality, else positive, as
    finite differences say."""
    policy_loss = runpy.run_path(str(code_with_kl / "grpo.py"))["policy_loss"]
    torch.manual_seed(0)
    new, old, reference = [-torch.rand(3, 5, dtype=torch.double) for _ in range(3)]
    mask, advantages = torch.rand(3, 5) < 0.8, torch.randn(3, dtype=torch.double)
    settings = old, advantages, mask, 0.2, 0.28, "sample"

    def loss_of(logprobs, **how):
        return policy_loss(logprobs, *settings, **how)[0]

    assert torch.equal(loss_of(new), grpo.policy_loss(new, *settings)[0])
    same = new.clone().requires_grad_()
    kl_alone = loss_of(same, reference=new, kl=1.0) - loss_of(same)
    [gradient] = torch.autograd.grad(kl_alone, same)
    assert float(gradient.abs().max()) == 0
    assert policy_loss(new, *settings, reference=new, kl=1.0)[1]["kl"] == 0
    loss, metrics = policy_loss(new, *settings, reference=reference, kl=0.5)
    divergence = ((reference - new).exp() - (reference - new) - 1) * mask
    assert metrics["kl"] == pytest.approx(float(divergence.sum()))
    assert metrics["kl"] > 0
    per_sample = (divergence.sum(1) / mask.sum(1)).mean()
    assert float(loss - loss_of(new)) == pytest.approx(0.5 * float(per_sample))
    torch.autograd.gradcheck(lambda x: loss_of(x, reference=reference, kl=0.5) - loss_of(x),
                             (new.clone().requires_grad_(),))
    text = (code_with_kl / "train.py").read_text()
    assert "    kl: float = 0.04" in text
    assert "model.reference[0]" in text


def test_the_code_with_kl_runs_where_it_was_copied_to(code_with_kl):
    """It was copied without the folder that it imports."""
    check = "import train; assert train.parse(['--kl=0.5']).kl == 0.5; print(train.__file__)"
    result = subprocess.run([sys.executable, "-c", check], cwd=code_with_kl, check=True,
                            capture_output=True, text=True)
    assert Path(result.stdout.strip()).parent == code_with_kl


# --------------------------------------------------------------------------------------------------
# visits

@pytest.mark.method
@pytest.mark.parametrize("rule", visits.RULES)
def test_both_rules_are_told_what_a_run_finds(tmp_path, rule):
    """The rule that draws estimates what it would without a record; the other what it would if it
    were told the same."""
    ids = [f"q{i}" for i in range(12)]
    grades = {id: (i % 9, 8) for i, id in enumerate(ids)}
    domains = {id: "ab"[i % 2] for i, id in enumerate(ids)}
    how = ids, "0 rl", grades, True, domains
    recording = visits.recording(rule, tmp_path / "visits.jsonl")(*how)
    alone = {name: make(*how) for name, make in visits.RULES.items()}
    expected = []
    for step in range(1, 6):
        recording.peek(4)                                  # looks ahead, and changes nothing
        drawn = recording.draw(4)
        assert drawn == alone[rule].draw(4)
        for id in drawn:
            expected.append({"step": step, "id": id, "correct": 8, "total": 8,
                             **{name: one.rate(id) for name, one in alone.items()}})
        for id in drawn:
            for one in (recording, *alone.values()):
                one.update(id, 8, 8)
    lines = (tmp_path / "visits.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == expected
    assert any(row["still"] != row["follows"] for row in expected)


@pytest.mark.method
def test_a_summary_of_visits_by_hand(tmp_path):
    shown = [(0, 0.1, 0.8), (3, 0.4, 0.4), (8, 0.8, 0.1), (8, 0.8, 0.1)]
    with open(tmp_path / "visits.jsonl", "w") as f:
        for correct, still, follows in shown:
            row = {"correct": correct, "total": 8, "still": still, "follows": follows}
            f.write(json.dumps(row) + "\n")
    found = visits.summary(tmp_path / "visits.jsonl")
    assert (found["groups"], found["with_signal"]) == (4, 1)
    assert found["observed"] == pytest.approx(19 / 32)
    assert found["still"]["correlation"] == pytest.approx(1)
    assert found["follows"]["correlation"] == pytest.approx(-1)
    assert found["still"]["error"] == pytest.approx((0.1 + 0.025 + 0.2 + 0.2) / 4)
    assert found["follows"]["estimated"] == pytest.approx(0.35)
    assert visits.correlation([0.5, 0.5], [0.0, 1.0]) == 0


# --------------------------------------------------------------------------------------------------
# the runner

@pytest.fixture
def one_seed(monkeypatch):
    """A row has one seed."""
    for module in (intervals, rows):
        monkeypatch.setattr(module, "MOST", 1)
    monkeypatch.setattr(evidence, "FEWEST", 1)


def test_a_run_is_made_once_and_goes_on_where_it_was_stopped(
        run, files, tmp_path, monkeypatch, one_seed):
    """Two rows share a run, and an evaluation reads its checkpoint. Stopped, the runner leaves no
    process and no line; then it makes both, once; and with another folder, nothing."""
    lines = Path(files.data).read_text().splitlines()[:12]         # without those to be dropped
    (tmp_path / "q.jsonl").write_text("\n".join(lines) + "\n")
    how = {**run.how, **SHORT, "data": "OUT/../q.jsonl", "sft_steps": 0, "show_every": 0}
    budgets = {key: run.how[key] for key in ("frames", "think_budget", "answer_budget")}
    short_run = " ".join(flags(**how))
    evaluation = " ".join(flags(mode="eval", data=files.data, eval_data=files.eval_data,
                                group_size=2, **budgets))
    monkeypatch.setattr(rows, "RUNS", {
        "cold": rows.Run(""), "follows": rows.Run(short_run, "cold", rule="follows"),
        "after": rows.Run(evaluation, "follows")})
    row = rows.Row("a", "b", "points", measures.accuracy, "after", "=", "follows", 2.0, "why")
    other = rows.Row("a", "c", "of 100", measures.signal, "follows", ">", "follows", 2.0, "why")
    monkeypatch.setattr(rows, "ROWS", [row, other])
    out, results = tmp_path / "out", tmp_path / "evidence.jsonl"
    out.mkdir()
    (out / "cold-0").symlink_to(run.dir)
    (out / "cold-0.done").touch()
    for file in ("many.jsonl", "held.jsonl"):
        (out / file).touch()
    started, begin = [], evidence.begin

    def note(*arguments):
        started.append(begin(*arguments))
        return started[-1]

    def stopped(jobs):
        raise KeyboardInterrupt

    monkeypatch.setattr(evidence, "begin", note)
    with monkeypatch.context() as patch:
        patch.setattr(evidence, "wait", stopped)
        with pytest.raises(KeyboardInterrupt):
            evidence.make_all(out, 2, results)
    assert [job.process.returncode is None for job in started] == [False]
    assert not results.exists()

    assert evidence.make_all(out, 2, results) == []
    assert [job.name for job in started] == ["follows", "follows", "after"]
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert [line["run"] for line in lines] == ["follows", "after"]
    assert str(tmp_path) not in results.read_text()        # no machine's folders
    assert not (out / "follows-0").exists()                # nobody reads it any more
    assert (out / "cold-0").exists()
    first, second = lines
    assert first["command"].startswith("python experiments/visits.py follows --model=OUT/cold-0/")
    assert first["cpu_seconds"] > 0 and len(first["commit"].rstrip("+")) == 10
    groups = np.round(4 * np.array(first["steps"]["oversample"]))
    assert first["visits"]["groups"] == sum(groups)
    accuracy = sum(groups * first["steps"]["accuracy"]) / sum(groups)
    assert first["visits"]["observed"] == pytest.approx(accuracy, abs=1e-5)
    assert measures.signal({"follows": first}, "follows") == pytest.approx(
        100 * first["visits"]["with_signal"] / sum(groups), abs=1e-3)
    assert second["held_out"][-1] == {key: first["held_out"][-1][key]
                                      for key in ("accuracy", "domains")}

    (tmp_path / "elsewhere").mkdir()
    for file in ("many.jsonl", "held.jsonl"):
        (tmp_path / "elsewhere" / file).touch()
    assert evidence.make_all(tmp_path / "elsewhere", 2, results) == []
    assert len(started) == 3


def lines_of(*names, seeds=(0,)):
    """Results in which these runs have lines."""
    results = {}
    for seed in seeds:
        results[seed] = {name: line_of(name, seed) for name in names}
    return results


def line_of(name, seed):
    """A line with random numbers."""
    random = np.random.default_rng([seed, list(rows.RUNS).index(name)])
    steps = {key: list(random.uniform(0.1, 0.9, 20)) for key in measures.KEPT}
    domains = {domain: random.uniform(0.8, 0.9) for domain in measures.DOMAINS}
    held_out = []
    for step in (4, 8, 12, 16, 20):
        held_out.append({"step": step, "accuracy": 0.6 + step / 80, "domains": domains})
    held_out[-1]["accuracy"] = random.uniform(0.85, 0.95)
    by_rule = {rule: {"estimated": 0.5, "error": random.uniform(), "correlation": random.uniform()}
               for rule in visits.RULES}
    return {"run": name, "seed": seed, "commit": "abc", "command": evidence.shown(name, seed),
            "seconds": 60, "cpu_seconds": 50, "grades": [20, 70, 38], "held_out": held_out,
            "steps": steps,
            "frames": {str(n): random.uniform() for n in rows.FRAMES},
            "visits": {"groups": 320, "with_signal": 200, "observed": 0.5, **by_rule}}


def test_the_order_of_work(tmp_path):
    """First three seeds of each row, the most important row first; then a seed at a time of each
    row that is not finished."""
    first, *_, last = rows.ROWS
    wanted = evidence.order({})
    assert [(row.claim, seed) for row, seed in wanted[:3]] == [(first.claim, n) for n in range(3)]
    assert wanted[-1] == (last, 2) and len(wanted) == 3 * len(rows.ROWS)
    results = lines_of(*rows.RUNS, seeds=range(3))
    wanted = evidence.order(results)
    assert {seed for _, seed in wanted} == {3}
    for row in rows.ROWS:
        finished = intervals.is_finished(rows.differences(row, results), row.least)
        assert ((row, 3) in wanted) == (not finished)
    assert evidence.order(lines_of(*rows.RUNS, seeds=range(12))) == []
    del results[0]["follows"]                              # seeds count in order
    assert rows.complete_seeds(first, results) == 0


def test_a_verdict_says_how_large_the_difference_is():
    """A difference that is seen may be too small to be worth claiming."""
    row = rows.Row("a", "b", "points", measures.accuracy, "base", ">", "plain", 2.0, "why")
    for base, said in (((95.0, 95.1, 94.9), "seen: more than 2"),
                       ((91.0, 91.1, 90.9), "seen: less than 2"),
                       ((90.0, 90.1, 89.9), "not resolved: less than 2, if any"),
                       ((89.0, 89.1, 88.9), "opposite: less than 2"),
                       ((92.0, 92.1, 91.9), "seen")):
        results = {}
        for seed, accuracy in enumerate(base):
            results[seed] = {"base": {"held_out": [{"accuracy": accuracy / 100}], "cpu_seconds": 0},
                             "plain": {"held_out": [{"accuracy": 0.9}], "cpu_seconds": 0}}
        assert tables.judged(row, results) == said
    assert tables.signed(-0.04, 1) == "-0.04" and tables.signed(-1e-15, 1) == "+0.00"
    assert tables.signed(0.0003, 3) == "+0.0003" and tables.signed(-1.26, 1) == "-1.3"


def test_no_run_is_begun_once_the_hours_are_used(tmp_path, monkeypatch):
    """Then no verdict is called "so far", and rows that are too wide say what they would take."""
    results = lines_of(*rows.RUNS, seeds=range(4))
    used = 4 * len(rows.RUNS) * 50 / 3600
    for hours, open_still in ((used + 0.01, True), (used - 0.01, False)):
        monkeypatch.setattr(rows, "HOURS", hours)
        assert bool(evidence.order(results)) == open_still
        assert bool(evidence.next_run(results, tmp_path, set())) == open_still
        text = "\n".join(tables.claims_table(results))
        assert ("so far" in text) == open_still
        for row in rows.ROWS:
            found = rows.differences(row, results)
            if not intervals.is_narrow(found, row.least):
                assert f"| 4 of {intervals.seeds_needed(found, row.least)} |" in text


def test_a_run_waits_for_what_it_reads(tmp_path):
    def there(*names):
        for name in names:
            (tmp_path / f"{name}-0").mkdir()
            (tmp_path / f"{name}-0.done").touch()

    assert evidence.next_run({}, tmp_path, set()) == ("cold", 0)
    assert evidence.next_run({}, tmp_path, {("cold", 0)}) == ("cold", 1)
    there("cold")
    assert evidence.next_run({}, tmp_path, set()) == ("graded", 0)
    there("graded")
    assert evidence.next_run({}, tmp_path, set()) == ("follows", 0)
    assert evidence.next_run({}, tmp_path, {("follows", 0)}) == ("uniform", 0)
    elsewhere = tmp_path / "elsewhere"                     # its line is here, its checkpoint is not
    results = lines_of("cold", "graded", "follows", "before")
    assert evidence.next_run(results, elsewhere, set()) == ("cold", 0)
    assert evidence.next_run(lines_of(*rows.RUNS, seeds=range(12)), elsewhere, set()) is None


def test_a_line_of_other_flags_does_not_count(tmp_path):
    lines = [line_of("base", 0), line_of("base", 1) | {"command": "python train.py --seed=1"},
             line_of("base", 2) | {"run": "gone"}]
    path = tmp_path / "evidence.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert evidence.read_results(path) == {0: {"base": lines[0]}}
    assert evidence.not_used(path) == (
        f"{path}: of 3 lines, 2 are in no table: 1 of runs that rows.py does not have (gone-2), 1 "
        "of runs that have other flags now (base-1)")
    path.write_text(json.dumps(lines[0]) + "\n")
    assert evidence.not_used(path) == ""
    assert evidence.read_results(tmp_path / "none.jsonl") == {}


@pytest.mark.parametrize("name, change", [
    ("base", {"seed": None}), ("base", {"seed": "1"}), ("base", {"seed": True}),
    ("base", {"run": 1}), ("base", {"command": None}), ("base", {"commit": 1}),
    ("base", {"cpu_seconds": math.nan}),
    ("base", {"held_out": None}), ("base", {"held_out": []}), ("base", {"held_out": [3]}),
    ("base", {"held_out": [{"step": 20, "accuracy": 95.0, "domains": {}}]}),
    ("base", {"held_out": [{"step": 20, "accuracy": math.nan, "domains": {}}]}),
    ("base", {"held_out": [{"step": 20, "accuracy": "0.9", "domains": {}}]}),
    ("base", {"held_out": [{"step": 21, "accuracy": 0.9, "domains": {}}]}),
    ("base", {"held_out": [{"step": 20, "accuracy": 0.9, "domains": {"count": 2}}]}),
    ("base", {"held_out": [{"step": 20, "accuracy": 0.9}]}), ("before", {"held_out": []}),
    ("base", {"steps": None}), ("base", {"steps": {"accuracy": [0.5] * 20}}),
    ("base", {"steps": {key: [0.5] * 19 for key in measures.KEPT}}),
    ("base", {"steps": {key: [None] * 20 for key in measures.KEPT}}),
    ("graded", {"grades": [1, 2]}), ("graded", {"grades": [1, 2, "3"]}),
    ("thinks-frames", {"frames": {"16": 0.2, "64": 0.4}}), ("follows", {"visits": None}),
    ("follows", {"visits": {"groups": 0, "with_signal": 0, "observed": 0.5}})])
def test_a_line_of_other_content_is_named(tmp_path, name, change):
    """An accuracy of 95 instead of 0.95 made the tables count seeds for ever; all else was a
    traceback that named neither the file nor the line."""
    path = tmp_path / "evidence.jsonl"
    line = line_of(name, 1)
    good = json.dumps(line_of("base", 0)) + "\n"
    path.write_text(good + json.dumps(line) + "\n")
    assert evidence.read_results(path)[1] == {name: line}
    path.write_text(good + json.dumps(line | change) + "\n")
    with pytest.raises(evidence.DamagedLine, match="^.*evidence.jsonl, line 2: .*made again$"):
        evidence.read_results(path)


def test_a_damaged_file_is_one_line(tmp_path):
    """Empty lines, half a line, other text and a line that is there twice; a line without its end,
    behind which the next would be written."""
    path = tmp_path / "evidence.jsonl"
    good = (json.dumps(line_of("base", 0)) + "\n").encode()
    for more, says in ((b"\n", "no JSON"), (b"{}\n", "'run' must be text"), (b"[1]\n", "object"),
                       (b"\xff\xfe\n", "no JSON"), (good[:90] + b"\n", "no JSON"),
                       (good.replace(b"base", b"plain").rstrip(), "line break"),
                       (b"[" * 100_000 + b"\n", "no JSON"), (good, "the run of line 1 again")):
        path.write_bytes(good + more)
        with pytest.raises(evidence.DamagedLine, match=f"^{path}, line 2: .*{says}") as e:
            evidence.read_results(path)
        assert "\n" not in str(e.value)
    path.write_bytes(b"\xef\xbb\xbf" + good)              # a byte order mark is no damage
    assert list(evidence.read_results(path)) == [0]


def test_the_command_says_a_damaged_line_and_ends(tmp_path, monkeypatch):
    """Before it writes any page."""
    for folder in ("experiments", "plumbing"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    for file in ROOT.glob("*.py"):
        shutil.copy(file, tmp_path)
    path = tmp_path / "experiments" / "evidence.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines, "oops", ""]))
    result = subprocess.run([sys.executable, "experiments/evidence.py", "tables"], cwd=tmp_path,
                            capture_output=True, text=True)
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.startswith("evidence.py: ") and result.stderr.count("\n") == 1
    assert f"evidence.jsonl, line {len(lines) + 1}: no JSON" in result.stderr


# --------------------------------------------------------------------------------------------------
# measures and tables

@pytest.mark.method
def test_measures_by_hand():
    steps = {"oversample": [1.0, 1.5], "invalid_rate": [0.5, 0.0], "clip_high": [0.001, 0.003],
             "grad_norm": [1.0, 2.0, 0.0, 1.0], "valid_groups": [9, 9, 9, 9, 8, 12, 10],
             "entropy": [9, 1, 2, 3, 4, 5], "accuracy_count": [0, 0.5, 0.6, 0.7],
             "same_answer_count": [0, 0.1, 0.2, 0.3]}
    held_out = [{"step": 1, "accuracy": 0.7, "domains": {}},
                {"step": 2, "accuracy": 0.9, "domains": {"count": 0.4, "open": 0.5}}]
    of = {"a": {"steps": steps, "held_out": held_out},
          "before": {"held_out": [{"accuracy": 0.4}]},
          "hacked": {"steps": steps},
          "hacked-true": {"held_out": [{"domains": {"count": 0.3}}]}}
    assert measures.accuracy(of, "a") == 90
    assert measures.curve(of, "a") == ([128.0, 320.0], [0.7, 0.9])
    assert measures.completions_to_80(of, "a") == pytest.approx(224)
    assert measures.accuracy_at_equal_cost(of, "a") == pytest.approx(90)
    assert measures.signal(of, "a") == pytest.approx(100 * 2.0 / 2.5)
    assert measures.clipped(of, "a") == pytest.approx(20)
    assert measures.entropy(of, "a") == 3
    assert measures.groups_kept(of, "a") == 10
    assert measures.unevenness(of, "a") == pytest.approx(20)
    assert measures.norm_changes(of, "a") == pytest.approx(100 * 1.0 / (4 / 3))
    assert measures.verifier_gap(of, "a") == pytest.approx(20)
    assert measures.verifier_gap(of, "hacked") == pytest.approx(30)
    assert measures.commonest_answer(of, "a") == pytest.approx(20)
    held_out[-1]["accuracy"] = 0.75
    assert measures.completions_to_80(of, "a") == 320      # never
    of["before"]["held_out"][0]["accuracy"] = 0.85
    assert measures.completions_to_80(of, "a") == 0


def test_every_row_is_in_the_tables_and_the_picture(tmp_path):
    """With all its numbers, with two seeds, and without any."""
    for seeds in (range(4), range(2), ()):
        results = lines_of(*rows.RUNS, seeds=seeds)
        text = "\n".join(tables.claims_table(results))
        for row in rows.ROWS:
            assert f"| {row.claim} |" in text
        for table in tables.TABLES.values():
            assert len({line.count("|") for line in table(results)}) == 1
        assert text.count("not run") == (0 if seeds else len(rows.ROWS))
        assert text.count("too few seeds") == (len(rows.ROWS) if len(seeds) == 2 else 0)
    tables.draw(lines_of(*rows.RUNS, seeds=range(4)), tmp_path / "forest.png")
    assert (tmp_path / "forest.png").stat().st_size > 10_000


def test_the_pages_have_the_tables_that_the_lines_give():
    """docs/evidence.md and the README show no number that evidence.jsonl does not give."""
    pages = [(ROOT / page).read_text() for page in tables.PAGES]
    for name in tables.TABLES:
        assert "".join(pages).count(f"<!-- table: {name} -->\n") == 1
    results = evidence.read_results(evidence.RESULTS)
    for page in pages:
        assert tables.with_tables(page, results) == page
        other = tables.with_tables(page, lines_of(*rows.RUNS, seeds=range(3)))
        assert other != page
        assert tables.with_tables(other, results) == page
    assert sum(bool(row.short) for row in rows.ROWS) == 5
