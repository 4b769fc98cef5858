"""python -m pytest tests/test_grades.py -q

Offline grades are written a line at a time, read back, added up, and refused where they are not of
this data or this model.
"""
import pytest

from flow import Sample
from plumbing.grades import append, begin, grade_line, read_grades

SAMPLES = [Sample(f"q{i}", f"What is {i}?", str(i), "count", f"toy:{i}") for i in range(3)]


def written(tmp_path, *lines):
    path = tmp_path / "grades.jsonl"
    path.write_text("".join(lines))
    return str(path)


def test_grades_are_read_as_they_were_written(tmp_path):
    path = written(tmp_path, grade_line(SAMPLES[0], 2.5, 8, "a"), grade_line(SAMPLES[2], 8, 8, "a"))
    assert read_grades(path, SAMPLES) == read_grades(path, SAMPLES, "a")
    assert read_grades(path, SAMPLES) == {"q0": [2.5, 8.0], "q2": [8.0, 8.0]}


def test_an_ids_lines_are_added_up(tmp_path):
    """Several models, or lines of any other tool, which need no more than the three keys."""
    path = written(tmp_path, grade_line(SAMPLES[1], 1, 8, "a"), grade_line(SAMPLES[1], 3, 4, "b"),
                   '{"id": "q1", "correct": 2.5, "total": 8}\n')
    assert read_grades(path, SAMPLES) == {"q1": [6.5, 20.0]}


def test_a_line_that_was_being_written_is_ignored(tmp_path):
    """All of it but for its end is a line: a last line without one was dropped, and a file of one
    line was read as none."""
    line, more = (grade_line(SAMPLES[i], 1, 8, "a") for i in (0, 1))
    whole = {"q0": [1.0, 8.0], "q1": [1.0, 8.0]}
    for end in range(len(more)):
        path = written(tmp_path, line, more[:end])
        found = read_grades(path, SAMPLES)
        assert found == (whole if end == len(more) - 1 else {"q0": [1.0, 8.0]})
        begin(path)
        append(path, SAMPLES[2:], {"q2": 3.0}, 8, "a")
        assert read_grades(path, SAMPLES) == found | {"q2": [3.0, 8.0]}


def test_other_line_ends_are_read(tmp_path):
    """With those of old Macs a file was read as empty, and `begin` would have emptied it; a byte
    order mark and empty lines were refused, which a data file may have."""
    lines = [grade_line(sample, 1, 8, "a").rstrip() for sample in SAMPLES]
    path = tmp_path / "grades.jsonl"
    for end in ("\n", "\r\n", "\r", "\n \n", "\n\n"):
        for content in (end.join(lines), end.join([*lines, ""]), "\ufeff" + end.join([*lines, ""])):
            path.write_bytes(content.encode())
            assert list(read_grades(str(path), SAMPLES)) == ["q0", "q1", "q2"]
            begin(str(path))
            assert list(read_grades(str(path), SAMPLES)) == ["q0", "q1", "q2"]


def test_a_file_without_grades_is_refused(tmp_path):
    """An empty file, half a line and a compressed file were no grades at all, without a word. Only
    the run that writes it may find its file so."""
    path = tmp_path / "grades.jsonl"
    for content in (b"", b"\n \n", b'{"id": "q'):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="grades.jsonl: it holds no grade; evaluate.py"):
            read_grades(str(path), SAMPLES)
        assert read_grades(str(path), SAMPLES, "a") == {}
    path.write_bytes(b"\x1f\x8b\x08\x00 no line break")
    for model in (None, "a"):
        with pytest.raises(ValueError, match="grades.jsonl, line 1: not UTF-8"):
            read_grades(str(path), SAMPLES, model)


@pytest.mark.parametrize("bad", [
    "oops", "3", "[]", '{"id": "q0"}', '{"id": "q0", "correct": 5, "total": 4}',
    '{"id": "q0", "correct": -1, "total": 4}', '{"id": "q0", "correct": NaN, "total": 4}',
    '{"id": "q0", "correct": 1, "total": Infinity}', '{"id": "q0", "correct": "x", "total": 4}',
    '{"id": "q0", "correct": true, "total": 4}', '{"id": "q0", "correct": "2", "total": 4}',
    '{"id": "q0", "correct": 1, "correct": 2, "total": 4}',
    '{"id": null, "correct": 1, "total": 4}', '{"id": "q0", "correct": 1, "total": true}',
    '{"id": "q0", "correct": 1, "total": 1' + "0" * 400 + "}", "[" * 100_000])
def test_a_line_that_is_no_grade_is_named(tmp_path, bad):
    path = written(tmp_path, grade_line(SAMPLES[0], 1, 8, "a"), bad + "\n")
    with pytest.raises(ValueError, match="grades.jsonl, line 2: expected"):
        read_grades(path, SAMPLES)


def test_grades_that_are_no_utf8_are_named(tmp_path):
    """The error named neither the file nor the line."""
    path = tmp_path / "grades.jsonl"
    line = grade_line(SAMPLES[0], 1, 8, "a")
    path.write_bytes((line + line.replace("q0", "é")).encode("latin-1"))
    with pytest.raises(ValueError, match=r"grades.jsonl, line 2: not UTF-8 text \(byte 0xe9\)"):
        read_grades(str(path), SAMPLES)


def test_grades_of_other_data_or_of_another_model_are_refused(tmp_path):
    path = written(tmp_path, grade_line(SAMPLES[0], 1, 8, "a"))
    other = [Sample("q0", "What is 0?", "zero", "count", "toy:0")]
    for samples in (other, SAMPLES[1:]):
        with pytest.raises(ValueError, match="line 1: these grades are of other data.*'q0'"):
            read_grades(path, samples)
    with pytest.raises(ValueError, match="line 1: graded by 'a', not 'b'"):
        read_grades(path, SAMPLES, "b")
    with pytest.raises(ValueError, match="none.jsonl: no such file; evaluate.py --grade=true"):
        read_grades(str(tmp_path / "none.jsonl"), SAMPLES)
