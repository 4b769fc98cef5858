"""
What the evidence measures. Each function gives one number for one seed of a run.

of: {run: its line of evidence.jsonl} of one seed. A line has `held_out`, a list of evaluations;
`steps`, {key of metrics.jsonl: its values of all RL steps}; of some runs `visits` or `frames`.
"""
import statistics

import numpy as np

DOMAINS = ("count", "open", "ocr", "grounding")
GROUP, PROMPTS = 8, 16         # completions of a group, groups wanted in a step
EQUAL_COST = 20 * PROMPTS * GROUP      # completions of 20 steps without oversampling
# Keys of metrics.jsonl that a line of evidence.jsonl keeps.
KEPT = ("accuracy", "valid_groups", "oversample", "invalid_rate", "grad_norm", "clip_high",
        "entropy", "length", "accuracy_count", "same_answer_count")


def accuracy(of, name):
    """Held out, greedy, at the end; in percent."""
    return 100 * of[name]["held_out"][-1]["accuracy"]


def sampled(of, name):
    """Completions sampled by the end of each step."""
    asked = np.array(of[name]["steps"]["oversample"]) * PROMPTS
    return np.cumsum(asked.round() * GROUP)


def curve(of, name):
    """-> completions sampled until each evaluation, accuracies in [0, 1]"""
    costs, accuracies = sampled(of, name), []
    steps = [row["step"] for row in of[name]["held_out"]]
    for row in of[name]["held_out"]:
        accuracies.append(row["accuracy"])
    return [float(costs[step - 1]) for step in steps], accuracies


def accuracy_at_equal_cost(of, name):
    """After as many completions as 20 steps sample without oversampling, on the line between two
    evaluations."""
    return 100 * float(np.interp(EQUAL_COST, *curve(of, name)))


def completions_to_80(of, name):
    """Completions sampled until the held-out accuracy is 80%, on the line between two evaluations;
    those of the whole run if it never is."""
    costs, accuracies = curve(of, name)
    costs = [0.0, *costs]
    accuracies = [of["before"]["held_out"][-1]["accuracy"], *accuracies]
    if accuracies[0] >= 0.8:
        return 0.0
    for i in range(1, len(costs)):
        if accuracies[i] >= 0.8:
            share = (0.8 - accuracies[i - 1]) / (accuracies[i] - accuracies[i - 1])
            return costs[i - 1] + share * (costs[i] - costs[i - 1])
    return costs[-1]


def signal(of, name):
    """Groups with signal, of 100 sampled."""
    steps = of[name]["steps"]
    with_signal = 0.0
    for asked, invalid in zip(steps["oversample"], steps["invalid_rate"]):
        with_signal += asked * (1 - invalid)
    return 100 * with_signal / sum(steps["oversample"])


def correlation(rule, of, name):
    """Rank correlation of a rule's estimates with what came back, over the run's visits."""
    return of[name]["visits"][rule]["correlation"]


def estimate_error(rule, of, name):
    """Mean |estimated - observed| over the run's visits."""
    return of[name]["visits"][rule]["error"]


def entropy(of, name):
    """Of the sampled tokens, mean of the last five steps."""
    return statistics.mean(of[name]["steps"]["entropy"][-5:])


def clipped(of, name):
    """Of 10,000 tokens, how many the upper bound clipped."""
    return 1e4 * statistics.mean(of[name]["steps"]["clip_high"])


def groups_kept(of, name):
    """Groups trained on in a step, of 16 wanted, from the fifth step on."""
    return statistics.mean(of[name]["steps"]["valid_groups"][4:])


def unevenness(of, name):
    """Their standard deviation over steps, in percent of their mean."""
    deviation = statistics.stdev(of[name]["steps"]["valid_groups"][4:])
    return 100 * deviation / groups_kept(of, name)


def norm_changes(of, name):
    """How much the gradient's norm changes from one step to the next, in percent of its mean."""
    norms = [norm for norm in of[name]["steps"]["grad_norm"] if norm]
    change = statistics.mean(abs(y - x) for x, y in zip(norms, norms[1:]))
    return 100 * change / statistics.mean(norms)


def domain_accuracy(domain, of, name):
    """Held-out accuracy in one domain, at the end; in percent."""
    return 100 * of[name]["held_out"][-1]["domains"][domain]


def open_accuracy(of, name):
    return domain_accuracy("open", of, name)


def verifier_gap(of, name):
    """`last_accuracy`, minus `true_accuracy`."""
    return last_accuracy(of, name) - true_accuracy(of, name)


def true_accuracy(of, name):
    """Held-out accuracy in count at the end, by the built-in verifier."""
    by_built_in = "hacked-true" if name == "hacked" else name
    return domain_accuracy("count", of, by_built_in)


def first_accuracy(of, name):
    """Accuracy in count of the first step's samples, by the run's own verifier."""
    return 100 * of[name]["steps"]["accuracy_count"][0]


def last_accuracy(of, name):
    """Likewise of the last three steps."""
    return 100 * statistics.mean(of[name]["steps"]["accuracy_count"][-3:])


def commonest_answer(of, name):
    """Of the samples in count, the part that gives the commonest answer, in the last three
    steps."""
    return 100 * statistics.mean(of[name]["steps"]["same_answer_count"][-3:])


def accuracy_at(frames, of, name):
    """Held-out accuracy at a number of frames."""
    return 100 * of[name]["frames"][str(frames)]


def gain_from_frames(of, name):
    """In accuracy, from 16 frames to 256."""
    return accuracy_at(256, of, name) - accuracy_at(16, of, name)


def domain_lift(domain, of, name):
    """What RL adds to the held-out accuracy of the cold start in one domain."""
    return domain_accuracy(domain, of, name) - domain_accuracy(domain, of, "before-five")


def lift(of, name):
    """`domain_lift`, mean of the four domains; of several runs their mean."""
    if isinstance(name, tuple):
        return statistics.mean(lift(of, one) for one in name)
    return statistics.mean(domain_lift(domain, of, name) for domain in DOMAINS)

