"""
The claims table: which of both papers' claims are seen on the built-in videos. Small runs, three seeds.

    python assets/claims.py out-claims               makes what is missing, two runs at a time, a core each; then prints the tables
    python assets/claims.py out-claims cold base kl  these runs alone
    python assets/claims.py out-claims tables        none: the tables of what is there

A row of RUNS is a run: what must be there before it, first the one whose checkpoint it starts from, and train.py's arguments.
A run that was stopped goes on, one that is whole is not made again; its command stands in OUT/NAME-SEED.log.
"""
import glob
import json
import os
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Lock

import numpy as np

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import data
SEEDS = (0, 1, 2)
RL = "--sft_steps=0 --rl_steps=20 --prompts_per_step=16 --eval_every=5 --eval_samples=192 --show_every=0 --save_every=5"
FEW = "--data={out}/few.jsonl --eval_data={out}/held.jsonl"     # 128 questions: each comes again, so that how hard it was can matter
FIVE = "--think_budget=112 --answer_budget=24 --data=toy:"      # a thought that reads letters is longer, and so is a box
MIXED = f"{FIVE}plot,temporal,spatial,reading,grounding"
LONG = "--data=toy:long --frames=128"

RUNS = {
    "cold": ("", "--rl_steps=0"),
    "half": ("", "--rl_steps=0 --sft_steps=190"),
    "blank": ("", "--rl_steps=0 --sft_steps=0"),
    "base": ("cold", RL),
    "higher": ("cold", f"{RL} --updates_per_rollout=8"),
    "symmetric": ("cold", f"{RL} --updates_per_rollout=8 --clip_high=0.2"),
    "kl": ("cold", f"{RL} --kl=0.04"),                     # of a copy of the code with assets/kl.diff applied
    "tight": ("cold", f"{RL} --think_budget=60"),
    "unforced": ("cold", f"{RL} --think_budget=60 --force_answer=false"),
    "graded": ("cold", f"--mode=grade {FEW}"),
    "tiered": ("cold graded", f"{RL} --oversample_cap=1 {FEW} --grades={{out}}/graded-{{seed}}/grades.jsonl"),
    "uniform": ("cold", f"{RL} --oversample_cap=1 {FEW} --tiers=false"),
    "plain": ("cold", f"{RL} --oversample_cap=1"),
    "token": ("cold", f"{RL} --loss_average=token"),
    "rounded": ("cold", f"{RL} --dtype=bfloat16"),
    "short": ("half", RL),
    "none": ("blank", RL),
    "hacked": ("cold", f"{RL} --verifiers=count=assets/hackable.py:judge"),
    "cold-long": ("", f"--rl_steps=0 {LONG}"),
    "thinks": ("cold-long", f"{RL} {LONG}"),
    "cold-once": ("cold-long", f"--rl_steps=0 --sft_steps=190 {LONG} --think_budget=0"),
    "once": ("cold-once", f"{RL} {LONG} --think_budget=0"),
    "cold-five": ("", f"--rl_steps=0 {MIXED}"),
    "five": ("cold-five", f"{RL} --prompts_per_step=20 {MIXED}"),
    "counting": ("cold-five", f"{RL} --prompts_per_step=4 {FIVE}plot"),        # as many of its domain as the mix has (GLM's comparison)
    "places": ("cold-five", f"{RL} --prompts_per_step=8 {FIVE}temporal,spatial"),
    "reading": ("cold-five", f"{RL} --prompts_per_step=4 {FIVE}reading"),
    "boxes": ("cold-five", f"{RL} --prompts_per_step=4 {FIVE}grounding"),
}
FRAMES = (16, 32, 64, 128, 256)
LOOKS = {                            # evaluations of a run's checkpoint afterwards
    "hacked": "", "base": "", "tight": "--eval_budgets=60", "unforced": "--eval_budgets=60",   # these two looked at alike, with force
    "thinks": f"{LONG} --eval_frames={','.join(map(str, FRAMES))}",
    "once": f"{LONG} --think_budget=0 --eval_frames={','.join(map(str, FRAMES))}",
    **{name: f"{MIXED} --eval_samples=512" for name in ("cold-five", "five", "counting", "places", "reading", "boxes")},
}


def main(out, names):
    os.makedirs(out, exist_ok=True)
    one_core = {**os.environ, "OMP_NUM_THREADS": "1"}
    train, held = data.split(data.load("toy"))
    for file, samples in (("few.jsonl", train[:128]), ("held.jsonl", held[:192])):
        with open(os.path.join(out, file), "w") as f:
            f.writelines(json.dumps(vars(s)) + "\n" for s in samples)

    def call(seed, log, arguments, code=ROOT):
        command = [sys.executable, "train.py", f"--seed={seed}", *arguments.format(out=out, seed=seed).split()]
        with open(log, "a") as f:
            print("python", *command[1:], file=f, flush=True)
            subprocess.run(command, cwd=code, env=one_core, stdout=f, stderr=f, check=True)

    def make(name, seed):
        before, arguments = RUNS[name]
        for other in before.split():
            make(other, seed)
        with locks[name, seed]:                            # who needs the same start waits for it
            run(name, seed, before.partition(" ")[0], arguments)

    def run(name, seed, start, arguments):
        where, code = os.path.join(out, f"{name}-{seed}"), ROOT
        if not os.path.exists(f"{where}.done"):
            if name == "kl":
                code = os.path.join(out, f"kl-code-{seed}")
                os.makedirs(code, exist_ok=True)
                for file in glob.glob(os.path.join(ROOT, "*.py")):
                    shutil.copy(file, code)
                subprocess.run(["git", "apply", os.path.join(ROOT, "assets", "kl.diff")], cwd=code, check=True,
                               env={**os.environ, "GIT_DIR": os.path.join(code, "none")})      # or, below a repository, it does nothing
            model = f" --model={out}/{start}-{seed}/model" if start else ""
            call(seed, f"{where}.log", f"{arguments}{model} --out_dir={where}", code)
            open(f"{where}.done", "w").close()
        if name in LOOKS and not os.path.exists(f"{where}.json"):
            call(seed, f"{where}.eval", f"--mode=eval {LOOKS[name]} --model={where}/model --out_dir={where}")
            with open(f"{where}.eval") as f:
                said = [line for line in f if line.startswith("{")][-1]
            with open(f"{where}.json", "w") as f:
                f.write(said)

    locks = {(name, seed): Lock() for name in RUNS for seed in SEEDS}
    with ThreadPoolExecutor(2) as pool:
        for seed in SEEDS:
            for name in names:
                pool.submit(make, name, seed).add_done_callback(
                    lambda job, what=f"{name} {seed}": print(what, "failed: see its .log" if job.exception() else "done", flush=True))


# ---------------------------------------------------------------------------------------------------------------------
# what the runs say: each function gives a number a seed

def rows(name, seed):
    open(f"{OUT}/{name}-{seed}.done").close()              # FileNotFoundError: not whole
    with open(f"{OUT}/{name}-{seed}/metrics.jsonl") as f:
        return [json.loads(line) for line in f]


def look(name, seed):
    with open(f"{OUT}/{name}-{seed}.json") as f:
        return json.load(f)


def rl(name, seed):
    return [r for r in rows(name, seed) if r["stage"] == "rl"]


def accuracy(name, seed):
    """Held out, greedy, at the end."""
    return 100 * [r["eval_accuracy"] for r in rows(name, seed) if "eval_accuracy" in r][-1]


def entropy(name, seed):
    """Of the sampled tokens, mean of the last five steps."""
    return statistics.mean(r["entropy"] for r in rl(name, seed)[-5:])


def signal(name, seed):
    """Groups with signal, of 100 sampled."""
    asked = [r["oversample"] for r in rl(name, seed)]
    return 100 * sum(n * (1 - r["invalid_rate"]) for n, r in zip(asked, rl(name, seed))) / sum(asked)


def at_equal_cost(name, seed, most=16 * 8 * 20):
    """Held-out accuracy when so many completions were sampled, all that 20 steps without oversampling sample."""
    sampled, seen = 0, []
    for r in rl(name, seed):
        sampled += round(16 * r["oversample"]) * 8
        seen += [(sampled, r["eval_accuracy"])] if "eval_accuracy" in r else []
    return 100 * float(np.interp(most, *zip(*seen)))


def clipped(name, seed):
    """Of 10,000 tokens, how many the upper bound clipped."""
    return 1e4 * statistics.mean(r["clip_high"] for r in rl(name, seed))


def kept(name, seed):
    """Groups trained on a step, of 16 wanted, from the fifth step on."""
    return statistics.mean(r["valid_groups"] for r in rl(name, seed)[4:])


def uneven(name, seed):
    """Their standard deviation over steps, in percent of their mean."""
    return 100 * statistics.stdev(r["valid_groups"] for r in rl(name, seed)[4:]) / kept(name, seed)


def jerks(name, seed):
    """From one step to the next, how much the gradient's norm changes, in percent of its mean."""
    norms = [r["grad_norm"] for r in rl(name, seed) if r["grad_norm"]]
    return 100 * statistics.mean(abs(y - x) for x, y in zip(norms, norms[1:])) / statistics.mean(norms)


def domain(which, name, seed):
    """Held-out accuracy in one domain, by the built-in verifiers."""
    return 100 * look(name, seed)["domains"][which]


def gap(name, seed):
    """Accuracy in count of the last steps' samples, by the run's own verifier, above what greedy answers have by the built-in one."""
    return 100 * statistics.mean(r["accuracy_count"] for r in rl(name, seed)[-3:]) - domain("count", name, seed)


def same(name, seed):
    """Of the samples in count, the part whose answer is the commonest one, in the last three steps."""
    return 100 * statistics.mean(r["same_answer_count"] for r in rl(name, seed)[-3:])


def forced(name, seed):
    """Held-out accuracy with 60 tokens to think, then an answer forced."""
    return 100 * look(name, seed)["rows"][0]["accuracy"]


def at(frames, name, seed):
    return 100 * next(r["accuracy"] for r in look(name, seed)["rows"] if r["frames"] == frames)


def gain(name, seed):
    """In accuracy, from 16 frames to 256."""
    return at(256, name, seed) - at(16, name, seed)


def lift(name, seed):
    """In held-out accuracy by RL over the cold start, mean of the four domains; of several runs their mean."""
    if isinstance(name, tuple):
        return statistics.mean(lift(one, seed) for one in name)
    return statistics.mean(domain(d, name, seed) - domain(d, "cold-five", seed) for d in DOMAINS)


DOMAINS, SINGLE = ("count", "open", "ocr", "grounding"), ("counting", "places", "reading", "boxes")
CLAIMS = [                           # of two runs a and b it is claimed that a's measure is larger, smaller, or no different
    ("clip-higher clips less", "of 10,000 tokens", clipped, "higher", "<", "symmetric"),
    ("... keeps entropy up", "entropy", entropy, "higher", ">", "symmetric"),
    ("... and ends better", "accuracy", accuracy, "higher", ">", "symmetric"),
    ("no KL term ends better than one (0.04)", "accuracy", accuracy, "base", ">", "kl"),
    ("forced answering saves cut thoughts, in training and at test", "accuracy", accuracy, "tight", ">", "unforced"),
    ("... in training alone: both tested with it", "accuracy", forced, "tight", ">", "unforced"),
    ("RLCS: of tiered draws more groups teach than of uniform ones", "of 100 groups", signal, "tiered", ">", "uniform"),
    ("... and it ends better, as many completions sampled", "accuracy", accuracy, "tiered", ">", "uniform"),
    ("ratio-EMA oversampling fills the batch", "groups kept of 16", kept, "base", ">", "plain"),
    ("... keeps it steady", "deviation, % of mean", uneven, "base", "<", "plain"),
    ("... ends better, as many steps", "accuracy", accuracy, "base", ">", "plain"),
    ("... ends better, as many completions sampled", "accuracy", at_equal_cost, "base", ">", "plain"),
    ("per-sample and per-token loss end alike", "accuracy", accuracy, "base", "=", "token"),
    ("... per-sample is steadier", "gradient norm, change a step, %", jerks, "base", "<", "token"),
    ("twice the cold start is better before RL", "accuracy", accuracy, "cold", ">", "half"),
    ("... and the same after it", "accuracy", accuracy, "base", "=", "short"),
    ("RL in bfloat16 ends as in float32", "accuracy", accuracy, "rounded", "=", "base"),
    ("RL needs the cold start", "accuracy", accuracy, "base", ">", "none"),
    ("reasoning beats answering at once, 256 frames", "accuracy", lambda *x: at(256, *x), "thinks", ">", "once"),
    ("... and gains more from more frames, 16 to 256", "points", gain, "thinks", ">", "once"),
    ("a verifier that can be fooled: its reward says more than the truth", "points", gap, "hacked", ">", "base"),
    ("... the rest of the domains suffers", "accuracy in open", lambda *x: domain("open", *x), "hacked", "<", "base"),
    ("... and the commonest answer betrays it", "% of answers", same, "hacked", ">", "base"),
    ("all domains mixed lift more than one alone", "points", lift, "five", ">", SINGLE),
]


def verdict(a, sign, b, least=0.0):
    """Two runs of a seed are a pair: one cold start, the same questions to be judged on. Seen, or opposite: every pair agrees, and the
    mean of their differences is larger than its standard deviation and than `least`. No different: that mean is within 3 points."""
    apart = [x - y for x, y in zip(a, b)]
    if sign == "=":
        return "seen" if abs(statistics.mean(apart)) <= 3 else "not seen"
    if len({(x > 0) - (x < 0) for x in apart}) > 1 or abs(statistics.mean(apart)) <= max(least, statistics.stdev(apart)):
        return "not seen"
    return "seen" if (apart[0] > 0) == (sign == ">") else "opposite"


def mean(xs):
    """Three seeds as mean ± standard deviation."""
    digits = 3 if 0 < max(map(abs, xs)) < 0.1 else 1
    return f"{statistics.mean(xs):,.{digits}f} ± {statistics.stdev(xs):.{digits}f}"


def flags(name):
    """What a run is given that the others are not, its cold start's with it."""
    if isinstance(name, tuple):
        return ""
    start, arguments = RUNS[name]
    before, after = RUNS[start.partition(" ")[0]][1] if start else "", arguments.replace(RL, "").replace("{out}/", "").replace("{seed}", "S")
    given = dict.fromkeys(x for x in f"{before} {after}".split() if x != "--rl_steps=0")
    return f" `{' '.join(given)}`" if given else ""


def tables():
    def every(measure, name):
        return [measure(name, seed) for seed in SEEDS]

    print("| claim | measured | so | otherwise | difference | here |\n|---|---|---|---|---|---|")
    for claim, what, measure, a, sign, b in CLAIMS:
        try:
            x, y = every(measure, a), every(measure, b)
            apart = mean([i - j for i, j in zip(x, y)])
            print(f"| {claim} | {what} | {mean(x)}{flags(a)} | {mean(y)}{flags(b)} | {apart} | {verdict(x, sign, y, what == 'accuracy')} |")     # a point: two of 192 answers
        except FileNotFoundError as e:
            print(f"| {claim} | {what} | | | | not run: no {os.path.relpath(e.filename, OUT)} |")
    try:
        print("\n| frames | " + " | ".join(map(str, FRAMES)) + " |\n|" + "---|" * (len(FRAMES) + 1))
        for name in ("once", "thinks"):
            print(f"| `{name}` | " + " | ".join(mean(every(lambda *x: at(f, *x), name)) for f in FRAMES) + " |")
        print("\n| trained on | " + " | ".join(DOMAINS) + " | mean |\n|" + "---|" * (len(DOMAINS) + 2))
        for name in ("cold-five", *SINGLE, "five"):
            if name == "cold-five":
                cells = [mean(every(lambda *x: domain(d, *x), name)) for d in DOMAINS] + [""]
            else:
                cells = [mean(every(lambda *x: domain(d, *x) - domain(d, "cold-five", x[1]), name)) for d in DOMAINS] + [mean(every(lift, name))]
            print(f"| `{name}` | " + " | ".join(cells) + " |")
    except FileNotFoundError as e:
        print(f"not run: no {os.path.relpath(e.filename, OUT)}")


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__.strip())
    OUT, names = os.path.abspath(sys.argv[1]), sys.argv[2:] or list(RUNS)
    if unknown := set(names) - {*RUNS, "tables"}:
        sys.exit(f"no run is called {', '.join(unknown)}; there are: {', '.join(RUNS)}")
    main(OUT, [name for name in names if name != "tables"])
    tables()
