"""python -m pytest tests/test_watch.py -q

The page of a run, out/watch.html: what is put into it, and what a real browser shows of it.
"""
import json
import os
import re

import pytest
from browser import Browser, find
from runs import ROOT, command

from plumbing import page

WATCH = os.path.join(ROOT, "watch.py")
# What a model may write. Each is one token; as HTML, script or bidirectional text each would break
# something.
HOSTILE = [
    "<script>document.title = 'broken'</script>", "</script>", "</style>", "<!--", "]]>",
    "<img src=x onerror=\"document.title = 'broken'\">", "&lt;b&gt;", "\u202eevil", "\u2028", "\0",
    "\x1b[31m", "\ud83d", "\U0001f469\u200d\U0001f680", "THE DATA OF THE RUN",
    "THE SCRIPT OF THE PAGE", "\\u003c", "${1}", "", "   ", "\t"]
HEBREW = ["\u05e9\u05dc\u05d5\u05dd", "\u05e2\u05d5\u05dc\u05dd"]
SHOWN = {"\u202eevil": "\\u202eevil", "\u2028": "\\u2028", "\0": "␀", "\x1b[31m": "␛[31m",
         "\ud83d": "\\ud83d", "": "◦", "   ": "␣␣␣", "\t": "⇥\t"}


def completion(tokens, advantage, trained=True, **other):
    """One with log-probs of 1/2, of which the trainer agrees with all but the last: 3/4."""
    n, half = len(tokens), -0.6931
    right = float(advantage > 0)
    return {"tokens": tokens, "sampled": [1] * n, "logprobs": [half] * n,
            "new": [*[half] * (n - 1), -0.2877] if trained else None,
            "entropy": [0.25] * n if trained else None, "left_out": None, "length": n,
            "forced": False, "truncated": False, "predicted": "3", "reward": 0.1 + 0.9 * right,
            "accuracy": right, "format": 1.0, "advantage": advantage, **other}


def group(slot, fate, accuracies, why=""):
    return {"slot": slot, "id": f"q{slot}", "domain": "count", "fate": fate, "why": why,
            "accuracies": accuracies, "rate": [0.5, 0.75], "tier": [2, 3]}


LONG = "9" * 300       # a word that is wider than a phone


def whole(slot, completions, update):
    pixel = ("data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7")
    frames = {"of": 4, "seconds": [0.5, 1.5], "width": 28, "height": 28, "strip": pixel}
    return {"slot": slot, "question": "How many <b>birds</b>?", "answer": LONG, "video": LONG,
            "prefix": 93, "vision": 64, "frames": frames, "update": update,
            "completions": completions}


def recorded(step):
    """A line of rollouts.jsonl: two groups shown whole, one of them without signal."""
    hostile = ["a", *HEBREW, "b", *HOSTILE]
    forced = completion(["so", "</think>", "<answer>", "3"], -1.0, sampled=[1, 0, 0, 1],
                        logprobs=[-0.6931, 0, 0, None], left_out=[3, 1234], length=1238,
                        forced=True, predicted=None)
    kept = [completion(hostile, 0.5), completion(["x" * 400, "\n", "y"], 1.5, predicted=LONG),
            forced]
    alike = [completion(["no"], 0.0, trained=False)] * 3
    groups = [group(0, "kept", [1.0, 1.0, 0.5]), group(1, "no signal", [0.0] * 3),
              group(2, "not graded", [], "<b>timed out</b>"), group(3, "cut by balance", [1.0, 0]),
              group(4, "dropped", [], f"{LONG}.mp4: no video stream")]
    return {"step": step, "asked": 5, "wanted": 2, "tiers": [1, 2, 10 + step, 4, 5],
            "clip": [0.8, 1.28], "groups": groups, "groups_left_out": 0,
            "shown": [whole(0, kept, 1), {**whole(1, alike, None), "frames": None}]}


def metrics_of(rl_steps):
    """Lines of metrics.jsonl: two steps of the cold start, its evaluation, and some of RL."""
    yield {"step": 1, "stage": "sft", "loss": 2.0, "train_s": 1.0}
    yield {"step": 2, "stage": "sft", "loss": 1.0, "train_s": 1.0}
    yield {"step": 2, "stage": "sft", "eval_accuracy": 0.4}
    keys = ("reward", "accuracy", "format", "length", "entropy", "forced", "truncated", "clip_low",
            "clip_high", "invalid_rate")
    for step in range(1, rl_steps + 1):
        yield {"step": step, "stage": "rl", **dict.fromkeys(keys, 1 / step), "encode_s": 1.0,
               "rollout_s": 2.0, "verify_s": 0.0, "train_s": 1.0}


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_run(folder, rl_steps=3, steps=(1, 3)):
    """What a run keeps. -> the folder"""
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text(lines(metrics_of(rl_steps)))
    if steps:
        (folder / "rollouts.jsonl").write_text(lines(map(recorded, steps)))
    return str(folder)


def data_of(out):
    """The text of the data in a page."""
    with open(os.path.join(out, "watch.html"), encoding="utf-8") as f:
        [text] = re.findall(r'<script type="application/json" id="data">(.*?)</script>', f.read())
    return text


# --------------------------------------------------------------------------------------------------
# what is put into the page

def test_the_page_holds_what_the_run_wrote_and_none_of_it_is_html(tmp_path):
    out = write_run(tmp_path / "out")
    returned = page.write_page(out)
    text = data_of(out)
    assert text.isascii()
    assert not set("<>&") & set(text)
    data = json.loads(text)
    assert data == returned
    for step in (1, 3):
        seconds = {"encode": 1.0, "rollout": 2.0, "verify": 0.0, "train": 1.0}
        assert {**recorded(step), "seconds": seconds} in data["steps"]
    assert data["done"] == {"align": 0, "sft": 2, "rl": 3}
    assert data["curves"]["sft"] == {"loss": [[1, 2.0], [2, 1.0]], "eval_accuracy": [[2, 0.4]]}
    assert data["curves"]["rl"]["reward"] == [[1, 1.0], [2, 0.5], [3, 0.3333]]


def test_the_same_run_gives_the_same_bytes_and_is_never_half_a_page(tmp_path, monkeypatch):
    """Two folders, and a write that is stopped before it is renamed."""
    pages = []
    for name in ("a", "another"):
        out = write_run(tmp_path / name)
        page.write_page(out)
        pages.append((tmp_path / name / "watch.html").read_bytes())
    assert pages[0] == pages[1]
    assert sorted(os.listdir(out)) == ["metrics.jsonl", "rollouts.jsonl", "watch.html"]

    def stopped(*paths):
        raise KeyboardInterrupt

    write_run(tmp_path / "another", rl_steps=9)
    monkeypatch.setattr(page.os, "replace", stopped)
    with pytest.raises(KeyboardInterrupt):
        page.write_page(out)
    assert (tmp_path / "another" / "watch.html").read_bytes() == pages[1]


DAMAGED = ["no JSON", "[1, 2]", "{}", '{"step": "1", "stage": "rl"}', '{"step": true, "stage": ""}',
           '{"step": 1, "stage": "rl", "reward": NaN}', '{"step": 1, "stage": "rl"', "\0",
           "[" * 100_000]


@pytest.mark.parametrize("line", DAMAGED, ids=range(len(DAMAGED)))
@pytest.mark.parametrize("name", ["metrics.jsonl", "rollouts.jsonl"])
def test_a_damaged_line_is_named(tmp_path, monkeypatch, name, line):
    out = write_run(tmp_path)
    before = (tmp_path / name).read_text().splitlines()
    (tmp_path / name).write_text("\n".join([before[0], line, *before[1:]]) + "\n")
    said = command(monkeypatch, WATCH, out)
    assert said.startswith("watch.py: ") and "\n" not in said
    assert f"{name}, line 2" in said
    assert not os.path.exists(os.path.join(out, "watch.html"))


@pytest.mark.parametrize("name", ["metrics.jsonl", "rollouts.jsonl"])
def test_a_line_that_is_still_being_written_is_left_out_and_named(tmp_path, monkeypatch, capsys,
                                                                  name):
    out = write_run(tmp_path)
    whole_file = (tmp_path / name).read_text()
    (tmp_path / name).write_text(whole_file[:-9])
    assert command(monkeypatch, WATCH, out) is None
    assert f"left out the last line of {name}" in capsys.readouterr().out
    data = json.loads(data_of(out))
    assert data["cut_short"] == [name]
    assert [step["step"] for step in data["steps"]] == ([1, 3] if name == "metrics.jsonl" else [1])
    (tmp_path / name).write_text(whole_file[:-1])          # whole, but without its line end
    assert page.write_page(out)["cut_short"] == []


def test_the_command_says_what_it_wrote_or_what_is_missing(tmp_path, monkeypatch, capsys):
    out = write_run(tmp_path / "out")
    assert command(monkeypatch, WATCH, out) is None
    assert f"{out}/watch.html: 3 RL steps, 2 of them" in capsys.readouterr().out
    os.remove(os.path.join(out, "rollouts.jsonl"))
    assert command(monkeypatch, WATCH, "--out_dir", out) is None
    assert "only curves" in capsys.readouterr().out
    (tmp_path / "out" / "metrics.jsonl").write_text(lines(metrics_of(0)))
    assert command(monkeypatch, WATCH, out) is None
    assert "the run has no RL step yet" in capsys.readouterr().out
    os.remove(os.path.join(out, "metrics.jsonl"))
    for arguments, says in (([out], "metrics.jsonl: no such file"), ([out + "x"], "no such folder"),
                            (["--out=x"], "did you mean 'out_dir'"), ([out, "x"], "'x'")):
        said = command(monkeypatch, WATCH, *arguments)
        assert said.startswith("watch.py: ") and says in said and "\n" not in said


def test_a_long_curve_is_thinned_to_values_that_were_logged():
    """The first, the last and a single step that jumped stay; the order too."""
    points = [[step, 1.0 + (step * 7919 % 13) / 100] for step in range(1, 50_001)]
    points[31_337][1] = 90.0
    points[41_337][1] = 0.0
    few = page.thinned(points, 1000)
    assert 900 < len(few) <= 1000
    assert few == sorted(few)
    assert all(point in points for point in few[::50])
    for place in (0, 31_337, 41_337, -1):
        assert points[place] in few
    assert max(b[0] - a[0] for a, b in zip(few, few[1:])) <= 2 * 50_000 // 499 + 1
    assert page.thinned(points[:1000], 1000) == points[:1000]
    gaps = [[step, None] for step in range(5000)]
    assert len(page.thinned(gaps, 1000)) == 500


def test_a_value_that_was_not_finite_is_a_gap(tmp_path):
    out = write_run(tmp_path)
    rows = [{"step": 1, "stage": "align", "loss": None}, {"step": 2, "stage": "align", "loss": 2}]
    (tmp_path / "metrics.jsonl").write_text(lines(rows))
    assert page.page_data(out)["curves"]["align"]["loss"] == [[1, None], [2, 2.0]]


def test_the_page_fetches_nothing_and_keeps_to_the_width_of_our_files():
    """The only addresses are names of XML namespaces."""
    for name in ("watch.html", "watch.js"):
        text = (page.HERE / name).read_text(encoding="utf-8")
        assert max(map(len, text.splitlines())) <= 100
        assert set(re.findall(r"\w+://[^\"'\s]*", text)) <= {"http://www.w3.org/2000/svg"}
        assert not re.search(r"innerHTML|insertAdjacent|document\.write|@import|eval\(", text)
    assert "</script" not in text.lower() and "<!--" not in text       # it would end there


# --------------------------------------------------------------------------------------------------
# what a browser shows

@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not find():
        pytest.skip("no Chromium is installed (Debian: apt-get install chromium)")
    tab = Browser(tmp_path_factory.mktemp("profile"))
    yield tab
    tab.close()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    out = write_run(tmp_path_factory.mktemp("watched") / "out")
    page.write_page(out)
    return os.path.join(out, "watch.html")


@pytest.fixture
def tab(browser, path):
    """A browser that shows the page. Afterwards nothing was complained of, nothing fetched."""
    browser.problems.clear()
    browser.requests.clear()
    browser.open(path)
    yield browser
    assert browser.problems == []
    assert {url for url in browser.requests if not url.startswith("data:")} <= {f"file://{path}"}


def texts(tab, selector):
    return tab.run(f"[...document.querySelectorAll('{selector}')].map((x) => x.textContent)")


def tip(tab):
    return tab.run("document.getElementById('tip').hidden ? '' : "
                   "document.getElementById('tip').innerText")


def test_what_a_model_wrote_is_shown_as_text(tab):
    tokens = texts(tab, ".completion:nth-child(1) [data-token]")
    assert tokens == ["a", *HEBREW, "b", *[SHOWN.get(text, text) for text in HOSTILE]]
    assert tab.run("document.title") == "nanoLongRL: a run"
    assert tab.run("document.querySelectorAll('img, .tokens script, bdi b').length") == 0
    assert texts(tab, ".question") == ["How many <b>birds</b>?"]
    assert any("<b>timed out</b>" in chip for chip in texts(tab, ".chip"))


def test_right_to_left_text_does_not_move_its_neighbours(tab):
    tab.run("document.querySelector('.tokens').style.width = '600px'")
    left = tab.run("[...document.querySelectorAll('.tokens [data-token]')].slice(0, 4)"
                   ".map((x) => x.getBoundingClientRect().left)")
    assert left == sorted(left) and len(set(left)) == 4


def test_a_token_says_what_it_contributes(tab):
    """Ratio 1 but for the last token of each completion, 0.75 / 0.5 = 1.5, outside the clip."""
    kinds = {"up": "--up", "down": "--down"}
    first = ".completion:nth-child(1) [data-token='0']"
    style = "document.querySelector(\"{}\").style.getPropertyValue('{}')"
    assert kinds["up"] in tab.run(style.format(first, "--tint"))
    strengths = [int(tab.run(style.format(f".completion:nth-child({i}) [data-token='0']",
                                          "--strength"))[:-1]) for i in (1, 2, 3)]
    # 0.5 / 24, 1.5 / 3 and -1 / 1236 of a long one whose middle was left out
    # and none weaker than 22 of 55: blue and orange are told apart from grey
    assert strengths == [round(22 + 33 * share ** 0.5) for share in (0.5 / 24 / 0.5, 1, 1 / 618)]
    tab.run(f"document.querySelector(\"{first}\").focus()")
    said = tip(tab)
    for words in ('"a"', "token 1 of 24", "0.500", "1.000, not clipped", "0.25 nats", "+0.0208"):
        assert words in said
    tab.run("document.querySelector('.completion:nth-child(2) .clipped').focus()")
    assert "1.500, clipped" in tip(tab) and "0: clipped" in tip(tab)
    third = ".completion:nth-child(3) [data-token='{}']"
    assert kinds["down"] in tab.run(style.format(third.format(0), "--tint"))
    tab.run(f"document.querySelector(\"{third.format(3)}\").focus()")      # after the gap
    assert "token 1,238 of 1,238" in tip(tab) and tip(tab).count("not a number") == 2
    assert "1,234 tokens not kept" in texts(tab, ".completion:nth-child(3) .tokens")[0]


def test_forced_tokens_are_grey_and_marked(tab):
    assert texts(tab, "[data-token].forced") == ["</think>", "<answer>"]
    assert texts(tab, ".tokens .label") == ["no loss"]
    look = tab.run("(({borderBottomStyle, backgroundColor}) => borderBottomStyle + backgroundColor)"
                   "(getComputedStyle(document.querySelector('[data-token].forced')))")
    assert look == "dashedrgba(0, 0, 0, 0)"
    tab.run("document.querySelector('[data-token].forced').focus()")
    assert "no loss" in tip(tab) and "probability" not in tip(tab)


def test_the_keyboard_and_the_mouse_choose_step_group_and_token(tab):
    chosen = "document.getElementById('chosen').textContent"
    assert tab.run(chosen) == "RL step 3 of 3"
    tab.key("ArrowLeft")
    assert tab.run(chosen) == "RL step 1 of 3"
    tab.key("ArrowLeft")                                   # there is none before
    assert tab.run(chosen) == "RL step 1 of 3"
    tab.run("document.querySelectorAll('svg.click')[1].scrollIntoView()")
    x, y = tab.run("(({right, top}) => [right - 14, top + 20])"
                   "(document.querySelectorAll('svg.click')[1].getBoundingClientRect())")
    tab.point(x, y, click=True)                            # a curve, at its last step
    assert tab.run(chosen) == "RL step 3 of 3"
    tab.run("document.querySelector('[data-token]').focus()")
    tab.key("ArrowRight")
    assert tab.run("document.activeElement.dataset.token") == "1"
    assert tab.run(chosen) == "RL step 3 of 3"             # the arrow was the token's
    assert "token 2 of 24" in tip(tab)
    tab.key("Escape")
    assert tip(tab) == ""
    entropy = "document.querySelector('[data-focus=\"tint entropy\"]')"
    tab.run(f"{entropy}.focus(); {entropy}.click()")
    assert tab.run(f"document.activeElement === {entropy}")        # it was drawn again
    assert "how undecided the model was" in tab.run("document.getElementById('group').innerText")
    tab.run("document.querySelector('.chip[data-slot=\"1\"]').click()")
    assert "All 3 answers are wrong" in tab.run("document.getElementById('group').innerText")
    tab.run("document.querySelector('[data-token]').focus()")
    assert "not trained on" in tip(tab)


def test_a_step_says_what_became_of_its_groups_and_its_seconds(tab):
    said = tab.run("document.getElementById('step-body').innerText")
    for words in ("5 questions asked, to find 2 groups to learn from: 1 kept, 1 no signal, 1 cut "
                  "by balance, 1 not graded, 1 dropped", "2 s, 50%", "4 s in all",
                  "5 then moved up and 0 down", "0.50 → 0.75 · tier 2 → 3"):
        assert words in said
    group = tab.run("document.getElementById('group').innerText")
    for words in ("93 tokens: 64 vision tokens", "0.5 s", "1.5 s", "shown 4 frames; 2 of them",
                  "2 of 3 answers are right, 1 partly",
                  "in update 2 of this step", "none found"):
        assert words in group


def test_a_group_without_forced_or_clipped_tokens_leads_to_one_with_some(browser, tmp_path):
    """The page explains grey and framed tokens; in most groups there are none to be seen."""
    browser.problems.clear()
    out = write_run(tmp_path / "out", rl_steps=9, steps=(1, 3, 9))
    none = whole(0, [completion(["a", "b"], 0.0), completion(["c"], 0.0)], 0)
    rows = [recorded(step) for step in (1, 3, 9)]
    rows[1]["shown"] = rows[2]["shown"] = [none]
    (tmp_path / "out" / "rollouts.jsonl").write_text(lines(rows))
    page.write_page(out)
    browser.open(os.path.join(out, "watch.html"))
    assert texts(browser, ".absent") == [
        f"No token was {kind} in this group; step 1, group q0 has one"
        for kind in ("forced", "clipped")]
    browser.run("document.querySelector('[data-kind=clipped]').click()")
    assert browser.run("document.getElementById('chosen').textContent") == "RL step 1 of 9"
    assert texts(browser, ".absent") == []
    assert browser.run("document.querySelectorAll('.tokens .clipped').length") > 0
    (tmp_path / "out" / "rollouts.jsonl").write_text(lines(rows[1:]))
    page.write_page(out)
    browser.open(os.path.join(out, "watch.html"))
    assert texts(browser, ".absent") == [
        f"No token was {kind} in this group. No recorded group has one."
        for kind in ("forced", "clipped")]
    assert browser.problems == []


def test_a_group_that_was_not_trained_on_is_not_told_of_pushes(tab):
    """It spoke of tokens above the mean and pushed, and of a deviation of 0."""
    said = "document.getElementById('group').innerText"
    for words in ("pushed up", "clipped", "blue: above the mean", "standard deviation"):
        assert words in tab.run(said)
    tab.run("document.querySelector('.chip[data-slot=\"1\"]').click()")
    assert "All rewards are equal: every advantage is 0." in tab.run(said)
    assert "No token was forced in this group" in tab.run(said)
    for words in ("pushed up", "clipped", "above the mean", "deviation"):
        assert words not in tab.run(said)


def test_rewards_that_differ_in_a_group_that_was_not_trained_on(browser, tmp_path):
    browser.problems.clear()
    out = write_run(tmp_path / "out", rl_steps=1, steps=())
    cut = recorded(1)
    pair = [completion(["a"], 0.7071, trained=False), completion(["b"], -0.7071, trained=False)]
    cut["shown"] = [whole(3, pair, None)]
    (tmp_path / "out" / "rollouts.jsonl").write_text(lines([cut]))
    page.write_page(out)
    browser.open(os.path.join(out, "watch.html"))
    said = browser.run("document.getElementById('group').innerText")
    for words in ("there is a signal", "the deviation 0.636. The group was not trained on."):
        assert words in said
    for words in ("pushed up", "clipped"):
        assert words not in said
    for each, form in zip(pair, (1.0, 0.0)):                # wrong both, one of them in wrong form
        each |= {"accuracy": 0.0, "format": form, "reward": 0.1 * form}
    cut["groups"][3] |= {"fate": "no signal", "accuracies": [0.0, 0.0]}
    (tmp_path / "out" / "rollouts.jsonl").write_text(lines([cut]))
    page.write_page(out)
    browser.open(os.path.join(out, "watch.html"))
    said = browser.run("document.getElementById('group').innerText")
    assert "differ only by the form of the answers. The group was not trained on." in said
    assert "One value so far: right, greedy 40%" in browser.run("document.body.innerText")
    assert browser.problems == []


@pytest.mark.parametrize("groups", [60, 150])
def test_many_groups_are_shown_in_part_until_all_are_asked_for(browser, tmp_path, groups):
    """Those that can be opened are never hidden."""
    browser.problems.clear()
    out = write_run(tmp_path / "out", rl_steps=1, steps=())
    many = recorded(1)
    many["groups"] = [group(slot, "kept", [1.0, 0.0]) for slot in range(groups)]
    many["shown"] = [{**many["shown"][0], "slot": groups - 1}]
    (tmp_path / "out" / "rollouts.jsonl").write_text(lines([many]))
    page.write_page(out)
    browser.open(os.path.join(out, "watch.html"))
    assert len(texts(browser, ".chip")) == 60
    assert len(texts(browser, "button.chip")) == 1
    browser.run("[...document.querySelectorAll('#step-body button')]"
                ".find((x) => x.textContent.startsWith('show all'))?.click()")
    assert len(texts(browser, ".chip")) == groups
    assert browser.problems == []


@pytest.mark.parametrize("width, seen", [(360, 2), (1280, 9)])
def test_a_phone_shows_two_curves_until_all_are_asked_for(tab, path, width, seen):
    visible = ("[...document.querySelectorAll('.chart')].filter((x) => x.offsetWidth)"
               ".length")
    tab.open(path, width, 780)
    assert tab.run(visible) == seen
    if width == 360:
        tab.run("document.getElementById('all-charts').click()")
        assert tab.run(visible) == 9


@pytest.mark.parametrize("width", [360, 800])
def test_no_page_is_wider_than_its_window(tab, path, width):
    tab.open(path, width, 780)
    for slot in (0, 1):
        tab.run(f"document.querySelector('.chip[data-slot=\"{slot}\"]').click()")
        tab.run("document.querySelector('[data-token]').focus()")
        assert tab.run("document.documentElement.scrollWidth") <= width


def test_light_and_dark(tab, path):
    background = "getComputedStyle(document.body).backgroundColor"
    light = tab.run(background)
    tab.run("document.getElementById('theme').click()")
    dark = tab.run(background)
    assert light != dark
    tab.open(path, dark=True)
    assert tab.run(background) == dark
    tab.run("document.getElementById('theme').click()")
    assert tab.run(background) == light


@pytest.mark.parametrize("rl_steps, says", [(0, "no RL step yet"), (2, "kept no rollouts")])
def test_a_run_without_rollouts_is_curves_alone(browser, tmp_path, rl_steps, says):
    browser.problems.clear()
    out = write_run(tmp_path / "out", rl_steps=rl_steps, steps=())
    page.write_page(out)
    browser.open(os.path.join(out, "watch.html"))
    assert browser.run("document.getElementById('step').hidden")
    assert says in browser.run("document.getElementById('problem').innerText")
    assert browser.run("document.querySelectorAll('.chart').length") == (9 if rl_steps else 2)
    (tmp_path / "out" / "metrics.jsonl").write_text("")    # it has only just begun
    page.write_page(out)
    browser.open(os.path.join(out, "watch.html"))
    assert browser.run("document.querySelectorAll('.chart').length") == 0
    assert browser.problems == []
