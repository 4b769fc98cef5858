"""Runs scripts for runs.launched in processes that are forked from this one: torch and our files
are imported once for all of them, which is most of a small run's time.

Each line of stdin is JSON and asks for one: [folder, env, cwd, world, script, arguments]. It writes
to out and err in the folder; its exit code is in code at the end.
"""
import json
import multiprocessing
import os
import runpy
import sys
import uuid

import runs  # noqa: F401
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import bench  # noqa: F401
import evaluate  # noqa: F401

fork = multiprocessing.get_context("fork")


def run(script, arguments):
    """python SCRIPT ARGUMENTS"""
    sys.argv = [script, *arguments]
    sys.path[0] = os.path.dirname(script)
    runpy.run_path(script, run_name="__main__")


def torchrun(world, script, arguments):
    """torchrun --standalone --nproc_per_node=WORLD SCRIPT ARGUMENTS: its agent, which forks the
    ranks."""
    config = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=world, max_restarts=0,
                          run_id=str(uuid.uuid4()), rdzv_backend="c10d",
                          rdzv_endpoint="localhost:0", start_method="fork", monitor_interval=0.1)
    elastic_launch(config, run)(script, arguments)


def redirected(folder, env, cwd, world, *command):
    os.setsid()                                            # so that all its processes can be ended
    for name, descriptor in (("out", 1), ("err", 2)):
        with open(os.path.join(folder, name), "wb") as f:
            os.dup2(f.fileno(), descriptor)
    os.environ.update(env)
    os.chdir(cwd)
    if world:
        torchrun(world, *command)
    else:
        run(*command)


def serve(folder, *request):
    """Start it, say its pid, wait for it."""
    process = fork.Process(target=redirected, args=(folder, *request))
    process.start()
    print(process.pid, flush=True)
    process.join()
    code = os.path.join(folder, "code")
    with open(code + ".tmp", "w") as f:
        f.write(str(process.exitcode))
    os.rename(code + ".tmp", code)


if __name__ == "__main__":
    for line in sys.stdin:
        fork.Process(target=serve, args=json.loads(line)).start()
