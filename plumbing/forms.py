"""
Records that hold their questions in an odd form: conversations, or a list of questions.
"""


def questions_in(record, where):
    """Yields (where, question) for each question of a record: itself, or those that it holds.
    Raises ValueError, which begins with `where`."""
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected an object with the fields of a sample, "
                         f"found {type(record).__name__}")
    if "conversations" in record:
        yield from turns(record, where)
    elif "questions" in record and "question" not in record:
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
    for i, question in enumerate(record["questions"]):
        if not isinstance(question, dict):
            raise ValueError(f"{where}: question {i} is a {type(question).__name__}, expected an "
                             "object")
        yield f"{where}, question {i}", {**of_video, **question}
