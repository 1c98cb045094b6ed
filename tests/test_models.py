"""Families of models x recipes: each ends exact, or is refused in a sentence before training.

`make test` tries CORE, `make models` all, and writes the table of docs/models.md.
"""

import json
import re
import sys
import tempfile
import unittest.mock
from pathlib import Path

import conftest
import dpo
import grpo
import ppo
import pytest
import reward
import sft
import torch
import transformers
import trpo
from families import FAMILIES, make_family
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import common
from core.errors import ConfigError
from core.logprobs import answer_logits, collate_answers, sharing_is_exact
from core.output_layer import hidden_states_at
from core.sampling import SAMPLING_DEFAULTS, sample_completions, uniform_numbers

CORE = (
    *("Llama 3", "GPT-2", "Mistral", "Gemma 3", "GPT-OSS", "DeepSeek-V3", "Qwen3.5"),
    *("Granite 4", "Mamba", "BLOOM", "BART"),
)
ROWS = {
    "questions": [
        {"question": f"Say {'x ' * (n % 7)}{n}", "answer": f"{'y ' * (1 + n % 9)}{n}."}
        for n in range(16)
    ],
    "pairs": [
        {"prompt": f"Say {n}", "chosen": f"{'y ' * (1 + n % 5)}{n}.", "rejected": f"no {n}"}
        for n in range(16)
    ],
}
FIT = conftest.TWO_STEPS
RL = dict(
    num_training_steps=2,
    batch_size=4,
    generation_kwargs={"max_new_tokens": 6},
    validation_split=0.2,
    num_eval_prompts=2,
    reward=["length"],
    reward_length=3,
    save_freq=0,
    log_level="error",
)
# {run: (stage, config, data, options)}
RUNS = {
    "sft": (sft.SFTStage, sft.SFTConfig, "questions", FIT),
    "all weights": (sft.SFTStage, sft.SFTConfig, "questions", dict(**FIT, lora_r=0)),
    "packing": (
        sft.SFTStage,
        sft.SFTConfig,
        "questions",
        dict(**FIT, packing=True, max_seq_length=128),
    ),
    "4 bits": (sft.SFTStage, sft.SFTConfig, "questions", dict(**FIT, use_4bit=True)),
    "dpo": (dpo.DPOStage, dpo.DPOConfig, "pairs", FIT),
    "reward": (reward.RewardStage, reward.RewardConfig, "pairs", FIT),
    "grpo": (grpo.GRPOStage, grpo.GRPOConfig, "questions", dict(**RL, num_generations=2)),
    "ppo": (ppo.PPOStage, ppo.PPOConfig, "questions", dict(**RL, learning_rate=2e-2)),
    "trpo": (trpo.TRPOStage, trpo.TRPOConfig, "questions", RL),
}
IDS = torch.randint(3, 300, (2, 14), generator=torch.Generator().manual_seed(3))
# Exact to float32: differences are compared with the largest logit.
MERGED, SAMPLED, SHARED = 5e-5, 1e-4, 1e-4


def logits_of(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.float()


def gap(first, second):
    return float((first - second).abs().max() / second.abs().max())


def save_family(name, tokenizer, folder):
    """The folder of a random model; its weights are shaken, so that no bias is 0."""
    model = make_family(name, tokenizer)
    torch.manual_seed(1)
    for weight in model.parameters():
        weight.data += 0.05 * torch.randn_like(weight)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def train(model_folder, run, folder):
    """Train; returns the refusal, or "" after checking what was saved."""
    stage, config, data, options = RUNS[run]
    rows = Path(folder, "rows.jsonl")
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS[data]))
    out = Path(folder, "out")
    settings = config(model_name_or_path=str(model_folder), output_dir=str(out), **options)
    setattr(settings, config.aliases["data"], str(rows))
    trained = {}

    def merge(model, merge_adapter=common.merge_adapter):
        trained["logits"] = logits_of(model)
        return merge_adapter(model)

    try:
        with unittest.mock.patch.object(common, "merge_adapter", merge):
            result = stage(settings).execute()
    except ConfigError as error:
        return str(error)
    assert result.success, result.error_message
    auto_class = AutoModelForCausalLM
    if run == "reward":
        auto_class = AutoModelForSequenceClassification
    saved = auto_class.from_pretrained(out)
    assert gap(logits_of(saved), trained["logits"]) < MERGED
    if run != "reward":  # which hands on the model that it was given
        assert torch.equal(logits_of(saved), logits_of(result.model))
    if run not in ("reward", "grpo"):  # two answers of one length have no advantage
        before = auto_class.from_pretrained(model_folder)
        assert gap(logits_of(saved), logits_of(before)) > 1e-3  # it has learnt something
    return ""


def check_sampling(model, tokenizer):
    """Sampling has the log-probabilities of a plain pass, with prompts of several lengths."""
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, 300, (n,), generator=generator).tolist() for n in (5, 12, 23)]
    sampling = SAMPLING_DEFAULTS | {"max_new_tokens": 24}
    uniforms = uniform_numbers(6, sampling, 0)
    completions, logps = sample_completions(model, tokenizer, prompts, sampling, uniforms, 2)
    for n, (completion, sampled) in enumerate(zip(completions, logps, strict=True)):
        prompt = prompts[n // 2]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + completion])).logits[0]
        plain = logits[len(prompt) - 1 : -1].float().log_softmax(-1)
        plain = plain.gather(1, torch.tensor(completion)[:, None])[:, 0]
        assert (plain - torch.tensor(sampled)).abs().max() < SAMPLED


def check_sharing(model):
    """Where a prompt is shared by its answers, they have the logits that they have alone."""
    prompt, answers = IDS[0].tolist(), [[*row, *row] for row in IDS.tolist()]
    row = {"prompt": prompt, "answers": answers, "labels": answers}
    if not sharing_is_exact(model, row):
        return
    with torch.no_grad():
        shared, separate = (
            answer_logits(model, collate_answers([row], share))[0] for share in (True, False)
        )
    assert gap(shared, separate) < SHARED


def check_packing(model):
    """Where packing is not refused, documents have the hidden states that they have alone."""
    documents = [
        {"input_ids": ids, "labels": ids, "seq_lengths": torch.tensor([len(ids)])} for ids in IDS
    ]
    packed = {
        "input_ids": IDS.flatten(),
        "labels": IDS.flatten(),
        "seq_lengths": torch.tensor([len(ids) for ids in IDS]),
    }
    try:
        sft.check_packing(model, [packed])
    except ConfigError:
        return
    states = []
    for rows in ([packed], documents[:1], documents[1:]):
        batch = sft.collate(rows)
        inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
        mask = torch.ones_like(inputs["input_ids"]) > 0
        with torch.no_grad():
            states.append(hidden_states_at(model, mask, **inputs))
    assert gap(states[0], torch.cat(states[1:])) < SHARED


def check_cells(model_folder, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    check_sampling(model, tokenizer)
    check_sharing(model)
    check_packing(model)


@pytest.fixture(scope="module")
def folders(tokenizer, tmp_path_factory):
    """{family: the folder of its model}, made on first use."""
    made = {}

    def folder_of(name):
        if name not in made:
            made[name] = save_family(name, tokenizer, tmp_path_factory.mktemp("family"))
        return made[name]

    return folder_of


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("family", CORE)
def test_a_family_ends_exact_or_is_refused(folders, tmp_path, family, run):
    refusal = train(folders(family), run, tmp_path)
    expected = {
        "BART": RUNS,
        "BLOOM": ("packing",),
        "GPT-OSS": ("packing",),
        "Granite 4": ("packing", "reward"),
        "Mamba": ("packing", "reward", "4 bits"),
        "Qwen3.5": ("packing",),
    }
    assert bool(refusal) == (run in expected.get(family, ())), refusal


@pytest.mark.parametrize("family", [name for name in CORE if name != "BART"])
def test_a_family_samples_shares_and_packs_exactly(folders, tokenizer, family):
    check_cells(folders(family), tokenizer)


# -- all families, for the table -------------------------------------------------------------------


def table_of_all(tokenizer):
    """(lines of the table, whether all is well)."""
    refusals: list[str] = []
    lines = [
        f"| family | {' | '.join(RUNS)} | sampling |",
        "| --- |" + " --- |" * (len(RUNS) + 1),
    ]
    all_well = True
    for family in FAMILIES:
        cells = []
        with tempfile.TemporaryDirectory() as root:
            folder = save_family(family, tokenizer, Path(root, "model"))
            for run in RUNS:
                with tempfile.TemporaryDirectory() as out:
                    try:
                        refusal = train(folder, run, out)
                    except Exception as error:
                        refusal, all_well = f"WRONG {error!r}"[:200], False
                refusal = re.sub(r"model \S+ \((\w+)\)", r"a model of type \1", refusal)
                refusal = re.sub(r"of type \w+", "of type X", refusal)
                print(f"{family:24} {run:12} {refusal or 'exact'}", flush=True)
                if refusal and refusal not in refusals:
                    refusals.append(refusal)
                cells.append(f"({refusals.index(refusal) + 1})" if refusal else "yes")
            try:
                if "yes" in cells:
                    check_cells(folder, tokenizer)
                cells.append("yes" if "yes" in cells else "")
            except Exception as error:
                cells.append(f"WRONG {error!r}"[:80])
                all_well = False
        lines.append(f"| {family} | {' | '.join(cells)} |")
    lines.append("")
    lines += [f"({number}) {text}" + "  " for number, text in enumerate(refusals, 1)]
    return lines, all_well


def main():
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    tokenizer = conftest.make_tokenizer()
    lines, all_well = table_of_all(tokenizer)
    page = Path(__file__).resolve().parents[1] / "docs/models.md"
    start, end = "<!-- make models -->", "<!-- end -->"
    before, _, rest = page.read_text().partition(start)
    _, _, after = rest.partition(end)
    page.write_text("\n".join([before + start, *lines, end + after]))
    sys.exit(not all_well)


if __name__ == "__main__":
    main()
