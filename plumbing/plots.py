"""
Pictures and tables: the curves of a run, an evaluation, and the rows of bench.py.

matplotlib is imported only where something is drawn: a run without pictures does not need it.
"""
import json
import os

SMALL = {"fontsize": 8, "frameon": False}


def draw_curves(lines, path):
    """A run at a glance: losses, rewards, accuracy, lengths, entropy, and where the seconds go.

    lines: of metrics.jsonl, as text, in order. Nothing is drawn if there are none. The picture is
    written under another name and then renamed, so that a viewer never sees half of one.
    """
    from matplotlib.figure import Figure
    records = [json.loads(line) for line in lines]
    if not records:
        return
    rl = [record for record in records if record["stage"] == "rl"]
    figure = Figure(figsize=(12, 6))
    # To find the margins ("constrained") would take longer than to draw.
    figure.subplots_adjust(left=0.05, right=0.99, bottom=0.08, top=0.95, wspace=0.18, hspace=0.36)
    [[losses, rewards, held_out], [lengths, entropies, seconds]] = figure.subplots(2, 3)
    draw_losses(losses, records)
    draw_keys(rewards, rl, "sampled answers", ["reward", "accuracy", "format"])
    draw_held_out(held_out, records)
    draw_keys(lengths, rl, "tokens per completion", ["length"])
    draw_keys(entropies, rl, "entropy and forced answers", ["entropy", "forced"],
              labels=["entropy (nats)", "forced (share)"])
    draw_seconds(seconds, rl)
    figure.savefig(path + ".tmp", dpi=100, format="png")
    os.replace(path + ".tmp", path)


def draw_losses(axis, records):
    """The loss of the two supervised stages, one after the other."""
    supervised = [record for record in records if record["stage"] != "rl" and "loss" in record]
    for stage, label in (("align", "align"), ("sft", "cold start")):
        steps, losses = [], []
        for step, record in enumerate(supervised):
            if record["stage"] == stage:
                steps.append(step)
                losses.append(record["loss"])
        axis.plot(steps, losses, linewidth=1, label=label)
    axis.set(title="loss of the supervised stages", xlabel="step", yscale="log")
    axis.legend(**SMALL)


def draw_keys(axis, rl, title, keys, labels=None):
    """A line for each key of the RL steps' records; the legend shows labels, or else the keys."""
    steps = [record["step"] for record in rl]
    for key, label in zip(keys, labels or keys):
        axis.plot(steps, [record[key] for record in rl], label=label, linewidth=1)
    axis.set(title=title, xlabel="RL step")
    axis.legend(**SMALL)


def draw_held_out(axis, records):
    """Greedy accuracy on held-out samples; step 0 of RL is the end of the cold start."""
    steps, accuracies = [], []
    for record in records:
        if "eval_accuracy" in record:
            steps.append(0 if record["stage"] == "sft" else record["step"])
            accuracies.append(record["eval_accuracy"])
    axis.plot(steps, accuracies, "o-")
    axis.set(title="held-out accuracy, greedy", xlabel="RL step (0: after the cold start)",
             ylim=(0, 1))


def draw_seconds(axis, rl):
    """The seconds of each RL step by phase, stacked."""
    phases = ["encode", "rollout", "train"]
    if rl:
        steps = [record["step"] for record in rl]
        seconds = []
        for phase in phases:
            seconds.append([record.get(f"{phase}_s", 0.0) for record in rl])
        axis.stackplot(steps, *seconds, labels=phases)
        axis.legend(**SMALL)
    axis.set(title="seconds per step", xlabel="RL step")


# --------------------------------------------------------------------------------------------------
# an evaluation

TIER_NOTES = {0: " (hard)", 4: " (easy)"}


def percent(share, width):
    """A share as a percentage, right-aligned; "-" for None."""
    if share is None:
        return "-".rjust(width)
    return f"{share:{width}.1%}"


def eval_table(result, rows):
    """Text: an evaluation by domain and by tier of difficulty, and a line for each row of a sweep.

    result: of `evaluate`; rows: of a sweep, a result for each setting, or none.
    """
    lines = [f"{'':14} samples  accuracy"]
    for domain, accuracy in result["domains"].items():
        lines.append(f"{domain:14} {'':>7} {percent(accuracy, 9)}")
    for i, tier in enumerate(result.get("tiers", [])):
        name = f"tier {i}{TIER_NOTES.get(i, '')}"
        accuracy = tier["accuracy"] if tier["samples"] else None
        lines.append(f"{name:14} {tier['samples']:>7} {percent(accuracy, 9)}")
    total = f"{'all':14} {result['samples']:>7} {percent(result['accuracy'], 9)}"
    if result["dropped"]:
        total += f"; {result['dropped']} dropped"
    pass_at = [f"{key} {value:.1%}" for key, value in result.items() if key.startswith("pass@")]
    lines.append(f"{total}; format {result['format']:.1%}, " + ", ".join(pass_at))
    if rows:
        lines += ["", "frames  thinking tokens  samples  accuracy  format  forced  "
                      "of these right  tokens per answer"]
    for row in rows:
        budget = str(row["think_budget"])
        if row["think_least"]:
            budget = f"{row['think_least']}-{budget}"
        lines.append(
            f"{row['frames']:6d} {budget:>16} {row['samples']:8d} {percent(row['accuracy'], 9)} "
            f"{percent(row['format'], 7)} {percent(row['forced'], 7)} "
            f"{percent(row['forced_accuracy'], 15)} {row['length']:18.1f}")
    return "\n".join(lines)


def draw_sweep(results, path):
    """Held-out accuracy against thinking tokens, with a line for each number of frames; or against
    frames, if only they vary.

    results: of `evaluate`, a dict for each setting. A thought is cut after think_budget tokens.
    With think_least, a shorter one is extended with "Wait," to at least that many.
    """
    from matplotlib.figure import Figure
    axis = Figure(figsize=(6, 4), layout="constrained").subplots()
    budgets = {(result["think_least"], result["think_budget"]) for result in results}
    if len(budgets) > 1:
        draw_budgets(axis, results)
        xlabel = "thinking tokens"
    else:
        points = sorted((result["frames"], result["accuracy"]) for result in results)
        axis.plot(*zip(*points), "o-")
        xlabel = "frames"
    axis.set(title="held-out accuracy, greedy", xlabel=xlabel, ylim=(0, 1))
    axis.figure.savefig(path, dpi=100)


def draw_budgets(axis, results):
    """For each number of frames two lines: thoughts that were cut, and thoughts that were
    extended."""
    for i, frames in enumerate(sorted({result["frames"] for result in results})):
        cut, extended = [], []
        for result in results:
            if result["frames"] != frames:
                continue
            if result["think_least"]:
                extended.append((result["think_least"], result["accuracy"]))
            else:
                cut.append((result["think_budget"], result["accuracy"]))
        for points, style, label in (
                (cut, "o-", "cut after this many tokens"),
                (extended, "^:", 'extended to at least this many tokens with "Wait,"')):
            if points:
                axis.plot(*zip(*sorted(points)), style, color=f"C{i}",
                          label=f"{frames} frames, {label}")
    axis.legend(**SMALL)


# --------------------------------------------------------------------------------------------------
# bench.py's rows

BENCH_LINE = (
    "{frames:>6}  {variant:9}  {cache:5} {engine:6} {sp:>2} {P:>7} {s/step:>8} {faster:>6} "
    "{encode:>7} {rollout:>7} {tok/s:>6} {train:>7} {of_peak:>7} {LM_tokens:>15} {fewer:>5} "
    "{encodes:>7} {saved_MB:>9} {less:>5} {peak_MB:>11} {gap:>6}  {norm}")
BENCH_LEGEND = """\
faster, fewer, less: compared with the first row with the same frames. tok/s: tokens sampled in the
rollout. of_peak: FLOPs of a packed forward and backward per second of train (which includes the
update), as a share of a GPU's bfloat16 peak. LM_tokens: of our model, without vLLM's copy.
saved_MB: kept for the backward. gap: largest difference in log-prob between sampler and trainer.
norm: of the gradient in the first step; equal if weights and completions are equal."""


def bench_cells(row, first):
    """The texts of a row's line, by column. first: the row that it is compared with."""
    of_peak = "-"
    if row["peak_share"]:
        of_peak = f"{row['peak_share']:.0%}"
    return {
        "frames": row["frames"], "variant": row["variant"], "cache": row["cache"],
        "engine": row["rollout"], "sp": row["sp"], "P": row["prompt_tokens"],
        "s/step": f"{row['seconds']:.3f}",
        "faster": f"{first['seconds'] / row['seconds']:.1f}x",
        "encode": f"{row['encode_s']:.3f}", "rollout": f"{row['rollout_s']:.3f}",
        "tok/s": f"{row['group'] * row['completion'] / row['rollout_s']:.0f}",
        "train": f"{row['train_s']:.3f}", "of_peak": of_peak,
        "LM_tokens": "+".join(map(str, row["lm_by_rank"])),
        "fewer": f"{first['lm_tokens'] / row['lm_tokens']:.1f}x",
        "encodes": f"{row['encodes']:g}", "saved_MB": f"{row['saved_mb']:.1f}",
        "less": f"{first['saved_mb'] / row['saved_mb']:.1f}x",
        "peak_MB": " ".join(f"{peak:.0f}" for peak in row["peak_by_rank"]),
        "gap": f"{row['gap']:.0e}", "norm": f"{row['norm']:.6g}"}


def bench_table(rows):
    """Text: a line for each row, compared with the first row of the same frames."""
    first_by_frames, lines = {}, []
    for row in rows:
        first = first_by_frames.setdefault(row["frames"], row)
        cells = bench_cells(row, first)
        if not lines:
            lines.append(BENCH_LINE.format(**{name: name for name in cells}))
        lines.append(BENCH_LINE.format(**cells))
    return "\n".join([*lines, BENCH_LEGEND])


BENCH_COLOURS = {"naive": "C0", "reuse": "C1", "shared": "C2", "shared+sp": "C3"}
BENCH_MARKERS = {1: "o", 2: "s", 3: "^"}                   # by ranks; more: "v"
BENCH_STYLES = {"cold": "-", "warm": "--"}


def draw_bench(rows, path):
    """Seconds of a GRPO step against frames, with a line for each variant, cache, number of ranks
    and engine.

    rows: of bench.py, a dict each.
    """
    from matplotlib.figure import Figure
    rows_by_label = {}
    for row in sorted(rows, key=lambda row: row["frames"]):
        rows_by_label.setdefault(bench_label(row), []).append(row)
    axis = Figure(figsize=(8, 4.5), layout="constrained").subplots()
    for label, line in rows_by_label.items():
        first = line[0]
        axis.plot(
            [row["frames"] for row in line], [row["seconds"] for row in line],
            BENCH_STYLES[first["cache"]], color=BENCH_COLOURS[first["variant"]],
            marker=BENCH_MARKERS.get(first["sp"], "v"), label=label)
    first = rows[0]
    axis.set(title=f"one GRPO step, {first['size']} x {first['size']} pixels, "
                   f"{first['group']} completions of {first['completion']} tokens",
             xlabel="frames", ylabel="seconds per step", xscale="log", yscale="log")
    frames = sorted({row["frames"] for row in rows})
    axis.set_xticks(frames, frames)
    axis.tick_params(axis="x", which="minor", length=0, labelbottom=False)
    axis.yaxis.set_major_formatter("{x:g}")
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    axis.figure.savefig(path, dpi=120)


def bench_label(row):
    """What the legend calls the line of a row."""
    label = f"{row['variant']}, {row['cache']}"
    if row["sp"] > 1:
        label += f", {row['sp']} ranks"
    if row["rollout"] == "vllm":
        label += ", vllm"
    return label
