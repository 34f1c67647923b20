"""How an answer is graded: the rule-based rewards of the paper's sections 3.1 and 3.3.

A response is "<think>...</think><answer>...</answer>". Only the text of its answer block is graded.
Without a block, or with different ones, there is no answer. Each problem type has its own grade:

    multiple choice   the letters are equal                                   {0, 1}
    numerical         the values round to the same two decimals               {0, 1}
    OCR               1 - WER, clipped                                        [0, 1]
    free-form         mean of ROUGE-1, ROUGE-2 and ROUGE-L (F, stemmed)       [0, 1]
    regression        1 - |p - g| / |g|, clipped; p: answer, g: solution      [0, 1]

A trainer adds the format reward, {0, 1}, and the length reward, {0, omega} (Eq. 5). The temporal
reward (Eq. 1, 2) compares two groups of responses, so it is in tgrpo.py.

Letters and numbers are parsed by patterns that must match the whole text. "(b)" and "**Option B**"
are B, "about 5 cm" is 5; "A or B", "not B", "5 - x" and "more than 5" are rejected. Units are not
compared. Solutions are parsed in the same way. No text raises an error, and 100,000 characters
take less than 1 s.
"""

import math
import re
import unicodedata
from decimal import ROUND_HALF_EVEN, Context, Decimal
from functools import lru_cache
from string import ascii_uppercase
from types import SimpleNamespace

import jiwer
import regex  # as `re`, with Unicode properties; nltk brings it
from nltk.stem.porter import PorterStemmer  # the stemmer that rouge_score uses
from rapidfuzz.distance import LCSseq  # jiwer's own engine
from rouge_score.rouge_scorer import RougeScorer

# -------------------------------------------------------------------- reading a response

# end of turn and end of text of Qwen (generation_config.json), end token of Llama's family
END_TOKEN = re.compile(r"<\|im_end\|>|<\|endoftext\|>|</s>")
INSIDE = r"(?:(?!</?(?:think|answer)>).)*"  # a block's content: any text without these tags
FORMAT = re.compile(rf"\s*<think>{INSIDE}</think>\s*<answer>{INSIDE}</answer>"
                    rf"(?:\s|{END_TOKEN.pattern})*", re.DOTALL)


def extract_answer(text):
    """Returns the stripped text of the <answer> block, or "" if there is none.

    Several blocks must hold the same text. Unpaired or nested tags are ambiguous and give "".

    >>> extract_answer("<think>left</think> <answer> B </answer><|im_end|>")
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
    """Returns 1.0 for one <think> block, then one <answer> block, and nothing else; otherwise 0.0.

    Whitespace, empty blocks and end tokens after the last block are allowed.

    >>> format_reward("<think>it moves left</think>\\n<answer>B</answer>")
    1.0
    >>> format_reward("<answer>B</answer>")
    0.0
    """
    return 1.0 if FORMAT.fullmatch(response) else 0.0


# ------------------------------------------------------------------------------ spelling

# keeps 30 combining marks of a letter (limit of UAX 15); unicodedata takes 10 s for 100,000
MARKS = regex.compile(r"(\p{M}{30})\p{M}+")
INVISIBLE = regex.compile(r"\p{Cf}")  # byte order mark, zero-width space, soft hyphen ...
EXPONENT, INDEX = re.compile("[⁰¹²³⁴-⁹⁺⁻ⁿ]+"), re.compile("[₀-₉]+")
NUMERAL = regex.compile(r"(?<=[\d\p{No}])(?=\p{No})|(?<=\p{No})(?=\d)")  # between "1" and "½"
CHARACTERS = (  # spellings that NFKC does not unify
    dict.fromkeys(map(ord, "−–—―‐‑‒˗"), "-") | dict.fromkeys(map(ord, "·⋅∙"), "×")
    | dict.fromkeys(map(ord, "⁄∕÷"), "/") | dict.fromkeys(map(ord, "‘’′"), "'")
    | str.maketrans({"：": ": ", "。": ". ", "٬": ",", "٫": ".", "º": "°", "→": "->", "\t": "\n",
                     "ﷺ": "\ufffd", "ﷻ": "\ufffd"}))  # NFKC makes 18 and 8 characters of them
ARGUMENT = r" ?(?:\{[{ ]*([-+]?[\d.]+)[} ]*\}|(\d))"  # of \frac: "{12}" or "1"
MARKER = "*_`'\"“”„«»‹›"  # emphasis or quotes around words, "**B**"; not "2*3", "f'(x)", "x_1"
SPELLINGS = [(re.compile(pattern), spelling) for pattern, spelling in (
    ("<sup>", "^"), ("<sub>", "_"), ("</su[bp]>", ""),                      # HTML
    (r"<[biu]>(?=[^<>]*</)|</[biu]>|</?(?:strong|em|code|span|div|br) ?/?>", "\n"),
    (r"\\(?:boxed|[fm]box|emph|underline|boldsymbol|bm|bf|rm|text[a-z]*|math[a-z]*)(?![a-z])"
     r"|\\[()\[\],;:! ]", " "),                                             # LaTeX fonts, spaces
    (r"\{,\}", ","), (r"\\([%$])", r"\1"),                                  # "10{,}000", "50\%"
    (r"(?<=[\d}])(?=\\[a-z]?frac)", " "),                                   # "1\frac12" is 1 1/2
    (rf"\\[a-z]?frac{ARGUMENT}{ARGUMENT}", r"\1\2/\3\4 "), (r"\\over(?![a-z])", "/"),
    (r"\\(?:times|cdot)(?![a-z])", "×"), (r"\^?\{?\\(?:circ|degree)(?![a-z])", "°"),
    (r"\\approx(?![a-z])", "≈"), (r"(?<=[\d{])~(?=[ {]*[A-Za-z°])", " "),     # "\mathrm{~cm}"
    (r"(?<=\w)\*\*(?=[-\d])", "^"), (r"([_^]) ?[({] ?([-+]?\d+) ?[)}]", r"\1\2 "),  # "m**2"
    (rf"(?<![^\s(\[{{:$])[{MARKER}]+(?=[^\s{MARKER}])"                      # markdown, quotes
     rf"|(?<=[^\s{MARKER}])[{MARKER}]+(?![^\s.,;:!?)\]}}$])", ""),
    (r"\$([^$]*)\$", r" \1 "), ("[{}]", " "))]                              # formulas, groups


def composed(text, form="NFC"):
    """Returns `text` in a Unicode normal form: "é" is then always one character."""
    return unicodedata.normalize(form, MARKS.sub(r"\1", text))


@lru_cache(4096)  # a group's responses are compared with the same options
def plain(text):
    """Returns `text` in plain characters, single-spaced, without markup: LaTeX fonts, HTML,
    markdown, quotes. NFKC turns "Ｂ", "𝐁" and "Ⓑ" into B. It would also turn "10²" into 102 and
    "1½" into 11/2, so "^" and a space are inserted first.

    >>> [plain(t) for t in ("**Answer:** $Ⓑ$", "1½", "<b>\\\\frac12</b>", "12 cm$^{2}$", "10²")]
    ['Answer: B', '1 1/2', '1/2', '12 cm^2', '10^2']
    """
    text = INVISIBLE.sub("", END_TOKEN.sub(" ", text)).translate(CHARACTERS)
    text = NUMERAL.sub(" ", INDEX.sub(r"_\g<0>", EXPONENT.sub(r"^\g<0>", text)))
    text = composed(text, "NFKC").translate(CHARACTERS)
    for pattern, spelling in SPELLINGS:
        text = pattern.sub(spelling, text)
    lines = (" ".join(line.split()) for line in text.split("\n"))
    return re.sub(r" ?(\^) ?| (?=[%°])", r"\1", "\n".join(filter(None, lines)))


# ----------------------------------------------------------------------- multiple choice

OPTION = re.compile(r"\s*\(?([A-Za-z])[.):\]、]\s*(.*)", re.DOTALL)  # "A. text", as in the records
DASH = r"(?:-+>?|[>*|]|\#+)\ "  # a bullet, a heading, or a dash or arrow between words
LEAD_IN = (  # "Therefore, the answer is: (", "I choose option ", "Answer - ", "答案是"
    rf"(?:{DASH})*(?:(?:option|choice|answer)[-_](?=[a-z]\b)"
    r"|(?:(?:therefore|thus|hence|so|the|my|final|correct|right|best|ans(?:wer)?|option|choice"
    r"|letter|is|it|(?:it|that)'s|would be|i(?:'d|'ll| would)? (?:choose|chose|pick|select))\b"
    rf"|[因故]此|所以|故|我|本题|应该?|正确|最终|的|答案?|选[项择]?|为|是)(?:[\s:,=.】]|{DASH})*"
    r"|[(\[<【「$]\s?)*")
END = r"[\s.,;:!)\]>】」$|-]*"
CHOICE = re.compile(
    LEAD_IN + r"(?P<letter>[a-z])(?:"
    rf"(?:[\s.,;]+(?P=letter))*{END}(?:选?项{END})?"  # only the letter, perhaps repeated
    r"|(?: ?[)\]>】」]| ?[.:](?=[^!-~])| -(?= )|[.,;:!]?\n)(?P<rest>.*))",  # "B) x", not "B.5"
    re.IGNORECASE | re.DOTALL | re.ASCII)  # ASCII: "ı" is no "I"
# what may precede an option's text: "B. ", "The answer is: "; or follow it: " (B)", ", option B"
BEFORE = re.compile(LEAD_IN + r"(?:(?P<letter>[a-z])[ .,;:=)(\[\]>】」、|-]+)?", re.ASCII)
AFTER = re.compile(
    rf"{END}|(?:[.,;:] | -+>? |[.,;:]? ?[(\[]){LEAD_IN}(?P<letter>[a-z]){END}", re.A)
SECOND = re.compile(r"""(?<![\w'-])([A-Za-z])(?:
    (?=[^\w '-]|$|\ (?:is|was|or|and)\b)       # "c) text", "or c", "A is right"
    |(?<=[B-HJ-Z])(?![\w'-]))                  # any capital except "A" and "I", which are words
    """, re.VERBOSE | re.ASCII)
VERDICT = re.compile(  # "B) is wrong", "B. Not sure", "B. No."; "B. No doubt" is no match
    r"[^\w,;.-]*(?:(?:that|which|this|i)(?:'[sm])? )?"
    r"(?:(?:am|is|was|seems|looks|can|could|do|does|would|should)(?: |(?=n't)))?"
    r"(?:not|no(?! [a-z])|nor|or|wrong|incorrect|false|unlikely|maybe|perhaps|n't|cannot|错|不)"
    r"(?![a-z])", re.IGNORECASE)


def comparable(text):
    """Returns a plain `text` to compare: no case, final ".", "_" of an index, "," of thousands."""
    line = re.sub(r"_|(?<=\d),(?=\d{3}(?!\d))", "", text.replace("\n", " "))
    return line.casefold().rstrip(". ") or text


def named_by_text(text, spelled, bodies):
    """Returns the letter of the option that the plain `text` quotes, or None if it quotes none.

    Returns "" if several fit equally well, or if a letter beside it is another option's. If options
    end alike ("cat", "the cat"), the longest counts. If they differ only in markup or case ("mg",
    "Mg"), the one in `spelled`, the text before plain(), counts. bodies: {letter: option's text}.
    """
    line, fits = comparable(text), {}  # {how well an option fits: letters, or "" if they conflict}
    for letter, body in bodies.items():
        own = comparable(plain(body))  # "" for "<br>" or "{", which are only markup
        before, found, after = line.rpartition(own) if own else ("", "", "")
        around = BEFORE.fullmatch(before), AFTER.fullmatch(after)
        signed = before.rstrip().endswith(("-", "+", "<", ">")) and found[:1].isdigit()
        if found and all(around) and not signed:  # "- 5" can mean -5
            agrees = {match["letter"] for match in around} <= {None, letter.lower()}
            if re.fullmatch("[a-z]", found) and around[1]["letter"]:
                agrees = False  # "A - C" names two options, even if the text of C is "A"
            fit = len(found), len(body) if body in spelled else 0, plain(body) in text
            fits.setdefault(fit, set()).add(letter if agrees else "")
    if not fits:
        return None
    letters = fits[max(fits)] - {""}
    return letters.pop() if len(letters) == 1 else ""


def choice_letter(text, options=()):
    """Returns the option letter "A" to "Z" that `text` means, or "".

    It may be a letter, with markup or a lead-in ("(b)", "**Option B**", "The answer is: B"), or an
    option's text, with or without its letter. It may also be a letter before other text ("B) a
    puppy"). The other text must not hold a second letter, be another option's text or a question,
    or begin with a verdict ("B) is wrong"). "A" is option A even if another option's text is "A".

    >>> options = ["A. cat", "B. a dog"]
    >>> [choice_letter(t, options) for t in ("(b)", "A dog", "A bird", "A. a dog", "A or B", "C")]
    ['B', 'B', '', '', '', '']
    """
    bodies = {}  # letter -> its text
    for position, option in enumerate(options or ()):
        match = OPTION.match(option)
        letter, body = match.groups() if match else (chr(ord("A") + position), option)
        bodies[letter.upper()] = body
    line = plain(text)
    named, match = named_by_text(line, text, bodies), CHOICE.fullmatch(line)
    letter = match["letter"].upper() if match else ""
    alone = letter in bodies and match["rest"] is None
    if named == "" or named and not alone:  # "" for "right (A)" if option B is "right"
        return named
    if not match or (bodies and letter not in bodies):
        return ""
    own = re.escape(plain(bodies.get(letter, "")).rstrip(". "))  # "No" is B's own: no verdict
    rest = re.sub(rf"\A{own}(?!\w)", "", (match["rest"] or "").lstrip(), flags=re.IGNORECASE)
    letters = set(bodies or ascii_uppercase) - {letter}  # the "m" of "B. 5 m" is no option
    second = letters & {found.upper() for found in SECOND.findall(rest)}
    doubt = second or VERDICT.match(rest) or rest.endswith("?")
    return "" if doubt or named_by_text(rest, rest, bodies) not in (None, letter) else letter


def multiple_choice(predicted, truth, options=()):
    """Returns 1.0 if both texts mean the same option (see `choice_letter`), otherwise 0.0.

    >>> multiple_choice("**B**", "B"), multiple_choice("B", "(B)"), multiple_choice("A, B", "B")
    (1.0, 1.0, 0.0)
    """
    letter = choice_letter(predicted, options)
    return 1.0 if letter and letter == choice_letter(truth, options) else 0.0


# ------------------------------------------------------------------------------- numbers

# a plural noun after a number ("5 dogs"), but not "thirds", "less", "plus" or "is"
THING = (r"(?!(?:halv|third|quarter|ten|hundred|thousand|dozen|[a-z]*illion|lakh|crore"
         r"|[a-z]+th)e?s\b)"
         r"(?:[a-z]{2,}[^\W\d_sui]s|people|men|women|children)\b")
UNIT = r"""(?:(?:square|cubic)[ ])?(?:
    (?:(?:kilo|centi|milli)?(?:met(?:er|re)|gram|lit(?:er|re))|mile|foot|yard|second|minute|hour|day
      |week|month|year|degree|pound|dollar|euro|cent|ton)s? | feet | inch(?:es)? | percent
  | (?-i: [kcmnμ]?m | [kmμ]?g | [mnμ]?s | ft | in | mi | mph | lb | oz | min | hr | px | [mc][lL]
    | [kmM][VAWNJ] | (?<=[ /])[hlLVAWNJ] | [kM]?(?:Pa|Hz|eV|Wh|cal|Ω) | [kKMGT]B)  # "2 N", not "2N"
  )(?:\^-?[1-3]|[23])?(?![a-z\d])"""
NUMBER = re.compile(rf"""
    (?: (?: (?:(?:so|therefore),?[ ])?(?:the[ ])?(?:(?:final|correct|total)[ ])?      # lead-in
            (?:answer|result|total|value|number|count|height|length|distance|area|speed|time|age)
            (?:[ ]of[ ]{THING})?(?:[ ](?:is|are|was|were|-))?   # "Age - 5" is 5, "Age: -5" is -5
          | [a-zα-ω](?:_?\w)?[ ]?(?==)                          # "x_1 ="
          | (?:it|that|there)(?:'s|[ ](?:is|are|was|were)) | (?:I|we)[ ](?:see|saw|count)
          | (?:正确)?答案[是为]? | 结果是? | [总一]?共有? | [是为有])
        (?:[ ]?[:=]\s?|\s|(?<=[\u4e00-\u9fff])))?
    (?:(?:about|around|approximately|roughly|exactly|only|just)[ ] | 大?约 | [=~≈][ ]?)?
    (?P<sign>[-+] | (?:minus|negative)[ ] | [负負])?             # sign
    (?:(?:US)?[$€£¥₹₩][ ]?)?                                    # currency
    (?: (?:(?P<whole>\d+)[ ](?=\d\d?/))?(?P<top>\d+)[ ]?/[ ]?(?P<bottom>\d+)     # "3/4", "1 3/4"
      | (?P<digits>[1-9]\d{{0,2}}(?P<mark>[,\ '])\d{{3}}(?:(?P=mark)\d{{3}})*(?:\.\d+)?  # "1,000.5"
          | \d+(?:\.\d*)? | \.\d+)
        (?:(?:e | [ ]?[x×*][ ]?10\^)(?P<exponent>[-+]?\d+))?    # "1e3", "1.5 x 10^3"
      | 10\^(?P<power>[-+]?\d+))
    (?: % | °[ ]?[CF]? | [ ]?[$€£¥₹₩] | [ ]{THING}              # what is measured or counted
      | [ ]?[个只辆人名位条张本块次步米秒天年岁度元克升] | [ ]?(?:[千厘毫]米|公[里斤]|千克|分钟|小时)
      | [ ]?{UNIT}(?:(?:[ ]?/[ ]?|[ ]per[ ]|[ ×]){UNIT}){{0,2}}(?:[ ](?:long|wide|high|tall|old))?)?
    [ ]?\.?""", re.VERBOSE | re.IGNORECASE)

CENT = Decimal("0.01")
# 320 digits: the largest float has 309. Rounds the decimal that repr shows, 2.675 to 2.68;
# round(2.675, 2) would give 2.67, because the binary number is a little smaller.
EXACT = Context(prec=320, rounding=ROUND_HALF_EVEN)


def parse_number(text):
    """Returns the finite number that `text` states, or None.

    NUMBER must match the whole text. "50%" is 50 and "about 5" is 5. Only fractions and powers of
    ten are computed. A comma must group thousands: "3,14" could be a list, so it gives None.

    >>> [parse_number(t) for t in ("−1,000.5", "$3", "42 km/h", "20 m²", "-1 1/2", "1.5×10^3")]
    [-1000.5, 3.0, 42.0, 20.0, -1.5, 1500.0]
    >>> [parse_number(t) for t in ("3 or 4", "3-4", "1,00", "1e999", "1/0", "2x", "at least 5")]
    [None, None, None, None, None, None, None]
    """
    match = NUMBER.fullmatch(plain(text))
    if not match:
        return None
    if match["top"]:
        part = float(match["top"]) / (float(match["bottom"]) or math.nan)
        proper = part < 1 or not match["whole"]  # "1 3/2" is no number
        value = float(match["whole"] or 0) + part if proper else math.nan
    else:
        digits = re.sub("[, ']", "", match["digits"] or "1")  # "10^3" is 1e3
        value = float(f"{digits}e{match['exponent'] or match['power'] or 0}")
    value = value if match["sign"] in (None, "+") else -value
    return value if math.isfinite(value) else None


def numerical(predicted, truth):
    """Returns 1.0 if both are numbers that round to the same two decimals, otherwise 0.0.

    >>> numerical("1,000", "1000.001"), numerical("-5", "5"), numerical("about 3 or 4", "3")
    (1.0, 0.0, 0.0)
    """
    values = [parse_number(predicted), parse_number(truth)]
    if None in values:
        return 0.0
    p, g = (Decimal(repr(value)).quantize(CENT, context=EXACT) for value in values)
    return 1.0 if p == g else 0.0


def regression(predicted, truth):
    """Returns 1 - |p - g| / |g|, clipped to [0, 1]. If g = 0, only p = 0 scores 1.0.

    >>> regression("8 m", "10"), regression("25", "10"), regression("0.1", "0")
    (0.8, 0.0, 0.0)
    """
    p, g = parse_number(predicted), parse_number(truth)
    if p is None or g is None:
        return 0.0
    error = abs(p - g) / abs(g) if g else float(p != 0)
    return max(0.0, 1.0 - error)


# ---------------------------------------------------------------------------------- text

# Han and kana are written without spaces: a character is the usual unit of ROUGE
CHARACTER = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
WORD = regex.compile(  # letters and digits, each with its marks, such as Hindi's vowels
    rf"[{CHARACTER}]\p{{M}}*|(?:(?![{CHARACTER}])[\p{{L}}\p{{N}}]\p{{M}}*)+")
STEMMED = range(4, 65)  # word lengths: 4 as in rouge_score; nltk 3.8 recurses on a long "yyy"
stem = lru_cache(maxsize=100_000)(PorterStemmer().stem)  # enough for English with misspellings
# gets stems joined by spaces (see free_form), so it only splits them
ROUGE = RougeScorer(["rouge1", "rouge2"], tokenizer=SimpleNamespace(tokenize=str.split))


def ocr(predicted, truth):
    """Returns max(0, 1 - WER). WER = word edits / words of the truth; case and punctuation count.

    >>> ocr("STOP ahead", "STOP AHEAD"), ocr("STOP", "STOP"), ocr("a b c", "x")
    (0.5, 1.0, 0.0)
    """
    # split here, because jiwer does not split words at a line break
    p, g = composed(predicted).split(), composed(truth).split()
    if not p or not g:  # jiwer 3 raises on an empty truth
        return 1.0 if p == g else 0.0
    return max(0.0, 1.0 - jiwer.wer(" ".join(g), " ".join(p)))


def stems(text):
    """Returns the stemmed words of `text`. For ASCII text they equal rouge_score's.

    rouge_score keeps only [a-z0-9], so every answer in another script would score 0. Here letters
    of all scripts form words, and each Han or kana character is a word.

    >>> stems("Running dogs: 2 小狗")
    ['run', 'dog', '2', '小', '狗']
    """
    words = WORD.findall(composed(text).lower())
    return [stem(word) if len(word) in STEMMED else word for word in words]


def free_form(predicted, truth):
    """Returns the mean F-measure of ROUGE-1, ROUGE-2 and ROUGE-L over stems, in [0, 1].

    A truth of one word has no bigram, so its ROUGE-2 is 0, and the best score is 2/3.

    >>> free_form("the cat sat", "the cat sat"), round(free_form("the cat sat", "the cat ran"), 4)
    (1.0, 0.6111)
    """
    p, g = stems(predicted), stems(truth)
    if not p or not g:
        return 0.0
    scores = ROUGE.score(" ".join(g), " ".join(p))
    # rouge_score computes ROUGE-L in Python, 0.1 s for a million pairs of words. The same number
    # in C: F = 2PR / (P + R) with P = common / len(p) and R = common / len(g).
    rouge_l = 2 * LCSseq.similarity(p, g) / (len(p) + len(g))
    return (scores["rouge1"].fmeasure + scores["rouge2"].fmeasure + rouge_l) / 3


# ------------------------------------------------------------- the rewards of a response

GRADERS = {"multiple choice": multiple_choice, "numerical": numerical, "OCR": ocr,
           "free-form": free_form, "regression": regression}  # the released problem types


def accuracy_reward(response, record):
    """Returns a response's grade in [0, 1] by its record's problem type, or 0.0 without an answer.

    Raises ValueError if the problem type is unknown, or if the solution has no answer.

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
    """Returns a list, Eq. 5 for a group's G responses: omega for a correct response of l_min to
    l_max tokens, both included, otherwise 0.0. lengths: tokens, end token included.

    >>> length_reward([True, True, False], [320, 513, 400], omega=0.2, l_min=320, l_max=512)
    [0.2, 0.0, 0.0]
    """
    return [omega if right and l_min <= length <= l_max else 0.0
            for right, length in zip(correct, lengths, strict=True)]
