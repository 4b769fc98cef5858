"""python -m pytest tests/test_command_line.py -q

The parser of all commands, and what is refused of the options of train.py and evaluate.py.
"""
import math
import os
from dataclasses import asdict, dataclass, field, fields

import pytest
from runs import ALONE, EVALUATE, TRAIN, command, flags, script

import evaluate
import train
from flow import Ranks
from plumbing.command_line import (
    OF_MACHINE,
    OTHER_NAMES,
    check_sampling,
    check_training,
    parse,
    to_compare,
)


@dataclass
class Options:
    name: str                                              # what it is called
    counts: list[int] = field(default_factory=lambda: [1, 2])
    share: float = 0.5


def refused_text(call, *arguments):
    """What the ValueError says, in one line."""
    with pytest.raises(ValueError) as e:
        call(*arguments)
    assert "\n" not in str(e.value)
    return str(e.value)


# --------------------------------------------------------------------------------------------------
# the parser

@pytest.mark.method
def test_every_hyperparameter_is_set_by_its_name_and_has_its_type():
    assert train.parse([]) == train.Config()
    c = train.parse(["--lr=1e-4", "--frames=7", "--data=a=b.jsonl", "--model=", "--clip_high=1",
                     "--seed=-0", "--frames=8"])
    assert (c.lr, c.frames, c.data, c.model) == (1e-4, 8, "a=b.jsonl", "")
    assert (c.clip_high, c.seed) == (1.0, 0) and type(c.clip_high) is float
    values = {int: ("41", 41), float: ("0.41", 0.41), str: ("x41", "x41"), bool: ("true", True)}
    for key, default in asdict(train.Config()).items():
        text, value = values[type(default)]
        expected = {**asdict(train.Config()), key: value}
        assert asdict(train.parse([f"--{key}={text}"])) == expected
        assert asdict(train.parse([f"--{key}", text])) == expected     # as two words
    promised = """model data eval_data video_dir out_dir mode seed sp frames align_steps sft_steps
        sft_batch rl_steps prompts_per_step group_size updates_per_rollout think_budget
        answer_budget lr sft_lr clip_low clip_high loss_average format_weight eval_every
        eval_samples save_every"""
    assert set(promised.split()) <= asdict(train.Config()).keys()


@pytest.mark.method
@pytest.mark.parametrize("text, value", [("true", True), ("True", True), ("FALSE", False)])
def test_a_bool_is_true_or_false_in_any_case(text, value):
    assert train.parse([f"--stage2={text}", "--tiers", text]).stage2 is value


@pytest.mark.method
def test_any_dataclass_will_do():
    assert parse(Options, "", ["--name=x"]) == Options("x", [1, 2], 0.5)
    assert parse(Options, "", ["--counts", "3", "--name", "-1", "--share=2"]) == Options(
        "-1", [3], 2.0)
    assert parse(Options, "", ["--name=x", "--counts=4,5,6"]).counts == [4, 5, 6]
    assert refused_text(parse, Options, "", ["--share=1"]) == "--name is missing"
    text = refused_text(parse, Options, "", ["--name=x", "--counts=4,x"])
    assert text == "--counts=x: counts must be an integer"


@pytest.mark.method
@pytest.mark.parametrize("argument, says", [
    ("--group_sise=8", "unknown option 'group_sise'; did you mean 'group_size'?"),
    ("--rl-steps=8", "unknown option 'rl-steps'; did you mean 'rl_steps'?"),
    ("--zzzz=8", "unknown option 'zzzz'; --help lists those there are"),
    ("--=8", "unknown option ''"),
    ("--rl_steps=many", "--rl_steps=many: rl_steps must be an integer"),
    ("--rl_steps=4.0", "--rl_steps=4.0: rl_steps must be an integer"),
    ("--rl_steps=", "--rl_steps=: rl_steps must be an integer"),
    ("--lr=fast", "--lr=fast: lr must be a number"),
    ("--rl_steps", "argument --rl_steps: expected one argument"),
    ("rl_steps=4", "'rl_steps=4': options are given as --key=value"),
    ("-rl_steps=4", "'-rl_steps=4': options are given as --key=value"),
    ("--stage2=yes", "--stage2=yes: stage2 must be true or false"),
    ("4", "'4': options are given as --key=value")])
def test_a_bad_argument_is_named(argument, says):
    assert says in refused_text(train.parse, ["--seed=1", argument])


@pytest.mark.method
@pytest.mark.parametrize("other", ["learning_rate", "num_generations", "max_completion_length",
                                   "epsilon_high", "gradient_checkpointing", "output_dir"])
def test_the_names_of_other_trainers_are_known(other):
    ours = OTHER_NAMES[other]
    for argument in ([f"--{other}=1"], [f"--{other}", "1"]):
        assert refused_text(train.parse, argument) == (
            f"unknown option {other!r}; here it is called {ours!r}")


@pytest.mark.method
def test_every_name_of_another_trainer_leads_to_one_of_ours():
    known = asdict(train.Config()).keys()
    assert set(OTHER_NAMES.values()) <= known
    assert not set(OTHER_NAMES) & known
    # What evaluate.py does not have is not offered there.
    text = refused_text(parse, evaluate.Config, "", ["--learning_rate=1"])
    assert "learning_rate" in text and "'lr'" not in text


# --------------------------------------------------------------------------------------------------
# help

@pytest.mark.parametrize("path, module", [(TRAIN, train), (EVALUATE, evaluate)],
                         ids=["train.py", "evaluate.py"])
@pytest.mark.parametrize("word", ["--help", "-h"])
def test_help_shows_every_option_with_its_comment_first_and_writes_nothing(
        monkeypatch, capsys, tmp_path, path, module, word):
    monkeypatch.chdir(tmp_path)
    assert script(monkeypatch, "--seed=3", word, path=path) is None
    out = capsys.readouterr().out
    places = [out.index(f"--{x.name}=") for x in fields(module.Config)]
    assert places == sorted(places)
    about = module.__doc__.strip().splitlines()[0]
    assert out.index("--model=") < out.index(about)
    with open(path) as f:
        source = f.read()
    block = source[source.index("class Config:"):source.index("# ----")]
    comments = [line.partition("#")[2].strip() for line in block.splitlines() if "#" in line]
    assert len(comments) > 20 and all(comment in out for comment in comments)
    assert not os.listdir(tmp_path)


def test_help_shows_the_commands_and_every_hyperparameter(monkeypatch, capsys):
    assert script(monkeypatch, "--help") is None
    out = capsys.readouterr().out
    assert "torchrun --standalone" in out
    assert all(f"    --{x.name}=" in out for x in fields(train.Config))
    assert "--frames=32 " in out and "--tiers=True " in out and '--data="toy" ' in out


# --------------------------------------------------------------------------------------------------
# what cannot work

@pytest.mark.method
@pytest.mark.parametrize("how, says", [
    (dict(mode="grad"), "mode is"),
    (dict(rollout="vLLM"), "rollout is"),
    (dict(dtype="float16"), "dtype is"),
    (dict(loss_average="mean"), "loss_average is"),
    (dict(group_size=1), "group_size = 1: a group needs at least 2"),
    (dict(group_size=0), "group_size = 0"),
    (dict(group_size=-4), "group_size = -4"),
    (dict(group_size=9), "group_size = 9 is not divisible by sp = 2"),
    (dict(prompts_per_step=5), "prompts_per_step = 5 is not divisible by the 3 dp teams"),
    (dict(pass_k=9), "pass_k = 9 is more than group_size = 8"),
    (dict(think_budget=0, force_answer=False), "leave no answer"),
    *[(dict(oversample_cap=cap), f"oversample_cap = {cap} must be a number of at least 1")
      for cap in (0.9, -1.0, math.nan, math.inf)],
    *[({key: 0}, f"{key} = 0 must be a number of at least 1") for key in (
        "frames", "max_tokens", "vllm_length", "sft_batch", "prompts_per_step",
        "updates_per_rollout", "answer_budget", "save_every")],
    *[({key: -1}, f"{key} = -1 must be a number of at least 0") for key in (
        "think_budget", "align_steps", "sft_steps", "rl_steps", "warmup", "eval_every",
        "eval_samples", "show_every")]])
def test_what_cannot_work_is_named(how, says):
    good = train.Config(prompts_per_step=6)
    ranks = Ranks(sp=2, dp=3)
    check_training(good, ranks)
    assert says in refused_text(check_training, train.Config(**{**asdict(good), **how}), ranks)


@pytest.mark.method
@pytest.mark.parametrize("how", [
    dict(seed=-1), dict(lr=math.nan), dict(sft_lr=-1e-3), dict(clip_low=1.5), dict(clip_high=-0.1),
    dict(format_weight=1.5), dict(max_pixels=-1), dict(vllm_memory=1.5)], ids=str)
def test_numbers_out_of_their_range_are_named_too(how):
    """seed = -1 made the align stage ask for videos like "toy:-9980000": all were dropped, and it
    trained on nothing."""
    [key] = how
    assert key in refused_text(check_training, train.Config(**how), ALONE)


@pytest.mark.method
@pytest.mark.parametrize("how, says", [
    (dict(rollout="vLLM"), "rollout is"),
    (dict(dtype="float16"), "dtype is"),
    (dict(frames=0), "frames = 0 must be a number of at least 1"),
    (dict(group_size=9), "group_size = 9 is not divisible by sp = 2"),
    (dict(pass_k=9), "pass_k = 9 is more than group_size = 8"),
    (dict(eval_samples=-1), "eval_samples = -1 must be a number of at least 0"),
    (dict(seed=2 ** 64), "seed = 18446744073709551616 must be a number from 0 to"),
    (dict(cache_gb=math.nan), "cache_gb = nan must be a number of at least 0"),
    (dict(think_budget=0, force_answer=False), "leave no answer")])
def test_what_cannot_work_is_named_for_an_evaluation(how, says):
    check_sampling(evaluate.Config(), Ranks(sp=2))
    assert says in refused_text(check_sampling, evaluate.Config(**how), Ranks(sp=2))


@pytest.mark.parametrize("path, how, says", [
    (TRAIN, dict(mode="grad"), 'train.py: mode is "train" or "eval" or "grade", not \'grad\''),
    (TRAIN, dict(mode="eval", frames=0), "train.py: frames = 0 must be"),
    (TRAIN, dict(group_size=1), "train.py: group_size = 1: a group needs"),
    (EVALUATE, dict(frames=0), "evaluate.py: frames = 0 must be"),
    (EVALUATE, dict(gard="true"), "evaluate.py: unknown option 'gard'; did you mean 'grade'?")],
    ids=lambda x: os.path.basename(x) if isinstance(x, str) else str(x))
def test_a_command_that_cannot_work_ends_with_one_line(monkeypatch, tmp_path, path, how, says):
    """--mode=grad was taken for --mode=eval."""
    out = tmp_path / "out"
    line = command(monkeypatch, path, *flags(model=tmp_path / "none", out_dir=out, **how))
    assert line.startswith(says) and "\n" not in line
    assert not out.exists()


@pytest.mark.method
@pytest.mark.parametrize("config", [train.Config, evaluate.Config])
def test_the_ranks_compare_all_options_but_those_of_a_machine(config):
    c = config()
    assert to_compare(c).keys() == asdict(c).keys() - OF_MACHINE | {"a cache_dir"}
    assert OF_MACHINE <= asdict(train.Config()).keys()
    assert to_compare(config(seed=3))["seed"] == 3
    # The ranks that share a video look for it together. One that had it in its larger memory, or
    # had no folder to look into, waited for ever for the others.
    assert to_compare(config(cache_gb=1)) != to_compare(c)
    assert to_compare(config(cache_dir="a")) == to_compare(config(cache_dir="b"))
    assert to_compare(config(cache_dir="a")) != to_compare(c)
