"""python -m pytest tests/test_resume.py -q

A run that stops goes on: checkpoints, kills, full disks, half-written and damaged files, and
another configuration, which is refused.
"""
import json
import os
import resource
import shutil
import signal
import time
from dataclasses import asdict

import pytest
import torch
from PIL import Image
from runs import (
    ALONE,
    BOUND,
    LAST,
    alone,
    ended,
    fingerprint,
    flags,
    logged_steps,
    metrics,
    one_clear_line,
    question,
    refused,
    rollouts,
    run_of,
    same,
    script,
    state,
    timeless,
    torchrun,
    two_ranks,
    weights,
    write,
)
from transformers import AutoModelForImageTextToText, AutoTokenizer

import data
import model as vlm
import train
from plumbing import page, resume
from plumbing.command_line import make_folder
from plumbing.metrics import Log

FINISHED = ["curves.png", "metrics.jsonl", "model", "rollouts.jsonl", "watch.html"]


def checkpoints(*steps):
    return [f"ckpt-{step}" for step in steps]


def newest_name(out_dir):
    return os.readlink(os.path.join(out_dir, "model"))


# --------------------------------------------------------------------------------------------------
# what is written

def test_a_run_leaves_a_picture_and_the_two_newest_checkpoints(run):
    with Image.open(os.path.join(run.dir, "curves.png")) as image:
        image.load()
        assert image.format == "PNG" and image.width > 500
        assert len(set(image.convert("L").tobytes())) > 10
    assert os.path.islink(run.model) and newest_name(run.dir) == f"ckpt-{LAST}"
    assert sorted(os.listdir(run.dir)) == checkpoints(LAST - 1, LAST) + FINISHED
    saved = state(run.dir)
    assert saved["done"] == {"align": 2, "sft": 16, "rl": 7}
    assert saved["config"] == {**asdict(train.Config()), **run.how, "out_dir": run.dir}
    assert f"done: {run.model}" in run.out and "held-out accuracy" in run.out


def test_the_checkpoint_is_what_transformers_loads(run):
    """from_pretrained's own attention, tower and splicing, given pixels and our positions, against
    ours: same log-probs."""
    theirs = AutoModelForImageTextToText.from_pretrained(run.model, dtype=torch.float32)
    their_tokenizer = AutoTokenizer.from_pretrained(run.model)
    ours, tokenizer = vlm.load(run.model)
    assert same(dict(ours.state_dict()), dict(theirs.state_dict()))
    assert not same(dict(ours.state_dict()), dict(vlm.load("tiny")[0].state_dict()))
    video = data.open_video("toy:3", 7)
    encoded = vlm.encode_video(ours, lambda: video, ALONE)
    prompt = vlm.make_prompt(ours, tokenizer, "Heads? é <|im_end|> A. yes B. no", *encoded)
    text = "<think>so</think><answer>A</answer>"
    tokens = torch.tensor(their_tokenizer(text).input_ids)
    assert tokens.tolist() == tokenizer(text).input_ids
    banned = vlm.banned_ids(ours, tokenizer)
    with torch.no_grad():
        logprobs, _ = vlm.logprobs(ours, [prompt], [[tokens]], banned)
        patches, grid = vlm.patchify(video.read(0, 7), ours.pixels)
        steps = prompt.positions.max() + 1 + torch.arange(len(tokens))
        positions = torch.cat([prompt.positions, steps.expand(3, -1)], 1)[:, None]
        logits = theirs(input_ids=torch.cat([prompt.ids, tokens])[None],
                        pixel_values_videos=patches, video_grid_thw=torch.tensor([grid]),
                        position_ids=positions).logits[0]
    logits = logits[len(prompt.ids) - 1:-1].masked_fill(banned, -torch.inf)
    expected = logits.log_softmax(1).gather(1, tokens[:, None])[:, 0]
    assert torch.allclose(logprobs[0], expected, atol=2e-5)


# --------------------------------------------------------------------------------------------------
# going on

def test_started_again_a_finished_run_does_nothing_more(run, copied, capsys):
    before = fingerprint(copied)
    alone(**run.how, out_dir=copied)
    out = capsys.readouterr().out
    assert "going on from" in out and "7 rl steps" in out and "done: " in out
    assert fingerprint(copied) == before


def test_with_more_steps_a_finished_run_goes_on(run, copied):
    with open(os.path.join(copied, "metrics.jsonl")) as f:
        before = f.read()
    alone(**{**run.how, "out_dir": copied, "rl_steps": 9, "eval_every": 0})
    with open(os.path.join(copied, "metrics.jsonl")) as f:
        assert f.read().startswith(before)
    assert [row["step"] for row in metrics(copied, "rl")] == list(range(1, 10))
    assert rollouts(copied)[:7] == rollouts(run.dir) and len(rollouts(copied)) == 9
    assert newest_name(copied) == f"ckpt-{LAST + 2}"
    assert not same(weights(copied), weights(run.dir))


def kill_after(processes, out, stage, step):
    """SIGKILL to both ranks once they have logged this step."""
    start = time.monotonic()
    while (stage, step) not in logged_steps(out):
        if time.monotonic() - start > BOUND or [p.poll() for p in processes] != [None, None]:
            break
        time.sleep(0.005)
    for p in processes:
        p.send_signal(signal.SIGKILL)
    assert [p.wait(BOUND) for p in processes] == [-signal.SIGKILL] * 2


def timeless_page(folder):
    """What out/watch.html shows, without seconds."""
    shown = page.page_data(folder)
    for key in page.SECONDS:
        del shown["curves"]["rl"][key]
    for step in shown["steps"]:
        del step["seconds"]
    return shown


def test_a_run_that_is_killed_and_started_again_is_as_if_never_stopped(run, tmp_path):
    """SIGKILL to all ranks between two checkpoints, once in the cold start, once in RL. What was
    logged after the checkpoint is logged again, once; every number and every bit of the weights is
    that of the run that was never stopped."""
    out = str(tmp_path / "out")
    arguments = flags(**run.how, out_dir=out)
    # Checkpoints are at steps 3 and 6 of the cold start, and of RL.
    for stage, step, kept in (("sft", 4, 5), ("rl", 4, LAST - 4)):
        kill_after(two_ranks(arguments), out, stage, step)
        saved = state(out)
        assert saved["step"] >= kept
        assert len(metrics(out)) > saved["lines"]          # else nothing would have to be cut
        for name in ("metrics.jsonl", "rollouts.jsonl"):
            with open(os.path.join(out, name), "a") as f:
                f.write('{"step": 5, "sta')                # killed while it wrote a line
    for result in map(ended, two_ranks(arguments)):
        assert result.code == 0, result.err
    assert timeless(metrics(out)) == timeless(metrics(run.dir))
    assert rollouts(out) == rollouts(run.dir)
    assert timeless_page(out) == timeless_page(run.dir)
    assert same(weights(out), weights(run.dir))
    a, b = state(out), state(run.dir)
    assert all(same(a[key], b[key]) for key in ("optimizer", "curriculum", "done", "lines"))


def test_a_bfloat16_run_goes_on_bit_for_bit(run, tmp_path):
    """Also the part of its weights that bfloat16 does not hold."""
    how = {**run.how, "model": run.model, "sft_steps": 2, "eval_every": 0, "dtype": "bfloat16",
           "lr": 1e-5, "save_every": 1}
    alone(**{**how, "rl_steps": 4, "out_dir": str(tmp_path / "whole")})
    alone(**{**how, "rl_steps": 2, "out_dir": str(tmp_path / "parts")})
    alone(**{**how, "rl_steps": 4, "out_dir": str(tmp_path / "parts")})
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    whole, parts = (state(tmp_path / name)["copies"] for name in ("whole", "parts"))
    assert whole and same(list(whole), list(parts)) and whole[0].dtype == torch.float32


# --------------------------------------------------------------------------------------------------
# going on with something else

@pytest.mark.parametrize("key, value", dict(
    seed=1, lr=0.5, group_size=8, data="toy", model="the run's", frames=4, align_steps=3).items())
def test_another_configuration_is_refused_by_key(run, copied, key, value):
    if key == "model":
        value = run.model
    before = run.how.get(key, getattr(train.Config(), key))
    refused({**run.how, "out_dir": copied, key: value}, "another configuration",
            f"{key} = {before!r} there", f"{value!r} here")


@pytest.mark.method
def test_a_hyperparameter_that_a_checkpoint_lacks_counts_as_its_default():
    """A run of an older commit goes on after one was added, unless it is given another value."""
    saved = asdict(train.Config())
    del saved["oversample_cap"]
    resume.check_same_run(train.Config(), saved, "ckpt-1")
    with pytest.raises(ValueError, match="oversample_cap = 8.0 there, 2.0 here"):
        resume.check_same_run(train.Config(oversample_cap=2.0), saved, "ckpt-1")


@pytest.mark.method
def test_a_hyperparameter_that_is_gone_does_not_keep_a_run_from_going_on():
    """Checkpoints of older commits have `compile` in their configuration."""
    c = train.Config()
    assert not hasattr(c, "compile")
    resume.check_same_run(c, {**asdict(c), "compile": True}, "ckpt-1")


def test_more_cold_start_is_refused_or_right_once_rl_has_begun(run, copied):
    """sft_steps may change, but RL's optimizer was then loaded into the cold start's: the tiny
    model's has more parameters, a loaded model's took RL's moments and draws without a word."""
    try:
        alone(**{**run.how, "out_dir": copied, "sft_steps": 18})
    except ValueError as e:
        assert "sft_steps" in str(e), e
    else:
        taught = [row["step"] for row in metrics(copied, "sft") if "loss" in row]
        assert taught == list(range(1, 19))


def test_other_evaluation_does_not_change_what_is_trained_on(run, tmp_path):
    """eval_data may change, but without it a part of data is held out: given later, the held-out
    part was trained on."""
    samples = [data.Sample(str(seed), "", "", "", f"toy:{seed}:1") for seed in range(200)]
    held_out = [int(sample.id) for sample in data.split(samples)[1]][:3]
    others = [seed for seed in range(6) if seed not in held_out]
    path, out = write(tmp_path / "q.jsonl", *map(question, held_out + others)), tmp_path / "out"
    how = {**run.how, "model": run.model, "data": path, "sft_steps": 0, "eval_every": 0,
           "prompts_per_step": 2, "out_dir": out}
    alone(**{**how, "eval_data": "", "rl_steps": 1})
    try:
        alone(**{**how, "rl_steps": 6})
    except ValueError as e:
        assert "eval_data" in str(e)
    else:
        assert not {f"q{seed}" for seed in held_out} & set(state(out)["curriculum"]["recent"])


def test_a_checkpoint_of_step_0_is_not_written_again(files, tmp_path, monkeypatch):
    """vLLM starts from a directory: a model made from nothing that goes to RL at once is saved
    first. Started again, the run removed that checkpoint, its only one, to write the same."""
    def no_engine(*_):
        raise ValueError("no engine")

    monkeypatch.setattr(train, "import_vllm", lambda: None)
    monkeypatch.setattr(train, "engine_of", no_engine)
    inodes, out = [], tmp_path / "out"
    for _ in range(2):
        refused(dict(data=files.data, eval_data=files.eval_data, align_steps=0, sft_steps=0,
                     rollout="vllm", out_dir=out), "no engine")
        assert newest_name(out) == "ckpt-0"
        inodes.append(os.stat(out / "ckpt-0").st_ino)
    assert inodes[0] == inodes[1]


# --------------------------------------------------------------------------------------------------
# full disks, half-written and damaged checkpoints

def limit_files():
    """No file of more than 1 MB can be written."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))


def test_a_full_disk_ends_all_ranks_and_the_last_checkpoint_stays(run, copied):
    """Files of more than 1 MB cannot be written: the next checkpoint fails. With room again the run
    goes on as if nothing was."""
    def checkpoint():
        return newest_name(copied), fingerprint(os.path.join(copied, "model"))

    before = checkpoint()
    more = {**run.how, "out_dir": copied, "rl_steps": 8, "eval_every": 0}
    result = ended(torchrun(*flags(**more), preexec_fn=limit_files))
    one_clear_line(result, f"could not write checkpoint {copied}/ckpt-{LAST + 1}",
                   f"The last good one is {copied}/ckpt-{LAST}")
    assert checkpoint() == before
    assert not [name for name in os.listdir(copied) if name.endswith(".tmp")]
    alone(**more)
    assert [row["step"] for row in metrics(copied, "rl")] == list(range(1, 9))
    assert newest_name(copied) == f"ckpt-{LAST + 1}"


@pytest.mark.parametrize("room", [1 << 12, 1 << 20, 5 << 20])
def test_a_checkpoint_that_does_not_fit_leaves_no_trace(run, copied, room):
    """4 kB: not even the tokenizer; 1 MB: the weights; 5 MB: the optimizer's state, which torch
    reports in its own way."""
    half_done = run_of(*vlm.load(run.model), out_dir=copied)
    next_state = state(run.dir) | {"step": LAST + 1, "previous": LAST}
    sizes = [os.path.getsize(os.path.join(run.model, name))
             for name in ("model.safetensors", "training_state.pt")]
    assert sizes[0] < 5 << 20 < sizes[1]
    before, limits = fingerprint(copied), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        with pytest.raises(OSError, match=f"ckpt-{LAST + 1}.*last good one is .*ckpt-{LAST}"):
            resume.save(half_done, next_state)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert fingerprint(copied) == before
    resume.save(half_done, next_state)
    assert sorted(os.listdir(copied)) == checkpoints(LAST, LAST + 1) + FINISHED
    assert same(weights(copied), weights(run.dir))
    assert resume.newest(copied) == os.path.join(os.path.realpath(copied), f"ckpt-{LAST + 1}")


def test_what_a_kill_leaves_half_written_is_in_nobodys_way(run, copied):
    """Killed between making the new link and moving it, a run left model.tmp behind, and no later
    save could make its own."""
    following = os.path.join(copied, f"ckpt-{LAST + 1}")
    os.makedirs(following + ".tmp")
    shutil.copytree(os.path.join(copied, f"ckpt-{LAST}"), following)   # renamed, not yet linked
    os.symlink(f"ckpt-{LAST + 1}", os.path.join(copied, "model.tmp"))
    alone(**{**run.how, "out_dir": copied, "rl_steps": 8, "eval_every": 0})
    assert newest_name(copied) == f"ckpt-{LAST + 1}"
    assert not same(weights(copied), weights(run.dir))
    assert sorted(os.listdir(copied)) == checkpoints(LAST, LAST + 1) + FINISHED


@pytest.mark.method
def test_what_a_killed_save_leaves_is_removed(tmp_path):
    """A run killed while it saved left gigabytes in ckpt-N.tmp, and only a later save of the very
    same step removed them."""
    (tmp_path / "ckpt-3").mkdir()
    os.symlink("ckpt-3", tmp_path / "model")
    (tmp_path / "ckpt-notes.tmp").mkdir()                  # the user's
    for name in ("ckpt-5.tmp", "ckpt-12.tmp", "ckpt-trial-x1.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text("half")
    assert resume.find(str(tmp_path), ALONE) == str(tmp_path / "ckpt-3")
    assert sorted(os.listdir(tmp_path)) == ["ckpt-3", "ckpt-notes.tmp", "model"]


class RunsCode:
    """What a checkpoint from elsewhere can hold: unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_checkpoint_cannot_run_code(run, tmp_path):
    """The training state was unpickled with whatever it held."""
    path, proof = tmp_path / "training_state.pt", tmp_path / "proof"
    for mmap in (False, True):
        torch.save({**state(run.dir), "more": RunsCode(proof)}, path)
        with pytest.raises(ValueError, match="could run code: it is not read") as e:
            resume.read_state(str(tmp_path), train.Config(), mmap)
        assert str(path) in str(e.value) and "\n" not in str(e.value) and not proof.exists()


def test_a_model_that_cannot_be_saved_is_refused_before_it_trains(run, tmp_path):
    """transformers loads a generation_config.json with a temperature and without sampling, and does
    not save it: the whole cold start was lost at its first checkpoint."""
    model = shutil.copytree(os.path.realpath(run.model), tmp_path / "model")
    path = model / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "temperature": 0.5}))
    how = {**run.how, "model": str(model), "out_dir": str(tmp_path / "out")}
    refused(how, "could not be saved again", "generation_config.json", "temperature")
    assert metrics(tmp_path / "out") == [] and os.listdir(tmp_path / "out") == ["metrics.jsonl"]

    # Had it trained, the error would have been that of any checkpoint that cannot be written.
    trained = run_of(*vlm.load(str(model)), out_dir=str(tmp_path / "out"))
    with pytest.raises(OSError, match="could not write checkpoint .*ckpt-1: .*temperature"):
        resume.save(trained, state(run.dir) | {"step": 1, "previous": 0})
    assert os.listdir(tmp_path / "out") == ["metrics.jsonl"]


def test_without_evaluation_no_row_without_figures_is_logged(run, tmp_path):
    """After the cold start a row came that had a step, a stage and nothing else."""
    alone(**{**run.how, "model": run.model, "out_dir": tmp_path, "sft_steps": 2, "rl_steps": 0,
             "eval_every": 0})
    rows = metrics(tmp_path)
    assert [row["step"] for row in rows] == [1, 2] and all("loss" in row for row in rows)


def test_a_damaged_or_lost_checkpoint_ends_the_run(copied, run, monkeypatch):
    """A link that led nowhere began anew in silence, and wrote over the older checkpoint; half a
    file was a traceback."""
    before, how = fingerprint(copied), flags(**{**run.how, "out_dir": copied, "rl_steps": 8})
    path = os.path.join(copied, "model", "training_state.pt")
    os.truncate(path, os.path.getsize(path) // 2)
    line = script(monkeypatch, *how)
    assert line.startswith(f"train.py: {copied}/ckpt-{LAST}/training_state.pt: damaged")
    assert "\n" not in line
    shutil.rmtree(os.path.join(copied, f"ckpt-{LAST}"))
    line = script(monkeypatch, *how)
    assert f"{copied}/model leads to a checkpoint that is gone" in line and "\n" not in line
    kept = {name: x for name, x in before.items() if not name.startswith(f"ckpt-{LAST}")}
    assert fingerprint(copied) == kept


def damaged_states(good):
    """{what is wrong: what training_state.pt holds}"""
    without = {f"no {key}": {k: x for k, x in good.items() if k != key}
               for key in good.keys() - {"copies", "stage"}}
    return without | {
        "a list": [1], "a tensor": torch.zeros(2), "config a list": good | {"config": [1]},
        "a step in words": good | {"step": "six"}, "a step below 0": good | {"step": -6},
        "a step that is true": good | {"step": True},
        "half of done": good | {"done": {"rl": 1}},
        "done in words": good | {"done": {**good["done"], "rl": "six"}},
        "an empty optimizer": good | {"optimizer": {}}}


@pytest.mark.method
def test_a_training_state_of_other_content_is_refused(tmp_path):
    """A list, a dict without one of its keys, or a text file in the place of training_state.pt were
    tracebacks of six kinds; a file that is missing did not say what to do; a step of "six" was
    taken."""
    path = tmp_path / "training_state.pt"
    good = {"step": 6, "previous": 3, "lines": 6, "done": {"align": 0, "sft": 3, "rl": 3},
            "config": asdict(train.Config()), "stage": "rl", "copies": [], "curriculum": {},
            "optimizer": {"state": {}, "param_groups": []}}

    def refuses(mmap=False):
        with pytest.raises(ValueError) as e:
            resume.read_state(str(tmp_path), train.Config(), mmap)
        assert str(e.value).startswith(f"{path}: ") and "\n" not in str(e.value)
        assert "Point the link out/model to an older ckpt-N" in str(e.value)

    for mmap in (False, True):
        refuses(mmap)                                      # no file
        for content in damaged_states(good).values():
            torch.save(content, path)
            refuses(mmap)
        torch.save(good, path)
        assert resume.read_state(str(tmp_path), train.Config(), mmap) == good
        whole = path.read_bytes()
        for content in (b"", b"hello world\n", b"(((((", b"\x80\x02.", b"]", b"\xff", whole[:300]):
            path.write_bytes(content)
            refuses(mmap)
        path.unlink()
    path.mkdir()
    refuses()


@pytest.mark.method
def test_an_older_training_state_is_read(tmp_path):
    """It has no `copies`, and in its configuration no `eval_data`: a KeyError."""
    config = asdict(train.Config())
    del config["eval_data"]
    torch.save({"step": 3, "previous": 0, "lines": 3, "done": {"align": 0, "sft": 3, "rl": 0},
                "config": config, "curriculum": {}, "optimizer": {"state": {}, "param_groups": []}},
               tmp_path / "training_state.pt")
    assert resume.read_state(str(tmp_path), train.Config(), False)["copies"] == []


def test_metrics_that_lack_a_line_of_the_checkpoint_end_the_run(copied, run, monkeypatch):
    """A metrics.jsonl cut to its first lines was taken as it was, and steps were missing; one cut
    in the middle, or gone, gave an error that named no file or no remedy."""
    path = os.path.join(copied, "metrics.jsonl")
    with open(path, "rb") as f:
        lines = f.read().splitlines(keepends=True)
    how = flags(**{**run.how, "out_dir": copied, "rl_steps": 8})

    def says(*words):
        line = script(monkeypatch, *how)
        assert line.startswith(f"train.py: {path}: not whole") and "\n" not in line
        assert f"counted {len(lines)} lines" in line and f"{copied}/model to an older" in line
        assert all(word in line for word in words), line

    for content, words in ((lines[:3], "it has 3"), ([*lines[:-1], lines[-1][:40]], "it has"),
                           ([lines[0], b"\xff\xfe\n", *lines[2:]], "line 2: no JSON"),
                           ([*lines[:4], b"[]\n", *lines[5:]], "line 5: no JSON object"),
                           ([], "it has 0")):
        with open(path, "wb") as f:
            f.writelines(content)
        says(words)
    os.remove(path)
    says("No such file")


def test_what_comes_after_the_checkpoints_lines_may_be_anything(tmp_path):
    """It is cut off: a killed run may have left half a line, or a full disk other bytes."""
    path = str(tmp_path / "metrics.jsonl")
    line = '{"step": 1, "stage": "sft"}\n'
    with open(path, "wb") as f:
        f.write(line.encode() * 2 + b'{"step": 3, "st\xff\xfe')
    assert Log(path, ALONE, 2).lines == [line] * 2
    with open(path) as f:
        assert f.read() == line * 2


@pytest.mark.method
def test_a_copy_that_followed_links_is_refused_at_once(tmp_path):
    """`cp -rL` makes `model` a folder: the run trained, and its first checkpoint failed with
    "make room"."""
    for make in (os.mkdir, lambda path: open(path, "w").close()):
        make(tmp_path / "model")
        with pytest.raises(ValueError, match="model is no link to a ckpt-N.*choose another"):
            resume.find(str(tmp_path), ALONE)
        shutil.move(tmp_path / "model", tmp_path / f"moved-{make.__name__}")
    assert resume.find(str(tmp_path), ALONE) is None


@pytest.mark.method
@pytest.mark.parametrize("name, make", [
    ("ckpt-7", open), ("ckpt-7.tmp", open), ("ckpt-trial-x1.tmp", open), ("curves.png", os.mkdir),
    ("watch.html", os.mkdir), ("rollouts.jsonl", os.mkdir), ("metrics.jsonl", os.mkdir)])
def test_a_name_that_is_taken_is_found_before_training(tmp_path, name, make):
    """A file in the place of a checkpoint's folder, and a folder in that of a file, were found by
    the first save, or as `[Errno 21] Is a directory`."""
    path = tmp_path / name
    if make is open:
        path.touch()
    else:
        path.mkdir()
    with pytest.raises(ValueError, match=f"{name} is .*: move it away, or choose another"):
        resume.find(str(tmp_path), ALONE)
    assert path.exists()


@pytest.mark.method
def test_an_out_dir_that_cannot_be_made_is_named(tmp_path):
    """`--out_dir=` said `[Errno 2] No such file or directory: ''`."""
    (tmp_path / "file").touch()
    for out_dir in ("", str(tmp_path / "file"), str(tmp_path / "file" / "out")):
        with pytest.raises(ValueError, match=f"^--out_dir={out_dir}: this folder cannot be made"):
            make_folder(out_dir)


@pytest.mark.method
def test_a_folder_without_a_checkpoint_begins_a_run(tmp_path):
    assert resume.newest(tmp_path) is None
    assert resume.find(str(tmp_path), ALONE) is None
