"""
The additional settings of an evaluation: numbers of frames, and thinking budgets.
"""
import re
from dataclasses import dataclass


@dataclass
class Setting:
    """One row of a sweep."""
    frames: int
    think_least: int       # tokens; a thought that would end earlier is extended
    think_budget: int      # tokens; the maximum


def sweep(c):
    """The settings of --eval_frames and --eval_budgets, besides the run's own. -> `Setting`s
    Raises ValueError if they are not lists of numbers, or cannot work."""
    asked = f"--eval_frames={c.eval_frames} --eval_budgets={c.eval_budgets}"
    frames = [re.fullmatch(r"\d+", text) for text in c.eval_frames.split(",") if text]
    budgets = [re.fullmatch(r"(?:(\d+)-)?(\d+)", x) for x in c.eval_budgets.split(",") if x]
    if None in frames + budgets:
        raise ValueError(f"{asked}: whole numbers with commas between, a budget also as LEAST-MOST")
    if not frames and not budgets:
        return []
    frames = [int(found[0]) for found in frames] or [c.frames]
    budgets = [(int(found[1] or 0), int(found[2])) for found in budgets] or [(0, c.think_budget)]
    settings = [Setting(f, least, most) for f in frames for least, most in budgets]
    for setting in settings:
        no_answer = setting.think_budget == 0 and not c.force_answer
        if setting.frames < 1 or setting.think_least > setting.think_budget or no_answer:
            raise ValueError(f"{asked}: frames are at least 1, the least budget no larger than the "
                             "most, and a budget of 0 needs force_answer")
        if setting.think_least and c.rollout != "torch":
            raise ValueError(f"{asked}: a least budget is the torch engine's alone; leave out "
                             "--rollout")
    return settings
