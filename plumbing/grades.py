"""
Offline grades: how often a model answered each question right before training. Each line of
grades.jsonl is one model's result on one question: {"id": ..., "correct": ..., "total": ...} and
more.
"""
import hashlib
import json
import math
import os


def about(sample):
    """A hash of the question and its answer, to detect the same id in other data."""
    text = json.dumps([sample.question, sample.answer])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def grade_line(sample, correct, total, model):
    """One line of grades.jsonl: correct is the sum of the accuracies of `total` answers."""
    row = {"id": sample.id, "correct": correct, "total": total, "model": model,
           "about": about(sample)}
    return json.dumps(row) + "\n"


def read_grades(path, samples, model=None):
    """Read a grades.jsonl. -> {id: [sum of accuracies, answers]}; all lines of an id are added up

    An incomplete last line is ignored: the run that wrote it was stopped. Raises ValueError if the
    file does not exist, or, naming the line, if a line is not a grade, belongs to other data than
    samples or, if model is given, to another model.
    """
    if not os.path.isfile(path):
        raise ValueError(f"{path}: no such file; evaluate.py --grade=true writes one")
    with open(path, "rb") as f:
        lines = f.read().split(b"\n")[:-1]
    by_id = {sample.id: sample for sample in samples}
    grades = {}
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number}"
        try:
            line = line.decode("utf-8")
        except UnicodeDecodeError as e:
            raise ValueError(f"{where}: not UTF-8 text (byte 0x{line[e.start]:02x}); save it as "
                             "UTF-8") from None
        try:
            row = json.loads(line)
            id, correct, total = str(row["id"]), float(row["correct"]), float(row["total"])
            if not 0 <= correct <= total < math.inf:
                raise ValueError
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            raise ValueError(f'{where}: expected {{"id": ..., "correct": ..., "total": ...}}, '
                             f"found {line[:80]!r}") from None
        if id not in by_id or row.get("about", about(by_id[id])) != about(by_id[id]):
            raise ValueError(f"{where}: these grades are of other data, whose sample {id!r} is not "
                             "this data's")
        if model and row.get("model") != model:
            raise ValueError(f"{where}: graded by {row.get('model')!r}, not {model!r}; "
                             "choose another --out_dir")
        correct_before, total_before = grades.get(id, [0.0, 0.0])
        grades[id] = [correct_before + correct, total_before + total]
    return grades


def begin(path):
    """Make the folder; remove an incomplete last line, left by a run that was killed."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    if os.path.exists(path):
        with open(path, "rb+") as f:
            f.truncate(f.read().rfind(b"\n") + 1)


def append(path, samples, correct, total, model):
    """A line for each sample that was graded. correct: {id: sum of accuracies of total answers}"""
    with open(path, "a", encoding="utf-8") as f:
        for sample in samples:
            if sample.id in correct:
                f.write(grade_line(sample, correct[sample.id], total, model))
