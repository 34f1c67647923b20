"""Claims about tests/report.py: a T-GRPO run as one page, with any text of a model or a record."""
import base64
import hashlib
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

import report
import tgrpo
from build_data import InputError, load_records, load_vision, write_video
from conftest import LIMITS, picture_of
from rewards import accuracy_reward, extract_answer, format_reward

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome",
                                               "chrome"))), None)
in_a_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine")
HOSTILE = (  # what a model may write
    "<think></script><script>document.title = 'taken'</script></think><answer>A</answer>",
    "\"'><img src=x onerror=\"document.title='taken'\"> &lt; &amp;lt; <!-- <![CDATA[ {run} \\u003c",
    "NUL \0, escape \x1b[31m, a lone surrogate \ud800, a pair \U0001f600, a tab\t and\na new line",
    "separators \u2028 and \u2029, right to left \u202e\u202bdetrever\u2067 and \u200f unclosed",
    "x" * 5000, "<answer><answer></think>")
SEEN = [re.sub("[\0\x1b\ud800]", "\ufffd", text) for text in HOSTILE]  # what a page can show
WRONG = "<think>look</think><answer>?</answer>"
ORDERS = [3, 1, 0, 2, 5, 4, 7, 6], [7, 6, 5, 4, 3, 2, 1, 0]
FLAGS = vars(tgrpo.parse_args(["--model=", "--data=", "--output="])) | LIMITS | {
    "image_min_pixels": 784, "image_max_pixels": 784}


class Page(HTMLParser):
    """A page's elements in order: {"tag", "text", and its attributes}."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append({"tag": tag, "text": "", **dict(attributes)})
        if tag not in ("meta", "img"):
            self.open.append(self.elements[-1])

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def handle_endtag(self, tag):
        assert self.open.pop()["tag"] == tag

    def all(self, name):
        """Returns the elements of a tag or a class."""
        return [element for element in self.elements
                if name in (element["tag"], element.get("class"))]

    def texts(self, name):
        return [element["text"] for element in self.all(name)]


def right(record):
    """Returns a correct response."""
    return WRONG.replace("?", extract_answer(record["solution"]))


def rollout(record, step, first, second=(), order=None):
    """Returns a line of rollouts.jsonl. A is R - mean; the length reward is 0.2 if correct."""
    accuracy = np.array([accuracy_reward(text, record) for text in first])
    parts = {"accuracy": accuracy, "format": np.array(list(map(format_reward, first))),
             "length": 0.2 * accuracy}
    shares = {"p": accuracy.mean()}
    if second:
        shares["p_tilde"] = np.mean([accuracy_reward(text, record) for text in second])
        shares["r_t"] = 0.3 * (shares["p"] >= shares["p_tilde"])
        parts["temporal"] = shares["r_t"] * accuracy
    R = sum(parts.values())
    return {"step": step, "problem_id": record["problem_id"], "path": record["path"],
            "frame_order": order, "responses": first, "responses_shuffled": list(second), **shares,
            **{name: part.tolist() for name, part in parts.items()},
            "R": R.tolist(), "A": (R - R.mean()).tolist()}


def validation(record, step, response, shuffled):
    """Returns a line of validation.jsonl."""
    return {"step": step, **{name: record[name] for name in ("problem_id", "path", "problem")},
            "response": response, "accuracy": accuracy_reward(response, record),
            "response_shuffled": shuffled, "accuracy_shuffled": accuracy_reward(shuffled, record)}


METRICS = [{"step": step, "group/p": p, "group/p_tilde": 0.25, "optim/loss": 0.1}
           for step, p in ((1, 0.25), (2, 0.5), (3, 0.875))]


def write_run(folder, toy, rollouts=(), validations=(), metrics=METRICS, **changed):
    """Writes the --output of a tgrpo.py run over the toy."""
    folder.mkdir(parents=True, exist_ok=True)
    flags = FLAGS | {"data": str(toy / "train.json"), "val_data": str(toy / "test.json"),
                     "media_root": str(toy)} | changed
    for name, rows in (("metrics", [{"arguments": flags}, *metrics]), ("rollouts", rollouts),
                       ("validation", validations)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def reported(folder, *more):
    """Returns the data in the page that the command writes, and the page's text."""
    args = report.parse_args([str(folder), *map(str, more)])
    report.main(args)
    text = Path(args.output or folder, "report.html").read_text(encoding="utf-8")
    island, = re.findall(r'<script type="application/json" id="run">(.*)</script>', text)
    return json.loads(island), text


@pytest.fixture(scope="module")
def records(toy):
    """Returns {"video", "image"}: the last question of each; the video's has options."""
    return {record["data_type"]: record for record in load_records(toy / "train.json")}


@pytest.fixture(scope="module")
def held_out(toy):
    return [row for row in load_records(toy / "test.json") if row["data_type"] == "video"]


@pytest.fixture(scope="module")
def plain(records):
    """Returns a row of rollouts.jsonl in which every response is wrong."""
    return rollout(records["video"], 1, [WRONG] * 8, [WRONG] * 4, ORDERS[0])


@pytest.fixture(scope="module")
def run(toy, records, held_out, tmp_path_factory):
    """A run with two validations of two videos, of which the second changed, and six rollouts."""
    video, image, (same, changed) = records["video"], records["image"], held_out[:2]
    folder, good = tmp_path_factory.mktemp("run"), right(video)
    absent = video | {"problem_id": "absent", "path": "./media/absent.mp4"}
    (folder / "data.json").write_text(json.dumps([video, image, absent]))
    return write_run(folder, toy, [
        rollout(video, 2, [good] * 2 + [WRONG] * 6, [good] * 2 + [WRONG] * 2, ORDERS[0]),
        rollout(image, 3, [WRONG] * 7 + [right(image)]),
        rollout(video, 4, [WRONG] * 8, [WRONG] * 4, ORDERS[0]),  # equal rewards
        rollout(video, 5, list(HOSTILE), [WRONG] * 4, [5, 5]),  # a fork's second group
        rollout(absent, 6, [good, WRONG] * 4, [WRONG] * 4),
        rollout(video, 90, [good] * 7 + [HOSTILE[2]], [good] + [WRONG] * 3, ORDERS[1])],
        [validation(same, 0, right(same), right(same)),
         validation(changed, 0, WRONG, right(changed)),
         validation(same, 50, right(same), right(same)),
         validation(changed, 50, right(changed), WRONG)], data=str(folder / "data.json"))


@pytest.fixture(scope="module")
def made(run):
    """Returns the data in the run's page, and the page's text."""
    return reported(run)


def rollout_at(step, data):
    return next(row for row in data["rollouts"] if row["step"] == step)


# ------------------------------------------------------------------------- the data of the page

def test_held_out_questions_have_all_their_answers_and_those_that_changed_come_first(
        toy, held_out, tmp_path):
    rows = [validation(record, step, right(record) if step or i != 8 else WRONG, WRONG)
            for step in (0, 25) for i, record in enumerate(held_out[:9])]
    data, _ = reported(write_run(tmp_path, toy, validations=rows))
    assert data["logged"] == {"held_out": 9, "changed": 1, "rollouts": 0}
    assert [question["problem_id"] for question in data["held_out"]] == [
        held_out[i]["problem_id"] for i in (8, 0, 1, 2, 3, 4, 5, 6)]
    truth, question = extract_answer(held_out[8]["solution"]), data["held_out"][0]
    for name, expected in (("first", [(0, "?", 0), (25, truth, 1)]),
                           ("second", [(0, "?", 0), (25, "?", 0)])):
        assert [(row["step"], row["answer"], row["earned"]["accuracy"])
                for row in question[name]] == expected


def test_rollouts_are_at_equal_distances_and_have_advantages():
    rows = [{"step": step, "first": [{"earned": {"A": step % 2}}]} for step in range(1, 21)]
    assert [row["step"] for row in report.spread_rollouts(rows)] == [1, 5, 9, 13, 17]
    without = rows[1:17:2]
    assert report.spread_rollouts(without) == without and report.spread_rollouts([]) == []


def test_every_response_has_its_rewards(made):
    data, _ = made
    first, *_, last = [response["earned"] for response in rollout_at(90, data)["first"]]
    # 7 right of 8 earn 1 + 1 + 0.3 + 0.2, the last 0: mean 2.1875
    assert first == pytest.approx({"accuracy": 1, "format": 1, "temporal": 0.3, "length": 0.2,
                                   "R": 2.5, "A": 0.3125})
    assert last == pytest.approx(dict.fromkeys(first, 0) | {"A": -2.1875})
    # the run logs only the share of the second group's correct ones: they are graded again
    assert [response["earned"] for response in rollout_at(90, data)["second"]] == [
        {"accuracy": 1, "format": 1}] + 3 * [{"accuracy": 0, "format": 1}]
    assert "temporal" not in rollout_at(3, data)["first"][0]["earned"]  # an image has one group


def test_frames_are_those_of_the_run(made, records):
    row, vision = rollout_at(90, made[0]), load_vision(records["video"], **LIMITS)
    shown = np.stack([np.asarray(picture_of(url)) for url in row["pictures"]])
    assert torch.equal(torch.from_numpy(shown), vision.frames.permute(0, 2, 3, 1))
    assert row["frame_order"] == ORDERS[1]


def test_curves_are_means_of_the_metrics_that_a_run_has(toy, plain, tmp_path):
    rows = [{"step": i, "response/tokens": i // 3} for i in range(90)]
    rows[0] |= {"group/p": 1}
    rows[1] |= {"group/p": float("nan"), "group/p_tilde": 1 / 3}
    data, _ = reported(write_run(tmp_path, toy, [plain], metrics=rows))
    assert data["curves"] == {  # 30 points, each the mean of three neighbours
        "share correct": {"group/p": [[0, 1]], "group/p_tilde": [[1, 0.333333]]},
        "response tokens": {"response/tokens": [[3 * i + 1, i] for i in range(30)]}}


# ------------------------------------------------------------------------------- one rollout as SVG

def drawn(folder, path, *more):
    """Returns the texts and the images' addresses of the picture that the command draws."""
    report.main(report.parse_args([str(folder), "--picture", *map(str, (path, *more))]))
    elements = [*ElementTree.parse(path).getroot()]
    return ([element.text or "" for element in elements if element.tag.endswith("text")],
            [element.attrib["href"] for element in elements if element.tag.endswith("image")])


def test_the_picture_shows_the_rollout_whose_p_is_furthest_above_p_tilde(run, made, tmp_path):
    texts, images = drawn(run, tmp_path / "new/method.svg")
    row = rollout_at(90, made[0])
    places = [*range(8), *ORDERS[1]]
    assert images == [row["pictures"][place] for place in places]
    for text in ("p = 0.875", "p_tilde = 0.25", "look", "2.5", "0.312", row["options"][0],
                 f"Answer: {row['answer']}", "p > p_tilde", "r_t = 0.3.", "NUL \ufffd"):
        assert any(text in line for line in texts), text
    assert [line[0] for line in texts if line[0] in "✓✗"] == [*"✓✓✓✓✓✓✓✗✓✗✗✗"]
    assert [line for line in texts if line.isdigit()][:16] == [str(i + 1) for i in places]


def test_a_run_without_a_rollout_to_draw_is_refused(run, tmp_path):
    good = {"frame_order": [1, 0], "second": [{}], "p": 0.5, "p_tilde": 0.5}
    rows = [good | changed for changed in ({"p": 0}, {"p": 1}, {"second": []}, {"frame_order": []})]
    assert report.pick_rollout([*rows, good]) is good
    with pytest.raises(InputError, match="--picture needs a video with correct and wrong resp"):
        report.pick_rollout(rows)
    with pytest.raises(InputError, match="--picture: .*No such file"):
        drawn(run, tmp_path / "method.svg", "--output", tmp_path, "--media_root", tmp_path)


# -------------------------------------------------------------------------------- safe and whole

@pytest.fixture(scope="module")
def hostile(toy, tmp_path_factory):
    """A run in which every text is hostile."""
    folder = tmp_path_factory.mktemp("hostile")
    record = load_records(toy / "train.json")[0] | {
        "problem": HOSTILE[0], "options": [f"A. {HOSTILE[1]}", "B. red"],
        "problem_type": "multiple choice", "problem_id": '"><script>', "data_type": "video",
        "solution": f"<answer>{HOSTILE[1]}</answer>", "path": "a\"'><img src=y onerror=z>.mp4"}
    (folder / "data.json").write_text(json.dumps([record]))
    row = rollout(record, 1, list(HOSTILE), list(HOSTILE), ORDERS[0]) | {"A": [0.0] * len(HOSTILE)}
    answer = validation(record, 0, HOSTILE[0], HOSTILE[2])
    return write_run(folder / "a <b> & \"c\"", toy, [row], [answer],
                     data=str(folder / "data.json"), val_data=str(folder / "data.json"),
                     media_root=str(folder), temporal_test="</script><script>")


def test_no_text_of_a_model_or_a_record_becomes_markup(hostile):
    data, text = reported(hostile)
    for name in ("first", "second"):
        assert [response["text"] for response in data["rollouts"][0][name]] == [*HOSTILE]
    island, = re.findall(r'id="run">(.*)</script>', text)  # all that differs from the template
    assert island.isascii() and not {"<", "\0"} & {*island}


def test_the_page_allows_nothing_but_its_own_style_and_script(made):
    page = Page(made[1])
    policy = next(meta["content"] for meta in page.all("meta") if "http-equiv" in meta)
    rules = {"default-src": "'none'", "base-uri": "'none'", "form-action": "'none'",
             "img-src": "data:"}
    for name, content in (("style", page.texts("style")[0]), ("script", page.texts("script")[1])):
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        rules[f"{name}-src"] = f"'sha256-{digest}'"
    assert dict(rule.split(None, 1) for rule in policy.split(";")) == rules


# -------------------------------------------------------------------------------------- bad input

@pytest.mark.parametrize("name, line, message", [
    ("metrics", {"arguments": {"data": ""}}, "flags of a tgrpo.py run: val_data, media_root, max"),
    ("rollouts", {"R": [1.0]}, "rollouts.jsonl, line 1, is damaged: ValueError.*zip"),
    ("rollouts", {"A": [float("nan")] * 8}, "line 1, is damaged: ValueError"),
    ("rollouts", {"responses": [1] * 8}, "line 1, is damaged: AttributeError"),
    ("validation", {"step": 1}, "validation.jsonl, line 1, is damaged: KeyError"),
    ("validation", [], "validation.jsonl, line 1, is damaged: TypeError")])
def test_a_damaged_file_is_named_with_its_line(toy, plain, tmp_path, name, line, message):
    folder = write_run(tmp_path, toy, [plain])
    row = plain | line if name == "rollouts" else line
    (folder / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(InputError, match=message):
        reported(folder)


def test_a_line_that_is_being_written_is_left_out(toy, plain, tmp_path):
    folder = write_run(tmp_path, toy, [plain], val_data=None)
    (folder / "validation.jsonl").write_text('{"step": 91, "problem')
    data, _ = reported(folder)
    assert data["held_out"] == [] and len(data["rollouts"]) == 1
    (folder / "rollouts.jsonl").unlink()  # and a file that is not there yet is empty
    with pytest.raises(InputError, match="has no rollouts.jsonl or validation.jsonl yet"):
        reported(folder)


def test_a_file_other_than_the_runs_is_named_in_its_place(run, records, tmp_path):
    (tmp_path / "media").mkdir()
    write_video(tmp_path / records["video"]["path"], np.zeros((4, 28, 28, 3), np.uint8), 2)
    data, _ = reported(run, "--media_root", tmp_path, "--output", tmp_path / "new")
    assert "No such file" in rollout_at(3, data)["fault"] and len(rollout_at(3, data)["first"]) == 8
    assert rollout_at(90, data)["fault"].endswith("has 4 frames, not those of the run")


def test_records_of_another_run_are_refused(run, toy):
    with pytest.raises(InputError, match="has no question of .*; name the run's records"):
        reported(run, "--data", toy / "cot.json")


# -------------------------------------------------------------------------------------- a browser

def browse(page, folder):
    """Returns the page's DOM after its scripts ran, and what the browser wrote to its console."""
    result = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}",
         "--enable-logging=stderr", "--virtual-time-budget=4000", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout, [line for line in result.stderr.splitlines() if "CONSOLE" in line]


def shown(run, folder):
    """Returns the page as a browser shows it, within its own policy, and {title: section}."""
    dom, console = browse(run / "report.html", folder)
    assert console == []
    dom = re.sub("<noscript>.*?</noscript>", "", dom)  # in it a browser knows no elements
    return Page(dom), {re.search('aria-label="(.*?)"', section)[1]: Page(section)
                       for section in re.findall("<section.*?</section>", dom, re.DOTALL)}


@pytest.fixture(scope="module")
def seen(run, made, tmp_path_factory):
    return shown(run, tmp_path_factory.mktemp("browser"))


@in_a_browser
def test_the_browser_shows_curves_and_held_out_answers_before_rollouts(run, seen, held_out):
    page, sections = seen
    assert page.texts("h1") == [f"T-GRPO at work: {run}"]
    assert page.texts("figcaption")[0] == "share correctp 0.25 → 0.875p_tilde 0.25 → 0.25"
    assert "2 of the 2 held-out questions" in page.texts("header")[0]
    assert page.texts("a") == ["1", "2", "2", "3", "5", "6", "90"]
    assert [*sections][1:3] == ["Held-out question 2", "Training step 2"]
    section = sections["Held-out question 1"]
    truth = extract_answer(held_out[1]["solution"])
    assert section.texts("h3") == ["Answers to the frames in order", "Answers to shuffled frames"]
    assert section.texts("summary") == ["step 0: wrong ?0", f"step 50: correct {truth}1",
                                        f"step 0: correct {truth}1", "step 50: wrong ?0"]


@in_a_browser
def test_the_browser_shows_both_groups_of_a_rollout(made, seen):
    section, row = seen[1]["Training step 90"], rollout_at(90, made[0])
    assert section.texts("h2") == [f"Training step 90: {row['record']['problem']}"]
    assert section.texts("ul") == ["".join(row["options"])]
    places = [*range(8), *ORDERS[1]]
    assert "".join(section.texts("video")) == "".join(str(place + 1) for place in places)
    assert [image["src"] for image in section.all("img")] == [
        row["pictures"][place] for place in places]
    assert [float(meter["value"]) for meter in section.all("meter")] == [0.875, 0.25]
    assert "p > p_tilde, so r_t = 0.3 for every correct response of the first group." in (
        section.texts("p"))
    assert section.texts("numbers")[0] == "answeraccuracyformattemporallengthRA"
    assert section.texts("summary") == [
        *[f"correct {row['answer']}110.30.22.50.313"] * 7, "wrong 00000-2.19",
        f"correct {row['answer']}11", *["wrong ?01"] * 3]
    assert section.texts("think") == ["look"] * 11  # apart from the answer


@in_a_browser
def test_the_browser_shows_what_is_special_about_a_rollout(seen):
    image, fork, absent = (seen[1][f"Training step {step}"] for step in (3, 5, 6))
    assert len(image.all("img")) == 1 and len(image.texts("h3")) == 1
    assert "No second group: images, and runs with alpha 0, have none." in image.texts("p")
    assert fork.texts("video") == ["12345678", "66"]
    for details in fork.all("details"):  # a long response is folded
        assert ("open" in details) == ("x" * 5000 not in details["text"])
    assert any(text.startswith("The video cannot be shown:") for text in absent.texts("p"))
    assert "The input of the second group is not in rollouts.jsonl." in absent.texts("p")


@in_a_browser
def test_in_a_browser_hostile_text_is_shown_to_the_letter_and_does_nothing(hostile, tmp_path):
    reported(hostile)
    page, sections = shown(hostile, tmp_path)
    assert page.texts("title") == ["T-GRPO at work"]  # which the texts would change
    assert len(page.all("script")) == 2 and page.all("img") == []
    assert not any(name.startswith("on") or name in ("style", "src")
                   for element in page.elements for name in element)
    section = sections["Training step 1"]
    assert section.texts("text") == SEEN * 2  # but for what no page can show
    assert section.texts("bdi") == [HOSTILE[0]]
    assert section.texts("ul") == [f"A. {HOSTILE[1]}B. red"]
    assert section.texts("answer")[0] == HOSTILE[1]
    assert "All rewards are equal, so every A is 0." in section.texts("p")
    assert sections["Held-out question 1"].texts("text") == [SEEN[0], SEEN[2]]
    assert f"T-GRPO at work: {hostile}" in page.texts("h1")
