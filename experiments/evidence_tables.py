"""
The tables and the picture of the evidence, from the lines of evidence.jsonl alone.
"""
import math
import re
import statistics
from functools import partial

import measures
import rows
from intervals import (
    FEWEST,
    half_width,
    interval,
    is_narrow,
    seeds_needed,
    verdict,
)

COLOURS = {"seen": "tab:green", "opposite": "tab:red", "not resolved": "tab:gray"}
FARTHEST = 30                  # smallest differences that the picture shows to either side


def digits(least):
    """Decimals with which a row's numbers are printed."""
    return max(0, math.ceil(1 - math.log10(least)))


def line(*cells):
    return "| " + " | ".join(cells) + " |"


def header(*cells):
    return [line(*cells), "|" + "---|" * len(cells)]


def judged(row, results):
    """Text: the verdict, and whether all of the interval is below or above the smallest difference
    worth claiming."""
    found = rows.differences(row, results)
    said = verdict(found, row.sign, row.least)
    if said not in COLOURS:
        return said
    text = f"{said} so far" if rows.gets_more_seeds(row, results) else said
    if row.sign == "=":
        return text
    ends = [abs(end) for end in interval(found)]
    if max(ends) < row.least:
        any_at_all = ", if any" if said == "not resolved" else ""
        text += f": less than {row.least:g}{any_at_all}"
    elif min(ends) > row.least and said != "not resolved":
        text += f": more than {row.least:g}"
    return text


def seeds_text(row, found):
    """Text: how many seeds, and where the interval is too wide, how many would make it narrow."""
    if len(found) < FEWEST or is_narrow(found, row.least):
        return str(len(found))
    return f"{len(found)} of {seeds_needed(found, row.least)}"


def compared(row):
    """Text: the two runs; of one run where two rules are judged on it."""
    without = "each alone"
    if isinstance(row.b, str):
        without = f"`{row.b}`"
    if row.a == row.b:
        return f"both on `{row.a}`"
    return f"`{row.a}` {row.sign} {without}"


def claims_table(results):
    lines = header("claim", "runs", "measured", "with", "without", "difference (95% interval)",
                   "least", "seeds", "verdict", "earlier")
    for group in dict.fromkeys(row.group for row in rows.ROWS):
        lines.append(line(f"**{group}**", *[""] * 9))
        for row in rows.ROWS:
            if row.group == group:
                lines.append(line(row.claim, compared(row), row.unit, *numbers_of(row, results),
                                  row.earlier))
    return lines


def numbers_of(row, results):
    """Texts of a row's cells, from "with" to "verdict"."""
    pairs = rows.pairs(row, results)
    if not pairs:
        return "", "", "", f"{row.least:g}", "0", "not run"
    n = digits(row.least)
    a, b = zip(*pairs)
    found = [x - y for x, y in pairs]
    difference = signed(statistics.mean(found), n)
    if len(found) >= FEWEST:
        low, high = interval(found)
        difference += f" ({signed(low, n)} to {signed(high, n)})"
    return (f"{statistics.mean(a):.{n}f}", f"{statistics.mean(b):.{n}f}", difference,
            f"{row.least:g}", seeds_text(row, found), judged(row, results))


def signed(x, n):
    """Text: x with n decimals, or with one more if it would be shown as zero."""
    if round(x, n) == 0:
        n += 1
    return f"{x:+z.{n}f}"                                  # z: no "-0.0"


def main_table(results):
    """The README's: the rows that matter most."""
    lines = header("claim", "difference (95% interval)", "verdict")
    for row in rows.ROWS:
        if row.short:
            _, _, difference, _, _, said = numbers_of(row, results)
            measured = f"{difference} {row.unit}" if difference else ""
            lines.append(line(row.short, measured, said))
    return lines


def changed_table(results):
    """Rows whose verdict is another than before there was a rule."""
    lines = header("claim", "earlier", "now")
    for row in rows.ROWS:
        found = rows.differences(row, results)
        now = verdict(found, row.sign, row.least)
        earlier = row.earlier.replace("not seen", "not resolved")
        if row.earlier and now in COLOURS and now != earlier:
            lines.append(line(f"{row.group}: {row.claim}", row.earlier, judged(row, results)))
    return lines


def spread(numbers):
    """Text: mean, and half of its 95% interval where there are enough seeds."""
    if not numbers:
        return ""
    text = f"{statistics.mean(numbers):.1f}"
    if len(numbers) >= FEWEST:
        text += f" ± {half_width(numbers):.1f}"
    return text


def by_seed(results, measure, name, *others):
    """A measure of a run, of each seed that has it and the others that the measure reads."""
    wanted = {name, *others}
    return [measure(of, name) for seed, of in sorted(results.items()) if wanted <= of.keys()]


def grades_table(results):
    """How hard the questions of the rows about RLCS are after the cold start."""
    lines = header("seed", "pass rate below 0.1", "between", "above 0.9")
    for seed, of in sorted(results.items()):
        if "graded" in of:
            lines.append(line(str(seed), *map(str, of["graded"]["grades"])))
    return lines


def estimates_table(results):
    """What the two rules of RLCS estimated of the questions as they were drawn."""
    lines = header("draws", "seeds", "groups with signal, of 100", "observed", "`still`: estimated",
                   "error", "rank correlation", "`follows`: estimated", "error", "rank correlation")
    for name in ("uniform", "still", "follows"):
        found = [of[name]["visits"] for of in results.values() if name in of]
        if not found:
            continue
        signal = statistics.mean(100 * x["with_signal"] / x["groups"] for x in found)
        cells = [f"{signal:.1f}", f"{statistics.mean(x['observed'] for x in found):.2f}"]
        for rule in ("still", "follows"):
            for key in ("estimated", "error", "correlation"):
                cells.append(f"{statistics.mean(x[rule][key] for x in found):.2f}")
        lines.append(line(f"`{name}`", str(len(found)), *cells))
    return lines


def frames_table(results):
    lines = header("frames", *map(str, rows.FRAMES))
    for name in ("once", "thinks"):
        cells = []
        for frames in rows.FRAMES:                         # of seeds that have both runs
            measure = partial(measures.accuracy_at, frames)
            cells.append(spread(by_seed(results, measure, f"{name}-frames", "once-frames",
                                        "thinks-frames")))
        lines.append(line(f"`{name}`", *cells))
    return lines


def domains_table(results):
    """The cold start's accuracy by domain, and how RL on one domain or on all changes it."""
    lines = header("trained on", *measures.DOMAINS, "mean")
    before, lifts = [], [partial(measures.domain_lift, domain) for domain in measures.DOMAINS]
    for domain in measures.DOMAINS:
        measure = partial(measures.domain_accuracy, domain)
        before.append(spread(by_seed(results, measure, "before-five")))
    lines.append(line("`cold-five`", *before, ""))
    for name in (*rows.SINGLE, "five"):
        cells = []
        for measure in (*lifts, measures.lift):
            cells.append(spread(by_seed(results, measure, f"{name}-all", "before-five")))
        lines.append(line(f"`{name}`", *cells))
    return lines


def fooled_table(results):
    """What a verifier sees in count, and what is true there."""
    lines = header("verifier", "accuracy it sees: first step", "last three steps",
                   "true accuracy, held out, at the end")
    for name, verifier in (("base", "ours"), ("hacked", "one that can be fooled")):
        cells = []
        for measure in (measures.first_accuracy, measures.last_accuracy, measures.true_accuracy):
            cells.append(spread(by_seed(results, measure, name, "base", "hacked", "hacked-true")))
        lines.append(line(verifier, *cells))
    return lines


def runs_table(results):
    """What each run is."""
    lines = header("run", "starts from", "flags")
    for name, run in rows.RUNS.items():
        flags = run.arguments
        for word in ("RL", "COLD", "EVALUATE"):
            flags = flags.replace(getattr(rows, word), word)
        flags = f"`{flags}`"
        if run.kl:
            flags += ", with `experiments/kl.diff`"
        lines.append(line(f"`{name}`", run.start and f"`{run.start}`", flags))
    return lines


def least_table(results):
    """What the smallest differences are, and why: one line for each reason."""
    lines = header("least", "why", "for")
    reasons = {}
    for row in rows.ROWS:
        reasons.setdefault((row.unit, row.least, row.why), []).append(row.group)
    for (unit, least, why), groups in reasons.items():
        lines.append(line(f"{least:g} {unit}", why, "; ".join(dict.fromkeys(groups))))
    return lines


def cost_table(results):
    lines = header("code", "runs", "hours of one core")
    by_commit = {}
    for of in results.values():
        for found in of.values():
            by_commit.setdefault(found["commit"], []).append(found["cpu_seconds"])
    for commit, seconds in by_commit.items():
        lines.append(line(f"`{commit}`", str(len(seconds)), f"{sum(seconds) / 3600:.2f}"))
    return lines


TABLES = {"claims": claims_table, "main": main_table, "changed": changed_table,
          "grades": grades_table, "estimates": estimates_table, "frames": frames_table,
          "domains": domains_table, "fooled": fooled_table, "runs": runs_table,
          "least": least_table, "cost": cost_table}
PAGES = ("docs/evidence.md", "README.md")


def with_tables(text, results):
    """A page with its tables made anew: each stands under a line <!-- table: NAME -->."""
    for name, table in TABLES.items():
        mark = f"<!-- table: {name} -->\n"
        parts = re.split(rf"{mark}(?:\|.*\n)*", text)
        text = (mark + "\n".join(table(results)) + "\n").join(parts)
    return text


# --------------------------------------------------------------------------------------------------
# the picture

def draw(results, path):
    """A forest plot: each row's difference and its interval, in units of the smallest difference
    worth claiming, to the right where the claim says. A row without three seeds has no line yet.
    """
    from matplotlib.figure import Figure
    groups = list(dict.fromkeys(row.group for row in rows.ROWS))
    height = len(rows.ROWS) + len(groups)
    figure = Figure(figsize=(11, 0.9 + 0.24 * height), layout="constrained")
    axis = figure.subplots()
    labels = []
    for group in groups:
        labels.append(group)
        for row in rows.ROWS:
            if row.group == group:
                draw_row(axis, len(labels), row, rows.differences(row, results))
                labels.append(f"{row.claim}  ")
    axis.set_yticks(range(len(labels)), labels, fontsize=8)
    for label in axis.get_yticklabels():
        if label.get_text() in groups:
            label.set_weight("bold")
    axis.tick_params(axis="y", length=0)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.axvspan(-1, 1, color="black", alpha=0.06, linewidth=0)
    axis.set_xscale("symlog", linthresh=1)
    ticks = [-30, -10, -3, -1, 0, 1, 3, 10, 30]
    axis.set_xticks(ticks, ticks)
    axis.set(xlim=(-FARTHEST, FARTHEST), ylim=(len(labels) - 0.3, -0.7),
             xlabel="difference and 95% interval, in smallest differences worth claiming\n"
                    "right of zero: as claimed; for a claim of equality: within the grey band; "
                    "hollow: less than worth claiming")
    for said, colour in COLOURS.items():
        axis.plot([], [], "o-", color=colour, label=said)
    axis.legend(fontsize=8, frameon=False, loc="lower left")
    figure.savefig(path, dpi=110)


def draw_row(axis, place, row, found):
    """A row's interval, in the colour of its verdict. What lies beyond the picture ends in an
    arrow; the number of seeds is at the right. Hollow: all of it is within the grey band."""
    seeds = "1 seed" if len(found) == 1 else f"{len(found)} seeds"
    axis.annotate(seeds, (1.01, place), xycoords=("axes fraction", "data"),
                  fontsize=7, va="center", color="dimgray")
    if len(found) < FEWEST:
        return
    side = -1 if row.sign == "<" else 1
    scaled = [side * x / row.least for x in found]
    low, high = interval(scaled)
    colour = COLOURS[verdict(found, row.sign, row.least)]
    axis.plot([low, high], [place, place], color=colour, linewidth=1.8, solid_capstyle="butt")
    inner = "white" if max(abs(low), abs(high)) < 1 else colour
    axis.plot([statistics.mean(scaled)], [place], "o", color=colour, markersize=4.5,
              markerfacecolor=inner)
    for end, marker in ((high, ">"), (low, "<")):
        if abs(end) > FARTHEST:
            edge = math.copysign(FARTHEST, end)
            axis.plot([edge], [place], marker, color=colour, clip_on=False)
