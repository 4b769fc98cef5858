"""
The lines of evidence.jsonl, read and checked: one a run, as evidence.py writes it.
"""
import json
import math

import measures

from plumbing.page import read_line

OF_A_DOMAIN = ("accuracy_count", "same_answer_count")      # logged by the steps that drew it
MAY_BE_NONE = ("grad_norm", *OF_A_DOMAIN)
JUDGED = ("still", "follows")              # the rules that visits.py compares


class DamagedLine(ValueError):
    """A line that evidence.py did not write. The text names the file and the line."""


def read_lines(path):
    """-> [(where, line)] of all lines, of whatever run; where: "file, line 3"

    Raises DamagedLine unless each is a JSON object with run, seed and command, and no two lines
    share all three.
    """
    lines, places = [], {}
    if not path.exists():
        return lines
    for number, text in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        where = f"{path}, line {number}"
        with_remedy(where, check_end, text)
        line = with_remedy(where, read_object, text)
        with_remedy(where, check_key, line)
        key = line["run"], line["seed"], line["command"]
        if key in places:
            raise DamagedLine(f"{where}: the run of line {places[key]} again, {key[0]} of seed "
                              f"{key[1]}; remove one of the two")
        places[key] = number
        lines.append((where, line))
    return lines


def check_results(where, line):
    """Raises DamagedLine unless a line has the numbers that its command gives."""
    with_remedy(where, check_numbers, line)


def with_remedy(where, check, of):
    """check(of); its ValueError as a DamagedLine."""
    try:
        return check(of)
    except ValueError as e:
        raise DamagedLine(f"{where}: {e}; correct the line, or remove it and its run is made "
                          "again") from None


def check_end(text):
    if not text.endswith(b"\n"):           # the next line would be written behind it
        raise ValueError("it does not end with a line break")


def read_object(text):
    try:
        return read_line(text.decode("utf-8-sig"), {})
    except UnicodeDecodeError as e:
        raise ValueError(f"no JSON ({e})") from None


def check_key(line):
    for key, kind, what in (("run", str, "text"), ("command", str, "text"),
                            ("seed", int, "an integer")):
        if type(line.get(key)) is not kind:                # True would pass as an int
            raise ValueError(f"{key!r} must be {what}, not {as_json(line.get(key))}")


def check_numbers(line):
    words = line["command"].split()
    check_number("cpu_seconds", line.get("cpu_seconds"), 0)
    if not isinstance(line.get("commit"), str):
        raise ValueError(f"'commit' must be text, not {as_json(line.get('commit'))}")
    if "--mode=grade" in words:
        check_list("grades", line.get("grades"), 3)
        for count in line["grades"]:
            check_number("grades", count, 0)
        return
    held_out = line.get("held_out")
    if not isinstance(held_out, list) or (not held_out and "--eval_every=0" not in words):
        raise ValueError("'held_out' must be a list of evaluations")
    for row in held_out:
        check_evaluation(row)
    if "--mode=eval" in words:
        for frames in filter(None, option("eval_frames", words, "").split(",")):
            check_number(f"frames {frames}", member("frames", line).get(frames), 0, 1)
        return
    check_steps(line, int(option("rl_steps", words, "0")))
    if "experiments/visits.py" in words:
        check_visits(member("visits", line))


def check_evaluation(row):
    if not isinstance(row, dict):
        raise ValueError(f"'held_out' must be a list of evaluations, not of {as_json(row)}")
    check_number("accuracy", row.get("accuracy"), 0, 1)
    for domain, accuracy in member("domains", row).items():
        check_number(f"accuracy in {domain}", accuracy, 0, 1)


def check_steps(line, n):
    """A run of n RL steps has n values of each key, and evaluates after some of the n."""
    for row in line["held_out"]:
        check_number("step", row.get("step"), 1, n)
    steps = member("steps", line)
    if not n:
        return
    for key in measures.KEPT:
        if key in OF_A_DOMAIN and key not in steps:
            continue
        check_list(f"steps {key}", steps.get(key), n)
        for value in steps[key]:
            if value is not None or key not in MAY_BE_NONE:
                check_number(f"steps {key}", value)


def check_visits(found):
    check_number("groups", found.get("groups"), 1)
    check_number("with_signal", found.get("with_signal"), 0, found["groups"])
    check_number("observed", found.get("observed"), 0, 1)
    for rule in JUDGED:
        for key in ("estimated", "error", "correlation"):
            check_number(f"{key} of {rule}", member(rule, found).get(key), -1, 1)


def member(key, of):
    """of[key], which must be an object."""
    if not isinstance(of.get(key), dict):
        raise ValueError(f"{key!r} must be an object, not {as_json(of.get(key))}")
    return of[key]


def option(name, words, default):
    """The value of --name=value in a command, as text."""
    for word in words:
        if word.startswith(f"--{name}="):
            return word.partition("=")[2]
    return default


def check_list(what, found, n):
    if not isinstance(found, list) or len(found) != n:
        raise ValueError(f"{what!r} must be a list of {n}, not {as_json(found)}")


def check_number(what, x, least=-math.inf, most=math.inf):
    if type(x) not in (int, float) or not math.isfinite(x) or not least <= x <= most:
        bounds = f" from {least:g}" if math.isfinite(least) else ""
        bounds += f" to {most:g}" if math.isfinite(most) else ""
        raise ValueError(f"{what!r} must be a number{bounds}, not {as_json(x)}")


def as_json(x):
    """A value as JSON, at most 40 characters of it."""
    return json.dumps(x)[:40]
