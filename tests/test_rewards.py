"""Claims about rewards.py: what counts as an answer, how each problem type is graded, Eq. 5."""
import json
import math
import random
import time
from string import ascii_uppercase

import pytest
from rouge_score.rouge_scorer import RougeScorer

import rewards
from conftest import ROOT

ANSWERS = json.loads((ROOT / "tests/answers.json").read_text(encoding="utf-8"))
OPTIONS = ["A. cat", "B. a dog", "C. Vitamin C", "D. It is 5 m."]
LONG = 100_000  # characters of the pathological inputs
SECONDS = 1.0  # processor time that one call on them may take

# ---- reading a response --------------------------------------------------------------------------

@pytest.mark.parametrize("text, answer", [
    ("<answer>B</answer>", "B"), ("<think>x</think>\n<answer> B \n</answer>\n<|im_end|>", "B"),
    ("<answer>two\nlines</answer>", "two\nlines"), ("<answer>a < b</answer>", "a < b"),
    ("<answer>B</answer>\n<answer> B\n</answer>", "B"),
    ("<think><answer>B</answer></think><answer>B</answer>", "B"),
    *((text, "") for text in (
        "B", "<answer></answer>", "<answer>B", "B</answer>", "</answer><answer>B</answer>",
        "<answer>A</answer><answer>B</answer>", "<answer>B</answer><answer></answer>",
        "<answer>B</answer><answer>B", "<answer>B</answer>B</answer>",
        "<answer>A<answer>B</answer></answer>", "<Answer>B</Answer>"))])
def test_the_answer_is_the_one_text_that_the_answer_blocks_hold(text, answer):
    assert rewards.extract_answer(text) == answer


GOOD = "<think>it moves left</think>\n<answer>B</answer>"


@pytest.mark.parametrize("response", [
    GOOD, GOOD.replace("\n", ""), f" \n{GOOD}\n ", GOOD + "\n<|im_end|>\n<|endoftext|>",
    "<think>1\n2</think>\n\n<answer>3\n4</answer>", "<think>a < b > c</think> <answer>B</answer>"])
def test_format_is_one_think_block_then_one_answer_block(response):
    assert rewards.format_reward(response) == 1.0


@pytest.mark.parametrize("response", [
    "", "<answer>B</answer>", "<think>x</think>", "<think>x</think>B",
    "<answer>B</answer><think>x</think>", f"So: {GOOD}", f"{GOOD} done", f"<|im_end|>{GOOD}",
    f"{GOOD}<|im_end|>B", f"{GOOD}<answer>B</answer>", f"<think>y</think>{GOOD}",
    "<think>x</think> and <answer>B</answer>", "<think>x<think>y</think></think><answer>B</answer>",
    "<think>x<answer>B</answer></think>", "<think>x<answer></think>B</answer>",
    "<think>x</think><answer><think>B</answer>", "<think>x<answer>B</answer>",
    "<think>x</think><answer>B", "<THINK>x</THINK><answer>B</answer>"])
def test_any_other_format_has_no_reward(response):
    assert rewards.format_reward(response) == 0.0


# ---- multiple choice -----------------------------------------------------------------------------

@pytest.mark.parametrize("options", [(), OPTIONS, None], ids=["no options", "options", "null"])
@pytest.mark.parametrize("kind", ANSWERS["the letter B"])
def test_a_letter_may_be_spelt_in_many_ways(kind, options):
    for text in ANSWERS["the letter B"][kind]:
        assert rewards.multiple_choice(text, "B", options) == 1.0, text
        assert rewards.multiple_choice(text, "C", options) == 0.0, text


@pytest.mark.parametrize("text", ANSWERS["no letter"])
def test_two_letters_or_a_letter_in_a_word_or_a_wrong_text_mean_nothing(text):
    assert rewards.choice_letter(text, OPTIONS) == ""
    assert rewards.multiple_choice(text, "B", OPTIONS) == 0.0


@pytest.mark.parametrize("letter", "ABCD")
def test_an_options_exact_text_is_its_letter_with_or_without_it(letter):
    for text in ANSWERS["an option's text"][letter]:
        assert rewards.choice_letter(text, OPTIONS) == letter, text


@pytest.mark.parametrize("texts", ANSWERS["options that are alike"], ids=lambda texts: texts[0])
def test_an_options_own_text_letter_for_letter_is_its_letter_and_no_others(texts):
    options = [f"{key}. {text}" for key, text in zip("ABCD", texts)]
    for key, text in zip("ABCD", texts):
        for answer in (f"{key}. {text}", f"{key}) {text}", f"({key}) {text}", f"{key}: {text}"):
            assert rewards.choice_letter(answer, options) == key, answer
        if text != "(b)":  # alone, it is the letter B
            assert rewards.choice_letter(text, options) == key, text
        for other in set("ABCD") - {key} if len(text) > 1 else ():
            assert rewards.choice_letter(f"{other}. {text}", options) == "", (other, text)


@pytest.mark.parametrize("row", ANSWERS["letters among options"], ids=lambda row: row["claim"])
def test_a_letter_or_a_text_means_an_option_among_others(row):
    for letter, texts in row["letters"].items():
        for text in texts:
            assert rewards.choice_letter(text, row["options"]) == letter, text


def test_a_letter_beyond_the_options_means_nothing_but_all_of_a_to_z_can_exist():
    options = [f"{letter}. text {letter}" for letter in ascii_uppercase]
    assert [rewards.choice_letter(letter, options) for letter in ascii_uppercase] == [
        *ascii_uppercase]
    assert rewards.choice_letter("text Z", options) == "Z"
    assert rewards.choice_letter("Z", options[:25]) == ""


@pytest.mark.parametrize("truth", ["B", "B.", "(B)", "b", "B. a dog", "a dog"])
def test_the_truth_may_be_spelt_in_the_same_ways(truth):
    assert rewards.multiple_choice("B", truth, OPTIONS) == 1.0
    assert rewards.multiple_choice("A", truth, OPTIONS) == 0.0


# ---- numbers -------------------------------------------------------------------------------------

@pytest.mark.parametrize("value", ANSWERS["a number"])
def test_a_number_is_read_by_its_value(value):
    for text in ANSWERS["a number"][value]:
        assert rewards.parse_number(text) == json.loads(value), text


@pytest.mark.parametrize("text", [t for texts in ANSWERS["no number"].values() for t in texts])
def test_anything_but_one_finite_number_is_none(text):
    assert rewards.parse_number(text) is None


@pytest.mark.parametrize("p, g, equal", [
    ("3", "3.0", True), ("1/3", "0.33", True), ("3.141", "3.14", True), ("3.146", "3.15", True),
    ("-0.001", "0", True), ("2.675", "2.68", True), ("0.125", "0.12", True),
    ("1e308", "1e308", True), ("0.125", "0.13", False), ("3", "4", False), ("3.14", "3.15", False),
    ("3.144", "3.15", False), ("1e308", "1.1e308", False), ("0.5", "50%", False),
    ("1.0", "10", False), ("3 or 4", "3", False), ("5", "2 + 3 = 5", False), ("", "", False)])
def test_numbers_are_equal_when_they_round_to_the_same_two_decimals(p, g, equal):
    assert rewards.numerical(p, g) == (1.0 if equal else 0.0)


@pytest.mark.parametrize("p, g, reward", [
    ("10", "10", 1.0), ("8", "10", 0.8), ("12", "10", 0.8), ("20", "10", 0.0), ("-8", "-10", 0.8),
    ("8", "-10", 0.0), ("0", "0", 1.0), ("-0.0", "0", 1.0), ("0.001", "0", 0.0),
    ("8 or 9", "10", 0.0), ("8", "", 0.0), ("1e308", "-1e308", 0.0), ("1e308", "1e-308", 0.0),
    ("1", "5e-324", 0.0)])
def test_regression_is_one_minus_the_relative_error_clipped(p, g, reward):
    assert rewards.regression(p, g) == pytest.approx(reward, abs=1e-12)


# ---- text ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("p, g, reward", [
    ("stop", "STOP", 0.0), ("a b c d", "a b c x", 0.75), ("a b c", "a b c d", 0.75),
    ("a b c d e", "a b c d", 0.75), ("b a", "a b", 0.0), ("a\nb", "a b", 1.0),
    (" a \t b ", "a b", 1.0), ("x y z", "a", 0.0), ("", " ", 1.0), ("", "a", 0.0), ("a", "", 0.0),
    ("\ud800 a", "\ud800 b", 0.5), ("S\u030c é", "Š e\u0301", 1.0), ("दीन", "दिन", 0.0)])
def test_ocr_is_one_minus_the_word_error_rate_clipped(p, g, reward):
    assert rewards.ocr(p, g) == pytest.approx(reward, abs=1e-12)


@pytest.mark.parametrize("p, g, reward", [
    ("The CAT, sat!", "the cat sat", 1.0),
    ("the cat ran", "the cat sat", (2 / 3 + 1 / 2 + 2 / 3) / 3),
    ("a c", "a b c d", (2 / 3 + 0 + 2 / 3) / 3),  # F of P = 1 and R = 1/2
    ("d c b a", "a b c d", (1 + 0 + 1 / 4) / 3),
    ("a a a", "a b", (2 / 5 + 0 + 2 / 5) / 3),  # a word counts as often as the truth has it
    ("red", "red", 2 / 3),  # one word has no pair of words
    ("his", "hi", 0.0),  # words of up to three letters are not stemmed
    ("", "red", 0.0), ("red", "", 0.0), ("", "", 0.0), ("?!", "?!", 0.0),
    ("小狗在走", "小狗在跑", (3 / 4 + 2 / 3 + 3 / 4) / 3), ("собака бежит", "Собака бежит", 1.0),
    # a combining mark belongs to its word, and a text has one form
    ("दीन है", "दिन है", 1 / 3), ("กัน", "กิน", 0.0), ("cafe\u0301 noir", "café noir", 1.0),
    ("か\u3099くせい", "がくせい", 1.0), ("q\u0307", "q", 0.0), ("❤\ufe0f red", "❤ red", 2 / 3)])
def test_free_form_is_the_mean_of_three_rouge_f_measures(p, g, reward):
    assert rewards.free_form(p, g) == pytest.approx(reward, abs=1e-12)


def test_free_form_equals_rouge_score_on_ascii_text():
    library = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    rng = random.Random(1)
    words = ("the", "a", "running", "runs", "dogs,", "dog", "it's", "x_1", "3.5", "Nationality", "")
    for _ in range(500):
        p, g = (" ".join(rng.choices(words, k=rng.randrange(0, 20))) for _ in range(2))
        scores = library.score(g, p)
        mean = sum(score.fmeasure for score in scores.values()) / 3
        assert rewards.free_form(p, g) == pytest.approx(mean, abs=1e-12), (p, g)


# ---- the rewards of a response -------------------------------------------------------------------

def record(problem_type, truth, options=None):
    return {"problem_id": 41, "problem_type": problem_type, "options": options,
            "solution": f"<answer>{truth}</answer>"}


@pytest.mark.parametrize("row, answer, reward", [
    (record("multiple choice", "B", OPTIONS), "a dog", 1.0),
    (record("multiple choice", "B", OPTIONS), "A", 0.0),
    (record("multiple choice", "E", OPTIONS), "E", 0.0),
    (record("numerical", "1000"), "1,000.0", 1.0),
    (record("numerical", "1000"), "1001", 0.0),
    (record("OCR", "one way"), "one", 0.5),
    (record("free-form", "the cat sat"), "the cat ran", 11 / 18),
    (record("regression", "10"), "8", 0.8),
])
def test_accuracy_is_graded_by_the_records_problem_type(row, answer, reward):
    response = f"<think>x</think>\n<answer> {answer}\n</answer><|im_end|>"
    assert rewards.accuracy_reward(response, row) == pytest.approx(reward)


@pytest.mark.parametrize("wrong, words", [
    ({"problem_type": "multiple-choice"}, "unknown problem_type 'multiple-choice'"),
    *(({"solution": text}, f"solution '{text}'") for text in ("B", "", "<answer> </answer>"))])
def test_an_unknown_problem_type_or_no_solution_is_an_error_that_names_the_problem(wrong, words):
    for response in ("<answer>B</answer>", ""):
        with pytest.raises(ValueError, match=f"problem_id 41: {words}"):
            rewards.accuracy_reward(response, record("OCR", "B") | wrong)


def test_length_reward_is_omega_for_each_correct_response_within_the_interval():  # Eq. 5
    correct, lengths = [True] * 5 + [False], [319, 320, 400, 512, 513, 400]
    assert rewards.length_reward(correct, lengths, 0.2, 320, 512) == [0, 0.2, 0.2, 0.2, 0, 0]
    # one correct response is enough
    assert rewards.length_reward([False, True], [400, 400], 0.2, 320, 512) == [0, 0.2]


# ---- any text, at any length ---------------------------------------------------------------------

UNITS = [
    "<answer>", "</answer>", "<think>", "</think>", "<answer></answer>", "<", "<|im_end|>", "<|im_",
    "<|im_end|> ", "</s>", " ", "\n", "\t", "\0", "\ud800", "(", "[", "{", "$", "*", "_", "\\", "'",
    "-", "- ", "+", "--", ".", ",", ":", "/", "1", "9", "1,", "1 ", "1.", "1/", "1/1/", "1e", "1e9",
    ",000", "1\u202f000", "1x", "x1", "m^{", "10^", "1×10^", "\\frac{", "\\frac{1}{", "\\boxed{",
    "²", "½", "٣", "A", "A ", "A. ", "a) ", "B) ", "is ", "is: ", "option ", "I'", "y", "yed",
    "yyyyy ", "ational", "running ", "ab cd ef ", "小", "İ", "ß", "ﷺ", "🐶",
    "\u0301\u0316", "a\u0301", "\u200b", "Ｂ", "选", "—", "负5", "five ", "two, one", "minus ", "n't ",
    "than or ", "at least ", "5 or ", "5+", "5 + ", "2+3=", "=(", "<", "<5>", "<sup>2</sup>",
    "m$^2$", "5 or one", "five or ", "m}", "{,}", "\\text{", "\\frac1", "\\frac{1}", "**", "'s",
    "((", "B; B", "B\n", "a dog (B)", "the answer is ", "i choose ", "2m30s", "5 is ", "以上",
    ", x", "- ", "', '", "ans. ", "?", "-\\$",
]
WRAPS = ["{}", "{}!", "5{}x", "-{}5", "B. {}", "B. {}x", "2 + 3{} = 5",
         "<think>{}</think>{}<answer>5</answer>{}", "<think></think><answer>{}</answer>{}!"]


def seconds(function, *arguments):
    start = time.process_time()
    value = function(*arguments)
    assert isinstance(value, str) or value is None or 0.0 <= value <= 1.0 or (
        function is rewards.parse_number and math.isfinite(value))
    return time.process_time() - start


@pytest.mark.parametrize("wrap, every, length", [
    *((wrap, len(WRAPS), LONG // 4) for wrap in WRAPS),  # each unit in one of them
    *(pytest.param(wrap, 1, LONG, marks=pytest.mark.slow) for wrap in WRAPS)])
def test_100000_characters_of_anything_cost_less_than_a_second(wrap, every, length):
    """Or a quarter of them a quarter of a second."""
    words = " ".join(random.Random(2).choices("abcdefgh", k=length // 2))
    for unit in UNITS[WRAPS.index(wrap) % every::every]:
        share = length // wrap.count("{}")
        text = wrap.replace("{}", (unit * share)[:share])
        calls = [(rewards.extract_answer, text), (rewards.format_reward, text),
                 (rewards.parse_number, text), (rewards.choice_letter, text, OPTIONS)]
        if wrap == "{}":
            calls += [(grade, *pair) for grade in (rewards.ocr, rewards.free_form) for pair in (
                (text, "a"), (text, "the cat sat " * 100), (text, text), (text, words),
                (words, text))]
        for function, *arguments in calls:
            spent = seconds(function, *arguments)
            assert spent < SECONDS * length / LONG, (function.__name__, unit, wrap, spent)


FRAGMENTS = UNITS + [
    "<|endoftext|>", "\u00a0", "\udfff", "\u200d", "0", "5", "12", "1,000", ".5", "1e3", "3/4",
    "1e999", "inf", "nan", "１", "१", "①", "³", "⁻", "%", "€", "−", "，", "×", "km/h", "m2", "**2",
    "}", "}{", ")", '"', "’", "!", "B", "b", "(B)", "B.", "Z", "ı", "é", "It is ", "Option ",
    "The answer is ", "答案", "。", "a dog", "cat", "Vitamin C", "and", "not ", "more than "]
FUZZ_TEXT_EVERY = 8  # the two text grades take longest, so they see one string in eight


@pytest.mark.parametrize("strings", [4_000, pytest.param(200_000, marks=pytest.mark.slow)])
def test_no_string_raises_or_leaves_the_unit_interval(strings):
    rng = random.Random(3)
    before, seen = "1", dict(answers=0, formats=0, numbers=0, letters=0, partial=0)
    for count in range(strings):
        text = "".join(rng.choices(FRAGMENTS, k=rng.randrange(9)))
        if count % 4 == 0:  # otherwise hardly any string would have both blocks
            text = f"<think>{before}</think><answer>{text}</answer>"
        answer, number = rewards.extract_answer(text), rewards.parse_number(text)
        letter, formatted = rewards.choice_letter(text, OPTIONS), rewards.format_reward(text)
        assert answer == answer.strip() and "<answer>" not in answer, text
        assert formatted in (0.0, 1.0) and (not formatted or text.count("<answer>") == 1), text
        assert number is None or (type(number) is float and math.isfinite(number)), text
        assert letter in ("", "A", "B", "C", "D"), text
        assert rewards.numerical(text, text) == (number is not None), text
        assert rewards.multiple_choice(text, text, OPTIONS) == (letter != ""), text
        grades = [rewards.numerical(text, before), rewards.regression(text, before)]
        if count % FUZZ_TEXT_EVERY == 0:
            grades += [rewards.ocr(text, before), rewards.free_form(text, before)]
            assert rewards.ocr(text, text) == 1.0, text
        assert all(0.0 <= grade <= 1.0 for grade in grades), (text, before, grades)
        seen["answers"] += answer != ""
        seen["formats"] += formatted == 1.0
        seen["numbers"] += number is not None
        seen["letters"] += letter != ""
        seen["partial"] += any(0.0 < grade < 1.0 for grade in grades)
        before = text
    assert min(seen.values()) > strings / 200, seen  # they reach the interesting branches
