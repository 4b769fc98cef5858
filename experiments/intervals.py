"""
The rule of the evidence: how many seeds a row gets, and what its interval says.

A seed is a cold start and an RL run. The two runs of a seed are a pair: they have one cold start
and are judged on the same questions. A row's difference is the mean over its pairs, with the 95%
interval of Student's t. Seeds are added in order, 0, 1, 2 ..., until that interval is narrower than
`least`, the smallest difference that is worth claiming. Such an interval cannot hold both 0 and
`least`, so one of the two is ruled out. The sign of the difference never decides when to stop.
"""
import math
import statistics
import sys
from bisect import bisect_left

FEWEST, MOST = 3, 12           # seeds of a row
# 97.5% quantiles of Student's t, by degrees of freedom.
T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262,
     10: 2.228, 11: 2.201}


def half_width(differences):
    """Of the 95% interval; infinite for a single pair."""
    n = len(differences)
    if n < 2:
        return math.inf
    return T[n - 1] * statistics.stdev(differences) / math.sqrt(n)


def interval(differences):
    """-> (low, high), 95%"""
    mean, half = statistics.mean(differences), half_width(differences)
    return mean - half, mean + half


def is_narrow(differences, least):
    return 2 * half_width(differences) < least


def is_finished(differences, least):
    """Whether the row gets no more seeds."""
    n = len(differences)
    return n >= MOST or (n >= FEWEST and is_narrow(differences, least))


def verdict(differences, sign, least):
    """What the interval says of a claim: "seen", "opposite" or "not resolved".

    sign: the difference is claimed to be above zero (">"), below it ("<") or nothing worth claiming
    ("="). "seen": the whole interval is on that side; for "=" it is within ± least. "opposite": the
    whole interval is on the other side; for "=" beyond least.
    """
    if len(differences) < FEWEST:
        return "too few seeds"
    low, high = interval(differences)
    if sign == "=":
        if -least < low and high < least:
            return "seen"
        return "opposite" if low > least or high < -least else "not resolved"
    if sign == "<":
        low, high = -high, -low
    if low > 0:
        return "seen"
    return "opposite" if high < 0 else "not resolved"


def seeds_needed(differences, least):
    """How many seeds would make the interval narrower than `least`, if differences go on to spread
    as these do."""
    spread = statistics.stdev(differences)

    def is_enough(n):
        return 2 * quantile(n - 1) * spread < least * math.sqrt(n)

    # It narrows with every seed, so bisection finds the first n; one at a time may take for ever.
    return FEWEST + bisect_left(range(FEWEST, sys.maxsize), True, key=is_enough)


def quantile(freedom):
    """T, and an expansion about the normal distribution's for more degrees of freedom."""
    z = 1.959964
    return T.get(freedom) or (z + (z ** 3 + z) / (4 * freedom)
                              + (5 * z ** 5 + 16 * z ** 3 + 3 * z) / (96 * freedom ** 2))
