"""Cold start: labels, loss, and runs that are started, killed and resumed as a user would."""
import json
import math

import pytest
import torch
from safetensors import safe_open

import sft
from build_data import InputError, load_records, load_vision
from conftest import LIMITS, break_media, equal_weights, moved_weights, run
from test_faults import command, rows


@pytest.mark.parametrize("values, bad", [
    ([1.0, -1e30], 0), ([1.0, math.nan], 1), ([-math.inf, 1.0], 1), ([math.inf, -math.inf], 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_watch_counts_gradients_that_are_not_finite(values, bad, dtype):
    layer = torch.nn.Linear(2, 1, bias=False, dtype=dtype)
    count = sft.watch_gradients(layer, "cpu")
    layer.weight.backward(torch.tensor([values], dtype=dtype))
    layer.weight.backward(torch.ones(1, 2, dtype=dtype))
    assert count.item() == bad


def test_labels_decode_to_the_assistant_s_text_and_its_end_token(toy, processor):
    """The ids are those of the whole conversation, although prompt and target are tokenized
    apart."""
    of_each = {record["data_type"]: record for record in load_records(toy / "cot.json")}
    for record in of_each.values():
        example = sft.sft_example(processor, record, load_vision(record, **LIMITS), 0)["inputs"]
        ids, labels = example["input_ids"], example["labels"]  # (1, L)
        text = processor.tokenizer.decode(ids[0])
        assert processor.tokenizer(text).input_ids == ids[0].tolist()
        labelled = labels != sft.IGNORED
        assert processor.tokenizer.decode(labels[labelled]) == \
            f"{record['process']}\n{record['solution']}<|im_end|>"
        n = labelled.sum()  # and they are the last tokens, each its own label
        assert torch.equal(ids[0, -n:], labels[0, -n:])
        shapes = {example[key].shape for key in ("labels", "attention_mask", "mm_token_type_ids")}
        assert shapes == {ids.shape}


def test_the_loss_is_the_sum_over_labelled_tokens_by_hand():
    logits = torch.zeros(2, 8)  # uniform over 8 tokens
    assert sft.target_loss(logits, torch.tensor([3, 5])).item() == pytest.approx(2 * math.log(8))


def test_the_split_into_micro_batches_and_ranks_changes_nothing(toy, tmp_path):
    """Two ranks x 4 records and one rank x 2 x 4 accumulated: the same losses. Two ranks are
    sharded (ZeRO-3) and recompute activations."""
    two, one = tmp_path / "two", tmp_path / "one"
    run(*command(toy, "sft", two, 3, "--per_rank_batch_size=4", "--gradient_checkpointing",
                 "--max_steps=3", ranks=2), ranks=2)
    run(*command(toy, "sft", one, 0, "--per_rank_batch_size=2", "--gradient_accumulation_steps=4",
                 "--max_steps=3"))
    losses, others = ([row["optim/loss"] for row in rows(output, "metrics")]
                      for output in (two, one))
    assert len(losses) == 3 and losses[-1] < losses[0]
    assert losses == pytest.approx(others, rel=1e-4)
    with safe_open(two / "model.safetensors", "pt") as model:
        assert moved_weights(toy / "model", two) == {*model.keys()}  # all of them


GOOD = "<think>It goes right.</think>"


@pytest.mark.parametrize("process", [
    None, "It goes right.", "<think>It goes right.", f"{GOOD}\n<answer>B</answer>", GOOD + GOOD,
    f"So: {GOOD}", f"{GOOD} So", "<think> \n</think>", "<think>a<think>b</think></think>",
    "<Think>It goes right.</Think>"])
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


def test_steps_without_a_usable_record_leave_the_weights_alone(toy, tmp_path):
    break_media(toy, "cot", tmp_path / "all.json", "rotten.png")
    run(*command(toy, "sft", tmp_path / "run", 0, "--data", tmp_path / "all.json",
                 "--max_skipped=1", "--max_steps=2"))
    found = rows(tmp_path / "run", "metrics")
    assert found and not any({"optim/loss", "optim/grad_norm"} & row.keys() for row in found)
    assert equal_weights(toy / "model", tmp_path / "run")
