"""Which models and DeepSpeed files are refused. Weights that are absent, of another shape or
damaged would otherwise be random numbers in a run that succeeds."""
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

import sft
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


@pytest.mark.parametrize("change, named", [
    (without("layers.1.mlp"), "model.language_model.layers.1.mlp.down_proj.weight"),
    (without("patch_embed"), "model.visual.patch_embed.proj.weight"),
    (renamed("", "base_model.model."), "model.language_model.embed_tokens.weight"),
    (lambda weights: weights | {"model.norm.weight": torch.zeros(95)},
     "model.language_model.norm.weight")])
def test_weights_that_are_absent_or_of_another_shape_are_refused_by_name(copy, change, named):
    change_weights(copy, change)
    with pytest.raises(InputError, match=f"cannot load --model {copy}: .*{named}"):
        load(copy)


def test_an_untied_output_layer_needs_weights_of_its_own(copy):
    config = json.loads((copy / "config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = False
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="lm_head.weight"):
        load(copy)
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
    renamed("model.", "model.language_model.")])
def test_a_tied_output_layer_and_names_of_either_age_load(toy, copy, change):
    """Before transformers 4.52 names began with visual and model.layers."""
    change_weights(copy, change)
    expected = AutoModelForImageTextToText.from_pretrained(toy / "model").state_dict()
    for name, value in load(copy).state_dict().items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("damage", [
    lambda data: data[:len(data) // 2], lambda data: b"",
    lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2\nsize 2466568\n"],
    ids=["half", "empty", "pointer"])
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


FP16_KEYS = {"loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16,
             "hysteresis": 2, "min_loss_scale": 1}


def read_config(folder, config):
    (folder / "ds.json").write_text(json.dumps(config))
    return sft.read_deepspeed_config(sft.parse_args([
        "--model=m", "--data=d", "--output=o", f"--deepspeed_config={folder}/ds.json"]))


@pytest.mark.parametrize("config, words", [
    ({"bf16": {"enabled": "auto"} | FP16_KEYS}, "DeepSpeedBF16Config loss_scale Extra inputs"),
    *(({section: True}, f"{section} must be an object, not True")
      for section in ("bf16", "fp16", "zero_optimization")),
    ({"zero_optimization": {"stage": 4}}, "stage Input should be 0, 1, 2, 3"),
    ({"tensorboard": {"enabled": "maybe"}}, "tensorboard.enabled Input should be a valid boolean"),
    ({"fp16": {"enabled": True}}, "enables fp16: use bf16"),
    ({"optimizer": {"type": "Adam"}}, "sets 'optimizer': remove it"),
    ([], "is not a JSON object")])
def test_a_deepspeed_file_that_deepspeed_cannot_use_is_one_sentence(tmp_path, config, words):
    with pytest.raises(InputError, match=f"--deepspeed_config .*ds.json.* {words}") as error:
        read_config(tmp_path, config)
    assert "\n" not in str(error.value) and "http" not in str(error.value)


def test_a_deepspeed_file_full_of_auto_is_completed(tmp_path):
    assert read_config(tmp_path, {
        "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"},
        "bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"} | FP16_KEYS,
        "train_batch_size": "auto", "gradient_clipping": "auto", "optimizer": "auto"}) == {
        "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"},
        "bf16": {"enabled": False}, "zero_force_ds_cpu_optimizer": False, "gradient_clipping": 5.0,
        "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
