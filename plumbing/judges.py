"""
Verifiers of one's own: loaded from files, and many of them asked at once, since a judge may be a
language model on another computer.
"""
import sys
import time
import types
from collections import deque
from functools import partial
from itertools import islice
from queue import Empty, SimpleQueue
from textwrap import shorten
from threading import Thread

MOST_SECONDS = 1500.0      # for all calls of a step: other ranks wait for ranks.PATIENCE at most


def load_verifiers(specs):
    """{domain: function} of "domain=folder/my_file.py:function", comma-separated. Raises ValueError
    if one cannot be loaded."""
    verifiers = {}
    for spec in filter(None, specs.split(",")):
        domain, _, where = spec.partition("=")
        if not where or not domain:
            raise ValueError(f"--verifiers: {spec!r} is not domain=my_file.py:function")
        if domain in verifiers:
            raise ValueError(f"--verifiers: the domain {domain!r} has two verifiers")
        verifiers[domain] = load_verifier(where)
    return verifiers


def load_verifier(spec):
    """The function of "folder/my_file.py:function". Raises ValueError if it cannot be loaded."""
    path, _, function = spec.rpartition(":")
    module = types.ModuleType("verifier " + path)
    module.__file__ = path
    sys.modules[module.__name__] = module             # dataclasses look up their own module there
    try:
        with open(path, encoding="utf-8") as f:
            exec(compile(f.read(), path, "exec"), vars(module))
        if not callable(getattr(module, function)):
            raise TypeError(f"{function} is no function")
    except (Exception, SystemExit) as e:              # any code may raise anything
        raise ValueError(f"cannot load the verifier {spec!r} (path.py:function): "
                         f"{type(e).__name__}: {e}") from e
    return getattr(module, function)


def grade(pairs, c, score, ungraded):
    """Grade the completions of several questions. -> for each question ([`Reward`], ""), or (None,
    why) if a completion could not be graded: it is not known to be wrong

    pairs: (`Sample`, its `Completion`s). c: a config with verifiers, format_weight, judges and
    judge_seconds. score: `rewards.score`. ungraded: what it raises if a verifier fails. Verifiers
    of one's own run in threads, at most c.judges at once; the built-in ones run here.
    """
    own = {spec.partition("=")[0] for spec in c.verifiers.split(",")}
    here, threads = [], []
    for sample, completions in pairs:
        calls = threads if sample.domain in own else here
        for x in completions:
            calls.append(partial(score, x.text, sample.answer, sample.domain, c.format_weight))
    in_threads = iter(at_once(threads, c.judges, c.judge_seconds))
    built_in = map(attempt, here)
    verdicts = []
    for sample, completions in pairs:
        outcomes = in_threads if sample.domain in own else built_in
        rewards, why = [], ""
        for outcome in islice(outcomes, len(completions)):
            if isinstance(outcome, TimeoutError):
                why = why or f"domain {sample.domain!r}: {outcome}"
            elif isinstance(outcome, ungraded):
                why = why or shorten(str(outcome), 300, placeholder=" [...]")      # one line
            elif isinstance(outcome, BaseException):
                raise outcome
            rewards.append(outcome)
        verdicts.append((None, why) if why else (rewards, ""))
    return verdicts


def attempt(call):
    """What call() returns, or the exception that it raises."""
    try:
        return call()
    except BaseException as e:                        # any code may raise anything
        return e


def at_once(calls, most, seconds):
    """Run calls in threads, at most `most` at a time. -> what each returned, or the exception that
    it raised, in the order of the calls; a TimeoutError if it ran for more than `seconds`

    Python cannot end a thread. One that is late is left alone: it does not hold up the others, nor
    the end of the program. After MOST_SECONDS no call begins, and none is waited for.
    """
    done = SimpleQueue()
    end = time.monotonic() + MOST_SECONDS
    all_late = (f"no result: the verifiers of one step took {MOST_SECONDS:g} s, and other ranks "
                "wait for them; ask more --judges at once")
    outcomes, deadlines = {}, {}                      # by the number of the call

    def run(i):
        done.put((i, attempt(calls[i])))

    waiting = deque(range(len(calls)))
    while waiting or deadlines:
        while waiting and len(deadlines) < most:
            i = waiting.popleft()
            now = time.monotonic()
            if now >= end:
                outcomes[i] = TimeoutError(all_late)
                continue
            deadlines[i] = min(now + seconds, end)
            Thread(target=run, args=(i,), daemon=True).start()
        if not deadlines:
            break
        try:
            first = min(deadlines.values())           # until a call ends, or is late
            i, outcome = done.get(timeout=max(0.0, first - time.monotonic()))
        except Empty:
            i = min(deadlines, key=deadlines.get)
            late = f"no result within {seconds:g} s (judge_seconds)"
            outcome = TimeoutError(all_late if time.monotonic() >= end else late)
        if deadlines.pop(i, None):                    # None: it was late, and is known to be
            outcomes[i] = outcome
    return [outcomes[i] for i in range(len(calls))]
