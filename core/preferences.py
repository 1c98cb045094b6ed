"""Preference data: convert rows to pairs or single answers, and these to tokens; and accuracies.

A pair is {"prompt", "chosen", "rejected"}, a single answer {"prompt", "completion", "label"}. The
values are lists of messages, except the label, which is true if the answer is desirable.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from core.chat import IGNORE, encode_conversation
from core.columns import CONTEXT_COLUMNS
from core.errors import ConfigError, RowError
from core.messages import as_messages, with_context
from core.runtime import logger
from core.statistics import Z_95, wilson_interval
from core.work import Work

# Format name -> columns it needs. If several formats fit, the one with the most columns is used.
PAIR_FORMATS = {
    "prompt-chosen-rejected": ["prompt", "chosen", "rejected"],
    "chosen-rejected": ["chosen", "rejected"],
    "instruction-chosen-rejected": ["instruction", "chosen", "rejected"],
    "instruction-preferred-rejected": ["instruction", "preferred", "rejected"],
    "question-chosen-rejected": ["question", "chosen", "rejected"],
    "question-good-bad": ["question", "good_answer", "bad_answer"],
    "conversations-chosen-rejected": ["conversations", "chosen", "rejected"],
    "input-outputs-preference": ["input", "output_1", "output_2", "preference"],
    "question-answers-preference": ["question", "answer_a", "answer_b", "preference"],
}
UNPAIRED_FORMATS = {"unpaired": ["prompt", "completion", "label"]}

# Columns that are added to a format's prompt if the data has them, besides CONTEXT_COLUMNS.
PROMPT_COLUMNS = {
    "instruction-chosen-rejected": ["input"],
    "instruction-preferred-rejected": ["input"],
    "input-outputs-preference": ["instruction"],
}
OPTIONAL_COLUMNS = {
    form: [*PROMPT_COLUMNS.get(form, []), *CONTEXT_COLUMNS]
    for form in (*PAIR_FORMATS, *UNPAIRED_FORMATS)
}

LABELS = {"true": True, "1": True, "false": False, "0": False}


# -- rows to messages ------------------------------------------------------------------------------


def to_pair(row: dict, form: str) -> dict:
    """Convert a row to a pair; raises RowError if it shows no preference between two answers.

    Answers may be texts, messages, or whole conversations that repeat the prompt. The pair's prompt
    is the common beginning of both conversations.
    """
    columns = [column for column in PAIR_FORMATS[form] if column != "preference"]
    *prompt_columns, chosen_column, rejected_column = columns
    prompt = read_prompt(row, form, prompt_columns)
    if "preference" in PAIR_FORMATS[form] and prefers_second(row, chosen_column, rejected_column):
        chosen_column, rejected_column = rejected_column, chosen_column

    chosen = as_conversation(prompt, row[chosen_column])
    rejected = as_conversation(prompt, row[rejected_column])
    # For example, a system message in the prompt must not get lost.
    if not texts_of(prompt) <= texts_of(chosen) & texts_of(rejected):
        raise RowError("whose prompt is not in its answers, which are whole conversations")
    if chosen == rejected:
        raise RowError("with identical answers")

    # Several turns may come before the answers differ: all of them are the prompt.
    start = common_prefix_length(chosen, rejected)
    answers = {"chosen": chosen[start:], "rejected": rejected[start:]}
    if not start or not all(is_answer(answer) for answer in answers.values()):
        raise RowError("whose answers do not follow one prompt")
    return {"prompt": with_context(chosen[:start], row), **answers}


def read_prompt(row: dict, form: str, prompt_columns: list[str]) -> list[dict]:
    """The messages of a row's prompt column; none if its answers are whole conversations."""
    if not prompt_columns:
        return []
    (column,) = prompt_columns
    prompt = as_messages(row[column], "user")
    if form in PROMPT_COLUMNS:
        parts = [row.get("instruction"), row.get("input")]
        texts = [str(part) for part in parts if part]
        prompt[0]["content"] = "\n\n".join(texts)
    return prompt


def prefers_second(row: dict, first_column: str, second_column: str) -> bool:
    """Whether the column "preference" names the second answer, by number, letter or column."""
    preference = as_code(row["preference"])
    if preference in ("1", "a", first_column):
        return False
    if preference in ("2", "b", second_column):
        return True
    valid = f"1, 2, a, b, {first_column}, {second_column}"
    reason = f"whose preference is {row['preference']!r}, not one of {valid}"
    if preference == "0":
        # In data with codes 0 and 1, a 1 is the second answer: leaving out only the rows with 0
        # would invert all others.
        raise ConfigError(f"a row {reason}; write 1 for the first and 2 for the second answer")
    raise RowError(reason)


def as_code(value) -> str:
    """A preference or label as lower-case text; numeric columns may have 1.0 for 1."""
    text = str(value).lower()
    return text.removesuffix(".0")


def as_conversation(prompt: list[dict], answer) -> list[dict]:
    """Prompt and answer as one conversation, whether or not the answer repeats the prompt."""
    messages = as_messages(answer, "assistant")
    for message in messages:
        message.pop("train", None)  # only for SFT; here the answers are where conversations differ
    if messages[0]["role"] == "assistant":
        return prompt + messages
    return messages


def texts_of(messages: list[dict]) -> set[str]:
    contents = [message["content"] for message in messages]
    return set(map(str.strip, contents))


def common_prefix_length(first: list, second: list) -> int:
    for index, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return index
    return min(len(first), len(second))


def is_answer(messages: list[dict]) -> bool:
    return bool(messages) and messages[0]["role"] == "assistant"


def to_single(row: dict) -> dict:
    """Convert an unpaired row to a single answer; raises RowError if its label is not a boolean."""
    label = as_code(row["label"])
    if label not in LABELS:
        raise RowError(f"whose label is {row['label']!r}, not true or false")
    prompt = with_context(as_messages(row["prompt"], "user"), row)
    completion = as_messages(row["completion"], "assistant")
    return {"prompt": prompt, "completion": completion, "label": LABELS[label]}


def to_preference(row: dict, form: str) -> dict:
    """`to_single` for a row in one of UNPAIRED_FORMATS, else `to_pair`."""
    if form in UNPAIRED_FORMATS:
        return to_single(row)
    return to_pair(row, form)


def split_pairs(pairs: list[dict]) -> list[dict]:
    """Each pair as two single answers: the chosen one desirable, the rejected one not."""
    rows = []
    for pair in pairs:
        prompt = pair["prompt"]
        rows.append({"prompt": prompt, "completion": pair["chosen"], "label": True})
        rows.append({"prompt": prompt, "completion": pair["rejected"], "label": False})
    return rows


def add_mismatched_answers(rows: list[dict]) -> list[dict]:
    """Give each KTO row an answer to another prompt as "mismatched", for estimating z0."""

    def prompt_of(row: dict) -> str:
        return str(row["prompt"])

    # With rows sorted by prompt, a shift by the largest group size leads out of every group.
    rows = sorted(rows, key=prompt_of)
    group_sizes = Counter(map(prompt_of, rows))
    shift = max(group_sizes.values())
    mismatched_rows = []
    for index, row in enumerate(rows):
        other = rows[(index + shift) % len(rows)]
        mismatched_rows.append({**row, "mismatched": other["completion"]})
    return mismatched_rows


def first_prompts(rows: list[dict], count: int) -> list[dict]:
    """The first `count` different prompts of pairs or single answers, each with the first "chosen"
    and the first "rejected" answer to it, if there is one."""
    samples: dict[str, dict] = {}
    for row in rows:
        sample = samples.setdefault(str(row["prompt"]), {"prompt": row["prompt"]})
        if "label" in row:
            name = "chosen" if row["label"] else "rejected"
            sample.setdefault(name, row["completion"])
        else:
            sample.setdefault("chosen", row["chosen"])
            sample.setdefault("rejected", row["rejected"])
    return list(samples.values())[:count]


def to_sample(row: dict) -> dict[str, str]:
    """The last message of a prompt and the first message of each answer, for samples.jsonl."""
    sample = {"prompt": row["prompt"][-1]["content"]}
    for name in ("chosen", "rejected"):
        if name in row:
            sample[name] = row[name][0]["content"]
    return sample


# -- messages to tokens ----------------------------------------------------------------------------


def encode_answers(
    prompt: list[dict], answers: list[list[dict]], tokenizer
) -> tuple[list[int], list[tuple[list[int], list[int]]]]:
    """Tokenize a prompt and answers to it: (prompt ids (P,), [(ids, labels) of each answer]).

    Labels are IGNORE at tokens that the assistant does not write. Answers within the prompt are not
    targets. Raises RowError if an answer has several turns that do not continue each other.
    """
    encoded_answers = []
    for answer in answers:
        sequences = encode_conversation(tokenizer, prompt + answer, start=len(prompt))
        if len(sequences) > 1:
            raise RowError("whose answer has several turns, of which the chat template hides some")
        ids, labels = sequences[0]
        is_target = [label != IGNORE for label in labels]
        start = is_target.index(True)
        prompt_of_answer = ids[:start]
        encoded_answers.append((ids[start:], labels[start:]))
    return prompt_of_answer, encoded_answers


def truncate_answers(
    prompt: list[int], answers: list[tuple[list[int], list[int]]], tokenizer, config
) -> dict:
    """Truncate a result of `encode_answers` to `max_prompt_length` and `max_seq_length`.

    Returns {"prompt", "answers", "labels", "cut"}; "cut" says whether the prompt and each answer
    were truncated. Raises RowError if the prompt leaves no room for an answer.
    """
    short_prompt = truncate_prompt(prompt, tokenizer, config)
    max_length = config.max_seq_length - len(short_prompt)
    if max_length < 1:
        raise RowError(
            f"whose prompt leaves no room for an answer within {config.max_seq_length} tokens"
        )
    short_answers = [ids[:max_length] for ids, _ in answers]
    short_labels = [labels[:max_length] for _, labels in answers]
    cut = [short_prompt != prompt]
    cut += [len(ids) > max_length for ids, _ in answers]
    return {
        "prompt": short_prompt,
        "answers": short_answers,
        "labels": short_labels,
        "cut": tuple(cut),
    }


def truncate_prompt(ids: list[int], tokenizer, config) -> list[int]:
    """Truncate a prompt to `max_prompt_length` tokens, on the side `truncation_side`."""
    max_length = config.max_prompt_length or len(ids)
    if len(ids) <= max_length:
        return ids
    if config.truncation_side == "right":
        return ids[:max_length]
    # If the prompt begins with BOS, keep it: models rely on their first token.
    bos = []
    if ids[0] == tokenizer.bos_token_id:
        bos = ids[:1]
    num_dropped = len(ids) - max_length + len(bos)
    return bos + ids[num_dropped:]


def count_truncated(encoded: list[dict], name: str) -> None:
    """Warn about rows that `truncate_answers` has cut."""
    num_cut = torch.tensor([row["cut"] for row in encoded]).sum(0)  # (3,)
    if num_cut.any():
        logger.warning(
            "%s: of %d rows, %d prompts, %d first and %d second answers are cut to "
            "max_prompt_length or max_seq_length",
            name,
            len(encoded),
            *num_cut.tolist(),
        )


# -- batches ---------------------------------------------------------------------------------------


def compute_in_batches(
    compute: Callable[[list], Tensor], rows: list[dict], batch_size: int, device: torch.device
) -> Tensor:
    """`compute(rows)` for all rows, (len(rows), ...), with the batches split over processes."""
    from accelerate import PartialState
    from accelerate.utils import gather_object

    def num_tokens(index: int) -> int:
        return len(rows[index]["input_ids"])

    # Sorted by length, so that batches need little padding.
    order = sorted(range(len(rows)), key=num_tokens)
    starts = range(0, len(rows), batch_size)
    process = PartialState(cpu=device.type == "cpu")
    results = []
    for start in starts[process.process_index :: process.num_processes]:
        indices = order[start : start + batch_size]
        batch = [rows[index] for index in indices]
        results += zip(indices, compute(batch), strict=True)
    # Back to the order of the rows.
    by_index = dict(gather_object(results))
    return torch.stack([by_index[index] for index in range(len(rows))])


# -- metrics ---------------------------------------------------------------------------------------


def estimate_pairs(config: Any, work: Work) -> Work:
    """The work of training on pairs, from the work on only their longer answers (a dry run)."""
    answer_share = work.share_scored
    if config.share_prompt:
        # Both answers are in one sequence, after their prompt.
        factor = 1 + answer_share
        work.length = math.ceil(factor * work.length)
        work.share_scored = 2 * answer_share / factor
    else:
        factor = 2
        work.rows = 2 * work.rows
    work.tokens, work.forward_tokens = factor * work.tokens, factor * work.forward_tokens
    if config.needs_reference:
        work.forward_tokens = 2 * work.forward_tokens + work.tokens
        work.copies = int(bool(config.reference_model_path) or not config.lora_r)
    return work


def pair_accuracy(margins: Tensor) -> Tensor:
    """Fraction of margins (B,) above 0; a tie counts as half."""
    wins = (margins > 0).float().mean()
    ties = (margins == 0).float().mean()
    return wins + ties / 2


def warn_if_chosen_answers_fell(metrics: dict[str, float], num_pairs: int) -> None:
    """Warn if accuracy on held-out pairs rose only because rejected answers fell faster than chosen
    ones: on average, and in more than half of the pairs by more than chance."""
    if "eval_chosen_fell" not in metrics:
        return
    fall = metrics["eval_chosen_logps"] - metrics["eval_chosen_logps_before"]
    share_fallen = metrics["eval_chosen_fell"]
    least_share, _ = wilson_interval(share_fallen, num_pairs, Z_95)
    least_accuracy, _ = wilson_interval(metrics["eval_accuracy"], num_pairs, Z_95)
    rose = least_accuracy > metrics["eval_accuracy_before"]
    if fall < 0 and least_share > 0.5 and rose:
        logger.warning(
            "chosen answers became less likely (log-probability %+.1f, in %.0f%% of %d held-out "
            "pairs) while accuracy rose: rejected answers fell faster. If answers get worse, raise "
            "beta, lower learning_rate, or add a likelihood term: loss_type=sigmoid,nll",
            fall,
            100 * share_fallen,
            num_pairs,
        )
