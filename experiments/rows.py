"""
The evidence as data: the runs, and the rows that compare them.

A row claims that of two runs `a` has a larger measure than `b` (">"), a smaller one ("<") or no
other ("="). `least` is the smallest difference that is worth claiming, fixed before the first run,
and `why` says why. The first rows matter most: they get their seeds first.
"""
from dataclasses import dataclass
from functools import partial
from typing import Callable

import measures as m
from intervals import MOST, is_finished

# Of one core, for all runs that have a line. With about 0.8 for eight cold starts without: 12.
HOURS = 11.2
FRAMES = (16, 64, 256)
DOMAINS = m.DOMAINS
SINGLE = ("counting", "places", "reading", "boxes")        # runs on one domain each


@dataclass
class Run:
    """One command. arguments: train.py's; OUT/ is the folder of all runs, SEED the seed."""
    arguments: str
    start: str = ""            # the run whose checkpoint it starts from or evaluates
    needs: tuple = ()          # other runs whose folders it reads
    rule: str = ""             # record each visit of a question, see visits.py
    kl: bool = False           # run a copy of the code that has kl.diff


COLD = "--rl_steps=0 --eval_every=0 --save_every=1000"
RL = ("--sft_steps=0 --rl_steps=20 --prompts_per_step=16 --eval_samples=1000 --eval_every=20 "
      "--show_every=0 --save_every=1000")
EVALUATE = "--mode=eval --eval_samples=1000 --group_size=2"
# 64 questions, chosen after grading: each comes back, and most are too easy or too hard at first.
HELD = "--eval_data=OUT/held.jsonl"
FEW = f"--data=OUT/graded-SEED/few.jsonl --grades=OUT/graded-SEED/few_grades.jsonl {HELD}"
FEW_RL = f"{RL} --eval_every=4 --oversample_cap=1 {FEW}"
MANY_UPDATES = f"{RL} --updates_per_rollout=8"
TIGHT = "--think_budget=60"
LONG = "--data=toy:long --frames=128"
ALL_FRAMES = f"{EVALUATE} {LONG} --eval_frames=" + ",".join(map(str, FRAMES))
# A thought that reads letters is longer, and so is an answer that is a box.
FIVE = "--think_budget=112 --answer_budget=24 --data=toy:"
MIXED = f"{FIVE}plot,temporal,spatial,reading,grounding"
FIVE_RL = f"{RL} --eval_every=0"                           # evaluated afterwards, on all domains

RUNS = {
    "cold": Run(COLD),
    "before": Run(EVALUATE, "cold"),
    # RLCS where each question comes back
    "graded": Run(f"--mode=grade --data=OUT/many.jsonl {HELD}", "cold"),
    "uniform": Run(f"{FEW_RL} --tiers=false", "cold", ("graded",), "uniform"),
    "still": Run(FEW_RL, "cold", ("graded",), "still"),
    "follows": Run(FEW_RL, "cold", ("graded",), "follows"),
    # one thing changed
    "base": Run(f"{RL} --eval_every=5", "cold"),
    "plain": Run(f"{RL} --oversample_cap=1", "cold"),
    "tight": Run(f"{RL} {TIGHT}", "cold"),
    "unforced": Run(f"{RL} {TIGHT} --force_answer=false", "cold"),
    "unforced-forced": Run(f"{EVALUATE} {TIGHT}", "unforced"),
    "higher": Run(MANY_UPDATES, "cold"),
    "symmetric": Run(f"{MANY_UPDATES} --clip_high=0.2", "cold"),
    "kl": Run(f"{RL} --kl=0.04", "cold", kl=True),
    "token": Run(f"{RL} --loss_average=token", "cold"),
    "lora": Run(f"{RL} --lora_rank=16 --lr=1e-3", "cold"),
    "bfloat16": Run(f"{RL} --dtype=bfloat16", "cold"),
    "hacked": Run(f"{RL} --eval_every=0 --verifiers=count=experiments/hackable.py:judge", "cold"),
    "hacked-true": Run(EVALUATE, "hacked"),
    # cold starts
    "cold-half": Run(f"{COLD} --sft_steps=190"),
    "before-half": Run(EVALUATE, "cold-half"),
    "half": Run(RL, "cold-half"),
    "cold-none": Run(f"{COLD} --sft_steps=0"),
    "none": Run(RL, "cold-none"),
    # reasoning against answering at once
    "cold-long": Run(f"{COLD} {LONG}"),
    "thinks": Run(f"{RL} --eval_every=0 {LONG}", "cold-long"),
    "thinks-frames": Run(ALL_FRAMES, "thinks"),
    "cold-once": Run(f"{COLD} --sft_steps=190 {LONG} --think_budget=0", "cold-long"),
    "once": Run(f"{RL} --eval_every=0 {LONG} --think_budget=0", "cold-once"),
    "once-frames": Run(f"{ALL_FRAMES} --think_budget=0", "once"),
    # all domains mixed, or one; one sees as many questions of its domain as the mix does
    "cold-five": Run(f"{COLD} {MIXED}"),
    "before-five": Run(f"{EVALUATE} {MIXED}", "cold-five"),
    "five": Run(f"{FIVE_RL} --prompts_per_step=20 {MIXED}", "cold-five"),
    "counting": Run(f"{FIVE_RL} --prompts_per_step=4 {FIVE}plot", "cold-five"),
    "places": Run(f"{FIVE_RL} --prompts_per_step=8 {FIVE}temporal,spatial", "cold-five"),
    "reading": Run(f"{FIVE_RL} --prompts_per_step=4 {FIVE}reading", "cold-five"),
    "boxes": Run(f"{FIVE_RL} --prompts_per_step=4 {FIVE}grounding", "cold-five"),
}
for name in ("five", *SINGLE):
    RUNS[f"{name}-all"] = Run(f"{EVALUATE} {MIXED}", name)


@dataclass
class Row:
    group: str                 # heading of several rows
    claim: str
    unit: str
    measure: Callable          # (results of one seed by run, name of a run) -> number
    a: str                     # "with" the idea that is claimed to help
    sign: str                  # ">", "<" or "="
    b: str                     # "without" it; or a tuple of runs
    least: float               # the smallest difference worth claiming
    why: str
    earlier: str = ""          # the verdict before there was a rule: three seeds, 192 questions
    measure_b: Callable = None           # of b, if it is another one
    also: tuple = ()           # other runs that the measure reads
    short: str = ""            # what the README calls it, for the rows that it shows


POINTS = "points of accuracy"
TWO_POINTS = "less would not change a choice"
GROUPS = "one group in twenty"
RLCS, RATIO, FORCED = "RLCS: tiered draws", "Ratio-EMA oversampling", "Forced answering"
CLIP, LOSS, START = "Clip-higher", "Loss average", "Cold start"
LOOKING, MIX, FOOLED = "Reasoning over frames", "Domains mixed", "A verifier that can be fooled"

ROWS = [
    Row(RLCS, "more groups have signal than with uniform draws", "of 100 groups", m.signal,
        "follows", ">", "uniform", 5.0, GROUPS,
        short="RLCS, questions mostly too easy or hard: more groups have signal"),
    Row(RLCS, "... than if estimates stand still", "of 100 groups", m.signal,
        "follows", ">", "still", 5.0, GROUPS),
    Row(RLCS, "estimates that stand still beat uniform draws as well", "of 100 groups", m.signal,
        "still", ">", "uniform", 5.0, GROUPS, "seen"),
    Row(RLCS, "it ends better than uniform draws, at equal completions", POINTS, m.accuracy,
        "follows", ">", "uniform", 2.0, TWO_POINTS,
        short="... it ends better"),
    Row(RLCS, "it needs fewer completions to 80% accuracy than uniform draws", "completions",
        m.completions_to_80, "follows", "<", "uniform", 256.0, "a tenth of the run",
        also=("before",)),
    Row(RLCS, "estimates that follow rank the next outcomes better, same visits",
        "rank correlation", partial(m.correlation, "follows"), "uniform", ">", "uniform", 0.05,
        "a twentieth of a perfect one", measure_b=partial(m.correlation, "still")),
    Row(RLCS, "... and are nearer to them", "error of the estimate",
        partial(m.estimate_error, "follows"), "uniform", "<", "uniform", 0.05,
        "half of the narrowest tier", measure_b=partial(m.estimate_error, "still")),
    Row(RATIO, "it keeps more groups", "groups kept of 16", m.groups_kept,
        "base", ">", "plain", 1.0, "one group", "seen"),
    Row(RATIO, "their number varies less, for its mean", "deviation, % of mean", m.unevenness,
        "base", "<", "plain", 10.0, "a third of what it is without", "seen"),
    Row(RATIO, "it ends better, at equal steps", POINTS, m.accuracy,
        "base", ">", "plain", 2.0, TWO_POINTS, "not resolved"),
    Row(RATIO, "it ends better, at equal completions", POINTS, m.accuracy_at_equal_cost,
        "base", ">", "plain", 2.0, TWO_POINTS, "not resolved"),
    Row(FORCED, "in training and at test, it ends better", POINTS, m.accuracy,
        "tight", ">", "unforced", 5.0, "thoughts are cut on purpose here", "seen"),
    Row(FORCED, "only in training, both tested with it", POINTS, m.accuracy,
        "tight", ">", "unforced-forced", 2.0, TWO_POINTS, "seen",
        short="thoughts cut at 60 tokens: training with forced answers ends better"),
    Row(FORCED, "only at test, both trained without it", POINTS, m.accuracy,
        "unforced-forced", ">", "unforced", 5.0, "thoughts are cut on purpose here"),
    Row(CLIP, "it clips less than a symmetric clip", "of 10,000 tokens", m.clipped,
        "higher", "<", "symmetric", 2.0, "a sixth of what is clipped", "seen"),
    Row(CLIP, "it keeps entropy up", "nats", m.entropy,
        "higher", ">", "symmetric", 0.005, "a sixth of the entropy", "not seen"),
    Row(CLIP, "it ends better", POINTS, m.accuracy,
        "higher", ">", "symmetric", 2.0, TWO_POINTS, "not resolved",
        short="eight updates per rollout: clip-higher ends better"),
    Row("KL", "no KL term ends better than one of 0.04", POINTS, m.accuracy,
        "base", ">", "kl", 2.0, TWO_POINTS, "not resolved"),
    Row(LOSS, "per sample and per token end at the same accuracy", POINTS, m.accuracy,
        "base", "=", "token", 2.0, TWO_POINTS, "not resolved"),
    Row(LOSS, "per sample is steadier", "change of gradient norm per step, %", m.norm_changes,
        "base", "<", "token", 10.0, "a third of the change", "not seen"),
    Row(START, "twice the cold start is better before RL", POINTS, m.accuracy,
        "before", ">", "before-half", 5.0, "a small part of what it teaches", "seen"),
    Row(START, "... and equal after RL", POINTS, m.accuracy,
        "base", "=", "half", 5.0, "a small part of what it teaches", "not seen"),
    Row(START, "RL needs a cold start", POINTS, m.accuracy,
        "base", ">", "none", 5.0, "a small part of what it teaches", "seen"),
    Row(LOOKING, "a thought beats answering at once, 256 frames", POINTS,
        partial(m.accuracy_at, 256), "thinks-frames", ">", "once-frames", 5.0,
        "a quarter of what guessing gives", "seen",
        short="over 256 frames, a thought beats answering at once (which guesses)"),
    Row(LOOKING, "it gains more from 256 frames instead of 16", POINTS, m.gain_from_frames,
        "thinks-frames", ">", "once-frames", 5.0, "a quarter of what guessing gives", "seen"),
    Row(MIX, "all domains mixed, with more RL, improve more than a single one", POINTS, m.lift,
        "five-all", ">", tuple(f"{name}-all" for name in SINGLE), 2.0, TWO_POINTS, "seen",
        also=("before-five",)),
    Row(FOOLED, "its reward exceeds the true accuracy", POINTS, m.verifier_gap,
        "hacked", ">", "base", 3.0, "as an honest verifier's gap varies", "seen",
        also=("hacked-true",)),
    Row(FOOLED, "the other domain suffers", "points of accuracy in open",
        m.open_accuracy, "hacked-true", "<", "base", 2.0, TWO_POINTS, "not resolved"),
    Row(FOOLED, "the most common answer reveals it", "% of answers", m.commonest_answer,
        "hacked", ">", "base", 5.0, "visible in a curve", "not resolved"),
    Row("LoRA", "rank 16 ends as training all weights", POINTS, m.accuracy,
        "lora", "=", "base", 2.0, TWO_POINTS),
    Row("bfloat16", "RL in bfloat16 ends as in float32", POINTS, m.accuracy,
        "bfloat16", "=", "base", 2.0, TWO_POINTS, "not resolved"),
]


def runs_of(row):
    """Names of all runs that a row reads."""
    without = (row.b,) if isinstance(row.b, str) else row.b
    return tuple(dict.fromkeys((row.a, *without, *row.also)))


# --------------------------------------------------------------------------------------------------
# a row's numbers; results: {seed: {run: its line of evidence.jsonl}}

def complete_seeds(row, results):
    """How many of the seeds 0, 1, 2 ... have all runs of a row."""
    n = 0
    while n < MOST and set(runs_of(row)) <= results.get(n, {}).keys():
        n += 1
    return n


def pairs(row, results):
    """(with, without) of each complete seed."""
    measure_b = row.measure_b or row.measure
    found = []
    for seed in range(complete_seeds(row, results)):
        of = results[seed]
        found.append((row.measure(of, row.a), measure_b(of, row.b)))
    return found


def differences(row, results):
    return [a - b for a, b in pairs(row, results)]


def hours(results):
    """Of one core, that all runs took."""
    return sum(line["cpu_seconds"] for of in results.values() for line in of.values()) / 3600


def gets_more_seeds(row, results):
    """Whether its interval is still too wide, and there are hours left."""
    return hours(results) < HOURS and not is_finished(differences(row, results), row.least)
