"""
Tiered draws where each question comes back: RL on 128 questions of the built-in videos, graded
before, with uniform draws, with estimates that stand still ("still"), and with those of
curriculum.py ("follows"). Eight seeds, each with a cold start of its own.

    python experiments/few_questions.py out-few            make what is missing, print the table
    python experiments/few_questions.py out-few tables     print the table of the complete seeds

Two runs are made at a time, on one core each; a seed takes ten minutes of one core. A stopped one
is made again; its output is in out-few/NAME-SEED.log.
"""
import json
import os
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]
import intervals  # noqa: E402
from learners import Still  # noqa: E402
from visits import correlation as rank_correlation  # noqa: E402

import data  # noqa: E402
import train  # noqa: E402
from curriculum import Curriculum  # noqa: E402
from plumbing.ranks import run_command  # noqa: E402

SEEDS = range(8)
RULES = ("uniform", "still", "follows")
RL = ("--sft_steps=0 --rl_steps=20 --prompts_per_step=16 --eval_every=0 --show_every=0 "
      "--save_every=1000 --oversample_cap=1")


# --------------------------------------------------------------------------------------------------
# the runs

def record(rule, path, arguments):
    """train.py, with a line in path for each visit of a question: what was estimated as it was
    drawn, and what came back."""
    make = Curriculum if rule == "follows" else Still

    class Recording(make):
        step = 0

        def draw(self, n):
            drawn = super().draw(n)
            self.estimates = {id: self.rate(id) for id in drawn}
            self.step += 1
            return drawn

        def update(self, id, correct, total):
            visit = {"step": self.step, "id": id, "rate": self.estimates[id], "correct": correct,
                     "total": total}
            with open(path, "a") as f:
                f.write(json.dumps(visit) + "\n")
            super().update(id, correct, total)

    Path(path).write_text("")
    train.Curriculum = Recording
    run_command("train.py", lambda: train.main(train.parse(arguments)))


def call(out, name, seed, *command):
    """A command, once, with its output in a file."""
    done, log = out / f"{name}-{seed}.done", out / f"{name}-{seed}.log"
    if done.exists():
        return
    shutil.rmtree(out / f"{name}-{seed}", ignore_errors=True)
    one_core = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(log, "w") as f:
        where = f"--out_dir={out}/{name}-{seed}"
        subprocess.run([sys.executable, *command, f"--seed={seed}", where], cwd=ROOT, env=one_core,
                       stdout=f, stderr=f, check=True)
    done.touch()
    print(name, seed, "done", flush=True)


def make_seed(out, seed):
    few = f"--data={out}/few.jsonl --eval_data={out}/held.jsonl --model={out}/cold-{seed}/model"
    call(out, "cold", seed, "train.py", "--rl_steps=0", "--eval_samples=192", "--save_every=1000")
    call(out, "graded", seed, "train.py", "--mode=grade", *few.split())
    for rule in RULES:
        more = f"--grades={out}/graded-{seed}/grades.jsonl"
        if rule == "uniform":
            more += " --tiers=false"
        call(out, rule, seed, __file__, "record", rule, f"{out}/{rule}-{seed}.visits",
             *RL.split(), *few.split(), *more.split())


def make_all(out):
    out.mkdir(parents=True, exist_ok=True)
    training, held_out = data.split(data.load("toy"))
    for file, samples in (("few.jsonl", training[:128]), ("held.jsonl", held_out[:192])):
        with open(out / file, "w") as f:
            f.writelines(json.dumps(vars(sample)) + "\n" for sample in samples)
    with ThreadPoolExecutor(2) as pool:
        for job in [pool.submit(make_seed, out, seed) for seed in SEEDS]:
            job.result()


# --------------------------------------------------------------------------------------------------
# what is measured

def visits(out, rule, seed):
    with open(out / f"{rule}-{seed}.visits") as f:
        return [json.loads(line) for line in f]


def signal(rows):
    """Groups with signal, of 100."""
    return 100 * statistics.mean(0 < row["correct"] < row["total"] for row in rows)


def correlation(rates, rows):
    """Rank correlation of the estimates with what came back on the same visit."""
    observed = [row["correct"] / row["total"] for row in rows]
    return rank_correlation(rates, observed)


def replayed(out, make, rows, seed):
    """What a rule would have estimated at each visit of another run."""
    samples = data.load(str(out / "few.jsonl"))
    grades = {}
    with open(out / f"graded-{seed}" / "grades.jsonl") as f:
        for row in map(json.loads, f):
            grades[row["id"]] = (row["correct"], row["total"])
    domains = {sample.id: sample.domain for sample in samples}
    curriculum = make(list(domains), seed, grades, domains=domains)
    rates, waiting, step = [], [], None
    for row in rows:
        if row["step"] != step:                            # all of a step are drawn, then noted
            for visit in waiting:
                curriculum.update(visit["id"], visit["correct"], visit["total"])
            waiting, step = [], row["step"]
        rates.append(curriculum.rate(row["id"]))
        waiting.append(row)
    return rates


def interval(differences):
    """Text: mean, and its 95% interval by Student's t."""
    mean = statistics.mean(differences)
    if len(differences) < 2:
        return f"{mean:+.2f}"
    low, high = intervals.interval(differences)
    return f"{mean:+.2f} ({low:+.2f} to {high:+.2f})"


def complete(out):
    return [seed for seed in SEEDS
            if all((out / f"{rule}-{seed}.done").exists() for rule in RULES)]


def tables(out):
    seeds = complete(out)
    print(f"{len(seeds)} seeds: {', '.join(map(str, seeds))}")
    if not seeds:
        return
    print("| rule | groups with signal, of 100 | estimated | observed | rank correlation |")
    print("|---|---|---|---|---|")
    share, rho = {}, {}
    for rule in RULES:
        runs = [visits(out, rule, seed) for seed in seeds]
        share[rule] = [signal(rows) for rows in runs]
        rho[rule] = [correlation([row["rate"] for row in rows], rows) for rows in runs]
        estimated = statistics.mean(row["rate"] for rows in runs for row in rows)
        observed = statistics.mean(row["correct"] / row["total"] for rows in runs for row in rows)
        print(f"| {rule} | {statistics.mean(share[rule]):.1f} | {estimated:.2f} | {observed:.2f} | "
              f"{statistics.mean(rho[rule]):.2f} |")
    print("\ndifference of pairs, mean (95% interval)")
    for a, b in (("follows", "still"), ("follows", "uniform"), ("still", "uniform")):
        print(f"signal, {a} - {b}:", interval([x - y for x, y in zip(share[a], share[b])]))
    print("rank correlation, follows - still:",
          interval([x - y for x, y in zip(rho["follows"], rho["still"])]))
    errors, rhos = {}, {}
    for make in (Still, Curriculum):
        errors[make], rhos[make] = [], []
        for seed in seeds:
            rows = visits(out, "uniform", seed)
            rates = replayed(out, make, rows, seed)
            errors[make].append(statistics.mean(
                abs(rate - row["correct"] / row["total"]) for rate, row in zip(rates, rows)))
            rhos[make].append(correlation(rates, rows))
    print("\nboth rules on the visits of the uniform runs: mean |estimated - observed| "
          f"{statistics.mean(errors[Still]):.3f} and {statistics.mean(errors[Curriculum]):.3f}; "
          f"rank correlation {statistics.mean(rhos[Still]):.2f} and "
          f"{statistics.mean(rhos[Curriculum]):.2f}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["record"]:
        record(*sys.argv[2:4], sys.argv[4:])
    elif len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__.strip())
    else:
        out = Path(sys.argv[1]).absolute()
        if "tables" not in sys.argv[2:]:
            make_all(out)
        tables(out)
