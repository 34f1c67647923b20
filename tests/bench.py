"""Speed and memory of a T-GRPO step beside the naive form, on this machine.

    python tests/bench.py                                     # about 20 minutes on 2 CPU cores
    python tests/bench.py --ablate                            # each idea turned off
    python tests/bench.py --hidden 2048 --heads 16 --kv_heads 2 --mlp 11008 --layers 2 \\
        --vision_hidden 1280 --vision_depth 4 --vision_mlp 3420 --vocabulary 151936  # 3B's layers

Naive is what earlier systems do: two `generate` calls with num_return_sequences for the rollout;
policy and reference run over G full copies of prompt, pixels and response; one backward through
the policy's. Both forms are timed in turn on the same random Qwen2.5-VL, the same prompts and
responses; every number is the median of --repeats turns. No response ends early, so what rows
that leave the batch save is not in here. Memory is the growth of a process of its own during one
update (maximum resident set on CPU, maximum allocated on an accelerator).
"""
import argparse
import functools
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from deepspeed.accelerator import get_accelerator
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tgrpo  # noqa: E402
from build_data import (PATCH, TEMPLATE, Vision, encode, pad_batch, seeded_generator,  # noqa: E402
                        toy_model, toy_processor, toy_tokenizer)

BETA, EPSILON = 0.04, 0.2  # tgrpo.py's defaults
UNUSED = -1  # an end token that no row can sample: every response gets its full length
MIB = 2**20


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    # the model: about 10 million parameters
    add("--hidden", type=int, default=256, help="width of the language model")
    add("--layers", type=int, default=8, help="layers of the language model")
    add("--heads", type=int, default=4, help="query heads of the language model")
    add("--kv_heads", type=int, default=2, help="key and value heads of the language model")
    add("--mlp", type=int, default=1024, help="width of the language model's MLP")
    add("--vision_hidden", type=int, default=160, help="width of the vision tower")
    add("--vision_depth", type=int, default=4, help="layers of the vision tower")
    add("--vision_mlp", type=int, default=480, help="width of the vision tower's MLP")
    add("--vocabulary", type=int, default=4096, help="tokens of the vocabulary")
    add("--dtype", default="float32", help="float32 or bfloat16")
    # the step
    add("--frames", type=int, nargs="+", default=[16, 32, 64], help="frames of the video")
    add("--height", type=int, default=8, help="of a frame, in units of 28 pixels")
    add("--width", type=int, default=9, help="of a frame, in units of 28 pixels")
    add("--prompts", type=int, nargs="+", default=[1, 2, 4], help="prompts of a rank")
    add("--G", type=int, default=8, help="responses to the ordered frames")
    add("--G_tilde", type=int, default=4, help="responses to the shuffled frames")
    add("--max_new_tokens", type=int, default=256, help="tokens of a response")
    add("--chunk_size", type=int, default=8, help="responses of one forward and backward")
    # the measurement
    add("--repeats", type=int, default=3, help="turns; medians are reported")
    add("--json", help="file for the results")
    add("--ablate", action="store_true", help="rollout and update with one idea turned off")
    add("--seed", type=int, default=0, help="seed of weights, frames and responses")
    add("--memory_of", choices=("naive", "ours", "autograd"),
        help="internal: measure one form's memory")
    return parser.parse_args()


# ------------------------------------------------------------------------- the naive form

def naive_rollout(model, prompt, args):
    """(G + G_tilde) x L tokens by two calls of generate, each with copies of one prompt."""
    for inputs, count in zip(prompt, (args.G, args.G_tilde)):
        model.generate(**inputs, num_return_sequences=count, do_sample=True, top_k=0, top_p=1.0,
                       max_new_tokens=args.max_new_tokens, min_new_tokens=args.max_new_tokens)


def naive_logits(model, inputs, responses):
    """Logits (n, L, V) of a plain forward over n full copies of prompt, pixels and response."""
    n, L = responses.shape
    P = inputs["input_ids"].shape[1]
    batch = {key: torch.cat([value] * n) for key, value in inputs.items()}
    batch["input_ids"] = torch.cat([batch["input_ids"], responses], 1)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["mm_token_type_ids"] = F.pad(batch["mm_token_type_ids"], (0, L))
    return model(**batch, use_cache=False).logits[:, P - 1:-1]


def naive_logps(model, inputs, responses):
    return naive_logits(model, inputs, responses).float().log_softmax(-1).gather(
        -1, responses[..., None])[..., 0]  # (n, L)


def naive_backward(model, inputs, responses, A, ref):
    logps = naive_logps(model, inputs, responses)
    mask = torch.ones_like(logps)
    tgrpo.tgrpo_loss(logps, logps.detach(), ref, A, mask, BETA, EPSILON).backward()


# ----------------------------------------------------------------------------------- ours

class PlainEngine:
    """What backward_group asks of DeepSpeed's engine, for one process."""

    def __init__(self, module):
        self.module = module

    def __call__(self, **inputs):
        return self.module(**inputs)

    def backward(self, loss):
        loss.backward()

    def set_gradient_accumulation_boundary(self, last):
        pass


def our_rollout(model, prompts, args, generator, decode=tgrpo.decode):
    """The same tokens for several prompts in one decode."""
    both = [pad_batch(prompt, {}, "left") for prompt in prompts]
    tgrpo.rollout(model, both, [[args.G, args.G_tilde]] * len(both), temperature=1.0, top_p=1.0,
                  max_new_tokens=args.max_new_tokens, eos_ids=[UNUSED], forbidden_ids=[],
                  generator=generator, decode=decode)


def our_backward(model, inputs, responses, A, ref, chunk_size):
    def loss(rows, logps, entropy):
        mask = torch.ones_like(logps)
        return tgrpo.tgrpo_loss(logps, logps.detach(), ref[rows], A[rows], mask, BETA,
                                EPSILON) * len(rows) / len(A)
    tgrpo.backward_group(PlainEngine(model), inputs, responses, whole(responses), loss,
                         chunk_size, 1.0, last=True)


def whole(responses):
    """The lengths (G,) of responses none of which ended early."""
    return torch.full((len(responses),), responses.shape[1])


# ---------------------------------------------------------------------------- measurement

class Case:
    """Model, prompts and responses of a measurement; `like`: another one with the same model."""

    def __init__(self, args, frames, prompts=1, like=None):
        self.args, self.frames = args, frames
        self.device = get_accelerator().current_device_name()
        tokenizer = toy_tokenizer([TEMPLATE] * 2)
        self.model = like.model if like else self.random_model(tokenizer)
        generator = seeded_generator(args.seed)
        record = {"problem": "Which way does it move?", "problem_type": "free-form",
                  "data_type": "video", "media_path": ""}
        metadata = {"fps": 2.0, "frames_indices": list(range(frames)), "total_num_frames": frames}
        size = (frames, 3, PATCH * args.height, PATCH * args.width)
        self.prompts = []
        for _ in range(prompts):
            video = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)
            self.prompts.append([encode(toy_processor(tokenizer), record,
                                        Vision(order, metadata, None), self.device)
                                 for order in (video, tgrpo.shuffle_frames(video, generator))])
        self.inputs = self.prompts[0][0]
        self.responses = torch.randint(0, len(tokenizer) // 2, (args.G, args.max_new_tokens),
                                       generator=generator).to(self.device)
        self.A = torch.randn(args.G, generator=generator).to(self.device)
        self.ref = torch.zeros(args.G, args.max_new_tokens, device=self.device) - 5
        self.generator = seeded_generator(args.seed, device=self.device)

    def random_model(self, tokenizer):
        args = self.args
        model = toy_model(tokenizer, args.seed, args.hidden, args.layers, args.heads,
                          args.kv_heads, args.mlp, args.vision_hidden, args.vision_depth,
                          args.vision_mlp)
        model.resize_token_embeddings(args.vocabulary, mean_resizing=False)
        return model.to(self.device, getattr(torch, args.dtype))

    def actions(self):
        """{name: (naive, ours)}, each a function of one question but the rollout: of all."""
        chunk = self.args.chunk_size
        policy = (self.model, self.inputs, self.responses)
        return {
            "rollout": (lambda: [naive_rollout(self.model, p, self.args) for p in self.prompts],
                        lambda: our_rollout(self.model, self.prompts, self.args, self.generator)),
            "logps": (lambda: torch.no_grad()(naive_logps)(*policy),
                      lambda: tgrpo.group_logps(*policy, whole(self.responses), chunk)),
            "backward": (lambda: naive_backward(*policy, self.A, self.ref),
                         lambda: our_backward(*policy, self.A, self.ref, chunk))}


def seconds(function):
    get_accelerator().synchronize()
    start = time.perf_counter()
    function()
    get_accelerator().synchronize()
    return time.perf_counter() - start


def medians(cases, repeats):
    """For each case {name: (naive, ours)}: median seconds. All take turns, so that what else the
    machine does falls on all of them; after one turn to warm up."""
    actions = [case.actions() for case in cases]
    times = [{name: ([], []) for name in pairs} for pairs in actions]
    for turn in tqdm(range(repeats + 1), desc="turns"):
        for pairs, kept in zip(actions, times):
            for name, forms in pairs.items():
                for i, form in enumerate(forms):
                    elapsed = seconds(form)
                    if turn:
                        kept[name][i].append(elapsed)
    return [{name: tuple(map(statistics.median, kept[name])) for name in kept} for kept in times]


def resident_maximum():
    """Bytes: this process's peak resident set (Linux)."""
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def peak_memory(args):
    """Bytes that one update (reference log-probs, forward, backward) adds at its peak."""
    case = Case(args, args.frames[0])
    actions = case.actions()
    if args.memory_of == "autograd":
        tgrpo.token_logps = autograd_logps
    case.model.requires_grad_(True)
    for p in case.model.parameters():
        p.grad = torch.zeros_like(p)  # both forms need them
    accelerator = get_accelerator()
    on_cpu = accelerator.device_name() == "cpu"
    if on_cpu:
        Path("/proc/self/clear_refs").write_text("5")  # the maximum starts anew from here
        start = resident_maximum()
    else:
        accelerator.reset_peak_memory_stats()
        start = accelerator.memory_allocated()
    for name in ("logps", "backward"):
        actions[name][args.memory_of != "naive"]()
    if on_cpu:
        return resident_maximum() - start
    return accelerator.max_memory_allocated() - start


def memory_of(form, frames):
    """peak_memory() of one form, in a process of its own with the same flags."""
    command = [sys.executable, *sys.argv, "--memory_of", form, "--frames", str(frames)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(said.split()[-1])


# ---------------------------------------------------------------------------------- table

def row(case, times, memory):
    """One line of the table: seconds, ratios and megabytes, from a case's median times."""
    args, prompts = case.args, len(case.prompts)
    result = {"frames": case.frames, "prompts": prompts,
              "prompt_tokens": case.inputs["input_ids"].shape[1]}
    tokens = prompts * (args.G + args.G_tilde) * args.max_new_tokens
    for name, (naive, ours) in times.items():
        result |= {f"{name}_naive_s": naive, f"{name}_s": ours, f"{name}_ratio": naive / ours}
    result["tokens_per_s_naive"], result["tokens_per_s"] = (tokens / t for t in times["rollout"])
    # a step: the rollout of all prompts; log-probs of the reference and an update for each
    steps = [times["rollout"][i] + prompts * (times["logps"][i] + times["backward"][i])
             for i in (0, 1)]
    result |= {"step_naive_s": steps[0], "step_s": steps[1], "step_ratio": steps[0] / steps[1]}
    if memory:
        result |= {"memory_naive_mb": memory[0] / MIB, "memory_mb": memory[1] / MIB,
                   "memory_ratio": memory[0] / memory[1]}
    return result


def copied_prefill(model, prompts, counts):
    """tgrpo.prefill with a copy of its prompt for every row, as generate makes it."""
    cache, logits, position = PREFILL(model, prompts, counts)
    rows = torch.tensor([s for s, count in enumerate(counts) for _ in range(count)],
                        device=logits.device)
    layers = [(keys[rows], values[rows]) for keys, values in cache.prompts]
    mask = torch.ones(len(rows), layers[0][1].shape[2], device=logits.device)
    return tgrpo.GroupCache(layers, mask, [1] * len(rows)), logits, position


def autograd_logps(logits, responses, temperature):
    """tgrpo.token_logps without a gradient of its own, nor pieces."""
    log_probs = (logits.float() / temperature).log_softmax(-1)  # (n, L, V)
    logps = log_probs.gather(-1, responses[..., None])[..., 0]  # (n, L)
    return logps, -(log_probs.exp() * log_probs).sum(-1).detach()


PREFILL, BLOCK, TOKEN_LOGPS = tgrpo.prefill, tgrpo.BLOCK, tgrpo.token_logps


def two_rollouts(model, prompts, args, generator):
    """Ordered and shuffled rows one after the other, prompt by prompt."""
    for prompt in prompts:
        for inputs, count in zip(prompt, (args.G, args.G_tilde)):
            tgrpo.rollout(model, [inputs], [[count]], temperature=1.0, top_p=1.0,
                          max_new_tokens=args.max_new_tokens, eos_ids=[UNUSED], forbidden_ids=[],
                          generator=generator)


def ablate(args):
    """Prints the update's seconds and memory with each idea turned off, then the rollout's tokens
    a second, for 1 and more prompts."""
    print("| turned off | forward + backward, s | memory, MB |\n|---|---|---|")
    first = Case(args, args.frames[0])
    naive, ours = first.actions()["backward"]
    for name, form, logps, function in (
            ("nothing", "ours", TOKEN_LOGPS, ours),
            ("the logits' gradient by hand, in pieces", "autograd", autograd_logps, ours),
            ("the prompt run once for its group", "naive", TOKEN_LOGPS, naive)):
        tgrpo.token_logps = logps
        times = [seconds(function) for _ in range(args.repeats + 1)][1:]
        memory = memory_of(form, args.frames[0]) / MIB
        print(f"| {name} | {statistics.median(times):.2f} | {memory:.0f} |", flush=True)
    tgrpo.token_logps = TOKEN_LOGPS
    print("\n| turned off | " + " | ".join(f"{p} prompts, tok/s" for p in args.prompts)
          + " |\n|---" + "|---" * len(args.prompts) + "|")
    cases = [Case(args, args.frames[0], prompts, like=first) for prompts in args.prompts]
    compiled = functools.partial(our_rollout, decode=torch.compile(tgrpo.decode, dynamic=True))
    for name, prefill, block, function in (
            ("nothing", PREFILL, BLOCK, our_rollout),
            ("nothing, with --compile", PREFILL, BLOCK, compiled),
            ("one copy of a prompt for all its rows", copied_prefill, BLOCK, our_rollout),
            ("buffers that grow in blocks", PREFILL, 1, our_rollout),
            ("all orders and prompts in one decode", PREFILL, BLOCK, two_rollouts)):
        tgrpo.prefill, tgrpo.BLOCK = prefill, block
        rates = []
        for case, prompts in zip(cases, args.prompts):
            times = [seconds(lambda: function(case.model, case.prompts, args, case.generator))
                     for _ in range(args.repeats + 1)][1:]
            tokens = prompts * (args.G + args.G_tilde) * args.max_new_tokens
            rates.append(f"{tokens / statistics.median(times):.0f}")
        print(f"| {name} | " + " | ".join(rates) + " |", flush=True)


def main():
    args = parse_args()
    if args.memory_of:
        print(peak_memory(args))
        return
    if args.ablate:
        ablate(args)
        return
    cases = [(args.frames[0], prompts) for prompts in args.prompts] + \
        [(frames, 1) for frames in args.frames[1:]]
    # memory first: the naive form's gigabytes should not stand beside those of this process
    memory = [[memory_of(form, frames) for form in ("naive", "ours")] if prompts == 1 else []
              for frames, prompts in cases]
    first = Case(args, *cases[0])
    cases = [first] + [Case(args, *case, like=first) for case in cases[1:]]
    results = list(map(row, cases, medians(cases, args.repeats), memory))
    head = ("frames", "prompts", "tokens", "rollout tok/s", "x", "log-probs s", "x", "fwd+bwd s",
            "x", "step s", "x", "memory MB", "x")
    print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
    for result in results:
        cells = [f"{result[key]}" for key in ("frames", "prompts", "prompt_tokens")]
        for value, ratio, digits in (
                ("tokens_per_s", "rollout_ratio", 0), ("logps_s", "logps_ratio", 2),
                ("backward_s", "backward_ratio", 2), ("step_s", "step_ratio", 2),
                ("memory_mb", "memory_ratio", 0)):
            cells += [f"{result[value]:.{digits}f}", f"{result[ratio]:.1f}"] \
                if value in result else ["", ""]
        print("| " + " | ".join(cells) + " |")
    if args.json:
        report = {"arguments": vars(args), "torch": torch.__version__,
                  "device": get_accelerator().device_name(),
                  "threads": torch.get_num_threads(),
                  "results": results}
        Path(args.json).write_text(json.dumps(report, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
