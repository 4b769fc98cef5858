"""python -m pytest tests/test_few_questions.py -q

The table of tiered draws where each question comes back: its runs, and how it is computed.
(tests/test_evidence.py tests the record of visits.)
"""
import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

import train
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
def test_an_interval_by_hand():
    assert few.interval([1.0, 2.0, 3.0]) == "+2.00 (-0.48 to +4.48)"
    assert few.interval([-1.0]) == "-1.00"


@pytest.mark.method
def test_the_table_by_hand(tmp_path, capsys):
    """Four visits in each run; the third seed is not complete, and does not count."""
    still, follows = (0.1, 0.4, 0.8, 0.8), (0.8, 0.4, 0.1, 0.1)
    correct = {"uniform": ((0, 3, 8, 8), (0, 3, 8, 8)), "still": ((0, 3, 8, 8), (0, 3, 7, 7)),
               "follows": ((1, 3, 7, 7), (1, 3, 7, 7))}
    for draws, seeds in correct.items():
        for seed, counts in enumerate(seeds):
            folder = tmp_path / f"{draws}-{seed}"
            folder.mkdir()
            (tmp_path / f"{draws}-{seed}.done").touch()
            rows = [{"correct": k, "total": 8, "still": a, "follows": b}
                    for k, a, b in zip(counts, still, follows)]
            (folder / "visits.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "uniform-2.done").touch()
    few.tables(tmp_path)
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "2 seeds: 0, 1"
    assert said[3] == "| uniform | 25.0 | 0.53 | 0.59 | 1.00 |"
    assert said[4] == "| still | 50.0 | 0.53 | 0.56 | 1.00 |"      # 1 and 3 groups of 4
    assert said[5] == "| follows | 100.0 | 0.35 | 0.56 | -1.00 |"
    assert "signal, follows - uniform: +75.00 (+75.00 to +75.00)" in said
    assert "rank correlation, follows - still: -2.00 (-2.00 to -2.00)" in said
    # |0.1 - 0|, |0.4 - 3/8|, |0.8 - 1| twice; |0.8 - 0|, |0.4 - 3/8|, |0.1 - 1| twice
    assert said[-1].endswith("0.131 and 0.656; rank correlation 1.00 and -1.00")
