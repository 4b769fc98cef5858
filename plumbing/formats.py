"""
Question files: .jsonl and .json, in our form or in those of other data sets.

    read_records    the records of a file, as they are written
    sample_fields   the fields of `Sample` that a record has, under whatever names
    read_samples    the fields of every question, with ids and domains
"""
import json
import math
import os
import re
from collections import Counter
from functools import cache
from itertools import count

from rapidfuzz.distance import OSA

from plumbing.choices import (
    NoFit,
    append_options,
    check_letter,
    choice_in,
    choose,
    guess_domain,
    read_options,
)
from plumbing.forms import NAMES, OF_FORMS, OURS, names_in, questions_in, with_common_names

REQUIRED = ("question", "answer", "video")
KNOWN = {*OURS, *OF_FORMS}
TYPED = (*NAMES, "candidates")                   # names that a typing error may have spoilt

# How a file begins that is no text -> what it is.
BINARY = {b"PAR1": "a parquet file", b"\x1f\x8b": "compressed with gzip",
          b"PK\x03\x04": "a zip archive", b"\xff\xfe": "UTF-16 text", b"\xfe\xff": "UTF-16 text"}
NOT_UTF8 = re.compile("[\udc80-\udcff]")         # bytes that were read as "surrogateescape"
LONG_NUMBER = re.compile(r"\d{4301}")            # Python refuses to read more digits
STRING_OR_END = re.compile(r'"(?:[^"\\]|\\.)*"|\}')    # a "}" in a string ends no object
DEEP = re.compile(r'(?:[\[{]\s*(?:"[^"]*"\s*:\s*)?){200}')
INVISIBLE = dict.fromkeys(map(ord, "\u200b\u200e\u200f\u2060\ufeff"))    # removed from answers
TAGS = ("<think>", "</think>", "<answer>", "</answer>")


# --------------------------------------------------------------------------------------------------
# files

def read_records(source):
    """Yields (where, record) for each record of a .jsonl, or of a .json that holds a list of them.
    Records are not changed. where: "file, line 3" or "file, item 3".

    Raises ValueError, naming the file and the line, if it is not JSON.
    """
    if not os.path.isfile(source):
        raise ValueError(f"{source}: no such file; data is a .jsonl or a .json of questions, "
                         'or "toy"')
    with open(source, "rb") as f:
        head = f.read(4)
    for start, what in BINARY.items():
        if head.startswith(start):
            raise ValueError(f"{source}: {what}; write it as JSON lines in UTF-8 (pandas: "
                             'to_json(path, orient="records", lines=True))')
    # Bytes that are no UTF-8 become surrogates, so that `parse` can say in which line they are.
    with open(source, encoding="utf-8-sig", errors="surrogateescape") as f:
        if source.lower().endswith(".json"):
            yield from read_items(source, f.read())
        else:
            yield from read_lines(source, f)


def read_items(source, text):
    records = parse(source, text)
    if not isinstance(records, list):
        raise ValueError(f"{source}: expected a list of samples, found {type(records).__name__}")
    for number, record in enumerate(records):
        yield f"{source}, item {number}", record


def read_lines(source, file):
    for number, line in enumerate(file, 1):
        if line.strip():
            yield f"{source}, line {number}", parse(source, line, number)


class Twice(Exception):
    """A key that an object has twice. args: the key, and how many objects ended before this one."""


def unique_keys():
    """-> an object_pairs_hook for json.loads, to be used once. It raises Twice."""
    places = count()

    def object_of(pairs):
        place = next(places)
        fields = dict(pairs)
        if len(fields) < len(pairs):
            [(key, _)] = Counter(key for key, _ in pairs).most_common(1)
            raise Twice(key, place)
        return fields

    return object_of


def parse(source, text, first=1):
    """The JSON value that text is. first: the number of its first line, for errors."""
    def line_of(match):
        return first + text.count("\n", 0, match.start()) if match else first

    wrong = NOT_UTF8.search(text)
    if wrong:
        column = wrong.start() - text.rfind("\n", 0, wrong.start())
        byte = ord(wrong[0]) - 0xdc00
        raise ValueError(f"{source}, line {line_of(wrong)}: not UTF-8 text (byte 0x{byte:02x} in "
                         f"column {column})")
    try:
        return json.loads(text, object_pairs_hook=unique_keys())
    except Twice as e:
        key, place = e.args
        ends = [match for match in STRING_OR_END.finditer(text) if match[0] == "}"]
        raise ValueError(f"{source}, line {line_of(ends[place])}: the key {key[:80]!r} is twice in "
                         "one object; keep one of them") from None
    except json.JSONDecodeError as e:
        hint = ""
        if e.msg == "Extra data" and source.lower().endswith(".json"):
            hint = "; a file of one record a line is a .jsonl"
        raise ValueError(f"{source}, line {first + e.lineno - 1}: not JSON ({e.msg}, column "
                         f"{e.colno}){hint}") from None
    except RecursionError:
        raise ValueError(f"{source}, line {line_of(DEEP.search(text))}: lists or objects are "
                         "nested too deeply") from None
    except ValueError:
        raise ValueError(f"{source}, line {line_of(LONG_NUMBER.search(text))}: a number of more "
                         "than 4,300 digits") from None


# --------------------------------------------------------------------------------------------------
# fields

def sample_fields(record, where):
    """The fields of `Sample` that a record has, in any of the known forms. -> {name: text}, without
    white space at the ends

    Options beside the question are appended to it, the answer becomes a letter, and the domain is
    "choice" if none is given. Raises ValueError, which begins with `where`.
    """
    check_names(record, where)
    as_written = record
    record = with_common_names(as_written, where)
    names = names_in(record)
    texts = {}
    for ours, name in names.items():
        about = f"{where}: {name!r}"
        if ours == "video":
            texts[ours] = as_text(one_video(record[name], where), about)
        elif ours != "options":
            texts[ours] = as_text(record[name], about)
    for name in REQUIRED:
        if name not in texts:
            raise ValueError(f"{where}: no {missing(name, as_written)}")
    texts["question"] = without_pads(texts["question"])
    texts |= untagged(texts, where)
    for name in REQUIRED:
        if not texts[name]:
            raise ValueError(f"{where}: an empty {name!r}")
    options = options_beside(record, names, where)
    if options:
        add_options(texts, options, record, names, where)
    elif names["answer"] == "correct_choice" and re.fullmatch(r"\d+(\.0)?", texts["answer"]):
        raise ValueError(f"{where}: 'correct_choice' is {texts['answer'][:80]!r}, the place of an "
                         "option, but there are no options; expected them in 'candidates'")
    return texts


def missing(ours, record):
    """The names that a required field may have, and what the record has instead."""
    names = " or ".join(map(repr, NAMES[ours]))
    empty = [name for name, value in record.items() if value in (None, [])]
    said = "".join(f"; {name!r} is {json.dumps(record[name])}" for name in empty
                   if name in NAMES[ours])
    others = ", ".join(repr(name) for name in record if name not in empty) or "nothing"
    return f"{names}{said}; found: {others[:300]}"


def check_names(record, where):
    """Raises ValueError for a name that is nearly one of ours, if that field is missing."""
    for name in record:
        if name in KNOWN:
            continue
        for ours in TYPED:
            field = "options" if ours == "candidates" else ours
            if is_nearly(name.lower().strip(" _"), ours) and field not in names_in(record):
                raise ValueError(f"{where}: unknown field {name!r}; did you mean {ours!r}?")


@cache
def is_nearly(name, ours):
    """Whether a name is another one with a typing error, or with two that leave its ends."""
    distance = OSA.distance(name, ours)
    if len(ours) <= 4:                                     # "uid" is not "id"
        return distance == 0
    return distance <= 1 or distance == 2 and (name[0], name[-1]) == (ours[0], ours[-1])


def one_video(value, where):
    """A list of one video is that video."""
    if not isinstance(value, list):
        return value
    if len(value) != 1:
        raise ValueError(f"{where}: {len(value)} videos; a sample is about one")
    return value[0]


def as_text(value, where):
    """where: the place and the field, which the error begins with."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError(f"{where} is a {type(value).__name__}, expected text")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} is {value}, which is no finite number")
    text = str(value).strip()
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as e:
        raise ValueError(f"{where} has half a character, {text[e.start]!r}, at place {e.start}: "
                         "a lone surrogate is no text") from None
    if "\0" in text:
        raise ValueError(f"{where} has a NUL character, which is no text")
    return text


def without_pads(question):
    """The question without "<image>" or "<video>" at its ends: other trainers put the video there,
    here it always comes first."""
    return re.sub(r"\A(?:<(?:image|video)>\s*)+|(?:\s*<(?:image|video)>)+\Z", "", question)


def untagged(texts, where):
    """{"answer", "thought"} without their tags, which `taught_text` would write twice."""
    answer, thought = texts["answer"].translate(INVISIBLE).strip(), texts.get("thought", "")
    inner = re.fullmatch(r"<think>(.*)</think>", thought, re.DOTALL)
    if inner:
        thought = inner[1].strip()
    whole = re.fullmatch(r"(?:<think>(.*?)</think>\s*)?<answer>(.*)</answer>", answer, re.DOTALL)
    if whole:
        thought = thought or (whole[1] or "").strip()
        answer = whole[2].strip()
    for name, text in (("answer", answer), ("thought", thought), ("taught", texts.get("taught"))):
        tags = [tag for tag in TAGS if tag in (text or "")]
        if tags:
            many = "; a sample has one answer" if name == "answer" else ""
            raise ValueError(f"{where}: {tags[0]} inside {name!r}, which is {text[:80]!r}{many}")
    return {"answer": answer, "thought": thought}


def options_beside(record, names, where):
    """-> {letter: text}, {} if there are none beside the question. names: `names_in`"""
    if "options" not in names:
        return {}
    try:
        options = read_options(record[names["options"]])
    except NoFit as e:
        raise ValueError(f"{where}: {names['options']!r} {one_line(e)}") from None
    for letter, text in options.items():
        as_text(text, f"{where}: option {letter}")
    return options


def add_options(texts, options, record, names, where):
    """Append the options to the question, and make letters of the answers. names: `names_in`"""
    answer, taught = texts["answer"], texts.get("taught", "")
    value = record[names["options"]]
    try:
        about = f"{where}: {names['options']!r}"
        texts["question"] = append_options(texts["question"], options)
        about = f"{where}: the answer {answer[:80]!r}"
        if isinstance(record[names["answer"]], (int, float)):
            answer = record[names["answer"]]
        check_letter(answer, value)
        texts["answer"] = choose(answer, options, is_index=names["answer"] == "correct_choice")
        about = f"{where}: 'taught', {taught[:80]!r},"
        if taught:
            check_letter(taught, value)
            texts["taught"] = choose(taught, options)
    except NoFit as e:
        raise ValueError(f"{about} {one_line(e)}") from None
    texts["domain"] = texts.get("domain") or "choice"


# --------------------------------------------------------------------------------------------------
# samples

def read_samples(source, domains, say):
    """Yields (where, the fields of a `Sample`, id and domain among them) for all of a file.

    domains: those that have a verifier; say: prints a line. A sample without an id is named after
    its place in the file. What is not used of the records is said once, at the end. Raises
    ValueError that names the file, the line and what is wrong with it.
    """
    places = {}                                            # {id: where it was used}
    unused, topics = Counter(), Counter()
    for place, record in read_records(source):
        for where, question in questions_in(record, place):
            texts = sample_fields(question, where)
            topics.update(set_domain(texts, question, domains, where))
            id = texts.get("id") or f"{os.path.basename(source)}-{len(places)}"
            if id in places and "conversations" in record:
                id = f"{id}-{len(places)}"                 # LLaVA-Video: the id is the video's
            if id in places:
                raise ValueError(f"{where}: id {id!r} was already used at {places[id]}; "
                                 "ids must be unique")
            places[id] = where
            texts["id"] = id
            if question.get("fps") is not None:            # only of a folder of pictures
                texts["fps"] = question["fps"]
            unused.update(names_unused(question, where))
            yield where, texts
    if unused:
        names = ", ".join(f"{name!r} ({n})" for name, n in unused.items())
        part = "; a question about a part of a video gets all of it" if "start" in unused else ""
        say(f"{source}: fields that are not used (in so many samples): {names}{part}")
    if topics:
        names = ", ".join(map(repr, topics))
        say(f"{source}: 'domain' names topics, {names[:200]}, which have no verifier: the answers "
            "decide which verifier grades them")


def names_unused(record, where):
    record = with_common_names(record, where)
    used = names_in(record).values()
    return [name for name, value in record.items()
            if name not in (*used, "fps") and value not in (None, [])]


def set_domain(texts, record, domains, where):
    """Set the domain of a sample; if it is a choice, its answer becomes a letter. -> the topics
    that were in the domain's place: [] or one

    A domain without a verifier is a topic if the record is of another's form; in ours it may be a
    typing error, and stays.
    """
    given = texts.get("domain", "")
    topics = []
    if given and given not in domains and is_foreign(record):
        topics, given = [given], ""
    letter = None
    if given in ("", "choice"):
        try:
            about = f"{where}: the answer {texts['answer'][:80]!r}"
            letter = choice_in(texts["question"], texts["answer"], by_text=given == "choice")
            if letter and "taught" in texts:
                about = f"{where}: 'taught', {texts['taught'][:80]!r},"
                taught = choice_in(texts["question"], texts["taught"], by_text=True)
                texts["taught"] = taught or texts["taught"]
        except NoFit as e:
            raise ValueError(f"{about} {one_line(e)}") from None
    texts["answer"] = letter or texts["answer"]
    texts["domain"] = given or ("choice" if letter else guess_domain(texts["answer"]))
    return topics


def is_foreign(record):
    """Whether a record uses names that are not ours."""
    names = names_in(record)
    return "options" in names or "videoID" in record or {*names} != {*names.values()}


def one_line(error):
    return " ".join(str(error).split())
