"""python -m pytest tests/test_course.py -q

The pages of docs/course quote code, run scripts and edit files. All of that is checked, so that no
page goes stale. A page's fenced blocks say by their language what they are:

    ```python    a quote of the function or file that the last link before it names, as in
                 [`grpo.advantages`](../../grpo.py): the block's lines stand in that function, in
                 one piece, with any indentation
    ```py        a script, to be run in the repository's folder
    ```text      the output of the script before it; after an edit, the output of the page's last
                 script with the edited file
    ```diff      an exercise's edit of the file that the last link before it names: the lines with
                 "-" stand there exactly once, and those with "+" come in their place

Commands are indented by four spaces, as in all docs: tests/test_docs.py parses them.
"""
import ast
import contextlib
import io
import re
import sys
import textwrap
import types
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COURSE = ROOT / "docs" / "course"
PAGES = sorted(COURSE.glob("[0-9]*.md"))
PARTS = ["What the papers say", "In the code", "Without it", "Exercise"]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)
LINK = re.compile(r"\[`([\w.]+)`\]\(([^)]+)\)")
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


@dataclass
class Block:
    language: str
    text: str
    name: str      # of the last link before it: "grpo.advantages" or "grpo.py"
    file: Path     # where that link leads to


def blocks(page):
    """The fenced blocks of a page, in order."""
    text = page.read_text()
    found = []
    for fence in FENCE.finditer(text):
        links = LINK.findall(text[:fence.start()])
        name, target = links[-1] if links else ("", "")
        found.append(Block(fence[1], fence[2], name, (page.parent / target).resolve()))
    return found


@cache
def source_of(name, file):
    """The source of a function, class or method of a file, or all of it. name: "rewards.score",
    "rollout.Writing.write", "Curriculum.update", "grpo.py"."""
    source = file.read_text()
    if name.endswith(".py"):
        return source
    parts = name.removeprefix("plumbing.").split(".")
    if parts[0] == file.stem:
        parts = parts[1:]
    node = ast.parse(source)
    for part in parts:
        inside = [x for x in node.body if getattr(x, "name", "") == part]
        assert len(inside) == 1, f"{name} is not defined in {file.name}"
        node = inside[0]
    return "".join(source.splitlines(keepends=True)[node.lineno - 1:node.end_lineno])


def is_quoted(block, source):
    """Whether the block's lines stand in the source in one piece, with any indentation."""
    quoted = textwrap.dedent(block).splitlines()
    lines = source.splitlines()
    for first in range(len(lines) - len(quoted) + 1):
        piece = textwrap.dedent("\n".join(lines[first:first + len(quoted)]))
        if piece.splitlines() == quoted:
            return True
    return False


def edit_of(page):
    """-> (file, its source, its source after the page's edit), or None if the page has none"""
    edits = [block for block in blocks(page) if block.language == "diff"]
    if not edits:
        return None
    [block] = edits
    lines = block.text.splitlines(keepends=True)
    assert all(line[0] in "-+" for line in lines), block.text
    old = "".join(line[1:] for line in lines if line[0] == "-")
    new = "".join(line[1:] for line in lines if line[0] == "+")
    source = block.file.read_text()
    assert source.count(old) == 1, f"not exactly once in {block.file.name}:\n{old}"
    return block.file, source, source.replace(old, new)


def run_script(text):
    """-> what a script prints"""
    screen = io.StringIO()
    with contextlib.redirect_stdout(screen):
        exec(compile(text, "script", "exec"), {"__name__": "__main__"})
    return screen.getvalue()


def test_there_are_pages():
    assert len(PAGES) >= 8


@each_page
def test_a_page_has_its_four_parts(page):
    """And a result of the exercise that is folded away."""
    text = page.read_text()
    assert re.match(rf"# {page.stem.split('-')[0]}\. \S", text)
    assert re.findall(r"^## (.*)$", text, re.M) == PARTS
    claim, code, without, exercise = re.split(r"^## .*\n", text, flags=re.M)[1:]
    assert "https://arxiv.org/abs/" in claim
    assert "```python" in code
    assert re.search(r"^    python |\]\(\.\./\w+\.md", without, re.M), "where are its numbers from?"
    assert exercise.count("<details><summary>What should happen</summary>") == 1
    assert exercise.rstrip().endswith("</details>")
    assert 60 <= len(text.splitlines()) <= 120


@each_page
def test_quoted_code_is_the_code(page):
    quotes = [block for block in blocks(page) if block.language == "python"]
    assert quotes
    for block in quotes:
        assert block.file.exists(), block.name
        assert is_quoted(block.text, source_of(block.name, block.file)), \
            f"not in {block.name}:\n{block.text}"


@each_page
def test_every_link_to_code_names_what_is_there(page):
    for name, target in LINK.findall(page.read_text()):
        assert source_of(name, (page.parent / target).resolve())


@each_page
def test_headings_that_links_name_are_there(page):
    for target, heading in re.findall(r"\]\(([^)#]*\.md)#([^)]+)\)", page.read_text()):
        headings = re.findall(r"^#+ (.*)$", (page.parent / target).read_text(), re.M)
        assert heading in [re.sub(r"[^\w\s-]", "", h).lower().replace(" ", "-") for h in headings]


@each_page
def test_an_exercise_restores_the_file_that_it_edits(page):
    edit = edit_of(page)
    restored = re.findall(r"^    git checkout (.*)$", page.read_text(), re.M)
    assert restored == ([str(edit[0].relative_to(ROOT))] if edit else [])
    if edit:
        compile(edit[2], edit[0].name, "exec")


@each_page
def test_scripts_print_what_the_page_says(page, monkeypatch):
    """Before the exercise's edit, and after it: the edited file is a module of the same name for as
    long as the script runs."""
    scripts, printed = [], []
    after_edit = False
    for block in blocks(page):
        if block.language == "py":
            scripts.append(block.text)
        elif block.language == "diff":
            file, _, edited = edit_of(page)
            module = types.ModuleType(file.stem)
            module.__file__ = str(file)
            monkeypatch.setitem(sys.modules, file.stem, module)
            exec(compile(edited, file.name, "exec"), module.__dict__)
            after_edit = True
        elif block.language == "text":
            printed.append(after_edit)
            assert run_script(scripts[-1]) == block.text
    assert False in printed


@each_page
def test_commands_name_scripts_that_are_there(page):
    """Those with options are parsed by tests/test_docs.py, if its list has the page."""
    commands = re.findall(r"^    (.*?)(?: \\)?$", FENCE.sub("", page.read_text()), re.M)
    for command in commands:
        first, *words = command.split()
        assert first in ("python", "git") or first.startswith("--"), command
        if first == "python":
            assert (ROOT / words[0]).exists()
            assert len(words) == 1 or words[0] in ("train.py", "bench.py", "evaluate.py",
                                                   "rollout.py")


def test_a_page_has_no_other_blocks():
    for page in PAGES:
        assert {block.language for block in blocks(page)} <= {"python", "py", "text", "diff"}
        assert page.read_text().count("```") == 2 * len(blocks(page))


def test_the_index_lists_all_pages_in_order():
    text = (COURSE / "README.md").read_text()
    assert re.findall(r"^\| \[\d\]\((.*?)\)", text, re.M) == [page.name for page in PAGES]
