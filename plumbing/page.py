"""
out/watch.html: a run as one page that opens from a file. Beside this module, watch.html is what the
page looks like and watch.js what it does; what the run wrote (metrics.jsonl, rollouts.jsonl) is put
into it as JSON.
"""
import json
import os
from pathlib import Path

HERE = Path(__file__).parent
MOST_POINTS = 1000                 # of a curve
SECONDS = ("encode_s", "rollout_s", "verify_s", "train_s")
CURVES = {                         # keys of metrics.jsonl that the page draws, by stage
    "align": ("loss",),
    "sft": ("loss", "eval_accuracy"),
    "rl": ("reward", "accuracy", "format", "eval_accuracy", "length", "entropy", "forced",
           "truncated", "clip_low", "clip_high", "invalid_rate", *SECONDS)}
NEEDED = {                         # what a line must have: {file: {key: type}}
    "metrics.jsonl": {"stage": str, "step": int},
    "rollouts.jsonl": {"step": int, "asked": int, "wanted": int, "tiers": list, "clip": list,
                       "groups": list, "shown": list}}


def write_page(out_dir):
    """Write out_dir/watch.html, under another name and then renamed. -> what `page_data` returned

    Raises ValueError as `page_data` does.
    """
    data = page_data(out_dir)
    page = (HERE / "watch.html").read_text(encoding="utf-8")
    script = (HERE / "watch.js").read_text(encoding="utf-8")
    page = page.replace("THE SCRIPT OF THE PAGE", script)
    page = page.replace("THE DATA OF THE RUN", script_json(data))      # last: it may hold any text
    path = os.path.join(out_dir, "watch.html")
    with open(path + ".tmp", "w", encoding="utf-8") as f:
        f.write(page)
    os.replace(path + ".tmp", path)
    return data


def page_data(out_dir):
    """What the page shows, as a dict.

      done       {stage: steps that were logged}
      curves     {stage: {key: [[step, value], ...]}}, at most MOST_POINTS each
      steps      the lines of rollouts.jsonl; each with "seconds", {phase: seconds} of its step
      has_file   whether there is a rollouts.jsonl
      cut_short  names of the files whose last line is incomplete and was left out

    Raises ValueError if there is no folder or no metrics.jsonl, or if a line is damaged.
    """
    if not os.path.isdir(out_dir):
        raise ValueError(f"{out_dir}: no such folder; give the out_dir of a run of train.py")
    path = os.path.join(out_dir, "metrics.jsonl")
    if not os.path.isfile(path):
        raise ValueError(f"{path}: no such file; give the out_dir of a run of train.py")
    metrics, metrics_cut_short = read_lines(path)
    path = os.path.join(out_dir, "rollouts.jsonl")
    has_file = os.path.isfile(path)
    steps, steps_cut_short = [], False
    if has_file:
        steps, steps_cut_short = read_lines(path)
    rl = {record["step"]: record for record in metrics if record["stage"] == "rl"}
    for step in steps:
        record = rl.get(step["step"], {})
        step["seconds"] = {key[:-2]: record[key] for key in SECONDS if key in record}
    done = {}
    for stage in CURVES:
        done[stage] = max((row["step"] for row in metrics if row["stage"] == stage), default=0)
    cut_short = []
    if metrics_cut_short:
        cut_short.append("metrics.jsonl")
    if steps_cut_short:
        cut_short.append("rollouts.jsonl")
    return {"done": done, "curves": read_curves(metrics), "steps": steps, "has_file": has_file,
            "cut_short": cut_short}


def read_lines(path):
    """The objects of a .jsonl file. -> a list, and whether an incomplete last line was left out

    The last line may lack its end: the run is writing it, or was stopped as it did. Raises
    ValueError, naming the line, if any other is damaged.
    """
    with open(path, encoding="utf-8", errors="replace", newline="\n") as f:
        lines = f.read().split("\n")
    records = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            records.append(read_line(line, NEEDED[os.path.basename(path)]))
        except ValueError as e:
            if number == len(lines):
                return records, True
            raise ValueError(f"{path}, line {number} is damaged: {e}; remove the line, or let "
                             "train.py write the file again") from None
    return records, False


def read_line(line, needed):
    """A line as a dict. Raises ValueError if it is none, or lacks a needed {key: type}."""
    try:
        record = json.loads(line, parse_constant=refuse)
    except (json.JSONDecodeError, RecursionError):
        raise ValueError(f"no JSON, {line[:60]!r}") from None
    if not isinstance(record, dict):
        raise ValueError(f"no JSON object, {line[:60]!r}")
    for key, kind in needed.items():
        if type(record.get(key)) is not kind:              # True would pass as an int
            raise ValueError(f"{key!r} is missing or of another type")
    return record


def refuse(name):
    raise ValueError(f"{name} is no JSON")


# --------------------------------------------------------------------------------------------------
# curves

def read_curves(metrics):
    """-> {stage: {key: [[step, value], ...]}}. A value that was not finite is None: a gap."""
    curves = {}
    for stage, keys in CURVES.items():
        curves[stage] = {}
        for key in keys:
            points = []
            for record in metrics:
                if record["stage"] == stage and key in record:
                    points.append([record["step"], record[key]])
            points = thinned(points, MOST_POINTS)
            curves[stage][key] = [[step, short(value)] for step, value in points]
    return curves


def short(value):
    """A number with four significant digits, all that a curve can show."""
    return value if value is None else float(f"{value:.4g}")


def thinned(points, most):
    """At most `most` of the points [step, value], in order, the first and the last among them.

    Each is one that was logged, no average. Of equal stretches the lowest and the highest point
    stay: a single step whose loss jumped is still seen in a run of 100,000.
    """
    if len(points) <= most:
        return points
    kept = {0, len(points) - 1}
    stretches = (most - 2) // 2
    for i in range(stretches):
        stretch = range(len(points) * i // stretches, len(points) * (i + 1) // stretches)
        known = [j for j in stretch if points[j][1] is not None]
        if known:
            kept.add(min(known, key=lambda j: points[j][1]))
            kept.add(max(known, key=lambda j: points[j][1]))
        else:
            kept.add(stretch[0])
    return [points[j] for j in sorted(kept)]


# --------------------------------------------------------------------------------------------------
# into HTML

def script_json(data):
    """data as JSON that may stand in an HTML <script>: pure ASCII, and without <, > and &.

    A completion may hold any text. "</script>" or "<!--" would end the script or change how the
    rest is read; U+2028 would end a line of JavaScript; half a surrogate pair is no UTF-8. As
    \\u003c and so on they are only letters, and JSON.parse returns them as they were.
    """
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
