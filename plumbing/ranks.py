"""
The processes that torchrun starts: they meet, split the work, gather results and fail together.
Without torchrun everything here is a no-op.
"""
import gc
import hashlib
import json
import os
import socket
import sys
import time
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import transformers
from tqdm import tqdm

from flow import Ranks

PATIENCE = timedelta(minutes=30)   # how long a rank waits for another, which may be saving


# --------------------------------------------------------------------------------------------------
# meeting

def start(sp=0, same=None):
    """Join the other processes that torchrun started. -> `Ranks`

    sp: ranks that share a video; 0: all ranks of this machine.
    same: {name: value} that must be equal on all ranks.
    Raises ValueError, with the same text on all ranks, if a value differs between ranks, if a
    machine has fewer GPUs than ranks, or if sp does not divide the number of ranks.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    sp = sp or local_world
    cuda = torch.cuda.is_available()
    backend = "nccl" if cuda else "gloo"
    device = f"cuda:{local_rank}" if cuda else "cpu"
    problem = ""
    if sp < 1 or world % sp:
        problem = (f"sp = {sp} does not divide the {world} ranks; "
                   "choose an sp that does, or another --nproc_per_node")
    if "RANK" not in os.environ:
        if problem:
            raise ValueError(problem)
        return Ranks(device=device)

    if not dist.is_initialized():
        gpus = torch.cuda.device_count()
        if cuda and gpus < local_world:
            problem = (f"{local_world} ranks on a machine of {gpus} GPUs, "
                       f"give --nproc_per_node={gpus}")
        store, rank, world = next(dist.rendezvous("env://", timeout=PATIENCE))
        facts = {**(same or {}), "sp": sp, "backend": backend, **versions()}
        try:
            meet(store, rank, world, facts, problem)
        except ValueError:
            part(store, rank, world)
            raise
        if cuda:
            torch.cuda.set_device(device)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=PATIENCE)
    elif problem:
        raise ValueError(problem)
    rank = dist.get_rank()
    groups = []
    for first in range(0, world, sp):                      # every rank must create every group
        groups.append(dist.new_group(range(first, first + sp), timeout=PATIENCE))
    return Ranks(rank, world, sp, rank % sp, world // sp, rank // sp, device, groups[rank // sp])


def versions():
    """The versions on this rank: torch, transformers, and a hash of our loaded files."""
    loaded = {getattr(module, "__file__", None) or "" for module in list(sys.modules.values())}
    plumbing = os.path.dirname(__file__)
    folders = (plumbing, os.path.dirname(plumbing))
    code = hashlib.sha256()
    for file in sorted(loaded):            # only loaded ones: other files here are the user's
        if os.path.dirname(file) in folders:
            code.update(Path(file).read_bytes())
    code = code.hexdigest()[:8]
    return {"torch": str(torch.__version__), "transformers": transformers.__version__, "code": code}


def meet(store, rank, world, facts, problem=""):
    """All ranks compare their facts through the store, before there is a process group: two
    versions of NCCL may not be able to communicate at all.

    facts: {name: value}; problem: what is wrong on this rank, empty if nothing is. Raises
    ValueError, with the same text on all ranks, if a fact differs or a rank has a problem.
    """
    store.set(f"met {rank}", json.dumps([facts, problem]))
    facts_by_rank, problems = [], set()
    for other in range(world):
        try:
            their_facts, their_problem = json.loads(store.get(f"met {other}"))
        except dist.DistStoreError:
            raise ValueError(f"rank {other} did not start within {PATIENCE}: "
                             "see what its machine says") from None
        facts_by_rank.append(their_facts)
        if their_problem:
            problems.add(their_problem)
    problems = sorted(problems)
    names = dict.fromkeys(name for their_facts in facts_by_rank for name in their_facts)
    for name in names:
        ranks_by_value = {}
        for other, their_facts in enumerate(facts_by_rank):
            ranks_by_value.setdefault(str(their_facts.get(name)), []).append(str(other))
        if len(ranks_by_value) > 1:
            values = [f"{value} on rank {' '.join(who)}" for value, who in ranks_by_value.items()]
            problems.append(f"{name} = " + ", ".join(values))
    if problems:
        raise ValueError("the ranks cannot work together: " + "; ".join(problems))


def part(store, rank, world):
    """Rank 0, which hosts the store, waits until all others have read it. Otherwise one of them
    could end with a connection error instead of the line that says what is wrong."""
    store.set(f"read {rank}", "")
    if rank == 0:
        with suppress(dist.DistStoreError):                # a rank that never started
            store.wait([f"read {other}" for other in range(world)], PATIENCE)


def leave():
    """Destroy the process groups; vLLM destroys its own first, or it complains at exit."""
    gc.collect()                       # FSDP's cycles hold a group: exit would abort
    if "vllm" in sys.modules:
        sys.modules["vllm"].distributed.cleanup_dist_env_and_memory()
    elif dist.is_initialized():
        dist.destroy_process_group()


# --------------------------------------------------------------------------------------------------
# splitting the work

def shard(n, rank, size):
    """The half-open range of n things that `rank` gets: in order, as even as possible.

    >>> [shard(7, rank, 3) for rank in range(3)]
    [(0, 3), (3, 5), (5, 7)]
    """
    whole, rest = divmod(n, size)
    lo = rank * whole + min(rank, rest)
    return lo, lo + whole + (rank < rest)


def deal(costs, homes, n):
    """Distribute things over n ranks, so that the loads are about equal (GLM-4.1V §5.4).

    costs: {thing: cost}; homes: {thing: rank that has it}. -> {thing: rank}
    The costliest thing comes first, and goes to the rank with the smallest load so far. It stays
    at home if that rank then has no more than an even share, or if there is a tie, because a thing
    that moves must be sent. No rank ends with more than the mean plus the largest cost.

    >>> deal({0: 9, 1: 2, 2: 4, 3: 3}, {0: 0, 1: 1, 2: 0, 3: 1}, 2)
    {0: 0, 2: 1, 3: 1, 1: 1}
    """
    loads = [0] * n
    even_share = sum(costs.values()) / n
    dealt = {}
    for thing in sorted(costs, key=lambda thing: (-costs[thing], thing)):
        home = homes[thing]
        if loads[home] + costs[thing] <= even_share:
            dealt[thing] = home
        else:
            dealt[thing] = min(range(n), key=lambda rank: (loads[rank], rank != home))
        loads[dealt[thing]] += costs[thing]
    return dealt


def deal_groups(tokens, ranks):
    """Distribute groups over the dp teams, so that all train on about as many tokens (GLM-4.1V
    §5.4).

    tokens: {slot: tokens}; team slot % dp has the group. -> {slot: team}, and the largest load of a
    team divided by the mean load
    """
    homes = {slot: slot % ranks.dp for slot in tokens}
    destination = deal(tokens, homes, ranks.dp)
    loads = [0] * ranks.dp
    for slot, n in tokens.items():
        loads[destination[slot]] += n
    return destination, max(loads) * ranks.dp / sum(loads)


def send_groups(groups, destination, ranks, fetch, store):
    """Send groups from the teams that rolled them out, slot % dp, to those that train on them.

    groups: this rank's; destination: {slot: team}, equal on all ranks; fetch(prompts) -> with
    their vision tokens; store(group) is called with each group that arrives, -> the group as it
    stays. Sp rank s sends to sp rank s, one group after another: vision tokens, which may be
    gigabytes, as they are, and the rest as an object. -> groups to train on here, by slot
    """
    here = {group.slot: group for group in groups}
    mine = []
    for slot, to in sorted(destination.items()):           # same order on all ranks: no deadlock
        home = slot % ranks.dp
        if home == to == ranks.dp_rank:
            mine.append(here[slot])
        elif home == ranks.dp_rank:
            peer = to * ranks.sp + ranks.sp_rank
            [prompt] = fetch([here[slot].prompt])
            vision = prompt.vision.to(ranks.device).contiguous()
            without = replace(here[slot], prompt=replace(prompt, vision=vision.to("meta")))
            dist.send_object_list([without], peer, use_batch=True)
            transfer(dist.isend, vision, peer)
        elif to == ranks.dp_rank:
            peer = home * ranks.sp + ranks.sp_rank
            box = [None]
            dist.recv_object_list(box, peer, use_batch=True)
            vision = torch.empty_like(box[0].prompt.vision, device=ranks.device)
            transfer(dist.irecv, vision, peer)
            prompt = replace(box[0].prompt, vision=vision.cpu())
            mine.append(store(replace(box[0], prompt=prompt)))
    return mine


def transfer(operation, x, peer):
    for work in dist.batch_isend_irecv([dist.P2POp(operation, x, peer)]):
        work.wait()


def gather(x, ranks):
    """x of every rank, as a list in the order of ranks."""
    if ranks.world == 1:
        return [x]
    every = [None] * ranks.world
    dist.all_gather_object(every, x)
    return every


def gather_sp(x, ranks):
    """x of every sp rank of this team, as a list in the order of ranks."""
    if ranks.sp == 1:
        return [x]
    every = [None] * ranks.sp
    dist.all_gather_object(every, x, group=ranks.group)
    return every


def merged(x, ranks):
    """The dicts of all ranks as one."""
    return {key: value for part in gather(x, ranks) for key, value in part.items()}


def printer(ranks):
    """-> a function that prints one line above the progress bars, only on rank 0."""
    def say(line):
        if ranks.rank == 0:
            tqdm.write(line)
            sys.stdout.flush()             # a log file is read while the run goes on
    return say


@cache
def say_once(line):
    """Print a line above the progress bars, only on rank 0, and only the first time."""
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(line)


def name_each(fate, reasons):
    """Say once of each sample what became of it and why. reasons: {id: why}, which is returned"""
    for id, why in reasons.items():
        say_once(f"{fate} {id}: {why}")
    return reasons


# --------------------------------------------------------------------------------------------------
# failing

def together(work, ranks):
    """Run work() on each rank of the sp group. An error on one rank is raised on all of them."""
    result, error = None, None
    try:
        result = work()
    except (ValueError, OSError) as e:                     # bad input; a bug ends the run at once
        error = e
    error = next((e for e in gather_sp(error, ranks) if e is not None), None)
    if error is not None:
        raise error
    return result


def on_first(work, ranks):
    """Run work() only on sp rank 0. All ranks of the group return its result or raise its error."""
    box = [together(lambda: work() if ranks.sp_rank == 0 else None, ranks)]
    if ranks.sp > 1:
        dist.broadcast_object_list(box, group_src=0, group=ranks.group)
    return box[0]


def on_rank_0(work, ranks):
    """Run work() on rank 0. Its error is raised on all ranks, so that none waits for it."""
    error = None
    if ranks.rank == 0:
        try:
            work()
        except (ValueError, OSError) as e:
            error = e
    error = gather(error, ranks)[0]
    if error:
        raise error


def explain(error):
    """-> (what is wrong and what to do, whether another rank caused it); None if it is a bug."""
    if isinstance(error, (ValueError, OSError)):           # bad input: its message says both
        return str(error), False
    text = " ".join(str(error).split())
    out_of_memory = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    if out_of_memory or "out of memory" in text or "can't allocate memory" in text:
        return ("out of memory: checkpointing=true keeps a tenth for the backward, stage2=true "
                "shares it over the sp ranks, fsdp=true shares the weights; or lower frames, "
                "max_pixels or max_tokens; with rollout=vllm lower vllm_memory, or "
                f"vllm_share=true. torch said: {text[:300]}", False)
    if isinstance(error, dist.DistError) or "gloo/transport" in text:
        return ("another rank is gone, or cannot be reached: see what its machine says, then start "
                "all again with the same out_dir. If they never met, name the network between "
                "them: GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME. torch said: "
                f"{text[:300]}", True)
    return None


def run_command(name, main):
    """Run main() as the command `name`. Bad input and machine errors end it with one line."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")      # a file's name may be no text
    try:
        main()
    except (ValueError, OSError, RuntimeError, MemoryError) as e:
        explanation = explain(e)
        if not explanation:
            raise
        line, another_rank = explanation
        # torchrun ends all ranks when the first one ends. So a rank that knows the cause ends
        # first; if several do, only the first of each machine prints it.
        if another_rank:
            time.sleep(5)
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(5)
        print(file=sys.stderr)                             # below the progress bar
        if dist.is_initialized():
            print(f"{name}: {line}", file=sys.stderr, flush=True)
            os._exit(1)                # closing NCCL's groups would wait for ranks that are gone
        sys.exit(f"{name}: {line}")
    leave()


# --------------------------------------------------------------------------------------------------
# starting processes ourselves

def spawn(n, work, *arguments):
    """Run work(*arguments) in n new processes on this machine, which meet as torchrun's do. -> what
    it returned on rank 0

    Raises ValueError, with one line, if bad input or an error of the machine ended it.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    results = mp.get_context("spawn").SimpleQueue()
    try:
        mp.spawn(spawned, (n, port, results, work, arguments), nprocs=n)
    except mp.ProcessRaisedException:
        if results.empty():                                # a bug
            raise
    except mp.ProcessExitedException as e:
        if results.empty():                                # killed, most likely for its memory
            raise ValueError(str(e)) from e
    result, problem = results.get()                        # of the first rank that knew the cause
    if problem:
        raise ValueError(problem)
    return result


def spawned(rank, n, port, results, work, arguments):
    """One process of `spawn`: puts (what work returned, problem) into results."""
    if n > 1:                                              # what torchrun would set
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n),
                          LOCAL_WORLD_SIZE=str(n), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    try:
        result = work(*arguments)
        if rank == 0:
            results.put((result, ""))
    except (ValueError, OSError, RuntimeError, MemoryError) as e:
        line, another_rank = explain(e) or ("", False)
        if not line or another_rank:                       # a bug, or another rank knows more
            raise
        results.put((None, line))
        os._exit(1)                    # closing NCCL's groups would wait for ranks that are gone
    leave()
