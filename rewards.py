"""
Did the answer come out right? One small verifier a domain, and one check of the form. No model judges.

The tags are looked for in decoded text: in most tokenizers they are several tokens that merge with their neighbours.
"""
import re
import unicodedata
from dataclasses import dataclass

ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
FORM = re.compile(r"\s*<think>(.*?)</think>\s*<answer>(.*?)</answer>\s*", re.DOTALL)
TAGS = ("<think>", "</think>", "<answer>", "</answer>")


@dataclass
class Reward:
    total: float       # in [0,1], what GRPO sees
    accuracy: float    # in [0,1]
    format: float      # 1 or 0


def extract_answer(text):
    """The text of the one <answer> after the thinking; None where there is none, or more than one.

    >>> extract_answer("<think>3 or 4</think><answer> 4 </answer>")
    '4'
    >>> extract_answer("<think><answer>3</answer></think>") is None      # an answer thought is not an answer given
    True
    """
    said = text.rpartition("</think>")[2]
    found = ANSWER.findall(said)
    if len(found) != 1 or said.count("<answer>") != 1 or said.count("</answer>") != 1:
        return None
    return found[0].strip()


def well_formed(text):
    """True where the whole response is one think block, then one answer block, each tag once. (LongVILA-R1, A9.)"""
    return FORM.fullmatch(text) is not None and all(text.count(tag) == 1 for tag in TAGS)


def fold(text):
    """Case, spaces and punctuation folded away. "A  Red-ball." and "a red ball" are the same."""
    text = unicodedata.normalize("NFKC", text).casefold()
    return " ".join("".join(c if c.isalnum() else " " for c in text).split())


def choice(predicted, answer):
    """The letter, alone or before its option's text: "B", "(b)", "B. right". Two letters, or none, are wrong."""
    letter = re.compile(r"\(?([A-Za-z])(?:[).:]|$)")
    said, meant = letter.match(predicted), letter.match(answer.strip())
    if said is None or meant is None or len(re.findall(r"(?:^|[\s(])[A-Za-z][).:]", predicted)) > 1:
        return 0.0
    return float(said[1].upper() == meant[1].upper())


def count(predicted, answer):
    """One whole number and nothing else: "7", "07", "7.0". "between 0 and 10" is no count."""
    number = re.compile(r"([+-]?\d+)(?:\.0*)?")
    said, meant = number.fullmatch(predicted.strip()), number.fullmatch(answer.strip())
    return float(said is not None and meant is not None and int(said[1]) == int(meant[1]))


def open_answer(predicted, answer):
    """The same words, whatever their case, spaces and punctuation."""
    return float(fold(predicted) == fold(answer) != "")


VERIFIERS = {"choice": choice, "count": count, "open": open_answer}      # domain -> (predicted, answer) -> [0,1]


def score(text, answer, domain, format_weight=0.1):
    """The reward of one response. -> `Reward`

    total = (1 - format_weight) * accuracy + format_weight * format: 0.9 and 0.1 as LongVILA-R1; 0 gives GLM-4.1V's.
    Raises ValueError for a domain without a verifier.
    """
    if domain not in VERIFIERS:
        raise ValueError(f"no verifier for domain {domain!r}; there are: {', '.join(VERIFIERS)}")
    predicted, form = extract_answer(text), float(well_formed(text))
    accuracy = 0.0 if predicted is None else VERIFIERS[domain](predicted, answer)
    return Reward((1 - format_weight) * accuracy + format_weight * form, accuracy, form)
