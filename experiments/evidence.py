"""
The evidence: which claims of the two papers are seen on the built-in videos.

    python experiments/evidence.py OUT              make what is missing, in the folder OUT
    python experiments/evidence.py OUT --workers=1  one run at a time instead of two, a core each
    python experiments/evidence.py tables           print the tables, draw the picture; both are
                                                    renewed in docs/ and in the README as well

Each finished run adds a line to evidence.jsonl, and is never made again. The command may be stopped
at any time, and goes on where it was: only unfinished runs are begun again. rows.py lists runs and
rows, intervals.py says when a row has enough seeds. Output of a run is in OUT/RUN-SEED.log.
"""
import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXPERIMENTS = ROOT / "experiments"
sys.path[:0] = [str(ROOT), str(EXPERIMENTS)]
import evidence_tables  # noqa: E402
import measures  # noqa: E402
import rows  # noqa: E402
import visits  # noqa: E402
from evidence_lines import DamagedLine, check_results, read_lines  # noqa: E402
from intervals import FEWEST  # noqa: E402

import data  # noqa: E402

RESULTS = EXPERIMENTS / "evidence.jsonl"
FEW = (24, 16, 24)     # questions that come back: hardly ever right, between, nearly always right


# --------------------------------------------------------------------------------------------------
# what a run is, and its line of evidence.jsonl

def command(name, seed):
    """A run's command; OUT/ stands for the folder of all runs. -> list of words, the script first

    It is the run's key: a run whose command has a line is never made again.
    """
    run = rows.RUNS[name]
    words = {}                                             # the last of each option counts
    for word in run.arguments.replace("SEED", str(seed)).split():
        words[word.partition("=")[0]] = word
    script = ["train.py"]
    if run.rule:
        script = ["experiments/visits.py", run.rule]
    if run.start:
        script.append(f"--model=OUT/{run.start}-{seed}/model")
    return [*script, f"--seed={seed}", *words.values(), f"--out_dir=OUT/{name}-{seed}"]


def read_results(path):
    """-> {seed: {run: its line}}, of the runs as rows.py has them now. Raises DamagedLine."""
    results = {}
    for where, line in read_lines(path):
        if is_current(line):
            check_results(where, line)
            results.setdefault(line["seed"], {})[line["run"]] = line
    return results


def is_current(line):
    name = line["run"]
    return name in rows.RUNS and line["command"] == shown(name, line["seed"])


def not_used(path):
    """Text: how many lines are in no table, and of which runs; empty if all are in one."""
    lines = [line for _, line in read_lines(path)]
    unknown, other_flags = [], []
    for line in lines:
        if line["run"] not in rows.RUNS:
            unknown.append(line)
        elif not is_current(line):
            other_flags.append(line)
    texts = []
    for some, why in ((unknown, "runs that rows.py does not have"),
                      (other_flags, "runs that have other flags now")):
        if some:
            names = [f"{line['run']}-{line['seed']}" for line in some[:5]]
            more = ", ..." if len(some) > 5 else ""
            texts.append(f"{len(some)} of {why} ({', '.join(names)}{more})")
    if not texts:
        return ""
    return (f"{path}: of {len(lines)} lines, {len(unknown) + len(other_flags)} are in no table: "
            + ", ".join(texts))


def shown(name, seed):
    return " ".join(["python", *command(name, seed)])


def commit():
    """That of the code, with "+" if it was changed since."""
    def git(*arguments):
        result = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
        if result.returncode:
            sys.exit(f"evidence.py: {ROOT} is no git repository, so its lines could not say of "
                     f"which commit they are: {result.stderr.strip()}")
        return result.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "*.py", "*.diff")
    return git("rev-parse", "--short=10", "HEAD") + ("+" if changed else "")


def short(x):
    """A number with the digits that matter."""
    return float(f"{x:.6g}") if isinstance(x, float) else x


def evaluation(row):
    """What a line keeps of an evaluation in metrics.jsonl."""
    domains = {}
    for key, value in row.items():
        if key.startswith("eval_accuracy_"):
            domains[key.removeprefix("eval_accuracy_")] = short(value)
    return {"step": row["step"], "accuracy": short(row["eval_accuracy"]), "domains": domains}


def results_of_training(folder):
    """What a line keeps of metrics.jsonl: evaluations, and the RL steps."""
    with open(folder / "metrics.jsonl") as f:
        log = [json.loads(line) for line in f]
    line = {"held_out": []}
    for row in log:
        if "eval_accuracy" in row:
            line["held_out"].append(evaluation(row))
    rl = [row for row in log if row["stage"] == "rl"]
    line["steps"] = {}
    for key in measures.KEPT:
        if any(key in row for row in rl):
            line["steps"][key] = [short(row.get(key)) for row in rl]
    if (folder / "visits.jsonl").exists():
        line["visits"] = visits.summary(folder / "visits.jsonl")
    return line


def results_of_evaluation(log):
    """What a line keeps of the JSON that an evaluation prints last."""
    result = json.loads([text for text in log.splitlines() if text.startswith("{")][-1])
    domains = {domain: short(x) for domain, x in result["domains"].items()}
    line = {"samples": result["samples"],
            "held_out": [{"accuracy": short(result["accuracy"]), "domains": domains}]}
    if "rows" in result:
        line["frames"] = {str(row["frames"]): short(row["accuracy"]) for row in result["rows"]}
    return line


def results_of_grading(folder):
    """How many questions are hardly ever right, between, and nearly always right."""
    return {"grades": [len(part) for part in by_grade(folder)]}


def by_grade(folder):
    """-> three lists of the lines of grades.jsonl: hardly ever right, between, nearly always"""
    parts = [], [], []
    with open(folder / "grades.jsonl") as f:
        for line in f:
            row = json.loads(line)
            share = row["correct"] / row["total"]
            parts[int(share > 0.1) + int(share > 0.9)].append(line)
    return parts


# --------------------------------------------------------------------------------------------------
# which run is next

def order(results):
    """[(row, seed)] that are missing, in the order of work: first three seeds of each row, the most
    important row first; then a seed at a time for the rows whose interval is still too wide. Once
    the hours are used, nothing is."""
    wanted = []
    for place, row in enumerate(rows.ROWS):
        if not rows.gets_more_seeds(row, results):
            continue
        seeds = rows.complete_seeds(row, results)
        for seed in range(seeds, max(FEWEST, seeds + 1)):
            when = (0, place, seed) if seed < FEWEST else (1, seed, place)
            wanted.append((when, row, seed))
    wanted.sort(key=itemgetter(0))
    return [(row, seed) for _, row, seed in wanted]


def is_there(name, seed, out):
    """Whether a run's folder can be used: it is whole, and was not removed."""
    return (out / f"{name}-{seed}.done").exists() and (out / f"{name}-{seed}").exists()


def needed(name):
    """The runs whose folders a run reads."""
    run = rows.RUNS[name]
    return [*filter(None, [run.start]), *run.needs]


def first_missing(name, seed, out):
    """The run to make so that `name` can be made in the end: itself, or what it needs."""
    for other in needed(name):
        if not is_there(other, seed, out):
            return first_missing(other, seed, out)
    return name


def next_run(results, out, busy):
    """(run, seed), or None if nothing can be begun now. busy: those that are running or failed"""
    for row, seed in order(results):
        for name in rows.runs_of(row):
            if name not in results.get(seed, {}):
                first = first_missing(name, seed, out)
                if (first, seed) not in busy:
                    return first, seed
    return None


# --------------------------------------------------------------------------------------------------
# making runs

@dataclass
class Job:
    name: str
    seed: int
    process: subprocess.Popen
    start: float


def write_questions(out):
    """The 512 questions that are graded, and those that are held out."""
    training, held_out = data.split(data.load("toy"))
    for file, samples in (("many.jsonl", training[:512]), ("held.jsonl", held_out)):
        if not (out / file).exists():
            with open(out / f"{file}.tmp", "w") as f:
                f.writelines(json.dumps(vars(sample)) + "\n" for sample in samples)
            os.replace(out / f"{file}.tmp", out / file)


def choose_few(folder, out):
    """Of the graded questions, those that the RLCS runs have: few.jsonl with few_grades.jsonl."""
    grades = []
    for part, most in zip(by_grade(folder), FEW):
        grades += part[:most]
    ids = {json.loads(line)["id"] for line in grades}
    with open(out / "many.jsonl") as f:
        questions = [line for line in f if json.loads(line)["id"] in ids]
    (folder / "few.jsonl").write_text("".join(questions))
    (folder / "few_grades.jsonl").write_text("".join(grades))


def copy_code_with_kl(folder):
    """The code, with kl.diff applied, in a folder."""
    folder.mkdir(exist_ok=True)
    for file in ROOT.glob("*.py"):
        shutil.copy(file, folder)
    shutil.copytree(ROOT / "plumbing", folder / "plumbing", dirs_exist_ok=True)
    # In a folder that belongs to a repository git would look for the files in that one.
    no_repository = {**os.environ, "GIT_DIR": str(folder / "none")}
    subprocess.run(["git", "apply", str(EXPERIMENTS / "kl.diff")], cwd=folder, check=True,
                   env=no_repository)


def begin(name, seed, out):
    """Start a run from nothing. -> `Job`"""
    code, folder = ROOT, out / f"{name}-{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    if rows.RUNS[name].kl:
        code = out / f"code-{name}-{seed}"
        shutil.rmtree(code, ignore_errors=True)
        copy_code_with_kl(code)
    words = [word.replace("OUT/", f"{out}/") for word in command(name, seed)]
    with open(f"{folder}.log", "w") as f:
        process = subprocess.Popen([sys.executable, *words], cwd=code, stdout=f, stderr=f,
                                   env={**os.environ, "OMP_NUM_THREADS": "1"})
    return Job(name, seed, process, time.time())


def finish(job, usage, out, results_file, version):
    """A run has ended well: add its line, unless it has one; remove what no other run reads."""
    name, seed, folder = job.name, job.seed, out / f"{job.name}-{job.seed}"
    run = rows.RUNS[name]
    if "--mode=grade" in run.arguments:
        found = results_of_grading(folder)
        choose_few(folder, out)
    elif "--mode=eval" in run.arguments:
        found = results_of_evaluation(Path(f"{folder}.log").read_text())
    else:
        found = results_of_training(folder)
    line = {"run": name, "seed": seed, "commit": version, "command": shown(name, seed),
            "seconds": round(time.time() - job.start),
            "cpu_seconds": round(usage.ru_utime + usage.ru_stime), **found}
    check_results(f"the line of {name}-{seed}", line)      # else no later call could read the file
    if name not in read_results(results_file).get(seed, {}):
        with open(results_file, "a") as f:
            f.write(json.dumps(line) + "\n")
    Path(f"{folder}.done").touch()
    shutil.rmtree(out / f"code-{name}-{seed}", ignore_errors=True)
    results = read_results(results_file)
    for other in rows.RUNS:
        readers = [reader for reader in rows.RUNS if other in needed(reader)]
        read = all(reader in results.get(seed, {}) for reader in readers)
        if read and is_there(other, seed, out) and not other.startswith("cold"):
            shutil.rmtree(out / f"{other}-{seed}")


def make_all(out, workers=2, results_file=RESULTS):
    """Until no row wants a seed, or the hours are used. -> names of the runs that failed; the
    others go on without them"""
    out.mkdir(parents=True, exist_ok=True)
    write_questions(out)
    version = commit()
    jobs, failed = [], set()
    try:
        while True:
            results = read_results(results_file)
            busy = failed | {(job.name, job.seed) for job in jobs}
            following = next_run(results, out, busy) if len(jobs) < workers else None
            if following:
                jobs.append(begin(*following, out))
                continue
            if not jobs:
                return sorted(f"{name}-{seed}" for name, seed in failed)
            job, status, usage = wait(jobs)
            jobs.remove(job)
            seconds = f"{time.time() - job.start:.0f} s"
            why = "see its .log" if status else ""
            if not status:
                try:
                    finish(job, usage, out, results_file, version)
                except DamagedLine as e:
                    why = str(e)
            if why:
                failed.add((job.name, job.seed))
                print(f"{job.name}-{job.seed} failed after {seconds}: {why}", flush=True)
            else:
                print(f"{job.name}-{job.seed} done in {seconds}", flush=True)
    finally:
        for job in jobs:                                   # this command was stopped
            job.process.terminate()
            job.process.wait()


def wait(jobs):
    """For the first that ends. -> job, exit status, what it used"""
    while True:
        for job in jobs:
            ended, status, usage = os.wait4(job.process.pid, os.WNOHANG)
            if ended:
                job.process.returncode = status
                return job, status, usage
        time.sleep(0.2)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="the folder of the runs, or the word tables")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, a core each")
    options = parser.parse_args()
    if options.workers < 1:
        parser.error("--workers must be at least 1")
    failed = []
    if options.out != "tables":
        # What stops this command stops its runs, too.
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit("stopped"))
        failed = make_all(Path(options.out).absolute(), options.workers)
    results = read_results(RESULTS)
    left_out = not_used(RESULTS)
    if left_out:
        print(left_out, file=sys.stderr)
    for page in evidence_tables.PAGES:
        text = (ROOT / page).read_text()
        (ROOT / page).write_text(evidence_tables.with_tables(text, results))
    evidence_tables.draw(results, ROOT / "assets" / "evidence.png")
    for table in evidence_tables.TABLES.values():
        print("\n".join(table(results)), end="\n\n")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    try:
        main()
    except DamagedLine as e:
        sys.exit(f"evidence.py: {e}")
