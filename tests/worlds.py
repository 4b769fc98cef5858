"""Real processes that talk over gloo, for tests.

A test file is also a script: `start` runs it as one, in which `run` starts the ranks of all its
worlds, one world after another. Each rank does the world's cases and saves what comes of them.
The tests look at what `start` then reads.
"""
import multiprocessing
import os
import socket
import sys
import time
import traceback
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from runs import ended, launched

from plumbing import ranks

PATIENCE = 120         # seconds for all ranks of a world


@dataclass
class World:
    size: int          # ranks
    local: int         # ranks of a machine
    sp: int            # what ranks.start is asked for
    cases: list = field(default_factory=list)  # functions (thing, Ranks) -> what torch.save takes


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def one_rank(rank, name, world, port, folder, thing):
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world.size),
                      LOCAL_RANK=str(rank % world.local), LOCAL_WORLD_SIZE=str(world.local),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))

    def bring(case, result):
        torch.save(result, os.path.join(folder, f"{name}-{case}-{rank}.pt"))

    try:
        mine = ranks.start(world.sp)
        bring("start", "")
    except ValueError as e:
        bring("start", str(e))
        return
    for case in world.cases:
        try:
            bring(case.__name__, case(thing, mine))
        except Exception:
            bring(case.__name__, traceback.format_exc())
            raise
    dist.barrier()                                         # another may still be connecting
    dist.destroy_process_group()


def run(worlds, folder, thing=None):
    """Start the ranks of all worlds. They are forked: torch is imported and `thing`, which every
    case gets, is built only once."""
    torch.set_num_threads(1)
    fork = multiprocessing.get_context("fork")
    for name, world in worlds.items():
        port = free_port()
        processes = [fork.Process(target=one_rank, args=(rank, name, world, port, folder, thing))
                     for rank in range(world.size)]
        for process in processes:
            process.start()
        end = time.monotonic() + PATIENCE
        for process in processes:
            process.join(max(0, end - time.monotonic()))
        for rank, process in enumerate(processes):
            if process.is_alive():
                print(f"{name}: rank {rank} hangs", file=sys.stderr)
                process.kill()


def start(worlds, script, folder, *arguments):
    """Run `script folder arguments`, which calls `run`. -> brought(world, case): what each rank
    brought from it, in order of rank"""
    env = {"CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
    process = launched(str(folder), *arguments, script=os.path.abspath(script), world=0, env=env)
    result = ended(process, PATIENCE * len(worlds) + 60)
    assert result.code == 0, result.err

    def brought(world, case):
        results = []
        for rank in range(worlds[world].size):
            path = os.path.join(folder, f"{world}-{case}-{rank}.pt")
            assert os.path.exists(path), f"{world}: rank {rank} never finished {case}\n{result.err}"
            results.append(torch.load(path, weights_only=False))
            assert case == "start" or not isinstance(results[-1], str), results[-1]
        return results
    return brought
