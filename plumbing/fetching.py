"""
Which vision tokens are in the host's memory, and when. A step's videos may be more than fit: the
tokens belong to the cache alone, and prompts get them when they are computed with. Each function
that takes fetch is given `data.fetch`.
"""
from dataclasses import replace

from flow import VideoError
from plumbing.batches import missing


def without_tokens(prompt):
    """The prompt, its vision tokens on "meta": their shape and dtype, and no memory."""
    return replace(prompt, vision=prompt.vision.to("meta"))


def fetch_in_rounds(run, fetch, prompts):
    """Prompts with their vision tokens for a rollout: as many at a time as the cache holds, or else
    as the sp ranks decode at once. Those that are in the cache come first.

    All sp ranks call this with the same prompts. Yields (places in the list, prompts) of each
    round; with sharded parameters all ranks have equally many, and the last ones may be empty.
    """
    order = sorted(range(len(prompts)), key=lambda i: prompts[i].key not in run.cache.kept)
    decoded_at_once = run.ranks.sp * run.config.max_tokens
    parts = list(rounds(order, prompts, run.cache.most, decoded_at_once))
    parts += [[]] * missing(parts, run)
    for places in parts:
        yield places, fetch(run, [prompts[i] for i in places])


def rounds(order, prompts, most_bytes, most_ids):
    """Cut `order`, places in the list of prompts, into runs whose vision tokens take at most
    most_bytes or whose ids are at most most_ids, whichever are more. Yields lists of places."""
    run, size, ids = [], 0, 0
    for i in order:
        size += prompts[i].vision.nbytes
        ids += len(prompts[i].ids)
        if run and size > most_bytes and ids > most_ids:
            yield run
            run, size, ids = [], prompts[i].vision.nbytes, len(prompts[i].ids)
        run.append(i)
    if run:
        yield run


def fetch_own(run, fetch, prompts):
    """Those prompts that this rank trains on in the cold start, with their vision tokens: 1/sp of
    them, or all of them with stage 2. The sp ranks fetch each one together.

    prompts: [(`Sample`, `Prompt`)], equal on all sp ranks. -> such a list
    """
    own = []
    for i, (sample, prompt) in enumerate(prompts):
        [prompt] = fetch(run, [prompt])
        if run.config.stage2 or i % run.ranks.sp == run.ranks.sp_rank:
            own.append((sample, prompt))
    return own


def store_received(run, drawn, group):
    """Put the vision tokens of a group that another rank sent into the cache. -> the group without
    them. drawn: the step's samples; their paths are those of this machine."""
    prompt, sample = group.prompt, drawn[group.slot]
    t = sum(grid[0] for grid in prompt.grids)
    _, h, w = prompt.grids[0]
    seconds = prompt.seconds / run.model.pixels.temporal               # between two frames
    run.cache.keep(prompt.key, prompt.vision, (t, h, w), seconds, prompt.frames)
    prompt = replace(without_tokens(prompt), video=sample.video)
    return replace(group, sample=sample, prompt=prompt)


def refuse_changes(video, key_now, key):
    """The `Video`, whose key was made before its frames are read. Its read raises VideoError once
    key_now() is another: if the file was written to meanwhile, the tokens of its frames would be
    stored as those of the old content, for this run and later ones."""
    def read(lo, hi):
        frames = video.read(lo, hi)        # of the video's size, or resized by a reading thread
        if key_now() != key:
            raise VideoError(f"{video.path}: changed while it was read")
        return frames

    return replace(video, read=read)
