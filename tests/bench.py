"""Measures the speed and memory of tgrpo.py on this machine, and computes what a run needs.

    python tests/bench.py                       tgrpo.py beside the naive form
    python tests/bench.py --ablate              and with one idea turned off at a time
    python tests/bench.py --peer trl            --alpha 0 beside TRL's GRPOTrainer
    python tests/bench.py memory --model Qwen2.5-VL-7B --lora_rank 16 \\
        --deepspeed_config assets/zero2.json    computed from shapes, not measured

A form of the step is tgrpo.py's own main with some functions replaced. The naive form is that of
earlier systems: `generate` with num_return_sequences for each order of frames, then policy and
reference over G full copies of prompt, pixels and response. All forms have the same random model
and question, and no response ends early. Each run is a process of its own. The forms take turns.
"""
import argparse
import importlib.util
import json
import math
import multiprocessing
import resource
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from deepspeed.accelerator import get_accelerator
from PIL import Image
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, TrainerCallback

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import sft  # noqa: E402
import tgrpo  # noqa: E402
from build_data import (TEMPLATE, build_messages, forbidden_tokens, load_records,  # noqa: E402
                        stop_tokens, toy_processor, toy_tokenizer, write_video)

STEPS = 3  # of a measured run; the first one warms up
# As published with the weights: model type, tied embeddings; hidden size, MLP, layers, heads, key
# heads, vocabulary; the tower's layers, hidden size, MLP, heads. In "small" MLP and tower have
# about the same share of the work as in Qwen2.5-VL-3B.
SHAPES = {
    "small": ("qwen2_5_vl", True, (320, 1720, 4, 5, 1, 4096), (5, 160, 428, 4)),
    "Qwen2.5-VL-3B": ("qwen2_5_vl", True, (2048, 11008, 36, 16, 2, 151936), (32, 1280, 3420, 16)),
    "Qwen2.5-VL-7B": ("qwen2_5_vl", False, (3584, 18944, 28, 28, 4, 152064), (32, 1280, 3420, 16)),
    "Qwen3-VL-4B": ("qwen3_vl", True, (2560, 9728, 36, 32, 8, 151936), (24, 1024, 4096, 16)),
    "Qwen3-VL-8B": ("qwen3_vl", False, (4096, 12288, 36, 32, 8, 151936), (27, 1152, 4304, 16))}


def parse_args(argv=None):
    """Returns the flags of this script, and those for tgrpo.py."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0] + " Other flags are tgrpo.py's.", allow_abbrev=False)
    add = parser.add_mutually_exclusive_group().add_argument
    add("--ablate", nargs="*", choices=ABLATIONS, help="turn off these ideas; without a name all")
    add("--peer", choices=["trl"], help="run this trainer instead of the naive form")
    add = parser.add_argument
    add("--repeats", type=int, default=5, help="runs of each form; medians are printed")
    add("--model", default="small", help=f"a shape ({', '.join(SHAPES)}) or a model's folder")
    add("--frames", type=int, default=16, help="frames of the video")
    add("--height", type=int, default=8, help="of a frame, in units of 28 pixels")
    add("--width", type=int, default=9, help="of a frame, in units of 28 pixels")
    return parser.parse_known_args(argv)


# ------------------------------------------------------------------------ what a run starts from

def load_shape(name, layers=None, blocks=None):
    """Returns the config of one of SHAPES, with fewer layers and blocks if these are given, or of
    a model's folder."""
    if name not in SHAPES:
        return AutoConfig.from_pretrained(name)
    kind, tied, (hidden, mlp, depth, heads, kv_heads, vocabulary), tower = SHAPES[name]
    vision_depth, vision_hidden, vision_mlp, vision_heads = tower
    blocks, dim = blocks or vision_depth, 128 if kind == "qwen3_vl" else hidden // heads
    return AutoConfig.for_model(kind, tie_word_embeddings=tied, text_config={
        "hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers or depth,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": dim,
        "vocab_size": vocabulary, "tie_word_embeddings": tied, "bos_token_id": None,
        "eos_token_id": None, "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e6,
            "mrope_section": [dim // 8, 3 * dim // 16, 3 * dim // 16]},
    }, vision_config={
        "depth": blocks, "hidden_size": vision_hidden, "intermediate_size": vision_mlp,
        "num_heads": vision_heads, "out_hidden_size": hidden,
        "fullatt_block_indexes": [*range(7, blocks, 8)] or [blocks - 1],
        "deepstack_visual_indexes": [0, 1, 2]})  # three; the choice changes no size


def random_model(config, tokenizer, dtype=torch.float32):
    """Returns a random model of this config for this tokenizer."""
    token = tokenizer.convert_tokens_to_ids
    for name, text in (("image", "image_pad"), ("video", "video_pad"),
                       ("vision_start", "vision_start"), ("vision_end", "vision_end")):
        setattr(config, f"{name}_token_id", token(f"<|{text}|>"))
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def save_start(args, folder, picture=False):
    """Writes a random Qwen2.5-VL and a question about a random video, or about a picture of as many
    visual tokens. Returns the flags of tgrpo.py."""
    folder, tokenizer = Path(folder), toy_tokenizer([TEMPLATE] * 2)
    random_model(load_shape(args.model), tokenizer).save_pretrained(folder / "model")
    toy_processor(tokenizer).save_pretrained(folder / "model")
    T, H, W = args.frames, 28 * args.height, 28 * args.width
    pixels = np.random.default_rng(0).integers(0, 256, (T, H, W, 3), np.uint8)
    if picture:  # two frames of a video have the visual tokens of one picture
        Image.fromarray(pixels[::2].reshape(-1, W, 3)).save(folder / "picture.png")
    else:
        write_video(folder / "video.mp4", pixels, fps=2)
    (folder / "data.json").write_text(json.dumps([{
        "problem_id": 0, "problem": "Which way does it move?", "problem_type": "free-form",
        "data_type": "image" if picture else "video", "solution": "<answer>left</answer>",
        "path": "./picture.png" if picture else "./video.mp4"}]))
    (folder / "zero0.json").write_text(json.dumps({
        "zero_optimization": {"stage": 0}, "zero_allow_untested_optimizer": True}))
    return ["--model", f"{folder}/model", "--data", f"{folder}/data.json", "--deepspeed_config",
            f"{folder}/zero0.json", "--save_steps=0", "--show_steps=0", "--num_workers=0",
            f"--max_frames={T}", f"--max_pixels={H * W}", f"--image_max_pixels={T // 2 * H * W}",
            "--chunk_size=8", "--max_new_tokens=256", *["--alpha=0"] * picture]


# ------------------------------------------------------------------------- the naive form

def one_by_one(prompts, counts):
    """Yields each prompt row, as a batch of one, and the number of its responses."""
    for inputs, of_rows in zip(prompts, counts):
        for b, count in enumerate(of_rows):
            yield {key: value.chunk(len(of_rows))[b] for key, value in inputs.items()}, count


def naive_rollout(model, prompts, counts, *, max_new_tokens, temperature, **_):
    """Samples as tgrpo.rollout does, by one call of generate for each prompt row."""
    return [model.generate(**inputs, num_return_sequences=count, do_sample=True, top_k=0,
                           temperature=temperature, max_new_tokens=max_new_tokens)
            [:, inputs["input_ids"].shape[1]:]  # (count, L)
            for inputs, count in one_by_one(prompts, counts)]


def naive_forward(model, inputs, responses):
    """Returns ids (n, P + L) and logits (n, P + L, V) of n full copies of prompt, pixels and
    response."""
    n, L = responses.shape
    batch = {key: torch.cat([value] * n) for key, value in inputs.items()}
    batch["input_ids"] = torch.cat([batch["input_ids"], responses], 1)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["mm_token_type_ids"] = F.pad(batch["mm_token_type_ids"], (0, L))
    return batch["input_ids"], model(**batch, use_cache=False).logits


def naive_logits(model, inputs, responses):
    """Returns the logits (n, L, V) that predict each response token."""
    return naive_forward(model, inputs, responses)[1][:, -responses.shape[1] - 1:-1]


def naive_logps(model, inputs, responses, temperature=1.0):
    """Returns the log-probabilities (n, L) as the released code does (_get_per_token_logps of its
    grpo_trainer.py): of all tokens, row by row, of which the responses' are kept."""
    ids, logits = naive_forward(model, inputs, responses)
    logps = [(row[:-1].float() / temperature).log_softmax(-1).gather(1, chosen[1:, None])[:, 0]
             for chosen, row in zip(ids, logits)]  # n times (P + L - 1,)
    return torch.stack(logps)[:, -responses.shape[1]:]


@torch.no_grad()
def naive_group_logps(model, inputs, responses, lengths, chunk_size, temperature=1.0):
    return naive_logps(model, inputs, responses, temperature)


def naive_backward_group(engine, inputs, responses, lengths, chunk_loss, chunk_size, temperature,
                         last):
    logps = naive_logps(engine, inputs, responses, temperature)  # (G, L)
    engine.set_gradient_accumulation_boundary(last)
    no_entropy = torch.zeros_like(logps)  # a metric that the released code does not compute
    engine.backward(chunk_loss(torch.arange(len(logps)), logps, no_entropy))


# ------------------------------------------------------------------------------ the forms

def separate_rollouts(model, prompts, counts, rollout=tgrpo.rollout, **options):
    """Samples to one order of frames after the other."""
    return [rollout(model, [inputs], [[count]], **options)[0]
            for inputs, count in one_by_one(prompts, counts)]


FORMS = {  # form: its name, more flags, what it replaces in tgrpo.py
    "ours": ("tgrpo.py", [], {}),
    "trl": ("TRL", [], {}),
    "naive": ("naive form", [], {"rollout": naive_rollout, "group_logps": naive_group_logps,
                                 "backward_group": naive_backward_group}),
    "logps": ("log-probabilities kept for the backward pass", [],
              {"checkpoint": lambda function, *piece, use_reentrant: function(*piece)}),
    "recompute": ("activations recomputed", ["--gradient_checkpointing"], {}),
    "separate": ("one order of frames after the other", [], {"rollout": separate_rollouts})}
ABLATIONS = ("logps", "recompute", "separate")


def never_end(model, tokenizer):
    """Returns the ids that no response may have, the end tokens among them."""
    return forbidden_tokens(model, tokenizer) + stop_tokens(model, tokenizer)


def run_form(form, flags):
    """Runs one of FORMS with these flags of tgrpo.py, in a new process. Returns {"rollout",
    "update", "step": [seconds of each step but the first], "memory": bytes that it adds}."""
    start = peak_memory()
    if form == "trl":
        rollout, step = run_trl(tgrpo.parse_args(flags))
        seconds = {"rollout": rollout, "update": np.subtract(step, rollout), "step": step}
    else:
        _, more, replaced = FORMS[form]
        for name, value in {"forbidden_tokens": never_end, **replaced}.items():
            setattr(tgrpo, name, value)
        args = tgrpo.parse_args([*flags, *more])
        tgrpo.main(args)
        _, *rows = (Path(args.output) / "metrics.jsonl").read_text().splitlines()
        seconds = {name: [json.loads(row)[f"time/{name}"] for row in rows]
                   for name in ("rollout", "update", "step")}
    return {name: values[1:] for name, values in seconds.items()} | {
        "memory": peak_memory() - start}


def peak_memory():
    """Returns the most bytes that this process has had: resident ones on CPU, else allocated."""
    if get_accelerator().device_name() != "cpu":
        return get_accelerator().max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run_trl(args):
    """Runs TRL's GRPOTrainer with the settings of tgrpo.py's args. Returns the seconds of each
    step's rollout, and of each step."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer
    rollout, step, chunk = [], [], min(args.chunk_size, args.G)

    class Timed(GRPOTrainer):
        def _generate(self, prompts):
            start = time.perf_counter()
            responses = super()._generate(prompts)
            rollout.append(time.perf_counter() - start)
            return responses

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.start = time.perf_counter()

        def on_step_end(self, *_, **__):
            step.append(time.perf_counter() - self.start)

    processor = AutoProcessor.from_pretrained(args.model)
    forbidden = never_end(AutoModelForImageTextToText.from_pretrained(args.model),
                          processor.tokenizer)
    record, = load_records(args.data)
    text = build_messages(record)[0]["content"][1]["text"]
    question = {"prompt": [{"role": "user", "content": text}],
                "image": Image.open(record["media_path"])}
    config = GRPOConfig(
        args.output, max_steps=args.max_steps, num_generations=args.G, beta=args.beta,
        per_device_train_batch_size=chunk, gradient_accumulation_steps=args.G // chunk,
        loss_type="grpo", bf16=False, gradient_checkpointing=args.gradient_checkpointing,
        max_completion_length=args.max_new_tokens, report_to="none", save_strategy="no",
        generation_kwargs={"suppress_tokens": forbidden},
        use_cpu=get_accelerator().device_name() == "cpu")
    Timed(args.model, lambda completions, **_: [0.0] * len(completions), config,
          Dataset.from_list([question] * args.max_steps), processing_class=processor,
          callbacks=[Clock()]).train()
    return rollout, step


# ---------------------------------------------------------------------------- measurement

def in_new_process(function, *arguments):
    """Returns what the function returns in a process of its own."""
    spawn = multiprocessing.get_context("spawn")  # a fork could not use a GPU
    with ProcessPoolExecutor(1, spawn) as process:
        return process.submit(function, *arguments).result()


def measure(args, more):
    """Prints a row for each form: medians, from lowest to highest, and their ratio to ours."""
    if args.peer and not importlib.util.find_spec("trl"):
        sys.exit("--peer trl needs the package trl: pip install trl")
    others = [args.peer or "naive"] if args.ablate is None else args.ablate or ABLATIONS
    results = {form: [] for form in ("ours", *others)}
    with tempfile.TemporaryDirectory() as folder:
        flags = [*save_start(args, folder, picture=bool(args.peer)), *more]
        for turn, form in enumerate(tqdm([*results] * args.repeats, desc="runs")):
            results[form].append(in_new_process(
                run_form, form, [*flags, f"--output={folder}/{turn}", f"--max_steps={STEPS}"]))
    print("| | rollout, s | update, s | step, s | memory, GB |\n|---|---|---|---|---|")
    for form, runs in results.items():
        cells = [FORMS[form][0]]
        for key, unit in (("rollout", 1), ("update", 1), ("step", 1), ("memory", 1e9)):
            own, found = (np.hstack([run[key] for run in of]) / unit
                          for of in (results["ours"], runs))
            cells.append(f"{np.median(found):.2f} ({min(found):.2f} to {max(found):.2f}), "
                         f"{np.median(found) / np.median(own):.1f}x")
        print("| " + " | ".join(cells) + " |")


# ------------------------------------ what a run needs: computed from its shapes, not measured

TEXT = 200  # tokens of a prompt that are not visual: template, question, options
SUB_GROUP = LIVE = 10**9  # parameters: of a ZeRO-3 optimizer step; gathered at once in a pass
# Not computed but assumed. Of a card: CUDA's context, kernels' work space, room between tensors; of
# the host: a rank's process, a data worker with its video
CARD_SPARE, HOST_RANK, HOST_WORKER = 2 * 10**9, 4 * 10**9, 10**9


def parameter_sizes(config, args):
    """Returns the numbers in each parameter of a run's model: ([all], [the trained ones])."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    model.model.visual.requires_grad_(not args.freeze_vision)
    sft.add_adapters(model, args)
    return ([p.numel() for p in model.parameters()],
            [p.numel() for p in model.parameters() if p.requires_grad])


def widths(config):
    """Returns (layers, hidden, queries, keys, MLP) of a language model or a vision tower. In a
    tower queries, keys and values are one matrix's, all kept for the values: two more."""
    if hasattr(config, "depth"):
        hidden = config.hidden_size
        return config.depth, hidden, hidden, 2 * hidden, config.intermediate_size
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return (config.num_hidden_layers, config.hidden_size, heads * dim, kv_heads * dim,
            config.intermediate_size)


def kept_of_token(config, size):
    """Returns the bytes of one token that autograd keeps in one layer, at `size` bytes a number.

    Two norms: the input in float32, normalised, scaled. Queries, keys, values, what attention
    returns and its copy with heads side by side. Of the MLP gate, its activation, up and their
    product.
    """
    _, hidden, queries, keys, mlp = widths(config)
    normed = 2 * hidden
    if config.model_type == "qwen3_vl_text":  # queries and keys have norms there, too
        normed += queries + keys
    return normed * (4 + 2 * size) + (3 * queries + 2 * keys + 4 * mlp) * size


def prompt_size(config, args):
    """Returns (tokens of the longest prompt that the flags allow, patches of its frames)."""
    vision = config.vision_config
    side = vision.patch_size * vision.spatial_merge_size  # pixels of a visual token
    visual = max(math.ceil(args.max_frames / vision.temporal_patch_size)
                 * (args.max_pixels // side**2), args.image_max_pixels // side**2)
    return TEXT + visual, visual * vision.spatial_merge_size**2


def update_activations(config, args, size):
    """Returns {part: bytes} of one prompt and one chunk in the update."""
    text, vision = config.text_config, config.vision_config
    layers, width, queries, keys, _ = widths(text)
    depth, hidden, *_ = widths(vision)
    prompt, patches = prompt_size(config, args)
    rows = min(args.chunk_size, args.G)
    tokens = rows * args.max_new_tokens  # of a chunk
    of_token, of_patch = kept_of_token(text, size), kept_of_token(vision, size)
    # keys and values of a response and its prompt: joined, then repeated for every query head
    joined = 2 * size * (keys if keys == queries else keys + queries)
    cached = layers * 2 * keys * size  # of a token
    if args.gradient_checkpointing:  # the input of each layer, and what one layer makes again
        tower, of_tokens = depth * hidden * size + of_patch, layers * width * size + of_token
        prompt_tokens = of_tokens + cached
    else:
        tower, of_tokens, joined = depth * of_patch, layers * of_token, layers * joined
        prompt_tokens = of_tokens
    logits, piece = (n * text.vocab_size for n in (tokens, min(tgrpo.PIECE, tokens)))
    return {
        "prompt, vision tower": 0 if args.freeze_vision or args.lora_rank else patches * tower,
        # with the gradients of its keys and values
        "prompt, language model": prompt * (prompt_tokens + cached),
        "chunk, layers": tokens * of_tokens,
        "chunk, keys and values": (tokens + rows * prompt) * joined,
        # with their gradients; three float32 forms of a piece, or those gradients joined at the end
        "chunk, logits": 2 * size * logits + max(size * logits, 3 * 4 * piece)}


def rollout_activations(config, args, size):
    """Returns {part: bytes} of all responses that decode together."""
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
    """Returns what a run of tgrpo.py needs: {"rollout", "update", "step": {part: bytes of a card},
    "host": {part: bytes}}. A card must hold the largest of its three sums.

    args: the run's flags; zero: the "zero_optimization" of its DeepSpeed file, ZeRO-2 or 3; gpus:
    cards in the machine; size: bytes of a weight.
    """
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
    # DeepSpeed pins what moves between card and host; torch pins blocks of a power of two
    pin = zero.get("offload_optimizer", {}).get("pin_memory", True)
    block = (lambda size: 2 ** math.ceil(math.log2(size))) if pin else int
    host = {
        "optimizer": 0 if not offload else
        8 * T + gpus * (2 * block(4 * part) + block(size * part))  # moments; weights, gradients
        + sum(block(size * n) for n in trained),  # and a copy; gradients so far, one by one
        "a saved model": 2 * size * P,
        "assumed": gpus * (HOST_RANK + args.num_workers * HOST_WORKER)}
    return {"rollout": always | rollout_activations(config, args, size),
            "update": always | update | update_activations(config, args, size),
            "step": always | step, "host": host}


def print_memory(argv):
    """Prints the table of the command `memory`."""
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
    print(f"{args.model}: {sum(parameter_sizes(config, args)[0]):,} parameters in bf16, "
          f"ZeRO-{zero['stage']} on {options.gpus} GPU(s), prompts of "
          f"{prompt_size(config, args)[0]} tokens\nGB (10^9 bytes), computed, not measured:\n\n"
          "| | card: rollout | update | step | host |\n|---|---|---|---|---|")
    rows = {part: [parts.get(part, 0) for parts in needed.values()]
            for part in dict.fromkeys(part for parts in needed.values() for part in parts)}
    rows["together"] = [sum(parts.values()) for parts in needed.values()]
    for name, sizes in rows.items():
        if any(sizes):
            print(f"| {name} | " + " | ".join(f"{n / 1e9:.1f}" if n else "" for n in sizes) + " |")


if __name__ == "__main__":
    if sys.argv[1:2] == ["memory"]:
        print_memory(sys.argv[2:])
    else:
        measure(*parse_args())
