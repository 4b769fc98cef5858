"""
train.py with a record of each visit of a question: what two rules estimated as it was drawn, and
what came back. The rules are "still", the estimates of curriculum.py as they were once, and
"follows", those it has now. The run draws by one of them; the other is told the same results.

    python experiments/visits.py RULE --out_dir=out-few --data=few.jsonl ...

RULE is still, follows, or uniform (with --tiers=false, draws do not depend on estimates). The
visits are in out-few/visits.jsonl.
"""
import json
import os
import statistics
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]
from learners import Still  # noqa: E402

import train  # noqa: E402
from curriculum import Curriculum  # noqa: E402
from plumbing.ranks import run_command  # noqa: E402

RULES = {"still": Still, "follows": Curriculum}


def recording(rule, path):
    """A curriculum that draws by a rule, and adds a line to path for each visit."""
    class Recording(RULES[rule]):
        def __init__(self, *how):
            super().__init__(*how)
            self.rules = {name: make(*how) for name, make in RULES.items()}
            self.step = 0

        def draw(self, n):
            drawn = super().draw(n)
            self.step += 1
            self.estimates = {}
            for id in drawn:
                self.estimates[id] = {name: one.rate(id) for name, one in self.rules.items()}
            return drawn

        def update(self, id, correct, total):
            visit = {"step": self.step, "id": id, **self.estimates[id], "correct": correct,
                     "total": total}
            with open(path, "a") as f:
                f.write(json.dumps(visit) + "\n")
            super().update(id, correct, total)
            for one in self.rules.values():
                one.update(id, correct, total)

    return Recording


def ranked(x):
    """Ranks, ties sharing their mean rank."""
    _, place, count = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place]


def correlation(x, y):
    """Rank correlation; 0 if one of the two is the same everywhere."""
    if len(set(x)) == 1 or len(set(y)) == 1:
        return 0.0
    return round(float(np.corrcoef(ranked(x), ranked(y))[0, 1]), 6)


def summary(path):
    """Of a run's visits. -> dict: groups with signal, their mean accuracy, and of each rule the
    mean estimate, its mean error and its rank correlation with what came back"""
    with open(path) as f:
        rows = [json.loads(line) for line in f]
    observed = [row["correct"] / row["total"] for row in rows]
    with_signal = sum(0 < row["correct"] < row["total"] for row in rows)
    result = {"groups": len(rows), "with_signal": with_signal,
              "observed": round(statistics.mean(observed), 6)}
    for rule in RULES:
        estimated = [row[rule] for row in rows]
        error = statistics.mean(abs(x - y) for x, y in zip(estimated, observed))
        result[rule] = {"estimated": round(statistics.mean(estimated), 6),
                        "error": round(error, 6), "correlation": correlation(estimated, observed)}
    return result


def main(rule, arguments):
    c = train.parse(arguments)
    os.makedirs(c.out_dir, exist_ok=True)
    path = os.path.join(c.out_dir, "visits.jsonl")
    Path(path).write_text("")
    train.Curriculum = recording("follows" if rule == "follows" else "still", path)
    train.main(c)


if __name__ == "__main__":
    if sys.argv[1:2] not in ([rule] for rule in ("uniform", *RULES)):
        sys.exit(__doc__.strip())
    run_command("visits.py", lambda: main(sys.argv[1], sys.argv[2:]))
