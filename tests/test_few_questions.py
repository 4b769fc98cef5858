"""python -m pytest tests/test_few_questions.py -q

The table of tiered draws where each question comes back: its runs, and how it is computed.
"""
import json
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from runs import ENV, SHORT, flags, metrics

import train
from curriculum import Curriculum
from flow import Ranks
from plumbing import command_line

ROOT = Path(__file__).parent.parent
few = SimpleNamespace(**runpy.run_path(str(ROOT / "experiments" / "few_questions.py")))


@pytest.mark.method
def test_its_runs_are_understood():
    c = train.parse(few.RL.split())
    command_line.check_training(c, Ranks())
    assert c.prompts_per_step * c.rl_steps > 2 * 128       # each question comes back
    assert len(few.SEEDS) == 8


@pytest.mark.method
def test_its_numbers_by_hand():
    rows = [{"correct": k, "total": 8} for k in (0, 3, 8, 8)]
    assert few.signal(rows) == 25
    assert few.correlation([0.1, 0.4, 0.8, 0.8], rows) == pytest.approx(1)
    assert few.correlation([0.8, 0.4, 0.1, 0.1], rows) == pytest.approx(-1)
    assert few.interval([1.0, 2.0, 3.0]) == "+2.00 (-0.48 to +4.48)"
    assert few.interval([-1.0]) == "-1.00"


@pytest.mark.parametrize("rule", ["follows", "uniform"])
def test_a_recorded_run_is_replayed(run, files, tmp_path, rule):
    """What the run itself estimated at each visit is what the replay of its visits says; and the
    visits are those that the log counts."""
    out = tmp_path / "out"
    path = out / f"{rule}-0.visits"
    for name in ("", "graded-0"):
        (out / name).mkdir(parents=True)
    lines = Path(files.data).read_text().splitlines()[:12]
    (out / "few.jsonl").write_text("\n".join(lines) + "\n")
    grades = "".join(json.dumps({"id": f"q{i}", "correct": i % 9, "total": 8}) + "\n"
                     for i in range(12))
    (out / "graded-0" / "grades.jsonl").write_text(grades)
    how = {**run.how, **SHORT, "model": run.model, "data": out / "few.jsonl", "sft_steps": 0,
           "rl_steps": 5, "eval_every": 0, "out_dir": out / "run",
           "grades": out / "graded-0" / "grades.jsonl", "tiers": rule != "uniform"}
    command = [sys.executable, "experiments/few_questions.py", "record", rule, path, *flags(**how)]
    result = subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    rows = few.visits(out, rule, 0)
    make = Curriculum if rule == "follows" else few.Still
    assert few.replayed(out, make, rows, 0) == pytest.approx([row["rate"] for row in rows])
    steps = metrics(out / "run", "rl")
    for step, logged in enumerate(steps, 1):
        visits = [row for row in rows if row["step"] == step]
        assert len(visits) == round(4 * logged["oversample"])
        accuracy = sum(row["correct"] for row in visits) / sum(row["total"] for row in visits)
        assert accuracy == pytest.approx(logged["accuracy"])
    other = few.replayed(out, few.Still if rule == "follows" else Curriculum, rows, 0)
    assert other != pytest.approx([row["rate"] for row in rows])
