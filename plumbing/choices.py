"""
Lettered options: found in a question or appended to it, and the letter that an answer stands for.
"""
import math
import re
from string import ascii_lowercase, ascii_uppercase

# "A.", "A)", "A:" at the start or after a space, "(A)", "[A]" after any sign; full-width forms too.
MARK = re.compile(r"(?:^|(?<=[\s*])|(?<!\w)(?=[(\[（][A-Za-z][)\]）]))"
                  r"[(\[（]?([A-Za-z])(?:[)\]）.:．：、]|\*\*)", re.MULTILINE)
# "A red B blue": without punctuation. "A" may be an article, so it begins a line or a sentence.
BARE = re.compile(r"(?:^|(?<=[.?!:]\s)|(?<=\s)(?!A))([A-Z])[ \t]+(?=\S)", re.MULTILINE)

ALONE = re.compile(r"(?:(?:option|answer|choice)\b[\s:]*)?[*(\[（]*([A-Za-z])[*)\]）.:．：、]*",
                   re.IGNORECASE)
WITH_TEXT = re.compile(r"[*(\[（]*([A-Za-z])([*)\]）.:．：、]+\s*|\s+)(\S.*)", re.DOTALL)
# An option in a list, with its letter.
LETTERED = re.compile(r"[(\[（]?([A-Za-z])[)\]）.:．：、]\s*(\S.*)", re.DOTALL)


class NoFit(ValueError):
    """Options and answer do not fit together. The text is the end of a sentence that names both."""


# --------------------------------------------------------------------------------------------------
# options in a question

def find_options(question):
    """The options that a question lists. -> {letter as written: text}, {} if there are none

    They are lettered in order from A. Marks that begin a line come first: in "B. Ann C. Lee" the C
    is an initial. Only the first line of an option's text is kept.

    >>> find_options("Which? (A) red (B) blue")
    {'A': 'red', 'B': 'blue'}
    """
    marks = list(MARK.finditer(question))
    upper = [mark for mark in marks if mark[1].isupper()]
    lower = [mark for mark in marks if mark[1].islower()]
    lines = [mark for mark in marks if begins_line(question, mark)]
    if "".join(mark[1] for mark in lines) not in (ascii_uppercase[:len(lines)],
                                                  ascii_lowercase[:len(lines)]):
        lines = []                         # they are not A, B, C, ... without a gap
    for candidates in (lines, upper, lower, list(BARE.finditer(question))):
        chain = in_order(candidates)
        if len(chain) > 1:
            ends = [mark.start() for mark in chain[1:]] + [len(question)]
            return {mark[1]: first_line(question[mark.end():end])
                    for mark, end in zip(chain, ends)}
    return {}


def begins_line(question, mark):
    before = question[:mark.start()].rpartition("\n")[2]
    return not before.strip(" \t*-")


def in_order(marks):
    """Those of the marks that go A, B, C, ... The initial in "J. A. Smith?" is no option: as long
    as there is no B, a later A replaces it."""
    chain = []
    for mark in marks:
        letter = mark[1].upper()
        if letter == "A" and len(chain) < 2:
            chain = [mark]
        elif chain and letter == following(chain[-1][1]):
            chain.append(mark)
    return chain


def following(letter):
    return chr(ord(letter.upper()) + 1)


def first_line(text):
    lines = text.strip().split("\n")
    return lines[0].strip(" \t*,;")


def marks_letter(question, letter):
    """Whether a question marks this letter anywhere as an option is marked."""
    return letter.upper() in {mark[1].upper() for mark in MARK.finditer(question)}


# --------------------------------------------------------------------------------------------------
# options beside a question

def read_options(value):
    """The options of a record. -> {letter: text}, {} if the list is empty

    value: a list of texts or numbers, each with its letter or all without; {letter: text}; or a
    text that lists them. Raises NoFit.
    """
    if isinstance(value, str):
        if not value.strip():
            return {}
        found = find_options(value)
        if not found:
            raise NoFit("are text without letters; expected a list")
        return found
    if isinstance(value, dict):
        if not are_letters(value):
            raise NoFit(f"have the keys {', '.join(map(repr, value))}; expected A, B, C, ...")
        return {key.upper(): option_text(text) for key, text in value.items()}
    if not isinstance(value, list):
        raise NoFit(f"are a {type(value).__name__}; expected a list")
    texts = [option_text(text) for text in value]
    if not texts:
        return {}
    if not 2 <= len(texts) <= len(ascii_uppercase):
        raise NoFit(f"are {len(texts)}; expected 2 to {len(ascii_uppercase)}")
    lettered = [LETTERED.fullmatch(text) for text in texts]
    if all(lettered) and are_letters([match[1] for match in lettered]):
        return {match[1].upper(): match[2] for match in lettered}
    return dict(zip(ascii_uppercase, texts))


def check_letter(answer, value):
    """Raises NoFit for an answer that is a letter, if the options of a record have letters of their
    own that are not A, B, C, ...: in "A. red", "C. blue" the letter B may be none or "C. blue"."""
    if not isinstance(value, list) or not ALONE.fullmatch(str(answer).strip()):
        return
    lettered = [LETTERED.fullmatch(option_text(text)) for text in value]
    if all(lettered) and not are_letters([match[1] for match in lettered]):
        letters = ", ".join(match[1] for match in lettered)
        raise NoFit(f"is a letter, but the options have the letters {letters}, expected A, B, C, "
                    "...: write the text of the option")


def are_letters(names):
    """Whether names are the first letters of the alphabet, in any order."""
    expected = sorted(ascii_uppercase[:len(names)])
    return len(names) > 1 and sorted(name.upper() for name in names) == expected


def option_text(value):
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise NoFit(f"have one that is a {type(value).__name__}; expected text")
    if isinstance(value, float) and not math.isfinite(value):
        raise NoFit(f"have one that is {value}, which is no finite number")
    if not str(value).strip():
        raise NoFit("have one that is empty")
    return str(value).strip()


def append_options(question, options):
    """The question with its options, a line each, unless it lists them already. Raises NoFit if it
    lists them with other letters."""
    listed = {letter.upper(): text for letter, text in find_options(question).items()}
    if {*listed} == {*options}:
        if all(starts_with(text, first_line(options[letter])) for letter, text in listed.items()):
            return question
        texts = [first_line(text) for text in options.values()]
        if all(any(starts_with(text, other) for other in texts) for text in listed.values()):
            raise NoFit("are also in the question, with other letters: leave them out there")
    return "\n".join([question, *(f"{letter}. {text}" for letter, text in options.items())])


# --------------------------------------------------------------------------------------------------
# which option an answer is

def same(a, b):
    return fold(a) == fold(b)


def starts_with(text, answer):
    """Whether a listed option's text is an answer, alone or as its first sentences: on the line of
    the last option the question may go on, as in "C. green. Answer with a letter."."""
    sentence = re.escape(fold(answer)) + r"(?:[.?!]\s|(?<=[?!])\s|。)"
    return same(text, answer) or bool(re.match(sentence, fold(text)))


def fold(text):
    """Without case, runs of spaces and a full stop at the end. Signs and symbols stay."""
    return " ".join(text.casefold().split()).rstrip(".")


def letters_meant(answer, options, by_text=True):
    """The letters of those options that an answer can mean. -> a set

    It means an option by its letter, its letter and text, or, if by_text, its text alone.
    """
    answer = answer.strip()
    by_case = {letter.upper(): letter for letter in options}
    alone, with_text = ALONE.fullmatch(answer), WITH_TEXT.fullmatch(answer)
    found = set()
    if alone and alone[1].upper() in by_case:
        found.add(by_case[alone[1].upper()])
    if with_text and with_text[1].upper() in by_case:
        letter = by_case[with_text[1].upper()]
        if starts_with(options[letter], with_text[3]):
            found.add(letter)
    if by_text:
        exact = [letter for letter, text in options.items() if text == answer]
        equal = [letter for letter, text in options.items() if same(text, answer)]
        found |= set(exact or equal)
    return found


def choose(answer, options, is_index=False):
    """The letter of the option that an answer is.

    answer: as a record has it: a letter, a text, both, or the option's place, counted from 0;
    is_index: a number is a place and nothing else. Raises NoFit if it is no option, or several.
    """
    found = set()
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)               # pandas writes a column with gaps as 1.0
    number = answer if isinstance(answer, int) else None
    if number is None and re.fullmatch(r"\d{1,9}", str(answer).strip()):
        number = int(answer)
    if number is None or not is_index:
        found = letters_meant(str(answer), options)
    # A number that is written as text is a place only if it is no option's text.
    is_place = isinstance(answer, int) or not found
    if number is not None and is_place and 0 <= number < len(options):
        found.add(list(options)[number])
    if len(found) > 1:
        raise NoFit(f"could be {' or '.join(sorted(found))}: write the letter")
    if not found:
        listed = ", ".join(f"{letter}. {text}" for letter, text in options.items())
        raise NoFit(f"is none of the {len(options)} options: {listed[:200]}")
    return found.pop()


def choice_in(question, answer, by_text=False):
    """The letter, as written in the question, if it lists options and the answer is a letter, a
    letter with its text or, if by_text, a text alone; else None. Raises NoFit for a letter that is
    not listed, or has another text."""
    alone, with_text = ALONE.fullmatch(answer), WITH_TEXT.fullmatch(answer)
    if not (alone or with_text or by_text):
        return None
    options = find_options(question)
    if not options:
        return None
    found = letters_meant(answer, options, by_text)
    if len(found) == 1:
        return found.pop()
    if any(same(answer, text) for text in options.values()) or not MARK.search(question):
        return None                        # an option's text that happens to look like a letter
    listed = ", ".join(f"{letter}. {text}" for letter, text in options.items())
    if alone:
        if marks_letter(question, alone[1]):
            return alone[1]
        raise NoFit(f"is none of the options in the question: {listed[:200]}")
    if with_text and with_text[2].strip():
        raise NoFit(f"does not fit the options in the question: {listed[:200]}")
    return None


# --------------------------------------------------------------------------------------------------
# the domain

NUMBER = r"[+−-]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+)"
POWER = r"(?:e[+-]?\d+| ?[x×*] ?10\^\{?[+-]?\d+\}?)?"
MATH = re.compile(rf"(?:\$ ?)?(?:{NUMBER}{POWER}(?: ?/ ?{NUMBER})?|[+−-]?\d+ \d+/\d+"
                  r"|[+−-]?\\[dt]?frac\{-?\d+\}\{-?\d+\})"
                  r"(?: ?(?:\\?%|％|percent))?(?: ?\$)?", re.IGNORECASE)


def guess_domain(answer):
    """The verifier of an answer that is no option: "count" for an integer, "math" for another
    number (decimal, fraction, percentage, with separators), else "open"."""
    if re.fullmatch(r"[+-]?\d+", answer):
        return "count"
    if MATH.fullmatch(answer):
        return "math"
    return "open"
