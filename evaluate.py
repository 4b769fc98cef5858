"""
How good a checkpoint is: greedy accuracy and pass@k on held-out questions, at several numbers of
frames and thinking budgets; and how hard each question is for it before training (GLM-4.1V §5.3).

    python evaluate.py --model=out/model --eval_budgets=0,24,48,96
    python evaluate.py --grade=true --model=out/model --data=my.jsonl --out_dir=graded

The first prints tables, then one line of JSON. The second writes the file for train.py --grades.
"""
import json
import math
import os
import sys
from dataclasses import dataclass, replace
from functools import partial

import torch
from tqdm import tqdm

import data
import encode
import model as vlm
import rewards
from curriculum import Curriculum
from flow import Run
from plumbing import command_line, judges
from plumbing.fetching import fetch_in_rounds
from plumbing.grades import append, begin, read_grades
from plumbing.metrics import mean
from plumbing.plots import draw_sweep, eval_table
from plumbing.ranks import gather, merged, name_each, on_first, printer, run_command, start
from plumbing.sharding import check_heads
from plumbing.sweep import sweep
from plumbing.vllm_engine import engine_of, import_vllm
from rollout import budgets, rollout, room


@dataclass
class Config:
    model: str = "out/model"       # a Hugging Face directory or hub name
    data: str = "toy"              # as for train.py; only its held-out videos are used
    eval_data: str = ""            # evaluate on all of this file instead
    video_dir: str = ""            # base of relative video paths; empty: the data file's folder
    cache_dir: str = ""            # keep vision tokens on disk, for other runs too; empty: do not
    cache_gb: float = 4.0          # GiB of vision tokens that each rank keeps in host memory
    out_dir: str = "out"           # where eval.png and grades.jsonl are written
    seed: int = 0                  # of sampled answers
    sp: int = 0                    # ranks per video; 0: all of this machine
    stage2: bool = False           # also split the prefill over the sp ranks, when grading
    dtype: str = "float32"         # or "bfloat16"
    max_tokens: int = 16384        # most prefix positions per forward
    frames: int = 32               # frames per video, evenly spaced in time; fewer if it has fewer
    max_pixels: int = 0            # per frame, after resizing; 0: the checkpoint's own bound
    group_size: int = 8            # answers sampled per question, for pass@k and for grades
    prompts_per_step: int = 24     # questions graded at a time
    think_budget: int = 96         # tokens
    answer_budget: int = 16        # tokens after that
    force_answer: bool = True      # false: a completion that thinks too long ends unanswered
    format_weight: float = 0.1     # weight of the format in the reward
    verifiers: str = ""            # your own: "domain=my_file.py:function", comma-separated
    judges: int = 8                # how many calls of your own verifiers run at once
    judge_seconds: float = 60.0    # for each; an answer that takes longer is ungraded, not wrong
    rollout: str = "torch"         # or "vllm"
    vllm_length: int = 16384       # most tokens of prompt plus completion
    vllm_memory: float = 0.5       # vLLM's share of GPU memory
    vllm_share: bool = False       # one engine per sp group, not per rank
    eval_samples: int = 256        # evaluate at most this many held-out samples
    eval_frames: str = ""          # also at these numbers of frames, "16,64,256"
    eval_budgets: str = ""         # also at these thinking budgets, "0,48,64-96" (64: minimum)
    pass_k: int = 0                # pass@k of group_size answers; 0: k = group_size
    grades: str = ""               # a grades.jsonl: accuracy is reported per tier of difficulty
    grade: bool = False            # grade all questions, instead of evaluating


# --------------------------------------------------------------------------------------------------
# evaluation

def pass_at(k, accuracies):
    """The best of k answers, on average over all ways to choose k of these n: unbiased. For answers
    that are right or wrong it is 1 - C(n - right, k) / C(n, k) (Chen et al. 2021, arXiv
    2107.03374). Raises ValueError unless 1 <= k <= n.

    >>> pass_at(1, [1, 0, 0, 0]), pass_at(2, [1, 0, 0, 0])
    (0.25, 0.5)
    """
    n = len(accuracies)
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} of {n} answers: k is 1 to {n}")
    # In sorted order, answer i is the best of all choices that take k - 1 of the i before it.
    best = sum(a * math.comb(i, k - 1) for i, a in enumerate(sorted(accuracies)))
    return best / math.comb(n, k)


@dataclass
class Answer:
    """The results for one question: of its greedy answer, and of the sampled ones."""
    id: str
    domain: str
    accuracy: float
    format: float
    forced: bool
    truncated: bool
    length: int            # tokens
    sampled: list          # accuracies of group_size sampled answers; [] unless k was given


def evaluate(run, samples, k=0, grades=None, think_least=0):
    """Greedy accuracy and format, also per domain; with k, pass@1 and pass@k of group_size answers.

    grades: {id: (correct, total)}: accuracy is reported per tier by them, or else by the answers
    sampled here. think_least: as for `rollout.sample`. The samples are split over the dp teams;
    one that cannot be read or graded is dropped, counted and named. -> dict, on every rank
    """
    c, ranks = run.config, run.ranks
    prompts, dropped = data.make_prompts(run, samples[ranks.dp_rank::ranks.dp],
                                         room(run.tokenizer, **budgets(c)))
    greedy, sampled = ask(run, prompts, k, think_least)
    mine = slice(ranks.sp_rank, None, ranks.sp)            # all sp ranks have the same answers
    answers, ungraded = verify(c, prompts[mine], greedy[mine], sampled[mine])
    answers = [a for part in gather(answers, ranks) for a in part]
    dropped = name_each("not evaluated", merged(dropped | ungraded, ranks))
    if not answers:
        why = next(iter(dropped.values()), "no sample is held out, or --eval_samples=0")
        return {"samples": 0, "dropped": len(dropped), "why": why}
    result = {"samples": len(answers), "dropped": len(dropped), "frames": c.frames,
              "think_budget": c.think_budget, "think_least": think_least}
    for key in ("accuracy", "format", "forced", "truncated", "length"):
        result[key] = mean([float(getattr(a, key)) for a in answers])
    forced = [a.accuracy for a in answers if a.forced]
    result["forced_accuracy"] = mean(forced) if forced else None
    if k:
        for n in (1, k):
            result[f"pass@{n}"] = mean([pass_at(n, a.sampled) for a in answers])
    result["domains"] = {}
    for domain in sorted({a.domain for a in answers}):
        result["domains"][domain] = mean([a.accuracy for a in answers if a.domain == domain])
    tiers = accuracy_by_tier(answers, grades, c.seed)
    return (result | {"tiers": tiers}) if tiers else result


def ask(run, prompts, k, think_least):
    """Complete prompts, a list of (`Sample`, `Prompt`). -> for each prompt a list with its greedy
    completion, and a list of group_size sampled completions (empty if k is 0)"""
    c = run.config
    only_prompts = [prompt for _, prompt in prompts]
    how = {"ranks": run.ranks, "max_tokens": c.max_tokens, "engine": run.engine,
           "fetch": partial(fetch_in_rounds, run, data.fetch), **budgets(c)}
    keys = [[("greedy",)] for _ in prompts]
    greedy = rollout(run.model, run.tokenizer, only_prompts, keys, greedy=True,
                     **how | {"think_least": think_least})
    if not k:
        return greedy, [[] for _ in prompts]
    keys = [[(c.seed, "eval", sample.id, n) for n in range(c.group_size)] for sample, _ in prompts]
    return greedy, rollout(run.model, run.tokenizer, only_prompts, keys, **how)


def verify(c, prompts, greedy, sampled):
    """-> list of `Answer`, {id: why not graded}"""
    pairs = [(sample, one + more) for (sample, _), one, more in zip(prompts, greedy, sampled)]
    verdicts = judges.grade(pairs, c, rewards.score, rewards.VerifierError)
    answers, ungraded = [], {}
    for (sample, [completion, *_]), (graded, why) in zip(pairs, verdicts):
        if why:
            ungraded[sample.id] = why
            continue
        answers.append(Answer(sample.id, sample.domain, graded[0].accuracy, graded[0].format,
                              completion.forced, completion.truncated, len(completion.tokens),
                              [reward.accuracy for reward in graded[1:]]))
    return answers, ungraded


def accuracy_by_tier(answers, grades, seed):
    """-> five of {"samples", "accuracy"}, hard to easy; [] if no difficulty is known"""
    grades = grades or {a.id: (sum(a.sampled), len(a.sampled)) for a in answers if a.sampled}
    difficulty = Curriculum([a.id for a in answers], seed, grades)
    if not difficulty.recent:
        return []
    tiers = [[] for _ in range(5)]
    for a in answers:
        if a.id in difficulty.recent:
            tiers[difficulty.tier(a.id)].append(a.accuracy)
    return [{"samples": len(tier), "accuracy": mean(tier)} for tier in tiers]


def for_the_log(run, samples, title):
    """Greedy accuracy on held-out samples: printed, and returned as keys of metrics.jsonl."""
    if not run.config.eval_every or not samples:
        return {}
    result = evaluate(run, samples)
    if not result["samples"]:
        run.say(f"{title}: no held-out sample could be read ({result['why']})")
        return {}
    domains = ", ".join(f"{d} {accuracy:.1%}" for d, accuracy in result["domains"].items())
    run.say(f"{title}: held-out accuracy {result['accuracy']:.1%}, format {result['format']:.1%}, "
            f"{domains} ({result['samples']} samples)")
    by_domain = {f"eval_accuracy_{d}": accuracy for d, accuracy in result["domains"].items()}
    return {"eval_accuracy": result["accuracy"], "eval_format": result["format"], **by_domain}


# --------------------------------------------------------------------------------------------------
# grading

def grade(run, samples):
    """Sample group_size answers to each question that is not in out_dir/grades.jsonl yet, and add a
    line for it. A sample that cannot be read or graded is named and gets no line."""
    c, ranks = run.config, run.ranks
    path = os.path.join(c.out_dir, "grades.jsonl")
    name = os.path.realpath(c.model) if os.path.isdir(c.model) else c.model
    grades = read_grades(path, samples, name) if os.path.exists(path) else {}
    gather(None, ranks)                                    # rank 0 writes after all have read
    if ranks.rank == 0:
        begin(path)
    missing = [sample for sample in samples if sample.id not in grades]
    failed = 0
    bar = tqdm(total=len(samples), initial=len(grades), desc="grade", dynamic_ncols=True,
               disable=ranks.rank != 0)
    for at in range(0, len(missing), c.prompts_per_step):
        part = missing[at:at + c.prompts_per_step]
        correct, reasons = grade_part(run, part)
        for id, why in reasons.items():
            run.say(f"not graded {id}: {why}")
        failed += len(reasons)
        if ranks.rank == 0:
            append(path, part, correct, c.group_size, name)
        grades |= {id: [right, c.group_size] for id, right in correct.items()}
        bar.update(len(part))
    bar.close()
    tiers = list(map(Curriculum(grades, c.seed, grades).tier, grades))
    counts = ", ".join(str(tiers.count(tier)) for tier in range(5))
    run.say(f"{path}: {len(grades)} graded, {failed} not; hard to easy, in five tiers: {counts}")


def grade_part(run, samples):
    """-> {id: sum of accuracies of group_size answers}, {id: why it is not graded}, of all ranks"""
    c, ranks = run.config, run.ranks
    prompts, dropped = data.make_prompts(run, samples[ranks.dp_rank::ranks.dp],
                                         room(run.tokenizer, **budgets(c)))
    keys = [[(c.seed, "grade", sample.id, n) for n in range(c.group_size)] for sample, _ in prompts]
    completions = rollout(
        run.model, run.tokenizer, [prompt for _, prompt in prompts], keys, ranks, c.max_tokens,
        c.stage2, run.engine, partial(fetch_in_rounds, run, data.fetch), **budgets(c))
    pairs = [(sample, answers) for (sample, _), answers in zip(prompts, completions)]
    verdicts = on_first(lambda: judges.grade(pairs, c, rewards.score, rewards.VerifierError), ranks)
    correct = {}
    for (sample, _), (graded, why) in zip(prompts, verdicts):
        if why:
            dropped[sample.id] = why
        else:
            correct[sample.id] = sum(reward.accuracy for reward in graded)
    return merged(correct, ranks), merged(dropped, ranks)


# --------------------------------------------------------------------------------------------------
# the command

def main(c):
    ranks = start(c.sp, command_line.to_compare(c))
    command_line.check_sampling(c, ranks)
    settings = sweep(c)
    say = printer(ranks)
    train, held_out = data.load_questions(c, say)
    to_grade = train if c.eval_data else held_out + train  # held out first, for evaluations
    grades = read_grades(c.grades, held_out if c.eval_data else to_grade) if c.grades else {}
    run = load_run(c, ranks, say)
    if c.grade:
        return grade(run, to_grade)
    if settings:
        command_line.make_folder(c.out_dir)                # now: a failure later loses the work
    result = evaluate(run, held_out[:c.eval_samples], c.pass_k or c.group_size, grades)
    if not result["samples"]:
        raise ValueError(f"no sample could be evaluated: {result['why']}")
    rows = []
    for s in tqdm(settings, desc="eval", disable=ranks.rank != 0 or not settings):
        other = replace(c, frames=s.frames, think_budget=s.think_budget)
        rows.append(evaluate(replace(run, config=other), held_out[:c.eval_samples],
                             think_least=s.think_least))
    if ranks.rank == 0:
        print(eval_table(result, rows))
        if rows:
            draw_sweep(rows, os.path.join(c.out_dir, "eval.png"))
            print(f"{c.out_dir}/eval.png")
        print(json.dumps((result | {"rows": rows}) if rows else result), flush=True)


def load_run(c, ranks, say):
    """The checkpoint c.model and the sampler that c.rollout names. -> `Run`"""
    if c.rollout == "vllm":
        import_vllm()                                      # not found: say so before loading
    cache = encode.Cache(c.cache_gb * 2 ** 30, c.cache_dir, tqdm.write)
    dtype = getattr(torch, c.dtype)
    model, tokenizer = vlm.load(c.model, ranks.device, dtype, c.max_pixels, c.seed)
    if c.grade and c.stage2:
        check_heads(model.config.text_config, ranks)
    engine = engine_of(c, c.model, model, tokenizer, ranks)
    return Run(c, ranks, say, model, tokenizer, vlm.banned_ids(model, tokenizer), cache,
               engine=engine)


if __name__ == "__main__":
    run_command("evaluate.py", lambda: main(command_line.parse(Config, __doc__, sys.argv[1:])))
