"""Claims about tests/report.py: a T-GRPO run as one page, whatever its texts are."""
import base64
import hashlib
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

import report
from build_data import InputError, load_records, load_vision, write_video
from rewards import accuracy_reward, extract_answer, format_reward

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome",
                                               "chrome"))), None)
in_a_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine")
TEMPLATE = (report.ROOT / "assets/report.html").read_text(encoding="utf-8")
HOSTILE = (  # what a model may write
    "<think></script><script>document.title = 'taken'</script></think><answer>A</answer>",
    "<img src=x onerror=\"document.title='taken'\"><answer>B</answer>",
    "\"'>\" ' & &lt; &amp;lt; <!-- <script> <![CDATA[ {run} {style_hash} {0} ${1} %s \\ \\u003c",
    "NUL \0, escape \x1b[31m, a lone surrogate \ud800, a tab\t and\na new line",
    "line separators \u2028 and \u2029, a pair of surrogates \U0001f600",
    "right to left \u202e\u202bdetrever\u2067 and \u200f unclosed",
    "x" * 5000, "<answer><answer></think>")
SEEN = [re.sub("[\0\x1b\ud800]", "\ufffd", text) for text in HOSTILE]  # what a page can show
RIGHT, WRONG = "<think>look</think><answer>{}</answer>", "<think>look</think><answer>?</answer>"
ORDERS = [3, 1, 0, 2, 5, 4, 7, 6], [7, 6, 5, 4, 3, 2, 1, 0]
FLAGS = {"max_frames": 8, "min_frames": 4, "fps": 2.0, "min_pixels": 784, "max_pixels": 784,
         "image_min_pixels": 784, "image_max_pixels": 784, "correct_threshold": 0.5, "alpha": 0.3,
         "omega": 0.2, "l_min": 320, "l_max": 512, "temporal_test": "ge", "temporal_to": "reward",
         "scale_advantages": "std", "learning_rate": 1e-6}


class Page(HTMLParser):
    """A page's elements as (tag, attributes), and the texts of those of one class or tag."""
    EMPTY = {"meta", "img"}

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements, self.open, self.pieces = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in self.EMPTY:
            self.open.append((tag, dict(attributes), len(self.pieces)))

    def handle_data(self, data):
        self.pieces.append(data)

    def handle_endtag(self, tag):
        opened, attributes, start = self.open.pop()
        assert opened == tag, f"<{opened}> is closed by </{tag}>"
        self.elements.append((f"/{tag}", attributes | {"text": "".join(self.pieces[start:])}))

    def texts(self, name):
        """The texts of the elements of a tag or a class, in order."""
        return [attributes["text"] for tag, attributes in self.elements
                if tag == f"/{name}" or tag[0] == "/" and attributes.get("class") == name]

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def rollout(record, step, first, second, order=None):
    """A line of rollouts.jsonl: correct responses have a good length, and A is R - mean."""
    def correct(texts):
        return [accuracy_reward(text, record) >= 0.5 for text in texts]
    parts = {"accuracy": [accuracy_reward(text, record) for text in first],
             "format": [format_reward(text) for text in first],
             "length": [0.2 * good for good in correct(first)]}
    shares = {"p": np.mean(correct(first))}
    if second:
        shares["p_tilde"] = np.mean(correct(second))
        shares["r_t"] = 0.3 * float(shares["p"] >= shares["p_tilde"])
        parts["temporal"] = [shares["r_t"] * good for good in correct(first)]
    R = np.sum([*parts.values()], axis=0)
    return {"step": step, "problem_id": record["problem_id"], "path": record["path"],
            "frame_order": order, "responses": first, "responses_shuffled": second, **parts,
            **shares, "R": R.tolist(), "A": (R - R.mean()).tolist()}


METRICS = [{"step": step, "reward/accuracy": accuracy, "group/p": accuracy, "group/p_tilde": 0.25,
            "policy/kl": 0.001 * step, "response/tokens": 20.5, "group/zero_std_rate": 0.0,
            "optim/loss": 0.1} for step, accuracy in ((1, 0.25), (2, 0.5), (3, 0.875))]


def write_run(folder, toy, rows, leave_out=(), metrics=METRICS, **changed):
    """The --output of a tgrpo.py run over the toy, as the page's maker reads it."""
    folder.mkdir(parents=True, exist_ok=True)
    flags = {"data": str(toy / "train.json"), "media_root": str(toy)} | FLAGS | changed
    flags = {flag: value for flag, value in flags.items() if flag not in leave_out}
    lines = [{"arguments": flags}, *metrics]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def reported(folder, *more):
    """The data in the page that the command writes, and the page's text."""
    report.main(report.parse_args([str(folder), *map(str, more)]))
    text = (folder / "report.html").read_text(encoding="utf-8")
    island, = re.findall(r'<script type="application/json" id="run">(.*)</script>', text)
    return json.loads(island), text


@pytest.fixture(scope="module")
def records(toy):
    """{"video", "image"}: a question of each, the video's with options."""
    found = {}
    for record in load_records(toy / "train.json"):
        if record["data_type"] == "image" or record["options"]:
            found.setdefault(record["data_type"], record)
    return found


@pytest.fixture(scope="module")
def run(toy, records, tmp_path_factory):
    """A video at steps 2 and 90, and between; an image at two steps; a third question once."""
    video, image = records["video"], records["image"]
    right = RIGHT.format(extract_answer(video["solution"]))
    other = next(record for record in load_records(toy / "train.json")
                 if record["problem_type"] == "regression")
    read = RIGHT.format(extract_answer(image["solution"]))
    return write_run(tmp_path_factory.mktemp("run"), toy, [
        rollout(video, 90, [right] * 7 + [WRONG], [right, WRONG, WRONG, WRONG], ORDERS[1]),
        rollout(video, 2, [right] * 2 + [WRONG] * 6, [right, right, WRONG, WRONG], ORDERS[0]),
        rollout(video, 40, [WRONG] * 8, [WRONG] * 4, ORDERS[0]),
        rollout(image, 3, [WRONG] * 7 + [read], []),
        rollout(image, 50, [read] * 8, []),
        rollout(other, 7, list(HOSTILE), list(HOSTILE[:4]), ORDERS[0])])


def question_at(step, data):
    return next(question for question in data["questions"]
                if any(row["step"] == step for row in question["steps"]))


def decoded(url):
    return Image.open(io.BytesIO(base64.b64decode(url.partition(";base64,")[2])))


# ------------------------------------------------------------------------- what the page is given

def test_a_question_stands_at_its_earliest_and_its_latest_step(run):
    data, _ = reported(run)
    assert (data["logged"], len(data["questions"])) == (3, 3)
    shown = [[row[name] for name in ("step", "p", "p_tilde", "r_t")]
             for row in question_at(90, data)["steps"]]
    assert shown == [[2, 0.25, 0.5, 0], [90, 0.875, 0.25, 0.3]]
    assert len(question_at(7, data)["steps"]) == 1
    for row in question_at(50, data)["steps"]:  # an image has one group
        assert row["second"] == row["frame_order"] == [] and not {"p_tilde", "r_t"} & row.keys()
        assert [*row["first"][0]["earned"]] == ["accuracy", "format", "length", "R", "A"]


def test_every_response_stands_with_what_it_earned(run):
    _, row = question_at(90, reported(run)[0])["steps"]
    # 7 right of 8 earn 1 + 1 + 0.3 + 0.2, the last 1: mean 2.3125
    earned = [response["earned"] for response in row["first"]]
    assert [*earned[0]] == ["accuracy", "format", "temporal", "length", "R", "A"]
    assert [*earned[0].values()] == pytest.approx([1, 1, 0.3, 0.2, 2.5, 0.1875])
    assert [*earned[7].values()] == pytest.approx([0, 1, 0, 0, 1, -1.3125])
    # the run logs only the share of the second group's: they are graded again
    assert [response["earned"] for response in row["second"]] == [
        {"accuracy": 1, "format": 1}] + 3 * [{"accuracy": 0, "format": 1}]


def test_frames_stand_in_order_and_with_the_order_that_was_used(run, records):
    video = question_at(90, reported(run)[0])
    assert [row["frame_order"] for row in video["steps"]] == [*ORDERS]
    vision = load_vision(records["video"], max_frames=8, min_frames=4, fps=2, min_pixels=784,
                         max_pixels=784)
    shown = np.stack([np.asarray(decoded(url)) for url in video["pictures"]])
    assert torch.equal(torch.from_numpy(shown), vision.frames.permute(0, 2, 3, 1))


def test_kinds_take_turns_and_the_largest_gain_of_all_is_first():
    records = {(str(i), ""): {"problem_id": i, "data_type": "image" if i > 19 else "video",
                              "problem_type": "OCR" if i > 19 else "numerical"} for i in range(30)}

    def row(step, p, A=1.0):
        return {"step": step, "p": p, "first": [{"earned": {"A": A}}]}
    rollouts = {key: [row(1, 0.5, A=0.0)] for key in records} | {
        ("4", ""): [row(1, 0.5), row(90, 0.25)],
        ("5", ""): [row(1, 1.0, A=0.0), row(90, 1.0, A=0.0)],  # nothing to learn from
        ("6", ""): [row(1, 0.0), row(50, 1.0), row(80, 0.25)],
        ("7", ""): [row(1, 0.5), row(3, 0.5)], ("8", ""): [row(1, 0.5)],
        ("25", ""): [row(3, 0.0), row(5, 1.0)]}
    chosen = report.pick_questions(rollouts, records)
    assert len(chosen) == report.REPORTED == 8
    assert [record["problem_id"] for record, _ in chosen] == [25, 6, 20, 7, 21, 5, 22, 4]
    assert [len(rows) for _, rows in chosen] == [2, 2, 1, 2, 1, 2, 1, 2]
    assert [[row["step"] for row in rows] for _, rows in chosen[:2]] == [[3, 5], [1, 80]]
    once = {key: rows for key, rows in rollouts.items() if len(rows) == 1}
    assert report.pick_questions(once, records)[0][0]["problem_id"] == 8  # with advantages


# title: {metric: its points}; 90 steps make 30 points, each the mean of three neighbours
@pytest.mark.parametrize("rows, curves", [
    ([], {}), ([{"step": 1, "optim/loss": 1.0}], {}),
    ([{"step": 1, "policy/kl": 0.5}], {"KL": {"policy/kl": [[1, 0.5]]}}),
    ([{"step": i, "response/tokens": i // 3} for i in range(90)],
     {"response tokens": {"response/tokens": [[3 * i + 1, i] for i in range(30)]}}),
    ([{"step": 1, "group/p": 1}, {"step": 2}, {"step": 3, "group/p": float("nan")},
      {"step": 4, "group/p": float("inf")}, {"step": 5, "group/p": 0.5, "group/p_tilde": 1 / 3}],
     {"share correct": {"group/p": [[1, 1], [5, 0.5]], "group/p_tilde": [[5, 0.333333]]}}),
    ([{"step": 0, "val/accuracy": 0.5, "val/accuracy_shuffled": 0.4, "val/gap": 0.1}],
     {"held-out accuracy": {"val/accuracy": [[0, 0.5]], "val/accuracy_shuffled": [[0, 0.4]]},
      "held-out gap": {"val/gap": [[0, 0.1]]}}),
    ([{"step": 123456, "group/zero_std_rate": 0.0}],
     {"groups of zero spread": {"group/zero_std_rate": [[123456, 0]]}})])
def test_curves_are_of_the_metrics_that_a_run_has(toy, records, tmp_path, rows, curves):
    row = rollout(records["video"], 1, [WRONG] * 8, [WRONG] * 4, ORDERS[0])
    data, _ = reported(write_run(tmp_path, toy, [row], metrics=rows))
    assert data["curves"] == curves


def test_one_line_says_what_the_run_gained(run, toy, records, tmp_path):
    assert reported(run)[0]["gain"] == "accuracy 0.25 → 0.875 (+0.62)"
    row = rollout(records["video"], 1, [WRONG] * 8, [WRONG] * 4, ORDERS[0])
    held_out = [{"step": 0, "val/accuracy": 0.7, "val/gap": 0.25}, *METRICS,
                {"step": 3, "val/accuracy": 0.65, "val/gap": 0.5}]
    data, _ = reported(write_run(tmp_path, toy, [row], metrics=held_out))
    assert data["gain"] == ("accuracy 0.25 → 0.875 (+0.62), held-out accuracy 0.7 → 0.65 (-0.05), "
                            "held-out gap 0.25 → 0.5 (+0.25)")
    assert reported(write_run(tmp_path, toy, [row], metrics=[]))[0]["gain"] == ""


# a fork may show the second group what it likes: reversed, one frame, one again and again, none
@pytest.mark.parametrize("order", [ORDERS[1], [5], [0] * 8, [2, 3], None])
def test_whatever_the_second_group_saw_is_shown(toy, records, tmp_path, order):
    row = rollout(records["video"], 1, [WRONG] * 8, [WRONG] * 4, order)
    question, = reported(write_run(tmp_path, toy, [row]))[0]["questions"]
    assert len(question["pictures"]) == 8 and question["steps"][0]["frame_order"] == (order or [])


def test_big_pictures_are_made_small(toy, tmp_path):
    rng = np.random.default_rng(0)
    write_video(tmp_path / "big.mp4", rng.integers(0, 255, (8, 560, 1120, 3), np.uint8), 2)
    record = load_records(toy / "train.json")[0] | {
        "problem_id": "big", "path": "big.mp4", "data_type": "video"}
    (tmp_path / "data.json").write_text(json.dumps([record]))
    data, _ = reported(write_run(tmp_path / "run", toy, [rollout(record, 1, [WRONG] * 8, [])],
                                 data=str(tmp_path / "data.json"), media_root=None,
                                 max_pixels=400 * 784))
    for url in data["questions"][0]["pictures"]:
        assert max(decoded(url).size) == report.FRAME_SIDE and url.startswith("data:image/jpeg;")
        assert len(url) < 30_000  # noise, which JPEG cannot make smaller


def test_a_flag_that_an_older_run_lacks_is_not_missed(run, toy, tmp_path):
    rows = [json.loads(line) for line in (run / "rollouts.jsonl").read_text().splitlines()]
    data, _ = reported(write_run(tmp_path / "run", toy, rows, leave_out=["temporal_to", "alpha"]))
    assert data["flags"].keys() == FLAGS.keys() - {"temporal_to", "alpha", "learning_rate"}
    assert data["flags"]["correct_threshold"] == "0.5" and question_at(90, data)["pictures"]


# ------------------------------------------------------------------------------- one group as SVG

def drawn(folder, path):
    """The texts and the images' addresses of the picture that the command makes of a run."""
    report.main(report.parse_args([str(folder), "--picture", str(path)]))
    elements = [*ElementTree.parse(path).getroot()]
    return ([element.text or "" for element in elements if element.tag.endswith("text")],
            [element.attrib["href"] for element in elements if element.tag.endswith("image")])


def test_the_picture_shows_the_group_whose_p_is_furthest_above_p_tilde(run, records, tmp_path):
    texts, images = drawn(run, tmp_path / "new/method.svg")
    frames = question_at(90, reported(run)[0])["pictures"]
    assert images == frames + [frames[place] for place in ORDERS[1]]
    truth = extract_answer(records["video"]["solution"])
    for text in ("p = 0.875", "p_tilde = 0.25", f"✓ {truth}", "✗ ?", "look", "2.5", "0.188",
                 *records["video"]["options"][:1], f"Answer: {truth}", "p > p_tilde", "r_t = 0.3."):
        assert any(text in line for line in texts), text
    assert sum(line.startswith("✓") for line in texts) == 7 + 1
    assert sum(line.startswith("✗") for line in texts) == 1 + 3
    assert [line for line in texts if line.isdigit()][:16] == [
        str(place + 1) for place in [*range(8), *ORDERS[1]]]


def test_a_picture_holds_any_text(toy, records, tmp_path):
    right = RIGHT.format(extract_answer(records["video"]["solution"]))
    row = rollout(records["video"], 1, [right, *HOSTILE[:7]], [*HOSTILE[4:]], ORDERS[0])
    texts, _ = drawn(write_run(tmp_path, toy, [row]), tmp_path / "method.svg")
    assert max(map(len, texts)) < 150 and any(text.startswith("NUL \ufffd") for text in texts)


def test_a_run_without_a_group_to_draw_is_refused(run, toy, records, tmp_path):
    right = RIGHT.format(extract_answer(records["video"]["solution"]))
    rows = [rollout(records["video"], 1, [right] * 8, [WRONG] * 4, ORDERS[0]),
            rollout(records["video"], 2, [WRONG] * 8, [WRONG] * 4, ORDERS[0]),
            rollout(records["video"], 3, [right, WRONG] * 4, [], None)]
    with pytest.raises(InputError, match="--picture needs a video with correct and wrong resp"):
        drawn(write_run(tmp_path / "run", toy, rows), tmp_path / "method.svg")
    with pytest.raises(InputError, match="cannot write"):
        drawn(run, tmp_path / "run/rollouts.jsonl/method.svg")
    shutil.copytree(run, tmp_path / "moved")
    with pytest.raises(InputError, match="--picture: .*No such file"):
        report.main(report.parse_args([str(tmp_path / "moved"), "--media_root", str(tmp_path),
                                       "--picture", str(tmp_path / "method.svg")]))


# -------------------------------------------------------------------------------- safe and whole

@pytest.fixture(scope="module")
def hostile(toy, tmp_path_factory):
    """A run of which every text is hostile."""
    folder = tmp_path_factory.mktemp("hostile")
    record = load_records(toy / "train.json")[0] | {
        "problem": HOSTILE[0], "options": [f"A. {HOSTILE[1]}", f"B. {HOSTILE[2]}"],
        "problem_type": "multiple choice", "problem_id": '"><script>', "data_type": "video",
        "solution": f"<answer>{HOSTILE[2]}</answer>", "path": "a\"'><img src=y onerror=z>.mp4"}
    (folder / "data.json").write_text(json.dumps([record]))
    return write_run(folder / "a <b> & \"c\"", toy, [rollout(
        record, 1, list(HOSTILE), list(HOSTILE), ORDERS[0])], data=str(folder / "data.json"),
        media_root=str(folder), temporal_test="</script><script>")


def test_no_text_of_a_model_or_a_record_becomes_markup(hostile):
    data, text = reported(hostile)
    row, = data["questions"][0]["steps"]
    for name in ("first", "second"):
        assert [response["text"] for response in row[name]] == [*HOSTILE]
    island, = re.findall(r'id="run">(.*)</script>', text)
    assert island.isascii() and not {"<", "\0"} & {*island}
    assert [tag for tag, _ in Page(text).elements] == [tag for tag, _ in Page(TEMPLATE).elements]


def test_the_script_makes_text_nodes_and_loads_nothing():
    template = TEMPLATE.replace("http://www.w3.org/2000/svg", "")  # a name
    for markup in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "setHTML",
                   "DOMParser", "createContextualFragment", "eval(", "Function(", "srcdoc",
                   "fetch(", "XMLHttpRequest", "import(", "@import", "url(", "http:", "https:"):
        assert markup not in template


def test_the_page_allows_nothing_but_its_own_style_and_script(run):
    page = Page(reported(run)[1])
    for _, attributes in page.elements:
        assert not {"src", "href", "action", "data", "srcset", "style"} & attributes.keys()
        assert not any(name.startswith("on") for name in attributes)
    policy = next(meta["content"] for meta in page.all("meta") if "http-equiv" in meta)
    rules = dict(rule.split(None, 1) for rule in policy.split(";"))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    assert rules["img-src"] == "data:"
    for name, content in (("style", page.texts("style")[0]), ("script", page.texts("script")[1])):
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert rules[f"{name}-src"] == f"'sha256-{digest}'"


def test_every_number_and_its_equation_is_explained():
    page = Page(TEMPLATE)
    terms = " ".join(page.texts("dt"))
    assert all(name in terms for name in ("p, p_tilde", "r_t", "second group", *report.PARTS))
    assert all(f"Eq. {number}" in page.texts("dl")[0] for number in (1, 2, 3, 5))


# -------------------------------------------------------------------------------------- bad input

@pytest.mark.parametrize("name, content, message", [
    ("rollouts.jsonl", "", "rollouts.jsonl has no rollouts: give the --output of a tgrpo.py run"),
    ("rollouts.jsonl", '{"step": 1, "prob', "rollouts.jsonl has no rollouts"),
    ("rollouts.jsonl", '{"step": 1}\n', "rollouts.jsonl, line 1, is damaged: KeyError"),
    ("rollouts.jsonl", "{\n", "rollouts.jsonl, line 1, is damaged: JSONDecodeError"),
    ("metrics.jsonl", "", "metrics.jsonl does not begin with the flags of a run"),
    ("metrics.jsonl", '{"arguments": {"data": "x"}}\n', "flags of a run: without media_root, max_"),
    ("metrics.jsonl", json.dumps({"arguments": FLAGS | {"data": "", "media_root": ""}})
     + '\n{"step": 1, "group/p": "x"}\n', "metrics.jsonl is damaged: TypeError"),
])
def test_a_folder_that_is_no_whole_run_ends_in_one_sentence(
        run, tmp_path, name, content, message):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / name).write_text(content)
    with pytest.raises(InputError, match=message):
        reported(tmp_path / "run")


@pytest.mark.parametrize("change, message", [
    ({"R": [1.0]}, "ValueError.*zip"), ({"A": [float("nan")] * 8}, "ValueError"),
    ({"responses": [1] * 8}, "ValueError.*a response is not a text"), ({"r_t": None}, "TypeError"),
    ({"path": ["a"]}, "TypeError"), ({"frame_order": "no"}, "ValueError")])
def test_a_damaged_line_is_named(toy, records, tmp_path, change, message):
    good = rollout(records["video"], 1, [WRONG] * 8, [WRONG] * 4, ORDERS[0])
    folder = write_run(tmp_path, toy, [good, good | change])
    with pytest.raises(InputError, match=f"rollouts.jsonl, line 2, is damaged: {message}"):
        reported(folder)


def test_a_line_that_is_being_written_is_left_out(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    with (tmp_path / "run/rollouts.jsonl").open("a") as file:
        file.write('{"step": 91, "problem')
    assert len(reported(tmp_path / "run")[0]["questions"]) == 3


def test_a_medium_that_cannot_be_read_is_named_in_its_place(run, toy, records, tmp_path):
    root = tmp_path / "moved"
    (root / "media").mkdir(parents=True)
    shutil.copytree(run, tmp_path / "run")
    shutil.copy(toy / "train.json", root)
    data, _ = reported(tmp_path / "run", "--media_root", root)
    for question in data["questions"]:
        assert "No such file" in question["fault"] and "pictures" not in question
        assert len(question["steps"][0]["first"]) == 8
    write_video(root / records["video"]["path"], np.zeros((4, 28, 28, 3), np.uint8), 2)
    data, _ = reported(tmp_path / "run", "--data", root / "train.json")
    assert question_at(90, data)["fault"].endswith("has 4 frames, not those of the run")


def test_records_of_another_run_are_refused_and_output_is_obeyed(run, toy, tmp_path):
    with pytest.raises(InputError, match="has no question of .*name the run's records with --data"):
        reported(run, "--data", toy / "test.json", "--media_root", toy)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write .*file/report.html"):
        report.main(report.parse_args([str(run), "--output", str(tmp_path / "file")]))
    report.main(report.parse_args([str(run), "--output", str(tmp_path / "new")]))
    assert (tmp_path / "new/report.html").read_text() == reported(run)[1]


# -------------------------------------------------------------------------------------- a browser

def browse(page, folder):
    """The page's DOM after its scripts ran, and what the browser wrote to its console."""
    result = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}",
         "--enable-logging=stderr", "--virtual-time-budget=4000", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout, [line for line in result.stderr.splitlines() if "CONSOLE" in line]


def shown(run, folder):
    """The page as a browser shows it, within its own policy, and its sections by their steps."""
    reported(run)
    dom, console = browse(run / "report.html", folder / "profile")
    assert console == []
    dom = re.sub("<noscript>.*?</noscript>", "", dom)  # in it a browser knows no elements
    return Page(dom), {int(step): Page(section)
                       for section in re.findall("<section.*?</section>", dom, re.DOTALL)
                       for step in re.findall(r"<h3>Step (\d+)", section)}


@pytest.fixture(scope="module")
def seen(run, tmp_path_factory):
    return shown(run, tmp_path_factory.mktemp("browser"))


@in_a_browser
def test_the_browser_shows_both_groups_at_two_steps(run, seen, records):
    video, record = seen[1][90], records["video"]
    truth = extract_answer(record["solution"])
    frames = question_at(90, reported(run)[0])["pictures"]
    assert video.texts("h3") == ["Step 2", "Step 90"]
    assert video.texts("h2")[0].endswith(record["problem"])
    assert video.texts("ul") == ["".join(record["options"])]
    for i, order in enumerate((range(8), *ORDERS)):
        assert video.texts("video")[i] == "".join(str(place + 1) for place in order)
        assert [image["src"] for image in video.all("img")[8 * i:8 * i + 8]] == [
            frames[place] for place in order]
    assert [float(meter["value"]) for meter in video.all("meter")] == [0.25, 0.5, 0.875, 0.25]
    for sentence in ("p < p_tilde, so r_t = 0", "p > p_tilde, so r_t = 0.3"):
        assert f"{sentence} for every correct response to the video." in video.texts("p")
    assert video.texts("h4") == 2 * ["First group: 8 responses to the video",
                                     "Second group: 4 responses, not trained on"]
    assert "p 0.25 → 0.875" in video.texts("p")
    earned = video.texts("summary")
    assert len(earned) == 2 * (8 + 4)
    assert video.texts("numbers")[0] == "answeraccuracyformattemporallengthRA"
    numbers = [f"{span['title']} {span['text']}" for tag, span in video.elements
               if tag == "/span" and span.get("title") in report.PARTS]
    late = 8 * 6 + 4 * 2  # where the later step's begin
    assert numbers[late:late + 6] == [
        "accuracy 1", "format 1", "temporal 0.3", "length 0.2", "R 2.5", "A 0.188"]
    assert numbers[late + 42:late + 52] == [
        "accuracy 0", "format 1", "temporal 0", "length 0", "R 1", "A -1.31",
        "accuracy 1", "format 1", "accuracy 0", "format 1"]
    assert earned[12].startswith(f"correct {truth}") and earned[19].startswith("wrong ?")
    correct = [text.startswith("correct") for text in earned]
    assert sum(correct[:8]) == 2 and sum(correct[8:12]) == 2  # agrees with p and p_tilde
    assert video.texts("think") == ["look"] * 24  # apart from the answer
    assert video.texts("answer")[:4] == [truth, truth, truth, "?"]  # the first is the record's


@in_a_browser
def test_the_browser_says_what_is_special_about_a_question(run, seen):
    page, sections = seen
    assert page.texts("h1") == [f"T-GRPO at work: {run}"]
    header, = page.texts("header")
    assert "3 of the 3 questions" in header and "temporal_test ge" in header
    once = "Logged at this one step only: there is no later one to compare."
    assert [once in sections[step].texts("p") for step in (7, 50, 90)] == [True, False, False]
    image = sections[50]
    assert len(image.all("img")) == 1
    assert image.texts("h4") == 2 * ["First group: 8 responses to the image"]
    assert image.texts("p").count("No second group: images, and runs with alpha 0, have none.") == 2
    assert image.texts("p").count(
        "All rewards are equal, so every A is 0: this group teaches nothing.") == 1  # at step 50
    assert page.texts("a") == [f"{i}. {question['problem']}" for i, question in
                               enumerate(reported(run)[0]["questions"], 1)]
    for details in sections[7].elements:  # a long response is folded
        if details[0] == "/details":
            assert ("open" in details[1]) == ("x" * 5000 not in details[1]["text"])


@in_a_browser
def test_the_browser_draws_the_curves(seen):
    curves = seen[0]
    captions = ["accuracy 0.25 → 0.875", "share correctp 0.25 → 0.875p_tilde 0.25 → 0.25",
                "KL 0.001 → 0.003", "response tokens 20.5 → 20.5", "groups of zero spread 0 → 0"]
    assert curves.texts("figcaption")[:5] == captions
    assert "accuracy 0.25 → 0.875 (+0.62)" in curves.texts("p")
    # 240 x 80, the largest value on top: from the first point to itself, then on
    assert [path["d"] for path in curves.all("path")[:4]] == [
        "M0 80L0 80L120 48L240 0", "M0 80L0 80L120 48L240 0", "M0 80L0 80L120 80L240 80",
        "M0 80L0 80L120 40L240 0"]
    assert curves.all("path")[4]["d"] == "M0 40L0 40L120 40L240 40"  # nothing changed
    assert curves.texts("text")[:4] == ["0.875", "0.25", "step 1", "3"]


@in_a_browser
@pytest.mark.parametrize("order, sentence", [
    ([5, 5], None), (None, "What the second group saw is not in rollouts.jsonl.")])
def test_the_browser_shows_what_a_forks_second_group_saw(toy, records, tmp_path, order, sentence):
    row = rollout(records["video"], 1, [WRONG] * 8, [WRONG] * 4, order)
    _, sections = shown(write_run(tmp_path / "run", toy, [row]), tmp_path)
    assert (sentence in sections[1].texts("p")) == (order is None)
    assert sections[1].texts("video") == ["12345678"] + ["66"] * (order is not None)
    assert "shuffled" not in "".join(sections[1].texts("article"))


@in_a_browser
def test_the_browser_says_what_cannot_be_shown(run, toy, tmp_path):
    rows = [json.loads(line) for line in (run / "rollouts.jsonl").read_text().splitlines()]
    page, sections = shown(write_run(tmp_path / "run", toy, rows, leave_out=["correct_threshold"],
                                     media_root=str(tmp_path)), tmp_path)
    assert all(text.startswith("graded") for text in sections[90].texts("summary"))
    assert any(text.startswith("The video cannot be shown:") for text in sections[90].texts("p"))
    assert page.all("img") == [] and len(page.texts("summary")) > 40


@in_a_browser
def test_in_a_browser_hostile_text_stands_to_the_letter_and_does_nothing(hostile, tmp_path):
    page, sections = shown(hostile, tmp_path)
    assert page.texts("title") == ["T-GRPO at work"]  # which the texts would change
    assert len(page.all("script")) == 2 and page.all("img") == []
    assert {tag.strip("/") for tag, _ in page.elements} == set(
        "html head meta title style body header h1 p details summary dl dt dd main section h2 ul "
        "li b div article h3 label meter h4 ol strong span nav button a script figure figcaption "
        "svg path text".split())
    assert not any(name.startswith("on") or name in ("style", "src")
                   for _, attributes in page.elements for name in attributes)
    assert sections[1].texts("text") == SEEN * 2  # but for what no page can show
    assert sections[1].texts("h2") == [f"1. {HOSTILE[0]}"]
    assert sections[1].texts("ul") == [f"A. {HOSTILE[1]}B. {HOSTILE[2]}"]
    assert sections[1].texts("answer")[0] == HOSTILE[2]
    assert f"T-GRPO at work: {hostile}" in page.texts("h1")


@in_a_browser
def test_the_policy_is_no_ornament(run, tmp_path):
    text = reported(run)[1]
    (tmp_path / "broken.html").write_text(text.replace("</main>", "<script>1</script></main>"))
    _, console = browse(tmp_path / "broken.html", tmp_path / "profile")
    assert any("Content Security Policy" in line for line in console)


@in_a_browser
def test_the_page_can_be_read_without_seeing_it(seen):
    page, _ = seen
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in zip(levels, levels[1:]))
    assert all(image["alt"] for image in page.all("img"))
    ids = [attributes["id"] for tag, attributes in page.elements if "id" in attributes
           and tag[0] != "/"]
    assert len(set(ids)) == len(ids)
    assert {link["href"][1:] for link in page.all("a")} <= set(ids)
    assert len(page.all("main")) == len(page.all("nav")) == 1 and page.all("html")[0]["lang"]
    for tag in ("section", "button", "a"):
        assert all(element["aria-label"] for element in page.all(tag))
    assert ["hidden" in section for section in page.all("section")] == [False, True, True]
    assert [link.get("aria-current") for link in page.all("a")] == ["true", None, None]


PROBE = """
const wait = () => new Promise(done => setTimeout(done, 50));
const press = (key, ctrlKey = false) => document.body.dispatchEvent(
  new KeyboardEvent("keydown", {key, ctrlKey, bubbles: true}));
const found = {width: innerWidth, overflow: [], walk: []};
const visible = () => [...document.querySelectorAll("section")].filter(s => !s.hidden)
  .map(s => s.id).join() + " " + document.activeElement.tagName
  + " " + document.querySelector("[aria-current]").firstChild.data;
(async () => {
  for (const key of ["Tab", "j", "ArrowRight", "j", "k", "ArrowLeft"]) {
    press(key); await wait(); found.walk.push(visible());
  }
  press("j", true); await wait(); found.walk.push(visible());
  document.querySelector("nav button:last-child").click(); await wait(); found.walk.push(visible());
  document.querySelectorAll("nav a")[0].click(); await wait(); found.walk.push(visible());
  document.querySelectorAll("section").forEach(s => { s.hidden = false; });
  document.querySelectorAll("details").forEach(d => { d.open = true; });
  await wait();
  document.querySelectorAll("body *").forEach(e => {
    if (e.getBoundingClientRect().right > innerWidth + 1) found.overflow.push(e.outerHTML); });
  found.scroll = document.documentElement.scrollWidth;
  found.frame = document.querySelector(".video img").getBoundingClientRect().width;
  found.smoothing = getComputedStyle(document.querySelector(".video img")).imageRendering;
  parent.postMessage(JSON.stringify(found), "*");
})();
"""


def probe(run, folder, script, width, height):
    """What a script in a copy of the run's page finds, in a window of that size."""
    _, text = reported(run)
    copy = re.sub(r"<meta http-equiv=[^>]*>", "", text).replace(
        "</body>", f"<script>{script}</script></body>")
    (folder / "copy.html").write_text(copy, encoding="utf-8")
    # a headless window has a least width, a frame has none
    (folder / "frame.html").write_text(
        f'<iframe src="copy.html" style="width: {width}px; height: {height}px; border: 0"></iframe>'
        "<script>addEventListener('message', e => {"
        " document.documentElement.dataset.found = e.data; })</script>")
    dom, console = browse(folder / "frame.html", folder / "profile")
    assert console == []
    return json.loads(Page(dom).all("html")[0]["data-found"])


@in_a_browser
@pytest.mark.parametrize("width", [360, 1600])
def test_in_a_browser_keys_lead_through_the_questions_and_nothing_overflows(run, tmp_path, width):
    found = probe(run, tmp_path, PROBE, width, 640)
    assert found["width"] == width and found["scroll"] <= width and found["overflow"] == []
    assert found["walk"] == ["q1 BODY 1", "q2 H2 2", "q3 H2 3", "q1 H2 1", "q3 H2 3",
                             "q2 H2 2", "q2 H2 2", "q3 H2 3", "q1 H2 1"]
    assert found["frame"] >= 56 and found["smoothing"] == "pixelated"
