"""
See what a run did: its curves, and of some RL steps the questions, the frames, the sampled answers
token by token, and what was learned from them.

    python watch.py out        writes out/watch.html, from what the run keeps in out/

The page is one file; open it in a browser. train.py writes it too, with every checkpoint.
"""
import os
import sys
from dataclasses import dataclass

from plumbing import command_line
from plumbing.page import write_page
from plumbing.ranks import run_command


@dataclass
class Options:
    out_dir: str = "out"           # the folder of a run; also given without --out_dir=


def parse(arguments):
    """`watch.py FOLDER` or `watch.py --out_dir=FOLDER` -> `Options`"""
    if arguments and not arguments[0].startswith("-"):
        arguments = [f"--out_dir={arguments[0]}", *arguments[1:]]
    return command_line.parse(Options, __doc__, arguments)


def main():
    c = parse(sys.argv[1:])
    data = write_page(c.out_dir)
    path = os.path.join(c.out_dir, "watch.html")
    print(f"{path}: {data['done']['rl']} RL steps, {len(data['steps'])} of them step by step, "
          f"{os.path.getsize(path) / 1e6:.1f} MB; open it in a browser")
    for name in data["cut_short"]:
        print(f"left out the last line of {name}: it is incomplete, since the run was stopped, or "
              "is still writing")
    if not data["has_file"]:
        why = "the run has no RL step yet"
        if data["done"]["rl"]:
            why = "it was made before runs kept one, or the file was removed"
        print(f"only curves: there is no {c.out_dir}/rollouts.jsonl; {why}")


if __name__ == "__main__":
    run_command("watch.py", main)
