"""python -m pytest tests/test_encode.py -q

The slow paths are transformers' own vision tower, and one process that encodes everything. The
several processes are real ones that talk over gloo: see worlds.py.
"""
import copy
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import worlds
from small import film, shaken_tiny
from worlds import World

import encode
import model as vlm
import rollout
from flow import Ranks, VideoError
from plumbing import tower_attention
from plumbing.sharding import recompute_layers
from plumbing.tiny import build_tiny

pytestmark = pytest.mark.method

ALONE = Ranks()
WIDTH = 3 * 2 * 14 * 14         # values of one patch


def tiny_model():
    return shaken_tiny()[0]


def noise_patches(t, h, w, seed=0):
    """[t, h*w, WIDTH] of noise; the first value of a patch is the number of its temporal patch, by
    which it can be told."""
    x = torch.randn(t, h * w, WIDTH, generator=torch.Generator().manual_seed(seed))
    x[..., 0] = torch.arange(t)[:, None]
    return x


def opener(x, h, w, reads=None, fail=None):
    """-> open_patches for `encode.encode` that notes what is read; fail() may raise."""
    def read(lo, hi):
        if reads is not None:
            reads.append((lo, hi))
        if fail:
            fail()
        return x[lo:hi].flatten(0, 1)
    return lambda: ((len(x), h, w), 2, read)


class Watch:
    """What goes through the tower: .numbers holds the number of each temporal patch, .calls how
    many there were in each call."""

    def __init__(self, tower):
        self.numbers = []
        self.calls = []
        self.hook = tower.register_forward_pre_hook(self.note, with_kwargs=True)

    def note(self, tower, args, kwargs):
        grids = kwargs["grid_thw"].tolist()
        assert all(t == 1 and (h, w) == tuple(grids[0][1:]) for t, h, w in grids)
        self.calls.append(len(grids))
        patches = args[0].view(len(grids), -1, args[0].shape[1])
        self.numbers += patches[:, :, 0].round().long().unique(dim=1).flatten().tolist()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.hook.remove()


# (t, h, w) in patches
SHAPES = [(1, 4, 6), (2, 4, 6), (3, 10, 6), (5, 2, 2), (7, 4, 6), (8, 4, 4), (10, 4, 6)]


def some_film(frames, reads=None):
    """A video of its own for each number of frames."""
    return film(frames, 60, 90, seconds=0.5 * frames, seed=frames, reads=reads)


# --------------------------------------------------------------------------------------------------
# what each rank does in the real runs. A case: (model, ranks) -> anything, saved under its name

def case_shapes(model, ranks):
    """Every shape, with two group sizes."""
    results = {}
    for t, h, w in SHAPES:
        for group in (2, 64):
            reads = []
            open_patches = opener(noise_patches(t, h, w), h, w, reads)
            with Watch(model.model.visual) as watch:
                vision, grid = encode.encode(model.model.visual, open_patches, ranks, group)
            results[t, h, w, group] = dict(vision=vision, grid=grid, reads=reads,
                                           numbers=watch.numbers, grad=vision.requires_grad)
    return results


def case_films(model, ranks):
    results = {}
    for frames in (1, 2, 7, 13):
        reads = []
        video = some_film(frames, reads)
        vision, grid, seconds, _ = vlm.encode_video(model, lambda video=video: video, ranks)
        results[frames] = dict(vision=vision, grid=grid, seconds=seconds, reads=reads)
    return results


def try_to_encode(model, open_patches, ranks):
    """-> the kind of the error and its text, or None"""
    try:
        encode.encode(model.model.visual, open_patches, ranks)
    except Exception as e:
        return type(e).__name__, str(e)
    return None


def case_errors(model, ranks):
    """One rank fails, each in turn and in each way; after every failure the next video is encoded
    as if there had been none."""
    x = noise_patches(5, 4, 6)
    results = {}
    for bad in range(ranks.sp):
        for kind in (VideoError, OSError):
            def fail(bad=bad, kind=kind):
                if ranks.sp_rank == bad:
                    raise kind(f"film.mp4: broken on rank {bad}")
            raised = try_to_encode(model, opener(x, 4, 6, fail=fail), ranks)
            vision, _ = encode.encode(model.model.visual, opener(x, 4, 6), ranks)
            results[bad, kind.__name__] = raised, vision

    def open_or_fail():            # before anything is known of the video, on all but one rank
        if ranks.sp_rank > 0:
            raise VideoError(f"no such file on rank {ranks.sp_rank}")
        return opener(x, 4, 6)()
    results["open"] = try_to_encode(model, open_or_fail, ranks)
    return results


PACKS = [  # for each prompt: (temporal patches of its video, lengths of its completions)
    [(12, [5, 1, 9, 30])], [(13, [6, 1, 9, 30])], [(14, [7, 1, 9, 30])], [(15, [8, 1, 9, 30])],
    [(7, [3, 4]), (11, [1, 1])], [(1, [1])], [(1, [2])],
    [(8, [2, 2, 3]), (1, [17, 6, 5]), (3, [1, 1, 1])]]     # totals of every remainder mod 4


def prompts_of(model, tokenizer, pack, generator):
    """A prompt for each video of a pack, no two of one length."""
    prompts = []
    for i, (t, _) in enumerate(pack):
        vision = torch.randn(t, 128, generator=generator)
        prompts.append(vlm.make_prompt(model, tokenizer, "How many" + " red" * i, vision,
                                       (t, 2, 2), 0.5))
    return prompts


def packed(model, pack, ranks=ALONE):
    """-> log-probs, entropies, and the gradients that this rank has of a weighted sum of the
    log-probs."""
    g = torch.Generator().manual_seed(3)
    tokenizer = build_tiny()[1]
    prompts = prompts_of(model, tokenizer, pack, g)
    completions = []
    for _, lengths in pack:
        completions.append([torch.randint(0, 500, (n,), generator=g) for n in lengths])
    model.zero_grad()
    banned = vlm.banned_ids(model, tokenizer)
    logprobs, entropy = vlm.logprobs(model, prompts, completions, banned, ranks=ranks)
    (logprobs * torch.randn(logprobs.shape, generator=g)).sum().backward()
    gradients = {}
    for name, p in model.model.language_model.named_parameters():
        gradients[name] = torch.zeros_like(p) if p.grad is None else p.grad.clone()
    return logprobs.detach(), entropy, gradients


def case_stage2(model, ranks):
    """Every pack with its sequence sharded; how many positions went through the first decoder
    layer here, each time."""
    results = []
    for pack in PACKS:
        seen, hook = positions_seen(model)
        logprobs, entropy, gradients = packed(model, pack, ranks)
        hook.remove()
        for x in gradients.values():
            dist.all_reduce(x)
        results.append((logprobs, entropy, gradients, seen))
    return results


def case_recomputed(model, ranks):
    """The same with activation checkpointing: the all-to-alls are run again too."""
    again = copy.deepcopy(model)
    recompute_layers(again)
    return case_stage2(again, ranks)


def positions_seen(model):
    """-> (a list that will hold how many positions each forward has on this rank, the hook that
    must be removed)"""
    seen = []
    first = model.model.language_model.layers[0]
    return seen, first.register_forward_pre_hook(lambda layer, args: seen.append(args[0].shape[1]))


def prefilled(model, ranks, stage2):
    """-> for each pack the completions of all its prompts, and how many positions each forward had
    on this rank."""
    tokenizer = build_tiny()[1]
    results = []
    for pack in PACKS:
        prompts = prompts_of(model, tokenizer, pack, torch.Generator().manual_seed(5))
        keys = []
        for p in range(len(prompts)):
            keys.append([(7, p, n) for n in range(4)])
        seen, hook = positions_seen(model)
        groups = rollout.rollout(model, tokenizer, prompts, keys, ranks, stage2=stage2,
                                 think_budget=5, answer_budget=3)
        hook.remove()
        results.append(([(x.tokens.tolist(), x.logprobs) for g in groups for x in g], seen))
    return results


def case_prefill(model, ranks):
    return prefilled(model, ranks, True)


def case_own_video(model, ranks):
    """Each team encodes a film of its own, of its own length, at the same time."""
    t = 5 + 2 * ranks.dp_rank
    reads = []
    open_patches = opener(noise_patches(t, 4, 6, seed=ranks.dp_rank), 4, 6, reads)
    vision, grid = encode.encode(model.model.visual, open_patches, ranks)
    return dict(vision=vision, grid=grid, reads=reads)


CASES = [case_shapes, case_films, case_errors, case_stage2, case_recomputed, case_prefill]
WORLDS = {
    "four": World(size=4, local=4, sp=0, cases=CASES),
    "two": World(size=2, local=2, sp=2, cases=CASES),
    "two machines": World(size=4, local=2, sp=0, cases=[case_own_video]),
    "sp off": World(size=2, local=2, sp=1, cases=[case_own_video]),
}


@pytest.fixture(scope="module")
def brought(tmp_path_factory):
    return worlds.start(WORLDS, __file__, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def tower():
    return tiny_model().model.visual


@pytest.fixture(scope="module")
def stock(tower):
    """The same weights, with transformers' own attention, which is called once a window."""
    other = build_tiny()[0].eval().model.visual
    other.load_state_dict(tower.state_dict())
    assert other.config._attn_implementation == "sdpa"
    assert tower.config._attn_implementation == "frames_flash"
    return other


# --------------------------------------------------------------------------------------------------
# attention inside frames and windows

GRIDS = {"one window": [(1, 2, 2)], "whole windows": [(3, 8, 8)],
         "ragged windows, 140 x 84 pixels": [(3, 10, 6)], "ragged both ways": [(2, 18, 14)],
         "a wide frame": [(4, 2, 24)], "two videos at once": [(2, 10, 6), (3, 4, 8)]}


@pytest.mark.parametrize("grids", GRIDS.values(), ids=GRIDS)
def test_tower_equals_transformers_in_value_and_gradient(tower, stock, grids):
    """All windows of one length in one call = one call a window, for the frames' full attention as
    well."""
    n, g = sum(t * h * w for t, h, w in grids), torch.Generator().manual_seed(1)
    x, weight = torch.randn(n, WIDTH, generator=g), torch.randn(n // 4, 128, generator=g)

    def run(model):
        model.zero_grad()
        pixels = x.clone().requires_grad_()
        out = model(pixels, grid_thw=torch.tensor(grids)).pooler_output
        (out * weight).sum().backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        return out.detach(), gradients | {"pixels": pixels.grad}

    (mine, g1), (right, g2) = run(tower), run(stock)
    assert torch.allclose(mine, right, atol=1e-5, rtol=1e-5)
    assert set(g1) == set(g2)
    size = sum(g.norm() ** 2 for g in g2.values()) ** 0.5
    for name in g2:                # a key's bias has no gradient but rounding: softmax cancels it
        assert (g1[name] - g2[name]).norm() <= 1e-4 * g2[name].norm() + 1e-7 * size, name
    tower.zero_grad()


def test_attention_of_segments_equals_a_loop():
    """Segments of several lengths, out of order, by the definition; the scale is the one that is
    handed in."""
    lengths, g = [3, 1, 5, 3, 5, 2, 1], torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, sum(lengths), 8, generator=g) for _ in range(3))
    ends = torch.tensor([0] + lengths).cumsum(0).int()
    out, _ = tower_attention.frames_attention(None, q, k, v, None, scaling=0.7, cu_seq_lens_q=ends)
    for lo, hi in zip(ends[:-1], ends[1:]):
        for head in range(2):
            p = (q[0, head, lo:hi] @ k[0, head, lo:hi].T * 0.7).softmax(-1)
            assert torch.allclose(out[0, lo:hi, head], p @ v[0, head, lo:hi], atol=1e-5)


def test_calls_of_attention_do_not_grow_with_the_video(tower, monkeypatch):
    """What the function is for: as many calls for thirty frames as for two, one for each layer and
    distinct length."""
    calls, real = [], F.scaled_dot_product_attention

    def counted(*args, **kwargs):
        calls.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    counts = []
    for t in (2, 30):
        calls.clear()
        with torch.no_grad():
            tower(torch.randn(t * 60, WIDTH), grid_thw=torch.tensor([[t, 10, 6]]))
        counts.append(len(calls))
    # windows of 4 x 3 and 1 x 3 tokens in the first layer, whole frames in the second
    assert counts == [3, 3]


def test_frames_do_not_look_at_one_another(tower):
    """Why shards and groups change nothing: another third frame leaves all others as they were."""
    x = noise_patches(5, 10, 6)
    y = x.clone()
    y[2] = noise_patches(5, 10, 6, seed=1)[2]

    def tokens(v):
        out = tower(v.flatten(0, 1), grid_thw=torch.tensor([[5, 10, 6]])).pooler_output
        return out.view(5, 15, 128)

    with torch.no_grad():
        a, b = tokens(x), tokens(y)
    assert torch.equal(a[[0, 1, 3, 4]], b[[0, 1, 3, 4]]) and not torch.isclose(a[2], b[2]).all()


# --------------------------------------------------------------------------------------------------
# encode, alone

def whole(tower, t, h, w, seed=0):
    """All at once, nothing of ours but the attention."""
    patches = noise_patches(t, h, w, seed).flatten(0, 1)
    with torch.no_grad():
        return tower(patches, grid_thw=torch.tensor([[t, h, w]])).pooler_output


@pytest.mark.parametrize("t, h, w", SHAPES)
@pytest.mark.parametrize("group", [1, 3, 64])
def test_group_size_changes_nothing(tower, group, t, h, w):
    """The same vision tokens; never more than a group is read or encoded at once, and each temporal
    patch exactly once."""
    reads = []
    with Watch(tower) as watch:
        vision, grid = encode.encode(tower, opener(noise_patches(t, h, w), h, w, reads), ALONE,
                                     group)
    assert grid == (t, h, w) and vision.shape == (t * h * w // 4, 128) and not vision.requires_grad
    assert torch.allclose(vision, whole(tower, t, h, w), atol=1e-5, rtol=0)
    assert watch.numbers == list(range(t))
    assert max(watch.calls) <= group and len(watch.calls) == -(-t // group)
    assert [i for lo, hi in reads for i in range(lo, hi)] == list(range(t))
    assert max(hi - lo for lo, hi in reads) <= group


@pytest.mark.parametrize("t, h, w", SHAPES)
def test_a_grid_for_each_temporal_patch_changes_nothing(tower, t, h, w):
    """`encode` always hands them over so, since GLM-4.1V's tower takes nothing else. Qwen2.5-VL's
    gives the same bits as for one grid."""
    vision, _ = encode.encode(tower, opener(noise_patches(t, h, w), h, w), ALONE)
    assert torch.equal(vision, whole(tower, t, h, w))


def test_vision_tokens_have_the_towers_dtype():
    half = tiny_model().model.visual.to(torch.bfloat16)
    vision, _ = encode.encode(half, opener(noise_patches(2, 4, 6), 4, 6), ALONE)
    assert vision.dtype == torch.bfloat16 and torch.isfinite(vision).all()


def test_a_video_is_patched_frame_by_frame_as_a_whole(tower):
    """`model.encode_video` = patchify of all frames, then the tower; 13 frames, the last temporal
    patch half full."""
    model = tiny_model()
    for frames in (1, 2, 13):
        video = some_film(frames)
        vision, grid, seconds, n = vlm.encode_video(model, lambda video=video: video, ALONE)
        patches, right = vlm.patchify(video.read(0, frames), model.pixels)
        assert grid == right and seconds == 0.5 * frames and n == frames
        with torch.no_grad():
            tokens = tower(patches, grid_thw=torch.tensor([right])).pooler_output
        assert torch.allclose(vision, tokens, atol=1e-5, rtol=0)


# --------------------------------------------------------------------------------------------------
# encode, on several real ranks

@pytest.mark.parametrize("world", ["two", "four"])
@pytest.mark.parametrize("group", [2, 64])
@pytest.mark.parametrize("t, h, w", SHAPES)
def test_sharded_equals_whole(brought, tower, world, group, t, h, w):
    """Property 1: 7 on 2, 10 on 4, 1 on 4 and others: the same tokens in the same order on every
    rank."""
    right = whole(tower, t, h, w)
    results = [r[t, h, w, group] for r in brought(world, "case_shapes")]
    for r in results:
        assert r["grid"] == (t, h, w) and r["vision"].shape == right.shape and not r["grad"]
        assert torch.allclose(r["vision"], right, atol=1e-5, rtol=0)
        assert torch.equal(r["vision"], results[0]["vision"]), "the very same on all ranks"


@pytest.mark.parametrize("world", ["two", "four"])
def test_each_temporal_patch_is_read_and_encoded_once_over_all_ranks(brought, world):
    """Property 2, counted where it happens: at the reader, and by a hook at the tower's door."""
    results, size = brought(world, "case_shapes"), WORLDS[world].size
    for t, h, w in SHAPES:
        for group in (2, 64):
            ranks = [r[t, h, w, group] for r in results]
            read = [i for r in ranks for lo, hi in r["reads"] for i in range(lo, hi)]
            assert read == list(range(t))
            assert [i for r in ranks for i in r["numbers"]] == list(range(t))
            most = max(len(r["numbers"]) for r in ranks)
            assert most == -(-t // size), "the work is shared out evenly"


def test_equal_shards_are_equal_bit_for_bit(brought, tower):
    """8 temporal patches on 4 ranks = groups of 2 on one: the same calls of the tower, so not even
    rounding differs."""
    alone, _ = encode.encode(tower, opener(noise_patches(8, 4, 4), 4, 4), ALONE, at_once=2)
    assert torch.equal(brought("four", "case_shapes")[0][8, 4, 4, 64]["vision"], alone)


@pytest.mark.parametrize("world", ["two", "four"])
@pytest.mark.parametrize("frames", [1, 2, 7, 13])
def test_sharded_video_equals_whole_and_each_frame_is_read_once(brought, world, frames):
    """Odd frame counts, and fewer frames than ranks: a rank without frames still knows grid and
    seconds."""
    vision, grid, seconds, _ = vlm.encode_video(tiny_model(), lambda: some_film(frames), ALONE)
    results = [r[frames] for r in brought(world, "case_films")]
    for r in results:
        assert r["grid"] == grid and r["seconds"] == seconds == 0.5 * frames
        assert torch.allclose(r["vision"], vision, atol=1e-5, rtol=0)
    assert [i for r in results for lo, hi in r["reads"] for i in range(lo, hi)] == [*range(frames)]


@pytest.mark.parametrize("world", ["two", "four"])
def test_an_error_on_one_rank_is_raised_on_all(brought, tower, world):
    """Nobody is left waiting in the all-gather; all raise the same sentence, and the next video is
    encoded rightly."""
    results, size, right = brought(world, "case_errors"), WORLDS[world].size, whole(tower, 5, 4, 6)
    for bad in range(size):
        for kind in ("VideoError", "OSError"):
            for raised, vision in (r[bad, kind] for r in results):
                assert raised == (kind, f"film.mp4: broken on rank {bad}")
                assert torch.allclose(vision, right, atol=1e-5, rtol=0)
    assert [r["open"] for r in results] == [("VideoError", "no such file on rank 1")] * size


def test_teams_encode_different_videos_at_once(brought, tower):
    """Two machines of two ranks: sp is the ranks of a machine, and no token crosses from one group
    to the other."""
    results = brought("two machines", "case_own_video")
    for rank, r in enumerate(results):
        t = 5 + 2 * (rank // 2)
        assert r["grid"] == (t, 4, 6)
        right = whole(tower, t, 4, 6, seed=rank // 2)
        assert torch.allclose(r["vision"], right, atol=1e-5, rtol=0)
    for dp in (0, 1):
        reads = [span for r in results[2 * dp:2 * dp + 2] for span in r["reads"]]
        assert [i for lo, hi in reads for i in range(lo, hi)] == list(range(5 + 2 * dp))


def test_sp_off_reads_every_frame_on_every_rank(brought, tower):
    for rank, r in enumerate(brought("sp off", "case_own_video")):
        assert r["reads"] == [(0, 5 + 2 * rank)]
        right = whole(tower, 5 + 2 * rank, 4, 6, seed=rank)
        assert torch.allclose(r["vision"], right, atol=1e-5, rtol=0)


# --------------------------------------------------------------------------------------------------
# the cache

class Maker:
    """make() -> (vision of n floats, number of the call)"""

    def __init__(self, n=4):
        self.n, self.calls = n, 0

    def __call__(self):
        self.calls += 1
        return torch.full((self.n, 1), float(self.calls)), self.calls


def test_cache_makes_once_and_returns_the_same_object():
    """Property 3: cached = fresh bit for bit, because it is the very same tensor."""
    cache, make = encode.Cache(), Maker()
    first = cache.get("a", make)
    assert cache.get("a", make) is first and cache.get("a", make)[0] is first[0]
    assert make.calls == 1
    assert cache.get("b", make) is not first and make.calls == 2


def test_cache_drops_the_least_recently_used_at_its_bound():
    """Room for three of 16 bytes. A use, not only the making, counts as recent."""
    cache, make = encode.Cache(most=48), {k: Maker() for k in "abcde"}
    for k in "abc":
        cache.get(k, make[k])
    assert list(cache.kept) == ["a", "b", "c"] and cache.bytes == 48   # at the bound: nothing goes
    cache.get("a", make["a"])                                          # b is now the oldest
    cache.get("d", make["d"])
    assert set(cache.kept) == {"a", "c", "d"} and cache.bytes == 48
    for k in "acd":
        cache.get(k, make[k])
    assert [make[k].calls for k in "abcd"] == [1, 1, 1, 1]
    cache.get("b", make["b"])                                          # made again, a goes
    assert make["b"].calls == 2 and set(cache.kept) == {"c", "d", "b"}
    cache.get("e", Maker(12))                                          # as large as all together
    assert set(cache.kept) == {"e"} and cache.bytes == 48


def test_cache_never_exceeds_its_bound_but_for_a_single_video():
    """Random sizes and uses: the bytes it counts are the bytes it holds, and a video larger than
    the bound is still given."""
    draw, cache = np.random.default_rng(0), encode.Cache(most=100)
    for _ in range(300):
        n = int(draw.integers(1, 40))
        key = (n, int(draw.integers(3)))
        vision, _ = cache.get(key, Maker(n))
        assert len(vision) == n and key in cache.kept
        held = sum(v.nbytes for v, _ in cache.kept.values())
        assert cache.bytes == held and (held <= 100 or len(cache.kept) == 1)


def test_cache_keeps_nothing_of_a_video_that_failed():
    """The next epoch tries again; a broken video is dropped each time, never served as another's
    tokens."""
    cache, make = encode.Cache(), Maker()

    def fail():
        raise VideoError("broken")
    for _ in range(2):
        with pytest.raises(VideoError):
            cache.get("a", fail)
    assert not cache.kept and cache.bytes == 0
    assert cache.get("a", make)[1] == 1


def test_two_videos_of_equal_shape_never_share_an_entry(tower):
    """Property 4: same grid, same size, asked for in turn; each gets its own tokens, equal to a
    fresh encode."""
    cache = encode.Cache()

    def fresh(seed):
        return encode.encode(tower, opener(noise_patches(3, 4, 6, seed), 4, 6), ALONE)

    def cached(seed):
        return cache.get(f"film {seed}", lambda: fresh(seed))

    for _ in range(2):
        for seed in (0, 1, 2):
            vision, grid = cached(seed)
            assert grid == (3, 4, 6) and torch.equal(vision, fresh(seed)[0])
    assert not torch.equal(cached(0)[0], cached(1)[0]) and len(cache.kept) == 3


# --------------------------------------------------------------------------------------------------
# stage 2

@pytest.mark.parametrize("case", ["case_stage2", "case_recomputed"])
@pytest.mark.parametrize("world", ["two", "four"])
def test_a_sharded_sequence_has_the_values_and_gradients_of_a_whole_one(brought, world, case):
    """Properties 6 to 9 and 11: lengths of every remainder, shards of padding alone, two kv heads
    on four ranks."""
    model, results, sp = tiny_model(), brought(world, case), WORLDS[world].size
    for i, pack in enumerate(PACKS):
        right, entropy, gradients = packed(model, pack)
        scale = sum(g.norm() ** 2 for g in gradients.values()) ** 0.5
        longest = max(t for t, _ in pack)
        read = max(sum(n - 1 for n in lengths) for _, lengths in pack)
        for logprobs, h, summed, positions in (r[i] for r in results):
            assert torch.allclose(logprobs, right, atol=1e-5, rtol=0)
            assert torch.allclose(h, entropy, atol=1e-5, rtol=0)
            for name, g in gradients.items():
                error = (summed[name] - g).norm()
                assert error <= 1e-4 * g.norm() + 1e-7 * scale, (pack, name)
            positions_of_all = 65 + longest + read
            assert positions[0] <= positions_of_all / sp + 4, "each rank computes its share alone"
            again = case == "case_recomputed"              # once more, in the backward
            assert len(positions) == 1 + again


@pytest.mark.parametrize("world", ["two", "four"])
def test_a_prefill_shared_out_gives_the_completions_of_one_rank(brought, world):
    """Every remainder of lengths, several prompts at once, two kv heads on four ranks: the same
    tokens, log-probs to 1e-5."""
    results, sp = brought(world, "case_prefill"), WORLDS[world].size
    for i, (right, positions) in enumerate(prefilled(tiny_model(), ALONE, False)):
        for completions, seen in (r[i] for r in results):
            assert [tokens for tokens, _ in completions] == [tokens for tokens, _ in right]
            for (_, got), (_, want) in zip(completions, right):
                assert torch.allclose(got, want, atol=1e-5, rtol=0)
            assert seen[0] == -(-positions[0] // sp), "each rank runs its share of the prefix alone"


def test_columns_of_all_ranks_are_the_sequence_once():
    """Property 8: nothing dropped, nothing twice, a share of the prefix and a share of the
    completions to each."""
    for sp in (1, 2, 4):
        for prefix, own in ((4, 4), (8, 0), (16, 12)):
            parts = [encode.columns(prefix, own, Ranks(sp=sp, sp_rank=r)) for r in range(sp)]
            assert sorted(torch.cat(parts).tolist()) == list(range(prefix + own))
            assert {int((p < prefix).sum()) for p in parts} == {prefix // sp}


if __name__ == "__main__":
    worlds.run(WORLDS, sys.argv[1], tiny_model())
