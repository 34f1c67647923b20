"""How an answer is graded: the rule-based rewards of the paper's sections 3.1 and 3.3.

A response is text, "<think>...</think><answer>...</answer>". What is graded is the text of its one
answer block; no block, or several, is no answer. One function a problem type, each in [0, 1]:

    multiple choice   the letters are equal                                   {0, 1}
    numerical         the values round to the same two decimals               {0, 1}
    OCR               1 - WER, clipped                                        [0, 1]
    free-form         mean of ROUGE-1, ROUGE-2 and ROUGE-L (F, stemmed)       [0, 1]
    regression        1 - |p - g| / |g|, clipped                              [0, 1]

To these a trainer adds the format reward, {0, 1}, and the length reward, {0, omega} (Eq. 5).
The temporal reward (Eq. 1, 2) needs two groups of responses, so it lives in tgrpo.py.

Reading is helpful with spelling and strict with doubt: "(b)", "**B**" and "Option B" are B, but two
letters, or two numbers, mean nothing. No text raises, and 100,000 characters cost less than 1 s.

    >>> record = {"problem_id": 7, "problem_type": "numerical", "solution": "<answer>12</answer>"}
    >>> accuracy_reward("<think>a dozen</think><answer>12.0 cm</answer>", record)
    1.0
"""

import math
import re
from decimal import ROUND_HALF_EVEN, Context, Decimal
from functools import lru_cache
from itertools import islice
from types import SimpleNamespace

import jiwer
from nltk.stem.porter import PorterStemmer  # the stemmer that rouge_score uses
from rapidfuzz.distance import LCSseq  # jiwer's own engine
from rouge_score.rouge_scorer import RougeScorer

# -------------------------------------------------------------------- reading a response

# Qwen's end of turn and end of text (generation_config.json), and the end token of Llama's family
END_TOKEN = re.compile(r"<\|im_end\|>|<\|endoftext\|>|</s>")
TAGS = ("<think>", "</think>", "<answer>", "</answer>")  # the prompt's wording
FORMAT = re.compile(
    rf"\s*<think>.*</think>\s*<answer>.*</answer>(?:\s|{END_TOKEN.pattern})*", re.DOTALL)


def extract_answer(text):
    """The stripped text of the only <answer> block; "" when there is none or more than one.

    A stray tag counts as a second block: nobody can say which text is the answer.

    >>> extract_answer("<think>left</think> <answer> B </answer><|im_end|>")
    'B'
    >>> extract_answer("<answer>A</answer> or <answer>B</answer>")
    ''
    """
    if text.count("<answer>") != 1 or text.count("</answer>") != 1:
        return ""
    # a closing tag before the opening one leaves no closing tag here, and no answer
    inside, closed, _ = text.partition("<answer>")[2].partition("</answer>")
    return inside.strip() if closed else ""


def format_reward(response):
    """1.0 for one <think> block, then one <answer> block, and only whitespace around; else 0.0.

    End tokens after the last block are harmless; so is an empty block.

    >>> format_reward("<think>it moves left</think>\\n<answer>B</answer>")
    1.0
    >>> format_reward("<answer>B</answer>")
    0.0
    """
    # counted first: each tag is then unique, and the pattern below has one way to match
    once = all(response.count(tag) == 1 for tag in TAGS)
    return 1.0 if once and FORMAT.fullmatch(response) else 0.0


# ----------------------------------------------------------------------- multiple choice

OPTION = re.compile(r"\s*\(?([A-Za-z])[.):]\s*(.*)", re.DOTALL)  # "A. text", as in the records
CHOICE = re.compile(
    r"(?:(?:the|my|correct|final|best|right|answer|option|choice|is)\b[ :：]*)*"  # "The answer is"
    r"(?:[(\[{*_`$'\"‘“（]|\\boxed|\\text|\\mathrm)*"  # "**", "\boxed{"
    r"(?P<letter>[A-Za-z])"
    r"(?P<mark>[)\]}*_`$'\"’”）.:。：\- –—]*)"
    r"(?P<rest>.*)", re.IGNORECASE | re.DOTALL | re.ASCII)  # ASCII: "ı" is no "I"
# what sets a letter apart from the text after it: "B) x", "B. x", "B: x", "B - x", not "A x", "A-x"
DELIMITER = re.compile(r"[)\]）。：]|[.:][*_`$'\"’”}]* | [-–—] ")
LETTER_IN_TEXT = re.compile(r"(?<![\w'])([A-Za-z])(?:[.):\]]| ?$)")  # "or C", "c) text"


def _plain(text):
    """`text` on one line, with single spaces and without end tokens."""
    return " ".join(END_TOKEN.sub(" ", text).split())


def _same(text):
    """`text` as option texts are compared: no case, outer emphasis, quotes or final full stop."""
    return _plain(text).casefold().strip("*_`'\"‘’“” ").rstrip(". ")


def choice_letter(text, options=()):
    """The option letter "A" to "Z" that `text` means, or "".

    Any case, and brackets, markdown, \\boxed{} or $ around the letter; a lead-in ("Option B",
    "The correct answer is: B"); a text after it ("B) a dog"), unless that is another option's or
    holds a second letter; an option's exact text. Nothing else: sentences are not guessed at. A
    letter wins over an option whose text is that letter; a letter without an option is none.

    >>> options = ["A. cat", "B. a dog"]
    >>> [choice_letter(t, options) for t in ("(b)", "A dog", "A bird", "A. a dog", "A or B", "C")]
    ['B', 'B', '', '', '', '']
    """
    lettered = {}  # letter -> its text, comparable
    for position, option in enumerate(options or ()):
        match = OPTION.match(option)
        letter, body = match.groups() if match else (chr(ord("A") + position), option)
        lettered[letter.upper()] = _same(body)
    match = CHOICE.fullmatch(_plain(text))
    letter = match["letter"].upper() if match else ""
    if match and not match["rest"]:
        return letter if letter in lettered or not lettered else ""

    owners = [key for key, body in lettered.items() if body and body == _same(text)]
    if owners:
        return owners[0] if len(owners) == 1 else ""
    if not match or (lettered and letter not in lettered):
        return ""
    rest = _same(match["rest"])
    if rest in lettered.values():  # "B. a dog", or "A. a dog": then letter and text disagree
        return letter if match["mark"] and rest == lettered[letter] else ""
    letters = {found.upper() for found in LETTER_IN_TEXT.findall(match["rest"])} - {letter}
    second = letters & lettered.keys() if lettered else letters  # "B. 5 m" is not a second letter
    return letter if DELIMITER.search(match["mark"]) and not second else ""


def multiple_choice(predicted, truth, options=()):
    """1.0 when both texts mean the same option (see `choice_letter`), else 0.0.

    >>> multiple_choice("**B**", "B"), multiple_choice("B", "(B)"), multiple_choice("A, B", "B")
    (1.0, 1.0, 0.0)
    """
    letter = choice_letter(predicted, options)
    return 1.0 if letter and letter == choice_letter(truth, options) else 0.0


# ------------------------------------------------------------------------------- numbers

SUPERSCRIPTS = "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻"
SUPERSCRIPT_RUN = re.compile(f"[{SUPERSCRIPTS}]+")
SUPERSCRIPT = str.maketrans(SUPERSCRIPTS, "0123456789+-")
# typographic minus, en dash, small and full-width hyphen; fraction slash; currency signs
CHARACTERS = str.maketrans("−–﹣－⁄$€£¥₹₩", "----/      ")
LATEX_FRACTION = re.compile(r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}")
NOT_DECIMAL = re.compile(r"[√π∞±]|(?<![a-z])(?:sqrt|pi)(?![a-z])", re.IGNORECASE)  # "2π" is not 2
PLAIN = re.compile(r"\d+(?:\.\d+)?|\.\d+")
GROUPED = re.compile(  # "1,234,567.8", "1 000", "1'000": the same mark before each three digits
    r"[1-9]\d{0,2}([, '\u00a0\u2009\u202f])\d{3}(?:\1\d{3})*(?:\.\d+)?")
TOKEN = re.compile(r"""
    (?:(?<!\d)|(?![xX]\d))                # "2x3" is two numbers ...
    [A-Za-z_][A-Za-z_\d]*                 # ... but the digits of "m2", "H2O" and "x_1" are a word's
    (?:-[1-3](?![\w.])|\}?\^\{?-?\d+)?    # and so are those of "s-1", "m^2", "\text{cm}^{2}"
  | (?P<sign>(?<![A-Za-z])[-+]\s*)?
    (?P<digits>\^?(?:(?<![\w.])\.)?       # ".5", but neither "No.5" nor "...5"; "^2" is no number
      [\d¼-¾⅐-⅞](?:[.,\ '_\u00a0\u2009\u202f]?[\d¼-¾⅐-⅞])*)
    (?:[eE](?P<e>[-+]?\d+)                # "1e3", "1.5 x 10^3", "1.5\times10^{3}"
      |\s*(?:[xX×*·⋅]|\\times|\\cdot)\s*10\s*\^\s*\{?(?P<power>[-+]?\d+))?
    """, re.VERBOSE)

CENT = Decimal("0.01")
# The largest float has 309 digits before the point. Half-even on the shortest decimal form:
# 2.675 is 2.68, which round(2.675, 2) misses because the binary number is a little smaller.
EXACT = Context(prec=320, rounding=ROUND_HALF_EVEN)


def _value(match):
    """The float that a TOKEN match spells; NaN for what looks like a number and is none."""
    digits = match["digits"]
    if not PLAIN.fullmatch(digits):
        if not GROUPED.fullmatch(digits):  # "1,2", "3 4", "1.2.3", "2½"
            return math.nan
        digits = re.sub(r"[^\d.]", "", digits)
    return float(f"{(match['sign'] or '').strip()}{digits}e{match['e'] or match['power'] or 0}")


def parse_number(text):
    """The one finite number in `text` as a float, or None when there is none or a second one.

    Words around it, a currency sign, "%" and a unit are ignored ("50%" is 50, "5 million" is 5).
    Fractions are divided. A comma, space or apostrophe groups thousands and nothing else: "3,14"
    could be a list, so it is None.

    >>> [parse_number(t) for t in ("−1,000.5", "$3", "42 km/h", "20 m²", "-1/2", "1.5×10^3")]
    [-1000.5, 3.0, 42.0, 20.0, -0.5, 1500.0]
    >>> [parse_number(t) for t in ("3 or 4", "3-4", "1,00", "1e999", "1/0", "2π", "five")]
    [None, None, None, None, None, None, None]
    """
    text = SUPERSCRIPT_RUN.sub(lambda run: "^" + run[0].translate(SUPERSCRIPT), text)
    text = LATEX_FRACTION.sub(r" \1/\2 ", text.translate(CHARACTERS))
    if NOT_DECIMAL.search(text):
        return None
    found = list(islice((m for m in TOKEN.finditer(text) if m["digits"]), 3))
    values = [_value(match) for match in found]
    if len(values) == 2 and text[found[0].end():found[1].start()].strip() == "/":
        values = [values[0] / values[1] if values[1] else math.nan]
    return values[0] if len(values) == 1 and math.isfinite(values[0]) else None


def numerical(predicted, truth):
    """1.0 when both are numbers that round to the same two decimals, else 0.0.

    >>> numerical("1,000", "1000.001"), numerical("-5", "5"), numerical("about 3 or 4", "3")
    (1.0, 0.0, 0.0)
    """
    values = [parse_number(predicted), parse_number(truth)]
    if None in values:
        return 0.0
    p, g = (Decimal(repr(value)).quantize(CENT, context=EXACT) for value in values)
    return 1.0 if p == g else 0.0


def regression(predicted, truth):
    """1 - |p - g| / |g|, clipped to [0, 1]; for g = 0, 1.0 when p = 0 and else 0.0.

    >>> regression("8 m", "10"), regression("25", "10"), regression("0.1", "0")
    (0.8, 0.0, 0.0)
    """
    p, g = parse_number(predicted), parse_number(truth)
    if p is None or g is None:
        return 0.0
    if g == 0:
        return 1.0 if p == 0 else 0.0
    return max(0.0, 1.0 - abs(p - g) / abs(g))


# ---------------------------------------------------------------------------------- text

# Han, kana: scripts without spaces, in which a character is the usual unit of ROUGE
CHARACTER = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
WORD = re.compile(rf"[{CHARACTER}]|[^\W_{CHARACTER}]+")
SHORTEST_STEMMED = 4  # as in rouge_score's tokenizer
LONGEST_STEMMED = 64  # no word of a language is longer, and nltk 3.8 recurses on "yyyy..."
STEMS_KEPT = 100_000  # distinct words; a vocabulary of English and its misspellings

# it is given stems with spaces between, see `stems`
ROUGE = RougeScorer(["rouge1", "rouge2"], tokenizer=SimpleNamespace(tokenize=str.split))
stem = lru_cache(maxsize=STEMS_KEPT)(PorterStemmer().stem)


def ocr(predicted, truth):
    """1 - WER, clipped to [0, 1]: WER = word edits / words of the truth, case and marks counted.

    >>> ocr("STOP ahead", "STOP AHEAD"), ocr("STOP", "STOP"), ocr("a b c", "x")
    (0.5, 1.0, 0.0)
    """
    p, g = predicted.split(), truth.split()  # jiwer itself takes a line break for a letter
    if not p or not g:  # jiwer 3 raises on an empty truth
        return 1.0 if p == g else 0.0
    return max(0.0, 1.0 - jiwer.wer(" ".join(g), " ".join(p)))


def stems(text):
    """The stemmed words of `text`, as rouge_score finds them in ASCII text.

    Its tokenizer keeps only [a-z0-9], so that every answer in another script would score 0. Here
    letters of all scripts make words, and each Han or kana character is a word.

    >>> stems("Running dogs: 2 小狗")
    ['run', 'dog', '2', '小', '狗']
    """
    return [stem(word) if SHORTEST_STEMMED <= len(word) <= LONGEST_STEMMED else word
            for word in WORD.findall(text.lower())]


def free_form(predicted, truth):
    """Mean F-measure of ROUGE-1, ROUGE-2 and ROUGE-L over stems, in [0, 1].

    A truth of one word has no pair of words: its ROUGE-2 is 0, so at best it scores 2/3.

    >>> free_form("the cat sat", "the cat sat"), round(free_form("the cat sat", "the cat ran"), 4)
    (1.0, 0.6111)
    """
    p, g = stems(predicted), stems(truth)
    if not p or not g:
        return 0.0
    scores = ROUGE.score(" ".join(g), " ".join(p))
    # rouge_score's own ROUGE-L fills a len(p) x len(g) table in Python, 0.1 s a million cells.
    # The same number, fast: F = 2PR / (P + R) with P = common / len(p) and R = common / len(g).
    rouge_l = 2 * LCSseq.similarity(p, g) / (len(p) + len(g))
    return (scores["rouge1"].fmeasure + scores["rouge2"].fmeasure + rouge_l) / 3


# ------------------------------------------------------------- the rewards of a response

GRADERS = {"multiple choice": multiple_choice, "numerical": numerical, "OCR": ocr,
           "free-form": free_form, "regression": regression}  # the released problem types


def accuracy_reward(response, record):
    """The grade in [0, 1] of the response's answer by the record's problem type; 0.0 without one.

    Raises ValueError for a problem type that has no rule, or a solution without an answer.

    >>> record = {"problem_id": 1, "problem_type": "multiple choice", "options": ["A. up", "B. no"],
    ...           "solution": "<answer>A</answer>"}
    >>> accuracy_reward("<answer>Up</answer>", record), accuracy_reward("Up", record)
    (1.0, 0.0)
    """
    problem_type, problem_id = record.get("problem_type"), record.get("problem_id")
    if problem_type not in GRADERS:
        raise ValueError(f"problem_id {problem_id}: unknown problem_type {problem_type!r}, "
                         f"expected one of {', '.join(GRADERS)}")
    truth = extract_answer(record["solution"])
    if not truth:
        raise ValueError(f"problem_id {problem_id}: solution {record['solution']!r} "
                         "has no <answer> block with a text in it")
    answer = extract_answer(response)
    if not answer:
        return 0.0
    if problem_type == "multiple choice":
        return multiple_choice(answer, truth, record.get("options"))
    return GRADERS[problem_type](answer, truth)


def length_reward(correct, lengths, omega, l_min, l_max):
    """Eq. 5: omega for each correct response of l_min to l_max tokens, both included, else 0.0.

    `correct` and `lengths` (tokens, the end token included) hold one entry for each of the G
    responses of a group; the result is a list of G floats.

    >>> length_reward([True, True, False], [320, 513, 400], omega=0.2, l_min=320, l_max=512)
    [0.2, 0.0, 0.0]
    """
    return [omega if right and l_min <= length <= l_max else 0.0
            for right, length in zip(correct, lengths, strict=True)]
