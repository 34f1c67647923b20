"""Speed and memory of a T-GRPO step beside the naive form, on this machine.

    python tests/bench.py                                     # about 12 minutes on 2 CPU cores
    python tests/bench.py --ablate                            # each idea turned off
    python tests/bench.py --hidden 2048 --heads 16 --kv_heads 2 --mlp 11008 --layers 2 \\
        --vision_hidden 1280 --vision_depth 4 --vision_mlp 3420 --vocabulary 151936  # 3B's layers

Naive is what earlier systems do: two `generate` calls with num_return_sequences for the rollout;
policy and reference run over G full copies of prompt, pixels and response; one backward through
the policy's. All forms work on the same random Qwen2.5-VL, the same prompts and responses. Each
has a process of its own, as in use, so that none works in the memory that another has cut up. The
processes with the same number of frames take turns; every number is the median of --repeats turns.
No response ends early, so what rows that leave the batch save is not in here. Memory is the growth
of a form's process during its first update (maximum resident set on CPU, maximum allocated on an
accelerator).

    python tests/bench.py memory --model Qwen2.5-VL-7B --lora_rank 16 \\
        --deepspeed_config assets/one_gpu.json

computes what a run of tgrpo.py needs on a card and on the host, from the model's shape and the
run's own flags: nothing is measured there.
"""
import argparse
import functools
import json
import math
import multiprocessing
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from deepspeed.accelerator import get_accelerator
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForImageTextToText

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import sft  # noqa: E402
import tgrpo  # noqa: E402
from build_data import (PATCH, TEMPLATE, Vision, encode, pad_batch, seeded_generator,  # noqa: E402
                        toy_model, toy_processor, toy_tokenizer)

BETA, EPSILON = 0.04, 0.2  # tgrpo.py's defaults
UNUSED = -1  # an end token that no row can sample: every response gets its full length
MIB = 2**20


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    # the model: 11 million parameters; MLP and vision tower have about the same share of the work
    # on a video's tokens as in Qwen2.5-VL-3B
    add("--hidden", type=int, default=320, help="width of the language model")
    add("--layers", type=int, default=4, help="layers of the language model")
    add("--heads", type=int, default=5, help="query heads of the language model")
    add("--kv_heads", type=int, default=1, help="key and value heads of the language model")
    add("--mlp", type=int, default=1720, help="width of the language model's MLP")
    add("--vision_hidden", type=int, default=160, help="width of the vision tower")
    add("--vision_depth", type=int, default=5, help="layers of the vision tower")
    add("--vision_mlp", type=int, default=428, help="width of the vision tower's MLP")
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
    add("--repeats", type=int, default=5, help="turns; medians are reported")
    add("--json", help="file for the results")
    add("--ablate", nargs="*", choices=ABLATIONS,
        help="update and rollout with one idea turned off: each of these, or all")
    add("--seed", type=int, default=0, help="seed of weights, frames and responses")
    return parser.parse_args(argv)


# ------------------------------------------------------------------------- the naive form

def naive_rollout(model, prompt, args):
    """(G + G_tilde) x L tokens by two calls of generate, each with copies of one prompt."""
    for inputs, count in zip(prompt, (args.G, args.G_tilde)):
        model.generate(**inputs, num_return_sequences=count, do_sample=True, top_k=0, top_p=1.0,
                       max_new_tokens=args.max_new_tokens, min_new_tokens=args.max_new_tokens)


def naive_forward(model, inputs, responses):
    """ids (n, P + L) and logits (n, P + L, V) over n full copies of prompt, pixels and response."""
    n, L = responses.shape
    batch = {key: torch.cat([value] * n) for key, value in inputs.items()}
    batch["input_ids"] = torch.cat([batch["input_ids"], responses], 1)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["mm_token_type_ids"] = F.pad(batch["mm_token_type_ids"], (0, L))
    return batch["input_ids"], model(**batch, use_cache=False).logits


def naive_logits(model, inputs, responses):
    """Logits (n, L, V) that predict each response token."""
    return naive_forward(model, inputs, responses)[1][:, -responses.shape[1] - 1:-1]


def naive_logps(model, inputs, responses):
    """(n, L): those of all tokens, row by row, of which the responses' are kept, as in the
    released code (_get_per_token_logps of its grpo_trainer.py)."""
    ids, logits = naive_forward(model, inputs, responses)
    logps = [row[:-1].float().log_softmax(-1).gather(1, chosen[1:, None])[:, 0]
             for chosen, row in zip(ids, logits)]  # n times (P + L - 1,)
    return torch.stack(logps)[:, -responses.shape[1]:]


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


def our_rollout(model, prompts, args, generator):
    """The same tokens for several prompts in one decode."""
    both = [pad_batch(prompt, {}, "left") for prompt in prompts]
    tgrpo.rollout(model, both, [[args.G, args.G_tilde]] * len(both), temperature=1.0, top_p=1.0,
                  max_new_tokens=args.max_new_tokens, eos_ids=[UNUSED], generator=generator)


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


# ------------------------------------------------------------- ours with one idea turned off

def autograd_logps(logits, responses, temperature):
    """tgrpo.token_logps all at once: autograd keeps what the backward pass needs."""
    log_probs = (logits.float() / temperature).log_softmax(-1)  # (n, L, V)
    return log_probs.gather(-1, responses[..., None])[..., 0]  # (n, L)


def separate_rollouts(model, prompts, args, generator):
    """Ordered and shuffled rows one after the other, prompt by prompt."""
    for prompt in prompts:
        for inputs, count in zip(prompt, (args.G, args.G_tilde)):
            tgrpo.rollout(model, [inputs], [[count]], temperature=1.0, top_p=1.0,
                          max_new_tokens=args.max_new_tokens, eos_ids=[UNUSED],
                          generator=generator)


ABLATIONS = {  # form: what is measured, the idea that it does without, what it changes in tgrpo
    "autograd": ("backward", "log-probabilities again in the backward pass, in pieces",
                 {"token_logps": autograd_logps}),
    "naive": ("backward", "the prompt run once for its group", {}),
    "recompute": ("backward", "activations kept for the backward pass: --gradient_checkpointing",
                  {}),
    "separate": ("rollout", "all orders and prompts in one decode", {})}


# ------------------------------------------------------------------------------ the forms

class Case:
    """A random model, prompts of so many frames, and responses to the first of them."""

    def __init__(self, args, frames, prompts=1):
        self.args = args
        self.device = get_accelerator().current_device_name()
        tokenizer = toy_tokenizer([TEMPLATE] * 2)
        self.model = self.random_model(tokenizer)
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
        torch.manual_seed(args.seed)  # the words that it adds are random
        model.resize_token_embeddings(args.vocabulary, mean_resizing=False)
        return model.to(self.device, getattr(torch, args.dtype))

    def actions(self, form):
        """{name: function} of "ours" or one of ABLATIONS: log-probs and update of one question,
        the rollout of all. What the form changes in tgrpo is changed for the whole process."""
        policy = (self.model, self.inputs, self.responses)
        if form == "naive":
            return {
                "rollout": lambda: [naive_rollout(self.model, p, self.args) for p in self.prompts],
                "logps": lambda: torch.no_grad()(naive_logps)(*policy),
                "backward": lambda: naive_backward(*policy, self.A, self.ref)}
        if form in ABLATIONS:
            for name, value in ABLATIONS[form][2].items():
                setattr(tgrpo, name, value)
        if form == "recompute":
            tgrpo.recompute_activations(self.model)
        rollout = separate_rollouts if form == "separate" else our_rollout
        chunk = self.args.chunk_size
        return {
            "rollout": lambda: rollout(self.model, self.prompts, self.args, self.generator),
            "logps": lambda: tgrpo.group_logps(*policy, whole(self.responses), chunk),
            "backward": lambda: our_backward(*policy, self.A, self.ref, chunk)}


# ---------------------------------------------------------------------------- measurement

class Worker:
    """A process that has one form of one case: worker(action) runs it there, and returns its
    seconds; for "memory" bytes, for "prompt_tokens" their number."""

    def __init__(self, args, form, frames, prompts=1):
        spawn = multiprocessing.get_context("spawn")  # a fork would inherit this one's threads
        self.pipe, theirs = spawn.Pipe()
        self.process = spawn.Process(target=serve, args=(theirs, args, form, frames, prompts),
                                     name=f"{form!r}, {frames} frames", daemon=True)
        self.process.start()
        theirs.close()  # now its end is seen here, too

    def __call__(self, action):
        try:
            self.pipe.send(action)
            return self.pipe.recv()
        except (EOFError, OSError):
            sys.exit(f"the process of {self.process.name} has ended: see its error above; without "
                     "one it was killed, likely for memory: lower --G, --frames or --vocabulary")

    def stop(self):
        self.pipe.close()
        self.process.join()


def serve(pipe, args, form, frames, prompts):
    """The work of a Worker's process: until the other end closes the pipe."""
    case = Case(args, frames, prompts)
    actions = case.actions(form)
    answers = {"memory": lambda: peak_memory(case.model, actions),
               "prompt_tokens": lambda: case.inputs["input_ids"].shape[1]}
    answers |= {name: functools.partial(seconds, action) for name, action in actions.items()}
    try:
        while True:
            pipe.send(answers[pipe.recv()]())
            get_accelerator().empty_cache()  # the other processes need the room
    except EOFError:
        pass


def seconds(function):
    get_accelerator().synchronize()
    start = time.perf_counter()
    function()
    get_accelerator().synchronize()
    return time.perf_counter() - start


def medians(work, repeats):
    """{key: median seconds} of {key: (worker, action)}. All take turns, so that what else the
    machine does falls on all of them; after one turn to warm up."""
    times = {key: [] for key in work}
    for turn in tqdm(range(repeats + 1), desc="turns"):
        for key, (worker, action) in work.items():
            elapsed = worker(action)
            if turn:
                times[key].append(elapsed)
    return {key: statistics.median(kept) for key, kept in times.items()}


def resident_maximum():
    """Bytes: this process's peak resident set (Linux)."""
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def peak_memory(model, actions):
    """Bytes that one update (reference log-probs, forward, backward) adds at its peak."""
    for p in model.parameters():
        p.grad = torch.zeros_like(p)  # all forms need them
    accelerator = get_accelerator()
    on_cpu = accelerator.device_name() == "cpu"
    if on_cpu:
        Path("/proc/self/clear_refs").write_text("5")  # the maximum starts anew from here
        start = resident_maximum()
    else:
        accelerator.reset_peak_memory_stats()
        start = accelerator.memory_allocated()
    for name in ("logps", "backward"):
        actions[name]()
    return (resident_maximum() if on_cpu else accelerator.max_memory_allocated()) - start


# --------------------------------------------------------------------------------- tables

def measure(args, frames, prompts):
    """Lines of the table for so many frames: a dictionary for each number of prompts."""
    one = {form: Worker(args, form, frames) for form in ("naive", "ours")}
    memory = {form: worker("memory") / MIB for form, worker in one.items()}  # still fresh
    work = {(action, form): (worker, action) for form, worker in one.items()
            for action in ("rollout", "logps", "backward")}
    work |= {("rollout", p): (Worker(args, "ours", frames, p), "rollout")
             for p in prompts if p > 1}
    times = medians(work, args.repeats)
    length = one["ours"]("prompt_tokens")
    for worker, _ in work.values():
        worker.stop()
    return [{"frames": frames, "prompts": p, "prompt_tokens": length,
             **line(args, p, times, memory)} for p in prompts]


def line(args, prompts, times, memory):
    """Seconds, ratios and megabytes of a step with so many prompts."""
    # the naive form, and in both log-probs and update, take one prompt after the other
    taken = {"rollout": (prompts * times["rollout", "naive"],
                         times["rollout", "ours" if prompts == 1 else prompts])}
    taken |= {action: (times[action, "naive"], times[action, "ours"])
              for action in ("logps", "backward")}
    taken["step"] = tuple(rollout + prompts * (logps + backward)
                          for rollout, logps, backward in zip(*taken.values()))
    result = {}
    for name, (naive, ours) in taken.items():
        result |= {f"{name}_naive_s": naive, f"{name}_s": ours, f"{name}_ratio": naive / ours}
    tokens = prompts * (args.G + args.G_tilde) * args.max_new_tokens
    result["tokens_per_s_naive"], result["tokens_per_s"] = (tokens / t for t in taken["rollout"])
    if prompts == 1:
        result |= {"memory_naive_mb": memory["naive"], "memory_mb": memory["ours"],
                   "memory_ratio": memory["naive"] / memory["ours"]}
    return result


def print_table(results):
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


def ablate(args):
    """Prints the update's seconds and memory with each idea turned off, then the rollout's tokens
    a second, for each number of prompts."""
    for action, print_rows in (("backward", ablate_update), ("rollout", ablate_rollout)):
        names = {form: name for form, (of, name, _) in ABLATIONS.items()
                 if of == action and (not args.ablate or form in args.ablate)}
        if names:
            print_rows(args, {"ours": "nothing", **names})


def ablate_update(args, names):
    workers = {form: Worker(args, form, args.frames[0]) for form in names}
    memory = {form: worker("memory") for form, worker in workers.items()}  # still fresh
    times = medians({form: (worker, "backward") for form, worker in workers.items()}, args.repeats)
    for worker in workers.values():
        worker.stop()
    print("| turned off | forward + backward, s | memory, MB |\n|---|---|---|")
    for form, name in names.items():
        print(f"| {name} | {times[form]:.2f} | {memory[form] / MIB:.0f} |", flush=True)


def ablate_rollout(args, names):
    times = medians({(form, prompts): (Worker(args, form, args.frames[0], prompts), "rollout")
                     for form in names for prompts in args.prompts}, args.repeats)
    print("\n| turned off | " + " | ".join(f"{p} prompts, tok/s" for p in args.prompts)
          + " |\n|---" + "|---" * len(args.prompts) + "|")
    tokens = (args.G + args.G_tilde) * args.max_new_tokens  # of a prompt
    for form, name in names.items():
        print(f"| {name} | " + " | ".join(f"{p * tokens / times[form, p]:.0f}"
                                          for p in args.prompts) + " |")


# ------------------------------------ what a run needs: computed from its shapes, not measured

def shape(model_type, tied, language_model, vision_tower):
    """A model's config, from the numbers by which such models differ."""
    hidden, mlp, layers, heads, kv_heads, vocabulary = language_model
    depth, vision_hidden, vision_mlp, deepstack = vision_tower
    return AutoConfig.for_model(model_type, tie_word_embeddings=tied, text_config={
        "hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocabulary,
    }, vision_config={
        "depth": depth, "hidden_size": vision_hidden, "intermediate_size": vision_mlp,
        "num_heads": 16, "out_hidden_size": hidden, **deepstack})


# As published with the weights
SHAPES = {
    "Qwen2.5-VL-3B": ("qwen2_5_vl", True, (2048, 11008, 36, 16, 2, 151936), (32, 1280, 3420, {})),
    "Qwen2.5-VL-7B": ("qwen2_5_vl", False, (3584, 18944, 28, 28, 4, 152064), (32, 1280, 3420, {})),
    "Qwen3-VL-4B": ("qwen3_vl", True, (2560, 9728, 36, 32, 8, 151936),
                    (24, 1024, 4096, {"deepstack_visual_indexes": [5, 11, 17]})),
    "Qwen3-VL-8B": ("qwen3_vl", False, (4096, 12288, 36, 32, 8, 151936),
                    (27, 1152, 4304, {"deepstack_visual_indexes": [8, 16, 24]}))}
TEXT = 200  # tokens of a prompt that are not visual: template, question, options
SUB_GROUP = LIVE = 10**9  # parameters: of a ZeRO-3 optimizer step; gathered at once in a pass
# Not computed but assumed. Of a card: CUDA's context, kernels' work space, room between tensors; of
# the host: a rank's process, a data worker with its video
CARD_SPARE, HOST_RANK, HOST_WORKER = 2 * 10**9, 4 * 10**9, 10**9


def count_parameters(config):
    """(all, the vision tower's) parameters of a model; it is not made."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    return tuple(sum(p.numel() for p in part.parameters()) for part in (model, model.model.visual))


def parameter_sizes(config, args):
    """The numbers in each parameter, of a run's model: ([all], [the trained ones])."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    model.model.visual.requires_grad_(not args.freeze_vision)
    sft.add_adapters(model, args)
    return ([p.numel() for p in model.parameters()],
            [p.numel() for p in model.parameters() if p.requires_grad])


def pinned(size):
    """Bytes that torch takes for a pinned block of the host's memory: a power of two."""
    return 2 ** math.ceil(math.log2(size))


def widths(config):
    """(layers, hidden, of the queries, of the keys, MLP) of a language model or a vision tower.
    In a tower queries, keys and values are one matrix's, all kept for the values: two more."""
    if hasattr(config, "depth"):
        hidden = config.hidden_size
        return config.depth, hidden, hidden, 2 * hidden, config.intermediate_size
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return (config.num_hidden_layers, config.hidden_size, heads * dim, kv_heads * dim,
            config.intermediate_size)


def kept_of_token(config, size):
    """Bytes of one token that autograd keeps in one layer, at `size` bytes a number. Two norms:
    the input in float32, normalised, scaled; queries, keys, values, what attention returns and its
    copy with heads side by side; of the MLP gate, its activation, up and their product."""
    _, hidden, queries, keys, mlp = widths(config)
    normed = 2 * hidden
    if config.model_type == "qwen3_vl_text":  # queries and keys have norms there, too
        normed += queries + keys
    return normed * (4 + 2 * size) + (3 * queries + 2 * keys + 4 * mlp) * size


def prompt_size(config, args):
    """(tokens of the longest prompt that the flags allow, patches of its frames)."""
    vision = config.vision_config
    side = vision.patch_size * vision.spatial_merge_size  # pixels of a visual token
    visual = max(math.ceil(args.max_frames / vision.temporal_patch_size)
                 * (args.max_pixels // side**2), args.image_max_pixels // side**2)
    return TEXT + visual, visual * vision.spatial_merge_size**2


def update_activations(config, args, size):
    """{part: bytes} of one prompt and one chunk in the update."""
    text, vision = config.text_config, config.vision_config
    layers, width, queries, keys, _ = widths(text)
    depth, hidden, *_ = widths(vision)
    prompt, patches = prompt_size(config, args)
    tokens = min(args.chunk_size, args.G) * args.max_new_tokens  # of a chunk
    of_token, of_patch = kept_of_token(text, size), kept_of_token(vision, size)
    # keys and values of a response and its prompt: joined, then repeated for every query head
    joined = 2 * size * (keys if keys == queries else keys + queries)
    logits = tokens * text.vocab_size * size
    if args.gradient_checkpointing:  # the input of each layer, and what one layer makes again
        tower, of_tokens = depth * hidden * size + of_patch, layers * width * size + of_token
        prompt_tokens = of_tokens + layers * 2 * keys * size
    else:
        tower, of_tokens, joined = depth * of_patch, layers * of_token, layers * joined
        prompt_tokens = of_tokens
    return {
        "prompt, vision tower": 0 if args.freeze_vision or args.lora_rank else patches * tower,
        # with the gradients of its keys and values
        "prompt, language model": prompt * (prompt_tokens + layers * 2 * keys * size),
        "chunk, layers": tokens * of_tokens,
        "chunk, keys and values": (tokens + min(args.chunk_size, args.G) * prompt) * joined,
        # with their gradients; three float32 forms of a piece, or those gradients joined at the end
        "chunk, logits": 2 * logits + max(logits, 3 * 4 * tgrpo.PIECE * text.vocab_size)}


def rollout_activations(config, args, size):
    """{part: bytes} of all responses that decode together."""
    layers, _, _, keys, _ = widths(config.text_config)
    prompt, patches = prompt_size(config, args)
    rows = args.prompts_per_rank * (args.G + (args.G_tilde if args.alpha else 0))
    orders = args.prompts_per_rank * (2 if args.alpha else 1)
    return {
        # the prompts' twice more, before they are spread over the rows
        "keys and values": 2 * layers * keys * size * (
            rows * (prompt + args.max_new_tokens) + 2 * orders * prompt),
        "a layer of the prompts": orders * max(prompt * kept_of_token(config.text_config, size),
                                               patches * kept_of_token(config.vision_config, size))}


def memory(config, args, zero, gpus=1, size=2):
    """What a run of tgrpo.py with these flags needs under this "zero_optimization" of DeepSpeed
    (ZeRO-2 or 3), with `gpus` cards in the machine and `size` bytes a weight: {"rollout",
    "update", "step": {part: bytes of a card}, "host": {part: bytes}}. A card must hold the largest
    of its three sums."""
    numbers, trained = parameter_sizes(config, args)
    P, T, largest = sum(numbers), sum(trained), max(trained)
    sharded, offload = zero["stage"] == 3, zero.get("offload_optimizer", {}).get("device") == "cpu"
    part = T // gpus  # of which a rank has gradients and the optimizer
    stepped = min(SUB_GROUP, part) if sharded else part  # at once
    bucket = int(zero.get("reduce_bucket_size", 5e8))
    weights = size * P // (gpus if sharded else 1)
    always = {
        "weights": weights,
        "reference": weights if args.beta and not args.lora_rank else 0,
        "sampling copy": size * P if sharded else 0,
        "gathered layers": size * min(LIVE, P) if sharded else 0,
        "optimizer": 0 if offload else 12 * part,  # weights and two moments in float32
        "assumed": CARD_SPARE}
    update = {
        # ZeRO-2 keeps those of a backward pass apart from the sum so far
        "gradients": 0 if offload else size * part * (1 if sharded else 2),
        # and the largest one; with offload its sum so far, from the host, and its float64 norm
        "gradients under way": size * bucket * (2 if sharded else 1)
        + largest * (2 * size + 8 if offload else size)}
    step = {"gradients": size * part if sharded and not offload else 0,
            "optimizer's step": 0 if offload else 4 * stepped}  # gradients in float32
    # DeepSpeed pins what moves between card and host
    block = pinned if zero.get("offload_optimizer", {}).get("pin_memory", True) else int
    host = {
        "optimizer": 0 if not offload else
        8 * T + gpus * (2 * block(4 * part) + block(size * part))  # moments; weights, gradients
        + sum(block(size * n) for n in trained),  # and a copy; gradients so far, one by one
        "a saved model": 2 * size * P,
        "assumed": gpus * (HOST_RANK + args.num_workers * HOST_WORKER)}
    return {"rollout": always | rollout_activations(config, args, size),
            "update": always | update | update_activations(config, args, size),
            "step": always | step, "host": host}


def load_shape(name):
    """The config of one of SHAPES, of a folder or of a model on the hub."""
    return shape(*SHAPES[name]) if name in SHAPES else AutoConfig.from_pretrained(name)


def print_memory(argv):
    """The command `memory`."""
    parser = argparse.ArgumentParser(
        prog="bench.py memory", allow_abbrev=False,
        description="The other flags are tgrpo.py's; --model is also one of " + ", ".join(SHAPES))
    parser.add_argument("--gpus", type=int, default=1, help="of the machine")
    options, flags = parser.parse_known_args(argv)
    args = tgrpo.parse_args(["--data=", "--output=", *flags])
    config = load_shape(args.model)
    zero = json.loads(Path(args.deepspeed_config).read_text()).get("zero_optimization", {})
    if zero.get("stage") not in (2, 3) or "offload_param" in zero:
        parser.error(f"{args.deepspeed_config}: computed are ZeRO-2 and ZeRO-3, without "
                     "offload_param")
    needed = memory(config, args, zero, options.gpus)
    tokens, patches = prompt_size(config, args)
    print(f"{args.model}: {count_parameters(config)[0]:,} parameters in bf16, ZeRO-{zero['stage']} "
          f"on {options.gpus} GPU(s), prompts of {tokens} tokens ({patches} patches)\n"
          "GB (10^9 bytes), computed, not measured:\n\n"
          "| | card: rollout | update | step | host |\n|---|---|---|---|---|")
    for part in dict.fromkeys(part for parts in needed.values() for part in parts):
        print_row(part, [parts.get(part, 0) for parts in needed.values()])
    print_row("together", [sum(parts.values()) for parts in needed.values()])


def print_row(name, sizes):
    if any(sizes):
        print(f"| {name} | " + " | ".join(f"{n / 1e9:.1f}" if n else "" for n in sizes) + " |")


def main():
    if sys.argv[1:2] == ["memory"]:
        print_memory(sys.argv[2:])
        return
    args = parse_args()
    if args.ablate is not None:
        ablate(args)
        return
    results = []
    for frames in args.frames:  # one after the other: the naive form's gigabytes
        results += measure(args, frames, args.prompts if frames == args.frames[0] else [1])
    print_table(results)
    if args.json:
        report = {"arguments": vars(args), "torch": torch.__version__,
                  "device": get_accelerator().device_name(),
                  "threads": torch.get_num_threads(),
                  "results": results}
        Path(args.json).write_text(json.dumps(report, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
