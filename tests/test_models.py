"""Which models load_model and DeepSpeed files load_config refuse: weights that are absent, of
another shape or damaged would else be random numbers in a run that succeeds."""
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from build_data import InputError, load_model
from conftest import run

FILE = "model.safetensors"


def load(folder):
    return load_model(SimpleNamespace(model=str(folder), attn_implementation="sdpa"), {})


@pytest.fixture
def copy(toy, tmp_path):
    """A copy of the toy's model, to damage."""
    return shutil.copytree(toy / "model", tmp_path / "model")


def change_weights(folder, change):
    """Rewrites the weights: `change` takes the dict of tensors and returns another."""
    save_file(change(load_file(folder / FILE)), folder / FILE, metadata={"format": "pt"})


def without(part):
    return lambda weights: {name: value for name, value in weights.items() if part not in name}


def renamed(old, new):
    return lambda weights: {name.replace(old, new, 1): value for name, value in weights.items()}


def untie(folder):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = False
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("change, named", [
    (without("layers.1.mlp"), "model.language_model.layers.1.mlp.down_proj.weight"),
    (without("visual.blocks.0."), "model.visual.blocks.0.attn.proj.bias"),
    (without("model.norm.weight"), "model.language_model.norm.weight"),
    (without("patch_embed"), "model.visual.patch_embed.proj.weight"),
    (renamed("", "module."), "model.language_model.embed_tokens.weight"),
    (renamed("", "base_model.model."), "model.language_model.embed_tokens.weight"),
    (lambda weights: weights | {"model.embed_tokens.weight": torch.zeros(640, 96)},
     "model.language_model.embed_tokens.weight"),
    (lambda weights: weights | {"model.norm.weight": torch.zeros(95)},
     "model.language_model.norm.weight"),
])
def test_weights_that_are_absent_or_of_another_shape_are_refused_by_name(copy, change, named):
    change_weights(copy, change)
    with pytest.raises(InputError, match=f"cannot load --model {copy}: .*{named}"):
        load(copy)


def test_an_untied_output_layer_without_weights_is_refused(copy):
    untie(copy)
    with pytest.raises(InputError, match="lm_head.weight"):
        load(copy)


def test_an_untied_output_layer_with_weights_loads(copy):
    untie(copy)
    change_weights(copy, lambda weights: weights | {
        "lm_head.weight": weights["model.embed_tokens.weight"] + 1})
    model = load(copy)
    assert torch.equal(model.lm_head.weight, model.get_input_embeddings().weight + 1)


def test_a_shard_overwritten_by_a_copy_of_another_is_refused(copy):
    AutoModelForImageTextToText.from_pretrained(copy).save_pretrained(copy, max_shard_size="1MB")
    (copy / FILE).unlink(missing_ok=True)
    first, second, *_ = sorted(copy.glob("model-*.safetensors"))
    load(copy)
    shutil.copy(first, second)
    with pytest.raises(InputError, match=f"cannot load --model {copy}: weights"):
        load(copy)


@pytest.mark.parametrize("change", [
    lambda weights: weights,
    lambda weights: weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()},
    renamed("model.", "model.language_model."),
])
def test_a_tied_output_layer_and_names_of_either_age_load(toy, copy, change):
    """Before transformers 4.52 names began with visual and model.layers."""
    change_weights(copy, change)
    expected = AutoModelForImageTextToText.from_pretrained(toy / "model").state_dict()
    for name, value in load(copy).state_dict().items():
        assert torch.equal(value, expected[name]), name


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614\nsize 2466568\n"


@pytest.mark.parametrize("damage", [
    lambda data: data[:len(data) // 2], lambda data: data[:100], lambda data: b"",
    lambda data: POINTER, lambda data: b"<html>not found</html>"],
    ids=["half", "head", "empty", "pointer", "page"])
def test_a_damaged_weight_file_is_one_sentence_that_names_the_model(copy, damage):
    (copy / FILE).write_bytes(damage((copy / FILE).read_bytes()))
    with pytest.raises(InputError, match=f"cannot load --model {copy}: ") as error:
        load(copy)
    assert "\n" not in str(error.value)


def test_a_model_without_a_layer_is_refused_before_the_run_s_folder_is_written(toy, copy, tmp_path):
    change_weights(copy, without("layers.1.mlp"))
    result = run("sft.py", "--model", copy, "--data", toy / "cot.json", "--output",
                 tmp_path / "out", check=False)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert f"sft.py: cannot load --model {copy}: weights" in result.stderr.splitlines()[-1]
    assert not (tmp_path / "out" / "metrics.jsonl").exists()
