"""python -m pytest tests/test_train.py -q

Whole runs: one rank and two, what a step trains on, bad data, and starts that cannot work. This
file, run as a script by torchrun, is what each of two ranks does.
"""
import math
import os
import shutil
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from runs import (
    ALONE,
    ENV,
    LAST,
    ROOT,
    SHORT,
    SMALL,
    TRAIN,
    alike,
    alone,
    close,
    ended,
    flags,
    launched,
    learn,
    metrics,
    one_clear_line,
    question,
    refused,
    rollouts,
    run_of,
    same,
    script,
    state,
    summed_gradient,
    torchrun,
    two_ranks,
    visits,
    weights,
    write,
)

import data
import grpo
import model as vlm
import rewards
import toy
import train
from flow import Group
from plumbing import batches
from plumbing.fetching import fetch_in_rounds, fetch_own
from plumbing.ranks import gather, leave, merged, start
from rollout import room

# --------------------------------------------------------------------------------------------------
# one rank and two

def one_step_of_each_kind(ranks, checkpoint, questions):
    """Align, cold start and RL on batches that are the same whatever the ranks.
    -> {name: (number, ..., norm, gradient)}"""
    out = {}
    for name, step in (("align", align_step), ("sft", sft_step)):
        run = new_run(ranks, "tiny" if name == "align" else checkpoint)
        out[name] = step(run, questions), *summed_gradient(run.model, ranks)
    for name in ("sample", "token"):
        run = new_run(ranks, checkpoint, loss_average=name)
        numbers = rl_step(run, questions)
        out[name] = *numbers, *summed_gradient(run.model, ranks)
    return out


def new_run(ranks, checkpoint, **how):
    model, tokenizer = vlm.load(checkpoint, seed=3)
    model.model.visual.requires_grad_(checkpoint == "tiny")
    return run_of(model, tokenizer, ranks, frames=8, **how)


def prompts_of(run, questions):
    """Of this team's part of five questions."""
    samples = data.load(questions)[:5]
    c, ranks = run.config, run.ranks
    most = room(run.tokenizer, c.think_budget, c.answer_budget)
    prompts, dropped = data.make_prompts(run, samples[ranks.dp_rank::ranks.dp], most)
    assert not dropped
    return prompts


def align_step(run, _):
    samples = [toy.make_description(5, i, 1.0) for i in range(5)]      # the ranks' shares differ
    mine = samples[run.ranks.rank::run.ranks.world]
    batch = toy.encode_with_gradient(run, mine, data.open_video)
    loss = train.teach(run, batch.prompts, [sample.thought for sample, _ in batch.prompts])
    batch.backward()
    return loss


def sft_step(run, questions):
    share = fetch_own(run, data.fetch, prompts_of(run, questions))
    texts = [data.taught_text(sample) + "so " * int(sample.id[1:])     # of different lengths
             for sample, _ in share]
    return train.teach(run, share, texts)


def rl_step(run, questions):
    """-> tokens of all completions, sums of metrics"""
    c, ranks = run.config, run.ranks
    prompts = prompts_of(run, questions)
    keys = [[(0, 0, sample.id, n) for n in range(c.group_size)] for sample, _ in prompts]
    completions = train.rollout(run.model, run.tokenizer, [prompt for _, prompt in prompts], keys,
                                ranks, fetch=partial(fetch_in_rounds, run, data.fetch),
                                think_budget=8, answer_budget=6)
    advantages = grpo.advantages(torch.tensor([1.0, 0, 0.1, 0.3]))
    groups = [Group(slot, sample, prompt, answers, None, advantages)
              for slot, ((sample, prompt), answers) in enumerate(zip(prompts, completions))]
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():                                  # off the sampler, so that the clip acts
        for p in run.model.parameters():
            p.add_(torch.randn(p.shape, generator=noise) * 0.01)
    tokens = merged({group.sample.id: [x.tokens.tolist() for x in group.completions]
                     for group in groups}, ranks)
    divisor = 5 * c.group_size
    if c.loss_average == "token":
        sampled = sum(int(x.sampled.sum()) for group in groups for x in group.completions)
        divisor = sum(gather(sampled, ranks)[::ranks.sp])
    return {id: tokens[id] for id in sorted(tokens)}, learn(run, groups, divisor)


def worker(checkpoint, questions, folder, *arguments):
    """What each of two ranks does, with sp = 2 and with sp = 1: the steps above, then two steps of
    RL by train.main, and grading. At last the sequence sharded too, in a run that begins with that
    checkpoint."""
    for sp in (2, 1):
        ranks = start(sp)
        result = one_step_of_each_kind(ranks, checkpoint, questions)
        if ranks.rank == 0:
            torch.save(result, os.path.join(folder, f"steps{sp}.pt"))
        train.main(train.parse([*arguments, f"--sp={sp}", f"--out_dir={folder}/out{sp}"]))
        graded = flags(mode="grade", model=checkpoint, sp=sp, out_dir=f"{folder}/graded{sp}")
        train.main(train.parse([*arguments, *graded]))
    sharded = flags(**SHORT, model=checkpoint, sp=2, stage2="true", out_dir=f"{folder}/sharded")
    train.main(train.parse([*arguments, *sharded]))
    leave()


@pytest.fixture(scope="module")
def ranks(run, files, tmp_path_factory):
    """What two ranks and one made of the same."""
    folder = tmp_path_factory.mktemp("ranks")
    for name in ("out0", "out1", "out2"):
        shutil.copytree(run.dir, folder / name, symlinks=True)
    more = flags(**{**run.how, "rl_steps": 9, "eval_every": 2})
    two = launched(run.model, files.data, str(folder), *more, script=os.path.abspath(__file__))
    steps = one_step_of_each_kind(ALONE, run.model, files.data)
    train.main(train.parse([*more, f"--out_dir={folder / 'out0'}"]))
    graded = flags(mode="grade", model=run.model, out_dir=folder / "graded0")
    train.main(train.parse([*more, *graded]))
    two = ended(two)
    assert two.code == 0, two.err
    return SimpleNamespace(folder=folder, alone=steps, sp1=torch.load(folder / "steps1.pt"),
                           sp2=torch.load(folder / "steps2.pt"))


@pytest.mark.parametrize("sp", [2, 1])
def test_two_ranks_have_the_gradient_of_one(ranks, sp):
    """sp = 2: both work on each video; sp = 1: each on its own. A missing or extra factor of sp or
    dp is off by 2."""
    for name, expected in ranks.alone.items():
        got = getattr(ranks, f"sp{sp}")[name]
        error = float((got[-1] - expected[-1]).norm() / expected[-1].norm())
        assert error < 1e-5, (name, error)
        assert got[-2] == pytest.approx(expected[-2], rel=1e-5)        # the norm before the clip
        assert expected[-2] > 0.01
        if name in ("align", "sft"):
            assert got[0] == pytest.approx(expected[0], rel=1e-5)
        else:
            assert got[0] == expected[0]                   # token for token the same completions
            assert got[1] == pytest.approx(expected[1], rel=1e-4, abs=1e-5)
            assert expected[1]["clip_low"] + expected[1]["clip_high"] > 0


@pytest.mark.parametrize("sp", [2, 1])
def test_a_run_goes_on_the_same_with_other_ranks(ranks, sp):
    """Two more steps of RL: the same draws, answers and rewards; gradients, and what follows from
    them, to float error."""
    one, two = (metrics(ranks.folder / f"out{n}")[-2:] for n in (0, sp))
    assert sum(row["valid_groups"] for row in one) > 1
    close(one[:1], two[:1], 1e-5)
    close(one[1:], two[1:], 1e-3)
    assert [row["balance"] for row in one] == [1, 1]
    assert all(1 <= row["balance"] <= 2 / sp for row in two)
    one, two = (rollouts(ranks.folder / f"out{n}")[-2:] for n in (0, sp))
    if sp == 1:            # rank 0 shows what it has: the even slots
        for row in two:
            assert row["shown"] and all(group["slot"] % 2 == 0 for group in row.pop("shown"))
        for row in one:
            del row["shown"]
    alike(one, two, 1e-3)


@pytest.mark.parametrize("sp", [2, 1])
def test_two_ranks_write_the_grades_of_one(ranks, sp):
    one, two = ((ranks.folder / f"graded{n}" / "grades.jsonl").read_text() for n in (0, sp))
    assert one == two and one.count("\n") == 12


def test_a_sharded_sequence_changes_nothing(ranks, short, short_dir):
    """Stage 2: cold start and RL with the sequence of each group cut in two."""
    sharded = metrics(ranks.folder / "sharded")
    close(short[:1], sharded[:1], 1e-5)
    close(short, sharded, 1e-3)
    alike(rollouts(short_dir), rollouts(ranks.folder / "sharded"), 1e-3)


# --------------------------------------------------------------------------------------------------
# one step

@pytest.mark.method
def test_the_loss_taught_is_the_mean_over_the_tokens_of_the_step_and_the_end_token_is_taught():
    model, tokenizer = vlm.load("tiny", seed=3)
    model.model.visual.requires_grad_(False)
    run = run_of(model, tokenizer)
    samples = [data.Sample(str(i), "Heads? A. yes B. no", "A", "choice", f"toy:{i}:1", "so")
               for i in range(3)]
    prompts = fetch_own(run, data.fetch, data.make_prompts(run, samples, 40)[0])
    texts = ["<think>so</think><answer>A</answer>", "<think>" + "so " * 9, "no"]
    sums, n = 0.0, 0
    for (_, prompt), text in zip(prompts, texts):
        end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        tokens = torch.tensor(tokenizer(text).input_ids + [end])
        with torch.no_grad():
            logprobs, _ = vlm.logprobs(model, [prompt], [[tokens]], run.banned)
        sums, n = sums - float(logprobs.sum()), n + len(tokens)
    for most in (1, 16384):
        run.config.max_tokens = most
        assert train.teach(run, prompts, texts) == pytest.approx(sums / n, rel=1e-5)


@pytest.mark.parametrize("average", ["sample", "token"])
def test_the_helper_of_these_tests_learns_as_the_loop_does(run, tmp_path, monkeypatch, average):
    """`runs.learn` repeats part 6 of the RL loop: of the same groups it makes the same gradient and
    the same sums, bit for bit."""
    received, meters, compared = [], [], []
    tokenizer = vlm.load(run.model)[1]
    real_send, real_update, real_meter = train.send_groups, train.update, train.Meter

    def send_groups(*arguments):
        received.append(real_send(*arguments))
        return received[-1]

    def make_meter():
        meters.append(real_meter())
        return meters[-1]

    def update(model, optimizer, lr, ranks):
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad(set_to_none=True)
        completions = [x for group in received[-1] for x in group.completions]
        divisor = len(completions)
        if average == "token":
            divisor = sum(int(x.sampled.sum()) for x in completions)
        sums = learn(run_of(model, tokenizer, ranks, **clip), received[-1], divisor)
        again = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        assert same(gradients, again)
        assert sums == meters[-1].updates[-1]
        compared.append(sums)
        return real_update(model, optimizer, lr, ranks)

    monkeypatch.setattr(train, "send_groups", send_groups)
    monkeypatch.setattr(train, "Meter", make_meter)
    monkeypatch.setattr(train, "update", update)
    clip = {"clip_low": 0.01, "clip_high": 0.02, "loss_average": average}      # narrow: it acts
    alone(**{**run.how, **clip, "model": run.model, "sft_steps": 0, "rl_steps": 3, "eval_every": 0,
             "out_dir": tmp_path / "out"})
    assert len(compared) > 2
    for key in ("tokens", "clip_low", "clip_high"):
        assert sum(sums[key] for sums in compared) > 0, key


def unanswerable(i):
    return question(i, answer="zebra", domain="open")


def test_a_step_without_signal_is_skipped_and_says_so(run, tmp_path, capsys):
    """No answer is "zebra": all are equally wrong, some better in form. Form alone is no signal: no
    bit of the weights moves."""
    path = write(tmp_path / "q.jsonl", *[unanswerable(i) for i in range(6)])
    out = str(tmp_path / "out")
    alone(**{**run.how, "model": run.model, "data": path, "sft_steps": 0, "rl_steps": 2,
             "out_dir": out})
    assert same(weights(out), weights(run.dir))
    said, rows = capsys.readouterr().out, metrics(out, "rl")
    for row in rows:
        for key in ("valid_groups", "accuracy", "grad_norm", "skipped"):
            assert row[key] == 0, key
        assert f"RL {row['step']}: no group has answers that differ in accuracy" in said
    assert len(rows) == 2
    assert 0 < sum(row["format"] for row in rows) < 2      # so that rewards did differ
    for row in rollouts(out):
        assert {group["fate"] for group in row["groups"]} == {"no signal"}
        [shown] = row["shown"]
        assert shown["slot"] == 0 and shown["update"] is None
        assert all(x["new"] is x["entropy"] is None for x in shown["completions"])


def test_a_step_all_of_whose_videos_are_bad_is_empty_and_the_run_goes_on(run, tmp_path, capsys):
    path = write(tmp_path / "q.jsonl", question(0), question(1, id="gone", video="missing.mp4"))
    out = str(tmp_path / "out")
    how = {**run.how, "model": run.model, "data": path, "sft_steps": 0, "rl_steps": 3,
           "prompts_per_step": 1, "oversample_cap": 1, "out_dir": out}
    alone(**how)
    rows, said = metrics(out, "rl"), capsys.readouterr().out
    assert rows[-1]["dropped"] == 1
    assert sum(row["length"] == 0 for row in rows) == 1
    assert said.count("dropped gone: ") == 1
    empty = [row for row in rollouts(out) if not row["shown"]]
    [group] = empty[0]["groups"]
    assert len(empty) == 1 and group["fate"] == "dropped" and "missing.mp4" in group["why"]
    assert group["accuracies"] == []
    write(tmp_path / "q.jsonl", question(1, id="gone", video="missing.mp4"))
    refused({**how, "out_dir": f"{out}-none"}, "no sample is left")


# --------------------------------------------------------------------------------------------------
# curriculum sampling

def test_as_many_more_are_asked_as_the_last_steps_say(run):
    """The logged ratio is the average, as the invalid rates of the steps before set it, of an even
    number of prompts. What rounding up adds at one step is subtracted at the next."""
    ratio, surplus, n = 1.0, 0.0, SMALL["prompts_per_step"]
    rows = metrics(run.dir, "rl")
    for row in rows:
        wanted = n * ratio - surplus
        assert row["oversample"] == 2 * math.ceil((wanted - 0.01) / 2) / n
        surplus = max(0.0, n * row["oversample"] - wanted)
        signal = (1 - row["invalid_rate"]) * n * row["oversample"]
        assert row["valid_groups"] <= round(signal)
        ratio += 0.1 * (min(8, 1 / max(1e-9, 1 - row["invalid_rate"])) - ratio)
    assert state(run.dir)["curriculum"]["ratio"] == pytest.approx(ratio)
    assert ratio > 1
    assert any(row["oversample"] > 1 for row in rows)


@pytest.mark.parametrize("cap", [4.0, 1.0])
def test_a_step_trains_on_the_balanced_groups_and_notes_them_all(run, tmp_path, monkeypatch,
                                                                 capsys, cap):
    """Half of the questions have no right answer. Kept are at most prompts_per_step groups, all
    others are noted too; what the cap does to the ratio is said; with a cap of 1 nothing is asked
    beyond prompts_per_step, and nothing is said."""
    trained, out, real = [], str(tmp_path / "out"), batches.micro_batches

    def micro_batches(groups, *rest):
        trained.append([group.sample.id for group in groups])
        return real(groups, *rest)

    monkeypatch.setattr(batches, "micro_batches", micro_batches)
    path = write(tmp_path / "q.jsonl", *map(unanswerable, range(9)),
                 *[question(i, answer="A") for i in range(9, 12)])
    alone(**{**run.how, "model": run.model, "data": path, "sft_steps": 0, "rl_steps": 6,
             "eval_every": 0, "prompts_per_step": 2, "updates_per_rollout": 1,
             "oversample_cap": cap, "out_dir": out})
    rows, said = metrics(out, "rl"), capsys.readouterr().out
    more = max(row["oversample"] for row in rows) > 1
    assert more == (cap > 1) == ("groups to learn from, 2 wanted" in said)
    over_cap = any(row["invalid_rate"] > 0.75 for row in rows)
    assert ("oversample_cap = 4 times as many" in said) == (cap > 1 and over_cap)
    assert [len(ids) for ids in trained] == [
        row["valid_groups"] for row in rows if row["valid_groups"]]
    assert max(map(len, trained)) <= 2
    assert not {f"q{i}" for i in range(9)} & set(sum(trained, []))
    fates = [{group["id"]: group["fate"] for group in row["groups"]} for row in rollouts(out)]
    kept = [[id for id in fate if fate[id] == "kept"] for fate in fates]
    assert [ids for ids in kept if ids] == trained
    cut = ["cut by balance" in fate.values() for fate in fates]
    assert cut == [round((1 - row["invalid_rate"]) * 2 * row["oversample"]) > row["valid_groups"]
                   for row in rows]
    assert visits(state(out)["curriculum"]) == 2 * sum(row["oversample"] for row in rows)


# --------------------------------------------------------------------------------------------------
# the other sampler, as far as it needs no vLLM: the rest is tests/test_vllm.py

def test_prompts_that_vllm_makes_no_room_for_are_dropped_and_counted(run):
    model, tokenizer = vlm.load(run.model)
    samples = data.load(run.how["data"])[:2]
    budgets = run.how["think_budget"], run.how["answer_budget"]

    def prompts(**how):
        other = run_of(model, tokenizer, **how)
        return data.make_prompts(other, samples, room(tokenizer, *budgets))

    fitting, _ = prompts(rollout="vllm")
    most = len(fitting[0][1].ids) + room(tokenizer, *budgets)
    assert len(prompts(rollout="vllm", vllm_length=most)[0]) >= 1
    assert len(prompts(vllm_length=1)[0]) == 2             # of the torch engine it is no bound
    _, dropped = prompts(rollout="vllm", vllm_length=most - 1)
    assert f"do not fit vllm_length = {most - 1}" in dropped[samples[0].id]


@pytest.mark.parametrize("module, says", [
    (None, "needs vLLM 0.32.0: pip install"),
    (SimpleNamespace(__version__="0.31.2"), "0.31.2 is installed")])
def test_without_the_right_vllm_a_run_ends_before_it_begins(monkeypatch, tmp_path, module, says):
    monkeypatch.setitem(sys.modules, "vllm", module)
    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_CPU_OMP_THREADS_BIND",
                 "VLLM_CPU_KVCACHE_SPACE", "VLLM_LOGGING_LEVEL"):
        monkeypatch.setenv(name, os.environ.get(name, "0"))            # set is unset afterwards
    refused(dict(rollout="vllm", out_dir=str(tmp_path / "out")), says)
    assert not (tmp_path / "out").exists()


def test_nothing_of_vllm_or_tensorboard_is_imported_unless_asked_for():
    code = ("import sys, train, rollout, bench; optional = 'vllm', 'tensorboard'; "
            "print([name for name in sys.modules if name.startswith(optional)])")
    result = subprocess.run([sys.executable, "-c", code], env=ENV, capture_output=True, text=True,
                            cwd=ROOT)
    assert result.stdout == "[]\n"


# --------------------------------------------------------------------------------------------------
# verifiers of one's own

JUDGE = """
def judge(predicted, answer):
    if not predicted.strip():
        raise RuntimeError("nothing to judge")
    return 0.25 if predicted.strip() == answer else 0.75

def strict(predicted, answer):
    raise ConnectionError("the judge does not answer")
"""


def test_a_verifier_of_ones_own_grades_and_where_it_fails_samples_are_ungraded_and_counted(
        run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(rewards, "VERIFIERS", dict(rewards.VERIFIERS))
    (tmp_path / "mine.py").write_text(JUDGE)
    kind = [question(i, domain="kind") for i in range(4)]
    hard = [question(i, id=f"hard{i}", domain="hard") for i in range(4, 6)]
    path = write(tmp_path / "q.jsonl", *kind, *hard)
    how = {**run.how, "model": run.model, "data": path, "eval_data": path, "sft_steps": 0,
           "rl_steps": 2, "eval_every": 2, "out_dir": str(tmp_path / "out"),
           "verifiers": f"kind={tmp_path}/mine.py:judge,hard={tmp_path}/mine.py:strict"}
    alone(**how)
    said, rows = capsys.readouterr().out, metrics(how["out_dir"], "rl")
    assert "not graded hard4: domain 'hard': ConnectionError: the judge does not answer" in said
    assert sum(row["unscored"] for row in rows) >= 2
    assert rows[-1]["dropped"] == 0, "it is asked again: the judge may be back"
    for row, recorded in zip(rows, rollouts(how["out_dir"])):
        failed = [group for group in recorded["groups"] if group["fate"] == "not graded"]
        assert len(failed) == row["unscored"]
        assert all(group["why"] and group["accuracies"] == [] for group in failed)
    for row in rows:
        if row["length"]:
            assert row["accuracy"] in (0, 0.25, 0.75) or 0.2 < row["accuracy"] < 0.8
    for wrong, says in (("kind", "is not domain="),
                        ("kind=nowhere.py:judge", "nowhere.py:judge"),
                        (f"kind={tmp_path}/mine.py:gone", "gone")):
        refused({**how, "verifiers": wrong, "out_dir": str(tmp_path / "other")}, says)


# --------------------------------------------------------------------------------------------------
# bad input: one clear line, on every rank, and soon

@pytest.fixture(scope="module")
def bad_runs(run):
    """Refused before the ranks know one another, while they meet, and after; the last by torchrun's
    own command."""
    other = {**run.how, "out_dir": run.dir, "seed": 1, "lr": 0.5}
    started = {"key": launched(*flags(**run.how), "--group_sise=8"),
               "sp": launched(*flags(**run.how), "--sp=3"),
               "other": torchrun(*flags(**other))}
    return {name: ended(process) for name, process in started.items()}


def test_two_ranks_end_with_one_clear_line(run, bad_runs):
    one_clear_line(bad_runs["key"], "unknown option 'group_sise'", "group_size")
    one_clear_line(bad_runs["sp"], "sp = 3 does not divide the 2 ranks")
    one_clear_line(bad_runs["other"], "another configuration", "seed = 0 there, 1 here",
                   "lr = 0.0003 there, 0.5 here", "--out_dir")
    assert os.readlink(run.model) == f"ckpt-{LAST}"


SLOW_READER = f"""
import runpy, sys, time
sys.path.insert(0, {ROOT!r})
import torch.distributed as dist

class Slow:
    def __init__(self, store):
        self.store = store

    def get(self, key):
        time.sleep(3)
        return self.store.get(key)

    def __getattr__(self, name):
        return getattr(self.store, name)

def rendezvous(*arguments, **how):
    store, rank, world = next(real(*arguments, **how))
    yield Slow(store) if rank else store, rank, world

real, dist.rendezvous = dist.rendezvous, rendezvous
sys.argv[0] = "train.py"
runpy.run_path({TRAIN!r}, run_name="__main__")
"""


def test_an_sp_that_does_not_divide_ends_every_rank_where_rank_0_hosts_the_store(run, tmp_path):
    """Rank 0 ended at once, and took the store with it in which a slower rank was still reading:
    that one died of a broken connection. Without torchrun the store is rank 0's own."""
    (tmp_path / "slow.py").write_text(SLOW_READER)
    arguments = flags(**run.how, sp=3, out_dir=tmp_path / "out")
    for process in two_ranks(arguments, script=str(tmp_path / "slow.py")):
        one_clear_line(ended(process, 120), "sp = 3 does not divide the 2 ranks",
                       "--nproc_per_node")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def bad_starts(tmp_path):
    """(hyperparameters, words that the line has) of starts that cannot work."""
    (tmp_path / "model").mkdir()
    (tmp_path / "file").write_text("")
    empty = write(tmp_path / "empty.jsonl")
    broken = write(tmp_path / "broken.jsonl", question(0))
    with open(broken, "a") as f:
        f.write("{oops\n")
    without_answer = question(1)
    del without_answer["answer"]
    missing = write(tmp_path / "missing.jsonl", question(0), without_answer)
    hollow = write(tmp_path / "hollow.jsonl", question(0), question(1), question(2, question=" "))
    no_model = str(tmp_path / "model")
    return [
        (dict(rl_steps="x"), "rl_steps must be an integer"),
        (dict(sp=3), "sp = 3 does not divide the 1 ranks"),
        (dict(group_size=1), "group_size = 1"),
        (dict(data=empty), empty, "no samples"),
        (dict(data=broken), f"{broken}, line 2: not JSON"),
        (dict(data=missing), f"{missing}, line 2: no 'answer'"),
        (dict(data=hollow), f"{hollow}, line 3: an empty 'question'"),
        (dict(eval_data=broken), f"{broken}, line 2"),
        (dict(data=str(tmp_path / "no.jsonl")), "no.jsonl: no such file"),
        (dict(out_dir=str(tmp_path / "file")), "file"),
        (dict(cache_dir=str(tmp_path / "file")), "cache_dir", "not a folder"),
        (dict(model=no_model), f"{no_model} is no checkpoint"),
        (dict(mode="eval", model=no_model), "is no checkpoint")]


def test_a_bad_start_is_one_clear_line(files, tmp_path, monkeypatch, bad_starts):
    """What the runs above show for two ranks, for every other bad start in one process."""
    how = {**SMALL, "data": files.data, "eval_data": files.eval_data,
           "out_dir": str(tmp_path / "out")}
    for bad, *says in bad_starts:
        line = script(monkeypatch, *flags(**{**how, **bad}))
        assert isinstance(line, str) and line.startswith("train.py: ") and "\n" not in line, line
        assert all(words in line for words in says), line
    assert not os.path.exists(tmp_path / "out" / "model")


def test_a_model_that_is_nowhere_is_one_clear_line(files, tmp_path, monkeypatch):
    """transformers says it in several lines, and asks whether one is on the internet."""
    nowhere = str(tmp_path / "nowhere")
    how = {**SMALL, "data": files.data, "out_dir": tmp_path / "out", "model": nowhere}
    line = script(monkeypatch, *flags(**how))
    assert line.startswith("train.py: ") and nowhere in line and "\n" not in line, line


def nothing_is_logged(out):
    return not os.path.exists(out / "metrics.jsonl") or not metrics(out)


def test_a_domain_without_a_verifier_is_refused_before_training(run, tmp_path):
    """It was met at the first reward: after hours of align and cold start, whose last steps were
    lost."""
    path = write(tmp_path / "q.jsonl", *[question(i, domain="colour") for i in range(6)])
    out = tmp_path / "out"
    refused({**run.how, "data": path, "align_steps": 1, "sft_steps": 1, "out_dir": out}, "'colour'")
    assert nothing_is_logged(out)


def test_held_out_videos_that_are_all_bad_do_not_end_a_run_half_way(run, tmp_path):
    """The evaluation after the cold start found nothing to evaluate and ended the run, the cold
    start not yet saved.

    Refused at the start, or gone on without: either is fine.
    """
    path, out = write(tmp_path / "e.jsonl", question(1, video="missing.mp4")), tmp_path / "out"
    try:
        alone(**{**run.how, "model": run.model, "eval_data": path, "sft_steps": 1, "rl_steps": 1,
                 "out_dir": out})
    except ValueError:
        assert nothing_is_logged(out)
    else:
        assert len(metrics(out, "rl")) == 1


def test_a_bad_held_out_video_is_named(run, tmp_path, capsys):
    path = write(tmp_path / "e.jsonl", *map(question, range(50, 53)),
                 question(1, id="lost", video="missing.mp4"))
    alone(**{**run.how, "model": run.model, "eval_data": path, "sft_steps": 1, "rl_steps": 0,
             "out_dir": tmp_path / "out"})
    out = capsys.readouterr().out
    assert "(3 samples" in out and "missing.mp4" in out


def test_data_of_which_all_is_held_out_is_refused(tmp_path, monkeypatch):
    """The run said that no sample had a thought, trained on nothing and was done."""
    seed = 0
    while data.split([toy.make_sample(str(seed))])[0]:
        seed += 1
    how = {**SMALL, "data": write(tmp_path / "one.jsonl", question(seed)),
           "out_dir": tmp_path / "out"}
    line = script(monkeypatch, *flags(**how))
    assert "one.jsonl: all samples are held out" in line and "--eval_data" in line
    assert not (tmp_path / "out").exists()


if __name__ == "__main__":
    worker(*sys.argv[1:])
