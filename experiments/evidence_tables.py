"""
The tables and the picture of the evidence, from the lines of evidence.jsonl alone.
"""
import math
import statistics
from functools import partial

import measures
import rows
from intervals import FEWEST, half_width, interval, is_narrow, seeds_needed, verdict

COLOURS = {"seen": "tab:green", "opposite": "tab:red", "not resolved": "tab:gray"}
FARTHEST = 30                  # smallest differences that the picture shows to either side


def digits(least):
    """Decimals with which a row's numbers are printed."""
    return max(0, math.ceil(1 - math.log10(least)))


def print_row(*cells):
    print("| " + " | ".join(cells) + " |")


def print_header(*cells):
    print_row(*cells)
    print("|" + "---|" * len(cells))


def judged(row, found):
    """Text: the verdict, and of a row that is not resolved why, or what it would take."""
    said = verdict(found, row.sign, row.least)
    if said != "not resolved":
        return said
    if is_narrow(found, row.least):
        return f"{said}: less than {row.least:g}, if any"
    return f"{said}: about {seeds_needed(found, row.least)} seeds would"


def compared(row):
    """Text: the two runs; one of two rules is judged on the same run."""
    without = "each alone"
    if isinstance(row.b, str):
        without = f"`{row.b}`"
    if row.a == row.b:
        return f"both on `{row.a}`"
    return f"`{row.a}` {row.sign} {without}"


def claims_table(results):
    print_header("claim", "measured", "with", "without", "difference (95% interval)", "worth it",
                 "seeds", "verdict")
    for row in rows.ROWS:
        pairs = rows.pairs(row, results)
        claim = f"{row.group}: {row.claim}"
        names = compared(row)
        worth = f"{row.least:g}"
        if not pairs:
            print_row(claim, row.unit, "", "", names, worth, "0", "not run")
            continue
        n = digits(row.least)
        a, b = (statistics.mean(pair[side] for pair in pairs) for side in (0, 1))
        found = [x - y for x, y in pairs]
        difference = f"{statistics.mean(found):+.{n}f}"
        if len(found) >= FEWEST:
            low, high = interval(found)
            difference += f" ({low:+.{n}f} to {high:+.{n}f})"
        print_row(claim, row.unit, f"{a:.{n}f}", f"{b:.{n}f}", f"{difference} {names}", worth,
                  str(len(pairs)), judged(row, found))


def spread(numbers):
    """Text: mean, and its 95% interval where there are enough seeds."""
    text = f"{statistics.mean(numbers):.1f}"
    if len(numbers) >= FEWEST:
        text += f" ± {half_width(numbers):.1f}"
    return text


def of_seeds(measure, name, results, also=()):
    """A measure of a run, for each seed that has it."""
    wanted = {name, *also} if isinstance(name, str) else {*name, *also}
    return [measure(of, name) for seed, of in sorted(results.items()) if wanted <= of.keys()]


def frames_table(results):
    print_header("frames", *map(str, rows.FRAMES))
    for name in ("once", "thinks"):
        cells = []
        for frames in rows.FRAMES:
            numbers = of_seeds(partial(measures.accuracy_at, frames), f"{name}-frames", results)
            cells.append(spread(numbers) if numbers else "")
        print_row(f"`{name}`", *cells)


def domains_table(results):
    """The cold start's accuracy by domain, and how RL on one domain or on all changes it."""
    print_header("trained on", *measures.DOMAINS, "mean")
    for name in ("before-five", *rows.SINGLE, "five"):
        columns = [partial(measures.domain_lift, domain) for domain in measures.DOMAINS]
        columns.append(measures.lift)
        run, also = f"{name}-all", ("before-five",)
        if name == "before-five":
            columns = [partial(measures.domain_accuracy, domain) for domain in measures.DOMAINS]
            columns.append(measures.accuracy)
            run = name
        cells = []
        for measure in columns:
            numbers = of_seeds(measure, run, results, also)
            cells.append(spread(numbers) if numbers else "")
        print_row(f"`{name}`", *cells)


def estimates_table(results):
    """What the two rules of RLCS estimated of the questions as they were drawn."""
    print_header("draws", "groups with signal, of 100", "observed", "still: estimated", "error",
                 "rank correlation", "follows: estimated", "error", "rank correlation")
    for name in ("uniform", "still", "follows"):
        found = [of[name]["visits"] for of in results.values() if name in of]
        if not found:
            continue
        signal = statistics.mean(100 * x["with_signal"] / x["groups"] for x in found)
        cells = [f"{signal:.1f}", f"{statistics.mean(x['observed'] for x in found):.2f}"]
        for rule in ("still", "follows"):
            for key in ("estimated", "error", "correlation"):
                cells.append(f"{statistics.mean(x[rule][key] for x in found):.2f}")
        print_row(f"`{name}`", *cells)


def print_cost(results):
    lines = [line for of in results.values() for line in of.values()]
    hours = sum(line["cpu_seconds"] for line in lines) / 3600
    commits = sorted({line["commit"] for line in lines})
    print(f"{len(lines)} runs, {hours:.1f} hours of one core; commits {', '.join(commits)}")


# --------------------------------------------------------------------------------------------------
# the picture

def draw(results, path):
    """A forest plot: each row's difference and its interval, in units of the smallest difference
    worth claiming, to the right where the claim says. Without rows of three seeds it is not drawn.
    """
    from matplotlib.figure import Figure
    drawn = []
    for row in rows.ROWS:
        found = rows.differences(row, results)
        if len(found) >= FEWEST:
            drawn.append((row, found))
    if not drawn:
        return
    groups = list(dict.fromkeys(row.group for row, _ in drawn))
    height = len(drawn) + len(groups)
    figure = Figure(figsize=(11, 0.9 + 0.24 * height), layout="constrained")
    axis = figure.subplots()
    places, labels, place = [], [], 0
    for group in groups:
        places.append(place)
        labels.append(group)
        place += 1
        for row, found in drawn:
            if row.group == group:
                draw_interval(axis, place, row, found)
                places.append(place)
                labels.append(f"{row.claim}  ")
                place += 1
    axis.set_yticks(places, labels, fontsize=8)
    for label in axis.get_yticklabels():
        if label.get_text() in groups:
            label.set_weight("bold")
    axis.tick_params(axis="y", length=0)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.axvspan(-1, 1, color="black", alpha=0.06, linewidth=0)
    axis.set_xscale("symlog", linthresh=1)
    ticks = [-30, -10, -3, -1, 0, 1, 3, 10, 30]
    axis.set_xticks(ticks, ticks)
    axis.set(xlim=(-FARTHEST, FARTHEST), ylim=(place - 0.3, -0.7),
             xlabel="difference and its 95% interval, in smallest differences worth claiming (grey "
                    "band: less); right: as claimed")
    for said, colour in COLOURS.items():
        axis.plot([], [], "o-", color=colour, label=said)
    axis.legend(fontsize=8, frameon=False, loc="lower left")
    figure.savefig(path, dpi=110)


def draw_interval(axis, place, row, found):
    """One row. What lies beyond the picture ends in an arrow; the number of seeds is at its right.
    """
    side = -1 if row.sign == "<" else 1
    scaled = [side * x / row.least for x in found]
    low, high = interval(scaled)
    colour = COLOURS[verdict(found, row.sign, row.least)]
    axis.plot([low, high], [place, place], color=colour, linewidth=1.8, solid_capstyle="butt")
    axis.plot([statistics.mean(scaled)], [place], "o", color=colour, markersize=4.5)
    for end, marker in ((high, ">"), (low, "<")):
        if abs(end) > FARTHEST:
            edge = math.copysign(FARTHEST, end)
            axis.plot([edge], [place], marker, color=colour, clip_on=False)
    axis.annotate(f"{len(found)} seeds", (1.01, place), xycoords=("axes fraction", "data"),
                  fontsize=7, va="center", color="dimgray")


def show(results, picture):
    claims_table(results)
    for table in (estimates_table, frames_table, domains_table, print_cost):
        print()
        table(results)
    draw(results, picture)
