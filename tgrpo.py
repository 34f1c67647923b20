"""T-GRPO: reinforcement learning for video reasoning (Video-R1, section 3.2).

    python tgrpo.py @toy/tgrpo.args
    deepspeed tgrpo.py --model Qwen2.5-VL-7B-SFT --data Video-R1-260k.json --output tgrpo

One step, for each question q of a rank:
  1. decode the frames of q and, if it is a video, shuffle a copy of them        shuffle_frames
  2. sample G responses o_i to the ordered and G_tilde to the shuffled frames            rollout
  3. r_i = accuracy + format; p, p_tilde: share of G, of G_tilde that is correct   group_rewards
  4. R_i = r_i, plus r_t = alpha if correct and p >= p_tilde (Eq. 1, 2),         temporal_reward
     plus omega if correct and of l_min to l_max tokens (Eq. 5)                    length_reward
  5. advantage A_i = (R_i - mean) / std within the group (Eq. 3)               group_advantages
  6. clipped policy-gradient step with a KL term (Eq. 4)                     tgrpo_loss, update
Responses to shuffled frames only give p_tilde; they are never trained on. `--alpha 0` is GRPO.

Which variant: the ratio and its clip are per token, the loss is the mean over a response's
tokens and then over responses, the KL is the k3 estimator. Left out: reward models, packing.
sft.py has what the cold start and T-GRPO share, from flags to checkpoints.

Shapes: G responses of a question, n in a chunk of them; L response tokens, P prompt tokens;
B prompts in a batch; N rows of a rollout, n of them not ended; V vocabulary, T frames.
"""
from functools import partial

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.cache_utils import (Cache, DynamicLayer, StaticCache,
                                      get_layer_types_and_kwargs)

from build_data import (FlagParser, InputError, above, at_least, encode, encode_blank,
                        forbidden_tokens, load_model, load_processor, load_records, pad_batch,
                        refuse_absent_media, rope_positions, run_script, seeded_generator,
                        shuffle_frames, stop_tokens, to_device)
from rewards import accuracy_reward, format_reward, length_reward
from sft import (adapters_off, add_adapters, add_run_flags, close_step, gather_objects, lap, note,
                 open_run, optimizer_step, print_end, save_model, start_engine, start_questions,
                 steps, validate)

import deepspeed  # after build_data, which silences its import messages

PIECE = 512  # tokens per log-softmax, see token_logps
STD_EPSILON = 1e-4  # added to the standard deviation in Eq. 3, as in the released code
FRAME_STREAM, ROLLOUT_STREAM = 1, 2  # first number of a seed: independent draws


def parse_args(argv=None):
    parser = FlagParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    # rollout
    add("--G", type=at_least(2, int), default=8, help="responses to the ordered frames")
    add("--G_tilde", type=at_least(0, int), default=4, help="responses to the shuffled frames")
    add("--max_new_tokens", type=above(0, int), default=768, help="maximum tokens of a response")
    add("--temperature", type=above(0, float), default=1.0,
        help="sampling temperature; the loss divides the logits by it too")
    add("--top_p", type=above(0, float, 1), default=1.0,
        help="nucleus sampling, which the loss ignores; 1: off")
    add("--static_decode", action="store_true",
        help="decode in fixed buffers, on a CUDA device as a CUDA graph (not yet run there)")
    # rewards and advantages
    add("--alpha", type=at_least(0, float), default=0.3, help="temporal reward (Eq. 1); 0: GRPO")
    add("--omega", type=at_least(0, float), default=0.2, help="length reward (Eq. 5)")
    add("--l_min", type=int, default=320, help="fewest tokens for the length reward")
    add("--l_max", type=int, default=512, help="most tokens for the length reward")
    add("--correct_threshold", type=float, default=0.5,
        help="a response is correct if its accuracy reward is at least this")
    add("--temporal_test", choices=("ge", "gt"), default="ge", help="p >= p_tilde (Eq. 1), or >")
    add("--temporal_to", choices=("reward", "advantage"), default="reward",
        help="add r_t to the reward (Eq. 2) or to the advantage (the paper's remark)")
    add("--scale_advantages", choices=("std", "none"), default="std",
        help="divide by the group's standard deviation (Eq. 3), or not")
    # update
    add("--beta", type=at_least(0, float), default=0.04,
        help="weight of the KL term; 0: no reference model")
    add("--epsilon", type=at_least(0, float), default=0.2,
        help="clip range of the ratio (not in the paper); no effect with --updates_per_rollout 1")
    add("--loss_mean", choices=("response", "token", "length"), default="response",
        help="mean over a response's tokens, then over responses (Eq. 4); mean over all tokens of "
             "the group; sum divided by G * max_new_tokens")
    add("--updates_per_rollout", type=above(0, int), default=1,
        help="optimizer steps on each rollout")
    add("--prompts_per_rank", type=above(0, int), default=1,
        help="questions per step on each rank")
    add("--chunk_size", type=above(0, int), default=2,
        help="responses per forward and backward pass; more are faster and take more memory")
    add("--freeze_vision", action="store_true", help="train the language model only")
    add("--max_steps", type=above(0, int), default=1000, help="steps of the run, one rollout each")
    add("--rollout_steps", type=above(0, int), default=10,
        help="write responses to rollouts.jsonl every N steps")
    add("--show_steps", type=at_least(0, int), default=10,
        help="print one question every N steps; 0: none")
    add_run_flags(add, lr_schedule="constant", save_steps=100)
    args = parser.parse_args(argv)
    if args.l_min > args.l_max:
        parser.error(f"--l_min {args.l_min} is above --l_max {args.l_max}: lower it")
    if args.alpha and not args.G_tilde:
        parser.error("--G_tilde 0 leaves p_tilde undefined: raise it, or use --alpha 0 for GRPO")
    if args.static_decode and args.attn_implementation != "sdpa":
        parser.error("--static_decode needs --attn_implementation sdpa, not "
                     f"{args.attn_implementation}: change one of them")
    return args


# ------------------------------------------------------- the algorithm: pure functions

def temporal_reward(correct, correct_shuffled, alpha, test="ge") -> float:
    """Returns r_t (Eq. 1): alpha if p >= p_tilde (test "ge") or p > p_tilde (test "gt"), else 0.
    p and p_tilde are the shares of correct responses to the ordered and to the shuffled frames.

    >>> temporal_reward([True, False], [True, False, False, False], alpha=0.3)
    0.3
    """
    p = sum(correct) / len(correct)
    p_tilde = sum(correct_shuffled) / len(correct_shuffled)
    return alpha if p > p_tilde or (test == "ge" and p == p_tilde) else 0.0


def group_advantages(rewards, scale="std"):
    """Returns A_i (Eq. 3) of a group's rewards (G,): rewards minus their mean and, if scale is
    "std", divided by the unbiased standard deviation. Equal rewards give 0."""
    if (rewards == rewards[0]).all():  # a rounded mean would give noise
        return torch.zeros_like(rewards)
    advantages = rewards - rewards.mean()  # (G,)
    return advantages / (rewards.std() + STD_EPSILON) if scale == "std" else advantages


def tgrpo_loss(logps, old_logps, ref_logps, advantages, mask, beta, epsilon, weights=None):
    """Returns -J (Eq. 4) of one group, or of a chunk of it: a scalar to minimise.

    logps, old_logps, ref_logps (n, L): log-probabilities of the response tokens under the
    policy, the policy that sampled them and the reference (None if beta is 0);
    advantages (n,); mask (n, L): 1 up to and including the end token; weights (n, L): of the
    tokens in the loss, by default token_weights(mask).
    """
    A = advantages[:, None]  # (n, 1)
    ratio = policy_ratio(logps, old_logps, mask)  # (n, L)
    objective = torch.minimum(ratio * A, ratio.clamp(1 - epsilon, 1 + epsilon) * A)  # (n, L)
    if beta:
        objective = objective - beta * kl_k3(logps, ref_logps)  # (n, L)
    # where, not a product: what stands after the end token may be infinite, and inf * 0 is NaN
    objective = torch.where(mask.bool(), objective, 0)
    return -(objective * (token_weights(mask) if weights is None else weights)).sum()


def token_weights(mask, mean="response", longest=None):
    """Returns the weight (G, L) of each token in the loss, from the group's mask (G, L). mean:
    "response": 1 / (G * tokens of the response), as in Eq. 4; "token": 1 / tokens of the group;
    "length": 1 / (G * longest), a constant."""
    tokens = {"response": len(mask) * mask.sum(1, keepdim=True), "token": mask.sum(),
              "length": len(mask) * (longest or mask.shape[1])}[mean]
    return mask / tokens


def policy_ratio(logps, old_logps, mask):
    """Returns rho (n, L): a token's probability under the policy, divided by that under the policy
    that sampled it; 1 after the end token. The loss and the clip metrics use it."""
    return torch.exp(torch.where(mask.bool(), logps - old_logps, 0))


def kl_k3(logps, ref_logps):
    """Returns Schulman's k3 estimator (n, L) of KL(policy || reference) per token, at least 0."""
    return torch.exp(ref_logps - logps) - (ref_logps - logps) - 1


def response_mask(ids, eos_ids):
    """Returns (n, L): ones up to and including each row's first end token, zeros after it.

    >>> response_mask(torch.tensor([[5, 9, 9], [5, 6, 7]]), [9]).tolist()
    [[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]]
    """
    ended = torch.isin(ids, torch.tensor(eos_ids, device=ids.device)).cumsum(1)  # (n, L)
    return (F.pad(ended, (1, -1)) == 0).float()  # (n, L): no end token strictly before


def group_rewards(texts, texts_shuffled, lengths, record, args):
    """Returns the parts of one question's rewards, with p, p_tilde and r_t:
    {"accuracy", "format", "length", "temporal": (G,) each; "p", "p_tilde", "r_t": numbers}.
    Without responses to shuffled frames, "temporal", "p_tilde" and "r_t" are absent."""
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


# ------------------------------------------------------------ rollout: prefill and decode

def require_full_attention(args):
    """Raises InputError if a layer of the model does not keep the keys and values of all tokens,
    because responses share those of their prompt. Reads the config only, not the weights."""
    try:
        config = AutoConfig.from_pretrained(args.model)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot load --model {args.model}: {error}") from None
    kinds, _ = get_layer_types_and_kwargs(config.get_text_config(decoder=True))  # one per layer
    others = sorted({*kinds} - {"full_attention"})
    if others:
        raise InputError(f"--model {args.model} has layers of {' and '.join(others)}: they do not "
                         "keep the keys and values of a whole prompt, which responses share; use "
                         "a model with full attention, such as Qwen2.5-VL or Qwen3-VL")


class KeptLayer(DynamicLayer):
    """Stores a prompt's keys and values once. With gradient checkpointing the backward pass
    calls update again, which returns the same values. Responses are not stored."""
    is_prompt = False  # True in the prompt's forward; False if response_logits filled the layer

    def update(self, keys, values, *_, **__):
        if not self.is_initialized:
            self.is_prompt = True
            return super().update(keys, values)
        if self.is_prompt:
            return keys, values
        return torch.cat([self.keys, keys], dim=2), torch.cat([self.values, values], dim=2)


def recompute_activations(model):
    """Turns gradient checkpointing on. transformers then ignores the cache, unless a layer has the
    flag set here; KeptLayer makes this safe."""
    model.activation_checkpointing_enable({"use_reentrant": False})
    for layer in model.model.language_model.layers:
        layer._can_checkpoint_with_cache = True


def run_prompt(model, inputs):
    """Runs one forward over a prompt (B, P). Returns the model's output, which holds the cache of
    keys and values (B, heads, P, dim) of each layer, and the positions (B, 1) of the prompt's last
    token and of the first response token. After a long video these are not consecutive: its
    positions in time exceed those of the text after it."""
    positions, next_position = rope_positions(model, inputs)
    vision = {key: inputs[key] for key in inputs
              if key.startswith("pixel_values") or key.endswith("grid_thw")}
    output = model(input_ids=inputs["input_ids"], position_ids=positions, use_cache=False,
                   past_key_values=Cache(layer_class_to_replicate=KeptLayer), logits_to_keep=1,
                   **vision)
    return output, (positions[0, :, -1:], next_position)


def forbid_tokens(model, ids, device):
    """Sets the logits of token ids to -inf in every forward, so that sampler, policy and reference
    are distributions over the same tokens. Must be called before DeepSpeed wraps the model."""
    head = model.get_output_embeddings()
    bias = torch.zeros(head.out_features, dtype=model.dtype, device=device)  # (V,)
    bias[ids] = -torch.inf
    head.register_forward_hook(lambda head, inputs, logits: logits.add_(bias))


def sample_tokens(logits, temperature, top_p, generator):
    """Returns one token per row (n,) of the logits (n, V), sampled with temperature and top_p. If
    the temperature is 0, it is the most likely token."""
    if temperature == 0:
        return logits.argmax(-1)  # (n,)
    probs = torch.softmax(logits.float() / temperature, dim=-1)  # (n, V)
    if top_p < 1:
        ranked, order = probs.sort(dim=-1, descending=True)  # (n, V)
        ranked[ranked.cumsum(-1) - ranked >= top_p] = 0  # keeps the most likely token
        probs = torch.zeros_like(probs).scatter(-1, order, ranked)  # (n, V)
    # inverse transform sampling: one random number per row; torch.multinomial draws V
    cumulative = probs.double().cumsum(-1)  # (n, V)
    draws = torch.rand(len(probs), 1, dtype=torch.float64, generator=generator,
                       device=probs.device) * cumulative[:, -1:]  # (n, 1)
    return torch.searchsorted(cumulative, draws, right=True)[:, 0].clamp(max=probs.shape[1] - 1)


def prefill(model, prompts, counts, max_new_tokens):
    """Runs each prompt batch once. Then copies row s, numbered over all batches, counts[s] times:
    N rows in all. Prompts are padded on the left to the longest, P tokens.

    Returns the cache of keys and values (N, heads, P + L, dim) of each layer, with room for L new
    tokens; the attention mask (N, P + L); and the logits (N, V) and position (N, 1) of each row's
    first response token.
    """
    P = max(inputs["input_ids"].shape[1] for inputs in prompts)
    origin = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))  # (N,): prompt row s
    origin = origin.to(prompts[0]["input_ids"].device)
    caches, masks, logits, positions = [], [], [], []
    for inputs in prompts:
        output, (_, position) = run_prompt(model, inputs)
        gap = P - inputs["input_ids"].shape[1]
        caches.append([[F.pad(kv, (0, 0, gap, 0)) for kv in (layer.keys, layer.values)]
                       for layer in output.past_key_values.layers])  # (B, heads, P, dim) each
        masks.append(F.pad(inputs["attention_mask"], (gap, max_new_tokens)))  # (B, P + L)
        logits.append(output.logits[:, -1])  # (B, V)
        positions.append(position)  # (B, 1)
    cache = StaticCache(model.config, max_cache_len=P + max_new_tokens)
    for layer, of_prompts in zip(cache.layers, zip(*caches)):
        keys, values = (torch.cat(kv)[origin] for kv in zip(*of_prompts))  # (N, heads, P, dim)
        layer.update(keys, values)
    return cache, *(torch.cat(x)[origin] for x in (masks, logits, positions))


def decode(model, tokens, position, mask, cache):
    """Runs one token per row (n,), at its position (n, 1). Returns the next one's logits (n, V)."""
    return model(input_ids=tokens[:, None], position_ids=position.expand(3, -1, -1),
                 attention_mask=mask, past_key_values=cache, use_cache=True).logits[:, -1]


def static_decoder(model, ids, position, mask, cache):
    """Returns a function that, at call t, decodes column t of ids (N, L) into logits (N, V). Rows
    that ended stay, so that shapes and addresses do not change. On a CUDA device each call replays
    a CUDA graph: one launch instead of one per kernel. This has not yet run on a GPU."""
    t = torch.zeros(1, dtype=torch.int64, device=ids.device)  # (1,)
    P = mask.shape[1] - ids.shape[1]

    def step():
        mask.index_fill_(1, P + t, 1)
        tokens = ids.index_select(1, t)[:, 0]  # (N,)
        logits = decode(model, tokens, position + t, mask, cache)  # (N, V)
        t.add_(1)
        return logits

    if ids.device.type != "cuda":
        return step
    step()  # warm-up: the initialisation of CUDA libraries cannot be captured
    for count in (t, *(layer.cumulative_length for layer in cache.layers)):
        count.sub_(1)  # the first replay decodes column 0 again, and overwrites its keys
    graph = torch.cuda.CUDAGraph()  # it and its memory are freed when the rollout returns
    # thread_local: the data loader's thread may pin memory during the capture
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        logits = step()

    def replay():
        graph.replay()
        return logits
    return replay


def rollout(model, prompts, counts, *, max_new_tokens, temperature, top_p, eos_ids, generator,
            static=False):
    """Samples counts[i][b] responses to row b of prompts[i], all of them in one decode batch.

    prompts: encoded inputs of B rows each (B = 2 for a video: ordered and shuffled frames).
    A row leaves the batch at its first end token. If static, it stays but is not sampled. Makes no
    collective call, so that no rank waits for the longest response of another.
    Returns one (count, L) tensor of ids for each prompt row, padded with end tokens.
    """
    of_rows = [n for of_prompt in counts for n in of_prompt]  # responses of each prompt row
    device = prompts[0]["input_ids"].device
    rows, eos = torch.arange(sum(of_rows), device=device), torch.tensor(eos_ids, device=device)
    ids = torch.full((len(rows), max_new_tokens), eos_ids[0], device=device)  # (N, L)
    with torch.inference_mode():  # faster than no_grad, but autograd cannot use its tensors
        cache, mask, logits, position = prefill(model, prompts, of_rows, max_new_tokens)
        P = mask.shape[1] - max_new_tokens
        step = static_decoder(model, ids, position, mask, cache) if static else None
        for t in range(max_new_tokens):
            tokens = sample_tokens(logits, temperature, top_p, generator)  # (n,)
            ids[rows, t] = tokens
            alive = (~torch.isin(tokens, eos)).nonzero()[:, 0]  # of the n rows
            if len(alive) == 0 or t + 1 == max_new_tokens:
                break
            rows, tokens = rows[alive], tokens[alive]  # (n,)
            if static:
                logits = step()[rows]  # (n, V): same draws as if not static
                continue
            if len(alive) < len(mask):
                position, mask = position[alive], mask[alive]
                cache.reorder_cache(alive)
            mask[:, P + t] = 1
            logits = decode(model, tokens, position + t, mask, cache)  # (n, V)
    return ids[:, :t + 1].split(of_rows)


# -------------------------------------- update: the prompt is encoded once for its group

def response_logits(model, cache, inputs, positions, responses):
    """Returns the logits (n, L, V) that predict each response token. cache: that of prompt_cache.
    The prompt's last token is the first input, because it predicts the first response token.
    positions: as run_prompt returns them."""
    (n, L), (last, following) = responses.shape, positions  # following: of the first response token
    ids = torch.cat([inputs["input_ids"][:, -1:].expand(n, 1), responses[:, :-1]], dim=1)  # (n, L)
    later = following + torch.arange(L - 1, device=ids.device)  # (1, L - 1)
    position = torch.cat([last, later], dim=1)  # (1, L)
    shared = Cache(layers=[KeptLayer() for _ in cache])
    for layer, (keys, values) in zip(shared.layers, cache):
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = (kv.expand(n, -1, -1, -1) for kv in (keys, values))
    return model(input_ids=ids, position_ids=position.expand(3, n, L), past_key_values=shared,
                 use_cache=False).logits  # (n, L, V)


def token_logps(logits, responses, temperature):
    """Returns the log-probabilities (n, L) of the response tokens under the (n, L, V) logits.
    Computes them in pieces, and again in the backward pass. With a vocabulary of 150,000, float32
    copies of all logits would take more memory than the model's activations."""
    def of_piece(logits, ids):  # (m, V), (m,)
        return (logits.float() / temperature).log_softmax(-1).gather(-1, ids[:, None])[:, 0]
    pieces = zip(logits.flatten(0, 1).split(PIECE), responses.flatten().split(PIECE))
    return torch.cat([checkpoint(of_piece, *piece, use_reentrant=False)
                      for piece in pieces]).view_as(responses)  # (n, L)


@torch.no_grad()
def token_entropy(logits, temperature):
    """Returns the entropies (n, L) of the next-token distributions of (n, L, V) logits."""
    return torch.cat([torch.special.entr((piece.float() / temperature).softmax(-1)).sum(-1)
                      for piece in logits.flatten(0, 1).split(PIECE)]).view(logits.shape[:2])


def prompt_cache(output):
    """Returns [(keys, values)] of the layers, (1, heads, P - 1, dim) each: without the prompt's
    last token, which response_logits runs again."""
    return [(layer.keys[:, :, :-1], layer.values[:, :, :-1])
            for layer in output.past_key_values.layers]


@torch.no_grad()
def group_logps(model, inputs, responses, lengths, chunk_size, temperature=1.0):
    """Returns the log-probabilities (G, L) of a group's responses, up to their lengths (G,). The
    prompt runs once, then chunk_size responses at a time. The result equals that of one forward
    over G copies of the prompt, each with its response."""
    output, positions = run_prompt(model, inputs)
    cache = prompt_cache(output)
    logps = torch.zeros(responses.shape, device=responses.device)  # (G, L)
    for rows, chunk in chunks_of(responses, lengths, chunk_size):
        logits = response_logits(model, cache, inputs, positions, chunk)  # (n, L, V)
        logps[rows, :chunk.shape[1]] = token_logps(logits, chunk, temperature)
    return logps


def chunks_of(responses, lengths, chunk_size):
    """Yields (rows, responses[rows] up to their longest). Responses of similar length share a
    chunk, to save padding."""
    for rows in lengths.argsort().split(chunk_size):
        yield rows, responses[rows, :lengths[rows].max()]  # (n,), (n, L)


def begin_backward(engine, blank):
    """Runs a backward of zeros through every parameter, before a step's first group.

    In a step's first backward ZeRO overwrites gradients; in later ones it adds to them. A group's
    first backward ends at the prompt's keys and values, before the vision tower. Without this call
    the tower's gradients would be added to the previous step's.
    """
    engine.set_gradient_accumulation_boundary(False)
    output, _ = run_prompt(engine, blank)
    engine.backward(0.0 * output.logits.max())  # not the sum: 0 * -inf is NaN


def backward_group(engine, inputs, responses, lengths, chunk_loss, chunk_size, temperature,
                   last):
    """Runs the backward of a group's loss with one prompt and one chunk of responses in memory.

    chunk_loss(rows, logps, entropy) -> scalar, for the chunk responses[rows] up to its longest;
    the group's loss is the sum over chunks. (a) The prompt runs once. (b) Its keys and values
    become leaves of the graph. (c) Each chunk runs forward and backward on them; their gradients
    add up in the leaves. (d) One backward carries these through the prompt and the vision tower.
    last: whether this is the last group before the optimizer step, when ranks average gradients.
    """
    output, positions = run_prompt(engine, inputs)  # (a)
    attached = [kv for pair in prompt_cache(output) for kv in pair]
    leaves = [kv.detach().requires_grad_() for kv in attached]  # (b)
    cache = list(zip(leaves[::2], leaves[1::2]))
    engine.set_gradient_accumulation_boundary(False)
    for rows, chunk in chunks_of(responses, lengths, chunk_size):  # (c)
        logits = response_logits(engine, cache, inputs, positions, chunk)  # (n, L, V)
        engine.backward(chunk_loss(rows, token_logps(logits, chunk, temperature),
                                   token_entropy(logits, temperature)))
    engine.set_gradient_accumulation_boundary(last)
    # (d); DeepSpeed expects every parameter in the last backward: the zero term reaches all
    engine.backward(sum((kv * leaf.grad).sum() for kv, leaf in zip(attached, leaves))
                    + 0.0 * output.logits.max())


# ------------------------------------------------------------ the models beside the policy

def start_sampler(run, forbidden_ids):
    """Returns the model that rollouts sample from: the policy itself or, if its weights are sharded
    (ZeRO-3), an unsharded copy of it, which gather_weights updates."""
    module = run.engine.module
    if not run.engine.zero_optimization_partition_weights():
        return module
    with torch.device("meta"):
        sampler = AutoModelForImageTextToText.from_config(
            module.config, dtype=module.dtype, attn_implementation=run.args.attn_implementation)
    sampler = sampler.to_empty(device=run.device).eval().requires_grad_(False)
    sampler.tie_weights()
    add_adapters(sampler, run.args)
    forbid_tokens(sampler, forbidden_ids, run.device)
    for source, target in zip(module.buffers(), sampler.buffers(), strict=True):
        target.copy_(source)
    gather_weights(run.engine, sampler, trained=False)
    return sampler


def gather_weights(engine, sampler, trained=True):
    """Copies the trained weights (the frozen ones if `trained` is False) of a sharded policy into
    the sampler, one parameter at a time. Collective."""
    if sampler is not engine.module:
        for source, target in zip(engine.module.parameters(), sampler.parameters(), strict=True):
            if source.requires_grad == trained:
                with deepspeed.zero.GatheredParameters([source]):
                    target.data.copy_(source.data)


def start_reference(run, forbidden_ids, sampler):
    """Returns the frozen reference model, sharded if the policy is (ZeRO-3). With --lora_rank it is
    the sampler, for which update turns the adapters off."""
    if run.args.lora_rank:
        return sampler
    model = load_model(run.args, run.config).eval().requires_grad_(False)
    forbid_tokens(model, forbidden_ids, run.device)
    if not run.engine.zero_optimization_partition_weights():
        return model.to(run.device)
    keys = ("zero_optimization", "bf16", "train_micro_batch_size_per_gpu")
    config = {key: run.config[key] for key in keys if key in run.config}
    return deepspeed.initialize(model=model, config=config)[0]


# ------------------------------------------------------------------- one step, on one rank

# A group is the dict of one question. The functions on the right add these keys; those with * only
# for a video, if --alpha is above 0.
#   record                                  the question                   example, in a data worker
#   ordered, shuffled*                      model inputs of the prompt                             "
#   frame_order*                            list of T: original index of each shuffled frame       "
#   responses (G, L), responses_shuffled* (G_tilde, L)     ids                      sample_responses
#   mask (G, L), lengths (G,)               ones up to the end token; their number       grade_group
#   texts, texts_shuffled, truncated        lists of G, G_tilde (or 0) and G                       "
#   parts                                   accuracy, format, length, temporal*: (G,);             "
#                                           p, p_tilde*, r_t*: numbers
#   R, A                                    rewards and advantages (G,)                            "
#   old, ref (None at --beta 0), weights    log-probabilities; token_weights: (G, L)          update


def example(args, processor, record, vision, position):
    """Returns a record's group with its model inputs. position: see sft.Questions."""
    group = {"record": record, "ordered": encode(processor, record, vision)}
    if record["data_type"] == "video" and args.alpha:
        generator = seeded_generator(FRAME_STREAM, args.seed, position)
        order = shuffle_frames(torch.arange(len(vision.frames)), generator)  # (T,)
        shuffled = vision._replace(frames=vision.frames[order])
        group |= {"shuffled": encode(processor, record, shuffled), "frame_order": order.tolist()}
    return group


def blank_group(processor, G, end_id, device):
    """Returns a group of G empty responses to a black picture, with a loss of 0. A rank that lacks
    a question runs it, because all ranks must make the same engine calls."""
    return {"ordered": to_device(encode_blank(processor), device), "A": torch.zeros(G),
            "responses": torch.full((G, 1), end_id, device=device),
            "mask": torch.ones(G, 1, device=device), "lengths": torch.ones(G, dtype=torch.int64)}


def sample_responses(model, groups, args, generator, eos_ids):
    """Does step 2 for this rank's questions: adds responses and, for shuffled frames,
    responses_shuffled to the groups."""
    prompts, counts = [], []
    for group in groups:
        orders = [group[key] for key in ("ordered", "shuffled") if key in group]
        batch = pad_batch(orders, {}, "left")  # the same length: no padding
        prompts.append(to_device(batch, generator.device))
        counts.append([args.G, args.G_tilde][:len(orders)])
    if not groups:
        return
    model.eval()  # turns gradient checkpointing off
    responses = iter(rollout(model, prompts, counts, max_new_tokens=args.max_new_tokens,
                             temperature=args.temperature, top_p=args.top_p, eos_ids=eos_ids,
                             generator=generator, static=args.static_decode))
    for group in groups:
        group["responses"] = next(responses)
        if "shuffled" in group:
            group["responses_shuffled"] = next(responses)


def greedy_texts(run, sampler, tokenizer, eos_ids, prompts):
    """Returns the greedy responses to encoded prompts, as `respond` of validate. Collective."""
    gather_weights(run.engine, sampler)
    if not prompts:  # of this rank
        return []
    responses = rollout(
        sampler, [to_device(prompt, run.device) for prompt in prompts], [[1]] * len(prompts),
        max_new_tokens=run.args.max_new_tokens, temperature=0, top_p=1, eos_ids=eos_ids,
        generator=None, static=run.args.static_decode)  # (1, L) each
    return tokenizer.batch_decode(torch.cat(responses), skip_special_tokens=True)


def grade_group(group, tokenizer, eos_ids, args):
    """Does steps 3 to 5 for one question: adds rewards and advantages to its group."""
    def read(ids):
        mask = response_mask(ids, eos_ids)  # (n, L)
        kept = [row[:n] for row, n in zip(ids.tolist(), mask.sum(1).int().tolist())]
        return mask, tokenizer.batch_decode(kept, skip_special_tokens=True)

    mask, texts = read(group["responses"])  # (G, L)
    texts_shuffled = read(group["responses_shuffled"])[1] if "responses_shuffled" in group else []
    lengths = mask.sum(1).int().cpu()  # (G,) tokens, the end token included
    parts = group_rewards(texts, texts_shuffled, lengths.tolist(), group["record"], args)
    temporal = parts.get("temporal", torch.zeros(args.G))  # (G,)
    R = parts["accuracy"] + parts["format"] + parts["length"]  # (G,)
    if args.temporal_to == "reward":
        R = R + temporal  # (G,) Eq. 2
    A = group_advantages(R.double(), args.scale_advantages).float()  # (G,) Eq. 3
    if args.temporal_to == "advantage":
        A = A + temporal  # (G,)
    truncated = ~torch.isin(group["responses"].cpu(), torch.tensor(eos_ids)).any(1)  # (G,)
    longest = lengths.max()  # of this group; until here padded to the longest of the rollout
    group |= {"responses": group["responses"][:, :longest], "mask": mask[:, :longest],
              "lengths": lengths, "texts": texts, "texts_shuffled": texts_shuffled, "parts": parts,
              "R": R, "A": A, "truncated": truncated.float().tolist()}


def update(run, step, reference, groups, blank, metrics):
    """Does step 6: updates_per_rollout optimizer steps on the responses of this rank's questions.
    Returns False, without an optimizer step, if the loss or a gradient is not finite.

    Every rank runs prompts_per_rank groups; the blank group replaces skipped questions. All groups
    have the same weight, whichever rank they are on.
    """
    args, engine = run.args, run.engine
    total = sum(gather_objects(len(groups)))  # of all ranks
    if total == 0:
        return True
    # without KL term and advantages a group has no gradient: the blank one is cheaper
    moving = [group for group in groups if args.beta or group["A"].any()]
    note(metrics, "update/saved_share", [float(len(groups) - len(moving))], count=len(groups))
    note(metrics, "optim/loss", [0.0] * (len(groups) - len(moving)) * args.updates_per_rollout)
    groups = moving + [blank] * (args.prompts_per_rank - len(moving))
    for group in groups:
        group["A"], group["old"] = group["A"].to(run.device), torch.zeros_like(group["mask"])
        group["weights"] = token_weights(group["mask"], args.loss_mean, args.max_new_tokens)
        group["ref"] = None
        if args.beta:
            inputs = to_device(group["ordered"], run.device)
            with adapters_off():
                group["ref"] = group_logps(reference, inputs, group["responses"], group["lengths"],
                                           args.chunk_size, args.temperature)  # (G, L)
    engine.train()  # after the rollout's eval
    for u in range(args.updates_per_rollout):
        begin_backward(engine, blank["ordered"])
        for i, group in enumerate(groups):
            def chunk_loss(rows, logps, entropy):
                if u == 0:  # the policy is still the one that sampled
                    group["old"][rows, :logps.shape[1]] = logps.detach()
                loss = group_loss(group, rows, logps, args)
                if group is blank:
                    return 0.0 * loss
                note_policy(metrics, group, rows, logps.detach(), entropy, u, args.epsilon)
                note(metrics, "optim/loss", [loss.item()], count=len(rows) / args.G)
                return loss * run.world / total  # DeepSpeed averages over ranks

            inputs = to_device(group["ordered"], run.device)
            backward_group(engine, inputs, group["responses"], group["lengths"], chunk_loss,
                           args.chunk_size, args.temperature, last=i == len(groups) - 1)
        if not optimizer_step(run, step, metrics.get("optim/loss", (0.0, 0))[0]):
            return False
    return True


def group_loss(group, rows, logps, args):
    """Returns the part of the group's loss (Eq. 4) that comes from the chunk responses[rows]."""
    part = rows, slice(logps.shape[1])  # of the (G, L) tensors
    ref = None if group["ref"] is None else group["ref"][part]
    return tgrpo_loss(logps, group["old"][part], ref, group["A"][rows], group["mask"][part],
                      args.beta, args.epsilon, group["weights"][part])


def note_policy(metrics, group, rows, logps, entropy, u, epsilon):
    """Notes per-token metrics of the chunk responses[rows], from its logps and entropy (n, L). u:
    the number of the rollout's update, from 0."""
    part = rows, slice(logps.shape[1])
    inside, A = group["mask"][part].bool(), group["A"][rows, None]  # (n, L), (n, 1)
    note(metrics, "policy/entropy", entropy[inside].tolist())
    if u > 0:  # in the first update the ratio is 1
        ratio = policy_ratio(logps, group["old"][part], group["mask"][part])  # (n, L)
        clipped = torch.where(A > 0, ratio > 1 + epsilon, ratio < 1 - epsilon) & (A != 0)
        note(metrics, "policy/clip_rate", clipped[inside].tolist())
        note(metrics, "policy/ratio_max", ratio[inside].tolist())
    if group["ref"] is not None:
        note(metrics, "policy/kl", kl_k3(logps, group["ref"][part])[inside].tolist())


def note_group(metrics, group):
    """Notes reward, group and response metrics of one question. Undefined ones are absent."""
    parts, record, R = group["parts"], group["record"], group["R"]
    for name in ("accuracy", "format", "length", "temporal"):
        if name in parts:
            note(metrics, f"reward/{name}", parts[name].tolist())
    note(metrics, "reward/total", R.tolist())
    note(metrics, f"accuracy/{record['problem_type']}", parts["accuracy"].tolist())
    note(metrics, "group/p", [parts["p"]])
    note(metrics, "group/zero_std_rate", [float((R == R[0]).all())])
    if "p_tilde" in parts:
        note(metrics, "group/p_tilde", [parts["p_tilde"]])
        note(metrics, "group/tie_rate", [float(parts["p"] == parts["p_tilde"])])
        if parts["p"] > 0:  # only correct responses get r_t
            note(metrics, "group/temporal_rate", [float(parts["r_t"] > 0)])
    note(metrics, "response/tokens", group["lengths"].tolist())
    note(metrics, "response/truncated_rate", group["truncated"])
    note(metrics, "data/video_share", [float(record["data_type"] == "video")])


def rollout_row(group):
    """Returns one question's line of rollouts.jsonl."""
    parts = {name: value.tolist() if torch.is_tensor(value) else value
             for name, value in group["parts"].items()}
    return {"problem_id": group["record"]["problem_id"], "path": group["record"]["path"],
            "frame_order": group.get("frame_order"), "responses": group["texts"],
            "responses_shuffled": group["texts_shuffled"], **parts,
            "R": group["R"].tolist(), "A": group["A"].tolist()}


def print_question(group, step):
    """Prints a question with p, p_tilde, and the responses of highest and lowest reward."""
    record, parts, R = group["record"], group["parts"], group["R"]
    options = "".join(f" | {option}" for option in record.get("options") or ())
    shares = f"p {parts['p']:.3g}"
    if "r_t" in parts:
        shares += f", p_tilde {parts['p_tilde']:.3g}: r_t {parts['r_t']:g}"
    lines = [f"step {step + 1}, {record['data_type']} {record['path']}: "
             f"{brief(record['problem'] + options)} {brief(record['solution'])}", shares]
    for word, i in (("best", R.argmax()), ("worst", R.argmin())):
        lines.append(f"{word}: R {R[i]:.2f}, A {group['A'][i]:.2f}  {brief(group['texts'][i])}")
    print("\n  ".join(lines))


def brief(text, most=300):
    """Returns a text on one line, control characters as "?"; cuts the middle of a long text.

    >>> brief("up\\n\\x1b[2J down"), brief("abcdef", most=4)
    ('up ?[2J down', 'ab ... ef')
    """
    text = "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
    return text if len(text) <= most else f"{text[:most // 2]} ... {text[-most // 2:]}"


def main(args):
    # ------------------------------------------------------------- records, models, engine
    records = load_records(args.data, args.media_root)
    refuse_absent_media(args.data, records)
    processor = load_processor(args)
    require_full_attention(args)
    run = open_run(args, records, parse_args, args.prompts_per_rank)
    questions = start_questions(run, processor, records, partial(example, args))
    model = load_model(args, run.config)
    model.model.visual.requires_grad_(not args.freeze_vision)
    add_adapters(model, args)
    if args.gradient_checkpointing:
        recompute_activations(model)
    eos_ids = stop_tokens(model, processor.tokenizer)
    forbidden_ids = forbidden_tokens(model, processor.tokenizer)
    forbid_tokens(model, forbidden_ids, run.device)
    start_engine(run, model)
    sampler = start_sampler(run, forbidden_ids)
    reference = start_reference(run, forbidden_ids, sampler) if args.beta else None
    blank = blank_group(processor, args.G, eos_ids[0], run.device)
    run.validate = partial(validate, run, processor, partial(
        greedy_texts, run, sampler, processor.tokenizer, eos_ids))

    # ------------------------------------------------------------------------------- loop
    work = (f"{args.prompts_per_rank} questions x ({args.G} + {args.G_tilde if args.alpha else 0}) "
            f"responses, {min(args.chunk_size, args.G)} of them in a chunk of the update")
    for step, drawn, metrics in steps(run, records, questions, work):
        # 1. questions, which data workers have decoded and encoded in advance
        groups = [group for group in drawn if "record" in group]
        # 2. responses to ordered and shuffled frames
        gather_weights(run.engine, sampler)
        generator = seeded_generator(ROLLOUT_STREAM, args.seed, step, run.rank, device=run.device)
        sample_responses(sampler, groups, args, generator, eos_ids)
        # 3. to 5. rewards and advantages
        for group in groups:
            grade_group(group, processor.tokenizer, eos_ids, args)
            note_group(metrics, group)
        lap(run, metrics, "rollout")
        # 6. clipped update
        finite = update(run, step, reference, groups, blank, metrics)
        lap(run, metrics, "update")
        # metrics, logs, checkpoint
        due = step % args.rollout_steps == 0 or not finite
        rollouts = [rollout_row(group) for group in groups if due]
        if close_step(run, step, drawn, metrics, finite, rollouts):
            return
        if groups and run.rank == 0 and args.show_steps and step % args.show_steps == 0:
            print_question(groups[0], step)
    save_model(run, processor)
    print_end(run, f"python evaluate.py --model {args.output} --benchmark NAME=FILE --output "
                   "FOLDER")


if __name__ == "__main__":
    run_script(main, parse_args)
