"""Find the final answer in a text: after its thinking, in a tag, in a box, or after a marker.

If there are several, the last one counts. Nothing inside a thinking block is ever an answer.
"""

from __future__ import annotations

import re

# -- thinking --------------------------------------------------------------------------------------

THINKING_TAG = r"(?:seed:)?(?:think|thinking|thoughts?|reasoning|scratchpad)"
# (start, end) of a thinking block in answers of various models.
THINKING_BLOCKS = (
    (rf"(?i:<\s*{THINKING_TAG}\s*>)", rf"(?i:<\s*/\s*{THINKING_TAG}\s*>)"),
    (r"\[THINK\]", r"\[/THINK\]"),  # Mistral
    ("◁think▷", "◁/think▷"),  # Kimi
    (r"<\|begin_of_thought\|>", r"<\|end_of_thought\|>"),  # Sky-T1
    (r"<\|channel\|>analysis", r"<\|channel\|>final<\|message\|>"),  # GPT-OSS
    (r"\Aanalysis(?=[A-Z])", "assistantfinal"),  # GPT-OSS without its special tokens
)
THINKING_STARTS = "|".join(start for start, _ in THINKING_BLOCKS)
THINKING_ENDS = "|".join(end for _, end in THINKING_BLOCKS)
THINKING_BORDER = re.compile(f"(?P<start>{THINKING_STARTS})|(?P<end>{THINKING_ENDS})")


def opens_thinking(prompt: str) -> bool:
    """Whether a prompt ends inside a thinking block: some chat templates write <think>, and the
    model's answer has only the end of the block."""
    borders = list(THINKING_BORDER.finditer(prompt))
    return bool(borders) and borders[-1]["start"] is not None


def split_thinking(text: str) -> tuple[list[str], list[str]]:
    """(parts of a text inside thinking blocks, parts outside). The start of the first block may be
    missing, and so may the end of the last block, in an answer that was cut off."""
    inside: list[str] = []
    outside: list[str] = []
    position = 0
    is_thinking = False
    for border in THINKING_BORDER.finditer(text):
        part = text[position : border.start()]
        if border["end"] and not is_thinking:
            # An end without a start: everything before it was thinking.
            inside += [*outside, part]
            outside.clear()
        elif is_thinking:
            inside.append(part)
        else:
            outside.append(part)
        is_thinking = border["start"] is not None
        position = border.end()
    rest = text[position:]
    (inside if is_thinking else outside).append(rest)
    return inside, outside


def without_thinking(text: str) -> str:
    """The text outside thinking blocks."""
    _, outside = split_thinking(text)
    # Text before and after a block must not merge into one word or number.
    return "\n".join(outside).strip()


# -- the final answer ------------------------------------------------------------------------------

ANSWER_TAG = re.compile(
    r"<\s*(answer|final_answer|final|solution)\s*>(.*?)(?:<\s*/\s*\1\s*>|\Z)", re.I | re.DOTALL
)
BOX = re.compile(r"\\f?box(?:ed)?\s*\{")
BETWEEN_BOXES = re.compile(r"[\s,$]*(?:(?:and|or)[\s,$]*)?")
BRACE = re.compile(r"(?<!\\)[{}]")
# "Answer:", "**Final answer**: ", "The answer to the question is", "Answer" alone on its line.
ANSWER_PHRASE = re.compile(
    r"\b(?:answer|ans)\b[^.\n]{0,60}?(?:\bis\b|\bare\b|[:=：])(?:[\s*_]*[:=：])*"
    r"|\banswer[\s*_#]*(?=\n)"
    r"|答案(?:[:：]|是|为)+",
    re.I,
)
ANSWER_WORD = re.compile(r"\banswer\b", re.I)
# What may precede the number after a marker: Markdown, "x =", "about", "(B)".
LEAD_IN = re.compile(
    r"(?:[\s*_`\"'}:：≈~]"
    r"|(?:approximately|about|roughly|exactly|just|simply|equal to)\b"
    r"|\(?[A-H][).](?=\s)"
    r"|[^\W\d_]\w?\s*=(?!=))*",
    re.I,
)
NUMBER_OR_FORMULA = re.compile(
    r"[-+−]?\s*(?:\\?[$€£¥]\s*)?[-+−]?\s*\.?\d"  # 18, -3, $18, .5
    r"|\\|\$|[({\[]"  # LaTeX, an interval or a set
    r"|[^\W\d_]\s*[-+*/^(=]"  # x + 1
)
NUMBERED_HEADING = re.compile(r"\d+[.)]\s+[^\W\d_]")  # 2. Add them
FORMULA_IN_DOLLARS = re.compile(r"\$\$?[^$]+\$\$?|\\\(.+?\\\)|\\\[.+?\\\]")
WORD = re.compile(r"(?<!\\)\b(?!and\b|or\b)[^\W\d_]{2,}")
# The part of 18\text{ cm} before its word.
UNCLOSED_COMMAND = re.compile(r"\\[a-z]+\{\s*$")


def find_final_answer(text: str) -> str:
    """The marked answer of a text; without one, the whole text except its thinking. Empty if the
    text ends inside a thinking block."""
    # math-verify prefers a number after this word, even in "the answer is the sum of 9 and 9".
    return find_marked_answer(text) or ANSWER_WORD.sub("", last_section(text))


def find_marked_answer(text: str) -> str:
    r"""The content of the last answer tag or, without one, the last answer in \boxed{}, after ####,
    after "Answer:" or after "the answer is". Empty if a text has none of them."""
    text = without_thinking(text)
    tagged = [match[2].strip() for match in ANSWER_TAG.finditer(text) if match[2].strip()]
    if tagged:
        text = tagged[-1]
    boxed, rest = split_at_last_box(text)
    if boxed is None:
        return find_marked(text) or (last_section(text) if tagged else "")
    # The box in "Answer: \boxed{18}" is the answer, unless a marker comes later.
    return find_marked(rest) or find_marked(boxed) or boxed


def split_at_last_box(text: str) -> tuple[str | None, str]:
    r"""(content of the last \boxed{}, the text after it); boxes in a list, "\boxed{1} and
    \boxed{2}", count as one. (None, text) without a box."""
    contents: list[str] = []
    end = 0
    for box in BOX.finditer(text):
        if box.start() < end:
            continue  # a box in a box
        if not BETWEEN_BOXES.fullmatch(text[end : box.start()]):
            contents.clear()
        end = end_of_braces(text, box.end())
        contents.append(text[box.end() : end].strip())
        end += 1
    if not contents:
        return None, text
    return ", ".join(contents), text[end:]


def end_of_braces(text: str, start: int) -> int:
    """The position of the brace that closes the one before `start`; the length of the text if it is
    not closed."""
    depth = 1
    for brace in BRACE.finditer(text, start):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return brace.start()
    return len(text)


def find_marked(text: str) -> str:
    """The number or formula after the last #### or "Answer:" that has one; empty if none has."""
    markers = [*re.finditer("####+", text), *ANSWER_PHRASE.finditer(text)]
    markers.sort(key=re.Match.end)
    for marker in reversed(markers):
        answer = leading_formula(text[marker.end() :])
        if answer:
            return answer
    return ""


def leading_formula(text: str) -> str:
    """The number or formula at the beginning of a text's first line, without the words after it;
    empty if the line begins with words."""
    line = text.strip().partition("\n")[0]
    line = line[LEAD_IN.match(line).end() :]
    if not NUMBER_OR_FORMULA.match(line) or NUMBERED_HEADING.match(line):
        return ""
    formula = FORMULA_IN_DOLLARS.match(line)
    if formula and not WORD.search(formula[0]):
        return formula[0]
    word = WORD.search(line)
    if word:
        line = UNCLOSED_COMMAND.sub("", line[: word.start()])
    return line.rstrip(" \t.,;:!*_`(")


def last_section(text: str) -> str:
    """The text after the last ####, without thinking; all of it if there is no ####."""
    return without_thinking(text).rpartition("####")[2].strip()


def split_solution(text: str) -> tuple[str | None, str]:
    r"""(rationale, answer) of a worked solution: GSM8K's "... #### 7", or MATH's with its answer in
    \boxed{}. (None, text) for an answer alone."""
    rationale, marker, answer = text.rpartition("####")
    if marker:
        return rationale.strip(), answer.strip()
    boxed, _ = split_at_last_box(text)
    if boxed is None or text.strip(" $.") == f"\\boxed{{{boxed}}}":
        return None, text
    return text, boxed
