"""
Did the answer come out right? One small verifier a domain, and one check of the form. No model judges, unless yours does.

An answer is one thing said plainly: a range, a second guess or the options copied could be right of anything, and are wrong.
The tags are looked for in decoded text: in most tokenizers they are several tokens that merge with their neighbours.
"""
import math as m
import re
import sys
import types
import unicodedata

from flow import Reward

ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
FORM = re.compile(r"\s*<think>(.*?)</think>\s*<answer>(.*?)</answer>\s*", re.DOTALL)
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
BOX = re.compile(r"\\boxed\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}|<\|begin_of_box\|>(.*?)<\|end_of_box\|>", re.DOTALL)
LONGEST = 10_000                  # characters of an answer; what is longer is no number, box or time, and read text as a whole or not


class VerifierError(Exception):
    """A verifier failed. The answer was not found wrong, it was not graded: its sample must be dropped and counted."""


def extract_answer(text):
    """The text of the one <answer> after the thinking, or of the one box, in it or without it; None where there is none, or more.

    >>> extract_answer("<think>3 or 4</think><answer> 4 </answer>")
    '4'
    >>> extract_answer("<think><answer>3</answer></think>") is None      # an answer thought is not an answer given
    True
    """
    _, thought, said = text.rpartition("</think>")
    if not thought and "<think>" in text:                  # still thinking
        return None
    tags = [said.count(tag) for tag in ("<answer>", "</answer>")]
    marks = [said.count(mark) for mark in ("\\boxed{", "<|begin_of_box|>", "<|end_of_box|>")]     # LaTeX's box, GLM's own
    inside = found[1] if (found := ANSWER.search(said)) and tags == [1, 1] else said if tags == [0, 0] and any(marks) else None
    if inside is None or not any(marks):
        return inside and inside.strip()
    found = BOX.search(inside) if marks in ([1, 0, 0], [0, 1, 1]) else None
    return found and (found[1] or found[2] or "").strip()


def well_formed(text):
    """True where the whole response is one think block, then one answer block, each tag once. (LongVILA-R1, A9.)"""
    return all(text.count(tag) == 1 for tag in TAGS) and FORM.fullmatch(text) is not None


def garbled(text):
    """True where the thinking or the answer ends in one run of text 8 times or more and for 200 characters or more, or the thinking
    changes its script: 50 words (or East Asian characters) or more of each of two, the fewer a quarter of the more.
    Only exact copies at the very end: a list may say "nothing." of ten frames, a model that is stuck never stops. And nothing
    that is quoted: a sign in the video may be read out."""
    tails = [part.rstrip()[-8000:] for part in re.split("|".join(TAGS), text)]
    ends = ((period, tail[-max(200, 8 * period):]) for tail in tails if len(tail) >= 200 for period in range(1, len(tail) // 8 + 1))
    thought = re.sub("\"[^\"\n]*\"|“[^“”\n]*”|「[^「」\n]*」", " ", text.rpartition("</think>")[0][-20000:])
    words = ("[A-Za-z\u00c0-\u024f]{2,}", "[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7a3]", "[\u0400-\u04ff]{2,}", "[\u0600-\u06ff]{2,}")
    fewer, more = sorted(len(re.findall(word, thought)) for word in words)[-2:]
    return any(end[period:] == end[:-period] for period, end in ends) or (fewer >= 50 and 4 * fewer >= more)


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


def squeeze(text):
    """Runs of spaces and lines as one space; nothing of a text that is too long."""
    text = " ".join(text.split())
    return text if len(text) <= LONGEST else ""


NUMBER = r"[+-]?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d*)?|\.\d+)"
POWER = r"(?:e| ?(?:[x×*]|\\times|\\cdot) ?10(?:\^|\*\*)\{?)([+-]?\d+)\}?"
WORD = r"(?!(?:[eixyzπ]|pi|or|and|to)\b)[^\W\d_]{1,15}[²³]?(?:\^?-?\d)?"        # 2x is not 2, nor is "2 or"
SCALES = {"%": 0.01, "percent": 0.01, "thousand": 1e3, "million": 1e6, "billion": 1e9}
QUANTITY = re.compile(rf"(?:[a-z] ?= ?)?(?:(-?)\\[dt]?frac\{{({NUMBER})\}}\{{({NUMBER})\}}|({NUMBER})(?:{POWER})?(?: ?/ ?({NUMBER}))?)"
                      rf" ?({'|'.join(SCALES)})? ?({WORD}(?: ?(?:[/·*]| per ) ?{WORD}){{0,3}})?\.?", re.IGNORECASE)
LATEX = ((r"\\(?:text|mathrm)\{([^{}]*)\}", r" \1"), (r"\{,\}", ","), (r"\\[,;:! ]|[$]", " "), (r"\\%", "%"), ("\u2212", "-"),
         (r"\^?\\circ|\^\{\\circ\}|°", " degree"), (r"^\s*([+-]?)10(\^|\*\*)", r"\g<1>1*10^"))


def quantity(text, percent):
    """(value, unit) of a text that is one number: "1,200 km", "\\frac{1}{2}", "1.5 x 10^3", "50%" (0.5, or 50 if not percent). Else None."""
    for old, new in LATEX:
        text = re.sub(old, new, text)
    if not (found := QUANTITY.fullmatch(squeeze(text))):
        return None
    sign, top, bottom, plain, power, over, scale, unit = [(x or "").replace(" ", "") for x in found.groups()]
    top, bottom = [float(x.replace(",", "")) for x in (top or f"{plain}e{power or 0}", bottom or over or "1")]
    value = top / bottom * SCALES.get(scale.lower() if percent or scale != "%" else "", 1) if bottom else m.nan
    unit = unit if len(unit) < 4 else unit.casefold().rstrip("s")              # mW is not MW
    return (-value if sign else value, unit) if m.isfinite(value) else None


def agree(predicted, answer, tolerance, percent=True):
    """Whether two quantities are within a part of the answer; None if it is none. Units count where both have one: no table of them."""
    said, meant = quantity(predicted, percent), quantity(answer, percent)
    right = said and meant and abs(said[0] - meant[0]) <= tolerance * abs(meant[0]) and (said[1] == meant[1] or "" in (said[1], meant[1]))
    return bool(right) if meant else None


def math(predicted, answer):
    """One number: 1/2, \\frac{1}{2}, 0.5, 50% and 5e-1 are the same, within 1e-6 of it. Else, "x + 1", the same text but for spaces."""
    right = agree(predicted, answer, 1e-6)
    return float("".join(predicted.split()) == "".join(answer.split()) != "" if right is None else right)


def chart(predicted, answer):
    """A number within 2.5 % of the answer, as read off an axis; a year exactly; else the same words. If only one of the two
    has a percent sign, it may also stand for nothing: the axis has it."""
    tolerance = 0 if re.fullmatch(r"19\d\d|20\d\d|2100", answer.strip()) else 0.025 + 1e-9
    right, one = agree(predicted, answer, tolerance), ("%" in predicted) != ("%" in answer)
    return open_answer(predicted, answer) if right is None else float(right or (one and agree(predicted, answer, tolerance, percent=False)))


def edit_distance(a, b):
    """Insertions, deletions and substitutions from a to b. Bits of two numbers hold a column of the usual table (Myers 1999)."""
    a, b = sorted((a, b), key=len, reverse=True)
    places, full, top = {}, (1 << len(a)) - 1, 1 << len(a) >> 1
    for i, c in enumerate(a):
        places[c] = places.get(c, 0) | 1 << i
    up, down, distance = full, 0, len(a)
    for c in b:
        same = places.get(c, 0)
        level = (((same & up) + up) ^ up) | same | down
        right_up, right_down = down | ~(level | up) & full, up & level
        distance += bool(right_up & top) - bool(right_down & top)
        up, down = (right_down << 1 | ~(same | down | right_up << 1 | 1)) & full, (right_up << 1 | 1) & (same | down) & full
    return distance


def ocr(predicted, answer):
    """1 - edit distance / length of the longer; case and punctuation count, runs of spaces are one. Nothing read is nothing right."""
    a, b = (" ".join(unicodedata.normalize("NFC", x).split()) for x in (predicted, answer))
    longer = max(len(a), len(b))
    return 1 - edit_distance(a, b) / longer if a and b and longer <= LONGEST else float(a == b != "")


def boxes(text):
    """[(x1, y1, x2, y2), ...] of a text that is boxes and nothing else, at most 100 of them; else []."""
    box, text = r"\[ ?" + " ?, ?".join([r"(-?\d{1,9}(?:\.\d{0,9})?)"] * 4) + r" ?\]", squeeze(text)
    whole = re.fullmatch(rf"\[? ?{box}(?: ?[,;]? ?{box}){{0,99}} ?\]?", text)
    return [tuple(map(float, corners)) for corners in re.findall(box, text)] if whole else []


def overlap(a, b):
    """Intersection over union of two boxes, or of two intervals; one of no or negative size overlaps nothing."""
    n = len(a) // 2
    size = lambda box: m.prod(max(0.0, high - low) for low, high in zip(box[:n], box[n:]))
    both = size([max(x) for x in zip(a[:n], b[:n])] + [min(x) for x in zip(a[n:], b[n:])])
    return both / (size(a) + size(b) - both) if both else 0.0


def grounding(predicted, answer):
    """Boxes matched one-to-one with IoU above 0.5, over the larger number of boxes: both a box too many and one too few cost. The
    matching is the largest there is (augmenting paths): taking the best pair first could use up another box's only partner."""
    said, meant, taken = boxes(predicted), boxes(answer), {}
    near = [[j for j, b in enumerate(meant) if overlap(a, b) > 0.5] for a in said]
    def place(i, tried):
        for j in near[i]:
            if j not in tried:
                tried.add(j)
                if j not in taken or place(taken[j], tried):
                    taken[j] = i
                    return True
        return False
    return sum(place(i, set()) for i in range(len(said))) / max(len(said), len(meant), 1)


def time(predicted, answer):
    """IoU of two intervals: "12.5-17", "from 12.5 to 17 s", "0:12-0:17", "1:02:03 to 1:02:10". A guess too wide pays for its width."""
    clock = r"((?:\d{1,3}:[0-5]\d|\d{1,3}):[0-5]\d(?:\.\d{1,9})?|\d{1,9}(?:\.\d{0,9})?)(?: ?(?:s|sec|seconds?))?"
    found = [re.fullmatch(rf"(?:from )?{clock} ?(?:-|–|—|to|until) ?{clock}\.?", squeeze(x), re.IGNORECASE) for x in (predicted, answer)]
    seconds = lambda text: sum(float(part) * 60 ** i for i, part in enumerate(reversed(text.split(":"))))
    return overlap(*[(seconds(x[1]), seconds(x[2])) for x in found]) if None not in found else 0.0


VERIFIERS = {"choice": choice, "count": count, "open": open_answer, "math": math, "chart": chart, "ocr": ocr, "grounding": grounding, "time": time}


def load_verifier(spec):
    """A verifier of yours, "folder/my_file.py:function": (predicted, answer) -> a number in [0,1]. It may ask a model; if it raises,
    the answer is not graded. ValueError where it cannot be imported."""
    path, _, function = spec.rpartition(":")
    module = sys.modules["verifier " + path] = types.ModuleType("verifier " + path)              # dataclasses look themselves up there
    try:
        with open(path, encoding="utf-8") as f:
            exec(compile(f.read(), path, "exec"), vars(module))
        if not callable(getattr(module, function)):
            raise TypeError(f"{function} is no function")
    except (Exception, SystemExit) as e:
        raise ValueError(f"cannot load the verifier {spec!r} (path.py:function): {type(e).__name__}: {e}") from e
    return getattr(module, function)


def score(text, answer, domain, format_weight=0.1):
    """The reward of one response. -> `Reward`. Raises ValueError for a domain without a verifier, VerifierError where one fails.

    total = (1 - format_weight) * accuracy + format_weight * format: 0.9 and 0.1 as LongVILA-R1; 0 gives GLM-4.1V's. Garbled text costs
    the format: a rule of thumb must not make a right answer wrong, in an evaluation or for the curriculum, nor cost it more than a tenth.
    """
    if domain not in VERIFIERS:
        raise ValueError(f"no verifier for domain {domain!r}; there are: {', '.join(VERIFIERS)}")
    predicted, form = extract_answer(text), float(well_formed(text) and not garbled(text))
    try:
        accuracy = 0.0 if predicted is None else VERIFIERS[domain](predicted, answer)
        if not 0 <= accuracy <= 1:
            raise ValueError(f"it returned {accuracy!r}, which is not between 0 and 1")
    except Exception as e:
        raise VerifierError(f"domain {domain!r}: {type(e).__name__}: {e}") from e
    return Reward((1 - format_weight) * float(accuracy) + format_weight * form, float(accuracy), form)


def load_verifiers(specs):
    """Verifiers of the user's: "domain=my_file.py:function", several with commas, into VERIFIERS.
    -> the domains. Raises ValueError where one cannot be loaded."""
    domains = []
    for spec in specs.split(","):
        if not spec:
            continue
        domain, _, where = spec.partition("=")
        if not where:
            raise ValueError(f"--verifiers: {domain!r} is not domain=my_file.py:function")
        VERIFIERS[domain] = load_verifier(where)
        domains.append(domain)
    return domains


def verify(sample, completions, format_weight):
    """The rewards of a sample's completions. -> (list of `Reward`, ""), or (None, why) where the
    verifier failed: then nothing is known of the answers."""
    graded = []
    try:
        for completion in completions:
            graded.append(score(completion.text, sample.answer, sample.domain, format_weight))
    except VerifierError as e:
        return None, str(e)
    return graded, ""
