"""
Tiered draws where each question comes back: RL on 128 questions of the built-in videos, graded
before, with uniform draws, with estimates that stand still ("still"), and with those of
curriculum.py ("follows"). Eight seeds, each with a cold start of its own.

    python experiments/few_questions.py out-few            make what is missing, print the table
    python experiments/few_questions.py out-few tables     print the table of the complete seeds

Two runs are made at a time, on one core each; a seed takes ten minutes of one core. A stopped one
is made again; its output is in out-few/NAME-SEED.log, and visits.py says what is recorded.
"""
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]
import intervals  # noqa: E402
import visits  # noqa: E402

import data  # noqa: E402

SEEDS = range(8)
DRAWS = ("uniform", "still", "follows")
RL = ("--sft_steps=0 --rl_steps=20 --prompts_per_step=16 --eval_every=0 --show_every=0 "
      "--save_every=1000 --oversample_cap=1")


# --------------------------------------------------------------------------------------------------
# the runs

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
    for draws in DRAWS:
        more = f"--grades={out}/graded-{seed}/grades.jsonl"
        if draws == "uniform":
            more += " --tiers=false"
        call(out, draws, seed, "experiments/visits.py", draws, *RL.split(), *few.split(),
             *more.split())


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

def interval(differences):
    """Text: mean, and its 95% interval by Student's t."""
    text = f"{mean(differences):+.2f}"
    if len(differences) > 1:
        low, high = intervals.interval(differences)
        text += f" ({low:+.2f} to {high:+.2f})"
    return text


def complete(out):
    return [seed for seed in SEEDS
            if all((out / f"{draws}-{seed}.done").exists() for draws in DRAWS)]


def tables(out):
    seeds = complete(out)
    print(f"{len(seeds)} seeds: {', '.join(map(str, seeds))}")
    if not seeds:
        return
    print("| draws | groups with signal, of 100 | estimated | observed | rank correlation |")
    print("|---|---|---|---|---|")
    signal, correlation = {}, {}
    for draws in DRAWS:
        runs = [visits.summary(out / f"{draws}-{seed}" / "visits.jsonl") for seed in seeds]
        rule = "still" if draws == "uniform" else draws
        signal[draws] = [100 * run["with_signal"] / run["groups"] for run in runs]
        correlation[draws] = [run[rule]["correlation"] for run in runs]
        print(f"| {draws} | {mean(signal[draws]):.1f} | "
              f"{mean(run[rule]['estimated'] for run in runs):.2f} | "
              f"{mean(run['observed'] for run in runs):.2f} | {mean(correlation[draws]):.2f} |")
        if draws == "uniform":
            errors = [mean(run[rule]["error"] for run in runs) for rule in visits.RULES]
            ranks = [mean(run[rule]["correlation"] for run in runs) for rule in visits.RULES]
    print("\ndifference of pairs, mean (95% interval)")
    for a, b in (("follows", "still"), ("follows", "uniform"), ("still", "uniform")):
        print(f"signal, {a} - {b}:", interval([x - y for x, y in zip(signal[a], signal[b])]))
    pairs = zip(correlation["follows"], correlation["still"])
    print("rank correlation, follows - still:", interval([x - y for x, y in pairs]))
    print(f"\n{' and '.join(visits.RULES)} on the visits of the uniform runs: mean |estimated - "
          f"observed| {errors[0]:.3f} and {errors[1]:.3f}; rank correlation {ranks[0]:.2f} and "
          f"{ranks[1]:.2f}")


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__.strip())
    out = Path(sys.argv[1]).absolute()
    if "tables" not in sys.argv[2:]:
        make_all(out)
    tables(out)
