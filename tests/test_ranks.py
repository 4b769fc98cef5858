"""python -m pytest tests/test_ranks.py -q

The processes that torchrun starts, in plumbing/ranks.py. The several processes are real ones that
talk over gloo: see worlds.py.
"""
import doctest
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import worlds
from runs import OF_TORCHRUN
from worlds import World

from flow import Ranks, VideoError
from plumbing import ranks as ranks_file
from plumbing.ranks import deal, on_first, shard, start, together, versions

ALONE = Ranks()
ROOT = Path(__file__).resolve().parent.parent


def case_ranks(_, ranks):
    """Who am I, and whom does my group reach."""
    reached = [None] * ranks.sp
    if ranks.group is not None:
        dist.all_gather_object(reached, ranks.rank, group=ranks.group)
    mine = [ranks.rank, ranks.world, ranks.sp, ranks.sp_rank, ranks.dp, ranks.dp_rank, ranks.device]
    return mine, reached


def case_on_first(_, ranks):
    """Work on the first rank of each group; then work that fails there."""
    def name_myself():
        return f"done by {ranks.rank}"

    def fail():
        raise VideoError(f"broken on {ranks.rank}")

    done = on_first(name_myself, ranks)
    try:
        on_first(fail, ranks)
        raised = None
    except VideoError as e:
        raised = str(e)
    return done, raised


WORLDS = {
    "four": World(size=4, local=4, sp=0, cases=[case_ranks]),
    "two": World(size=2, local=2, sp=2, cases=[case_ranks]),
    "two machines": World(size=4, local=2, sp=0, cases=[case_ranks, case_on_first]),
    "sp off": World(size=2, local=2, sp=1, cases=[case_ranks]),
    "three into two": World(size=2, local=2, sp=3),
}


@pytest.fixture(scope="module")
def brought(tmp_path_factory):
    return worlds.start(WORLDS, __file__, tmp_path_factory.mktemp("ranks"))


# --------------------------------------------------------------------------------------------------
# sharing out

def test_shards_are_exactly_the_sequence():
    """Property 8: any n over any size: in order, nothing lost, nothing twice, none two larger than
    another."""
    for n in range(0, 70):
        for size in range(1, 12):
            parts = [shard(n, r, size) for r in range(size)]
            assert [i for lo, hi in parts for i in range(lo, hi)] == list(range(n)), (n, size)
            lengths = [hi - lo for lo, hi in parts]
            assert min(lengths) >= 0 and max(lengths) - min(lengths) <= 1, (n, size)


def test_what_is_dealt_comes_once_and_no_rank_is_far_above_the_mean():
    """Property 29, with costs of one size and of many: no rank has more than the mean and the
    largest cost, and the order of the question does not matter."""
    rng = random.Random(0)
    for trial in range(300):
        n, size = rng.randint(1, 9), rng.randint(0, 40)
        costs = {slot: rng.choice([1, 50, rng.randint(1, 5000)])
                 for slot in rng.sample(range(100), size)}
        homes = dict.fromkeys(costs, 0)                    # all on one rank
        if trial % 2:
            homes = {slot: slot % n for slot in costs}     # as rolled out
        dealt = deal(costs, homes, n)
        assert dealt.keys() == costs.keys() and set(dealt.values()) <= set(range(n))
        loads = [sum(costs[slot] for slot in dealt if dealt[slot] == r) for r in range(n)]
        assert max(loads) <= sum(loads) / n + max(costs.values(), default=0)
        assert deal(dict(sorted(costs.items())), homes, n) == dealt
        assert n > 1 or dealt == homes                     # one rank keeps all
    big = deal({0: 90, 2: 30, 4: 30, 6: 30}, dict.fromkeys((0, 2, 4, 6), 0), 2)
    assert big == {0: 0, 2: 1, 4: 1, 6: 1}                 # even, though all began on one rank


def test_what_is_even_stays_at_home():
    for n in (1, 2, 3, 8):
        for each in (1, 3):
            homes = {i: i % n for i in range(n * each)}
            assert deal(dict.fromkeys(homes, 7), homes, n) == homes
            assert deal({0: 5}, {0: n - 1}, n) == {0: n - 1}
    costs = {0: 100, 1: 104, 2: 101, 3: 99, 4: 98, 5: 100}     # of nearly one cost: most stay
    dealt = deal(costs, {i: i % 2 for i in costs}, 2)
    assert sum(r != i % 2 for i, r in dealt.items()) <= 2


def test_examples_in_docstrings():
    result = doctest.testmod(ranks_file)
    assert result.attempted >= 2 and result.failed == 0


# --------------------------------------------------------------------------------------------------
# meeting

@pytest.mark.parametrize("world, right", [
    # rank, world, sp, sp_rank, dp, dp_rank, device; the ranks of its group
    ("four", [([r, 4, 4, r, 1, 0, "cpu"], [0, 1, 2, 3]) for r in range(4)]),
    ("two", [([r, 2, 2, r, 1, 0, "cpu"], [0, 1]) for r in range(2)]),
    ("two machines", [([0, 4, 2, 0, 2, 0, "cpu"], [0, 1]), ([1, 4, 2, 1, 2, 0, "cpu"], [0, 1]),
                      ([2, 4, 2, 0, 2, 1, "cpu"], [2, 3]), ([3, 4, 2, 1, 2, 1, "cpu"], [2, 3])]),
    ("sp off", [([r, 2, 1, 0, 2, r, "cpu"], [r]) for r in range(2)])])
def test_who_each_rank_is(brought, world, right):
    assert brought(world, "case_ranks") == right


def test_start_refuses_an_sp_that_does_not_divide_on_every_rank(brought):
    """Before anyone waits for anyone: all ranks say so, none hangs."""
    for error in brought("three into two", "start"):
        assert "sp = 3 does not divide the 2 ranks" in error


def test_code_is_known_in_the_folder_of_the_repo(monkeypatch):
    """torch.classes calls itself a module with the file "_classes.py", without a folder. In the
    folder of the repo that was taken for a file of ours, which could not be read: no run of
    several ranks could start there."""
    assert torch.classes.__name__ in sys.modules
    elsewhere = versions()
    monkeypatch.chdir(Path(ranks_file.__file__).parent.parent)
    assert versions() == elsewhere


@pytest.fixture
def no_torchrun(monkeypatch):
    for name in OF_TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_what_cannot_be_printed_does_not_end_a_command():
    """The reason why a video was dropped held the name of a file that is no text: printing it ended
    the command, and no other reason was told."""
    code = ("from plumbing.ranks import run_command; "
            "run_command('x.py', lambda: print('dropped 2\\udcff.png'))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT,
                          env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"})
    assert (done.returncode, done.stdout) == (0, "dropped 2\\udcff.png\n"), done.stderr


def test_without_torchrun_a_process_is_alone(no_torchrun):
    assert start() == start(1) == ALONE and not dist.is_initialized()


@pytest.mark.parametrize("sp", [2, -1])
def test_without_torchrun_there_is_one_rank_to_divide(no_torchrun, sp):
    with pytest.raises(ValueError, match=f"sp = {sp} does not divide the 1 ranks"):
        start(sp)


# --------------------------------------------------------------------------------------------------
# failing

def test_alone_together_hands_through():
    def fail():
        raise VideoError("film.mp4: broken")
    assert together(lambda: 5, ALONE) == 5
    with pytest.raises(VideoError, match="film.mp4: broken"):
        together(fail, ALONE)


def test_alone_on_first_hands_through():
    def fail():
        raise VideoError("film.mp4: broken")
    assert on_first(lambda: 5, ALONE) == 5
    with pytest.raises(VideoError, match="film.mp4: broken"):
        on_first(fail, ALONE)


def test_what_the_first_of_a_group_does_is_known_to_its_group_alone(brought):
    """Its result, and its error."""
    assert brought("two machines", "case_on_first") == [
        ("done by 0", "broken on 0"), ("done by 0", "broken on 0"),
        ("done by 2", "broken on 2"), ("done by 2", "broken on 2")]


if __name__ == "__main__":
    worlds.run(WORLDS, sys.argv[1])
