"""Cold start: labels, loss, and runs that are started, killed and resumed as a user would."""
import json
import math

import pytest
import torch
from safetensors.torch import load_file

import sft
from build_data import InputError, load_records, load_vision
from conftest import break_media, equal_weights, run
from test_build_data import LIMITS

SMALL = ["--min_pixels=784", "--max_pixels=784", "--image_min_pixels=784", "--max_frames=8",
         "--learning_rate=1e-3", "--num_workers=1"]


@pytest.fixture(scope="module")
def examples(toy, processor):
    """[(record, its inputs)] of the first video and the first image of the cold-start file."""
    found = {}
    for record in load_records(toy / "cot.json"):
        if record["data_type"] not in found:
            example = sft.sft_example(processor, record, load_vision(record, **LIMITS), 0)
            found[record["data_type"]] = record, example["inputs"]
    return list(found.values())


@pytest.mark.parametrize("values, bad", [
    ([1.0, -1e30], 0), ([1.0, math.nan], 1), ([-math.inf, 1.0], 1), ([math.inf, -math.inf], 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_watch_counts_gradients_that_are_not_finite(values, bad, dtype):
    layer = torch.nn.Linear(2, 1, bias=False, dtype=dtype)
    count = sft.watch_gradients(layer, "cpu")
    layer.weight.backward(torch.tensor([values], dtype=dtype))
    layer.weight.backward(torch.ones(1, 2, dtype=dtype))
    assert count.item() == bad


def test_labels_decode_to_the_assistant_s_text_and_its_end_token(examples, processor):
    for record, example in examples:
        labelled = example["labels"][example["labels"] != sft.IGNORED]
        assert processor.tokenizer.decode(labelled) == \
            f"{record['process']}\n{record['solution']}<|im_end|>"
        n = len(labelled)  # and they are the last tokens, each its own label
        assert torch.equal(example["input_ids"][0, -n:], labelled)
        assert not (example["labels"][0, :-n] != sft.IGNORED).any()
        assert {value.shape for key, value in example.items()
                if key in ("attention_mask", "mm_token_type_ids", "labels")} == \
            {example["input_ids"].shape}


def test_prompt_and_target_are_what_the_chat_template_makes_of_both(examples, processor):
    """Tokenizing prompt and target apart gives the ids of the whole conversation."""
    for record, example in examples:
        ids = example["input_ids"][0].tolist()
        assert processor.tokenizer(processor.tokenizer.decode(ids)).input_ids == ids


def test_the_loss_is_the_sum_over_labelled_tokens_by_hand():
    logits = torch.zeros(2, 8)  # uniform over 8 tokens
    assert sft.target_loss(logits, torch.tensor([3, 5])).item() == pytest.approx(2 * math.log(8))


def test_a_response_is_learned_where_a_rollout_samples_it(model, examples):
    """Also after a video whose time axis exceeds the positions of its prompt's text."""
    import tgrpo
    for seconds in (1.0, 20.0):
        example = examples[0][1] | {"second_per_grid_ts": torch.tensor([seconds])}
        n = int((example["labels"] == sft.IGNORED).sum())
        prompt = example | {key: example[key][:, :n] for key in
                            ("input_ids", "attention_mask", "mm_token_type_ids")}
        _, following = tgrpo.rope_positions(model, prompt)
        keys = ("input_ids", "attention_mask", "mm_token_type_ids", "video_grid_thw",
                "second_per_grid_ts")
        positions, _ = model.model.get_rope_index(**{key: example[key] for key in keys})
        positions = sft.continue_positions(positions, example["labels"])
        assert torch.equal(positions[0, 0, n:], following[0] + torch.arange(
            positions.shape[2] - n))


def metrics(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_the_split_into_micro_batches_and_ranks_changes_nothing(toy, tmp_path):
    """Two ranks x 4 records and one rank x 2 x 4 accumulated: the same losses. Two ranks are
    sharded (ZeRO-3) and recompute activations."""
    flags = ["--model", toy / "model", "--data", toy / "cot.json", "--num_train_epochs", 0.5]
    run("sft.py", *flags, "--output", tmp_path / "two", "--per_rank_batch_size", 4,
        "--gradient_accumulation_steps", 1, "--gradient_checkpointing", *SMALL, ranks=2)
    run("sft.py", *flags, "--output", tmp_path / "one", "--per_rank_batch_size", 2,
        "--gradient_accumulation_steps", 4, "--deepspeed_config", toy / "ds_zero0.json", *SMALL)
    two, one = ([row["optim/loss"] for row in metrics(tmp_path / name)[1:]]
                for name in ("two", "one"))
    assert len(two) == 3 and two[-1] < two[0] and two == pytest.approx(one, rel=1e-4)
    before, after = (load_file(folder / "model.safetensors")
                     for folder in (toy / "model", tmp_path / "two"))
    assert before.keys() == after.keys()
    assert not any(torch.equal(before[name], after[name]) for name in before)  # all have moved


GOOD = "<think>It goes right.</think>"


@pytest.mark.parametrize("process", [
    None, "", "It goes right.", "<think>It goes right.", "It goes right.</think>",
    f"{GOOD}\n<answer>A</answer>", f"{GOOD}\n<answer>B</answer>", GOOD + GOOD, f"So: {GOOD}",
    f"{GOOD} So", "<think></think>", "<think> \n</think>", "<think>a<think>b</think></think>",
    "<think>It is <answer>B</answer></think>", "<Think>It goes right.</Think>"])
def test_a_process_that_is_not_one_thought_is_refused_by_number_and_problem_id(
        toy, tmp_path, process):
    """Also if only some records have it; no model is needed to find out."""
    records = json.loads((toy / "cot.json").read_text())
    for i in (3, 5):
        records[i]["process"] = process
    data = tmp_path / "cot.json"
    data.write_text(json.dumps(records))
    args = sft.parse_args(["--model=absent", f"--data={data}", f"--media_root={toy}",
                           f"--output={tmp_path / 'run'}"])
    with pytest.raises(InputError, match=f"{data}: 2 of 48 records have a process that is .*; "
                                         f"the first is problem_id {records[3]['problem_id']}, "):
        sft.main(args)
    assert not (tmp_path / "run").exists()


def test_a_thought_may_hold_other_brackets_and_lines():
    for process in (GOOD, f" {GOOD}\n", "<think>\n1 < 2, <b>so</b>\n\nB\n</think>"):
        assert sft.is_well_formed(sft.target_text(
            {"process": process, "solution": "<answer>B</answer>"})), process


def test_steps_without_a_usable_record_leave_the_weights_alone(toy, tmp_path):
    break_media(toy, "cot", tmp_path / "cot.json", "rotten.png")
    run("sft.py", "--model", toy / "model", "--data", tmp_path / "cot.json", "--media_root", toy,
        "--output", tmp_path / "run", "--max_skipped", 1, "--num_train_epochs", 0.3, *SMALL,
        "--deepspeed_config", toy / "ds_zero0.json")
    _, *rows = metrics(tmp_path / "run")
    assert rows and not any({"optim/loss", "optim/grad_norm"} & row.keys() for row in rows)
    assert equal_weights(toy / "model", tmp_path / "run")
