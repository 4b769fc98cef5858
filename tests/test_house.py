"""
The house: how large its files may be, who imports whom, and that the RL loop is whole in one place.

    python tests/test_house.py      prints lines and longest line of every file
"""
import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
METHOD = ("flow", "train", "data", "model", "encode", "rollout", "rewards", "grpo", "curriculum")
MOST_LINES = {"flow": 120, "train": 450, "data": 250, "model": 450, "encode": 350, "rollout": 400,
              "rewards": 320, "grpo": 100, "curriculum": 280, "toy": 400, "evaluate": 300,
              "bench": 400, "watch": 200}
MOST_IN_PLUMBING = 400
MOST_IN_METHOD = 2500
MOST_COLUMNS = 100

# Each may import those before it. Those on one level do not import each other.
LEVELS = [("flow",), ("plumbing",), ("grpo", "curriculum", "rewards"), ("encode",), ("model",),
          ("toy",), ("data",), ("rollout",), ("evaluate",), ("train", "bench", "watch")]
LEVEL = {name: number for number, names in enumerate(LEVELS) for name in names}
FLOW_ALONE = ("grpo", "curriculum", "rewards", "plumbing")     # import nothing of ours but flow


def files():
    """{module: path} of the root's and plumbing's modules, "plumbing.ranks" for example."""
    found = {path.stem: path for path in ROOT.glob("*.py")}
    return found | {f"plumbing.{path.stem}": path for path in ROOT.glob("plumbing/*.py")}


def imports(path, ours):
    """Our modules that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names & ours


def graph():
    found = files()
    return {name: imports(path, set(found)) for name, path in found.items()}


def functions(path):
    """(name, lines, required parameters, node) of every function of a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            required = len(node.args.posonlyargs) + len(node.args.args) - len(node.args.defaults)
            required -= bool(node.args.args) and node.args.args[0].arg == "self"
            yield node.name, node.end_lineno - node.lineno + 1, required, node


def table():
    rows = []
    for name, path in files().items():
        lines = path.read_text().splitlines()
        most = MOST_LINES.get(name, MOST_IN_PLUMBING)
        rows.append((name, len(lines), most, max(map(len, lines), default=0)))
    return rows


@pytest.mark.parametrize("name, lines, most, columns", table(), ids=lambda x: str(x))
def test_a_file_keeps_its_limits(name, lines, most, columns):
    assert lines <= most
    assert columns <= MOST_COLUMNS


def test_the_files_of_the_method_keep_their_limit_together():
    assert sum(lines for name, lines, *_ in table() if name in METHOD) <= MOST_IN_METHOD


def test_imports_go_one_way():
    for name, imported in graph().items():
        package = name.partition(".")[0]
        for other in imported:
            of = other.partition(".")[0]
            if package == of == "plumbing":
                continue
            assert LEVEL[of] < LEVEL[package], f"{name} imports {other}"
            assert package not in FLOW_ALONE or of == "flow", f"{name} imports {other}"


def test_there_is_no_circle():
    waiting = graph()
    while waiting:
        free = [name for name, imported in waiting.items() if not imported & waiting.keys()]
        assert free, f"a circle among {sorted(waiting)}"
        for name in free:
            del waiting[name]


def test_flow_imports_torch_alone():
    text = (ROOT / "flow.py").read_text()
    modules = re.findall(r"^(?:from|import) (\w+)", text, re.MULTILINE)
    assert set(modules) == {"dataclasses", "typing", "torch"}


@pytest.mark.parametrize("name", METHOD)
def test_functions_of_the_method_are_short(name):
    """The RL loop is the one function that may be longer: it is the method, whole on one screen."""
    for function, lines, required, _ in functions(ROOT / f"{name}.py"):
        assert required <= 8 or function == "policy_loss", function
        assert lines <= (95 if function == "reinforce" else 60), function


def test_the_calls_that_are_the_method_stand_in_the_loop():
    """A loop that hides them in one call has moved nothing."""
    [loop] = [node for name, _, _, node in functions(ROOT / "train.py") if name == "reinforce"]
    [loop] = [node for node in loop.body if isinstance(node, ast.For)]
    assert 60 <= loop.end_lineno - loop.lineno + 1 <= 90
    called = []
    for node in ast.walk(loop):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
            called.append((node.lineno, name))
    called = [name for _, name in sorted(called)]
    method = ["draw", "rollout", "verify", "advantages", "balanced", "send_groups", "logprobs",
              "policy_loss", "backward", "update", "log"]
    places = [called.index(name) for name in method if name != "update"]       # two are called so
    assert places == sorted(places), called
    assert called.count("update") == 2
    text = (ROOT / "train.py").read_text().splitlines()[loop.lineno:loop.end_lineno]
    steps = re.findall(r"# (\d)\. (\w+)", "\n".join(text))
    assert steps == [("1", "Draw"), ("2", "Encode"), ("3", "Roll"), ("4", "Verify"), ("5", "Keep"),
                     ("6", "Learn"), ("7", "Log")]


def test_words_of_the_readme():
    assert len((ROOT / "README.md").read_text().split()) <= 2000


if __name__ == "__main__":
    print(f"{'file':26} lines   of  columns")
    for name, lines, most, columns in sorted(table(), key=lambda row: ("." in row[0], row)):
        print(f"{name:26} {lines:5} {most:4} {columns:8}")
    print(f"{'the method':26} {sum(row[1] for row in table() if row[0] in METHOD):5} "
          f"{MOST_IN_METHOD}")
