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
    _, thought, said = text.rpartition("</think>")
    if not thought and "<think>" in text:                  # still thinking
        return None
    if said.count("<answer>") != 1 or said.count("</answer>") != 1:
        return None
    found = ANSWER.search(said)
    return found[1].strip() if found else None


def well_formed(text):
    """True where the whole response is one think block, then one answer block, each tag once. (LongVILA-R1, A9.)"""
    return all(text.count(tag) == 1 for tag in TAGS) and FORM.fullmatch(text) is not None


def fold(text):
    """Case, spaces and punctuation folded away: "A  Red-ball." and "a red ball" are the same. Accents stay."""
    text = unicodedata.normalize("NFKC", text).casefold()
    return " ".join("".join(c if c.isalnum() or unicodedata.category(c)[0] == "M" else " " for c in text).split())


CHOICE = re.compile(r"\(?([A-Za-z])(?:[).:]+(.*))?", re.DOTALL)            # a letter, perhaps its option's text
ANOTHER = re.compile(r"\W*[A-Za-z]\W*\Z|\(?[A-Za-z][).:]|.*(?:\A|[\s;,(])\(?[A-Za-z][).:]+(?:\s|\w\w)", re.DOTALL)   # a second one


def choice(predicted, answer):
    """The letter, alone or before its option's text: "B", "(b)", "B. right". Two letters, or none, are wrong."""
    said, meant = CHOICE.fullmatch(predicted.strip()), CHOICE.fullmatch(answer.strip())
    if said is None or meant is None or ANOTHER.match(said[2] or ""):
        return 0.0
    return float(said[1].upper() == meant[1].upper())


def whole_number(text):
    """(sign, digits without leading zeros) of a text that is a whole number; None where it is anything else."""
    found = re.fullmatch(r"([+-]?)(\d+)(?:\.0*)?", text.strip())
    digits = found and "".join(str(int(d)) for d in found[2]).lstrip("0")          # of any script
    return found and ((found[1] == "-") and digits != "", digits)


def count(predicted, answer):
    """One whole number and nothing else: "7", "07", "7.0". "between 0 and 10" is no count."""
    return float(whole_number(predicted) == whole_number(answer) is not None)


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
