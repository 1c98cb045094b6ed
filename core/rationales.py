"""Rationales from a teacher: ask for chains of thought and keep those that lead to the answer."""

from __future__ import annotations

import difflib
import functools
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from core import verifiers
from core.config import Count, Names, Natural, Options
from core.final_answers import find_final_answer, find_marked_answer
from core.function_process import AnswerChecker
from core.llm_answers import Answer, finished_text, whole_answer
from core.llm_client import LLMClient, LLMClientConfig
from core.runtime import logger
from core.sampling import SAMPLING_DEFAULTS, check_sampling

# How the teacher samples, unless generation_kwargs override it.
TEACHER_SAMPLING = SAMPLING_DEFAULTS | {"max_new_tokens": 256, "temperature": 0.7}
# Part of the key of every recorded call: answers to other versions of the prompts are not reused.
PROMPT_VERSION = "1"
ANSWER_CHECKS = {
    "numeric": f"{verifiers.__file__}:numeric",
    "exact": f"{verifiers.__file__}:exact",
}
ANSWER_MARKER = "####"  # what the teacher writes before its final answer
# Words around a final answer that are not reasoning steps.
FILLER_WORDS = {"a", "answer", "final", "hence", "is", "it", "result", "so", "the", "therefore"}
SIMILARITY_CUTOFF = 0.7  # new questions whose words are this similar to a known one are dropped


@dataclass
class TeacherConfig(LLMClientConfig):
    """Options of a teacher that writes rationales."""

    # teacher
    teacher_model_path: str = ""  # folder, hub name, .gguf file, stage:NAME, or name on a server
    # local: a model run here; api: any server with the protocol of OpenAI
    teacher_model_type: Literal["local", "api", "openai", "anthropic"] = "local"
    teacher_base_url: str | None = None  # URL of the server, e.g. http://localhost:8000/v1
    teacher_api_key: str | None = None  # name of the environment variable that holds the key
    num_rationales: Count = 4  # chains of thought sampled for each question
    # sampling of the teacher, any of {max_new_tokens: 256, temperature: 0.7, top_k: 0, top_p: 1}
    generation_kwargs: Options = field(default_factory=dict)
    answer_check: Literal["numeric", "exact"] = "numeric"  # compare answers as numbers or as text
    # what is learned: the steps in the answer, the model's reasoning before it, or both; auto: the
    # steps, or the reasoning if the answer has none
    rationale_source: Literal["auto", "answer", "reasoning", "both"] = "auto"
    # keep only rows of these types; without a column reasoning_type, ask the teacher for them
    reasoning_types: Names = field(default_factory=list)
    generate_synthetic_data: bool = False  # let the teacher write new questions too
    num_synthetic_examples: Natural = 100  # number of new questions

    def validate(self) -> None:
        super().validate()
        self.note_unread(
            not self.generate_synthetic_data,
            "num_synthetic_examples",
            "with generate_synthetic_data=false",
        )
        check_sampling("generation_kwargs", self.generation_kwargs)
        if self.generation_kwargs.get("top_k") and self.teacher_model_type != "local":
            self.notes.append("generation_kwargs: top_k has no effect on a teacher behind a server")


# -- prompts ---------------------------------------------------------------------------------------


def as_prompt(question: str, system: str | None = None) -> list[dict]:
    """The messages that ask a question, after the row's system prompt if there is one."""
    messages = [{"role": "user", "content": question}]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    return messages


def rationale_prompt(config: TeacherConfig, question: str, system: str | None = None) -> list[dict]:
    """The conversation that asks the teacher for one chain of thought."""
    kinds = ""
    if config.reasoning_types:
        kinds = f" by {', '.join(config.reasoning_types)} reasoning"
    content = (
        f"{question}\n\nThink step by step{kinds}, in short sentences. Write the final "
        "answer alone on the last line, after ####."
    )
    return as_prompt(content, system)


def question_prompt(examples: list[str]) -> list[dict]:
    """The conversation that asks the teacher for a new question like the examples."""
    numbered = [f"{number}. {text}" for number, text in enumerate(examples, 1)]
    shown = "\n\n".join(numbered)
    content = (
        f"{shown}\n\nWrite one more problem of this kind, as hard, about other "
        "things and with other numbers. Write the problem alone, without a solution."
    )
    return [{"role": "user", "content": content}]


def strip_or_none(text: str) -> str | None:
    """The text without surrounding white space; None if nothing is left."""
    return text.strip() or None


# -- answers ---------------------------------------------------------------------------------------


def final_answer(text: str, marker: str = ANSWER_MARKER) -> str:
    """The text after the last marker, or all of it if there is no marker."""
    return text.rpartition(marker)[2].strip()


def canonical_answers(prompts: list, completions: list[str], **_) -> list[str | None]:
    """The number or formula that each completion ends with, in a canonical notation, so that equal
    answers are equal texts; None if there is none. Parsing may hang: call it via `Subprocess`."""
    return [canonical_answer(text) for text in completions]


def canonical_answer(text: str) -> str | None:
    import sympy

    values = verifiers.parse_formula(find_final_answer(text))
    if not values:
        return None
    value = values[0]
    if isinstance(value, sympy.Expr):
        # 0.5 and 1/2 are the same answer.
        value = sympy.nsimplify(value, rational=True)
    return str(value)


@functools.cache
def shared_process(function: str) -> AnswerChecker:
    """A process that runs `function` for all comparisons, because starting one takes seconds."""
    return AnswerChecker(function)


def check_answers(config: TeacherConfig, texts: list[str], answers: list[str]) -> list:
    """For each final answer 1.0 (right) or 0.0 (wrong); None if the comparison failed or took too
    long."""
    check = shared_process(ANSWER_CHECKS[config.answer_check])
    return [
        check.verdict(text, answer=[answer]) for text, answer in zip(texts, answers, strict=True)
    ]


def majority_vote(answers: Sequence[str | None]) -> str | None:
    """The most frequent answer (self-consistency, Wang et al. 2023); None unless at least two
    agree and no other answer is as frequent."""
    ranking = Counter(answer for answer in answers if answer).most_common(2)
    if not ranking:
        return None
    winner, votes = ranking[0]
    tied = len(ranking) == 2 and ranking[1][1] == votes
    if votes < 2 or tied:
        return None
    return winner


def vote_on_answer(config: TeacherConfig, chains: list[str]) -> str | None:
    """The answer that most chains agree on, as the first of them writes it."""
    if config.answer_check == "exact":
        answers = [final_answer(chain) for chain in chains]
    else:
        process = shared_process(f"{__file__}:canonical_answers")
        answers = [process.verdict(chain) for chain in chains]
    winner = majority_vote(answers)
    if winner is None:
        return None
    # The student learns the answer as written, not the canonical notation.
    chain = chains[answers.index(winner)]
    return find_marked_answer(chain) or final_answer(chain)


# -- collecting ------------------------------------------------------------------------------------


def write_questions(
    config: TeacherConfig, teacher: LLMClient, seeds: list[str], held_out: list[str]
) -> list[dict]:
    """New questions by the teacher, which sees three of the seeds for each (Wang et al. 2023,
    "Self-Instruct"). Near duplicates of each other, of seeds and of held-out questions are dropped.
    Stops early after three times as many requests as questions to write."""
    wanted = config.num_synthetic_examples
    sampling = TEACHER_SAMPLING | config.generation_kwargs | {"temperature": 1.0}
    known_questions = [text.lower().split() for text in (*seeds, *held_out)]
    questions: list[str] = []
    counts: Counter[str] = Counter()
    while len(questions) < wanted and counts["asked"] < 3 * wanted:
        first = counts["asked"]
        requests = []
        for number in range(first, first + wanted - len(questions)):
            # The examples depend only on the number, so that a resumed run asks the same again.
            generator = random.Random(config.seed * 1_000_003 + number)
            examples = generator.sample(seeds, min(3, len(seeds)))
            requests.append((question_prompt(examples), number))
        counts["asked"] += len(requests)
        texts = teacher.ask(
            "new questions", requests, sampling, PROMPT_VERSION, strip_or_none, read=finished_text
        )
        for text in texts:
            if text is None:
                counts["missing"] += 1
                continue
            words = text.lower().split()
            if difflib.get_close_matches(words, known_questions, n=1, cutoff=SIMILARITY_CUTOFF):
                counts["repeated"] += 1
                continue
            known_questions.append(words)
            questions.append(text)
    logger.info(
        "%d new questions from %d requests: %d missing, %d too similar to others",
        len(questions),
        counts["asked"],
        counts["missing"],
        counts["repeated"],
    )
    return [
        {"question": text, "rationale": None, "answer": None, "type": None} for text in questions
    ]


def ask_for_chains(
    config: TeacherConfig, teacher: LLMClient, rows: list[dict]
) -> list[list[Answer]]:
    """The answers that the teacher writes to each row, at most `num_rationales`."""
    requests = []
    names = []
    for row in rows:
        prompt = rationale_prompt(config, row["question"], row.get("system"))
        requests += [(prompt, number) for number in range(config.num_rationales)]
        names += [row["question"]] * config.num_rationales
    sampling = TEACHER_SAMPLING | config.generation_kwargs
    answers = teacher.ask(
        "rationales",
        requests,
        sampling,
        PROMPT_VERSION,
        whole_answer,
        read=whole_answer,
        names=names,
    )
    answers_by_row = []
    for start in range(0, len(answers), config.num_rationales):
        group = answers[start : start + config.num_rationales]
        answers_by_row.append([answer for answer in group if answer])
    return answers_by_row


def steps_in(text: str, answer: str) -> str:
    """The steps before the final answer of a text; "" if there is only the answer."""
    before, marker, _ = text.rpartition(ANSWER_MARKER)
    if marker:
        # The marker may be in bold, which leaves a line of stars.
        lines = before.split("\n")
        while lines and re.fullmatch(r"[\s*_]*", lines[-1]):
            lines.pop()
        return "\n".join(lines).strip()
    text = text.strip()
    return "" if is_answer_alone(text, answer) else text


def is_answer_alone(text: str, answer: str) -> bool:
    """Whether a text has nothing but its answer: 7, \\boxed{7}, <answer>7</answer>, The answer is
    7."""
    if "=" in text:
        return False
    text = re.sub(r"<[^<>]*>|\\[a-zA-Z]+", " ", text).lower()
    words = re.findall(r"[^\W\d_]+", text.replace(answer.lower(), " "))
    # An answer may be written differently: 1,000 or 1000.
    numbers = re.findall(r"\d[\d.,]*", text)
    return len(numbers) <= 1 and not set(words) - FILLER_WORDS


def rationale_of(config: TeacherConfig, answer: Answer, final: str) -> str:
    """What the student learns from a right answer; "" if it has no steps."""
    steps = steps_in(answer.text, final)
    if config.rationale_source == "answer":
        return steps
    if config.rationale_source == "reasoning":
        return answer.reasoning
    if config.rationale_source == "both":
        return "\n\n".join(part for part in (answer.reasoning, steps) if part)
    return steps or answer.reasoning


def distinct_chains(chains: list[str]) -> list[str]:
    """The chains without duplicates that differ only in case or white space."""
    distinct: dict[str, str] = {}
    # Backwards, so that the first of several equal chains is kept.
    for chain in reversed(chains):
        normalized = " ".join(chain.lower().split())
        distinct[normalized] = chain
    return list(reversed(distinct.values()))


def collect_rationales(config: TeacherConfig, teacher: LLMClient, rows: list[dict]) -> list[dict]:
    """Rows {"question", "rationale", "answer", ...}: first those that have a rationale already,
    then one for each distinct chain of the teacher whose final answer is right."""
    # Ready rationales are trusted: their answers are not checked.
    collected = [row for row in rows if row["rationale"]]
    open_rows = [row for row in rows if not row["rationale"]]
    if not open_rows:
        return collected

    counts: Counter[str] = Counter()
    answers_by_row = ask_for_chains(config, teacher, open_rows)
    for row, answers in zip(open_rows, answers_by_row, strict=True):
        # An answer cut off by the token limit may have lost a part of its final answer.
        finished = [answer for answer in answers if not answer.was_cut]
        chains = [answer.text for answer in finished]
        counts["chains"] += len(answers)
        counts["cut"] += len(answers) - len(finished)
        expected = row["answer"]
        if expected is None:
            expected = vote_on_answer(config, chains)
        if not expected:
            continue
        # Only the final answer is checked: a wrong chain may still lead to the right one.
        finals = [final_answer(chain) for chain in chains]
        verdicts = check_answers(config, finals, [expected] * len(chains))
        right = [answer for answer, verdict in zip(finished, verdicts, strict=True) if verdict]
        rationales = [rationale_of(config, answer, expected) for answer in right]
        usable = distinct_chains([rationale for rationale in rationales if rationale])
        counts["right"] += len(right)
        counts["usable"] += len(usable)
        counts["reasoning"] += len({answer.reasoning for answer in right} & set(usable))
        counts["questions"] += len(usable) > 0
        for rationale in usable:
            collected.append(row | {"answer": expected, "rationale": rationale})

    logger.info(
        "rationales: %d chains for %d questions, %d with the right answer, %d of them distinct; "
        "%d questions (%.0f%%) have one",
        counts["chains"],
        len(open_rows),
        counts["right"],
        counts["usable"],
        counts["questions"],
        100 * counts["questions"] / len(open_rows),
    )
    if counts["reasoning"]:
        logger.info(
            "rationales: %d are the reasoning before an answer (rationale_source=%s)",
            counts["reasoning"],
            config.rationale_source,
        )
    if counts["cut"]:
        logger.warning("rationales: the %d that the token limit ended are left out", counts["cut"])
    teacher.figures.update(questions=len(open_rows), questions_with_rationale=counts["questions"])
    if not collected:
        raise RuntimeError(why_nothing_is_learned(counts))
    return collected


def why_nothing_is_learned(counts: Counter) -> str:
    """Why no chain is usable, and the remedy, in one sentence."""
    if counts["right"]:
        return (
            f"nothing to learn from: {counts['right']} answers are right, but without the steps to "
            "them; use a teacher that writes its steps, or another rationale_source"
        )
    if counts["cut"] == counts["chains"] > 0:
        return (
            f"nothing to learn from: the token limit ended all {counts['chains']} answers of the "
            "teacher; raise max_new_tokens in generation_kwargs"
        )
    return (
        "nothing to learn from: no chain of the teacher leads to a right answer; use a "
        "stronger teacher, a higher num_rationales, or easier questions"
    )
