"""Claims about evaluate.py --report: a T-GRPO run as one page, whatever its texts are."""
import base64
import hashlib
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import tgrpo
from build_data import InputError, load_records, load_vision, write_video

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome",
                                               "chrome"))), None)
HOSTILE = (  # what a model may write
    "<think></script><script>document.title = 'taken'</script></think><answer>A</answer>",
    "<img src=x onerror=\"document.title='taken'\"><answer>B</answer>",
    "\"'>\" ' & &lt; &amp;lt; <!-- <![CDATA[ {style} {0} %s \\",
    "NUL \0, escape \x1b[31m, a lone surrogate \ud800, a tab\t and\na new line",
    "right to left \u202e\u202bdetrever\u2067 and \u200f unclosed",
    "x" * 5000, "<answer><answer></think>", "")
ARGS = tgrpo.parse_args(["--model", "m", "--data", "d", "--output", "o", "--G", "8"])


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


def rollout(record, step, texts, texts_shuffled, order=None):
    """A line of rollouts.jsonl, made by tgrpo.py's own functions."""
    args = ARGS
    lengths = [400] * len(texts)
    parts = tgrpo.group_rewards(texts, texts_shuffled, lengths, record, args)
    R = parts["accuracy"] + parts["format"] + parts["length"] + parts.get("temporal", 0)
    row = tgrpo.rollout_row({"record": record, "parts": parts, "texts": texts, "R": R,
                             "texts_shuffled": texts_shuffled, "frame_order": order,
                             "A": tgrpo.group_advantages(R.double())})
    return {"step": step, **row}


def write_run(folder, toy, rows, **changed):
    """The --output of a tgrpo.py run over the toy, as --report reads it."""
    folder.mkdir(parents=True, exist_ok=True)
    arguments = vars(ARGS) | {"data": str(toy / "train.json"), "media_root": str(toy),
                              "max_frames": 8, "min_pixels": 784, "max_pixels": 784,
                              "image_min_pixels": 784, "image_max_pixels": 784} | changed
    (folder / "metrics.jsonl").write_text(json.dumps({"arguments": arguments}) + "\n{}\n")
    (folder / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def reported(folder, *more):
    """The page that the command writes."""
    evaluate.main(evaluate.parse_args(["--report", str(folder), *map(str, more)]))
    text = (folder / "report.html").read_text(encoding="utf-8")
    return Page(text), text


@pytest.fixture(scope="module")
def records(toy):
    """{"video", "image"}: a question of each, the video's with options."""
    found = {}
    for record in load_records(toy / "train.json"):
        if record["data_type"] == "image" or record["options"]:
            found.setdefault(record["data_type"], record)
    return found


RIGHT, WRONG = "<think>look</think><answer>{}</answer>", "<think>look</think><answer>?</answer>"
ORDERS = [3, 1, 0, 2, 5, 4, 7, 6], [7, 6, 5, 4, 3, 2, 1, 0]


@pytest.fixture(scope="module")
def run(toy, records, tmp_path_factory):
    """A video at steps 2 and 90, and between; an image at two steps; a third question once."""
    video, image = records["video"], records["image"]
    right = RIGHT.format(evaluate.extract_answer(video["solution"]))
    other = next(record for record in load_records(toy / "train.json")
                 if record["problem_type"] == "regression")
    read = RIGHT.format(evaluate.extract_answer(image["solution"]))
    return write_run(tmp_path_factory.mktemp("run"), toy, [
        rollout(video, 90, [right] * 7 + [WRONG], [right, WRONG, WRONG, WRONG], ORDERS[1]),
        rollout(video, 2, [right] * 2 + [WRONG] * 6, [right, right, WRONG, WRONG], ORDERS[0]),
        rollout(video, 40, [WRONG] * 8, [WRONG] * 4, ORDERS[0]),
        rollout(image, 3, [WRONG] * 7 + [read], []),
        rollout(image, 50, [read] * 8, []),
        rollout(other, 7, list(HOSTILE), list(HOSTILE[:4]), ORDERS[0])])


# ------------------------------------------------------------------------------ what is shown

def test_a_question_stands_at_its_earliest_and_its_latest_step(run):
    page, text = reported(run)
    sections = text.split("<section")[1:]
    video = next(part for part in sections if "Step 90" in part)
    assert re.findall(r"<h3>(Step \d+)</h3>", video) == ["Step 2", "Step 90"]
    assert "p &lt; p_tilde, so r_t = 0 for every" in video  # 2 of 8, then 2 of 4
    assert "p &gt; p_tilde, so r_t = 0.3 for every" in video  # 7 of 8, then 1 of 4
    meters = re.findall(r'<meter min="0" max="1" value="([\d.]+)"', video)
    assert list(map(float, meters)) == [0.25, 0.5, 0.875, 0.25]
    assert "Logged at this one step only" not in video
    once = next(part for part in sections if "Step 7<" in part)
    assert "Logged at this one step only" in once and len(sections) == 3


def test_every_response_stands_with_what_it_earned(run):
    page, text = reported(run)
    video = Page("<section" + next(part for part in text.split("<section")[1:]
                                   if "Step 90" in part).partition("</section>")[0] + "</section>")
    earned = video.texts("summary")
    assert len(earned) == 2 * (8 + 4)
    # step 90: 7 right of 8 earn 1 + 1 + 0.3 + 0.2, the last 1: mean 2.3125, std 0.5303
    assert earned[12] == "correctaccuracy 1format 1temporal 0.3length 0.2R 2.5A 0.353"
    assert earned[19] == "wrongaccuracy 0format 1temporal 0length 0R 1A -2.47"
    assert earned[20:22] == ["correctaccuracy 1format 1", "wrongaccuracy 0format 1"]  # shuffled
    correct = [text.startswith("correct") for text in earned]
    assert sum(correct[:8]) == 2 and sum(correct[8:12]) == 2  # as p and p_tilde say


def test_frames_stand_in_order_and_in_the_order_that_was_used(run, toy, records):
    page, text = reported(run)
    video = next(part for part in text.split("<section")[1:] if "Step 90" in part)
    strips = [re.findall(r'src="data:image/png;base64,([^"]+)">(\d+)<', part)
              for part in video.split('<ol class="video">')[1:]]
    assert [[int(number) - 1 for _, number in strip] for strip in strips] == [
        list(range(8)), *ORDERS]
    vision = load_vision(records["video"], max_frames=8, min_frames=4, fps=2, min_pixels=784,
                         max_pixels=784)
    for strip, order in zip(strips, (range(8), *ORDERS)):
        shown = [np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))) for data, _ in strip]
        wanted = vision.frames[list(order)].permute(0, 2, 3, 1)
        assert torch.equal(torch.from_numpy(np.stack(shown)), wanted)


def test_an_image_has_one_group_and_equal_rewards_are_pointed_out(run):
    page, text = reported(run)
    image = next(part for part in text.split("<section")[1:] if "Step 50" in part)
    assert image.count("No second group") == 2 and "shuffled" not in image
    assert image.count("All rewards are equal, so every A is 0") == 1  # at step 50
    assert image.count("<img ") == 1 and "8 responses to the image" in image


def test_thought_and_answer_are_told_apart(toy, records, tmp_path):
    rows = [rollout(records["image"], 1, ["<think>a < b</think>\n<answer>cat</answer>"] * 8, [])]
    page, _ = reported(write_run(tmp_path, toy, rows))
    assert page.texts("think") == ["a < b"] * 8
    assert page.texts("answer")[1:] == ["cat"] * 8  # the first is the truth's
    assert page.texts("text") == ["<think>a < b</think>\n<answer>cat</answer>"] * 8


def test_kinds_of_question_take_turns_and_those_logged_twice_come_first():
    records = {(str(i), ""): {"problem_id": i, "data_type": "image" if i > 19 else "video",
                              "problem_type": "OCR" if i > 19 else "numerical"} for i in range(30)}

    def row(step, A):
        return {"step": step, "earned": [{"A": value} for value in A]}
    rollouts = {key: [row(1, [1.0])] for key in records} | {
        ("5", ""): [row(1, [0.0]), row(90, [0.0])],  # nothing to learn from
        ("6", ""): [row(1, [0.0]), row(80, [1.0])], ("7", ""): [row(1, [1.0]), row(30, [0.0])],
        ("25", ""): [row(3, [1.0]), row(5, [1.0])]}
    chosen = evaluate.pick_questions(rollouts, records)
    assert len(chosen) == evaluate.REPORTED == 8
    assert [record["problem_id"] for record, _ in chosen] == [6, 25, 7, 5, 20, 21, 0, 22]
    assert [len(rows) for _, rows in chosen] == [2, 2, 2, 2, 1, 1, 1, 1]
    assert [[row["step"] for row in rows] for _, rows in chosen[:2]] == [[1, 80], [3, 5]]


# ---------------------------------------------------------------------------- safe and whole

def test_no_text_of_a_model_or_a_record_becomes_markup(toy, tmp_path):
    records = [json.loads(json.dumps(record)) for record in load_records(toy / "train.json")[:1]]
    records[0] |= {"problem": HOSTILE[0], "options": [f"A. {HOSTILE[1]}", f"B. {HOSTILE[2]}"],
                   "problem_type": "multiple choice", "problem_id": '"><script>',
                   "solution": f"<answer>{HOSTILE[2]}</answer>", "data_type": "video",
                   "path": "a\"'><img src=y onerror=z>.mp4"}
    (tmp_path / "data.json").write_text(json.dumps(records))
    folder = write_run(tmp_path / "a <b> & \"c\"", toy, [rollout(
        records[0], 1, list(HOSTILE), list(HOSTILE), ORDERS[0])],
        data=str(tmp_path / "data.json"), media_root=str(tmp_path), temporal_test="<script>")
    page, text = reported(folder)
    assert len(page.all("script")) == 1 and page.all("img") == []
    assert {tag.strip("/") for tag, _ in page.elements} == set(
        "html head meta title style body header h1 p details summary dl dt dd main section h2 ul "
        "li b div article h3 label meter h4 ol strong span nav button a script".split())
    assert not any(name.startswith("on") or name == "style" for _, attributes in page.elements
                   for name in attributes)
    wanted = [re.sub("[\0\x1b\ud800]", "\ufffd", response) for response in HOSTILE]
    assert page.texts("text") == wanted * 2  # to the letter, but for what no page can hold
    assert page.texts("h2") == [f"1. {HOSTILE[0]}"]
    assert page.texts("answer")[0] == HOSTILE[2]
    assert f"T-GRPO at work: {folder}" in page.texts("h1")


def test_the_page_loads_nothing_and_allows_nothing_but_its_own_style_and_script(run):
    page, text = reported(run)
    for _, attributes in page.elements:
        for name in ("src", "href", "action", "data", "srcset"):
            assert attributes.get(name, "#").startswith(("#", "data:image/"))
    policy = next(meta["content"] for meta in page.all("meta") if "http-equiv" in meta)
    rules = dict(rule.split(None, 1) for rule in policy.split(";"))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    assert rules["img-src"] == "data:"
    for name in ("style", "script"):
        content, = page.texts(name)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert rules[f"{name}-src"] == f"'sha256-{digest}'"
        assert "url(" not in content and "@import" not in content and "//" not in content


def test_the_page_can_be_read_without_seeing_it(run):
    page, _ = reported(run)
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in zip(levels, levels[1:]))
    assert all(image["alt"] for image in page.all("img"))
    ids = [attributes["id"] for tag, attributes in page.elements if "id" in attributes
           and tag[0] != "/"]
    assert len(set(ids)) == len(ids)
    assert all(section["aria-labelledby"] in ids for section in page.all("section"))
    assert {link["href"][1:] for link in page.all("a")} <= set(ids)
    assert len(page.all("main")) == len(page.all("nav")) == 1 and page.all("html")[0]["lang"]
    assert all(button["aria-label"] for button in page.all("button"))
    terms = " ".join(page.texts("dt"))
    assert all(name in terms for name in ("accuracy", "format", "p_tilde", "r_t", *evaluate.PARTS))
    assert all(f"Eq. {number}" in page.texts("dl")[0] for number in (1, 2, 3, 5))


def test_big_pictures_are_made_small(toy, tmp_path):
    rng = np.random.default_rng(0)
    write_video(tmp_path / "big.mp4", rng.integers(0, 255, (8, 560, 1120, 3), np.uint8), 2)
    record = load_records(toy / "train.json")[0] | {
        "problem_id": "big", "path": "big.mp4", "data_type": "video"}
    (tmp_path / "data.json").write_text(json.dumps([record]))
    page, _ = reported(write_run(tmp_path / "run", toy, [rollout(record, 1, [WRONG] * 8, [])],
                                 data=str(tmp_path / "data.json"), media_root=None,
                                 max_pixels=400 * 784))
    for image in page.all("img"):
        kind, _, data = image["src"].partition(";base64,")
        picture = Image.open(io.BytesIO(base64.b64decode(data)))
        assert max(picture.size) == evaluate.FRAME_SIDE and kind == "data:image/jpeg"
        assert len(data) < 30_000  # noise, which JPEG cannot make smaller


# -------------------------------------------------------------------------------- bad input

@pytest.mark.parametrize("name, content, message", [
    ("rollouts.jsonl", None, "rollouts.jsonl has no rollouts: --report names the --output"),
    ("rollouts.jsonl", "", "rollouts.jsonl has no rollouts"),
    ("rollouts.jsonl", '{"step": 1, "prob', "rollouts.jsonl has no rollouts"),
    ("rollouts.jsonl", '{"step": 1}\n', "rollouts.jsonl, line 1, is damaged: KeyError"),
    ("rollouts.jsonl", "[]\n", "rollouts.jsonl, line 1, is damaged: TypeError"),
    ("rollouts.jsonl", "{\n", "rollouts.jsonl, line 1, is damaged: JSONDecodeError"),
    ("metrics.jsonl", None, "metrics.jsonl does not begin with the flags of a run"),
    ("metrics.jsonl", '{"step": 1}\n', "metrics.jsonl does not begin with the flags of a run"),
    ("metrics.jsonl", '{"arguments": {"data": "x"}}\n', "flags of a run: without alpha, "),
])
def test_a_folder_that_is_no_whole_run_ends_in_one_sentence(
        run, tmp_path, name, content, message):
    shutil.copytree(run, tmp_path / "run")
    if content is None:
        (tmp_path / "run" / name).unlink()
    else:
        (tmp_path / "run" / name).write_text(content)
    with pytest.raises(InputError, match=message):
        reported(tmp_path / "run")


@pytest.mark.parametrize("change, message", [
    ({"R": [1.0]}, "damaged: ValueError.*zip"), ({"A": ["x"] * 8}, "damaged: ValueError"),
    ({"responses": [1] * 8}, "damaged: ValueError.*a response is not a text"),
    ({"r_t": None}, "damaged: TypeError"), ({"path": ["a"]}, "damaged: TypeError"),
    ({"frame_order": "no"}, "damaged: ValueError")])
def test_a_damaged_line_is_named(run, toy, records, tmp_path, change, message):
    good = rollout(records["video"], 1, [WRONG] * 8, [WRONG] * 4, ORDERS[0])
    folder = write_run(tmp_path, toy, [good, good | change])
    with pytest.raises(InputError, match=f"rollouts.jsonl, line 2, is {message}"):
        reported(folder)


def test_a_line_that_is_being_written_is_left_out(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    with (tmp_path / "run/rollouts.jsonl").open("a") as file:
        file.write('{"step": 91, "problem')
    page, _ = reported(tmp_path / "run")
    assert len(page.all("section")) == 3


def test_a_medium_that_cannot_be_read_is_named_in_its_place(run, toy, records, tmp_path):
    root = tmp_path / "moved"
    (root / "media").mkdir(parents=True)
    shutil.copytree(run, tmp_path / "run")
    shutil.copy(toy / "train.json", root)
    page, text = reported(tmp_path / "run", "--media_root", root)
    assert "The video cannot be shown:" in text and "The image cannot be shown:" in text
    assert page.all("img") == [] and len(page.texts("summary")) > 40
    write_video(root / records["video"]["path"], np.zeros((4, 28, 28, 3), np.uint8), 2)
    page, text = reported(tmp_path / "run", "--data", root / "train.json")
    assert "has 4 frames, not those of the run" in text and page.all("img") == []


def test_records_of_another_run_are_refused_and_output_is_obeyed(run, toy, tmp_path):
    with pytest.raises(InputError, match="has no question of .*name the run's records with --data"):
        reported(run, "--data", toy / "test.json", "--media_root", toy)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write .*file/report.html, name another folder"):
        evaluate.main(evaluate.parse_args(["--report", str(run), "--output",
                                           str(tmp_path / "file")]))
    evaluate.main(evaluate.parse_args(["--report", str(run), "--output", str(tmp_path / "new")]))
    assert (tmp_path / "new/report.html").read_text() == reported(run)[1]


# --------------------------------------------------------------------------------- a browser

def browse(page, folder, *flags):
    """The page's DOM after its scripts ran, and what the browser wrote to its console."""
    result = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}",
         "--enable-logging=stderr", "--virtual-time-budget=4000", "--dump-dom", *flags,
         page.as_uri()], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout, [line for line in result.stderr.splitlines() if "CONSOLE" in line]


PROBE = """
const wait = () => new Promise(done => setTimeout(done, 50));
const press = (key, ctrlKey = false) => document.body.dispatchEvent(
  new KeyboardEvent("keydown", {key, ctrlKey, bubbles: true}));
const found = {width: innerWidth, overflow: [], walk: [], title: document.title};
const visible = () => [...document.querySelectorAll("section")].filter(s => !s.hidden)
  .map(s => s.id).join() + " " + document.activeElement.id
  + " " + document.querySelector("[aria-current]").textContent;
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
  found.frame = document.querySelector(".tiny").getBoundingClientRect().width;
  found.smoothing = getComputedStyle(document.querySelector(".tiny")).imageRendering;
  parent.postMessage(JSON.stringify(found), "*");
})();
"""


@pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine")
@pytest.mark.parametrize("width", [360, 1600])
def test_in_a_browser_keys_lead_through_the_questions_and_nothing_overflows(run, tmp_path, width):
    _, text = reported(run)
    script = f"<script>{PROBE}</script>"
    copy = re.sub(r"<meta http-equiv=[^>]*>", "", text).replace("</body>", script + "</body>")
    (tmp_path / "copy.html").write_text(copy, encoding="utf-8")
    # a headless window has a least width, a frame has none
    (tmp_path / "frame.html").write_text(
        f'<iframe src="copy.html" style="width: {width}px; height: 640px; border: 0"></iframe>'
        "<script>addEventListener('message', e => {"
        " document.documentElement.dataset.found = e.data; })</script>")
    dom, console = browse(tmp_path / "frame.html", tmp_path / "profile")
    assert console == []
    found = json.loads(Page(dom).all("html")[0]["data-found"])
    assert found["width"] == width and found["scroll"] <= width and found["overflow"] == []
    assert found["walk"] == ["q1  1", "q2 h2 2", "q3 h3 3", "q1 h1 1", "q3 h3 3", "q2 h2 2",
                             "q2 h2 2", "q3 h3 3", "q1 h1 1"]
    assert found["frame"] >= 56 and found["smoothing"] == "pixelated"
    assert found["title"] == "T-GRPO at work"


@pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine")
def test_in_a_browser_the_page_runs_within_its_own_policy_and_hostile_text_does_nothing(
        run, tmp_path):
    reported(run)
    dom, console = browse(run / "report.html", tmp_path / "profile")
    assert console == [] and "<title>T-GRPO at work</title>" in dom
    page = Page(dom)
    assert ["hidden" in section for section in page.all("section")] == [False, True, True]
    assert page.all("a")[0]["aria-current"] == "true"  # its own script did run
    assert set(HOSTILE[:3]) <= set(page.texts("text"))
    # the policy is no ornament: a script that got in would be refused
    broken = (run / "report.html").read_text().replace("</main>", "<script>1</script></main>")
    (tmp_path / "broken.html").write_text(broken)
    _, console = browse(tmp_path / "broken.html", tmp_path / "profile")
    assert any("Content Security Policy" in line for line in console)
