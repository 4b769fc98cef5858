"""
Is the answer right? One small verifier per domain, and one check of the format.

A verifier is a function (predicted, answer) -> a number in [0, 1]; answer is the gold answer. A
range, a second guess or a copy of the options is wrong, because it could contain any answer. Tags
are searched in decoded text, not in tokens: most tokenizers split them and merge their ends.
"""
import re
import sys
import types
import unicodedata
from decimal import Decimal
from math import isfinite, nan, prod

from rapidfuzz.distance import Levenshtein

from flow import Reward

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
LATEX_BOX = re.compile(r"\\boxed\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}")    # braces 3 deep
GLM_BOX = re.compile(r"<\|begin_of_box\|>(.*?)<\|end_of_box\|>", re.DOTALL)
LONGEST = 10_000              # characters; longer text is not parsed as a number, box or time


class VerifierError(Exception):
    """A verifier failed. The answer is ungraded, not wrong: its sample is left out and counted."""


def extract_answer(text):
    r"""The predicted answer of a response; None if it gives none, or more than one.

    >>> extract_answer(r"<think>3 or 4</think><answer>It is \boxed{4}.</answer>")
    '4'
    """
    # Only what follows the thinking counts. A response that is still thinking has no answer.
    _, end_of_thought, response = text.rpartition("</think>")
    if not end_of_thought and "<think>" in text:
        return None
    # The answer is in the only <answer> block. Without any such tag, a box is enough.
    tags = [response.count(tag) for tag in ("<answer>", "</answer>")]
    boxes = [response.count(mark) for mark in ("\\boxed{", "<|begin_of_box|>", "<|end_of_box|>")]
    if tags == [1, 1]:
        answer, closed, _ = response.split("<answer>")[1].partition("</answer>")
        if not closed:                                # the closing tag came first
            return None
    elif tags == [0, 0] and boxes != [0, 0, 0]:
        answer = response
    else:
        return None
    # If there is a box, LaTeX's or GLM's, the answer is in it. It must be the only one.
    if boxes == [0, 0, 0]:
        return answer.strip()
    if boxes == [1, 0, 0]:
        box = LATEX_BOX.search(answer)
    elif boxes == [0, 1, 1]:
        box = GLM_BOX.search(answer)
    else:
        return None
    return box[1].strip() if box else None            # None: it is outside the <answer> block


def well_formed(text):
    """True for one think block, then one answer block, and nothing else. (As LongVILA-R1's.)"""
    form = r"\s*<think>(.*?)</think>\s*<answer>(.*?)</answer>\s*"
    return all(text.count(tag) == 1 for tag in TAGS) and bool(re.fullmatch(form, text, re.DOTALL))


def garbled(text):
    """True if thinking or answer ends in a loop, or thinking switches to another writing system."""
    if any(ends_in_loop(part) for part in re.split("|".join(TAGS), text)):
        return True
    # At least 50 words in each of two scripts, and in the second at least a quarter as many as in
    # the first. Quotations do not count: they may be text that is read in the video.
    thought = text.rpartition("</think>")[0][-20000:]
    unquoted = re.sub("\"[^\"\n]*\"|“[^“”\n]*”|「[^「」\n]*」", " ", thought)
    scripts = ("[A-Za-z\u00c0-\u024f]{2,}", "[\u0400-\u04ff]{2,}", "[\u0600-\u06ff]{2,}",
               "[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7a3]")   # East Asian characters, one by one
    second, first = sorted(len(re.findall(word, unquoted)) for word in scripts)[-2:]
    return second >= 50 and 4 * second >= first


def ends_in_loop(text):
    """True if the text ends in at least 8 copies of one piece, over at least 200 characters. Only
    the end counts: a list may repeat "nothing." for ten frames, but a stuck model never stops."""
    tail = text.rstrip()[-8000:]
    for period in range(1, len(tail) // 8 + 1):
        end = tail[-max(200, 8 * period):]
        if len(end) >= 200 and end[period:] == end[:-period]:
            return True
    return False


def verify_choice(predicted, answer):
    """The same letter, with or without its option: "B", "(b)", "B. right". Not two letters."""
    choice = re.compile(r"\(?([A-Za-z])(?:[).:]+(.*))?", re.DOTALL)
    # A second letter in the option's text: it stands alone, or is marked like an option.
    second = r"\W*[A-Za-z]\W*\Z|\(?[A-Za-z][).:]|.*(?:\A|[\s;,(])\(?[A-Za-z][).:]+(?:\s|\w\w)"
    predicted, gold = choice.fullmatch(predicted.strip()), choice.fullmatch(answer.strip())
    if predicted is None or gold is None or re.match(second, predicted[2] or "", re.DOTALL):
        return 0.0
    return float(predicted[1].upper() == gold[1].upper())


def verify_count(predicted, answer):
    """The same whole number: "7", "07", "7.0". "between 0 and 10" is not a count."""
    predicted, answer = predicted.strip(), answer.strip()
    both_whole = all(re.fullmatch(r"[+-]?\d+(?:\.0*)?", text) for text in (predicted, answer))
    return float(both_whole and Decimal(predicted) == Decimal(answer))


def fold(text):
    """Text without case, punctuation and extra spaces: "A  Red-ball." -> "a red ball"."""
    text = unicodedata.normalize("NFKC", text).casefold()
    words = "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in text)
    return " ".join(words.split())                    # L, M, N: letters, their accents, numbers


def verify_open(predicted, answer):
    """The same words, regardless of case, spaces and punctuation."""
    return float(fold(predicted) == fold(answer) != "")


LATEX = ((r"\\(?:text|mathrm)\{([^{}]*)\}", r" \1"),   # pattern, plain text; in this order
         (r"\{,\}", ","), (r"\\%", "%"), ("\u2212", "-"),                  # 1{,}234, 50\%, minus
         (r"\\[,;:! ]|[$]", " "),                        # spaces, and $ around formulas
         (r"\^?\\circ|\^\{\\circ\}|°", " degree"),
         (r"^\s*([+-]?)10(\^|\*\*)", r"\g<1>1*10^"))     # 10^3 is 1*10^3
SCALES = {"%": 0.01, "percent": 0.01, "thousand": 1e3, "million": 1e6, "billion": 1e9}
NUMBER = r"[+-]?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d*)?|\.\d+)"            # 1,234.5 or .5
FRACTION = rf"(?P<minus>-?)\\[dt]?frac\{{(?P<top>{NUMBER})\}}\{{(?P<bottom>{NUMBER})\}}"
POWER = r"(?:e| ?(?:[x×*]|\\times|\\cdot) ?10(?:\^|\*\*)\{?)(?P<power>[+-]?\d+)\}?"     # x 10^3
PLAIN = rf"(?P<number>{NUMBER})(?:{POWER})?(?: ?/ ?(?P<over>{NUMBER}))?"
WORD = r"(?!(?:[eixyzπ]|pi|or|and|to)\b)[^\W\d_]{1,15}[²³]?(?:\^?-?\d)?"    # not 2x, not "2 or"
UNIT = rf"(?P<unit>{WORD}(?: ?(?:[/·*]| per ) ?{WORD}){{0,3}})"                # km, m/s^2
QUANTITY = re.compile(rf"(?:[a-z] ?= ?)?(?:{FRACTION}|{PLAIN}) ?(?P<scale>{'|'.join(SCALES)})?"
                      rf" ?{UNIT}?\.?", re.IGNORECASE)                        # x = 3 million km.


def quantity(text, percent=True):
    """(value, unit) if text is one number, else (nan, ""). percent: "50%" is 0.5, not 50."""
    for latex, plain in LATEX:
        text = re.sub(latex, plain, text)
    match = QUANTITY.fullmatch(squeeze(text))
    if match is None:
        return nan, ""
    top = match["top"] or f"{match['number']}e{match['power'] or 0}"
    bottom = float((match["bottom"] or match["over"] or "1").replace(",", ""))
    value = float(top.replace(",", "")) / bottom if bottom else nan
    scale = (match["scale"] or "").lower()
    if percent or scale != "%":
        value *= SCALES.get(scale, 1)
    value = -value if match["minus"] else value
    unit = (match["unit"] or "").replace(" ", "")
    if len(unit) >= 4:                                # shorter ones are symbols: mW is not MW
        unit = unit.casefold().rstrip("s")
    return value, unit


def squeeze(text):
    """Text with every run of white space as one space; "" if it is too long to parse."""
    text = " ".join(text.split())
    return text if len(text) <= LONGEST else ""


def close(predicted, answer, tolerance, percent=True):
    """True if predicted is a quantity within tolerance * the gold value, in the same unit."""
    value, unit = quantity(predicted, percent)
    gold, gold_unit = quantity(answer, percent)
    same_unit = unit == gold_unit or "" in (unit, gold_unit)          # compared as written
    return same_unit and abs(value - gold) <= tolerance * abs(gold)   # False if value is nan


def verify_math(predicted, answer):
    r"""The same number, within 1e-6 of it: 1/2, \frac{1}{2}, 0.5, 50% and 5e-1 are the same."""
    gold, _ = quantity(answer)
    if not isfinite(gold):                            # "x + 1": the same text, up to spaces
        return float("".join(predicted.split()) == "".join(answer.split()) != "")
    return float(close(predicted, answer, 1e-6))


def verify_chart(predicted, answer):
    """A number within 2.5% of the answer (read off an axis), a year exactly, or the same words."""
    gold, _ = quantity(answer)
    if not isfinite(gold):
        return verify_open(predicted, answer)
    tolerance = 0 if re.fullmatch(r"19\d\d|20\d\d|2100", answer.strip()) else 0.025 + 1e-9
    right = close(predicted, answer, tolerance)
    if not right and ("%" in predicted) != ("%" in answer):           # the % may be on the axis
        right = close(predicted, answer, tolerance, percent=False)
    return float(right)


def verify_ocr(predicted, answer):
    """1 - edit distance / length of the longer text; case counts, runs of spaces count as one."""
    predicted = " ".join(unicodedata.normalize("NFC", predicted).split())
    answer = " ".join(unicodedata.normalize("NFC", answer).split())
    longer = max(len(predicted), len(answer))
    if not predicted or not answer or longer > LONGEST:
        return float(predicted == answer != "")
    return 1 - Levenshtein.distance(predicted, answer) / longer


def iou(a, b):
    """Intersection over union of two boxes (x1, y1, x2, y2), or of two intervals (start, end)."""
    half = len(a) // 2                                # the low ends come first, then the high ends

    def size(box):
        return prod(max(0.0, high - low) for low, high in zip(box[:half], box[half:]))

    shared = size([*map(max, a[:half], b[:half]), *map(min, a[half:], b[half:])])
    return shared / (size(a) + size(b) - shared) if shared else 0.0


def parse_boxes(text):
    """[(x1, y1, x2, y2), ...] of a text that is boxes and nothing else, at most 100; else []."""
    text = squeeze(text)
    box = r"\[ ?" + " ?, ?".join([r"(-?\d{1,9}(?:\.\d{0,9})?)"] * 4) + r" ?\]"
    if not re.fullmatch(rf"\[? ?{box}(?: ?[,;]? ?{box}){{0,99}} ?\]?", text):
        return []
    return [tuple(map(float, corners)) for corners in re.findall(box, text)]


def verify_grounding(predicted, answer):
    """Number of pairs of boxes with IoU above 0.5, divided by the larger number of boxes. The
    matching is maximum (augmenting paths): a greedy one could take another box's only partner."""
    predicted, gold = parse_boxes(predicted), parse_boxes(answer)
    near = []                                         # the gold boxes near each predicted box
    for box in predicted:
        near.append([j for j in range(len(gold)) if iou(box, gold[j]) > 0.5])
    partner = {}                                      # gold box -> the predicted one of its pair

    def pair(i, tried):
        for j in near[i]:
            if j not in tried:
                tried.add(j)
                if j not in partner or pair(partner[j], tried):     # it is free, or can be freed
                    partner[j] = i
                    return True
        return False

    pairs = sum(pair(i, set()) for i in range(len(predicted)))
    return pairs / max(len(predicted), len(gold), 1)


def verify_time(predicted, answer):
    """IoU of two intervals: "12.5-17", "from 12.5 to 17 s", "0:12-0:17", "1:02:03 to 1:02:10"."""
    def seconds(time):
        return sum(float(part) * 60 ** i for i, part in enumerate(reversed(time.split(":"))))

    clock = (r"((?:\d{1,3}:[0-5]\d|\d{1,3}):[0-5]\d(?:\.\d{1,9})?|\d{1,9}(?:\.\d{0,9})?)"
             r"(?: ?(?:s|sec|seconds?))?")
    interval = re.compile(rf"(?:from )?{clock} ?(?:-|–|—|to|until) ?{clock}\.?", re.IGNORECASE)
    predicted, gold = interval.fullmatch(squeeze(predicted)), interval.fullmatch(squeeze(answer))
    if predicted is None or gold is None:
        return 0.0
    return iou(list(map(seconds, predicted.groups())), list(map(seconds, gold.groups())))


VERIFIERS = {"choice": verify_choice, "count": verify_count, "open": verify_open,
             "math": verify_math, "chart": verify_chart, "ocr": verify_ocr,
             "grounding": verify_grounding, "time": verify_time}


def load_verifier(spec):
    """Your own verifier, "folder/my_file.py:function". Raises ValueError if it cannot be loaded."""
    path, _, function = spec.rpartition(":")
    module = types.ModuleType("verifier " + path)
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


def score(text, answer, domain, format_weight=0.1):
    """Grade one response. -> `Reward`

    format_weight: LongVILA-R1 uses 0.1, GLM-4.1V 0. Garbled text only loses the format reward: a
    heuristic must not make a right answer wrong. Raises ValueError for a domain without a verifier,
    VerifierError if the verifier raises or returns anything but a number in [0, 1].
    """
    if domain not in VERIFIERS:
        raise ValueError(f"no verifier for domain {domain!r}; there are: {', '.join(VERIFIERS)}")
    predicted = extract_answer(text)
    form = float(well_formed(text) and not garbled(text))
    try:
        accuracy = 0.0 if predicted is None else VERIFIERS[domain](predicted, answer)
        if not 0 <= accuracy <= 1:
            raise ValueError(f"it returned {accuracy!r}, which is not between 0 and 1")
    except Exception as e:                            # your own verifier may raise anything
        raise VerifierError(f"domain {domain!r}: {type(e).__name__}: {e}") from e
    total = (1 - format_weight) * float(accuracy) + format_weight * form
    return Reward(total, float(accuracy), form)


def verify(sample, completions, format_weight):
    """-> ([`Reward`], ""), or (None, why) if the verifier failed: the answers are not graded."""
    try:
        graded = [score(x.text, sample.answer, sample.domain, format_weight) for x in completions]
    except VerifierError as e:
        return None, str(e)
    return graded, ""
