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

Reading is helpful with spelling and strict with doubt: "(b)", "**B**" and "Option B" are B, "five"
is 5; but two letters, two numbers, "not B" and "more than 5" mean nothing. Truths are read by the
same functions. No text raises, and 100,000 characters cost less than 1 s.

    >>> record = {"problem_id": 7, "problem_type": "numerical", "solution": "<answer>12</answer>"}
    >>> accuracy_reward("<think>a dozen</think><answer>12.0 cm</answer>", record)
    1.0
"""

import math
import re
import unicodedata
from decimal import ROUND_HALF_EVEN, Context, Decimal
from functools import lru_cache
from itertools import islice
from types import SimpleNamespace

import jiwer
import regex  # as `re`, with Unicode properties; nltk brings it
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
    """The stripped text of the <answer> block; "" without one, or when blocks hold different texts.

    A stray tag counts as a different block: nobody can say which text is the answer.

    >>> extract_answer("<think>left</think> <answer> B </answer><|im_end|>")
    'B'
    >>> extract_answer("<answer>B</answer><answer>B</answer>")
    'B'
    >>> extract_answer("<answer>A</answer> or <answer>B</answer>")
    ''
    """
    before, *blocks = text.split("<answer>")
    closed = [block.split("</answer>") for block in blocks]  # [the block's text, what follows]
    if "</answer>" in before or any(len(parts) != 2 for parts in closed):
        return ""
    answers = {inside.strip() for inside, _ in closed}
    return answers.pop() if len(answers) == 1 else ""


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


# ------------------------------------------------------------------------------ spelling

# A letter has at most 30 marks in Unicode's Stream-Safe Text Format (UAX 15). Without a limit,
# unicodedata takes 10 s to sort 100,000 marks.
MARKS = regex.compile(r"(\p{M}{30})\p{M}+")
INVISIBLE = regex.compile(r"\p{Cf}")  # byte order mark, zero-width space, soft hyphen ...
CHARACTERS = (
    {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}  # full-width "Ｂ", "５", "（"
    | dict.fromkeys(map(ord, "−–﹣－‐‑‒˗"), "-") | dict.fromkeys(map(ord, "‘’"), "'")
    | dict.fromkeys(map(ord, "\u00a0\u2007\u2009\u202f\u3000"), " ")  # spaces that group digits
    | str.maketrans({"：": ": ", "。": ". ", "٬": ",", "٫": ".", "⁄": "/", "∕": "/", "\t": "\n"}))
MATH = re.compile(r"\$([^$]*)\$")
LATEX = re.compile(  # what only sets the font, or a space
    r"\\(?:boxed|fbox|mbox|emph|underline|boldsymbol|bm|bf|rm|text[a-z]*|math[a-z]*)\b"
    r"|\\[()\[\],;:! ]|[{}]")
MARKER = "*_`'\"“”„«»‹›"  # of emphasis, or quotes: "**B**:", but neither "2*3", "f'(x)" nor "x_1"
EMPHASIS = re.compile(
    rf"(?<![^\s(\[{{:$])[{MARKER}]+(?=[^\s{MARKER}])"
    rf"|(?<=[^\s{MARKER}])[{MARKER}]+(?![^\s.,;:!?)\]}}$])")


def composed(text):
    """`text` in NFC: "é" is one character, however it was typed."""
    return unicodedata.normalize("NFC", MARKS.sub(r"\1", text))


def clean(text):
    """`text` composed, half-width, and without end tokens and invisible characters."""
    return INVISIBLE.sub("", END_TOKEN.sub(" ", composed(text)).translate(CHARACTERS))


def bare(text):
    """The lines of clean `text`, single-spaced, without what only dresses a word: LaTeX's fonts
    and braces, dollars around a formula, markdown, quotes.

    >>> bare("**Answer:** $B$")
    'Answer: B'
    """
    text = LATEX.sub(" ", MATH.sub(r" \1 ", EMPHASIS.sub("", text)))
    return "\n".join(filter(None, (" ".join(line.split()) for line in text.split("\n"))))


# ----------------------------------------------------------------------- multiple choice

OPTION = re.compile(r"\s*\(?([A-Za-z])[.):\]、]\s*(.*)", re.DOTALL)  # "A. text", as in the records
LEAD_IN = (  # "Therefore, the answer is: (", "I choose option ", "答案是"
    r"(?:(?:(?:therefore|thus|hence|so|the|my|final|correct|right|best|ans(?:wer)?|option|choice"
    r"|letter|is|it|(?:it|that)'s|would be|i(?:'d|'ll| would)? (?:choose|chose|pick|select))\b"
    r"|[因故]此|所以|故|我|本题|应该?|正确|最终|的|答案?|选[项择]?|为|是)[\s:,=.】]*|[(\[<【「$]\s?)*")
END = r"[\s.,;:!)\]>】」$…-]*"
CHOICE = re.compile(
    LEAD_IN + r"(?P<letter>[a-z])(?:"
    rf"(?:[\s.,;]+(?P=letter))*{END}(?:选?项{END})?"  # nothing else, or the letter again; or ...
    r"|(?: ?[)\]>】」]| ?[.:](?=[^!-~])| [-—](?= )|[.,;:!]?\n)(?P<rest>.*))",  # "B) x", not "B.5"
    re.IGNORECASE | re.DOTALL | re.ASCII)  # ASCII: "ı" is no "I"
# what may stand around an option's text: "B. ", "B (" or "The answer is: "; ")" or " (B)"
BEFORE = re.compile(LEAD_IN + r"(?:(?P<letter>[a-z])[ .,;:=)(\[\]>】」、|→]+(?:[-—]>? )?)?", re.ASCII)
AFTER = re.compile(rf"{END}(?:[(\[]{LEAD_IN}(?P<letter>[a-z])[)\]]{END})?", re.ASCII)
SECOND = re.compile(r"""(?<![\w'-])([A-Za-z])(?:
    (?=[^\w '-]|$|\ (?:is|was|or|and)\b)       # "c) text", "or c", "A is right"
    |(?<=[B-HJ-Z])(?![\w'-]))                  # any capital, but "A" and "I" are words
    """, re.VERBOSE | re.ASCII)
VERDICT = re.compile(  # "B) is wrong", "B. Not sure", "B. No.", but "B. No doubt"
    r"\W*(?:that |which )?(?:(?:is|was|seems|looks|can|could|does|would|should)(?: |(?=n't)))?"
    r"(?:not|no(?! [a-z])|nor|or|wrong|incorrect|false|unlikely|maybe|perhaps|n't|cannot|错|不)"
    r"(?![a-z])", re.IGNORECASE)


def comparable(text):
    """Clean `text` as option texts are compared: bare, in one line, no case, no last full stop."""
    return bare(text).replace("\n", " ").casefold().rstrip(". ") or text


def named_by_text(text, bodies):
    """The letter of the option whose own text `text` is; None when it is no option's text.

    "" where several options have this text, or where a letter beside it is another option's. Of
    texts that end alike ("cat", "the cat") the longest is meant; of texts that differ only in
    dress or case ("mg", "Mg") the one that stands there letter for letter.

    >>> bodies = {"A": "cat", "B": "the cat"}
    >>> [named_by_text(t, bodies) for t in ("It is the cat", "B (the cat)", "A. the cat", "dog")]
    ['B', 'B', '', None]
    """
    line, fits = comparable(text), []
    for letter, body in bodies.items():
        before, found, after = line.rpartition(comparable(body)) if body else ("", "", "")
        around = BEFORE.fullmatch(before), AFTER.fullmatch(after)
        if found and all(around):
            exact = len(body) if body in text else 0
            agrees = {match["letter"] for match in around} <= {None, letter.lower()}
            fits.append((len(found), exact, letter if agrees else ""))
    if not fits:
        return None
    best = max(fits)[:2]
    letters = {letter for *size, letter in fits if tuple(size) == best} - {""}
    return letters.pop() if len(letters) == 1 else ""


def choice_letter(text, options=()):
    """The option letter "A" to "Z" that `text` means, or "".

    Any case, and brackets, markdown, LaTeX or quotes around the letter; a lead-in ("Option B",
    "The correct answer is: B"); an option's exact text, with its letter or without; another text
    or a second line after the letter ("B) a puppy"), unless it holds a second letter or begins
    with a verdict ("B) is wrong") or is a question. Nothing else: sentences are not guessed at. A
    letter wins over an option whose text is that letter; a letter without an option is none.

    >>> options = ["A. cat", "B. a dog"]
    >>> [choice_letter(t, options) for t in ("(b)", "A dog", "A bird", "A. a dog", "A or B", "C")]
    ['B', 'B', '', '', '', '']
    """
    bodies = {}  # letter -> its text
    for position, option in enumerate(options or ()):
        match = OPTION.match(clean(option))
        letter, body = match.groups() if match else (chr(ord("A") + position), clean(option))
        bodies[letter.upper()] = body
    text = clean(text)
    match = CHOICE.fullmatch(bare(text))
    letter = match["letter"].upper() if match else ""
    named = named_by_text(text, bodies)
    alone = match and match["rest"] is None
    wins = named and alone and letter in bodies  # but not in "right (A)", where "right" is B
    if named is not None and not wins:
        return named
    if not match or (bodies and letter not in bodies):
        return ""
    rest = "" if alone else match["rest"].lstrip().removeprefix(bare(bodies.get(letter, "")))
    second = {found.upper() for found in SECOND.findall(rest)} - {letter}
    if bodies:
        second &= bodies.keys()  # "B. 5 m" is not a second letter
    return "" if second or VERDICT.match(rest) or rest.endswith("?") else letter


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
ARGUMENT = r" ?(?:\{(?:\\(?:text|mathrm)\{)? ?([-+]?[\d.,]+) ?\}{1,2}|(\d))"  # "{12}", or "1"
SPELLINGS = [(re.compile(pattern, re.IGNORECASE), spelling) for pattern, spelling in (
    (r"<sup>", "^"), (r"</?su[bp]>", ""), (r"<([^<>]*)>", r" \1 "), (r"\{,\}", ","),  # "10{,}000"
    (rf"\\[a-z]*frac{ARGUMENT}{ARGUMENT}", r" \1\2/\3\4 "),           # "\frac{1}{2}", "\frac12"
    (r"(?<=\d)\*\*(?=\d)", "^"), (r"\\times|\\cdot|[·⋅∙]", "×"),       # "5*10**3", "5\times10^3"
    # the exponent or index of a unit or a name: "cm$^2$", "m**2", "\text{s}^{-1}", "H_2"
    (r"(?<=[a-z°])(?:\}?[ $]{0,3}\^|\*\*|\$?_)[ {(]{0,3}[-+]?\d+", " "))]
NUMBERS = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
           "fifteen sixteen seventeen eighteen nineteen twenty").split()
NOT_ONE = "|".join(NUMBERS[:1] + NUMBERS[2:])
NUMBER_WORD = re.compile(rf"(?<![\w-])(?:{NOT_ONE})(?![\w-])", re.IGNORECASE)
ONE = re.compile(  # only where it is no pronoun ("the red one", "one of them")
    r"(^\W*|\b(?:is|are|only|just|about|minus) |: )one(?![\w-]| of\b)", re.IGNORECASE)
COMPOUND = re.compile(  # "thirty two", "five hundred", "two thirds", "two or one"
    r"\b(?:(?:thir|for|fif|six|seven|eigh|nine)ty|hundred|thousand|[mb]illion|dozen|point"
    r"|half|halves|thirds?|quarters?|(?:four|fif|six|seven|eigh|nin|ten)ths?"
    rf"|(?:{NOT_ONE}),?(?: or| to| and)? one)\b", re.IGNORECASE)
MINUS = re.compile(r"\b(?:minus|negative) (?=[\d.])|[负負] ?(?=\d)|(?<![—―])[—―](?=[\d.])", re.I)

NOT_THE_NUMBER = re.compile(rf"""
    \d[ ](?:and|or|to)[ ](?:an?|one|{NOT_ONE})\b | \b(?:half|one)[ ](?:of|an?)\b | \band[ ]a[ ]half
  | \b(?:one|{NOT_ONE})[ ](?:or|to)[ ]\d         # "2 and a half", "3 or four"
  |""" + r"""
    [√π∞±] | (?<![a-z])(?:sqrt|pi|log|ln|sin|cos|tan)(?![a-z]) | frac | \+/?-    # "2π"
  | (?<![\w.])\d[\d.]*(?!e[-+]?\d|x\d)[a-z]+(?:[04-9]|\d[\da-z])        # "2m30s", but "20m2"
  | (?:\b(?:not|never|none|neither|nor|cannot)|n't)\b[^\d.,;:!?\n]{0,40}\d   # "not equal to 5"
  | \d%?(?:[ ]?[a-z]+)?[ ](?:(?:is|was|are)[ ](?:not|wrong|incorrect)|(?:is|was|are)n't)\b
  | \b(?:than|over|under|above|below|beyond|within|exceed\w*|nearly|almost|up[ ]to|m\w+imum[ ]of)
    (?:[ ](?:or|equal|to|an?|the|about|around|approximately|roughly|exactly))*[ ]?[-+]?[\d.]
  | \bat[ ](?:the[ ]very[ ])?(?:least|most|minimum)\b | \d%?(?:[ -]?plus\b|[ ]?\+)(?![ ]?\.?[\d(])
  | \d[^\d.,;:!?\n]{0,20}[ ](?:or|and)[ ](?:more|less|above|below|up    # "5 cm or more"
    |(?:few|great|high|low|larg|small|long|short|old|young|ov|und)er)\b
  | (?<![-=])[<>][ ]?=?[ ]?[-+]?[\d.] | \d[ ]?[<>] | [≤≥≠≮≯⩽⩾] | != | =<    # "> 5", but "=> 5"
  | \\(?:[lg](?:t|eq{0,2})|neq?)(?:slant)?(?![a-z])
  | (?:不|超过|至少|至多|最少|最多|[大小多少高低]于)[^\W\d]{0,3}[ ]?\d | \d[^\W\d]{0,3}(?:以[上下]|多)
    """, re.VERBOSE | re.IGNORECASE)
TERM = r"[\d.][\d.,]* ?[a-z%°]*[) ]*"
SUM = re.compile(  # what may stand before "= 5": "2 + 3", "Area: 2 cm × 3 cm", "x = (2 + 3) / 1"
    rf"[^\d=]*(?:=[^\d=]*)?{TERM}[-+*/×÷^x][( -]*{TERM}(?:[-+*/×÷^x=][( -]*{TERM})*",
    re.IGNORECASE)

PLAIN = re.compile(r"\d+(?:\.\d+)?|\.\d+")
GROUPED = re.compile(  # "1,234,567.8", "1 000", "1'000": the same mark before each three digits
    r"[1-9]\d{0,2}([, '])\d{3}(?:\1\d{3})*(?:\.\d+)?")
TOKEN = re.compile(r"""
    (?:(?<!\d)|(?![xX]\d))                # "2x3" is two numbers ...
    [A-Za-z_][A-Za-z_\d]*                 # ... but the digits of "m2" and "H2O" are a word's
    (?:-[1-3](?![\w.]))?                  # and so are those of "s-1"
  | (?P<sign>(?<![A-Za-z])[-+]\s*)?
    (?P<digits>\^?(?:(?<![\w.])\.)?       # ".5", but neither "No.5" nor "...5"; "^2" is no number
      [\d¼-¾⅐-⅞](?:[.,\ '_]?[\d¼-¾⅐-⅞])*)
    (?:[eE](?P<e>[-+]?\d+)                # "1e3", "1.5 x 10^3", "1.5\times10^{3}"
      |\s*[xX×*]\s*10\s*\^\s*\(?(?P<power>[-+]?\d+))?
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


def in_digits(text):
    """`text` with its numbers in plain digits: no LaTeX, superscripts, currency signs or words.

    >>> in_digits("\\\\frac12 m²"), in_digits("minus five"), in_digits("five hundred")
    ('1/2 m', '-5', 'five hundred')
    """
    text = SUPERSCRIPT_RUN.sub(lambda run: "^" + run[0].translate(SUPERSCRIPT), clean(text))
    for pattern, spelling in SPELLINGS:
        text = pattern.sub(spelling, text)
    text = re.sub(r" ?\\?[$€£¥₹₩] ?", " ", bare(text))
    if not re.search(r"\d", text) and not COMPOUND.search(text):  # beside digits, words are words
        text = NUMBER_WORD.sub(lambda word: str(NUMBERS.index(word[0].lower())), text)
        text = ONE.sub(r"\g<1>1", text)
    return MINUS.sub("-", text)


def parse_number(text):
    """The one finite number in `text` as a float, or None when there is none or a second one.

    Words around it, a currency sign, "%" and a unit are ignored ("50%" is 50, "5 million" is 5),
    "about" too; but "not 5" and "more than 5" are no number. Fractions are divided; a sum is what
    stands after its "=". A comma, space or apostrophe groups thousands and nothing else: "3,14"
    could be a list, so it is None.

    >>> [parse_number(t) for t in ("−1,000.5", "$3", "42 km/h", "20 m²", "-1/2", "1.5×10^3")]
    [-1000.5, 3.0, 42.0, 20.0, -0.5, 1500.0]
    >>> [parse_number(t) for t in ("five", "2 + 3 = 5", "\\\\frac12")]
    [5.0, 5.0, 0.5]
    >>> [parse_number(t) for t in ("3 or 4", "3-4", "1,00", "1e999", "1/0", "2π", "at least 5")]
    [None, None, None, None, None, None, None]
    """
    text = in_digits(text)
    if NOT_THE_NUMBER.search(text):
        return None
    before, _, result = text.rpartition("=")
    if SUM.fullmatch(before):
        text = result
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
WORD = regex.compile(  # letters and digits, each with its marks: Hindi's vowels are such marks
    rf"[{CHARACTER}]\p{{M}}*|(?:(?![{CHARACTER}])[\p{{L}}\p{{N}}]\p{{M}}*)+")
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
    # split here: jiwer itself takes a line break for a letter
    p, g = composed(predicted).split(), composed(truth).split()
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
            for word in WORD.findall(composed(text).lower())]


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
