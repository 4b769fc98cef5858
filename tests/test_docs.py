"""python -m pytest tests/test_docs.py -q

README, docs/ and the docstrings: every command that they show is understood, every file that they
name is there, and every figure about the code is the code's.
"""
import re
import shlex
from pathlib import Path

import pytest
from small import text_config

import bench
import evaluate
import rollout
import toy
import train
import watch
from flow import Ranks
from plumbing import check_data, command_line
from plumbing.sharding import check_heads
from plumbing.sweep import sweep
from plumbing.tiny import build_tiny

ROOT = Path(bench.__file__).parent
HEADS = {"Qwen/Qwen2.5-VL-3B-Instruct": (16, 2), "Qwen/Qwen2.5-VL-7B-Instruct": (28, 4),
         "zai-org/GLM-4.1V-9B-Thinking": (32, 2), "zai-org/GLM-4.6V-Flash": (32, 2),
         "Qwen/Qwen3-VL-2B-Instruct": (16, 8), "Qwen/Qwen3-VL-4B-Instruct": (32, 8),
         "Qwen/Qwen3-VL-8B-Instruct": (32, 8)}
# How many commands each shows: a pattern that finds none would test nothing.
PAGES = [("train.py", 1), ("bench.py", 4), ("evaluate.py", 2), ("rollout.py", 1), ("toy.py", 1),
         ("README.md", 5), ("docs/gpu.md", 14), ("docs/data.md", 2), ("docs/evaluation.md", 3),
         ("docs/evidence.md", 2), ("docs/models.md", 8), ("docs/speed.md", 3),
         ("docs/speed_log.md", 7), ("docs/toy.md", 2), ("data.py", 1),
         ("watch.py", 1), ("docs/watch.md", 1),
         ("docs/course/README.md", 1), ("docs/course/1-tokens.md", 3),
         ("docs/course/2-frames.md", 1), ("docs/course/3-prefix.md", 2),
         ("docs/course/4-sequence.md", 2), ("docs/course/5-forced.md", 3),
         ("docs/course/6-rewards.md", 2), ("docs/course/9-one-policy.md", 2)]


def commands(text, script):
    """The arguments of each command line of `script` in a page or a docstring. Words after them are
    prose. -> (ranks, arguments) of each"""
    text = re.sub(r"\\+\s*\n[^\S\n]*", "", text)
    pattern = rf"^ +(?:.*?  )?((?:torchrun|python) .*?)(?<!\S){script}((?: .*)?)$"
    for launcher, line in re.findall(pattern, text, re.M):
        ranks = re.search(r"--nproc_per_node=(\d+)", launcher)
        options = re.match(r'(?: \w+\.jsonl)?(?: --\w+="[^"]*"| --\S+)*', line)[0]
        yield int(ranks[1]) if ranks else 1, [word.strip(",") for word in shlex.split(options)]


@pytest.mark.parametrize("page, number", PAGES)
def test_every_command_line_shown_is_understood(page, number):
    """Those of train.py also pass its check for the ranks that they name, and stage 2 can share out
    the heads."""
    text = (ROOT / page).read_text()
    if page.endswith(".py"):
        text = text.split('"""')[1]
    found = 0
    for world, arguments in commands(text, "train.py"):
        c = train.parse(arguments)
        sp = c.sp or world
        ranks = Ranks(world=world, sp=sp, dp=world // sp)
        command_line.check_training(c, ranks)
        assert world % sp == 0
        if c.stage2:
            check_heads(text_config(*HEADS[c.model]), ranks)
        found += 1
    for _, arguments in commands(text, "bench.py"):
        bench.parse(arguments)
        found += 1
    for _, arguments in commands(text, "evaluate.py"):
        c = command_line.parse(evaluate.Config, "", arguments)
        command_line.check_sampling(c, Ranks())
        sweep(c)
        found += 1
    for _, arguments in commands(text, "data.py"):
        check_data.parse(arguments)
        found += 1
    for _, arguments in commands(text, "watch.py"):
        watch.parse(arguments)
        found += 1
    for script, options in (("rollout.py", rollout.Options), ("toy.py", toy.Options)):
        for _, arguments in commands(text, script):
            command_line.parse(options, "", arguments)
            found += 1
    assert found == number


def pages():
    return [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_every_link_of_a_page_leads_to_a_file(page):
    for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not link.startswith("http"):
            assert (page.parent / link).exists(), link


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_every_file_and_function_that_a_page_names_is_there(page):
    """`model.logprobs` or `train.py` in a page: names that rot mislead a reader."""
    files = {path.stem: path.read_text() for path in ROOT.glob("*.py")}
    files |= {path.stem: path.read_text() for path in ROOT.glob("plumbing/*.py")}
    text = page.read_text()
    for module, name in re.findall(r"`(?:plumbing\.)?([a-z_]+)\.([A-Za-z_]+)(?:\(.*?\))?`", text):
        if module in files and name not in ("py", "md", "html"):
            defined = rf"^\s*(def|class) {name}\b|^{name}\b.* = |\b{name}:"
            assert re.search(defined, files[module], re.M), f"{module}.{name}"
    for file in re.findall(r"`([a-z_/]+\.(?:py|md|sh|diff|svg))`", text):
        known = [ROOT / file, page.parent / file, ROOT / "plumbing" / file, ROOT / "tests" / file]
        users_own = file in ("my_file.py", "my/judge.py")
        assert users_own or any(path.exists() for path in known), file


def test_the_readme_says_how_large_the_tiny_model_is():
    """"1.0 million parameters"."""
    model, _, _ = build_tiny()
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert f"{millions:.1f} million parameters" in readme
