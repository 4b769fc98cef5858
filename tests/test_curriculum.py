"""python -m pytest tests/test_curriculum.py -q

What is asked next: every question once an epoch, the same whoever asks and after any restart.
"""
import io
import json

import pytest
import torch

from curriculum import Curriculum, has_signal

IDS = [f"clip-{i}" for i in range(6)]


def draws(curriculum, n, times):
    return [curriculum.draw(n) for _ in range(times)]


@pytest.mark.parametrize("n", [1, 2, 3, 4, 6, 9])
def test_an_epoch_asks_every_question_once(n):
    """Whatever the size of a draw, also where one reaches into the next epoch: after 36 draws each came 6 times."""
    c = Curriculum(IDS, 0)
    drawn = sum(draws(c, n, 36 // n), [])
    assert {id: drawn.count(id) for id in IDS} == dict.fromkeys(IDS, 6)
    if 6 % n == 0:
        for epoch in range(6):
            assert sorted(drawn[6 * epoch:6 * epoch + 6]) == IDS


def test_draws_of_any_size_read_one_stream():
    whole = Curriculum(IDS, 0)
    stream = sum(draws(whole, 6, 4), [])
    for n in (1, 2, 3):
        assert sum(draws(Curriculum(IDS, 0), n, 24 // n), []) == stream


def test_a_draw_has_no_question_twice_where_the_data_has_enough():
    """The end of one epoch and the beginning of the next may name the same question. Drawn twice in one step, it would
    be sampled with the same keys: two equal groups, paid for twice. (50 seeds, draws of 4 of 6, at every offset.)"""
    twice = [(seed, drawn) for seed in range(50) for drawn in draws(Curriculum(IDS, seed), 4, 12) if len(set(drawn)) < 4]
    assert not twice, f"{len(twice)} of 600 draws, the first: {twice[0]}"


def test_the_order_depends_on_seed_and_epoch_alone():
    """Not on the order of the data, not on what came back or was drawn before, not on the process's own random state."""
    a, b = Curriculum(IDS, 3), Curriculum(IDS[::-1], 3)
    torch.manual_seed(1)
    for id in IDS[:3]:
        b.update(id, 1.0, 4)
    first, second = a.draw(6), a.draw(6)
    assert (b.draw(6), b.draw(6)) == (first, second)
    assert Curriculum(IDS, 3).draw(6) == first != second
    assert len({tuple(Curriculum(IDS, seed).draw(6)) for seed in range(20)}) > 15
    assert first != IDS, "shuffled"


def test_a_dropped_question_is_never_drawn_again():
    """Also one that was next, and the others still come once an epoch."""
    c = Curriculum(IDS, 0)
    c.draw(2)
    coming = Curriculum(IDS, 0).draw(3)[2]
    c.drop(coming, "its video does not decode")
    assert c.draw(3) == [id for id in Curriculum(IDS, 0).draw(6)[2:] if id != coming]
    rest = c.draw(10)
    assert coming not in rest and sorted(rest[:5]) == sorted(rest[5:]) == sorted(set(IDS) - {coming})


def test_one_question_that_is_left_is_drawn_as_often_as_asked():
    c = Curriculum(IDS, 0)
    for id in IDS[1:]:
        c.drop(id, "too long")
    assert c.draw(5) == [IDS[0]] * 5


@pytest.mark.parametrize("ids", [IDS, []], ids=["dropped", "none"])
def test_no_question_left_raises(ids):
    c = Curriculum(ids, 0)
    for id in ids:
        c.drop(id, "too long")
    with pytest.raises(ValueError, match="no sample is left"):
        c.draw(1)


def by_torch(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file)


@pytest.mark.parametrize("through", [by_torch, lambda state: json.loads(json.dumps(state))], ids=["torch", "json"])
def test_a_restored_curriculum_goes_on_as_if_never_stopped(through):
    """Stopped in the middle of an epoch, with one question dropped; statistics too, whose numbers are not rounded."""
    a = Curriculum(IDS, 5)
    a.draw(8)
    a.drop(IDS[2], "its video does not decode")
    a.update(IDS[0], 1 / 3, 4)
    a.update(IDS[0], 1.0, 4)
    b = Curriculum(IDS, 5)
    b.load_state_dict(through(a.state_dict()))
    assert b.state_dict() == a.state_dict()
    for _ in range(5):
        assert a.draw(3) == b.draw(3)
        a.update(IDS[1], 0.5, 4), b.update(IDS[1], 0.5, 4)
        a.drop(IDS[3], "?"), b.drop(IDS[3], "?")
    assert a.state_dict() == b.state_dict()
    assert Curriculum(IDS, 5).dropped == {}


def test_what_came_back_is_summed_by_question():
    c = Curriculum(IDS, 0)
    for correct, total in ((2.5, 4), (0, 4), (1, 8)):
        c.update(IDS[0], correct, total)
    c.update(IDS[1], 1, 2)
    assert c.history == {IDS[0]: [3.5, 16], IDS[1]: [1.0, 2]}


@pytest.mark.parametrize("accuracies, signal", [
    ([1.0, 0.0], True), ([0.0, 0.0, 0.0, 0.5], True), ([1.0, 1.0, 1.0, 1.0], False), ([0.0] * 8, False), ([0.5, 0.5], False), ([], False)])
def test_a_group_has_a_signal_where_its_accuracies_differ(accuracies, signal):
    assert has_signal(accuracies) is signal


def test_form_alone_is_no_signal():
    """All wrong, some in good form: their totals differ, and hid a group without any signal. Accuracies are what is asked."""
    from rewards import score
    graded = [score(text, "7", "count") for text in ("<think>t</think><answer>8</answer>", "<answer>8</answer>", "8")]
    assert len({g.total for g in graded}) == 2
    assert not has_signal([g.accuracy for g in graded])
