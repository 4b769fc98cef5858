"""
docs/walkthrough.ipynb runs with any model, and what is stored in it comes from its code.

    python tests/test_walkthrough.py     executes it with out/ckpt-680, and stores its outputs
"""
import base64
import hashlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

WHERE = "pip install -r tests/requirements.txt"
nbformat = pytest.importorskip("nbformat", reason=WHERE)
nbclient = pytest.importorskip("nbclient", reason=WHERE)
pytest.importorskip("ipykernel", reason=WHERE)

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "docs" / "walkthrough.ipynb"
COLOURS = 128          # of a stored picture: fewer bytes
MOST_BYTES = 500_000


def read():
    return nbformat.read(NOTEBOOK, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def hash_of_code(notebook):
    code = "\n".join(cell.source for cell in code_cells(notebook))
    return hashlib.sha256(code.encode()).hexdigest()


def execute(notebook):
    """In a new kernel, started in docs/ as Jupyter does. Raises CellExecutionError."""
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", record_timing=False,
                            resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()


def printed(notebook, stream="stdout"):
    """What all cells printed."""
    texts = []
    for cell in code_cells(notebook):
        for output in cell.outputs:
            if output.output_type == "stream" and output.name == stream:
                texts.append(output.text)
    return "".join(texts)


def pictures(notebook):
    """The outputs that hold a picture."""
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    return [output for output in outputs if "image/png" in output.get("data", {})]


def check_facts(notebook):
    """What is true whatever the model is."""
    text = printed(notebook)
    assert "joined: 7 tokens, equal to those of one rank" in text
    assert "made twice, encoded 1 time\n" in text
    assert re.search(r"^[1-9]\d* forced tokens: sum of \|gradient\| = 0\.0$", text, re.M)
    rounding = r"(\de-0[5-9]|0e\+00)$"
    assert re.search("all ratios are 1 within " + rounding, text, re.M)
    assert re.search("Log-probabilities differ by at most " + rounding, text, re.M)
    assert len(pictures(notebook)) == 10


@pytest.fixture
def own_jupyter(tmp_path, monkeypatch):
    """Jupyter and IPython keep files in the home directory, unless they are told where."""
    for name in ("JUPYTER_RUNTIME_DIR", "JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path / name))


def test_it_runs_with_a_model_that_knows_little(run, own_jupyter, monkeypatch):
    """After a few steps of training no answer need be right. Its thoughts are a few tokens long:
    it gets less time for them, so that answers are forced."""
    monkeypatch.setenv("WALKTHROUGH_MODEL", run.model)
    notebook = read()
    for cell in code_cells(notebook):
        cell.source = cell.source.replace("think_budget=46", "think_budget=4")
    execute(notebook)
    check_facts(notebook)
    assert printed(notebook, "stderr") == ""


def test_what_is_stored_comes_from_the_code():
    """Whoever changes a cell executes the notebook again: see the top of this file."""
    notebook = read()
    cells = code_cells(notebook)
    assert notebook.metadata.code == hash_of_code(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert all(cell.outputs for cell in cells)
    check_facts(notebook)
    rows = re.findall(r"(right|wrong) +([+-]\d\.\d+) +([\d.]+) -> ([\d.]+)$",
                      printed(notebook), re.M)
    assert {row[0] for row in rows} == {"right", "wrong"}
    for answer, advantage, before, after in rows:          # as the text says
        assert (float(advantage) > 0) == (float(after) > float(before)) == (answer == "right")


def test_what_is_stored_is_clean():
    notebook = read()
    for cell in notebook.cells:
        assert cell.metadata == {}
        for output in cell.get("outputs", []):
            assert output.output_type in ("stream", "display_data")
    assert printed(notebook, "stderr") == ""
    assert not re.search(r"/(home|root|tmp|Users|work)\b|\bs/it\b|\bit/s\b", printed(notebook))
    assert notebook.metadata.keys() == {"kernelspec", "language_info", "code"}
    assert NOTEBOOK.stat().st_size < MOST_BYTES


def test_what_its_text_names_is_there():
    """Links lead to files, and a function that is the text of a link is defined in its file."""
    text = "\n".join(cell.source for cell in read().cells if cell.cell_type == "markdown")
    links = re.findall(r"\[([^\]]+)\]\(([^)]+)\)", text)
    functions = 0
    for name, link in links:
        if link.startswith("http"):
            continue
        path = NOTEBOOK.parent / link
        assert path.exists(), link
        if path.suffix == ".py":
            last = name.strip("`").rpartition(".")[2]
            assert re.search(rf"^ *(def|class) {last}\b", path.read_text(), re.M), name
            functions += 1
    assert functions > 20


@pytest.mark.parametrize("folder", [ROOT, NOTEBOOK.parent])
def test_without_a_model_it_says_how_to_make_one(folder):
    first = code_cells(read())[0].source
    result = subprocess.run([sys.executable, "-c", first], cwd=folder, capture_output=True,
                            text=True, env={**os.environ, "WALKTHROUGH_MODEL": "out/gone"})
    assert result.returncode == 1
    line = result.stderr.strip().split("\n")[-1]
    assert line.startswith("FileNotFoundError: no model in out/gone: run train.py")


def fewer_colours(png):
    """A picture in base64, as Jupyter stores it. -> likewise, smaller"""
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    out = io.BytesIO()
    # MAXCOVERAGE keeps the colours of small areas, such as a colour bar's, apart.
    few = picture.quantize(COLOURS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    few.save(out, "PNG", optimize=True)
    return base64.b64encode(out.getvalue()).decode()


def refresh():
    notebook = read()
    execute(notebook)
    for output in pictures(notebook):
        output.data["image/png"] = fewer_colours(output.data["image/png"])
    notebook.metadata.language_info = {"name": "python"}   # not the version of this machine's
    notebook.metadata.code = hash_of_code(notebook)
    nbformat.write(notebook, NOTEBOOK)
    print(f"{NOTEBOOK}: {NOTEBOOK.stat().st_size:,} bytes")


if __name__ == "__main__":
    refresh()
