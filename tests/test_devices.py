"""python -m pytest tests/test_devices.py -q

No tensor of the CPU meets one of the GPU: the code runs on the pretended GPU of pretend_gpu.py,
which refuses what CUDA refuses, and the results are the CPU's. Prompts lie on the CPU, as in a run.
And the list in docs/gpu.md of what only CUDA takes is the code's.
"""
import ast
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from pretend_gpu import pretended_gpu
from runs import SHORT, alone, close, group_of, learn, metrics, run_of, write
from runs import question as make_question
from small import film, shake
from torch.testing._internal.distributed.fake_pg import FakeStore

import bench
import data
import encode
import model as vlm
import rollout
import train
from flow import Ranks
from plumbing import stages
from plumbing.batches import make_batch, weightless_group
from plumbing.optimizer import make_optimizer, update
from plumbing.ranks import send_groups

ROOT = Path(bench.__file__).parent
ON_CPU, ON_GPU = Ranks(), Ranks(device="meta")
SLOTS = (2, 5)
KEYS = [[(slot, n) for n in range(3)] for slot in SLOTS]
HOW = {"think_budget": 6, "answer_budget": 4}


def tiny(ranks, dtype=torch.float32):
    model, tokenizer = vlm.load("tiny", "cpu", dtype)
    shake(model).model.visual.requires_grad_(False)
    return model.to(ranks.device), tokenizer


def groups(model, tokenizer):
    return [group_of(slot, model, tokenizer) for slot in SLOTS]


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def equal(a, b):
    """But for rounding: the GPU's attention is computed in another way."""
    a, b = a.detach().cpu().float(), b.detach().cpu().float()
    return a.shape == b.shape and float((a - b).norm()) <= 1e-4 * float(a.norm())


# --------------------------------------------------------------------------------------------------
# the pretended GPU itself

def fill_rows(x, y, rows):
    y[rows] = x[:2]


REFUSED = {
    "add": lambda x, y, rows: x + y, "add in place": lambda x, y, rows: y.add_(x),
    "matmul": lambda x, y, rows: x @ y, "cat": lambda x, y, rows: torch.cat([x, y]),
    "where": lambda x, y, rows: torch.where(x > 0, y, y),
    "masked_fill": lambda x, y, rows: y.masked_fill(x > 0, 0.0),
    "gather": lambda x, y, rows: y.gather(1, rows[None]),
    "embedding": lambda x, y, rows: F.embedding(rows, y),
    "linear": lambda x, y, rows: F.linear(x, y), "fill rows": fill_rows,
    "rows of the CPU by indices of the GPU": lambda x, y, rows: x[rows.to(y.device)]}


@pytest.mark.parametrize("name", REFUSED)
def test_the_pretended_gpu_refuses_what_cuda_refuses(name):
    with pretended_gpu() as gpu:
        x, rows = torch.ones(3, 3), torch.tensor([0, 2])
        with pytest.raises(RuntimeError, match="of tensors on two devices"):
            REFUSED[name](x, x.to(gpu), rows)


def test_the_pretended_gpu_computes_what_cuda_computes():
    """Single numbers and indices may lie on the CPU, copies go both ways."""
    x = torch.arange(9.0).view(3, 3)
    i = torch.tensor([0, 2])
    with pretended_gpu() as gpu:
        y = torch.tensor(x.tolist(), device=gpu)
        assert y.device == gpu and y.tolist() == x.tolist()
        for result in (y * torch.tensor(2.0) - y, y[i, :][[0, 0, 1]][[0, 0, 2]][[0, 2]], y[x > 2]):
            assert result.device == gpu
        assert torch.equal(y[i].cpu(), x[i]) and torch.equal(y[x > 2].cpu(), x[x > 2])
        y[:, 1] = 7.0
        y[i, 0] = torch.tensor([5.0, 6.0], device=gpu)
        y[1].copy_(torch.full((3,), 4.0))
        assert y.tolist() == [[5.0, 7.0, 2.0], [4.0, 4.0, 4.0], [6.0, 7.0, 8.0]]
        assert y[[0, 2], 1:].tolist() == [[7.0, 2.0], [7.0, 8.0]]
        y[[0, 2], [1, 2]] = 0.0
        assert y.tolist() == [[5.0, 0.0, 2.0], [4.0, 4.0, 4.0], [6.0, 7.0, 0.0]]
        assert float(y.sum()) == 32.0 and bool((y > 3).any())
        w = torch.ones(3, 3, device=gpu, requires_grad=True)
        (w @ y).square().sum().backward()
        assert w.grad.device == gpu
    v = torch.ones(3, 3, requires_grad=True)
    (v @ y.values_on_cpu).square().sum().backward()
    assert torch.equal(w.grad.values_on_cpu, v.grad)


# --------------------------------------------------------------------------------------------------
# piece by piece, against the CPU

def test_logprobs_and_their_gradients():
    outcomes = []
    for ranks in (ON_CPU, ON_GPU):
        with pretended_gpu():
            model, tokenizer = tiny(ranks)
            run = run_of(model, tokenizer, ranks)
            drawn = groups(model, tokenizer)
            tokens = [[x.tokens for x in group.completions] for group in drawn]
            prompts = [group.prompt for group in drawn]
            logprobs, entropy = vlm.logprobs(model, prompts, tokens, run.banned)
            assert {logprobs.device, entropy.device} == {torch.device(ranks.device)}
            (logprobs * logprobs).sum().backward()
            gradients = {name: p.grad for name, p in trained(model).items()}
            outcomes.append({"logprobs": logprobs, "entropy": entropy, **gradients})
    for name, of_cpu in outcomes[0].items():
        assert equal(of_cpu, outcomes[1][name]), name


def sampled_alike(few=False, **how):
    """The completions of both devices are the same, and lie on the CPU, from where they are sent
    and stored. -> those of the CPU"""
    outcomes = []
    for ranks in (ON_CPU, ON_GPU):
        with pretended_gpu():
            model, tokenizer = tiny(ranks)
            prompts = [group.prompt for group in groups(model, tokenizer)]
            banned = few_ids(model, tokenizer) if few else None
            sampled = rollout.rollout(model, tokenizer, prompts, KEYS, ranks, banned=banned,
                                      **{**HOW, **how})
            outcomes.append(sum(sampled, []))
    for of_cpu, of_gpu in zip(*outcomes, strict=True):
        for name in ("tokens", "sampled", "logprobs"):
            assert getattr(of_gpu, name).device == torch.device("cpu")
            assert equal(getattr(of_cpu, name), getattr(of_gpu, name)), name
        assert of_cpu.text == of_gpu.text
    return outcomes[0]


def few_ids(model, tokenizer):
    """All ids are banned but a stop id and nine others."""
    banned = torch.ones_like(vlm.banned_ids(model, tokenizer))
    banned[[*range(300, 309), vlm.stop_ids(model, tokenizer)[0]]] = False
    return banned


def same_prompt(prompt):
    """These prompts hold their vision tokens: nothing is fetched or kept."""
    return prompt


@pytest.mark.parametrize("how", [{}, {"greedy": True}, {"think_least": 3}, {"forced": None}])
def test_prefill_and_decoding(how):
    sampled_alike(**how)


def test_decoding_of_rows_that_end_at_different_steps():
    lengths = [len(completion.tokens) for completion in sampled_alike(
        few=True, think_budget=9, answer_budget=3)]
    assert len(set(lengths)) > 2, lengths


def test_a_videos_vision_tokens(tmp_path):
    """They are made on the GPU, as are the patches: only the frames' bytes go there. The tokens
    wait on the CPU, also on disk."""
    model, _ = tiny(ON_CPU)
    right, *_ = vlm.encode_video(model, lambda: film(9), ON_CPU)
    right_patches, _ = vlm.patchify(film(9).read(0, 9), model.pixels)
    with pretended_gpu() as gpu:
        model, tokenizer = tiny(ON_GPU)
        *_, read = vlm.VideoPatches(lambda: film(9), model.pixels, ON_GPU.device).open()
        assert read(0, 5).device == gpu and equal(read(0, 5), right_patches)
        vision, *_ = vlm.encode_video(model, lambda: film(9), ON_GPU)
        assert vision.device == gpu and equal(vision, right)
        path = write(tmp_path / "q.jsonl", *map(make_question, range(2)))
        run = run_of(model, tokenizer, ON_GPU, data=path, cache_dir=str(tmp_path))
        run.cache = encode.Cache(folder=str(tmp_path))
        prompts, dropped = data.make_prompts(run, data.load(path), room=8)
        assert len(prompts) == 2 and not dropped
        for prompt in data.fetch(run, [prompt for _, prompt in prompts]):
            on = {x.device.type for x in (prompt.ids, prompt.positions, prompt.vision)}
            assert on == {"cpu"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_update(dtype):
    """Twice, so that the moments are there: of the weights themselves, and of float32 copies."""
    outcomes = []
    for ranks in (ON_CPU, ON_GPU):
        with pretended_gpu():
            model, tokenizer = tiny(ranks, dtype)
            optimizer = make_optimizer(model, 1e-3)
            noise = torch.Generator().manual_seed(3)
            for _ in range(2):
                for p in list(trained(model).values())[1:]:        # the first one has none
                    p.grad = torch.randn(p.shape, generator=noise).to(ranks.device, dtype)
                norm = update(model, optimizer, 1e-3, ranks)
            outcomes.append({"norm": torch.tensor(norm), **trained(model)})
    for name, of_cpu in outcomes[0].items():
        assert equal(of_cpu, outcomes[1][name]), name


def test_the_micro_batches_of_an_update():
    """Log-probs, objective, backward and what is measured: part 6 of the RL loop. A batch without
    weight too, which FSDP's ranks run where others have more."""
    outcomes = []
    for ranks in (ON_CPU, ON_GPU):
        with pretended_gpu():
            model, tokenizer = tiny(ranks)
            run = run_of(model, tokenizer, ranks, max_tokens=400)
            mine = send_groups(groups(model, tokenizer), {2: 0, 5: 0}, ranks, list, same_prompt)
            sums = learn(run, mine, 8)
            batch = make_batch([weightless_group(run)], ranks.device)
            logprobs, _ = vlm.logprobs(model, batch.prompts, batch.tokens, run.banned)
            (logprobs * batch.advantages * batch.sampled).sum().backward()
            gradients = {name: p.grad for name, p in trained(model).items()}
            outcomes.append({**gradients, **{name: torch.tensor(x) for name, x in sums.items()}})
    for name, of_cpu in outcomes[0].items():
        assert equal(of_cpu, outcomes[1][name]), name


@pytest.mark.parametrize("variant", ["naive", "cached", "shared"])
def test_a_step_of_the_bench(variant):
    row = bench.Options(frames=4, size=56, group=2, completion=4, variant=variant, sp=1,
                        dtype="float32", cache="cold", rollout="torch", checkpointing=1)
    steps = []
    for ranks in (ON_CPU, ON_GPU):
        with pretended_gpu():
            steps.append(bench.Workload(row, ranks).step(0, bench.Clock()))
    assert steps[1] == pytest.approx(steps[0], rel=1e-3, abs=1e-4)


# --------------------------------------------------------------------------------------------------
# whole runs

def run_on_gpu(monkeypatch, **how):
    """A run on the pretended GPU, which has no storage to save a checkpoint from."""
    monkeypatch.setattr(train, "start", lambda *arguments: ON_GPU)
    monkeypatch.setattr(stages.Progress, "save", lambda *arguments: None)
    with pretended_gpu():
        alone(**how)
    return metrics(how["out_dir"])


def test_a_run_from_a_checkpoint(run, short, tmp_path, monkeypatch):
    """Cold start, RL with groups that have signal, evaluation: the metrics are the CPU's."""
    rows = run_on_gpu(monkeypatch, **{**run.how, **SHORT, "model": run.model,
                                      "out_dir": str(tmp_path / "out")})
    close(rows, short, 1e-3)


def test_a_run_from_nothing(files, tmp_path, monkeypatch):
    """The tower trains, in the align stage and in the cold start."""
    how = {"data": files.data, "eval_data": files.eval_data, "align_steps": 2, "sft_steps": 2,
           "sft_batch": 4, "rl_steps": 0}
    rows = run_on_gpu(monkeypatch, **how, out_dir=str(tmp_path / "gpu"))
    monkeypatch.undo()
    alone(**how, out_dir=str(tmp_path / "cpu"))
    close(rows, metrics(str(tmp_path / "cpu")), 1e-3)


# --------------------------------------------------------------------------------------------------
# several ranks: their messages are torch's fake ones, which carry nothing

@pytest.fixture
def four_ranks():
    """-> `Ranks` of the first of sp 2 x dp 2"""
    dist.init_process_group("cpu:fake,meta:fake", store=FakeStore(), rank=0, world_size=4)
    yield Ranks(world=4, sp=2, dp=2, device="meta", group=dist.new_group([0, 1]))
    dist.destroy_process_group()


@pytest.mark.parametrize("stage2", [False, True])
def test_messages_between_ranks(four_ranks, stage2):
    """Frames and sequences shared out, a group sent away, gradients summed."""
    with pretended_gpu() as gpu:
        model, tokenizer = tiny(four_ranks)
        run = run_of(model, tokenizer, four_ranks, stage2=stage2)
        vision, *_ = vlm.encode_video(model, lambda: film(9), four_ranks)
        assert vision.device == gpu
        drawn = groups(model, tokenizer)
        prompts = [group.prompt for group in drawn]
        sharers = four_ranks if stage2 else ON_GPU
        completions = rollout.sample(model, tokenizer, prompts, KEYS, ranks=sharers, **HOW)
        assert len(completions) == 2
        drawn[0].slot = 0
        assert send_groups(drawn[:1], {0: 1}, four_ranks, list, same_prompt) == []
        learn(run, drawn[1:], 4)
        update(model, make_optimizer(model, 1e-3), 1e-3, four_ranks)


# --------------------------------------------------------------------------------------------------
# what only CUDA takes

def only_on_cuda(path):
    """The functions of a file, "Class.method", that ask for CUDA or use it; "" is the module."""
    found = set()

    def visit(node, function):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            return                                         # a docstring
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            function = f"{function}.{node.name}".lstrip(".")
        words = [getattr(node, name, None) for name in ("id", "attr", "arg", "value")]
        if any(isinstance(word, str) and re.search("cuda|nccl|accelerator", word)
               for word in words):
            found.add(function)
        if isinstance(node, ast.Compare):
            compared = [node.left, *node.comparators]
            if any(isinstance(x, ast.Constant) and x.value == "cpu" for x in compared):
                found.add(function)
        for child in ast.iter_child_nodes(node):
            visit(child, function)

    visit(ast.parse(path.read_text()), "")
    return found


def test_all_that_only_cuda_takes_is_listed_in_the_docs():
    """A new branch needs a row in the table of docs/gpu.md, which says what has run it so far."""
    in_code = set()
    for path in [*ROOT.glob("*.py"), *ROOT.glob("plumbing/*.py")]:
        name = path.relative_to(ROOT).as_posix()
        in_code |= {(name, function) for function in only_on_cuda(path)}
    page = (ROOT / "docs" / "gpu.md").read_text()
    rows = re.findall(r"^\| `([\w/]+\.py)`(?:, `([\w.]+)`)? \|", page, re.M)
    assert len(rows) == len(set(rows))
    assert set(rows) - in_code == set(), "listed, but not in the code"
    assert in_code - set(rows) == set(), "not listed"


@pytest.mark.parametrize("code, function", [
    ("def f():\n    if torch.cuda.is_available():\n        g()", "f"),
    ("class A:\n    def f(self):\n        self.cuda = 1", "A.f"),
    ("def f(ranks):\n    return 1 if 'cpu' != ranks.device else 2", "f"),
    ("fused = weights[0].is_cuda", ""), ("backend = 'nccl'", ""),
    ("'cuda'\ndef f(device='cpu'):\n    return x.to('cpu')  # cuda", None)])
def test_what_asks_for_cuda_is_found(tmp_path, code, function):
    (tmp_path / "a.py").write_text(code)
    assert only_on_cuda(tmp_path / "a.py") == (set() if function is None else {function})
