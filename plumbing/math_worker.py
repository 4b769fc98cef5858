"""
A process of its own that compares what is no plain number: quantities, and formulas by math-verify.

    python -P plumbing/math_worker.py       reads [domain, predicted, answer, tolerance] as JSON

sympy computes whatever a text asks for, and 9^9^9^9 asks for more than a computer has. So each
comparison has a limit of processor time, at which the kernel ends this process, whatever it does
just then; `rewards.ask_worker` starts another one. The end of its input ends it as well: no process
is left behind, however the run ends.
"""
import json
import logging
import re
import resource
import signal
import sys
import unicodedata
from decimal import Decimal, getcontext
from functools import cache

SECONDS = 2.0             # of processor time, so that a busy machine makes no answer wrong
MOST_MEMORY = 4 << 30     # bytes of address space
LONGEST = 300             # characters of a formula
DEEPEST = 12              # brackets in brackets
PRECISION = 20_000        # digits: whole numbers, and powers such as 10^9999, are exact

# --------------------------------------------------------------------------------------------------
# one spelling

# Other ways to write a text: pattern, one spelling; in this order.
SPELLINGS = (
    (r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle)(?![a-zA-Z])", ""),
    (r"(?<=\d)(?:\\[,!]|,\\!|\{,\})(?=\d{3}(?!\d))", ","),                        # 1\,234
    (r"(?<!\\)\\!", ""), (r"(?<!\\)\\[,;: ]|~(?= ?[a-zA-Z\\])", " "),               # LaTeX's spaces
    (r"(?<!\\)\\([%$#&_])", r"\1"),
    (r"[⁰¹²³⁴-⁹⁻]+", r"^{\g<0>}"), (r"\\(?:tfrac|dfrac|cfrac)", r"\\frac"),
    (r"℃", "°C"), (r"\\degree(?![a-zA-Z])", "°"),
    (r" ?(?:per ?cents?|pct)\b", "%"), (r"\\mu(?![a-zA-Z]) *|µ", "μ"), (r"\\Omega", "Ω"))
LETTERS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
LETTERS |= {ord(c): " " + unicodedata.normalize("NFKC", c).replace("⁄", "/") for c in "¼½¾⅓⅔⅕⅛"}
REPEATING = re.compile(r"(?<![\w.,])(?<!\d )(\d{0,20})\.(\d{0,20})\\(?:overline|bar|dot) *"
                       r"\{ *(\d{1,20}) *\}")                                   # 0.1\overline{6}


def spelled(text):
    """text in one spelling: "1\\,234" -> "1,234", "½" -> "1/2", "m²" -> "m^{2}", "5%." -> "5%"."""
    text = re.sub(r"(?<=[^.\s])\.$", "", text)                    # one full stop, but not of "5.."
    for pattern, spelling in SPELLINGS:
        text = re.sub(pattern, spelling, text)
    text = REPEATING.sub(repeating, text)
    return " ".join(text.translate(LETTERS).split())


def repeating(match):
    r"""\frac{15}{90} of "0.1\overline{6}": 16 - 1 over 100 - 10."""
    whole, before, period = match.groups()
    top = int(whole + before + period) - int(whole + before or "0")
    return rf"\frac{{{top}}}{{{10 ** len(before + period) - 10 ** len(before)}}}"


# --------------------------------------------------------------------------------------------------
# quantities: a name, a number, a unit

DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"                                   # 1,234
UNSIGNED = rf"(?:{DIGITS}(?:\.\d*)?|\.\d+)"                                    # 1,234.5 or .5
NUMBER = rf"[+-]? ?{UNSIGNED}"
FRACTION = re.compile(rf"\\frac *\{{ *({NUMBER}) *\}} *\{{ *({NUMBER}) *\}}|\\frac *(\d) *(\d)")
SCALES = {"%": "0.01", "hundred": "1e2", "dozen": "12", "thousand": "1e3", "lakhs": "1e5",
          "lakh": "1e5", "million": "1e6", "crores": "1e7", "crore": "1e7", "billion": "1e9",
          "trillion": "1e12"}
SCALE = "|".join(SCALES)
SUFFIXES = {"k": "thousand", "K": "thousand", "M": "million", "mn": "million", "B": "billion",
            "bn": "billion", "T": "trillion", "tn": "trillion"}                # in charts alone
POWER = r"(?:e| ?(?:[x×*·]|\\times|\\cdot) ?10(?:\^|\*\*))(?P<power>[+-]?\d{1,4})"        # x 10^3
VALUE = re.compile(
    rf"(?P<sign>[+-]?) ?(?:(?P<whole>\d+) (?=\d+ ?/))?(?P<top>{UNSIGNED})(?:{POWER})?"
    rf"(?: ?/ ?(?P<bottom>{NUMBER}))? ?(?P<scale>{SCALE})?", re.IGNORECASE)

NO_UNIT = rf"(?:[eixyzπ]|pi|or|and|to|per|{SCALE})(?![^\W\d_])"                # not 2x, not "2 or"
WORD = rf"(?!{NO_UNIT})[^\W\d_π]{{1,20}}(?: ?\^ ?\{{?-?\d\}}?|\d)?"            # km, cm^2, s^{-1}
JOINT = r"(?: ?(?:[/·*]|\\cdot) ?| per |\.? )"
BEFORE_UNIT = re.compile(rf"[\d)}}%.π]|\\(?:pi|circ)|{SCALE}", re.IGNORECASE)
UNIT = re.compile(rf"( ?)({WORD}(?:{JOINT}{WORD}){{0,3}})\.?", re.IGNORECASE)

# Units that may be left out: these, SI's, and plurals ("7 birds") that are no numbers.
UNITS = set("""h hr min sec yr ft in mi lb oz sq mph kmh kph rpm fps px dB deg rad pp ppm kWh unit
    old square cubic people children men women feet inch degree dollar cent euro pound second
    minute hour day week month year meter metre gram liter litre USD EUR GBP JPY CNY INR""".split())
CURRENCIES = {"dollar": "$", "dollars": "$", "us dollars": "$", "usd": "$", "euro": "€",
              "euros": "€", "eur": "€"}
SI_UNIT = re.compile(r"[kcdmμnMGT]?(?:m|g|s|L|l|N|J|W|V|A|K|C|F|Pa|Hz|Ω|eV|mol|B)"
                     r"|(?:kilo|centi|milli|micro)(?:met(?:er|re)|gram|lit(?:er|re)|second)")
NUMERALS = (r"percent\w*|plus|minus|less|tens|ones|twos|perhaps|halves|thirds|quarters|dozens"
            r"|hundreds|thousands|[a-z]+illions|(?!months\b)[a-z]+ths")
PLURAL = re.compile(rf"(?!(?:{NUMERALS})\b)[a-z]{{3,}}(?<!s)s", re.IGNORECASE)

# What may stand before "=": words, letters with subscripts, functions of something.
FUNCTION = "sqrt|sin|cos|tan|cot|sec|csc|log|ln|exp|pi"
COMMANDS = "|".join("""alpha beta gamma delta epsilon varepsilon zeta eta theta lambda nu xi rho
    sigma tau phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega ell
    overline overrightarrow overset frown widehat hat bar vec tilde dot mathcal mathbb operatorname
    frac binom cdot times circ lfloor rfloor lceil rceil det dim deg gcd max min arg lim sum prod
    int Pr quad""".split())
NAME_PIECE = re.compile(
    rf"\\?(?:{FUNCTION}|angle|triangle)(?![a-zA-Z])(?:_\w*)? ?[\d.]*"  # \log_2 8, \angle 1
    rf"|\\(?:{COMMANDS})(?![a-zA-Z])|[∠△√] ?\d*"
    r"|[^\W\d_]\w*(?:[.'%]|! )?|[ _:'·×]")                              # x_1, No. of, "n! ="
KNOWN = re.compile(rf"\\?(?:{FUNCTION}|frac|binom|cdot|times|circ|and|or)(?![a-zA-Z])|[eiπ]")
TRIG = re.compile(r"(?<![a-zA-Z])(?:sin|cos|tan|cot|sec|csc)(?![a-zA-Z])")
DEGREE = re.compile(r" *\^ *(?:\\circ(?![a-zA-Z])|\{ *\\circ *\})| *°"
                    r"|(?<=[\w)}]) ?deg(?:rees?)?(?![a-zA-Z])")
ARGUMENT = re.compile(r"\([^()]*\)|\[[^\[\]]*\]|\\?\{[^{}]*\}")             # of f(2), x_{1}
PROBABILITY = re.compile(r"\bPr?\([^()]*\)")                            # P(A or B)
NO_NAME = re.compile(r"\b(?:or|and|but|not|cannot|never|if|unless|else|is|are|maybe|perhaps|either"
                     r"|neither|nor|mod)\b|n't\b", re.IGNORECASE)


def is_name(text):
    r"""True for a name of the value after "=": "x_1", "f(2)", "\angle ABC", "Area". Words that deny
    it or give another ("x \not", "x is 4 or y") are none: any value could follow them."""
    if NO_NAME.search(PROBABILITY.sub("", text)):
        return False
    for _ in range(3):                                           # brackets in brackets
        text = ARGUMENT.sub("", text)
    return not NAME_PIECE.sub("", text)


def parts(text):
    """("x", "3", "km") of "x = 3 km": the name, what it equals, and the unit; "" if it has none."""
    text = " ".join(DEGREE.sub(" degree ", text).split())
    name, unit = "", ""
    named = re.fullmatch(r"([a-zA-Z\\∠][^=<>+*/^-]{0,40})= ?([^=<>]*)", text)
    if named and is_name(named[1]):
        name, text = named.groups()
    if TRIG.search(text):                                        # \cos 60° is not \cos 60
        text = re.sub(" degree ?", r"^\\circ ", text)
    text = re.sub(r"^([^$€£¥₹]+?) ?([$€£¥₹])$", r"\2\1", text)               # 5 € is €5
    if currency := re.match(r"([+-]?) ?(?:US)?([$€£¥₹])", text):
        unit = currency[2]
        text = currency[1] + text[currency.end():]
    else:
        for end in BEFORE_UNIT.finditer(text):
            rest, measured = text[:end.end()], UNIT.fullmatch(text, end.end())
            if measured and is_unit(*measured.groups(), rest):
                text, unit = rest, CURRENCIES.get(measured[2].lower(), measured[2])
                break
    return name.replace(" ", ""), re.sub(" degree ?", r"^\\circ ", text).strip(), unit


def is_unit(space, word, formula):
    r"""False if a word after a formula may be variables: the a of 3a, the h of \pi r^2 h, the mg of
    x^2 mg. A word that is no known unit must be the gold answer's word as well."""
    letters = word.rstrip("^{}0123456789-")
    if len(letters) < 3 and not (known(letters) and (space or len(letters) == 2)):
        return False
    if number(formula) is not None or not re.search(r"[^\W\d_]", formula):
        return True
    clear = r"[ckm]m|kg|ft|in|mi|hr|lb|oz|Hz|Pa|m/s|[^\W\d_]{3,}"
    if not re.search(r"[^\W\d_]", KNOWN.sub("", formula)):       # 2\pi m, 10\sqrt{3} N
        clear += "|[ms]" if re.search(r"π|\\pi", formula) else "|[kmM]?[msNJWVA]"
    return bool(re.match(rf"(?:{clear})(?![a-zA-Z])", word))


def known(unit):
    """True if every word is the name of a unit, its symbol, or a plural."""
    for word in re.findall(r"[^\W\d_]+", unit):
        if word not in ("per", "cdot") and word.removesuffix("s") not in UNITS:
            if not (SI_UNIT.fullmatch(word) or PLURAL.fullmatch(word)):
                return False
    return True


def same_unit(unit, other):
    """True if the units are written alike, except for plurals, or if a known one is left out."""
    if not unit or not other:
        return known(unit or other)
    spellings = set()
    for text in (unit, other):
        text = re.sub(r"[{}^ *·]|\\cdot", "", text)
        spellings.add(text.casefold().rstrip("s") if len(text) >= 4 else text)    # mW is not MW
    return len(spellings) == 1


def number(text):
    """The value of a text that is one number, as a `Decimal`; None if it is anything else."""
    if bracketed := re.fullmatch(r"\((.*)\)", text):
        text = bracketed[1]
    text = FRACTION.sub(r" \1\3/\2\4", text)
    text = re.sub(rf"(?<![\w}}])\{{ *({NUMBER}) *\}}", r"\1", text)               # {1}/{2}, 10^{3}
    text = re.sub(r"^ *([+-]?) ?10(\^|\*\*)", r"\g<1>1*10^", text)                # 10^3 is 1*10^3
    match = VALUE.fullmatch(" ".join(text.split()))
    if match is None:
        return None
    bottom = decimal(match["bottom"] or "1")
    if not bottom:
        return None
    value = decimal(match["top"]).scaleb(int(match["power"] or 0)) / bottom
    if match["whole"] and value >= 1:                            # 2 4/3 is no mixed number
        return None
    value += decimal(match["whole"] or "0")
    if match["scale"]:
        value *= Decimal(SCALES[match["scale"].lower()])
    return -value if match["sign"] == "-" else value


def decimal(digits):
    """1234.5 of "1,234.5"."""
    return Decimal(re.sub("[ ,]", "", digits))


# --------------------------------------------------------------------------------------------------
# formulas

# Other ways to write what math-verify reads: pattern, LaTeX; in this order.
LATEX = (
    (r"√\s*\(([^()]*)\)", r"\\sqrt{\1}"), (r"√\s*(\d+|\w)", r"\\sqrt{\1}"),
    (r"(?<![\\a-zA-Z])sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
    (rf"(?<![\\a-zA-Z])({FUNCTION})(?![a-zA-Z])", r"\\\1"),
    (r"\*\*\s*\(([^()]*)\)", r"^{\1}"), (r"\*\*\s*(-?\w+)", r"^{\1}"),
    (r"\^\s*\(([^()]*)\)", r"^{\1}"), (r"\^(-?\d\d+|-\d)", r"^{\1}"),
    (r"∞|(?<![\\a-zA-Z])inf(?:inity)?(?![a-zA-Z])", r"\\infty "),
    (r"(?<![\w)}])\+\s*\\infty", r"\\infty"),
    (r"π", r"\\pi "), (r"θ", r"\\theta "), (r"α", r"\\alpha "), (r"β", r"\\beta "),
    (r"×|∙", r"\\times "), (r"·|⋅", r"\\cdot "), (r"÷", r"\\div "), (r"±|\+/-", r"\\pm "),
    (r"≤|⩽|<=|\\leqslant", r"\\leq "), (r"≥|⩾|>=|\\geqslant", r"\\geq "),
    (r"≠|!=|\\ne(?![a-zA-Z])", r"\\neq "), (r"≈", r"\\approx "),
    (r"∪", r"\\cup "), (r"∩", r"\\cap "), (r"∈", r"\\in "), (r"ℝ", r"\\mathbb{R}"),
    (r"∅|\\varnothing", r"\\emptyset "),
    (r"(\\(?:sin|cos|tan|cot|sec|csc)) *\^ *(\d)(?=\s+\d)", r"\1^{\2}"),      # \sin^2 30
    (r"(?<=\d)_\{(\d+)\}", r"_\1"), (r"(?<!\\)%", r"\\%"),
    (r"\\log\s*_\s*(?:\{(\d+)\}|(\d+)(?=[\s(\\{]))\s*", r"\\log_{\1\2}"),       # log_2 8
    (r",?\s*(?<![a-zA-Z\\])(?:and|or)(?![a-zA-Z])", ","))       # several values are a list
SYMBOLS = re.compile(r"[\x20-\x7e√∞πθαβ×∙·⋅÷±≤⩽≥⩾≠≈∪∩∈ℝ∅°]*")
PROSE = re.compile(r"(?<!\\)(?<!\\begin\{)(?<!\\end\{)(?<![a-zA-Z])[a-zA-Z]{3,}")
CHARACTERS = re.compile(r"[\w\s\\{}()\[\]+\-*/^=<>|,.;:!&'%]*", re.ASCII)
TOO_LARGE = re.compile(r"\^\s*\{?\s*[-+]?\d{5,}|\^[\s{]*\d+\s*\^|\d{4,}[\s)}]*!|!\s*!|\d{100}")
# math-verify takes "3 4" and 3°4' for their sum, "3 = 4" for 4, "--3" for 3. 6/2(3) is 9 or 1.
NO_TERM = re.compile(r"(?:\d|\\circ)\s+\.?\d|[-+]\s*[-+]|(?:^|,)[^a-zA-Z\\=,]*=|=[^,;=]*="
                     r"|/\s*(?:[\d.]+|\([\d.]+\))\s*[(\[][^a-zA-Z\\)\]]*[)\]]")
MIXED = re.compile(r"\d+\\frac\{(\d+)\}\{(\d+)\}")
GROUPS = r"(?<![\w.,])[1-9]\d{0,2}(?:,\d{3})+(?![\d,])"          # 1,000 in a formula, no (1,200)
THOUSANDS = re.compile(rf"(?<![(\[{{])(?<![(\[{{] ){GROUPS}|{GROUPS}(?! ?(?:[)\]]|\\\}}))")
BASE = re.compile(r"\d_\d")                                      # 204_5: 204 to the base 5


def to_latex(text):
    """text as LaTeX; "" if it is no formula, or a too large one. In prose math-verify would search
    for a number."""
    if len(text) > LONGEST or not SYMBOLS.fullmatch(text):
        return ""
    for pattern, latex in LATEX:
        text = re.sub(pattern, latex, text)
    depth = 0
    for c in text:
        depth += (c in "([{") - (c in ")]}")
        if not 0 <= depth <= DEEPEST:
            return ""
    refused = any(pattern.search(text) for pattern in (PROSE, TOO_LARGE, NO_TERM))
    if refused or depth or not CHARACTERS.fullmatch(text):
        return ""
    return text.strip()


@cache
def mend_math_verify():
    r"""Make math-verify take 2(3) for 6, the sign in \cos 60^\circ for degrees, R not for r."""
    from latex2sympy2_extended import latex2sympy2

    class Reader(latex2sympy2._Latex2Sympy):
        def parse(self, text):
            self.convert_degrees = bool(TRIG.search(text))
            letters = set(re.sub(r"\\[a-zA-Z]+", "", text))
            if any(c.islower() and c.upper() in letters for c in letters):
                self.config = latex2sympy2.ConversionConfig(lowercase_symbols=False)
            return super().parse(text)

        def convert_postfix_list(self, factors, i=0):
            # math-verify adds a number to any whole number before it. Only 2\frac{1}{2} is a sum.
            mixed = MIXED.fullmatch("".join(factor.getText() for factor in factors[i:i + 2]))
            if mixed and int(mixed[1]) >= int(mixed[2]):
                raise ValueError("a product, or an improper mixed number")
            if mixed:
                value = super().convert_postfix_list(factors[:i + 2], i)
            elif not hasattr(value := self.convert_postfix(factors[i]), "is_Mul"):     # a set, d/dx
                return super().convert_postfix_list(factors, i)
            rest = factors[i + (2 if mixed else 1):]
            if not rest:
                return value
            other = self.convert_postfix_list(rest)
            matrix = any(getattr(x, "is_Matrix", False) for x in (value, other))
            return (self.mat_mul_flat if matrix else self.mul_flat)(value, other)

    latex2sympy2._Latex2Sympy = Reader


def same_formula(predicted, answer):
    """True if math-verify finds two formulas equal. Raises ImportError if it is not installed."""
    whole = [THOUSANDS.sub(lambda m: m[0].replace(",", ""), text) for text in (predicted, answer)]
    if not re.search(r",|\b(?:and|or)\b", " ".join(whole)):      # 100,200 may be a list as well
        predicted, answer = whole
    predicted, answer = to_latex(predicted), to_latex(answer)
    if not predicted or not answer:
        return False
    if "".join(predicted.split()) == "".join(answer.split()):
        return True
    if BASE.search(predicted) or BASE.search(answer):            # math-verify drops the base
        return False
    mend_math_verify()
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify
    # It must not drop units: 5m is not 5, nor is 5 kg 5 m.
    as_written = NormalizationConfig(basic_latex=True, malformed_operators=True, boxed="none")
    form = [LatexExtractionConfig(normalization_config=as_written)]
    signal.setitimer(signal.ITIMER_PROF, SECONDS)                # SIGPROF ends the process
    parsed = [parse(f"${text}$", form, fallback_mode="no_fallback", parsing_timeout=None)
              for text in (answer, predicted)]
    return all(parsed) and verify(*parsed, timeout_seconds=None)


# --------------------------------------------------------------------------------------------------
# the verdicts

def same(predicted, answer, tolerance):
    """For the domain math: the same value, formula or words (`rewards.verify_math`)."""
    predicted, answer = spelled(predicted), spelled(answer)
    words = r"[^\W\d_]{2,}(?:[ '-][^\W\d_]+)*|[^\W\d_]{3,}(?:[ '-][^\W\d_]+|,? \d+)*"    # June 20
    if re.fullmatch(words, answer) and predicted.casefold() == answer.casefold():
        return True
    name, predicted, unit = parts(predicted)
    gold_name, answer, gold_unit = parts(answer)
    if not same_unit(unit, gold_unit) or (name and gold_name and name != gold_name):
        return False
    value, gold = number(predicted), number(answer)
    if value is not None and gold is not None:
        if value == value.to_integral() and gold == gold.to_integral():
            return value == gold
        return abs(value - gold) <= Decimal(tolerance) * abs(gold)
    if value is not None or gold is not None:                    # 2^{10} may be one, 3x is none
        formula = predicted if value is None else answer
        if re.search(r"[^\W\d_]", re.sub(rf"\\[a-zA-Z]+|{FUNCTION}|[eiπ]", "", formula)):
            return False
    return same_formula(predicted, answer)


YEAR = re.compile(r"\(?(?:19\d\d|20\d\d|2100)(?:\.0*)?\)?")
YEARS = re.compile(r"(?:19|20)\d\d ?/ ?(?:19|20)?\d\d")             # 2015/16 is no quotient
SIGN_INSIDE = re.compile(r"%.*%|\d *%.*\d")                        # 45%%, 4%5


def near(predicted, answer, tolerance):
    """For the domain chart: numbers that are close, or the same year (`rewards.verify_chart`)."""
    values, units, percent = [], [], []
    for text in (predicted, answer):
        text = re.sub(rf"(?<=\d) ?({'|'.join(SUFFIXES)})\b",                # 12k is 12 thousand
                      lambda letter: " " + SUFFIXES[letter[1]], spelled(text))
        _, text, unit = parts(text)
        if YEARS.fullmatch(text) or SIGN_INSIDE.search(text):
            return False
        values.append(number(text.replace("%", "")))
        units.append(unit)
        percent.append("%" in text)
    value, gold = values
    if value is None or gold is None or not same_unit(*units):
        return False
    is_year = YEAR.fullmatch(text) and unit.lower() in ("", "year")       # text: the gold answer
    allowed = 0 if is_year else abs(gold) * Decimal(tolerance)
    if abs(value - gold) <= allowed:                             # the % may be on the axis
        return True
    if percent == [True, False] and abs(gold) <= 1:              # 0.25 is 25%, but 45 is not 4500%
        return abs(value - 100 * gold) <= 100 * allowed
    if percent == [False, True] and abs(value) <= 1:
        return abs(100 * value - gold) <= allowed
    return False


DOMAINS = {"math": same, "chart": near}


def main():
    replies, sys.stdout = sys.stdout, sys.stderr                 # what a library prints is no reply
    logging.disable()
    getcontext().prec = PRECISION
    signal.signal(signal.SIGINT, signal.SIG_IGN)                 # Ctrl-C ends the run, that ends us
    _, allowed = resource.getrlimit(resource.RLIMIT_AS)
    most = MOST_MEMORY if allowed == resource.RLIM_INFINITY else min(MOST_MEMORY, allowed)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    for line in sys.stdin:
        domain, *question = json.loads(line)
        try:
            reply = "right" if DOMAINS[domain](*question) else "wrong"
        except ImportError as e:
            reply = f"{e}; pip install -r requirements.txt"
        except Exception:                                        # the libraries trip over the text
            reply = "wrong"
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(reply, file=replies, flush=True)


if __name__ == "__main__":
    main()
