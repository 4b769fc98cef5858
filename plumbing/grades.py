"""
Offline grades: how often a model answered each question right before training. Each line of
grades.jsonl is one model's result on one question: {"id": ..., "correct": ..., "total": ...} and
more.
"""
import codecs
import hashlib
import json
import math
import os

from plumbing.command_line import make_folder


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

    An incomplete last line is ignored: the run that wrote it was stopped. So are empty lines.
    Raises ValueError if the file does not exist, or, naming the line, if a line is not a grade,
    belongs to other data than samples or, if model is given, to another model. Without model a
    file must hold a grade: with it, it may be one that was just begun.
    """
    if not os.path.isfile(path):
        raise ValueError(f"{path}: no such file; evaluate.py --grade=true writes one")
    with open(path, "rb") as f:
        content = whole_lines(f.read()).removeprefix(codecs.BOM_UTF8)
    by_id = {sample.id: sample for sample in samples}
    grades = {}
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            line = line.decode("utf-8")
        except UnicodeDecodeError as e:
            raise ValueError(f"{where}: not UTF-8 text (byte 0x{line[e.start]:02x}); save it as "
                             "UTF-8") from None
        try:
            id, correct, total, row = read_grade(line)
        except (ValueError, OverflowError, RecursionError):
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
    if not grades and not model:
        raise ValueError(f"{path}: it holds no grade; evaluate.py --grade=true writes them")
    return grades


def read_grade(line):
    """-> id, sum of accuracies, answers, and all of the row. Raises ValueError or OverflowError if
    the line is no grade."""
    row = json.loads(line, object_pairs_hook=unique)
    if not isinstance(row, dict):
        raise ValueError
    id, correct, total = (row.get(key) for key in ("id", "correct", "total"))
    # True would pass as a number, "2" would be made one.
    if type(id) not in (str, int) or not {type(correct), type(total)} <= {int, float}:
        raise ValueError
    if not 0 <= correct <= total < math.inf:
        raise ValueError
    return str(id), float(correct), float(total), row


def unique(pairs):
    """The object of these pairs. Raises ValueError if a key is there twice: which one counts?"""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError
    return fields


def whole_lines(content):
    """The content of a grades.jsonl without an incomplete last line, left by a run that was killed
    as it wrote. A last line that lacks no more than its end is whole."""
    at = 1 + max(content.rfind(b"\n"), content.rfind(b"\r"))
    if not content.startswith(b"{", at):   # not what a run writes: `read_grades` will name it
        return content
    try:
        json.loads(content[at:])
    except (ValueError, RecursionError):
        return content[:at]
    return content


def begin(path):
    """Make the folder; remove an incomplete last line, left by a run that was killed, or end a
    whole one."""
    make_folder(os.path.dirname(path) or ".")
    if os.path.exists(path):
        with open(path, "rb+") as f:
            content = whole_lines(f.read())
            f.truncate(len(content))
            if content and not content.endswith((b"\n", b"\r")):
                f.seek(len(content))
                f.write(b"\n")


def append(path, samples, correct, total, model):
    """A line for each sample that was graded. correct: {id: sum of accuracies of total answers}"""
    with open(path, "a", encoding="utf-8") as f:
        for sample in samples:
            if sample.id in correct:
                f.write(grade_line(sample, correct[sample.id], total, model))
