"""
The forms of other data sets: their names for our fields, and records that hold several questions.
"""
from dataclasses import fields

from flow import Sample

# Our name -> the names that are read, ours first. If a record has several, the first counts.
NAMES = {field.name: (field.name,) for field in fields(Sample)}
NAMES |= {
    "id": ("id", "problem_id", "question_id"),   # LongVideo-Reason, Video-R1; Video-MME, MLVU
    "question": ("question", "problem"),         # LongVideo-Reason, Video-R1, EasyR1
    "answer": ("answer", "solution", "correct_choice"),      # Video-R1; LongVideoBench
    "video": ("video", "videos", "video_path", "path", "video_name", "images", "image"),
    "thought": ("thought", "reasoning", "process"),          # LongVideo-Reason; Video-R1
    "options": ("options", "candidates", "choices")}         # MVBench, MLVU, LongVideoBench
OURS = {name: ours for ours, names in NAMES.items() for name in names}
COLUMNS = ("option0", "option1", "option2", "option3", "option4")
HOLDERS = ("conversations", "questions")
# Names that only `with_common_names` and `questions_in` read.
OF_FORMS = (*HOLDERS, "videoID", *COLUMNS)


def names_in(record):
    """{our name: the name that a record has for it}, without empty ones"""
    found = {}
    for name, value in record.items():
        ours = OURS.get(name)
        if ours is None or value is None or value == []:
            continue
        if ours not in found or NAMES[ours].index(name) < NAMES[ours].index(found[ours]):
            found[ours] = name
    return found


def with_common_names(record, where):
    """Video-MME's videos are named after "videoID"; LongVideoBench's tables have a column for each
    option, "N/A" where there are fewer. What is read of them is replaced by the common names."""
    record, names = dict(record), names_in(record)
    if isinstance(record.get("videoID"), str) and "video" not in names:
        record["video"] = f"{record.pop('videoID')}.mp4"
    if "options" not in names:
        columns = [record.pop(name, None) for name in COLUMNS]
        while columns and columns[-1] in (None, "N/A"):
            columns.pop()
        for name, text in zip(COLUMNS, columns):
            if text in (None, "N/A"):
                raise ValueError(f"{where}: no option in {name!r}, but one in "
                                 f"{COLUMNS[len(columns) - 1]!r}; write a list, 'options'")
        if columns:
            record["options"] = columns
    return record


def questions_in(record, where):
    """Yields (where, question) for each question of a record: itself, or those that it holds.
    Raises ValueError, which begins with `where`."""
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected an object with the fields of a sample, "
                         f"found {type(record).__name__}")
    own = [name for ours, name in names_in(record).items() if ours in ("question", "answer")]
    held = [name for name in HOLDERS if record.get(name) and isinstance(record[name], list)]
    if held and len(held + own) > 1:
        raise ValueError(f"{where}: both {held[0]!r} and {(held + own)[1]!r}; leave one of them "
                         "out")
    if "conversations" in record:
        yield from turns(record, where)
    elif "questions" in record and not own:
        yield from questions_of_video(record, where)
    else:
        yield where, record


def turns(record, where):
    """LLaVA-Video: turns of "human" and "gpt", each pair of them a question. The id is that of the
    video, so those after the first get a number."""
    record = dict(record)
    said = record.pop("conversations")
    speakers = ("human", "user"), ("gpt", "assistant")
    if not isinstance(said, list) or not said or len(said) % 2:
        raise ValueError(f"{where}: 'conversations' must be a list of questions and answers, in "
                         "turn")
    for i, turn in enumerate(said):
        if not isinstance(turn, dict) or turn.get("from") not in speakers[i % 2]:
            raise ValueError(f"{where}: turn {i} of 'conversations' must be an object with "
                             f"\"from\": \"{speakers[i % 2][0]}\" and a \"value\"")
    for i in range(0, len(said), 2):
        question = {**record, "question": said[i].get("value"), "answer": said[i + 1].get("value")}
        if i and record.get("id") is not None:
            question["id"] = f"{record['id']}-{i // 2}"
        yield where, question


def questions_of_video(record, where):
    """Video-MME's own .json: a video with a list of questions."""
    of_video = {name: value for name, value in record.items() if name != "questions"}
    if not isinstance(record["questions"], list):
        raise ValueError(f"{where}: 'questions' is a {type(record['questions']).__name__}, "
                         "expected a list")
    if not record["questions"]:
        raise ValueError(f"{where}: 'questions' is an empty list")
    for i, question in enumerate(record["questions"]):
        if not isinstance(question, dict):
            raise ValueError(f"{where}: question {i} is a {type(question).__name__}, expected an "
                             "object")
        yield f"{where}, question {i}", {**of_video, **question}
