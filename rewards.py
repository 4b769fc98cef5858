"""
Is the answer right? One small verifier per domain, and one check of the format.

A verifier is a function (predicted, answer) -> a number in [0, 1]; answer is the gold answer. Its
formatting does not matter (`unwrap`), but it must be the answer alone: a sentence around it, a
range, a second guess or a copy of the options is wrong, because it could contain any answer. Tags
are searched in decoded text, not in tokens: most tokenizers split them and merge their ends.
"""
import json
import os
import re
import sys
import unicodedata
from contextlib import suppress
from decimal import Decimal
from functools import lru_cache
from math import prod
from signal import SIGPROF
from subprocess import PIPE, Popen
from threading import Lock

from rapidfuzz.distance import Levenshtein

from flow import Reward

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
BRACED = r"(?:\\.|[^{}\\])*"
for _ in range(8):                                    # braces 8 deep; \{ and \} do not count
    BRACED = rf"(?:\\.|[^{{}}\\]|\{{{BRACED}\}})*"
BOX = re.compile(rf"\\boxed\{{({BRACED})\}}|<\|begin_of_box\|>(.*?)<\|end_of_box\|>", re.DOTALL)
LONGEST = 10_000              # characters; longer text is not parsed as a number, box or time
WORKERS, LOCK = {}, Lock()    # {process id: its process for formulas}


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
    response = re.sub(r"\\boxed +\{", r"\\boxed{", response)
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
    if boxes not in ([1, 0, 0], [0, 1, 1]):
        return None
    box = BOX.search(answer)
    return box[box.lastindex].strip() if box else None      # None: it is outside the <answer> block


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


WRAPPERS = (                  # what an answer is set in: pattern, what remains
    (r"```(?:\w*\n)?([^`]*)```|`([^`]*)`", r"\1\2"),
    (r"(?<![\w)*])(\*{1,3}|__|_)(?=[^\s*_])([^*_]*)(?<=\S)\1(?![\w*])", r"\2"),
    (r"(?<!\\)\$\$?([^$]*[^$\\])\$\$?(?![$\d]|\.\d)|(?<!\\)\\[()\[\]]", r"\1"),    # not $3 to $4
    (r"\\(?:text\w*|math(?:rm|bf|it|sf)|[mf]?box|boxed|bm|boldsymbol) *\{([^{}]*)\}", r" \1"),
    (r"(?<!\\)\\([%$#&_])", r"\1"), (r"^\s*\{([^{}\":]*)\}\s*$", r"\1"),
    (r"^\s*[\"“”'‘«「『]([^\"“”'’»」』]*)[\"“”'’»」』]\.?\s*$", r"\1"))
PLAIN = re.compile(r"[A-Za-z\d\s,.:;()\[\]+-]*", re.ASCII)         # no wrapper begins so
FORMS = {0xFF01 + i: 0x21 + i for i in range(94)} | str.maketrans(
    "。\u3000−–‐‑‒﹣〜", ". ------~", "\u200b\u200e\u200f\u2060\ufeff")     # those are invisible


def unwrap(text):
    r"""The answer without what it is set in: "**B**", "$B$", "\text{B}", "“B”" and "Ｂ" are B."""
    if len(text) <= LONGEST and not PLAIN.fullmatch(text):
        text = text.translate(FORMS)
        for pattern, remains in WRAPPERS * 3:              # they nest
            text = re.sub(pattern, remains, text)
    return " ".join(text.split())


def unwrap_number(text):
    """As `unwrap`; between thousands, a thin space or LaTeX's "{,}" becomes a comma."""
    return unwrap(re.sub(r"(?<=\d)(?:\{,\}|[\u2009\u202f])(?=\d{3}(?!\d))", ",", text))


def verify_choice(predicted, answer):
    """The same letter, alone or before its option's text: "B", "(b)", "B. right". The letter comes
    first, with a mark after it. The next option too, or letters as all of the text, are wrong."""
    option = re.compile(r"[(\[【]? ?([A-Za-z])(?: ?([)\]】.:、]+| [-—] )(.*))?")
    predicted, gold = option.fullmatch(unwrap(predicted)), option.fullmatch(unwrap(answer))
    if not (predicted and gold and predicted[1].upper() == gold[1].upper()):
        return 0.0
    letter, mark, text = predicted.groups(default="")
    # Another letter is all of the text, or each word of it: "A. C", "A) or C)", "A. C. D.".
    lone_letter = re.fullmatch(r"(?:\W*(?:and|or) )?\W*[A-Za-z](?![+#-])\W*", text)
    listed = text and all(re.fullmatch(rf"\W*[A-H]{re.escape(mark)}", c) for c in text.split())
    # Options are copied in their order, all marked alike. Another letter is someone's initial.
    copy = re.escape(chr(ord(letter) + 1) + mark[:1])
    begins = re.match(rf"\W*{copy}", text)
    after = r"(?:[\s;,(\[]|(?<!\b[A-Za-z])[./|、])"                  # "left/B.", but not "D.C."
    contains = re.search(rf"{after}{copy}(?!(?<=\.)\Z|[A-Za-z]\.)", text)
    return float(not (lone_letter or listed or begins or contains))


def plain_number(text):
    """The value of "7", "-1,234.50" or ".5", a `Decimal`; None if text is anything else."""
    if not re.fullmatch(r"[+-]? ?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d*)?|\.\d+)", text):
        return None
    return Decimal(re.sub("[ ,]", "", text))


def verify_count(predicted, answer):
    """The same whole number in digits: "7", "07", "7.0", "1,200". Not "seven", not "7 birds"."""
    value, gold = plain_number(unwrap_number(predicted)), plain_number(unwrap_number(answer))
    return float(value is not None and value == gold == value.to_integral())


def fold(text):
    """Text without case, punctuation and extra spaces: "A  Red-ball." -> "a red ball". Signs (not
    dashes, "- red") and symbols stay, since they change the meaning: "-3.5", "C++", "$1", "5 %"."""
    text = unicodedata.normalize("NFC", text.casefold().replace("!=", "≠"))
    minus = r"(?:(?<!\w)-|^- )(?=[\d.$€£¥₹½⅓⅔¼¾∞])|(?<=\w)-(?!\s*\w)|(?<=\b\w) -$"
    text = re.sub(minus, "\u2212", text)
    text = re.sub(r"[.,:/](?!\d)|(?<!\d)[,:/]", " ", text)            # 3.5 and 1:30 keep theirs
    # Of Unicode's categories letters, their marks, numbers and symbols are kept.
    kept = [unicodedata.category(c)[0] in "LMNS" or c in ".,:/%#*@&" for c in text]
    text = "".join(c if keep else " " for c, keep in zip(text, kept))
    return re.sub(" ?([+<>=≠~%°$€£¥#*@&^\u2212]) ?", r"\1", " ".join(text.split()))    # C ++, 5 %


def verify_open(predicted, answer):
    """The same words and symbols, regardless of case, spaces and punctuation; or the same plain
    number. No synonyms, no other article: "the red ball" is not "red ball"."""
    predicted, answer = unwrap(predicted), unwrap(answer)
    value = plain_number(predicted)
    if value is not None:
        return float(value == plain_number(answer))
    return float(fold(predicted) == fold(answer) != "")


@lru_cache(maxsize=10_000)                            # the completions of a group answer alike
def ask_worker(domain, predicted, answer, tolerance):
    """True if two numbers, quantities or formulas are the same. math-verify may take for ever, so
    another process asks it, which ends at its time limit: wrong. Raises ValueError if it fails in
    another way: then the answer is not known to be wrong."""
    predicted, answer = unwrap_number(predicted), unwrap_number(answer)
    if predicted == answer or len(predicted + answer) > LONGEST:
        return predicted == answer != ""
    with LOCK:                                        # threads ask one after another
        worker = WORKERS.get(os.getpid())
        if worker is None or worker.poll() is not None:
            file = os.path.join(os.path.dirname(__file__), "plumbing", "math_worker.py")
            worker = Popen([sys.executable, "-P", file], stdin=PIPE, stdout=PIPE, text=True)
            WORKERS[os.getpid()] = worker             # a forked process starts its own
        with suppress(BrokenPipeError):               # it has ended: there is no reply either
            print(json.dumps([domain, predicted, answer, tolerance]), file=worker.stdin, flush=True)
        reply = worker.stdout.readline().strip() or f"exit status {worker.wait()}"
    if reply not in ("right", "wrong", f"exit status {-SIGPROF}"):     # the last: its time was up
        raise ValueError(f"plumbing/math_worker.py cannot compare formulas: {reply}")
    return reply == "right"


def verify_math(predicted, answer):
    r"""The same value: 1/2, \frac{1}{2}, 0.5, 50% and 5e-1 are the same, and so are (x+1)^2 and
    x^2+2x+1. Whole numbers are equal, others within 1e-6. A unit or a name ("x = 5") may be left
    out, but not be another one. No number in words, no sentence around it."""
    return float(ask_worker("math", predicted, answer, "1e-6"))


def verify_chart(predicted, answer):
    """A number within 2.5% of the answer (read off an axis), a year exactly, or the same words. A
    percent sign may be on the axis; 0.25 is 25% as well. A scale is not: 45 is not 45 million."""
    if verify_open(predicted, answer) or not re.search(r"\d", answer):
        return verify_open(predicted, answer)
    return float(ask_worker("chart", predicted, answer, "0.025"))


def verify_ocr(predicted, answer):
    """1 - edit distance / length of the longer text; case counts, runs of spaces count as one."""
    predicted, answer = (unicodedata.normalize("NFC", unwrap(text)) for text in (predicted, answer))
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


DECIMAL = r"(?:\d{1,9}(?:\.\d{0,20})?|\.\d{1,20})"                                # 0.25, 3., .5
CORNER = rf"([+-]?{DECIMAL}) ?, ?([+-]?{DECIMAL})"                                   # x, y
BOX_FORMS = (                 # of Qwen and of JSON: pattern, what remains
    (r"[\"']label[\"'] ?: ?(?:\"[^\"]*\"|'[^']*') ?,?", ""),
    (r"<\|object_ref_start\|>[^<>]*<\|object_ref_end\|>|<ref>[^<>]*</ref>", ""),
    (r"<\|box_(?:start|end)\|>|</?box>", " "),
    (rf"\( ?{CORNER} ?\) ?,? ?\( ?{CORNER} ?\)", r"[\1,\2,\3,\4]"),
    (r"\{[^{}\[\]]*[\"']b?box(?:_2d)?[\"'] ?: ?(\[[^\[\]{}]*\])[^{}\[\]]*\}", r"\1"))


def parse_boxes(text):
    """[(x1, y1, x2, y2), ...] of a text that is boxes and nothing else, at most 100; else []."""
    text = unwrap(text)
    for pattern, remains in BOX_FORMS:
        text = re.sub(pattern, remains, text)
    box = rf"[\[(] ?{CORNER} ?, ?{CORNER} ?[\])]"
    if not re.fullmatch(rf"\[? ?{box}(?: ?[,;]? ?{box}){{0,99}} ?\]?\.?", text.strip()):
        return []
    return [tuple(map(float, corners)) for corners in re.findall(box, text)]


def verify_grounding(predicted, answer):
    """Number of pairs of boxes with IoU above 0.5, divided by the larger number of boxes. The
    matching is maximum (augmenting paths): a greedy one could take another box's only partner."""
    predicted, gold = parse_boxes(predicted), parse_boxes(answer)
    near = [[j for j in range(len(gold)) if iou(box, gold[j]) > 0.5] for box in predicted]
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
    """IoU of two intervals: "12.5-17", "from 12.5 to 17 s", "between 0:12 and 0:17", "[12.5, 17]".
    Numbers of seconds or clock times, and no words but these."""
    def seconds(time):
        return sum(float(part) * 60 ** i for i, part in enumerate(reversed(time.split(":"))))

    unit = r"(?: ?(?:s|secs?|seconds?|秒))?"
    clock = r"((?:\d{1,3}:[0-5]\d|\d{1,3}):[0-5]\d(?:\.\d{1,20})?|" + DECIMAL + ")" + unit
    middle = r"(?(1) and | ?(?:-|—|~|to|until|→|--?>|(?(2),|-)) ?)"    # (1): between; (2): bracket
    form = rf"(between )?([\[(] ?)?(?:from )?{clock}{middle}{clock}(?(2) ?[\])]{unit})\.?"
    interval = re.compile(form, re.IGNORECASE)
    predicted, gold = interval.fullmatch(unwrap(predicted)), interval.fullmatch(unwrap(answer))
    if predicted is None or gold is None:
        return 0.0
    return iou(list(map(seconds, predicted.groups()[2:])), list(map(seconds, gold.groups()[2:])))


VERIFIERS = {"choice": verify_choice, "count": verify_count, "open": verify_open,
             "math": verify_math, "chart": verify_chart, "ocr": verify_ocr,
             "grounding": verify_grounding, "time": verify_time}


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
        accuracy = float(accuracy)
    except (Exception, SystemExit) as e:              # your own verifier may raise anything
        raise VerifierError(f"domain {domain!r}: {type(e).__name__}: {e}") from e
    return Reward((1 - format_weight) * accuracy + format_weight * form, accuracy, form)
