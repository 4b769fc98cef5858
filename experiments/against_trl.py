"""
Time TRL's GRPOTrainer on the work of a row of bench.py: the tiny model, one video, one question.

In an environment of its own, since TRL is not among the requirements here:

    pip install torch==2.13.0 torchvision==0.28.0 trl==1.16.0 "transformers>=5.16.1,<5.20" \\
        accelerate datasets pillow
    python experiments/against_trl.py --frames=256 --size=168

and in this repository's, on the same machine, in turns:

    python bench.py --frames=256 --size=168 --variant=shared --sp=1

Both have the same weights and options: float32, one thread, G completions of exactly L tokens, one
AdamW step on all of them. The last line is JSON, with names as in bench.py's rows.

TRL 1.16 gives a video only to generate: its training forward sees placeholders where the video was.
`Attached` gives the video to that forward too, so that both do the same work.
"""
import argparse
import json
import resource
import statistics
import sys
import time
from pathlib import Path

import torch
from transformers import (
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    TrainerCallback,
)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from plumbing.families import INSTRUCTION  # noqa: E402
from plumbing.tiny import CONTROLS, build_tiny  # noqa: E402

QUESTION = f"What is seen, and when?\n{INSTRUCTION}"        # as `model.make_prompt` asks it
LR = 1e-6


def options():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=64)
    parser.add_argument("--size", type=int, default=112, help="pixels, both sides of a frame")
    parser.add_argument("--group", type=int, default=8, help="G completions")
    parser.add_argument("--completion", type=int, default=32, help="L tokens of each")
    parser.add_argument("--steps", type=int, default=3, help="timed steps, after one that is not")
    return parser.parse_args()


def make_processor(tokenizer, pixels, size):
    """transformers' processor of the tiny model; frames are not resized."""
    shared = dict(image_mean=pixels.mean, image_std=pixels.std, patch_size=pixels.patch,
                  temporal_patch_size=pixels.temporal, merge_size=pixels.merge,
                  size={"shortest_edge": size ** 2, "longest_edge": size ** 2})
    videos = Qwen2VLVideoProcessor(do_sample_frames=False, cap_pixels_per_frame=False, **shared)
    return Qwen2_5_VLProcessor(Qwen2VLImageProcessor(**shared), tokenizer, videos,
                               chat_template=tokenizer.chat_template)


class Attached:
    """Keeps the video that generate encodes, and gives it to forwards that come without.
    Also counts what the model computes: encoded videos, and positions of the language model."""

    def __init__(self, model):
        self.video_token = model.config.video_token_id
        self.kept = {}
        self.prompt_tokens = self.encodes = self.lm_tokens = 0
        model.register_forward_pre_hook(self.attach, with_kwargs=True)
        model.model.visual.register_forward_pre_hook(self.keep, with_kwargs=True)
        model.model.language_model.register_forward_pre_hook(self.count, with_kwargs=True)

    def keep(self, tower, args, inputs):
        """All rows of a batch have the same video: that of the first is kept."""
        videos = len(inputs["grid_thw"])
        self.encodes += videos
        patches = args[0] if args else inputs["hidden_states"]
        self.kept.update(pixel_values_videos=patches[:len(patches) // videos],
                         video_grid_thw=inputs["grid_thw"][:1])

    def attach(self, model, args, inputs):
        """inputs["input_ids"]: [B, T]"""
        if "second_per_grid_ts" in inputs:                 # generate's forward
            self.kept["second_per_grid_ts"] = inputs["second_per_grid_ts"][:1]
            self.prompt_tokens = max(self.prompt_tokens, inputs["input_ids"].shape[1])
        else:
            B = len(inputs["input_ids"])
            for name, one in self.kept.items():
                inputs[name] = one.repeat(B, *[1] * (one.ndim - 1))
            is_video = inputs["input_ids"] == self.video_token                         # [B, T]
            inputs["mm_token_type_ids"] = 2 * is_video.int()
        return args, inputs

    def count(self, language_model, args, inputs):
        self.lm_tokens += inputs["inputs_embeds"].shape[:2].numel()


class Seconds(TrainerCallback):
    """The seconds of each step, with all that is between steps."""

    def __init__(self):
        self.seconds, self.last = [], 0.0

    def on_train_begin(self, *args, **kwargs):
        self.last = time.perf_counter()

    def on_step_end(self, *args, **kwargs):
        now = time.perf_counter()
        self.seconds.append(now - self.last)
        self.last = now


def main(c):
    import datasets
    import numpy as np
    import trl
    from PIL import Image

    torch.set_num_threads(1)
    model, tokenizer, pixels = build_tiny()
    model.model.visual.requires_grad_(False)
    processor = make_processor(tokenizer, pixels, c.size)
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (c.frames, c.size, c.size, 3), np.uint8)
    video = {"type": "video", "video": [Image.fromarray(frame) for frame in noise]}
    content = [video, {"type": "text", "text": QUESTION}]

    def with_video(rows):
        return {"prompt": [[{"role": "user", "content": content}] for _ in rows["number"]]}

    questions = datasets.Dataset.from_dict({"number": [0, 1, 2, 3]}).with_transform(with_video)

    def reward(completions, **_):
        return [float(n % 2) for n in range(len(completions))]

    never = tokenizer.convert_tokens_to_ids(CONTROLS)      # completions have exactly L tokens
    config = trl.GRPOConfig(
        "out-trl", use_cpu=True, bf16=False, report_to="none", save_strategy="no",
        logging_strategy="no", disable_tqdm=True, max_steps=1 + c.steps, learning_rate=LR,
        per_device_train_batch_size=c.group, num_generations=c.group,
        max_completion_length=c.completion, epsilon=0.2, epsilon_high=0.28, beta=0.0,
        loss_type="grpo", temperature=1.0, gradient_checkpointing=False,
        dataloader_pin_memory=False, generation_kwargs={"suppress_tokens": never})
    counted, clock = Attached(model), Seconds()
    trainer = trl.GRPOTrainer(model, reward, config, questions, processing_class=processor,
                              callbacks=[clock])
    trainer.train()
    steps = 1 + c.steps
    row = {"variant": f"trl {trl.__version__}", **vars(c), "prompt_tokens": counted.prompt_tokens,
           "lm_tokens": counted.lm_tokens / steps,
           "encodes": counted.encodes / steps,
           "seconds": round(statistics.median(clock.seconds[1:]), 4),
           "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)}
    print(json.dumps(row))


if __name__ == "__main__":
    main(options())
