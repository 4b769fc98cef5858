"""
Teach a vision-language model to reason about long videos. One script, from one CPU to many GPUs.

  laptop, two cores   torchrun --standalone --nproc_per_node=2 train.py
  your own videos     the same with --data=my.jsonl --out_dir=out-my; docs/data.md
  GPU boxes           one command per model in docs/gpu.md

Two stages, as in the papers: cold start (the model learns from a teacher to write its thinking
down), then RL (its own answers are verified, and what was right is reinforced). Before these, a
randomly initialised model learns to see. Started again with the same out_dir, a run resumes.
"""
import gc
import sys
import time
from dataclasses import dataclass, fields
from functools import partial

import torch
from tqdm import tqdm

import data
import encode
import evaluate
import grpo
import model as vlm
import rewards
import toy
from curriculum import Curriculum, balanced, has_signal
from flow import Group, Ranks, Run
from plumbing import batches, command_line, judges, lora, metrics
from plumbing.fetching import fetch_in_rounds, fetch_own, store_received
from plumbing.grades import read_grades
from plumbing.metrics import Clock, Meter, mean
from plumbing.mixture import mixed, shares
from plumbing.optimizer import falling, update, warmed_up
from plumbing.progress import plan, what_next
from plumbing.ranks import (
    deal_groups,
    gather,
    merged,
    on_first,
    printer,
    run_command,
    send_groups,
    start,
)
from plumbing.resume import newest, try_saving
from plumbing.sharding import check_heads, recompute_layers, shard_parameters
from plumbing.stages import Progress, Stage
from plumbing.store import Ahead
from plumbing.streams import completion_keys
from plumbing.vllm_engine import engine_of, import_vllm
from rollout import Options, budgets, rollout, room


@dataclass
class Config:
    # model and data
    model: str = "tiny"            # randomly initialised; or a Hugging Face directory or hub name
    data: str = "toy"              # "toy" (built-in), or a .jsonl or .json: docs/data.md
    eval_data: str = ""            # likewise; empty: hold out some of data's videos, by a hash
    video_dir: str = ""            # base of relative video paths; empty: the data file's folder
    cache_dir: str = ""            # keep vision tokens on disk, for other runs too; empty: do not
    cache_gb: float = 4.0          # GiB of vision tokens that each rank keeps in host memory
    out_dir: str = "out"           # checkpoints, metrics.jsonl, curves.png; resumes if it has one
    mode: str = "train"            # or "eval" or "grade": do what evaluate.py does
    seed: int = 0                  # all randomness is a function of seed, step, sample, completion
    # hardware
    sp: int = 0                    # ranks per video; 0: all of this machine; 1: no sharing
    stage2: bool = False           # also split the sequence over the sp ranks, for long videos
    fsdp: bool = False             # shard weights, gradients, optimizer state over all ranks
    checkpointing: bool = False    # recompute layers in the backward: less memory, a fifth slower
    dtype: str = "float32"         # of weights and activations; "bfloat16" on GPUs
    max_tokens: int = 16384        # most positions per forward; a single group may exceed it
    lora_rank: int = 0             # train adapters of this rank, all else is frozen; 0: train all
    lora_alpha: int = 32           # adapters are scaled by lora_alpha / lora_rank
    # the video
    frames: int = 32               # frames per video, evenly spaced in time; fewer if it has fewer
    max_pixels: int = 0            # per frame, after resizing; 0: the checkpoint's own bound
    # align: describe every event (only if the model is randomly initialised)
    align_steps: int = 300         # optimizer steps
    # cold start: imitate the teacher's thoughts
    sft_steps: int = 380           # optimizer steps
    sft_batch: int = 32            # samples per step over all ranks, here and in align
    sft_lr: float = 1.5e-3         # 1e-5 for a pretrained model; also the align stage's
    # RL
    rl_steps: int = 40             # each makes updates_per_rollout updates (optimizer steps)
    prompts_per_step: int = 24     # groups per RL step over all ranks
    group_size: int = 8            # G, completions per group
    oversample_cap: float = 8.0    # draw up to this many times prompts_per_step; 1: no oversampling
    tiers: bool = True             # draw questions that are half right more often than others
    mixture: str = ""              # "count:2,open:1": draw domains in these proportions
    grades: str = ""               # a grades.jsonl: how hard each question is before training
    updates_per_rollout: int = 2   # updates per RL step, on disjoint groups; 1: nothing to clip
    think_budget: int = 96         # tokens; then </think><answer> is forced; 0: no thinking at all
    answer_budget: int = 16        # tokens after that
    force_answer: bool = True      # false: a completion that thinks too long ends unanswered
    lr: float = 1e-4               # 1e-6 for a pretrained model
    clip_low: float = 0.2          # the probability ratio is clipped to 1 - clip_low ...
    clip_high: float = 0.28        # ... 1 + clip_high; higher keeps rare tokens alive (DAPO, GLM)
    loss_average: str = "sample"   # equal weight per completion; "token": equal weight per token
    format_weight: float = 0.1     # as LongVILA-R1; 0: reward only the answer, as GLM-4.1V
    verifiers: str = ""            # your own: "domain=my_file.py:function", comma-separated
    judges: int = 8                # how many calls of your own verifiers run at once
    judge_seconds: float = 60.0    # for each; an answer that takes longer is ungraded, not wrong
    warmup: int = 10               # optimizer steps of each stage over which lr rises linearly
    # the sampler: two engines with the same distribution, but different random numbers
    rollout: str = "torch"         # the engine in rollout.py, or "vllm" (requirements-gpu.txt)
    vllm_length: int = 16384       # most tokens of prompt plus completion; longer ones are dropped
    vllm_memory: float = 0.5       # vLLM's share of GPU memory while it samples, with its weights
    vllm_share: bool = False       # one engine per sp group (tensor parallelism), not per rank
    # evaluation and checkpoints
    eval_every: int = 20           # RL steps; also after the cold start and at the end; 0: never
    eval_samples: int = 256        # held-out samples, decoded greedily
    eval_frames: str = ""          # mode eval: also at these numbers of frames, "16,64,256"
    eval_budgets: str = ""         # mode eval: also at these thinking budgets, "0,48,64-96"
    pass_k: int = 0                # mode eval: pass@k of group_size answers; 0: k = group_size
    show_every: int = 20           # RL steps between two completions on the screen; 0: never
    save_every: int = 40           # steps; also at the end of each stage
    tensorboard: bool = False      # also write out_dir/tensorboard, after pip install tensorboard


# --------------------------------------------------------------------------------------------------
# RL

def reinforce(run, stage, by_id, held_out):
    """GRPO with a curriculum (RLCS) on vision tokens that are encoded once (MR-SP).

    by_id: {id: `Sample`} to train on; held_out: samples to evaluate on.
    """
    c, ranks, curriculum = run.config, run.ranks, stage.curriculum
    for step in stage:
        clock, meter = Clock(), Meter()

        # 1. Draw. More questions than we train on, since some groups will teach nothing; recent
        #    steps decide how many more (RLCS). Team r takes questions r, r + dp, r + 2 dp, ...
        asked = curriculum.expanded(c.prompts_per_step, batches.draw_multiple(c, ranks))
        drawn = [by_id[id] for id in curriculum.draw(asked)]
        recording = stage.recording(step, drawn)           # for out/rollouts.jsonl

        # 2. Encode. A video's frames are split over the sp ranks, encoded once, gathered and kept:
        #    the same vision tokens serve all G completions and the training below (MR-SP, stage 1).
        with clock("encode"):
            groups = encode_questions(run, stage, drawn)
        if step + 1 < c.rl_steps:          # meanwhile threads decode what will likely be drawn next
            data.read_ahead(run, [by_id[id] for id in curriculum.peek(asked)])

        # 3. Roll out. G completions over one shared prefix. One that thinks too long gets
        #    </think><answer> written for it: forced tokens are not sampled and carry no loss.
        with clock("rollout"):
            completions = rollout(
                run.model, run.tokenizer, [group.prompt for group in groups],
                completion_keys(c, step, groups, drawn), ranks, max_tokens=c.max_tokens,
                stage2=c.stage2, engine=run.engine,
                fetch=partial(fetch_in_rounds, run, data.fetch), **budgets(c))

        # 4. Verify. A reward for each completion; its advantage is how far it is above its group.
        with clock("verify"):
            groups, ungraded = verify(run, groups, completions)
        for group in groups:
            totals = torch.tensor([reward.total for reward in group.rewards])
            group.advantages = grpo.advantages(totals)                                       # [G]

        # 5. Keep. A group whose accuracies are all equal teaches nothing. Of the others keep those
        #    nearest to half right, and tell the curriculum about all groups.
        facts = merged({group.slot: describe(group) for group in groups}, ranks)   # of all groups
        accuracies = {slot: [x["accuracy"] for x in facts[slot]] for slot in sorted(facts)}  # [G]
        for slot, group_accuracies in accuracies.items():
            curriculum.update(drawn[slot].id, sum(group_accuracies), len(group_accuracies))
        with_signal = sum(map(has_signal, accuracies.values()))
        capped = curriculum.note_valid(with_signal, len(accuracies), c.oversample_cap)
        kept = balanced(accuracies, c.prompts_per_step)                                    # slots
        metrics.warn_of_shortage(run, step, len(kept), with_signal, len(accuracies), capped)
        recording.choose(groups, facts, kept, ungraded, data.open_video)

        # 6. Learn. Each update has groups of its own, dealt out so that all ranks do equal work
        #    (GLM-4.1V §5.4). Its loss is divided by what the update has over all ranks.
        norms, balance, skipped = [], [], 0
        with clock("train"):
            for part in batches.split(kept, c.updates_per_rollout):
                destination, imbalance = deal_groups(batches.token_counts(part, facts), ranks)
                mine = send_groups(groups, destination, ranks, partial(data.fetch, run),
                                   partial(store_received, run, drawn))
                divisor = loss_divisor(part, facts, c)
                for batch in batches.micro_batches(mine, c.max_tokens, run):
                    prompts = data.fetch(run, batch.prompts)       # from the cache: MR-SP's reuse
                    logprobs, entropy = vlm.logprobs(run.model, prompts, batch.tokens, run.banned,
                                                     ranks=batches.sharers(c, ranks))
                    loss, counts = grpo.policy_loss(
                        logprobs, batch.old_logprobs, batch.advantages, batch.sampled,
                        c.clip_low, c.clip_high, c.loss_average, divisor)
                    loss.backward()
                    meter.add(batch, logprobs, entropy, counts)
                    recording.add(batch, logprobs, entropy)
                meter.end_update(ranks, c.stage2)
                metrics.check_gap(meter.sampler_gap()[0], c.dtype)     # of the step's first update
                n = step * c.updates_per_rollout + len(norms)
                lr = c.lr * warmed_up(n, c.warmup)
                norms.append(update(run.model, stage.optimizer, lr, ranks))
                skipped += stage.count_skipped(norms[-1])
                balance.append(imbalance)

        # 7. Log, evaluate, save.
        values = metrics.summary(facts, drawn, meter, clock)
        gap, gap_max = meter.sampler_gap()
        values |= {"valid_groups": len(kept), "oversample": asked / c.prompts_per_step,
                   "invalid_rate": 1 - with_signal / len(accuracies) if accuracies else 0.0,
                   "sampler_gap": gap, "sampler_gap_max": gap_max, "skipped": skipped,
                   "dropped": len(curriculum.dropped), "unscored": len(ungraded),
                   "balance": mean(balance) if balance else 1.0, "grad_norm": mean(norms)}
        metrics.show(run, step, groups, ungraded)
        recording.write()
        if c.eval_every and ((step + 1) % c.eval_every == 0 or step + 1 == c.rl_steps):
            values |= evaluate.for_the_log(run, held_out, f"RL {step + 1}")
        stage.log(step, metrics.one_line(values, asked), **values)
        stage.save_if_due(step)


def encode_questions(run, stage, drawn):
    """This team's share of the questions drawn, as `Group`s that have only a prompt yet."""
    c, ranks = run.config, run.ranks
    slots = range(ranks.dp_rank, len(drawn), ranks.dp)
    prompts, dropped = data.make_prompts(run, [drawn[slot] for slot in slots],
                                         room(run.tokenizer, **budgets(c)))
    slots = [slot for slot in slots if drawn[slot].id not in dropped]
    prompts = [(sample, prompt) for sample, prompt in prompts if sample.id not in dropped]
    stage.drop(merged(dropped, ranks))
    return [Group(slot, sample, prompt) for slot, (sample, prompt) in zip(slots, prompts)]


def verify(run, groups, completions):
    """Attach completions and rewards to their groups. -> the graded ones, {id: why not graded}

    Where a verifier failed the answers are not known to be wrong: the group is left out. One rank
    asks for all sp ranks, since a verifier may be a model.
    """
    def ask():
        pairs = [(group.sample, answers) for group, answers in zip(groups, completions)]
        return judges.grade(pairs, run.config, rewards.score, rewards.VerifierError)

    graded, ungraded = [], {}
    for group, answers, (verdict, why) in zip(groups, completions, on_first(ask, run.ranks)):
        if why:
            ungraded[group.sample.id] = why
        else:
            group.completions, group.rewards = answers, verdict
            graded.append(group)
    return graded, merged(ungraded, run.ranks)


def describe(group):
    """What all ranks learn about a group: a dict for each of its completions."""
    rows = []
    for completion, reward in zip(group.completions, group.rewards):
        rows.append({
            "reward": reward.total, "accuracy": reward.accuracy, "format": reward.format,
            "length": len(completion.tokens), "sampled": int(completion.sampled.sum()),
            "forced": completion.forced, "truncated": completion.truncated,
            "answer": rewards.extract_answer(completion.text), "prefix": len(group.prompt.ids)})
    return rows


def loss_divisor(slots, facts, c):
    """What an update's loss is divided by: its completions, or with loss_average=token its sampled
    tokens."""
    if c.loss_average == "sample":
        return len(slots) * c.group_size
    return sum(x["sampled"] for slot in slots for x in facts[slot])


# --------------------------------------------------------------------------------------------------
# cold start

def cold_start(run, stage, by_id, held_out, tower_trains):
    """Next-token loss on a teacher's thoughts and answers, so that RL has a format to begin with.

    tower_trains: the vision tower, randomly initialised, trains too, until this stage ends.
    """
    c, ranks, curriculum = run.config, run.ranks, stage.curriculum
    for step in stage:
        start_time = time.perf_counter()
        samples = [by_id[id] for id in curriculum.draw(c.sft_batch)]
        if tower_trains:
            mine = samples[ranks.rank::ranks.world]
            batch = toy.encode_with_gradient(run, mine, data.open_video)
            stage.drop(merged(batch.dropped, ranks))
            loss = teach(run, batch.prompts, taught_texts(c, batch.prompts))
            batch.backward()
        else:                              # the sp ranks encode together; each trains on its part
            prompts, dropped = data.make_prompts(run, samples[ranks.dp_rank::ranks.dp],
                                                 room(run.tokenizer, **budgets(c)))
            prompts = fetch_own(run, data.fetch, prompts)
            stage.drop(merged(dropped, ranks))
            if step + 1 < c.sft_steps:
                data.read_ahead(run, [by_id[id] for id in curriculum.peek(c.sft_batch)])
            loss = teach(run, prompts, taught_texts(c, prompts), c.stage2)
        lr = c.sft_lr * warmed_up(step, c.warmup) * falling(step, c.sft_steps)
        norm = update(run.model, stage.optimizer, lr, ranks)
        stage.log(step, f"loss {loss:.3f}", loss=loss, grad_norm=norm,
                  skipped=stage.count_skipped(norm), dropped=len(curriculum.dropped),
                  train_s=time.perf_counter() - start_time)
        if step + 1 == c.sft_steps:
            run.model.model.visual.requires_grad_(False)
            values = evaluate.for_the_log(run, held_out, f"cold start {c.sft_steps}")
            if values:
                stage.progress.log.write("sft", c.sft_steps, **values)
        stage.save_if_due(step)


def taught_texts(c, prompts):
    return [data.taught_text(sample, c.think_budget > 0) for sample, _ in prompts]


def teach(run, prompts, texts, stage2=False):
    """Backward of the mean of -log p over all tokens of the step on all ranks; `update` sums the
    gradients. prompts: [(`Sample`, `Prompt`)], texts: one for each. -> the loss"""
    c, ranks = run.config, run.ranks
    end = vlm.stop_ids(run.model, run.tokenizer)[:1]
    groups = batches.taught_groups(run.tokenizer, prompts, texts, end)
    # With stage 2 each sp rank has the loss of all tokens of its group.
    share = 1 / ranks.sp if stage2 else 1
    mine = sum(len(group.completions[0].tokens) for group in groups)
    total = sum(gather(mine, ranks)) * share
    sum_of_losses = 0.0
    for batch in batches.taught_batches(groups, c.max_tokens, run):
        logprobs, _ = vlm.logprobs(run.model, batch.prompts, batch.tokens, run.banned,
                                   ranks=ranks if stage2 else Ranks())                 # [N, L]
        loss = -(logprobs * batch.sampled).sum() / total
        loss.backward()
        sum_of_losses += float(loss.detach()) * share
    return sum(gather(sum_of_losses, ranks))


# --------------------------------------------------------------------------------------------------
# the run

def main(c):
    if c.mode in ("eval", "grade"):
        return evaluate.main(evaluation(c))
    ranks = start(c.sp, command_line.to_compare(c))
    command_line.check_training(c, ranks)
    if c.rollout == "vllm":
        import_vllm()                      # not found: say so now, not after the cold start
    say = printer(ranks)
    for field in fields(Config):
        if getattr(c, field.name) != field.default:
            say(f"{field.name} = {getattr(c, field.name)}")
    samples, held_out, grades = questions_and_grades(c, say)
    by_id = {sample.id: sample for sample in samples}
    mixture = shares(c.mixture, samples)
    cache = encode.Cache(c.cache_gb * 2 ** 30, c.cache_dir, tqdm.write)

    sharded = c.fsdp and ranks.world > 1
    progress = Progress(c, ranks, mmap=sharded)
    taught = [sample.id for sample in samples if sample.thought]
    say(plan(c, ranks, progress, taught))
    run = load_run(c, ranks, say, cache, progress.checkpoint)
    try_saving(run)                        # what cannot be saved: say so now, not after the start

    # Only a randomly initialised tower trains, and only until the cold start has ended.
    from_nothing = c.model == "tiny"
    run.model.model.visual.requires_grad_(from_nothing)
    if from_nothing and progress.done["align"] < c.align_steps:
        curriculum = Curriculum([], f"{c.seed} align")     # align draws no samples
        stage = Stage("align", c.align_steps, c.sft_lr, curriculum, run, progress)
        toy.align(run, stage, teach, toy.parse_parts(c.data))
    if progress.done["sft"] < c.sft_steps and not taught:
        say("sft: skipped, no sample has a thought to learn from")
    elif progress.done["sft"] < c.sft_steps:
        curriculum = Curriculum(taught, f"{c.seed} sft")
        stage = Stage("sft", c.sft_steps, c.sft_lr, curriculum, run, progress)
        cold_start(run, stage, by_id, held_out, from_nothing)
    run.model.model.visual.requires_grad_(False)
    if from_nothing and sharded:
        shard_parameters(run.model, ranks)

    if progress.done["rl"] < c.rl_steps:
        curriculum = mixed(Curriculum, samples, mixture, f"{c.seed} rl", grades, c.tiers)
        stage = Stage("rl", c.rl_steps, c.lr, curriculum, run, progress)
        gc.collect()                       # matplotlib's cycles hold the cold start's optimizer
        saved = progress.checkpoint or any(progress.done.values())
        if c.rollout == "vllm" and from_nothing and not saved:
            progress.save(run, stage, 0)                   # vLLM starts from a directory
        run.engine = engine_of(c, newest(c.out_dir) or c.model, run.model, run.tokenizer, ranks)
        reinforce(run, stage, by_id, held_out)
    run.ahead.stop()
    measure = evaluation(c) if held_out else None
    say(what_next(c, ranks, held_out or samples, Options, measure))


def questions_and_grades(c, say):
    """-> samples to train on, samples to evaluate on, and grades {id: (correct, total)}"""
    samples, held_out = data.load_questions(c, say)
    if not samples:
        raise ValueError(f"{c.data}: all samples are held out, by a hash of their videos' names, "
                         "and none is left to train on: give more videos, or --eval_data, and "
                         "none is held out")
    say(f"{len(samples)} samples to train on, {len(held_out)} held out")
    grades = {}
    if c.grades:
        grades = read_grades(c.grades, samples if c.eval_data else held_out + samples)
    if not held_out:
        say("no sample is held out: nothing will be evaluated (give --eval_data, or more videos)")
    return samples, held_out[:c.eval_samples], grades


def load_run(c, ranks, say, cache, checkpoint):
    """The model of a checkpoint, or else c.model, and what goes with it. -> `Run`"""
    shard_now = c.fsdp and ranks.world > 1 and c.model != "tiny"
    name = lora.initial_weights(c, checkpoint)
    model, tokenizer = vlm.load(name, "cpu" if shard_now else ranks.device,
                                getattr(torch, c.dtype), c.max_pixels, c.seed)
    lora.adapt(model, c, checkpoint)
    if c.stage2:
        check_heads(model.config.text_config, ranks)
    if shard_now:
        shard_parameters(model, ranks)
    if c.checkpointing:
        recompute_layers(model)
    ahead = Ahead(data.open_video, c.frames)
    return Run(c, ranks, say, model, tokenizer, vlm.banned_ids(model, tokenizer), cache, ahead)


def evaluation(c):
    """The options of evaluate.py that --mode=eval and --mode=grade stand for."""
    names = {field.name for field in fields(evaluate.Config)} - {"grade"}
    return evaluate.Config(**{name: getattr(c, name) for name in names}, grade=c.mode == "grade")


def parse(arguments):
    """--key=value arguments -> `Config`"""
    return command_line.parse(Config, __doc__, arguments)


if __name__ == "__main__":
    run_command("train.py", lambda: main(parse(sys.argv[1:])))
