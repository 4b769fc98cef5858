"""
Question files: .jsonl with the fields of `Sample`, and LongVideo-Reason's .json.
"""
import json
import os
import re
from dataclasses import fields

from flow import Sample

FIELDS = [field.name for field in fields(Sample)]
REQUIRED = ("question", "answer", "video")


def read_records(source):
    """Yields (where, record) for each record of a .jsonl, or of a .json that holds a list of them.
    Records are not changed. where: "file, line 3" or "file, item 3".

    Raises ValueError, naming the file and the line, if it is not JSON.
    """
    if not os.path.isfile(source):
        raise ValueError(f"{source}: no such file; data is a .jsonl, a .json in "
                         'LongVideo-Reason\'s form, or "toy"')
    with open(source, encoding="utf-8") as f:
        try:
            if source.endswith(".json"):
                yield from read_items(source, f)
            else:
                yield from read_lines(source, f)
        except UnicodeDecodeError:
            raise ValueError(f"{source}: not UTF-8 text") from None


def read_items(source, file):
    try:
        records = json.load(file)
    except json.JSONDecodeError as e:
        raise ValueError(not_json(source, e.lineno, e)) from None
    if not isinstance(records, list):
        raise ValueError(f"{source}: expected a list of samples, found {type(records).__name__}")
    for number, record in enumerate(records):
        yield f"{source}, item {number}", record


def read_lines(source, file):
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as e:
            raise ValueError(not_json(source, number, e)) from None
        yield f"{source}, line {number}", record


def not_json(source, line, error):
    return f"{source}, line {line}: not JSON ({error.msg}, column {error.colno})"


def sample_fields(record, where):
    """The fields of `Sample` that a record has. -> {name: text}, without white space at the ends

    record: in our format or LongVideo-Reason's. Raises ValueError, which begins with `where`.
    """
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected an object with the fields of a sample, "
                         f"found {type(record).__name__}")
    if "problem" in record or "problem_id" in record:
        record = from_longvideo_reason(record, where)
    for name, value in record.items():
        if name in FIELDS and not isinstance(value, (str, int, float, type(None))):
            raise ValueError(f"{where}: {name!r} is a {type(value).__name__}, expected text")
    texts = {}
    for name in FIELDS:
        if record.get(name) is not None:
            texts[name] = str(record[name]).strip()
    for name in REQUIRED:
        if name not in texts:
            raise ValueError(f"{where}: no {name!r}")
        if not texts[name]:
            raise ValueError(f"{where}: an empty {name!r}")
    return texts


def from_longvideo_reason(record, where):
    """LongVideo-Reason's record in our format. Its answer comes inside <answer> tags, and its video
    may come as a list of one. Raises ValueError, which begins with `where`."""
    for name in ("problem_id", "videos", "problem", "answer"):
        if name not in record:
            raise ValueError(f"{where}: no {name!r}")
    video = record["videos"]
    if isinstance(video, list):
        if len(video) != 1:
            raise ValueError(f"{where}: {len(video)} videos; a sample is about one")
        video = video[0]
    answer = record["answer"]
    tagged = re.fullmatch(r"\s*<answer>(.*)</answer>\s*", str(answer), re.DOTALL)
    if tagged:
        answer = tagged[1]
    return {"id": record["problem_id"], "question": record["problem"], "video": video,
            "answer": answer, "thought": record.get("reasoning")}


def guess_domain(sample):
    """"choice" if the answer is one letter and the question lists options, "count" if it is an
    integer, else "open"."""
    is_letter = re.fullmatch(r"[A-Za-z]", sample.answer)
    lists_options = re.search(r"(^|[\s(])B[).:]\s*\S", sample.question)
    if is_letter and lists_options:
        return "choice"
    if re.fullmatch(r"[+-]?\d+", sample.answer):
        return "count"
    return "open"
