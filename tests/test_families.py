"""Every family of models goes through the same code: tiny random ones of each, against generate
and the naive forms; those that cannot are refused."""
import re
import shutil
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (AutoConfig, AutoModelForImageTextToText, AutoProcessor,
                          CLIPImageProcessor, LlavaProcessor, Qwen2VLImageProcessor,
                          Qwen2VLProcessor, Qwen2VLVideoProcessor)

import annotate
import sft
import tgrpo
from bench import naive_logits
from build_data import (InputError, encode_blank, image_as_video, load_processor, load_records,
                        load_vision_of, pad_batch, seeded_generator, stop_tokens, token_side,
                        toy_model, toy_processor)
from conftest import ROOT, PlainEngine, run
from test_runs import tgrpo as command
from test_tgrpo import forbid, sampling
from two_ranks import backward_naive, cases, difference

SIDES = {"qwen2_vl": 28, "qwen2_5_vl": 28, "qwen3_vl": 32, "qwen3_vl_moe": 32}
# A family that the toy does not offer: one that it does, and what to change in its configuration
LIKE = {"qwen2_vl": ("qwen2_5_vl", {"vision_config": {"embed_dim": 64, "hidden_size": 96,
                                                      "mlp_ratio": 2}}),
        "qwen3_vl_moe": ("qwen3_vl", {"text_config": {"num_experts": 4, "num_experts_per_tok": 2,
                                                      "moe_intermediate_size": 64}}),
        "qwen3_5": ("qwen3_vl", {"text_config": {"layer_types": None}}),
        "sliding": ("qwen2_5_vl", {"text_config": {"use_sliding_window": True, "sliding_window": 16,
                                                   "max_window_layers": 0, "layer_types": None}})}
FLAGS = ["--model", "m", "--data", "d", "--output", "o", "--min_pixels=1024", "--max_pixels=1024",
         "--image_min_pixels=1024", "--max_frames=8", "--num_workers=0"]
# Made-up responses of a group, with advantages
RESPONSES = torch.randint(0, 400, (5, 9), generator=torch.Generator().manual_seed(0))
LENGTHS, A = torch.tensor([9, 2, 5, 3, 9]), torch.linspace(-1, 1.5, 5)


def config_of(family, tokenizer):
    """The toy's configuration, or with LIKE's changes that of another family."""
    base, changes = LIKE.get(family, (family, {}))
    settings = toy_model(tokenizer, 0, family=base).config.to_dict()
    for part in ("text_config", "vision_config"):
        settings[part] |= changes.get(part, {})
        settings[part].pop("model_type")
    settings.pop("model_type")
    return AutoConfig.for_model("qwen2_5_vl" if family == "sliding" else family, **settings)


def processor_of(family, tokenizer):
    if family != "qwen2_vl":
        return toy_processor(tokenizer, LIKE.get(family, (family, {}))[0])
    like = toy_processor(tokenizer)
    size = like.image_processor.size
    return Qwen2VLProcessor(Qwen2VLImageProcessor(size=size), tokenizer,
                            Qwen2VLVideoProcessor(size=size, cap_pixels_per_frame=False),
                            chat_template=like.chat_template)


@pytest.fixture(scope="module")
def folder_of(toy, processor, tmp_path_factory):
    """Makes the toy's folder with a random model of a family in it."""
    def make(family):
        out = tmp_path_factory.getbasetemp() / f"toy_{family}"
        if not out.exists():
            shutil.copytree(toy, out, ignore=shutil.ignore_patterns("model"))
            tokenizer = processor.tokenizer
            torch.manual_seed(0)
            model = AutoModelForImageTextToText.from_config(config_of(family, tokenizer))
            ends = model.config.text_config.eos_token_id
            model.generation_config.update(eos_token_id=ends, pad_token_id=ends[1])
            model.save_pretrained(out / "model")
            processor_of(family, tokenizer).save_pretrained(out / "model")
        return out
    return make


def first_of_each(path):
    """Returns {"video", "image"}: the first such record of a file."""
    return {record["data_type"]: record for record in reversed(load_records(path))}


@pytest.fixture(params=SIDES)
def family(request, folder_of):
    """A family's model and processor as they load from its folder, and the groups of the first
    video and image of the toy."""
    folder = folder_of(request.param)
    model = AutoModelForImageTextToText.from_pretrained(folder / "model").eval()
    processor = AutoProcessor.from_pretrained(folder / "model")
    assert model.config.model_type == request.param
    args = tgrpo.parse_args(FLAGS)
    groups = {kind: tgrpo.example(args, processor, record,
                                  load_vision_of(record, args, processor), 0)
              for kind, record in first_of_each(folder / "train.json").items()}
    return SimpleNamespace(name=request.param, folder=folder, model=model, processor=processor,
                           **groups)


# --------------------------------------------------------------------------- a model's inputs

def test_pictures_have_sides_that_the_model_s_tokens_cover(family):
    """Limits are pixels, of whatever token; the text has as many places as there are tokens."""
    side, processor = SIDES[family.name], family.processor
    assert token_side(processor) == side
    args = tgrpo.parse_args([*FLAGS, "--max_pixels", "10000", "--min_pixels", "7000"])
    vision = load_vision_of(family.video["record"], args, processor)
    assert vision.frames.shape[2:] == {28: (84, 84), 32: (96, 96)}[side]
    inputs = tgrpo.example(args, processor, family.video["record"], vision, 0)["ordered"]
    assert inputs["video_grid_thw"].tolist() == [[4, 6, 6]]
    for inputs in (inputs, family.image["ordered"], encode_blank(processor)):
        grid = inputs.get("video_grid_thw", inputs.get("image_grid_thw"))
        assert (inputs["mm_token_type_ids"] > 0).sum() == grid.prod() // 4


def test_shuffling_changes_the_frames_and_never_their_times(family):
    """Times are positions or, in Qwen3-VL, text: both groups have them in order."""
    ordered, shuffled = family.video["ordered"], family.video["shuffled"]
    for key in ordered:
        assert torch.equal(ordered[key], shuffled[key]) == (key != "pixel_values_videos"), key
    T, H, W = ordered["video_grid_thw"][0].tolist()

    def frames(inputs):  # (patches, C x 2 frames x patch x patch) -> (T, the frame's values)
        patches = inputs["pixel_values_videos"].view(T, H * W, 3, 2, -1)
        return patches.permute(0, 3, 1, 2, 4).reshape(2 * T, -1)
    assert torch.equal(frames(shuffled), frames(ordered)[family.video["frame_order"]])
    text = family.processor.tokenizer.decode(ordered["input_ids"][0])
    # two frames a second, two to a time step: 0 and 0.5 s, 1 and 1.5 s, ...
    times = ["0.2", "1.2", "2.2", "3.2"] if "qwen3" in family.name else []
    assert re.findall(r"<([\d.]+) seconds>", text) == times
    positions, _ = tgrpo.rope_positions(family.model, ordered)
    steps = positions[0, 0, ordered["mm_token_type_ids"][0] > 0].unique()
    assert len(steps) == T


def test_an_image_as_a_video_of_one_step_is_the_same_to_the_model(family):
    inputs = family.image["ordered"]
    as_video = image_as_video(family.processor, inputs)
    assert "pixel_values" not in as_video
    with torch.no_grad():
        assert torch.equal(family.model(**inputs).logits, family.model(**as_video).logits)


# -------------------------------------------------------------------------------- rollout

def test_greedy_rollouts_equal_generate_and_stand_at_its_positions(family):
    """Three rows at once: a video's two orders, and an image whose prompt is shorter."""
    model, stood = family.model, []
    both = pad_batch([family.video["ordered"], family.video["shuffled"]], {}, "left")
    prompts = [family.video["ordered"], family.video["shuffled"], family.image["ordered"]]
    options = sampling(family.processor, model, top_p=1e-6)  # a nucleus of one token

    def look(module, args, kwargs):  # positions by time, height and width, of every call
        stood.append(kwargs["position_ids"][-3:])
    model.model.language_model.register_forward_pre_hook(look, with_kwargs=True)
    forbidden_ids = forbid(family.processor, model)
    rows = tgrpo.rollout(model, [both, prompts[2]], [[1, 1], [1]], **options)
    decoded = stood[2:]  # after the two batches of prompts
    for i, (inputs, ids) in enumerate(zip(prompts, rows)):
        stood.clear()
        expected = model.generate(**inputs, max_new_tokens=12, do_sample=False,
                                  suppress_tokens=forbidden_ids)
        P = inputs["input_ids"].shape[1]
        assert ids[0].tolist() == expected[0, P:].tolist()
        positions, following = tgrpo.rope_positions(model, inputs)
        assert torch.equal(stood[0], positions)
        for t, position in enumerate(stood[1:]):
            assert (position == following + t).all()
            assert torch.equal(decoded[t][:, i], position[:, 0])


class Operations(TorchDispatchMode):
    """Collects the names of torch's operations."""
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.names.add(operation.__name__.partition(".")[0])
        return operation(*args, **(kwargs or {}))


def test_static_decoding_gives_the_same_responses_from_fixed_buffers(family, monkeypatch):
    """A video in both orders and an image, of which rows end early; all rows are decoded. No
    operation moves a value between CPU and device, which a CUDA graph could not hold."""
    model, calls, responses, operations = family.model, [], [], Operations()
    model.generation_config.eos_token_id = list(range(0, 488, 5))  # rows end often
    eos_ids = stop_tokens(model, family.processor.tokenizer)
    decode, static_decoder = tgrpo.decode, tgrpo.static_decoder
    forbid(family.processor, model)

    def look(model, tokens, position, mask, cache):
        calls.append((len(tokens), mask.data_ptr(), cache.layers[-1].keys.data_ptr()))
        return decode(model, tokens, position, mask, cache)

    def watch(step):
        with operations:
            return step()
    monkeypatch.setattr(tgrpo, "decode", look)
    monkeypatch.setattr(tgrpo, "static_decoder",
                        lambda *args: partial(watch, static_decoder(*args)))
    for more in ([], ["--static_decode"]):
        args = tgrpo.parse_args([*FLAGS, "--G=4", "--G_tilde=2", "--max_new_tokens=12", *more])
        groups = [dict(family.video), dict(family.image)]
        calls.clear()
        tgrpo.sample_responses(model, groups, args, seeded_generator(3), eos_ids)
        responses += [value for group in groups for key, value in group.items()
                      if key.startswith("responses")]
        if not more:
            assert len({rows for rows, *_ in calls}) > 2, "rows do not end early enough"
    assert {rows for rows, *_ in calls} == {4 + 2 + 4} and len({*calls}) == 1
    assert "index_copy_" in operations.names and not operations.names & {
        "item", "is_nonzero", "_local_scalar_dense", "nonzero", "lift_fresh"}
    assert len(responses) == 6 and all(map(torch.equal, responses[:3], responses[3:]))


def test_visual_and_special_tokens_are_never_sampled(family):
    """But end tokens are: a decoded response would not show others, and its length counts them."""
    model, tokenizer = family.model, family.processor.tokenizer
    forbidden_ids = forbid(family.processor, model)
    assert {model.config.image_token_id, model.config.video_token_id,
            model.config.vision_start_token_id} <= {*forbidden_ids}
    assert {*tokenizer.all_special_ids} - {*forbidden_ids} == {*stop_tokens(model, tokenizer)}
    with torch.no_grad():  # a policy that would emit them nearly always
        vectors = model.get_output_embeddings().weight
        vectors[forbidden_ids] = 4 * vectors.abs().max()
    ids, = tgrpo.rollout(model, [family.video["ordered"]], [[8]],
                         **sampling(family.processor, model, max_new_tokens=20))
    assert not torch.isin(ids, torch.tensor(forbidden_ids)).any()


def test_answers_in_a_batch_of_images_and_videos_equal_those_one_at_a_time(family):
    model, tokenizer = family.model, family.processor.tokenizer
    model.generation_config.update(max_new_tokens=12, num_return_sequences=1,
                                   suppress_tokens=tgrpo.forbidden_tokens(model, tokenizer))
    samples = [{"record": group["record"], "inputs": group["ordered"]}
               for group in (family.video, family.image)]
    alone = [annotate.respond(model, tokenizer, [sample], 0)[0] for sample in samples]
    assert annotate.respond(model, tokenizer, samples, 0) == alone and alone[0] != alone[1]
    for sample in samples:  # as held-out answers have them
        sample["inputs"] = image_as_video(family.processor, sample["inputs"])
    assert annotate.respond(model, tokenizer, samples, 0) == alone


# ------------------------------------------------------------- log-probabilities, gradients

def take_gradients(model):
    """Returns the model's gradients by name, and removes them from it."""
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    return gradients


@pytest.mark.parametrize("medium, chunk_size", [("video", 1), ("video", 2), ("image", 5)])
def test_prefix_shared_log_probs_and_gradients_equal_naive_ones(family, medium, chunk_size):
    """Features that enter the language model between its layers are the prompt's pass's alone."""
    model, inputs = family.model, getattr(family, medium)["ordered"]
    mask = (torch.arange(9) < LENGTHS[:, None]).float()
    naive = tgrpo.token_logps(naive_logits(model, inputs, RESPONSES), RESPONSES, 1.0)
    ref = tgrpo.group_logps(model, inputs, RESPONSES, LENGTHS, chunk_size)
    assert torch.allclose(ref * mask, naive * mask, atol=1e-5)

    def loss(rows, logps, entropy=None):
        part = rows, slice(logps.shape[1])
        return tgrpo.tgrpo_loss(logps, logps.detach(), ref[part] - 0.1, A[rows], mask[part], 0.04,
                                0.2) * len(rows) / 5
    tgrpo.backward_group(PlainEngine(model), inputs, RESPONSES, LENGTHS, loss, chunk_size, 1.0,
                         last=True)
    shared = take_gradients(model)
    loss(torch.arange(5), naive).backward()
    assert difference(model, shared) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputed_activations_give_the_same_gradients_in_every_bit(family, dtype, monkeypatch):
    """In tower and language model, of a video and an image, in chunks of 1, 2 and 4. Each layer's
    update is called twice then, and never without --gradient_checkpointing."""
    model, calls, update = family.model.to(dtype).train(), [], tgrpo.KeptLayer.update
    monkeypatch.setattr(tgrpo.KeptLayer, "update",
                        lambda *args: (calls.append(1), update(*args))[1])

    def gradients(inputs, chunk_size):
        calls.clear()
        tgrpo.backward_group(PlainEngine(model), inputs, RESPONSES, LENGTHS,
                             lambda rows, logps, entropy: (logps * A[rows, None]).mean(),
                             chunk_size, 1.0, last=True)
        return take_gradients(model), len(calls)
    for group, chunk_size in ((family.video, 1), (family.video, 4), (family.image, 2)):
        model.activation_checkpointing_disable()
        kept, once = gradients(group["ordered"], chunk_size)
        tgrpo.recompute_activations(model)
        recomputed, twice = gradients(group["ordered"], chunk_size)
        assert twice == 2 * once > 0
        assert all(torch.equal(kept[name], recomputed[name]) for name in kept)


def cold_start(family):
    """Returns the cold start's inputs of a video and of an image, of different length."""
    args, rows = tgrpo.parse_args(FLAGS), first_of_each(family.folder / "cot.json")
    video, image = (sft.sft_example(family.processor, rows[kind], load_vision_of(
        rows[kind], args, family.processor), 0)["inputs"] for kind in ("video", "image"))
    assert video["input_ids"].shape != image["input_ids"].shape
    return video, image


def test_the_cold_start_learns_a_response_where_a_rollout_samples_it(family):
    """Also after a video whose time axis exceeds the positions of its prompt's text."""
    video, image = cold_start(family)
    for row in (video, image, video | {"second_per_grid_ts": torch.tensor([20.0])}):
        n = int((row["labels"] == sft.IGNORED).sum())
        prompt = row | {key: row[key][:, :n] for key in
                        ("input_ids", "attention_mask", "mm_token_type_ids")}
        _, following = tgrpo.rope_positions(family.model, prompt)
        positions, _ = tgrpo.rope_positions(family.model, row)
        positions = sft.continue_positions(positions, row["labels"])
        later = following[0] + torch.arange(positions.shape[2] - n)
        assert (positions[:, 0, n:] == later).all()


def test_the_cold_start_s_loss_of_a_padded_batch_is_that_of_its_records_one_by_one(family):
    """From the logits of target tokens alone, with gradient checkpointing, without a router's own
    loss; and zero if there is no target."""
    model, rows = family.model, cold_start(family)
    pads = {"input_ids": family.processor.tokenizer.pad_token_id, "attention_mask": 0,
            "mm_token_type_ids": 0, "labels": sft.IGNORED}
    model.train().activation_checkpointing_enable({"use_reentrant": False})
    model.config.text_config.output_router_logits = True
    blank = rows[0] | {"labels": torch.full_like(rows[0]["labels"], sft.IGNORED)}
    sft.batch_loss(PlainEngine(model), blank).backward()
    assert not any(gradient.any() for gradient in take_gradients(model).values())
    loss = sft.batch_loss(PlainEngine(model), pad_batch(rows, pads, "right"))
    loss.backward()
    model.activation_checkpointing_disable()
    together = take_gradients(model)
    alone = 0
    for row in rows:
        labels = row.pop("labels")
        alone += F.cross_entropy(model(**row).logits[0, :-1], labels[0, 1:], reduction="sum")
    alone.backward()
    assert loss.item() == pytest.approx(alone.item(), rel=1e-5)
    assert difference(model, together) < 1e-4


@pytest.mark.parametrize("name", ["qwen3_vl_moe", *(pytest.param(name, marks=pytest.mark.slow)
                                                    for name in ("qwen2_vl", "qwen3_vl"))])
def test_gradients_with_a_video_and_an_image_on_two_ranks(folder_of, tmp_path, name):
    """ZeRO-3 (parameters of every size sharded) against the naive form in one process."""
    folder = folder_of(name)
    run(ROOT / "tests/two_ranks.py", "--toy", folder, "--out", tmp_path, "--settings", 1, ranks=2)
    path, = (tmp_path / "rank0").glob("(*.pt")
    model = AutoModelForImageTextToText.from_pretrained(folder / "model").eval()
    processor = AutoProcessor.from_pretrained(folder / "model")
    backward_naive(model, cases(folder, processor), 1 / 2)
    assert difference(model, torch.load(path, weights_only=True)) < 1e-4
    experts = [p.grad for key, p in model.named_parameters() if "expert" in key]
    assert bool(experts) == ("moe" in name) and all(grad.any() for grad in experts)


# --------------------------------------------------------------------------- runs, refusals

def test_a_mixture_of_experts_is_saved_as_it_was_loaded(folder_of, tmp_path):
    """Sharded, two steps of no size: the weights that transformers reads come back bit for bit."""
    folder = folder_of("qwen3_vl_moe")
    result = run(*command(folder, tmp_path / "run", "--learning_rate=0", "--max_steps=2"))
    before, after = (AutoModelForImageTextToText.from_pretrained(path).state_dict()
                     for path in (folder / "model", tmp_path / "run"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert token_side(AutoProcessor.from_pretrained(tmp_path / "run")) == 32
    assert re.search("first video: 4 x 2 x 2 patches .*, 4 of its .* tokens visual",
                     result.stdout)


@pytest.mark.parametrize("name, kind", [("qwen3_5", "linear_attention"),
                                        ("sliding", "sliding_attention")])
def test_a_model_without_full_attention_in_every_layer_is_refused(toy, processor, tmp_path,
                                                                   name, kind):
    """In one sentence, from its configuration alone: there are no weights."""
    config_of(name, processor.tokenizer).save_pretrained(tmp_path / "model")
    processor_of(name, processor.tokenizer).save_pretrained(tmp_path / "model")
    args = tgrpo.parse_args(["--model", str(tmp_path / "model"), "--data", str(toy / "train.json"),
                             "--output", str(tmp_path / "run")])
    with pytest.raises(InputError, match=f"layers of {kind}: .* keys and values"):
        tgrpo.main(args)
    assert not (tmp_path / "run").exists()


def test_a_processor_without_tokens_of_a_fixed_size_is_refused(processor, tmp_path):
    LlavaProcessor(CLIPImageProcessor(), processor.tokenizer, patch_size=14,
                   chat_template=processor.chat_template).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    with pytest.raises(InputError, match="no usable processor .*size"):
        load_processor(SimpleNamespace(model=str(tmp_path)))
