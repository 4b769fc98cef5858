"""
The claims table: which claims of the two papers are seen on the built-in videos, in small runs
with three seeds each.

    python experiments/claims.py out-claims                 make what is missing, print the tables
    python experiments/claims.py out-claims cold base kl    make only these runs
    python experiments/claims.py out-claims tables          make none, print the tables

Two runs are made at a time, on one core each. A stopped run resumes; a complete one is not made
again. Its command and output are in out-claims/NAME-SEED.log.
"""
import json
import os
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Callable

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data  # noqa: E402

SEEDS = (0, 1, 2)
FRAMES = (16, 32, 64, 128, 256)
DOMAINS = ("count", "open", "ocr", "grounding")
SINGLE = ("counting", "places", "reading", "boxes")        # runs on one domain each
OUT = Path()                                               # where the runs are: see the last lines


# --------------------------------------------------------------------------------------------------
# the runs

@dataclass
class Run:
    """arguments: train.py's; needs: runs that must be there before it, first the one whose
    checkpoint it starts from."""
    arguments: str
    needs: tuple = ()


RL = ("--sft_steps=0 --rl_steps=20 --prompts_per_step=16 --eval_every=5 --eval_samples=192 "
      "--show_every=0 --save_every=5")
# 128 questions: each comes again, so that it can matter how hard it was.
FEW = "--data={out}/few.jsonl --eval_data={out}/held.jsonl"
GRADES = "--grades={out}/graded-{seed}/grades.jsonl"
# A thought that reads letters is longer, and so is an answer that is a box.
FIVE = "--think_budget=112 --answer_budget=24 --data=toy:"
MIXED = f"{FIVE}plot,temporal,spatial,reading,grounding"
LONG = "--data=toy:long --frames=128"
COLD, LONG_COLD, FIVE_COLD = ("cold",), ("cold-long",), ("cold-five",)

RUNS = {
    "cold": Run("--rl_steps=0"),
    "half": Run("--rl_steps=0 --sft_steps=190"),
    "blank": Run("--rl_steps=0 --sft_steps=0"),
    "base": Run(RL, COLD),
    "higher": Run(f"{RL} --updates_per_rollout=8", COLD),
    "symmetric": Run(f"{RL} --updates_per_rollout=8 --clip_high=0.2", COLD),
    "kl": Run(f"{RL} --kl=0.04", COLD),                    # of a copy of the code with kl.diff
    "tight": Run(f"{RL} --think_budget=60", COLD),
    "unforced": Run(f"{RL} --think_budget=60 --force_answer=false", COLD),
    "graded": Run(f"--mode=grade {FEW}", COLD),
    "tiered": Run(f"{RL} --oversample_cap=1 {FEW} {GRADES}", ("cold", "graded")),
    "uniform": Run(f"{RL} --oversample_cap=1 {FEW} --tiers=false", COLD),
    "plain": Run(f"{RL} --oversample_cap=1", COLD),
    "token": Run(f"{RL} --loss_average=token", COLD),
    "rounded": Run(f"{RL} --dtype=bfloat16", COLD),
    "short": Run(RL, ("half",)),
    "none": Run(RL, ("blank",)),
    "hacked": Run(f"{RL} --verifiers=count=experiments/hackable.py:judge", COLD),
    "cold-long": Run(f"--rl_steps=0 {LONG}"),
    "thinks": Run(f"{RL} {LONG}", LONG_COLD),
    "cold-once": Run(f"--rl_steps=0 --sft_steps=190 {LONG} --think_budget=0", LONG_COLD),
    "once": Run(f"{RL} {LONG} --think_budget=0", ("cold-once",)),
    "cold-five": Run(f"--rl_steps=0 {MIXED}"),
    "five": Run(f"{RL} --prompts_per_step=20 {MIXED}", FIVE_COLD),
    # As many questions of its domain as the mix has (GLM-4.1V's comparison).
    "counting": Run(f"{RL} --prompts_per_step=4 {FIVE}plot", FIVE_COLD),
    "places": Run(f"{RL} --prompts_per_step=8 {FIVE}temporal,spatial", FIVE_COLD),
    "reading": Run(f"{RL} --prompts_per_step=4 {FIVE}reading", FIVE_COLD),
    "boxes": Run(f"{RL} --prompts_per_step=4 {FIVE}grounding", FIVE_COLD),
}
ALL_FRAMES = "--eval_frames=" + ",".join(map(str, FRAMES))
# Evaluations of a run's checkpoint afterwards: train.py's arguments.
EVALUATIONS = {
    "hacked": "", "base": "",
    "tight": "--eval_budgets=60", "unforced": "--eval_budgets=60",     # both with forced answers
    "thinks": f"{LONG} {ALL_FRAMES}",
    "once": f"{LONG} --think_budget=0 {ALL_FRAMES}",
    **dict.fromkeys(("cold-five", "five", *SINGLE), f"{MIXED} --eval_samples=512"),
}


def where(name, seed, ending=""):
    """A run's directory; with an ending a file beside it."""
    return OUT / f"{name}-{seed}{ending}"


def call_train(seed, log, arguments, code=ROOT):
    """train.py of a copy of the code; its command and output are added to log."""
    arguments = arguments.format(out=OUT, seed=seed).split()
    command = [sys.executable, "train.py", f"--seed={seed}", *arguments]
    one_core = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(log, "a") as f:
        print("python", *command[1:], file=f, flush=True)
        subprocess.run(command, cwd=code, env=one_core, stdout=f, stderr=f, check=True)


def copy_code_with_kl(folder):
    """The code, with kl.diff applied, in a folder."""
    folder.mkdir(exist_ok=True)
    for file in ROOT.glob("*.py"):
        shutil.copy(file, folder)
    shutil.copytree(ROOT / "plumbing", folder / "plumbing", dirs_exist_ok=True)
    # In a folder that belongs to a repository git would look for the files in that one.
    no_repository = {**os.environ, "GIT_DIR": str(folder / "none")}
    subprocess.run(["git", "apply", str(ROOT / "experiments" / "kl.diff")], cwd=folder, check=True,
                   env=no_repository)


def train_run(name, seed):
    """Make a run, if it is not complete; then its evaluation, if it has one."""
    run, done = RUNS[name], where(name, seed, ".done")
    if not done.exists():
        code = ROOT
        if name == "kl":
            code = where("kl-code", seed)
            copy_code_with_kl(code)
        arguments = run.arguments
        if run.needs:
            arguments += f" --model={where(run.needs[0], seed)}/model"
        arguments += f" --out_dir={where(name, seed)}"
        call_train(seed, where(name, seed, ".log"), arguments, code)
        done.touch()
    result = where(name, seed, ".json")
    if name in EVALUATIONS and not result.exists():
        log = where(name, seed, ".eval")
        call_train(seed, log, f"--mode=eval {EVALUATIONS[name]} --model={where(name, seed)}/model "
                              f"--out_dir={where(name, seed)}")
        lines = log.read_text().splitlines()
        result.write_text([line for line in lines if line.startswith("{")][-1] + "\n")


def make(name, seed, locks):
    """A run and what it needs. locks: one for each run, since two runs may need the same."""
    for needed in RUNS[name].needs:
        make(needed, seed, locks)
    with locks[name, seed]:
        train_run(name, seed)


def make_all(names):
    """Runs of all seeds, two at a time. One that fails is named; the others go on."""
    OUT.mkdir(parents=True, exist_ok=True)
    train, held_out = data.split(data.load("toy"))
    for file, samples in (("few.jsonl", train[:128]), ("held.jsonl", held_out[:192])):
        with open(OUT / file, "w") as f:
            f.writelines(json.dumps(vars(sample)) + "\n" for sample in samples)
    locks = {(name, seed): Lock() for name in RUNS for seed in SEEDS}

    def make_and_tell(name, seed):
        try:
            make(name, seed, locks)
        except subprocess.CalledProcessError:
            print(f"{name} {seed} failed: see its .log", flush=True)
        else:
            print(f"{name} {seed} done", flush=True)

    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(make_and_tell, name, seed) for seed in SEEDS for name in names]
    for job in jobs:
        job.result()                                       # raises what was no failed run


# --------------------------------------------------------------------------------------------------
# what is measured: each function gives a number for one seed of a run

def log_rows(name, seed):
    """A complete run's metrics. Raises FileNotFoundError where it is not complete."""
    where(name, seed, ".done").read_text()
    with open(where(name, seed) / "metrics.jsonl") as f:
        return [json.loads(line) for line in f]


def evaluation(name, seed):
    return json.loads(where(name, seed, ".json").read_text())


def rl_rows(name, seed):
    return [row for row in log_rows(name, seed) if row["stage"] == "rl"]


def accuracy(name, seed):
    """Held out, greedy, at the end."""
    rows = [row for row in log_rows(name, seed) if "eval_accuracy" in row]
    return 100 * rows[-1]["eval_accuracy"]


def entropy(name, seed):
    """Of the sampled tokens, mean of the last five steps."""
    return statistics.mean(row["entropy"] for row in rl_rows(name, seed)[-5:])


def signal(name, seed):
    """Groups with signal, of 100 sampled."""
    rows = rl_rows(name, seed)
    with_signal = sum(row["oversample"] * (1 - row["invalid_rate"]) for row in rows)
    return 100 * with_signal / sum(row["oversample"] for row in rows)


def accuracy_at_equal_cost(name, seed, most=16 * 8 * 20):
    """Held-out accuracy after `most` sampled completions: as many as 20 steps without oversampling
    sample."""
    sampled, costs, accuracies = 0, [], []
    for row in rl_rows(name, seed):
        sampled += round(16 * row["oversample"]) * 8
        if "eval_accuracy" in row:
            costs.append(sampled)
            accuracies.append(row["eval_accuracy"])
    return 100 * float(np.interp(most, costs, accuracies))


def clipped(name, seed):
    """Of 10,000 tokens, how many the upper bound clipped."""
    return 1e4 * statistics.mean(row["clip_high"] for row in rl_rows(name, seed))


def groups_kept(name, seed):
    """Groups trained on in a step, of 16 wanted, from the fifth step on."""
    return statistics.mean(row["valid_groups"] for row in rl_rows(name, seed)[4:])


def unevenness(name, seed):
    """Their standard deviation over steps, in percent of their mean."""
    deviation = statistics.stdev(row["valid_groups"] for row in rl_rows(name, seed)[4:])
    return 100 * deviation / groups_kept(name, seed)


def norm_changes(name, seed):
    """How much the gradient's norm changes from one step to the next, in percent of its mean."""
    norms = [row["grad_norm"] for row in rl_rows(name, seed) if row["grad_norm"]]
    change = statistics.mean(abs(y - x) for x, y in zip(norms, norms[1:]))
    return 100 * change / statistics.mean(norms)


def domain_accuracy(domain, name, seed):
    """Held-out accuracy in one domain, by the built-in verifiers."""
    return 100 * evaluation(name, seed)["domains"][domain]


def verifier_gap(name, seed):
    """Accuracy in count of the last steps' samples by the run's own verifier, minus that of greedy
    answers by the built-in one."""
    by_own = statistics.mean(row["accuracy_count"] for row in rl_rows(name, seed)[-3:])
    return 100 * by_own - domain_accuracy("count", name, seed)


def commonest_answer(name, seed):
    """Of the samples in count, the part that gives the commonest answer, in the last three
    steps."""
    return 100 * statistics.mean(row["same_answer_count"] for row in rl_rows(name, seed)[-3:])


def forced_accuracy(name, seed):
    """Held-out accuracy with 60 tokens to think, then a forced answer."""
    return 100 * evaluation(name, seed)["rows"][0]["accuracy"]


def accuracy_at(frames, name, seed):
    """Held-out accuracy at a number of frames."""
    rows = evaluation(name, seed)["rows"]
    return 100 * next(row["accuracy"] for row in rows if row["frames"] == frames)


def gain_from_frames(name, seed):
    """In accuracy, from 16 frames to 256."""
    return accuracy_at(256, name, seed) - accuracy_at(16, name, seed)


def domain_lift(domain, name, seed):
    """What RL adds to the held-out accuracy of the cold start in one domain."""
    return domain_accuracy(domain, name, seed) - domain_accuracy(domain, "cold-five", seed)


def lift(name, seed):
    """`domain_lift`, mean of the four domains; of several runs their mean."""
    if isinstance(name, tuple):
        return statistics.mean(lift(one, seed) for one in name)
    return statistics.mean(domain_lift(domain, name, seed) for domain in DOMAINS)


# --------------------------------------------------------------------------------------------------
# the claims

@dataclass
class Claim:
    """Of two runs a and b it is claimed that a's measure is larger (">"), smaller ("<") or no
    different ("=")."""
    text: str
    unit: str
    measure: Callable
    a: str
    sign: str
    b: str                 # or a tuple of runs


CLAIMS = [
    Claim("clip-higher clips less", "of 10,000 tokens", clipped, "higher", "<", "symmetric"),
    Claim("... keeps entropy up", "entropy", entropy, "higher", ">", "symmetric"),
    Claim("... and ends better", "accuracy", accuracy, "higher", ">", "symmetric"),
    Claim("no KL term ends better than one (0.04)", "accuracy", accuracy, "base", ">", "kl"),
    Claim("forced answering rescues thoughts that are cut, in training and at test", "accuracy",
          accuracy, "tight", ">", "unforced"),
    Claim("... only in training: both tested with it", "accuracy", forced_accuracy,
          "tight", ">", "unforced"),
    Claim("RLCS: more groups have signal with tiered draws than with uniform ones",
          "of 100 groups", signal, "tiered", ">", "uniform"),
    Claim("... and it ends better, at equal completions sampled", "accuracy", accuracy,
          "tiered", ">", "uniform"),
    Claim("ratio-EMA oversampling fills the batch", "groups kept of 16", groups_kept,
          "base", ">", "plain"),
    Claim("... keeps it steady", "deviation, % of mean", unevenness, "base", "<", "plain"),
    Claim("... ends better, at equal steps", "accuracy", accuracy, "base", ">", "plain"),
    Claim("... ends better, at equal completions sampled", "accuracy", accuracy_at_equal_cost,
          "base", ">", "plain"),
    Claim("per-sample and per-token loss end at the same accuracy", "accuracy", accuracy,
          "base", "=", "token"),
    Claim("... per-sample is steadier", "gradient norm, change per step, %", norm_changes,
          "base", "<", "token"),
    Claim("twice the cold start is better before RL", "accuracy", accuracy, "cold", ">", "half"),
    Claim("... and equal after it", "accuracy", accuracy, "base", "=", "short"),
    Claim("RL in bfloat16 ends as in float32", "accuracy", accuracy, "rounded", "=", "base"),
    Claim("RL needs the cold start", "accuracy", accuracy, "base", ">", "none"),
    Claim("reasoning beats answering at once, 256 frames", "accuracy", partial(accuracy_at, 256),
          "thinks", ">", "once"),
    Claim("... and gains more from more frames, 16 to 256", "points", gain_from_frames,
          "thinks", ">", "once"),
    Claim("a verifier that can be fooled: its reward exceeds the true accuracy", "points",
          verifier_gap, "hacked", ">", "base"),
    Claim("... the other domains suffer", "accuracy in open",
          partial(domain_accuracy, "open"), "hacked", "<", "base"),
    Claim("... and the most common answer reveals it", "% of answers", commonest_answer,
          "hacked", ">", "base"),
    Claim("all domains mixed improve more than a single one", "points", lift, "five", ">", SINGLE),
]


# What is measured in points, and how many of them three seeds do not resolve: with eight seeds the
# difference between tiered and uniform draws was +0.1, where three had given -2.3.
IN_POINTS = ("accuracy", "points", "accuracy in open", "% of answers")
RESOLVED = 3.0


def verdict(a, sign, b, least=0.0):
    """What two runs say of a claim. a, b: their numbers, one a seed.

    The two runs of a seed are a pair: they have one cold start and are judged on the same
    questions. "seen" or "opposite": every pair agrees, and the mean of their differences is larger
    than its standard deviation and than `least`. For "=": "seen" where that mean is within 3.
    """
    differences = [x - y for x, y in zip(a, b)]
    size = abs(statistics.mean(differences))
    if sign == "=":
        return "seen" if size <= 3 else "not seen"
    signs = {(x > 0) - (x < 0) for x in differences}
    if len(signs) > 1 or size <= max(least, statistics.stdev(differences)):
        return "not seen"
    return "seen" if signs == {1 if sign == ">" else -1} else "opposite"


# --------------------------------------------------------------------------------------------------
# the tables

def by_seed(measure, name):
    return [measure(name, seed) for seed in SEEDS]


def spread(numbers):
    """Text: mean ± standard deviation."""
    digits = 3 if 0 < max(map(abs, numbers)) < 0.1 else 1
    return f"{statistics.mean(numbers):,.{digits}f} ± {statistics.stdev(numbers):.{digits}f}"


def flags(name):
    """Text: the arguments by which a run, or its cold start, differs from others."""
    if isinstance(name, tuple):
        return ""
    run = RUNS[name]
    arguments = run.arguments.replace(RL, "").replace("{out}/", "").replace("{seed}", "S")
    if run.needs:
        arguments = f"{RUNS[run.needs[0]].arguments} {arguments}"
    different = dict.fromkeys(x for x in arguments.split() if x != "--rl_steps=0")
    return f" `{' '.join(different)}`" if different else ""


def print_row(*cells):
    print("| " + " | ".join(cells) + " |")


def print_header(*cells):
    print_row(*cells)
    print("|" + "---|" * len(cells))


def claims_table():
    print_header("claim", "measured", "with", "without", "difference", "verdict")
    for claim in CLAIMS:
        try:
            a, b = by_seed(claim.measure, claim.a), by_seed(claim.measure, claim.b)
        except FileNotFoundError as e:
            print(f"| {claim.text} | {claim.unit} | | | | not run: {missing(e)} |")
            continue
        differences = [x - y for x, y in zip(a, b)]
        least = 1.0 if claim.unit == "accuracy" else 0.0   # a point: two of 192 answers
        found = verdict(a, claim.sign, b, least)
        if claim.unit in IN_POINTS and abs(statistics.mean(differences)) <= RESOLVED:
            found = "not resolved"
        print_row(claim.text, claim.unit, spread(a) + flags(claim.a), spread(b) + flags(claim.b),
                  spread(differences), found)


def frames_table():
    """Reasoning, and answering at once, over numbers of frames."""
    print_header("frames", *map(str, FRAMES))
    for name in ("once", "thinks"):
        cells = [spread(by_seed(partial(accuracy_at, frames), name)) for frames in FRAMES]
        print_row(f"`{name}`", *cells)


def domains_table():
    """The cold start's accuracy by domain, and how RL on one domain or on all changes it."""
    print_header("trained on", *DOMAINS, "mean")
    cold = [spread(by_seed(partial(domain_accuracy, domain), "cold-five")) for domain in DOMAINS]
    print_row("`cold-five`", *cold, "")
    for name in (*SINGLE, "five"):
        cells = [spread(by_seed(partial(domain_lift, domain), name)) for domain in DOMAINS]
        print_row(f"`{name}`", *cells, spread(by_seed(lift, name)))


def missing(error):
    return f"no {os.path.relpath(error.filename, OUT)}"


def tables():
    claims_table()
    try:
        print()
        frames_table()
        print()
        domains_table()
    except FileNotFoundError as e:
        print(f"not run: {missing(e)}")


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__.strip())
    OUT = Path(sys.argv[1]).absolute()
    names = sys.argv[2:] or list(RUNS)
    unknown = set(names) - {*RUNS, "tables"}
    if unknown:
        sys.exit(f"no run is called {', '.join(unknown)}; there are: {', '.join(RUNS)}")
    make_all([name for name in names if name != "tables"])
    tables()
