"""T-GRPO: reinforcement learning for video reasoning (Video-R1, section 3.2).

    python tgrpo.py @toy/tgrpo.args
    deepspeed tgrpo.py --model Qwen2.5-VL-7B-SFT --data Video-R1-260k.json --output tgrpo

One step, for each question q of a rank:
  1. draw the question, its frames in order and, for a video, shuffled           shuffle_frames
  2. sample G responses o_i to the ordered and G_tilde to the shuffled frames            rollout
  3. reward r_i: accuracy + format; p, p_tilde: shares of correct responses        group_rewards
  4. temporal reward r_t = alpha if p >= p_tilde, to correct responses (Eq. 1, 2) temporal_reward
     and omega to correct ones of moderate length (Eq. 5)                          length_reward
  5. advantage A_i = (R_i - mean) / std within the group (Eq. 3)               group_advantages
  6. clipped policy-gradient step with a KL term (Eq. 4)             tgrpo_loss, backward_group
Shuffled responses are only compared with; they are never trained on. `--alpha 0` is GRPO.

Which variant: the ratio and its clip are per token, the loss is the mean over a response's
tokens and then over responses, the KL is the k3 estimator. Left out: reward models, packing.

Shapes: G responses of a question, n responses of a chunk, L response tokens, P prompt tokens,
B prompts side by side, N rows that decode together, V vocabulary, T frames, C x H x W pixels.
"""
import argparse
import errno
import hashlib
import json
import math
import os
import resource
import shutil
import signal
import socket
import sys
import time
import warnings
from datetime import timedelta
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.accelerator import get_accelerator
from safetensors import SafetensorError
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import AttentionInterface, AutoModelForImageTextToText, AutoProcessor
from transformers.cache_utils import Cache, DynamicLayer

from build_data import (InputError, MediaError, as_in_file, check_limits, encode, encode_blank,
                        forbidden_tokens, load_records, load_vision_of, pad_batch, provenance,
                        read_args_line, seeded_generator, skip_row, stop_tokens)
from rewards import accuracy_reward, format_reward, length_reward

PIECE = 512  # tokens whose logits are turned into log-probabilities together
# Tokens by which the buffers of a rollout's keys and values grow; no usual head size, or --compile
BLOCK = 96  # would take the two for one number and compile again.
STD_EPSILON = 1e-4  # added to the standard deviation in Eq. 3, as in the released code
# What a resumed run may change: it paces the run or says where things are.
FREE_ARGUMENTS = {"data", "media_root", "output", "deepspeed_config", "num_workers",
                  "decode_timeout", "frame_cache", "frame_cache_gb", "save_steps",
                  "keep_checkpoints", "max_skipped", "resume", "timeout_minutes", "local_rank",
                  "rollout_steps", "chunk_size", "chunk_memory", "compile"}
LENGTH_ARGUMENTS = {"max_steps"}  # as well, where the learning rate does not decay towards the end
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
SHOWN_SKIPPED = 10  # reasons that are printed when --max_skipped stops a run
# First key of the generators: the three kinds of draw never share one.
ORDER_STREAM, FRAME_STREAM, ROLLOUT_STREAM = 0, 1, 2


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     fromfile_prefix_chars="@")
    parser.convert_arg_line_to_args = read_args_line
    add = parser.add_argument
    # data and model
    add("--model", required=True, help="Hugging Face directory or name: policy and reference")
    add("--data", required=True, help="Video-R1 records, .json or .jsonl")
    add("--media_root", help="folder that the records' paths are relative to; default: the data's")
    add("--output", required=True, help="folder for metrics, checkpoints and the final model")
    # frames and pixels
    add("--max_frames", type=int, default=16, help="most frames of a video")
    add("--min_frames", type=int, default=4, help="fewest frames of a video")
    add("--fps", type=float, default=2.0, help="frames a second of video, within those bounds")
    add("--min_pixels", type=int, default=4 * 28 * 28, help="fewest pixels of a video frame")
    add("--max_pixels", type=int, default=128 * 28 * 28, help="most pixels of a video frame")
    add("--image_min_pixels", type=int, default=4 * 28 * 28, help="fewest pixels of an image")
    add("--image_max_pixels", type=int, default=512 * 28 * 28, help="most pixels of an image")
    # rollout
    add("--G", type=int, default=8, help="responses to the ordered frames")
    add("--G_tilde", type=int, default=4, help="responses to the shuffled frames")
    add("--max_new_tokens", type=int, default=768, help="most tokens of a response")
    add("--temperature", type=float, default=1.0, help="sampling temperature, also of the loss")
    add("--top_p", type=float, default=1.0, help="nucleus sampling; 1: off")
    # rewards and advantages
    add("--alpha", type=float, default=0.3, help="temporal reward (Eq. 1); 0: plain GRPO")
    add("--omega", type=float, default=0.2, help="length reward (Eq. 5)")
    add("--l_min", type=int, default=320, help="fewest tokens that earn the length reward")
    add("--l_max", type=int, default=512, help="most tokens that earn the length reward")
    add("--correct_threshold", type=float, default=0.5,
        help="accuracy reward from which a response is correct")
    add("--temporal_test", choices=("ge", "gt"), default="ge", help="p >= p_tilde (Eq. 1), or >")
    add("--temporal_to", choices=("reward", "advantage"), default="reward",
        help="add r_t to the reward (Eq. 2) or to the advantage (the paper's remark)")
    add("--scale_advantages", choices=("std", "none"), default="std",
        help="divide by the group's standard deviation (Eq. 3), or not")
    # update
    add("--beta", type=float, default=0.04, help="weight of the KL term; 0: no reference model")
    add("--epsilon", type=float, default=0.2, help="clip range of the ratio (not in the paper)")
    add("--updates_per_rollout", type=int, default=1, help="optimizer steps on each rollout")
    add("--prompts_per_rank", type=int, default=1, help="questions of a step on each rank")
    add("--chunk_size", type=int, default=0,
        help="responses of one forward and backward pass; 0: as many as fit --chunk_memory")
    add("--chunk_memory", type=float, default=16, help="GiB for a chunk's activations (estimated)")
    add("--freeze_vision", action="store_true", help="train the language model only")
    add("--learning_rate", type=float, default=1e-6, help="peak learning rate of AdamW")
    add("--lr_schedule", choices=("constant", "linear", "cosine"), default="constant",
        help="decay to 0 after the warm-up")
    add("--warmup_steps", type=int, default=0, help="steps of linear warm-up")
    add("--adam_beta2", type=float, default=0.999, help="AdamW's second decay rate")
    add("--weight_decay", type=float, default=0.01, help="AdamW's decoupled weight decay")
    add("--max_grad_norm", type=float, default=5.0, help="gradients are clipped to this norm")
    add("--max_steps", type=int, default=1000, help="steps of the run, a rollout each")
    # the machine
    add("--attn_implementation", default="sdpa", help="sdpa, eager or flash_attention_2")
    add("--deepspeed_config", default=str(Path(__file__).parent / "ds_zero3.json"),
        help="DeepSpeed's JSON file: ZeRO stage, offload, precision, monitors")
    add("--compile", action="store_true",
        help="torch.compile the decoding step: slow at first, for each kind of shape, then faster")
    add("--num_workers", type=int, default=2, help="processes that decode media ahead of need")
    add("--decode_timeout", type=float, default=120, help="seconds until a medium is given up")
    add("--frame_cache", help="folder that keeps decoded frames for later epochs and runs")
    add("--frame_cache_gb", type=float, default=200, help="gigabytes after which it keeps no more")
    add("--rollout_steps", type=int, default=10, help="steps between entries of rollouts.jsonl")
    add("--save_steps", type=int, default=100, help="steps between checkpoints; 0: none")
    add("--keep_checkpoints", type=int, default=2, help="newest checkpoints that stay; 0: all")
    add("--max_skipped", type=float, default=0.1,
        help="share of questions with unusable media above which the run stops")
    add("--resume", action="store_true", help="continue from the newest checkpoint in --output")
    add("--seed", type=int, default=0, help="seed of every random draw")
    add("--timeout_minutes", type=float, default=30, help="longest wait for another rank")
    add("--local_rank", type=int, default=-1, help="set by the deepspeed launcher; not used")
    args = parser.parse_args(argv)
    if args.G < 2:
        parser.error("--G must be at least 2: an advantage compares responses of one group")
    if not args.temperature > 0 or not 0 < args.top_p <= 1:
        parser.error(f"--temperature {args.temperature} must be positive, and --top_p {args.top_p} "
                     "above 0 and at most 1")
    if args.l_min > args.l_max:
        parser.error(f"--l_min {args.l_min} is above --l_max {args.l_max}")
    if args.alpha and args.G_tilde < 1:
        parser.error("--G_tilde must be positive: p_tilde is its share of correct responses "
                     "(for plain GRPO use --alpha 0)")
    return args


# ------------------------------------------------------- the algorithm: pure functions

def shuffle_frames(frames, generator):
    """The (T, C, H, W) frames in a random order that is never the given one when T > 1."""
    if len(frames) < 2:
        return frames
    order = torch.arange(len(frames))
    while torch.equal(order, torch.arange(len(frames))):
        order = torch.randperm(len(frames), generator=generator)
    return frames[order]  # (T, C, H, W)


def temporal_reward(correct, correct_shuffled, alpha, test="ge") -> float:
    """r_t (Eq. 1): alpha when the ordered group's share of correct responses is at least
    (test "ge") or above (test "gt") the shuffled group's, else 0.

    >>> temporal_reward([True, False], [True, False, False, False], alpha=0.3)
    0.3
    """
    p = sum(correct) / len(correct)
    p_tilde = sum(correct_shuffled) / len(correct_shuffled)
    return alpha if p > p_tilde or (test == "ge" and p == p_tilde) else 0.0


def group_advantages(rewards, scale="std"):
    """A_i (Eq. 3) of a group's rewards (G,): centred, and for scale "std" divided by the
    unbiased standard deviation. A group of equal rewards teaches nothing: zeros."""
    if (rewards == rewards[0]).all():
        return torch.zeros_like(rewards)
    advantages = rewards - rewards.mean()  # (G,)
    return advantages / (rewards.std() + STD_EPSILON) if scale == "std" else advantages


def tgrpo_loss(logps, old_logps, ref_logps, advantages, mask, beta, epsilon):
    """-J (Eq. 4) of one group or chunk: a scalar to minimise.

    logps, old_logps, ref_logps (n, L): log-probabilities of the response tokens under the
    policy, the policy that sampled them and the reference (None when beta is 0);
    advantages (n,); mask (n, L): 1 up to and including the end token.
    """
    A = advantages[:, None]  # (n, 1)
    ratio = torch.exp(logps - old_logps)  # (n, L)
    objective = torch.minimum(ratio * A, ratio.clamp(1 - epsilon, 1 + epsilon) * A)  # (n, L)
    if beta:
        objective = objective - beta * kl_k3(logps, ref_logps)  # (n, L)
    # where, not a product: what stands after the end token may be infinite, and inf * 0 is NaN
    per_response = torch.where(mask.bool(), objective, 0).sum(1) / mask.sum(1)  # (n,)
    return -per_response.mean()


def kl_k3(logps, ref_logps):
    """Schulman's k3 estimator of KL(policy || reference), per token: never negative."""
    return torch.exp(ref_logps - logps) - (ref_logps - logps) - 1


def response_mask(ids, eos_ids):
    """(n, L) ones up to and including each row's first end token, zeros after it.

    >>> response_mask(torch.tensor([[5, 9, 9], [5, 6, 7]]), [9]).tolist()
    [[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]]
    """
    ended = torch.isin(ids, torch.tensor(eos_ids, device=ids.device)).cumsum(1)  # (n, L)
    return (F.pad(ended, (1, -1)) == 0).float()  # (n, L): no end token strictly before


def group_rewards(texts, texts_shuffled, lengths, record, args):
    """Rewards of one question's responses, by part, and the comparison of the two groups.

    Returns {"accuracy", "format", "temporal", "length": (G,) each; "p", "p_tilde", "r_t"}; the
    last two and "temporal" only when there is a shuffled group.
    """
    accuracy = [accuracy_reward(text, record) for text in texts]
    correct = [value >= args.correct_threshold for value in accuracy]
    parts = {"accuracy": accuracy, "format": [format_reward(text) for text in texts],
             "length": length_reward(correct, lengths, args.omega, args.l_min, args.l_max)}
    parts = {name: torch.tensor(values) for name, values in parts.items()}  # (G,) each
    parts["p"] = sum(correct) / len(correct)
    if texts_shuffled:
        correct_shuffled = [accuracy_reward(text, record) >= args.correct_threshold
                            for text in texts_shuffled]
        r_t = temporal_reward(correct, correct_shuffled, args.alpha, args.temporal_test)
        parts["temporal"] = r_t * torch.tensor(correct).float()  # (G,): correct ones only (Eq. 2)
        parts["p_tilde"], parts["r_t"] = sum(correct_shuffled) / len(correct_shuffled), r_t
    return parts


def learning_rate(step, args):
    """Learning rate of 0-based `step`: linear warm-up, then the schedule over the other steps."""
    if step < args.warmup_steps:
        return args.learning_rate * (step + 1) / args.warmup_steps
    progress = (step - args.warmup_steps) / max(1, args.max_steps - args.warmup_steps)
    decay = {"constant": 1.0, "linear": 1 - progress,
             "cosine": (1 + math.cos(math.pi * progress)) / 2}
    return args.learning_rate * decay[args.lr_schedule]


def record_index(position, count, seed):
    """Which record stands at `position` of the endless data order, reshuffled every epoch.

    A pure function, so a resumed run needs no stored state to go on where it stopped.
    """
    epoch, offset = divmod(position, count)
    if record_index.cache[:3] != (epoch, count, seed):
        generator = seeded_generator(ORDER_STREAM, seed, epoch)
        order = torch.randperm(count, generator=generator).tolist()
        record_index.cache = (epoch, count, seed, order)
    return record_index.cache[3][offset]


record_index.cache = (None, None, None, [])  # the order of the epoch asked for last


# ------------------------------------------------------------ rollout: prefill and decode

def rope_positions(model, inputs):
    """Multimodal rotary positions of a prompt (3, B, P) and of its first response token (B, 1)."""
    model = getattr(model, "module", model)  # inside DeepSpeed's engine
    keys = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts", "attention_mask")
    positions, delta = model.model.get_rope_index(
        inputs["input_ids"], inputs["mm_token_type_ids"],
        **{key: inputs[key] for key in keys if key in inputs})
    return positions, inputs["input_ids"].shape[1] + delta


def run_prompt(model, inputs):
    """One forward over a prompt (B, P). Returns the model's output with its cache of keys and
    values (B, heads, P, dim a layer), and the positions (B, 1) of the prompt's last token and of
    the first response token. They are neighbours but for videos so long that their time axis
    exceeds the positions of the text after them."""
    positions, next_position = rope_positions(model, inputs)
    vision = {key: inputs[key] for key in inputs
              if key.startswith("pixel_values") or key.endswith("grid_thw")}
    output = model(input_ids=inputs["input_ids"], position_ids=positions, use_cache=True,
                   logits_to_keep=1, **vision)
    return output, positions[0, :, -1:], next_position


def sample_tokens(logits, temperature, top_p, generator):
    """One token a row, (n,), from the (n, V) logits at a temperature, within the nucleus."""
    probs = torch.softmax(logits.float() / temperature, dim=-1)  # (n, V)
    if top_p < 1:
        ranked, order = probs.sort(dim=-1, descending=True)  # (n, V)
        ranked[ranked.cumsum(-1) - ranked >= top_p] = 0  # the first token always stays
        probs = torch.zeros_like(probs).scatter(-1, order, ranked)  # (n, V)
    # by the inverse of the distribution function: one random number a row, multinomial draws V
    cumulative = probs.double().cumsum(-1)  # (n, V)
    draws = torch.rand(len(probs), 1, dtype=torch.float64, generator=generator,
                       device=probs.device) * cumulative[:, -1:]  # (n, 1)
    return torch.searchsorted(cumulative, draws, right=True)[:, 0].clamp(max=probs.shape[1] - 1)


class GroupCache(Cache):
    """What the n rows of a rollout attend to. Of their prompts: each one's keys and values once,
    not once a response; row i stands in place `slots[i]` of S prompts x C places. Of their own
    tokens: buffers, written in place, with room for BLOCK more at a time."""

    def __init__(self, prompts, mask, counts):
        super().__init__(layers=[])
        self.prompts = prompts  # [(keys, values)] a layer, (S, h, dim, P) and (S, h, P, dim)
        self.padding = mask[:, None, None] == 0 if (mask == 0).any() else None  # (S, 1, 1, P)
        self.slots = torch.cat([s * max(counts) + torch.arange(count, device=mask.device)
                                for s, count in enumerate(counts)])  # (n,)
        self.place_rows(len(counts) * max(counts))
        self.own = [tuple(values.new_empty(len(self.slots), values.shape[1], 0, values.shape[3])
                          for _ in "kv") for _, values in prompts]  # (n, h, room, dim)
        self.at = torch.zeros(1, dtype=torch.int64, device=mask.device)

    def place_rows(self, places):
        """The row in each place (S C,); what stands in an empty one is computed and dropped."""
        self.rows = torch.zeros(places, dtype=torch.int64, device=self.slots.device)
        self.rows[self.slots] = torch.arange(len(self.slots), device=self.slots.device)

    def select(self, alive):
        """Keeps the rows of the (n,) mask, and the prompts that still have one."""
        S = len(self.prompts[0][0])
        C = len(self.rows) // S
        left, kept = (self.slots[alive] // C).unique(return_inverse=True)
        self.slots = kept * C + self.slots[alive] % C
        if len(left) < S:
            self.prompts = [(keys[left], values[left]) for keys, values in self.prompts]
            self.padding = None if self.padding is None else self.padding[left]
        self.place_rows(len(left) * C)
        self.own = [(keys[alive], values[alive]) for keys, values in self.own]

    def go_to(self, t):
        """The next tokens are the rows' own number t, from 0: makes room, hides what is later."""
        room = self.own[0][0].shape[2]
        if t == room:
            room += BLOCK
            self.own = [tuple(F.pad(buffer, (0, 0, 0, BLOCK)) for buffer in layer)
                        for layer in self.own]
        self.at.fill_(t)
        self.later = torch.arange(room, device=self.at.device) > t  # (room,)

    def update(self, keys, values, layer, *_, **__):
        """Called by the model: writes the tokens' (n, h, 1, dim), returns the layer's buffers."""
        for buffer, new in zip(self.own[layer], (keys, values)):
            buffer.index_copy_(2, self.at, new)
        return self.own[layer]

    def stack(self, x):
        """(n, h, r, k) of the rows -> (S, h, C r, k): one sequence of queries for each prompt."""
        places = x.index_select(0, self.rows).unflatten(0, (self.prompts[0][0].shape[0], -1))
        return places.transpose(1, 2).flatten(2, 3)

    def unstack(self, x):
        """The inverse: (S, h, C r, k) -> (n, h, r, k)."""
        C = self.rows.shape[0] // x.shape[0]
        places = x.unflatten(2, (C, -1)).transpose(1, 2).flatten(0, 1)
        return places.index_select(0, self.slots)


def softmax_and_lse(scores):
    """The softmax over the last axis, and the logarithm of what it divides by, (..., 1)."""
    weights = scores.softmax(-1, dtype=torch.float32)
    return weights, scores.amax(-1, keepdim=True) - weights.amax(-1, keepdim=True).log()


def group_attention(module, query, keys, values, cache, *, scaling, **_):
    """Attention of n rows' next tokens (n, H, 1, dim) to their prompts and their own tokens
    (n, h, room, dim): a prompt's keys are multiplied with the queries of all its rows at once.

    The two parts have a softmax each, and are weighted by its share of the common one: with
    Z the sums of exponentials, a = (Z_1 a_1 + Z_2 a_2) / (Z_1 + Z_2). The GroupCache comes where
    transformers passes a mask. H query heads share h heads of keys, r = H / h each.
    """
    n, h, _, dim = keys.shape
    prompt_keys, prompt_values = cache.prompts[module.layer_idx]  # (S, h, dim, P), (S, h, P, dim)
    query = (query * scaling).view(n, h, -1, dim)  # (n, h, r, dim)
    scores = cache.stack(query) @ prompt_keys  # (S, h, C r, P)
    if cache.padding is not None:
        scores.masked_fill_(cache.padding, -torch.inf)
    weights, prompt_lse = softmax_and_lse(scores)  # (S, h, C r, P), (S, h, C r, 1)
    prompt = cache.unstack(weights.to(values.dtype) @ prompt_values)  # (n, h, r, dim)
    scores = (query @ keys.transpose(-1, -2)).masked_fill_(cache.later, -torch.inf)
    weights, own_lse = softmax_and_lse(scores)  # (n, h, r, room), (n, h, r, 1)
    own = weights.to(values.dtype) @ values  # (n, h, r, dim)
    share = (cache.unstack(prompt_lse) - own_lse).sigmoid()  # Z_1 / (Z_1 + Z_2)
    return own.lerp(prompt, share.to(own.dtype)).view(n, 1, -1, dim), None  # (n, 1, H, dim)


AttentionInterface.register("group", group_attention)


def prefill(model, prompts, counts):
    """Runs each prompt once, a video's two orders side by side: S prompt rows in all, of which
    row s gets counts[s] responses.

    Prompts differ in length: keys and values are padded on the left to the longest. Returns the
    GroupCache, and logits (N, V) and position (N, 1) of each row's first response token.
    """
    layers, masks, logits, positions = [], [], [], []
    longest = max(inputs["input_ids"].shape[1] for inputs in prompts)
    for inputs in prompts:
        output, _, position = run_prompt(model, inputs)
        left = longest - inputs["input_ids"].shape[1]
        layers.append([[F.pad(kv, (0, 0, left, 0)) for kv in (layer.keys, layer.values)]
                       for layer in output.past_key_values.layers])  # (B, h, P, dim) each
        masks.append(F.pad(inputs["attention_mask"], (left, 0)))  # (B, P)
        logits.append(output.logits[:, -1])  # (B, V)
        positions.append(position)  # (B, 1)
    layers = [(torch.cat(keys).transpose(-1, -2).contiguous(), torch.cat(values)) for keys, values
              in (zip(*layer_of_prompts) for layer_of_prompts in zip(*layers))]
    cache = GroupCache(layers, torch.cat(masks), counts)
    rows = torch.tensor(counts, device=cache.rows.device)  # (S,)
    return cache, *(torch.cat(x).repeat_interleave(rows, 0) for x in (logits, positions))


def decode(model, tokens, position, cache):
    """Logits (n, V) after one more token (n,) a row, at its position (n, 1)."""
    return model.forward(  # without hooks: DeepSpeed's timers are of no use here, nor compiled
        input_ids=tokens[:, None], position_ids=position.expand(3, -1, -1), past_key_values=cache,
        attention_mask={"full_attention": cache}, use_cache=True).logits[:, -1]


def rollout(model, prompts, counts, *, max_new_tokens, temperature, top_p, eos_ids, forbidden_ids,
            generator, decode=decode):
    """Samples counts[i][b] responses to row b of prompts[i], all of them in one decode batch.

    prompts: encoded inputs of B rows each (a video's two orders side by side: B = 2).
    A row leaves the batch at its first end token, a prompt with its last row. Makes no
    collective call, so that ranks need not wait for each other's longest response.
    Returns one (count, L) tensor of ids for each prompt row; end tokens fill it up.
    """
    counts = [n for count in counts for n in count]
    device = prompts[0]["input_ids"].device
    rows = torch.arange(sum(counts), device=device)  # (n,): the rows that still decode, N at first
    ids = torch.full((len(rows), max_new_tokens), eos_ids[0], device=device)  # (N, L)
    eos = torch.tensor(eos_ids, device=device)
    config = model.config.get_text_config()
    with torch.inference_mode():  # faster than no_grad; what it makes must not meet autograd
        cache, logits, position = prefill(model, prompts, counts)
        usual, config._attn_implementation = config._attn_implementation, "group"
        for t in range(max_new_tokens):
            logits[:, forbidden_ids] = -torch.inf  # (n, V)
            tokens = sample_tokens(logits, temperature, top_p, generator)  # (n,)
            ids[rows, t] = tokens
            alive = ~torch.isin(tokens, eos)  # (n,)
            left = int(alive.sum())
            if left == 0 or t + 1 == max_new_tokens:
                break
            if left < len(rows):
                rows, tokens, position = rows[alive], tokens[alive], position[alive]
                cache.select(alive)
            cache.go_to(t)
            logits = decode(model, tokens, position + t, cache)  # (n, V)
    config._attn_implementation = usual
    return ids[:, :t + 1].split(counts)


# -------------------------------------- update: the prompt is encoded once for its group

def response_logits(model, cache, inputs, last_position, next_position, responses):
    """Logits (n, L, V) that predict each response token, on top of the prompt's cached keys and
    values (1, heads, P - 1, dim) a layer: the prompt's last token is fed again with them."""
    n, L = responses.shape
    last = inputs["input_ids"][:, -1:].expand(n, 1)
    ids = torch.cat([last, responses[:, :-1]], dim=1)  # (n, L)
    position = torch.cat([last_position, next_position + torch.arange(
        L - 1, device=ids.device)], dim=1)  # (1, L)
    shared = Cache(layers=[DynamicLayer() for _ in cache])
    for layer, (keys, values) in zip(shared.layers, cache):
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = (kv.expand(n, -1, -1, -1) for kv in (keys, values))
    return model(input_ids=ids, position_ids=position.expand(3, n, L), past_key_values=shared,
                 use_cache=True).logits  # (n, L, V)


class TokenLogps(torch.autograd.Function):
    """log softmax(logits / temperature) at the ids, and the entropy of each row.

    By hand and in pieces of PIECE rows: at 150,000 tokens of vocabulary the float32 copies of
    the logits that autograd would keep outweigh all activations of the model.
    """

    @staticmethod
    def forward(ctx, logits, ids, temperature):  # (N, V), (N,)
        logps, entropy = logits.new_empty(2, len(ids), dtype=torch.float32)  # (N,) each
        tensors = logits, ids, logps, entropy
        for piece, chosen, logp, h in zip(*(x.split(PIECE) for x in tensors)):
            log_probs = (piece.float() / temperature).log_softmax(-1)  # (PIECE, V)
            logp.copy_(log_probs.gather(1, chosen[:, None])[:, 0])
            h.copy_(-log_probs.exp().mul_(log_probs).sum(-1))
        ctx.save_for_backward(logits, ids)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy)
        return logps, entropy

    @staticmethod
    def backward(ctx, gradient, _):
        """d log p_i / d logit_j = (1[i = j] - p_j) / temperature."""
        logits, ids = ctx.saved_tensors
        gradient, result = gradient / ctx.temperature, torch.empty_like(logits)  # (N,), (N, V)
        tensors = logits, ids, gradient, result
        for piece, chosen, g, out in zip(*(x.split(PIECE) for x in tensors)):
            probs = (piece.float() / ctx.temperature).softmax(-1)  # (PIECE, V)
            out.copy_(probs.mul_(-g[:, None]).scatter_add_(1, chosen[:, None], g[:, None]))
        return result, None, None


def token_logps(logits, responses, temperature):
    """(n, L) log-probabilities of the response tokens, and the (n, L) entropies (no gradient)."""
    parts = TokenLogps.apply(logits.flatten(0, 1), responses.flatten(), temperature)
    return tuple(part.view_as(responses) for part in parts)  # (n, L) each


def prompt_cache(output):
    """[(keys, values)] of all prompt tokens but the last, (1, heads, P - 1, dim) a layer."""
    return [(layer.keys[:, :, :-1], layer.values[:, :, :-1])
            for layer in output.past_key_values.layers]


@torch.no_grad()
def group_logps(model, inputs, responses, lengths, chunk_size, temperature=1.0):
    """Log-probabilities (G, L) of a group's responses, up to their lengths (G,): the prompt once,
    then the responses, chunk_size at a time. Equal to a forward over G copies of both."""
    output, *positions = run_prompt(model, inputs)
    cache = prompt_cache(output)
    logps = torch.zeros(responses.shape, device=responses.device)  # (G, L)
    for rows, chunk in chunks_of(responses, lengths, chunk_size):
        logits = response_logits(model, cache, inputs, *positions, chunk)  # (n, L, V)
        logps[rows, :chunk.shape[1]] = token_logps(logits, chunk, temperature)[0]
    return logps


def chunks_of(responses, lengths, chunk_size):
    """Yields (rows, responses[rows] cut to the longest of them), responses of similar length
    together: little of a chunk is padding."""
    for rows in lengths.argsort().split(chunk_size):
        yield rows, responses[rows, :lengths[rows].max()]  # (n,), (n, L)


def chunk_that_fits(model, args):
    """How many responses of full length run at once within --chunk_memory.

    Counts the values that a backward pass needs: in each layer about 12 of the hidden size and 5
    of the MLP's a token, and the logits with their gradient. Depends on flags and model only:
    ranks must make the same number of calls.
    """
    config = model.config.get_text_config()
    values = 2 * config.vocab_size + config.num_hidden_layers * (
        12 * config.hidden_size + 5 * config.intermediate_size)
    response = args.max_new_tokens * values * model.dtype.itemsize  # bytes
    return int(min(args.G, max(1, args.chunk_memory * 2**30 // response)))


def begin_backward(engine, blank):
    """A backward of zeros through every parameter, before the first group of an optimizer step.

    ZeRO overwrites a parameter's gradient in a step's first backward and adds in later ones. A
    group's first backward stops at the prompt's keys and values, so without this the vision
    tower's gradients would be added to those of the step before.
    """
    engine.set_gradient_accumulation_boundary(False)
    output, *_ = run_prompt(engine, blank)
    engine.backward(0.0 * output.logits.sum())


def backward_group(engine, inputs, responses, lengths, chunk_loss, chunk_size, temperature,
                   last):
    """Backward of a group's loss with one prompt and one chunk of responses in memory.

    chunk_loss(rows, logps, entropy) -> scalar, for the chunk responses[rows] cut to its longest;
    the group's loss is their sum. (a) The prompt runs once. (b) Its keys and values are cut off
    as leaves. (c) Each chunk runs on them and goes backward; gradients collect in the leaves.
    (d) One backward carries these through the prompt and the vision tower. `last`: gradients
    are complete after this group, ranks may average them.
    """
    output, *positions = run_prompt(engine, inputs)  # (a)
    attached = [kv for pair in prompt_cache(output) for kv in pair]
    leaves = [kv.detach().requires_grad_() for kv in attached]  # (b)
    cache = list(zip(leaves[::2], leaves[1::2]))
    engine.set_gradient_accumulation_boundary(False)
    for rows, chunk in chunks_of(responses, lengths, chunk_size):  # (c)
        logits = response_logits(engine, cache, inputs, *positions, chunk)  # (n, L, V)
        engine.backward(chunk_loss(rows, *token_logps(logits, chunk, temperature)))
    engine.set_gradient_accumulation_boundary(last)
    # (d); the zero term lets every parameter take part in the last backward, as DeepSpeed expects
    engine.backward(sum((kv * leaf.grad).sum() for kv, leaf in zip(attached, leaves))
                    + 0.0 * output.logits.sum())


# --------------------------------------------------------------------------------- data

class Questions(Dataset):
    """position -> {"record", "ordered", "shuffled"} or a MediaError's line; runs in workers.

    "shuffled" holds the same question with the decoded frames in another order; only for
    videos, and only when the temporal reward needs it.
    """

    def __init__(self, records, processor, args):
        self.records, self.processor, self.args = records, processor, args

    def __getitem__(self, position):
        record = self.records[record_index(position, len(self.records), self.args.seed)]
        try:
            vision = load_vision_of(record, self.args)
        except MediaError as error:
            return skip_row(record, error)
        sample = {"record": record, "ordered": encode(self.processor, record, vision)}
        if record["data_type"] == "video" and self.args.alpha:
            generator = seeded_generator(FRAME_STREAM, self.args.seed, position)
            order = shuffle_frames(torch.arange(len(vision.frames)), generator)
            shuffled = vision._replace(frames=vision.frames[order])
            sample |= {"shuffled": encode(self.processor, record, shuffled),
                       "frame_order": order.tolist()}
        return sample


# --------------------------------------------------------- start-up, the same in each stage

def setup_distributed(args):
    """Joins the process group, under the deepspeed launcher or alone. Returns (rank, device).

    A rank that waits longer than --timeout_minutes for another ends with an error.
    """
    if "RANK" not in os.environ:  # started as `python tgrpo.py`: a group of one
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1",
                          MASTER_PORT=port)
    deepspeed.utils.logger.setLevel("WARNING")
    # every tensor that a worker hands over is an open file, and 1024 is a common soft limit
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    # DeepSpeed calls functions that torch has renamed: one warning a step and rank otherwise
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    local_rank = int(os.environ["LOCAL_RANK"])
    get_accelerator().set_device(local_rank)
    deepspeed.init_distributed(get_accelerator().communication_backend_name(), verbose=False,
                               timeout=timedelta(minutes=args.timeout_minutes))
    return dist.get_rank(), torch.device(get_accelerator().device_name(local_rank))


def read_deepspeed_config(args):
    """The user's DeepSpeed file, completed with what this script's flags decide."""
    try:
        config = json.loads(Path(args.deepspeed_config).read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read --deepspeed_config {args.deepspeed_config}: {error}") \
            from None
    ours = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1,
            "gradient_clipping": args.max_grad_norm}
    for key in (*ours, "train_batch_size", "optimizer", "scheduler"):
        if config.get(key, "auto") != "auto":
            raise InputError(f"remove {key!r} from {args.deepspeed_config}: "
                             "this script's own flags decide it")
    if config.pop("fp16", {}).get("enabled", False) not in (False, "auto"):
        raise InputError(f"{args.deepspeed_config} enables fp16: use bf16, or neither for fp32")
    if config.get("bf16", {}).get("enabled") == "auto":  # bf16 where there is an accelerator
        config["bf16"]["enabled"] = get_accelerator().device_name() != "cpu"
    config.setdefault("zero_force_ds_cpu_optimizer", False)  # torch's AdamW, also offloaded
    return {key: value for key, value in config.items() if value != "auto"} | ours


def load_processor(args):
    """The model's processor; InputError where the directory has none."""
    try:
        processor = AutoProcessor.from_pretrained(args.model)
        if not processor.chat_template:
            raise ValueError("no chat template")
        return processor
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"--model {args.model} has no usable processor (tokenizer, "
                         f"preprocessor and chat template): {error}") from None


def load_model(args, config):
    """The model's weights, from safetensors only, in the precision of the DeepSpeed config; under
    ZeRO-3 this rank's part of them. Files of that precision are mapped, not read, and split
    parameter by parameter: with an accelerator no process holds a whole copy."""
    dtype = torch.bfloat16 if config.get("bf16", {}).get("enabled") else torch.float32
    try:
        model = AutoModelForImageTextToText.from_pretrained(
            args.model, dtype=dtype, attn_implementation=args.attn_implementation,
            use_safetensors=True)
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"cannot load --model {args.model}: {error}") from None
    if config.get("zero_optimization", {}).get("stage", 0) == 3:
        deepspeed.zero.Init(module=model, config_dict_or_path=config)
        model.to(get_accelerator().current_device_name())  # the buffers: the rest is there
    return model


def start_engine(model, args, config):
    """DeepSpeed's engine around the model, with torch's AdamW; each step sets its learning rate."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0,
                                  betas=(0.9, args.adam_beta2), weight_decay=args.weight_decay)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    if engine.zero_optimization_stage() == 0:
        optimizer.state.clear()  # in bf16 DeepSpeed has tried a step, which would count as one
    return engine


# ------------------------------------------------------------ what a run leaves in --output

def run_identity(args, config, records) -> dict:
    """What a resumed run must share with the run that it continues: every argument that its
    numbers depend on, the records, and how DeepSpeed splits the state over ranks."""
    text = json.dumps([as_in_file(record) for record in records])
    free = FREE_ARGUMENTS | (LENGTH_ARGUMENTS if args.lr_schedule == "constant" else set())
    return {**{f"--{name}": value for name, value in vars(args).items() if name not in free},
            "records of --data": hashlib.sha256(text.encode()).hexdigest()[:12],
            "number of processes": dist.get_world_size(),
            "ZeRO stage": config.get("zero_optimization", {}).get("stage", 0)}


def open_output(args, identity) -> int:
    """Makes --output. Returns the step to start from: 0, or with --resume the newest checkpoint's.

    A folder that holds a model, or without --resume a run, is refused: nothing is written over.
    """
    output = Path(args.output)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to --output {output}: {error}") from None
    steps = checkpoint_steps(output)
    run = bool(steps) or (output / "metrics.jsonl").exists()
    used = not args.resume if run else (output / "config.json").exists()
    # the ranks agree before any of them writes; one that sees another disk is found out here
    probe = output / "shared.probe"
    if dist.get_rank() == 0:
        probe.touch()
    dist.barrier()
    found = gather_objects((used, max(steps, default=0), probe.exists()))
    if dist.get_rank() == 0:
        probe.unlink()
    if any(rank_used for rank_used, *_ in found):
        raise InputError(f"--output {output} holds a run or a model: continue a run with --resume, "
                         "or name another folder")
    if len(set(found)) > 1:
        raise InputError(f"ranks see different files in --output {output}: it must be on storage "
                         f"that all nodes share (newest checkpoints: {[n for _, n, _ in found]})")
    first_step = found[0][1]
    if first_step:
        check_identity(output / f"checkpoint-{first_step}", identity)
    if dist.get_rank() == 0:
        for rest in output.glob("checkpoint-*.partial"):  # of a run that was killed while saving
            shutil.rmtree(rest)
    return first_step


def check_identity(checkpoint, identity):
    """InputError that names what differs between a checkpoint's run and this one."""
    try:
        saved = json.loads((checkpoint / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{checkpoint} cannot be read: {error}; remove it to resume from the "
                         "checkpoint before it") from None
    now = json.loads(json.dumps(identity))
    changed = [f"{name} was {saved.get(name)}, is {now.get(name)}"
               for name in sorted(saved.keys() | now.keys()) if saved.get(name) != now.get(name)]
    if changed:
        raise InputError(
            f"--resume: {checkpoint} belongs to another run: {'; '.join(changed)}. Give what it "
            "had, or start another --output from its weights (README, 'When something breaks')")


def open_log(args, name, first_step):
    """<output>/<name>.jsonl for appending; on --resume without the steps that will be redone.
    The first line of metrics.jsonl says how to repeat the run."""
    path, lines = Path(args.output) / f"{name}.jsonl", []
    if first_step and path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                step = json.loads(line).get("step", 0)
            except json.JSONDecodeError:  # cut short when the run was killed
                break
            if step <= first_step:
                lines.append(line)
    if name == "metrics" and not lines:
        lines = [json.dumps({"arguments": vars(args), "world_size": dist.get_world_size(),
                             **provenance()})]
    aside = path.with_suffix(".partial")
    aside.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    aside.replace(path)
    return path.open("a", encoding="utf-8", buffering=1)


def save_checkpoint(engine, args, step, identity):
    """checkpoint-<step>/, complete or absent: written aside, renamed when every rank is done.
    Only then those older than the newest --keep_checkpoints are removed."""
    output = Path(args.output)
    aside, whole = output / f"checkpoint-{step}.partial", output / f"checkpoint-{step}"
    if any(gather_objects(whole.exists())):  # all have looked before any of them writes
        return
    try:
        engine.save_checkpoint(str(aside), tag="state")
        if dist.get_rank() == 0:
            (aside / "run.json").write_text(json.dumps(identity), encoding="utf-8")
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as either
        raise InputError(f"cannot write {aside}: {error}. Checkpoints before it are whole: make "
                         "room and continue with --resume") from None
    dist.barrier()
    if dist.get_rank() == 0:
        aside.rename(whole)
        steps = sorted(checkpoint_steps(output))
        for old in steps[:-args.keep_checkpoints] if args.keep_checkpoints else []:
            # renamed first: what is left of it if we are killed now is no checkpoint
            old_aside = (output / f"checkpoint-{old}").rename(output / f"checkpoint-{old}.partial")
            shutil.rmtree(old_aside)
    dist.barrier()


def checkpoint_steps(output) -> list[int]:
    """The steps of the complete checkpoints in a folder."""
    names = [path.name.removeprefix("checkpoint-") for path in output.glob("checkpoint-*")]
    return [int(name) for name in names if name.isdigit()]


def stop_on_sigterm() -> list:
    """Lets SIGTERM (pre-emption) end the run after its current step: the list that is returned
    is no longer empty then."""
    received = []
    signal.signal(signal.SIGTERM, lambda *_: received.append("SIGTERM"))
    return received


def leave_sigterm_to_main(_):
    """For data workers, whom a launcher's SIGTERM reaches too: the current step needs them."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def watch_gradients(model, device):
    """A tensor that counts the gradients, of any parameter in any backward, that hold NaN or
    infinity. Read before an optimizer step, it keeps them from the weights."""
    count = torch.zeros((), device=device)

    def look(gradient):
        count.add_(~gradient.isfinite().all())
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_hook(look)
    return count


def check_skipped(args, skipped, drawn):
    """InputError when more than --max_skipped of the questions so far (of 100 when fewer were
    drawn) had media that cannot be used."""
    if skipped > args.max_skipped * max(drawn, 100):
        path = Path(args.output) / "skipped.jsonl"  # just written: another node may not see it yet
        lines = path.read_text(encoding="utf-8").splitlines() if dist.get_rank() == 0 else []
        shown = "".join(f"\n  {json.loads(line)['reason']}" for line in lines[-SHOWN_SKIPPED:])
        raise InputError(f"{skipped} of {drawn} questions had media that cannot be used, above "
                         f"--max_skipped {args.max_skipped:g}. All are in {args.output}/"
                         f"skipped.jsonl, the last are:{shown}")


def skipped_before(args, first_step) -> int:
    """How many questions a resumed run had skipped up to its checkpoint."""
    path = Path(args.output) / "skipped.jsonl"
    if not first_step or not path.exists():
        return 0
    steps = [json.loads(line)["step"] for line in path.read_text(encoding="utf-8").splitlines()
             if line.endswith("}")]
    return sum(step <= first_step for step in steps)


def save_model(engine, processor, output):
    """The trained model as a Hugging Face directory. Collective: every rank calls it."""
    sharded = engine.zero_optimization_partition_weights()
    state = {}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=sharded):
            if dist.get_rank() == 0:
                state[name] = parameter.detach().cpu().clone()
    if dist.get_rank() == 0:
        aside = Path(output) / "model.partial"
        try:
            engine.module.save_pretrained(aside, state_dict=state)
            processor.save_pretrained(aside)
        except SafetensorError as error:  # a full disk, which it does not report as OSError
            raise InputError(f"cannot write the model to {aside}: {error}. Make room and continue "
                             "from the last checkpoint with --resume") from None
        for path in sorted(aside.iterdir(), key=lambda path: path.name == "config.json"):
            path.replace(Path(output) / path.name)  # config.json last: it makes it a model
        aside.rmdir()
    dist.barrier()


def gather_objects(value) -> list:
    """The value of every rank, on every rank."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


# ------------------------------------------------------------------- the steps, on one rank

def start_reference(args, config):
    """The frozen reference model; sharded like the policy where that is (ZeRO-3)."""
    model = load_model(args, config).eval().requires_grad_(False)
    if config.get("zero_optimization", {}).get("stage", 0) < 3:
        return model.to(get_accelerator().current_device_name())
    keys = ("zero_optimization", "bf16", "train_micro_batch_size_per_gpu")
    config = {key: config[key] for key in keys if key in config}
    return deepspeed.initialize(model=model, config=config)[0]


def sampling_copy(module, args, device):
    """A whole, unsharded model on the device, for rollouts to sample from; its weights come with
    gather_weights."""
    with torch.device("meta"):
        sampler = AutoModelForImageTextToText.from_config(
            module.config, dtype=module.dtype, attn_implementation=args.attn_implementation)
    sampler = sampler.to_empty(device=device).eval().requires_grad_(False)
    sampler.tie_weights()
    for source, target in zip(module.buffers(), sampler.buffers(), strict=True):
        target.copy_(source)
    return sampler


def gather_weights(engine, sampler):
    """Copies the sharded policy into the plain sampling copy, parameter by parameter."""
    for source, target in zip(engine.module.parameters(), sampler.parameters(), strict=True):
        with deepspeed.zero.GatheredParameters([source]):
            target.data.copy_(source.data)


def sample_responses(model, samples, args, generator, eos_ids, forbidden_ids, decode=decode):
    """Steps 1 and 2 for the questions of a rank: adds responses (G, L) and, where frames were
    shuffled, responses_shuffled (G_tilde, L) to each sample."""
    prompts, counts = [], []
    for sample in samples:
        orders = [sample[key] for key in ("ordered", "shuffled") if key in sample]
        batch = pad_batch(orders, {}, "left")  # the same length: no padding
        prompts.append(to_device(batch, generator.device))
        counts.append([args.G, args.G_tilde][:len(orders)])
    if not samples:
        return
    groups = iter(rollout(model, prompts, counts, max_new_tokens=args.max_new_tokens,
                          temperature=args.temperature, top_p=args.top_p, eos_ids=eos_ids,
                          forbidden_ids=forbidden_ids, generator=generator, decode=decode))
    for sample in samples:
        sample["responses"] = next(groups)
        if "shuffled" in sample:
            sample["responses_shuffled"] = next(groups)


def grade_group(sample, tokenizer, eos_ids, args):
    """Steps 3 to 5 for one question: adds mask (G, L), texts, rewards by part, R and A (G,)."""
    def decode(ids):
        mask = response_mask(ids, eos_ids)  # (n, L)
        kept = [row[:n] for row, n in zip(ids.tolist(), mask.sum(1).int().tolist())]
        return mask, tokenizer.batch_decode(kept, skip_special_tokens=True)

    sample["mask"], sample["texts"] = decode(sample["responses"])  # (G, L)
    sample["texts_shuffled"] = decode(sample["responses_shuffled"])[1] if "shuffled" in sample \
        else []
    lengths = sample["mask"].sum(1).int().tolist()  # (G,) tokens, the end token included
    parts = group_rewards(sample["texts"], sample["texts_shuffled"], lengths, sample["record"],
                          args)
    r_t = parts.get("temporal", torch.zeros(args.G))  # (G,)
    R = parts["accuracy"] + parts["format"] + parts["length"]  # (G,)
    if args.temporal_to == "reward":
        R = R + r_t  # (G,) Eq. 2
    A = group_advantages(R.double(), args.scale_advantages).float()  # (G,) Eq. 3
    if args.temporal_to == "advantage":
        A = A + r_t  # (G,)
    lengths = torch.tensor(lengths)  # (G,)
    last = sample["responses"].cpu()[torch.arange(args.G), lengths - 1]  # (G,)
    truncated = ~torch.isin(last, torch.tensor(eos_ids))  # (G,): no end token
    longest = lengths.max()  # other groups' longer responses need not be computed here
    sample |= {"responses": sample["responses"][:, :longest], "mask": sample["mask"][:, :longest],
               "lengths": lengths, "parts": parts, "R": R, "A": A,
               "truncated": truncated.float().tolist()}


def update(engine, reference, samples, blank, weight, args, metrics, infinite):
    """Step 6: updates_per_rollout optimizer steps on the responses of this rank's questions.

    Returns False, before the optimizer step, when the loss or a gradient is not finite.

    Every rank makes prompts_per_rank times the same engine calls; where a question was skipped,
    a blank one of weight 0 stands in.
    """
    samples = samples + [blank] * (args.prompts_per_rank - len(samples))
    for sample in [blank, *samples]:
        sample |= {"inputs": to_device(sample["ordered"], engine.device),
                   "A": sample["A"].to(engine.device)}
    for sample in samples:
        group = [sample[key] for key in ("inputs", "responses", "lengths")]
        sample["ref"] = group_logps(reference, *group, args.chunk_size, args.temperature) \
            if args.beta else None  # (G, L)
        sample["old"] = torch.zeros_like(sample["mask"])  # (G, L): filled by the first update
    for u in range(args.updates_per_rollout):
        begin_backward(engine, blank["inputs"])
        for i, sample in enumerate(samples):
            def chunk_loss(rows, logps, entropy):
                part = rows, slice(logps.shape[1])  # the chunk's share of the (G, L) tensors
                if u == 0:
                    sample["old"][part] = logps.detach()  # the policy that sampled is this one
                old, mask, A = sample["old"][part], sample["mask"][part], sample["A"][rows]
                ref = None if sample["ref"] is None else sample["ref"][part]
                loss = tgrpo_loss(logps, old, ref, A, mask, args.beta, args.epsilon)
                loss = loss * len(rows) / args.G
                if sample is blank:
                    return loss * 0.0
                note_policy(metrics, logps.detach(), old, ref, entropy, mask, A, args.epsilon)
                note(metrics, "optim/loss", [loss.item()], count=len(rows) / args.G)
                return loss * weight

            group = [sample[key] for key in ("inputs", "responses", "lengths")]
            backward_group(engine, *group, chunk_loss, args.chunk_size, args.temperature,
                           last=i == len(samples) - 1)
        loss, _ = metrics.get("optim/loss", (0.0, 0))
        if any(gather_objects(infinite.item() > 0 or not math.isfinite(loss))):
            return False
        engine.step()
    return True


def to_device(inputs, device):
    """Copies a dict of tensors; from the workers' pinned memory without waiting for it."""
    return {key: value.to(device, non_blocking=True) for key, value in inputs.items()}


def note(metrics, name, values, count=None):
    """Adds values to a metric: sums and counts, so that means over ranks are exact."""
    total, n = metrics.get(name, (0.0, 0))
    metrics[name] = (total + sum(values), n + (len(values) if count is None else count))


def note_policy(metrics, logps, old_logps, ref_logps, entropy, mask, advantages, epsilon):
    """Per-token metrics of a chunk, (n, L) each, over the tokens inside the mask."""
    inside = mask.bool()
    ratio = torch.exp(logps - old_logps)  # (n, L)
    A = advantages[:, None]  # (n, 1)
    clipped = torch.where(A > 0, ratio > 1 + epsilon, ratio < 1 - epsilon) & (A != 0)  # (n, L)
    note(metrics, "policy/entropy", entropy[inside].tolist())
    note(metrics, "policy/clip_rate", clipped[inside].tolist())
    if ref_logps is not None:
        note(metrics, "policy/kl", kl_k3(logps, ref_logps)[inside].tolist())
    largest = max(metrics.get("policy/ratio_max", 0.0), ratio[inside].max().item())
    metrics["policy/ratio_max"] = largest


def note_sample(metrics, sample):
    """Reward, group and response metrics of one question. What is undefined for it is absent."""
    parts, record = sample["parts"], sample["record"]
    for name in ("accuracy", "format", "length", "temporal"):
        if name in parts:
            note(metrics, f"reward/{name}", parts[name].tolist())
    note(metrics, "reward/total", sample["R"].tolist())
    note(metrics, f"accuracy/{record['problem_type']}", parts["accuracy"].tolist())
    note(metrics, "group/p", [parts["p"]])
    note(metrics, "group/zero_std_rate", [float(sample["R"].std() < STD_EPSILON)])
    if "p_tilde" in parts:
        note(metrics, "group/p_tilde", [parts["p_tilde"]])
        note(metrics, "group/tie_rate", [float(parts["p"] == parts["p_tilde"])])
        if parts["p"] > 0:  # with no correct response there is nothing to reward
            note(metrics, "group/temporal_rate", [float(parts["r_t"] > 0)])
    tokens = sample["mask"].sum(1).tolist()
    note(metrics, "response/tokens", tokens)
    note(metrics, "response/truncated_rate", sample["truncated"])
    note(metrics, "data/video_share", [float(record["data_type"] == "video")])


def rollout_row(sample):
    """One question of rollouts.jsonl."""
    parts = {name: value.tolist() if torch.is_tensor(value) else value
             for name, value in sample["parts"].items()}
    return {"problem_id": sample["record"]["problem_id"], "path": sample["record"]["path"],
            "frame_order": sample.get("frame_order"), "responses": sample["texts"],
            "responses_shuffled": sample["texts_shuffled"], **parts,
            "R": sample["R"].tolist(), "A": sample["A"].tolist()}


def describe(sample):
    """Prints the true size of a first sample: limits that act elsewhere are found here."""
    inputs = sample["ordered"]
    grid = inputs.get("video_grid_thw", inputs.get("image_grid_thw"))[0].tolist()
    tqdm.write(f"first {sample['record']['data_type']}: {grid[0]} x {grid[1]} x {grid[2]} patches "
               f"of 14 x 14 pixels (time x height x width), "
               f"{int((inputs['mm_token_type_ids'] > 0).sum())} visual tokens, "
               f"{inputs['input_ids'].shape[1]} prompt tokens")


def report(args, engine, logs, step, metrics, samples, skipped, clock, bar, finite, received):
    """Merges the ranks' metrics and writes the step's lines; collective. Returns each rank's
    (metrics, rollouts, skipped, received)."""
    rollouts = [rollout_row(sample) for sample in samples] \
        if step % args.rollout_steps == 0 or not finite else []
    for name, start, end in zip(("data", "rollout", "update"), clock, clock[1:]):
        note(metrics, f"time/{name}", [end - start])
    note(metrics, "time/step", [time.perf_counter() - clock[0]])
    gathered = gather_objects((metrics, rollouts, skipped, received))
    if not logs:
        return gathered
    merged = {}
    ratios = [rank_metrics.pop("policy/ratio_max") for rank_metrics, *_ in gathered
              if "policy/ratio_max" in rank_metrics]
    for rank_metrics, *_ in gathered:
        for name, (total, count) in rank_metrics.items():
            note(merged, name, [total], count)
    row = {name: total / count for name, (total, count) in merged.items()}
    if ratios:
        row["policy/ratio_max"] = max(ratios)
    row |= {"optim/learning_rate": learning_rate(step, args),
            "data/skipped": sum(len(rank_skipped) for _, _, rank_skipped, _ in gathered)}
    norm = engine.get_global_grad_norm() if finite and "optim/loss" in row else None
    if norm is not None:  # DeepSpeed keeps none at stage 0 in fp32
        row["optim/grad_norm"] = float(norm)
    for _, rank_rollouts, rank_skipped, _ in gathered:
        for name, lines in (("rollouts", rank_rollouts), ("skipped", rank_skipped)):
            for line in lines:
                logs[name].write(json.dumps({"step": step + 1, **line}) + "\n")
    logs["metrics"].write(json.dumps({"step": step + 1, **dict(sorted(row.items()))}) + "\n")
    engine.monitor.write_events([(name, value, step + 1) for name, value in row.items()])
    bar.set_postfix({name: f"{row[key]:.3f}" for name, key in
                     (("reward", "reward/total"), ("accuracy", "reward/accuracy"),
                      ("kl", "policy/kl")) if key in row})
    bar.update()
    return gathered


def main(args):
    # ------------------------------------------------------------- records, models, engine
    check_limits(args)
    records = load_records(args.data, args.media_root)
    config = read_deepspeed_config(args)
    processor = load_processor(args)
    tokenizer = processor.tokenizer
    rank, device = setup_distributed(args)
    world = dist.get_world_size()
    received = stop_on_sigterm()
    identity = run_identity(args, config, records)
    first_step = open_output(args, identity)
    model = load_model(args, config)
    model.model.visual.requires_grad_(not args.freeze_vision)
    args.chunk_size = args.chunk_size or chunk_that_fits(model, args)
    eos_ids, forbidden_ids = stop_tokens(model, tokenizer), forbidden_tokens(model, tokenizer)
    engine = start_engine(model, args, config)
    engine.train()
    infinite = watch_gradients(engine.module, device)
    sampler = engine.module
    if engine.zero_optimization_partition_weights():  # ZeRO-3: sampling needs whole weights
        sampler = sampling_copy(engine.module, args, device)
    decode_step = torch.compile(decode, dynamic=True) if args.compile else decode
    reference = start_reference(args, config) if args.beta else None
    if first_step:
        engine.load_checkpoint(str(Path(args.output) / f"checkpoint-{first_step}"), tag="state")

    # ------------------------------------------------------------------------- data order
    per_step = args.prompts_per_rank
    positions = [(step * world + rank) * per_step + i
                 for step in range(first_step, args.max_steps) for i in range(per_step)]
    loader = iter(DataLoader(
        Questions(records, processor, args), sampler=positions, batch_size=per_step,
        collate_fn=list, num_workers=args.num_workers,
        prefetch_factor=2 if args.num_workers else None, pin_memory=device.type != "cpu",
        worker_init_fn=leave_sigterm_to_main))
    blank = {"ordered": encode_blank(processor), "A": torch.zeros(args.G),
             "responses": torch.full((args.G, 1), eos_ids[0], device=device),
             "mask": torch.ones(args.G, 1, device=device),
             "lengths": torch.ones(args.G, dtype=torch.int64)}
    skipped_count = skipped_before(args, first_step)
    dist.barrier()  # all have counted before the log is rewritten
    logs = {name: open_log(args, name, first_step)
            for name in ("metrics", "rollouts", "skipped")} if rank == 0 else {}

    # ------------------------------------------------------------------------------- loop
    bar = tqdm(total=args.max_steps, initial=first_step, desc="tgrpo", disable=rank != 0)
    for step in range(first_step, args.max_steps):
        clock, metrics = [time.perf_counter()], {}
        # 1. questions, decoded and encoded ahead of need by the workers
        drawn = next(loader)
        samples = [sample for sample in drawn if "record" in sample]
        skipped = [sample for sample in drawn if "record" not in sample]
        if step == first_step and samples and rank == 0:
            describe(samples[0])
        clock.append(time.perf_counter())
        # 2. responses to ordered and shuffled frames
        if sampler is not engine.module:
            gather_weights(engine, sampler)
        generator = seeded_generator(ROLLOUT_STREAM, args.seed, step, rank, device=device)
        sample_responses(sampler, samples, args, generator, eos_ids, forbidden_ids, decode_step)
        # 3. to 5. rewards and advantages
        for sample in samples:
            grade_group(sample, tokenizer, eos_ids, args)
            note_sample(metrics, sample)
        clock.append(time.perf_counter())
        # 6. clipped update; every group counts the same, on whichever rank it is
        groups = sum(gather_objects(len(samples)))
        for group in engine.optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        finite = not groups or update(engine, reference, samples, blank, world / groups, args,
                                      metrics, infinite)
        clock.append(time.perf_counter())
        # metrics, logs, checkpoint
        gathered = report(args, engine, logs, step, metrics, samples, skipped, clock, bar, finite,
                          len(received))
        skipped_count += sum(len(rank_skipped) for _, _, rank_skipped, _ in gathered)
        if not finite:
            if step and args.updates_per_rollout == 1:
                save_checkpoint(engine, args, step, identity)  # the weights before this step
            ids = [row["problem_id"] for _, rows, _, _ in gathered for row in rows]
            raise InputError(f"step {step + 1}: the loss or a gradient is not finite; problem_ids "
                             f"{ids}, see the last lines of {args.output}/rollouts.jsonl. "
                             "--resume would come to this step again: change what makes it so, and "
                             "start another --output from the last checkpoint's weights (README, "
                             "'When something breaks')")
        check_skipped(args, skipped_count, (step + 1) * per_step * world)
        stop = any(count for *_, count in gathered)
        if stop or args.save_steps and (step + 1) % args.save_steps == 0:
            save_checkpoint(engine, args, step + 1, identity)
        if stop:
            if rank == 0:
                tqdm.write(f"stopped by SIGTERM after step {step + 1}: the same command with "
                           "--resume continues")
            return
    bar.close()
    save_model(engine, processor, args.output)


if __name__ == "__main__":
    try:
        main(parse_args())
    except InputError as error:
        sys.exit(f"tgrpo.py: {error}")
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        sys.exit(f"tgrpo.py: {error}. Checkpoints are whole: make room and continue with --resume")
