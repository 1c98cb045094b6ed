"""recipes/dpo.py: which answer is preferred, shared prompts, and each loss by its formula."""

import copy
import itertools
import json
import math
import subprocess
import sys

import dpo
import pytest
import sft
import torch
from conftest import ROOT, make_model

import common
import core.data
import core.logprobs
import core.preferences
import core.sampling
from core.chat import IGNORE
from core.errors import ConfigError, RowError
from core.preferences import to_pair
from core.samples import compare_answers
from core.sampling import generate

USER, GOOD, BAD = (
    {"role": role, "content": text}
    for role, text in (("user", "3 pm?"), ("assistant", "15:00"), ("assistant", "3"))
)
ALL = ["sigmoid", "hinge", "ipo", "robust", "exo_pair", "apo_zero"]


def config(tmp_path, **options):
    defaults = dict(
        model_name_or_path="tiny",
        preference_dataset_path="data",
        output_dir=str(tmp_path / "out"),
        save_steps=0,
    )
    if {"robust", "exo_pair"} & {*options.get("loss_type", [])}:
        defaults["label_smoothing"] = 0.1
    return dpo.DPOConfig(**defaults | options)


def answered(text):
    return [{"role": "assistant", "content": text}]


def pair(question, good, bad, **more):
    return {
        "prompt": [{"role": "user", "content": question}],
        "chosen": answered(good),
        "rejected": answered(bad),
        **more,
    }


PAIRS = [
    pair("a", "b", "c d"),
    pair("why " * 9, "because " * 7, "no"),
    pair("x y z", "yes", "yes and no"),
    pair("q " * 30, "long answer " * 12, "short"),
]


def encoded(tokenizer, tmp_path, pairs=PAIRS, **options):
    return [dpo.encode(row, tokenizer, config(tmp_path, **options)) for row in pairs]


def written(tmp_path, rows):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# -- data ------------------------------------------------------------------------------------------

ROWS = {
    "prompt-chosen-rejected": {"prompt": "3 pm?", "chosen": "15:00", "rejected": "3"},
    "chosen-rejected": {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "instruction-chosen-rejected": {"instruction": "3 pm?", "chosen": "15:00", "rejected": "3"},
    "instruction-preferred-rejected": {
        "instruction": "3 pm?",
        "preferred": "15:00",
        "rejected": "3",
    },
    "question-good-bad": {"question": "3 pm?", "good_answer": "15:00", "bad_answer": "3"},
    "conversations-chosen-rejected": {
        "conversations": [{"from": "human", "value": "3 pm?"}],
        "chosen": {"from": "gpt", "value": "15:00"},
        "rejected": {"from": "gpt", "value": "3"},
    },
    "input-outputs-preference": {
        "input": "3 pm?",
        "output_1": "3",
        "output_2": "15:00",
        "preference": 2,
    },
    "question-answers-preference": {
        "question": "3 pm?",
        "answer_a": "3",
        "answer_b": "15:00",
        "preference": "B",
    },
}


@pytest.mark.parametrize("form", ROWS)
def test_every_format_gives_the_same_pair(form, tmp_path):
    assert core.columns.detect_format(list(ROWS[form]), dpo.FORMATS) == form
    assert to_pair(ROWS[form], form) == {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}
    stage = dpo.DPOStage(
        config(
            tmp_path,
            preference_dataset_path=written(tmp_path, [ROWS[form]] * 2),
            validation_split=0,
        )
    )
    assert stage.load_data() == ([{"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}] * 2, [])
    assert stage.lineage["data"]["format"] == form


@pytest.mark.parametrize(
    "preference, chosen",
    [(1, "A1"), ("2", "A2"), ("a", "A1"), ("B", "A2"), ("answer_b", "A2"), (1.0, "A1")],
)
def test_the_preference_decides_which_answer_is_chosen(preference, chosen):
    row = {"question": "?", "answer_a": "A1", "answer_b": "A2", "preference": preference}
    assert to_pair(row, "question-answers-preference")["chosen"][0]["content"] == chosen


def test_messages_share_their_longest_prefix_and_optional_columns_join_the_prompt():
    more = [{"role": "user", "content": "And 4?"}]
    row = {"chosen": [USER, GOOD, *more, GOOD], "rejected": [USER, GOOD, *more, BAD]}
    assert to_pair(row, "chosen-rejected")["prompt"] == [USER, GOOD, *more]
    row = {
        "prompt": "3 pm?",
        "chosen": [USER, GOOD],
        "rejected": [USER, BAD],
    }  # the answers repeat the prompt
    assert to_pair(row, "prompt-chosen-rejected") == {
        "prompt": [USER],
        "chosen": [GOOD],
        "rejected": [BAD],
    }
    row = {
        "instruction": "Convert.",
        "input": "3 pm",
        "output_1": "15:00",
        "output_2": "3",
        "preference": 1,
    }
    assert to_pair(row, "input-outputs-preference")["prompt"][0]["content"] == "Convert.\n\n3 pm"


@pytest.mark.parametrize(
    "row, form, reason",
    [
        (
            {"prompt": "a", "chosen": "b", "rejected": "b"},
            "prompt-chosen-rejected",
            "identical answers",
        ),
        (
            {"prompt": "a", "chosen": "b", "rejected": " "},
            "prompt-chosen-rejected",
            "empty or missing",
        ),
        (
            {"prompt": "a", "chosen": None, "rejected": "b"},
            "prompt-chosen-rejected",
            "empty or missing",
        ),
        (
            {"prompt": "a", "chosen": [], "rejected": "b"},
            "prompt-chosen-rejected",
            "empty or missing",
        ),
        (
            {"question": "a", "answer_a": "b", "answer_b": "c", "preference": "tie"},
            "question-answers-preference",
            "preference is 'tie'",
        ),
        (
            {"question": "a", "answer_a": "b", "answer_b": "c", "preference": -1},
            "question-answers-preference",
            "preference is -1",
        ),
        (
            {"chosen": [USER, GOOD], "rejected": [{"role": "user", "content": "4 pm?"}, BAD]},
            "chosen-rejected",
            "follow one prompt",
        ),
        ({"chosen": "b", "rejected": "c"}, "chosen-rejected", "follow one prompt"),
        ({"chosen": [USER, GOOD], "rejected": [USER]}, "chosen-rejected", "follow one prompt"),
        (
            {"chosen": [{"role": "dog", "content": "wow"}], "rejected": [BAD]},
            "chosen-rejected",
            "unknown speaker",
        ),
        (
            {
                "prompt": [{"role": "system", "content": "Be brief."}, USER],
                "chosen": [USER, GOOD],
                "rejected": [USER, BAD],
            },
            "prompt-chosen-rejected",
            "prompt is not in",
        ),
    ],
)
def test_rows_that_show_no_preference_say_why(row, form, reason):
    with pytest.raises(RowError, match=reason):
        to_pair(row, form)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])
def test_a_lack_of_memory_is_no_property_of_a_model(tokenizer, monkeypatch, error):
    def fail(*_, **__):
        raise error("too large")

    monkeypatch.setattr(core.logprobs, "hidden_states_at", fail)
    row = {"prompt": [5, 6], "answers": [[7], [8]], "labels": [[7], [8]]}
    model = make_model(tokenizer)
    if error is RuntimeError:
        assert not core.logprobs.sharing_is_exact(model, row)
    else:
        with pytest.raises(torch.OutOfMemoryError):
            core.logprobs.sharing_is_exact(model, row)


def test_pairs_of_transcripts_have_the_prompt_that_both_begin_with():
    """Anthropic's HH data has whole conversations as texts."""
    begin = "\n\nHuman: 4 pm?\n\nAssistant: "
    pair = to_pair({"chosen": begin + "Yes.", "rejected": begin + "No."}, "chosen-rejected")
    assert pair == {
        "prompt": [{"role": "user", "content": "4 pm?"}],
        "chosen": [{"role": "assistant", "content": "Yes."}],
        "rejected": [{"role": "assistant", "content": "No."}],
    }


def test_preferences_coded_by_0_and_1_are_refused_since_their_1_is_the_other_answer(tmp_path):
    rows = [
        {"question": f"a{n}", "answer_a": "b", "answer_b": "c", "preference": int(n == 5)}
        for n in range(6)
    ]
    with pytest.raises(ConfigError, match="a row whose preference is 0, not one of 1, 2"):
        dpo.DPOStage(
            dpo.DPOConfig(model_name_or_path="x", preference_dataset_path=written(tmp_path, rows))
        ).load_data()


def test_bad_rows_are_counted_and_a_majority_of_them_is_refused(tmp_path, caplog):
    good, same = (
        [{"prompt": f"a{n}", "chosen": "b", "rejected": other} for n in range(3)]
        for other in ("c", "b")
    )
    path = written(tmp_path, good + same[:2])
    with caplog.at_level("WARNING"):
        dpo.DPOStage(config(tmp_path, preference_dataset_path=path)).load_data()
    assert "2 of 5 rows left out: 2 with identical answers" in caplog.text
    with pytest.raises(ConfigError, match="2 usable rows .3 with identical answers"):
        dpo.DPOStage(
            config(tmp_path, preference_dataset_path=written(tmp_path, good[:2] + same))
        ).load_data()


def test_only_the_answers_are_scored_with_their_stop_tokens(tokenizer, tmp_path):
    chat = [
        {"role": "system", "content": "Brief."},
        USER,
        GOOD,
        {"role": "user", "content": "And 4?"},
    ]
    row = dpo.encode(
        {"prompt": chat, "chosen": [GOOD, USER, GOOD], "rejected": [BAD]},
        tokenizer,
        config(tmp_path),
    )
    texts = [tokenizer.decode([i for i in labels if i != IGNORE]) for labels in row["labels"]]
    assert texts == ["15:00<|im_end|>" * 2, "3<|im_end|>"]
    prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(row["prompt"]) == prompt
    assert row["input_ids"] == [*row["prompt"], *row["answers"][0], *row["answers"][1]]


def test_truncation_keeps_the_wanted_side_and_says_what_it_cut(tokenizer, tmp_path, model, caplog):
    (whole,) = encoded(tokenizer, tmp_path, PAIRS[3:])
    for side, kept in (("left", whole["prompt"][-20:]), ("right", whole["prompt"][:20])):
        (row,) = encoded(
            tokenizer,
            tmp_path,
            PAIRS[3:],
            max_prompt_length=20,
            truncation_side=side,
            max_seq_length=30,
        )
        assert row["prompt"] == kept and row["cut"] == (True, True, False)
        assert row["answers"] == [answer[:10] for answer in whole["answers"]]
    started = copy.deepcopy(tokenizer)
    started.bos_token = "<|im_start|>"  # what a prompt begins with stays
    (row,) = encoded(started, tmp_path, PAIRS[3:], max_prompt_length=20)
    assert row["prompt"] == whole["prompt"][:1] + whole["prompt"][-19:]
    with pytest.raises(RowError, match="equal within 30 tokens"):
        encoded(tokenizer, tmp_path, [pair("a", "b " * 30, "b " * 31)], max_seq_length=30)
    with pytest.raises(RowError, match="no room for an answer within 20 tokens"):
        encoded(tokenizer, tmp_path, PAIRS[3:], max_seq_length=20)
    (tmp_path / "out").mkdir()
    with caplog.at_level("WARNING"):
        dpo.train(
            config(tmp_path, max_prompt_length=20, lora_r=0, max_steps=1),
            model,
            tokenizer,
            PAIRS[1:],
            [],
        )
    assert "of 3 rows, 2 prompts, 0 first and 0 second answers are cut" in caplog.text


# -- log-probabilities -----------------------------------------------------------------------------


def expected_logps(model, row):
    """By float64, one sequence at a time, from the plain definition."""
    exact, sums = copy.deepcopy(model).double(), []
    for answer, labels in zip(row["answers"], row["labels"], strict=True):
        ids = torch.tensor([row["prompt"] + answer])
        dist = exact(ids).logits[0].log_softmax(-1)
        start = len(row["prompt"])
        sums.append(sum(dist[start + t - 1, y] for t, y in enumerate(labels) if y != IGNORE))
    return torch.stack(sums)


def gradient(model, value):
    model.zero_grad()
    value.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("share", [True, False])
def test_sequence_logps_are_those_of_each_answer_alone(tokenizer, model, tmp_path, share):
    rows = encoded(tokenizer, tmp_path, [*PAIRS, pair("q", "a", "b")])
    rows.append(
        dpo.encode(
            {"prompt": [USER], "chosen": [GOOD, USER, BAD], "rejected": [BAD]},
            tokenizer,
            config(tmp_path),
        )
    )
    logps, _ = dpo.sequence_logps(model, dpo.collate(rows, share))
    exact = torch.stack([expected_logps(model, row) for row in rows])
    assert logps.shape == (6, 2) and torch.allclose(logps.double(), exact, atol=1e-4)


def test_a_shared_prompt_gives_the_gradient_of_two_prompts(tokenizer, model, tmp_path):
    rows = encoded(tokenizer, tmp_path)
    shared, apart = (dpo.collate(rows, share) for share in (True, False))
    assert shared["num_tokens"] < apart["num_tokens"]
    weights = torch.randn(4, 2)
    first, second = (
        gradient(model, (dpo.sequence_logps(model, batch)[0] * weights).sum())
        for batch in (shared, apart)
    )
    assert torch.norm(first - second) <= 1e-5 * torch.norm(second)


def test_an_answer_does_not_see_the_other_one(tokenizer, model, tmp_path):
    rows = encoded(tokenizer, tmp_path, [pair("a", "b c d", "x y"), pair("a", "e f g h i", "x y")])
    logps, _ = dpo.sequence_logps(model, dpo.collate(rows))
    assert logps[0, 1].item() == pytest.approx(logps[1, 1].item(), abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_where_sharing_is_not_exact_is_found_out(tokenizer, caplog, dtype):
    from transformers import MistralConfig, MistralForCausalLM

    sizes = dict(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
    )
    row = {"prompt": [*range(20, 60)], "answers": [[*range(50, 80)], [*range(90, 120)]]}
    row["labels"] = row["answers"]
    torch.manual_seed(0)
    whole, sliding = (
        MistralForCausalLM(MistralConfig(sliding_window=size, **sizes)).to(dtype)
        for size in (None, 8)
    )
    for model in (whole, sliding):
        for weight in model.parameters():
            weight.data *= 4 if weight.dim() > 1 else 1
        model.lm_head.weight.data *= (
            30  # logits as large as a trained model's, and so their rounding
        )
    assert core.logprobs.sharing_is_exact(whole, row)
    whole.set_attn_implementation("eager")
    assert core.logprobs.sharing_is_exact(whole, row)
    with caplog.at_level("INFO"):
        assert not core.logprobs.sharing_is_exact(
            sliding, row
        )  # a mask of our own would widen the window
    assert "not exact with this model's attention" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_logps_are_cross_entropy(dtype):
    torch.manual_seed(0)
    logits, targets, weights = (
        (torch.randn(70, 50) * 5).to(dtype),
        torch.randint(0, 50, (70,)),
        torch.randn(70),
    )
    results = []
    for function in (
        core.logprobs.TokenLogps.apply,
        lambda x, y: -torch.nn.functional.cross_entropy(x.float(), y, reduction="none"),
    ):
        leaf = logits.clone().requires_grad_()
        values = function(leaf * 1, targets)
        (values * weights).sum().backward()
        results.append((values.detach(), leaf.grad.float()))
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    (values, gradients), (their_values, their_gradients) = results
    assert torch.allclose(values, their_values, atol=tolerance)
    assert torch.allclose(gradients, their_gradients, atol=tolerance)


# -- losses ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "loss_type, weights",
    [*[([name], []) for name in ALL], (["sigmoid", "hinge", "apo_zero"], [0.5, 0.2, 1.5])],
    ids=[*ALL, "mix"],
)
def test_loss_and_gradient_are_those_of_stock_dpo_trainer(tokenizer, tmp_path, loss_type, weights):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    short = [
        pair("a", "b", "c d"),
        pair("one two", "uno dos", "no"),
        pair("x", "y z", "z"),
    ]  # float32 sums to 1e-6
    rows, policy, reference = (
        encoded(tokenizer, tmp_path, short),
        make_model(tokenizer, 0),
        make_model(tokenizer, 1),
    )
    smoothing = 0.1 if {"robust", "exo_pair"} & {*loss_type} else 0.0
    stock = DPOTrainer(
        copy.deepcopy(policy),
        copy.deepcopy(reference),
        DPOConfig(
            str(tmp_path),
            use_cpu=True,
            bf16=False,
            report_to="none",
            gradient_checkpointing=False,
            loss_type=loss_type,
            loss_weights=weights or None,
            label_smoothing=smoothing,
            beta=0.3,
        ),
        train_dataset=Dataset.from_list(short),
        processing_class=tokenizer,
    )
    batch = stock.data_collator(
        [
            {
                "prompt_ids": row["prompt"],
                "chosen_ids": row["answers"][0],
                "rejected_ids": row["answers"][1],
            }
            for row in rows
        ]
    )
    expected = stock.compute_loss(stock.model, dict(batch))
    theirs = gradient(stock.model, expected)
    settings = config(
        tmp_path, loss_type=loss_type, loss_weights=weights, label_smoothing=smoothing, beta=0.3
    )
    for share in (True, False):
        ours, metrics = dpo.loss(policy, dpo.collate(rows, share), settings, reference.eval())
        assert ours.item() == pytest.approx(expected.item(), abs=1e-6, rel=1e-6)
        assert torch.norm(gradient(policy, ours) - theirs) <= 1e-5 * torch.norm(theirs)
        assert metrics["margin"].item() != pytest.approx(0, abs=1e-3)


def sigma(x):
    return 1 / (1 + math.exp(-x))


W, L, NW, NL = -12.0, -14.5, 6, 5  # log-probabilities and lengths in tokens


@pytest.mark.parametrize(
    "name, options, expected",
    [
        (
            "sigmoid",
            {"beta": 0.3, "label_smoothing": 0.2},
            -0.8 * math.log(sigma(0.3 * 2.5)) - 0.2 * math.log(sigma(-0.3 * 2.5)),
        ),
        (
            "simpo",
            {"beta": 2.0, "simpo_gamma": 0.7},
            -math.log(sigma(2 * W / NW - 2 * L / NL - 0.7)),
        ),
        ("cpo", {"beta": 0.3, "cpo_alpha": 0.5}, -math.log(sigma(0.3 * (W - L))) - 0.5 * W / NW),
        (
            "orpo",
            {"beta": 0.3},
            -W / NW
            - 0.3
            * math.log(
                sigma(
                    math.log(math.exp(W / NW) / (1 - math.exp(W / NW)))
                    - math.log(math.exp(L / NL) / (1 - math.exp(L / NL)))
                )
            ),
        ),
        ("nll", {"beta": 0.3}, -W / NW),
    ],
)
def test_losses_are_the_printed_formulas(tmp_path, name, options, expected):
    logps, lengths = torch.tensor([[W, L]]), torch.tensor([[NW, NL]])
    # Both answers have gained the same over the reference, which no loss may count as a margin.
    pairs = dpo.PairLogps(logps, log_ratios=logps + 1.0, lengths=lengths)
    settings = config(tmp_path, loss_type=[name], **options)
    value = dpo.PAIR_LOSSES[name].compute(pairs, settings)
    assert value.item() == pytest.approx(expected, rel=1e-5)


def test_kto_is_the_printed_formula(tmp_path):
    options = {"beta": 0.3, "desirable_weight": 1.2, "undesirable_weight": 0.8}
    settings = config(tmp_path, loss_type=["kto"], **options)
    log_ratio, z0 = torch.tensor([1.5, -0.5]), torch.tensor(0.4)
    values = dpo.kto_loss(log_ratio, z0, torch.tensor([True, False]), settings)
    assert values.tolist() == pytest.approx(
        [1.2 * (1 - sigma(0.3 * 1.1)), 0.8 * (1 - sigma(0.3 * 0.9))]
    )


def test_kto_takes_its_reference_point_from_mismatched_answers(tokenizer, tmp_path):
    answers, points = ["yes yes", "no", "why not"], []
    rows = [
        {
            "prompt": PAIRS[n]["prompt"],
            "completion": [{"role": "assistant", "content": answers[n]}],
            "mismatched": [{"role": "assistant", "content": answers[n - 1]}],
            "label": n != 1,
        }
        for n in range(3)
    ]
    rows = encoded(tokenizer, tmp_path, rows)
    settings = config(tmp_path, loss_type=["kto"], beta=0.3, desirable_weight=1.2)
    for seeds in ((0, 1), (1, 0)):  # the one has a KL estimate above 0, the other below
        policy, reference = (make_model(tokenizer, seed).eval() for seed in seeds)
        value, metrics = dpo.loss(policy, dpo.collate(rows), settings, reference)
        ratios = torch.stack(
            [expected_logps(policy, row) - expected_logps(reference, row) for row in rows]
        ).tolist()
        points.append(sum(other for _, other in ratios) / 3)
        z0 = max(0.0, points[-1])
        terms = [
            1.2 * (1 - sigma(0.3 * (r - z0))) if n != 1 else 1 - sigma(0.3 * (z0 - r))
            for n, (r, _) in enumerate(ratios)
        ]
        assert value.item() == pytest.approx(sum(terms) / 3, abs=1e-5) and metrics[
            "z0"
        ].item() == pytest.approx(z0, abs=1e-4)
    assert min(points) < -0.01 < 0.01 < max(points)


def test_no_gradient_passes_through_the_reference_point_of_kto(tmp_path):
    settings = config(tmp_path, loss_type=["kto"], beta=0.3)
    log_ratios = torch.tensor([[1.5, 0.6], [-0.5, 0.2]], requires_grad=True)
    losses, metrics = dpo.kto_objective(log_ratios, torch.tensor([True, False]), settings)
    losses.sum().backward()
    assert metrics["z0"].item() == pytest.approx(0.4)
    assert log_ratios.grad[:, 0].all() and not log_ratios.grad[:, 1].any()


@pytest.mark.parametrize("name, per_token", [("sigmoid", False), ("simpo", True)])
def test_the_figures_of_pairs_by_hand(tmp_path, name, per_token):
    """Implicit rewards are beta times the log-ratios, of tokens where the loss is per token."""
    pairs = dpo.PairLogps(
        logps=torch.tensor([[-12.0, -14.0], [-9.0, -5.0], [-3.0, -4.0]]),
        log_ratios=torch.tensor([[1.0, -2.0], [3.0, 2.0], [-1.0, 0.5]]),
        lengths=torch.tensor([[4, 2], [3, 4], [2, 1]]),
    )
    chosen, rejected = [1.0, 3.0, -1.0], [-2.0, 2.0, 0.5]
    if per_token:
        chosen, rejected = [1 / 4, 3 / 3, -1 / 2], [-2 / 2, 2 / 4, 0.5 / 1]
    _, metrics = dpo.pair_objective(pairs, config(tmp_path, loss_type=[name], beta=0.3))
    # Without a reference no answer can be less likely than under it.
    fell = {} if per_token else {"chosen_fell": 1 / 3}
    assert {key: value.item() for key, value in metrics.items()} == pytest.approx(
        {
            "accuracy": 2 / 3,
            "ranking_accuracy": 2 / 3,
            "chosen_logps": -8.0,
            "rejected_logps": -23 / 3,
            "chosen_reward": 0.3 * sum(chosen) / 3,
            "rejected_reward": 0.3 * sum(rejected) / 3,
            "margin": 0.3 * (sum(chosen) - sum(rejected)) / 3,
        }
        | fell
    )


def test_kto_mismatches_answers_of_other_prompts(tokenizer, model, tmp_path, monkeypatch):
    rows = core.preferences.split_pairs(PAIRS)
    seen, encode = [], dpo.encode
    monkeypatch.setattr(dpo, "encode", lambda row, *rest: seen.append(row) or encode(row, *rest))
    (tmp_path / "out").mkdir()
    dpo.train(
        config(tmp_path, loss_type=["kto"], max_steps=1),
        common.add_adapter(model, config(tmp_path)),
        tokenizer,
        rows,
        [],
    )
    answers = {
        str(row["prompt"]): [
            other["completion"] for other in rows if other["prompt"] == row["prompt"]
        ]
        for row in rows
    }
    assert len(seen) == 8 and all(
        row["mismatched"] not in answers[str(row["prompt"])] for row in seen
    )


def test_kto_mismatches_where_a_prompt_has_many_answers(tokenizer, model, tmp_path, monkeypatch):
    rows = [
        {"prompt": PAIRS[n]["prompt"], "completion": answered(f"{n} {k}"), "label": k % 2 == 0}
        for n in range(4)
        for k in range(8 - 2 * n)
    ]
    seen, encode = [], dpo.encode
    monkeypatch.setattr(dpo, "encode", lambda row, *rest: seen.append(row) or encode(row, *rest))
    (tmp_path / "out").mkdir()
    dpo.train(
        config(tmp_path, loss_type=["kto"], max_steps=1),
        common.add_adapter(model, config(tmp_path)),
        tokenizer,
        rows,
        [],
    )
    assert len(seen) == 20 and all(
        row["mismatched"][0]["content"][0] != row["completion"][0]["content"][0] for row in seen
    )


@pytest.mark.parametrize("name", ["simpo", "orpo", "cpo", "nll"])
def test_losses_without_a_reference_run_none(tokenizer, model, tmp_path, monkeypatch, name):
    monkeypatch.setattr(dpo, "reference_logps", None)
    (tmp_path / "out").mkdir()
    metrics = dpo.train(
        config(tmp_path, loss_type=[name], lora_r=0, max_steps=2), model, tokenizer, PAIRS, PAIRS
    )
    assert math.isfinite(metrics["eval_loss"]) and "eval_kl" not in metrics


def test_kl_is_that_of_the_distributions(tokenizer, tmp_path, monkeypatch):
    policy, reference = make_model(tokenizer, 0), make_model(tokenizer, 1).eval()
    monkeypatch.setattr(dpo, "KL_STRIDE", 1)
    (row,) = encoded(tokenizer, tmp_path, [pair("a", "b c", "d")])
    _, metrics = dpo.loss(policy, dpo.collate([row]), config(tmp_path), reference)
    total, count = 0.0, 0
    for answer in row["answers"]:
        ids, start = torch.tensor([row["prompt"] + answer]), len(row["prompt"])
        p, q = (
            model(ids).logits[0, start - 1 : -1].double().log_softmax(-1)
            for model in (policy, reference)
        )
        total, count = total + (p.exp() * (p - q)).sum().item(), count + len(answer)
    assert metrics["kl"].item() == pytest.approx(total / count, abs=1e-5)


# -- training --------------------------------------------------------------------------------------


def lines(tmp_path):
    return [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "options",
    [{}, {"lora_r": 0}, {"use_4bit": True}, {"lora_bias": "all"}, {"use_dora": True}],
    ids=["lora", "full", "4bit", "biases", "dora"],
)
def test_after_sft_the_first_loss_is_ln_2_and_the_reference_never_moves(
    model_dir, data, tmp_path, monkeypatch, options
):
    folder = tmp_path / "sft"
    first = sft.SFTStage(
        sft.SFTConfig(
            model_name_or_path=model_dir,
            dataset_name_or_path=data,
            output_dir=str(folder),
            max_steps=3,
            learning_rate=1e-2,
            save_steps=0,
            lora_r=options.get("lora_r", 16),
        )
    ).execute()
    assert first.success, first.error_message
    path = written(
        tmp_path,
        [
            {"prompt": p["prompt"], "chosen": p["chosen"], "rejected": p["rejected"]}
            for p in PAIRS * 4
        ],
    )
    seen = []
    inner = dpo.fit

    def watched(config, model, training, evaluation, collate, loss):
        batch, reference = dpo.collate(training), loss.keywords["reference"]
        seen.append(dpo.reference_logps(model, batch, reference)[0])
        metrics = inner(config, model, training, evaluation, collate, loss)
        model.train()
        seen.append(dpo.reference_logps(model, batch, reference)[0])
        seen.append(dpo.sequence_logps(model, batch)[0].detach())
        return metrics

    monkeypatch.setattr(dpo, "fit", watched)
    settings = config(
        tmp_path,
        model_name_or_path=model_dir,
        preference_dataset_path=path,
        validation_split=0.2,
        learning_rate=1e-2,
        max_steps=8,
        lr_scheduler_type="constant",
        warmup_ratio=0.0,
        **options,
    )
    result = dpo.DPOStage(settings).execute(first.model, first.tokenizer, first)
    assert result.success, result.error_message
    losses = [line["loss"] for line in lines(tmp_path) if "loss" in line]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6) and losses[-1] < losses[0] - 0.02
    assert result.metrics["eval_loss_before"] == pytest.approx(math.log(2), abs=1e-6)
    assert torch.equal(seen[0], seen[1]) and not torch.allclose(seen[0], seen[2], atol=0.1)
    assert json.loads((tmp_path / "out/stage.json").read_text())["parent"]["model"] == str(folder)


def test_dropout_of_the_model_is_off(tokenizer, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    noisy = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=256,
            n_embd=32,
            n_layer=2,
            n_head=2,
            resid_pdrop=0.5,
        )
    )
    (tmp_path / "out").mkdir()
    dpo.train(config(tmp_path, lora_r=0, max_steps=1), noisy, tokenizer, PAIRS, [])
    assert lines(tmp_path)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    noisy = make_model(tokenizer, attention_dropout=0.5)
    dpo.train(config(tmp_path, lora_r=0, max_steps=1), noisy, tokenizer, PAIRS, [])
    assert lines(tmp_path)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_with_trained_biases_the_reference_is_a_copy(tokenizer, tmp_path):
    """Biases change outside the adapter, so the policy without its adapter is not the reference."""
    settings, rows = config(tmp_path, lora_bias="all"), encoded(tokenizer, tmp_path)
    policy = common.add_adapter(make_model(tokenizer, attention_bias=True), settings)
    reference, batch = dpo.frozen_reference(settings, policy, tokenizer), dpo.collate(rows)
    before = dpo.reference_logps(policy, batch, reference)[0]
    for name, parameter in policy.named_parameters():
        parameter.data += parameter.requires_grad * name.endswith("bias")
    assert torch.equal(dpo.reference_logps(policy, batch, reference)[0], before)
    assert not torch.allclose(dpo.sequence_logps(policy, batch)[0], before)


def test_a_tie_counts_half():
    assert (
        dpo.pair_accuracy(torch.tensor([2.0, 0.0, -1.0, 0.0])) == 0.5
        and dpo.pair_accuracy(torch.tensor([0.0])) == 0.5
    )


def test_a_policy_that_does_not_start_at_its_reference_is_stopped(tokenizer, model, tmp_path):
    rows = encoded(tokenizer, tmp_path)
    with pytest.raises(RuntimeError, match="does not start at the reference"):
        dpo.check_start(config(tmp_path, lora_r=0), model, make_model(tokenizer, 1), rows[0])


def test_training_reaches_the_closed_form(tokenizer, model, tmp_path):
    """With Bradley-Terry preferences of rewards r, the optimum is pi_ref exp(r / beta) / Z."""
    answers, strength, beta = ["one", "two", "three", "four"], [1, 2, 3, 6], 0.7  # r = log strength
    rows = [
        pair("Say", answers[a], answers[b])
        for a, b in itertools.permutations(range(4), 2)
        for _ in range(strength[a])
    ]

    def logps():
        encoded_rows = encoded(tokenizer, tmp_path, [pair("Say", a, "?") for a in answers])
        return torch.stack([expected_logps(model, row)[0] for row in encoded_rows])

    with torch.no_grad():
        optimum = (logps() + torch.tensor(strength).double().log() / beta).log_softmax(0)
        start = (optimum.exp() * (optimum - logps().log_softmax(0))).sum().item()
    (tmp_path / "out").mkdir()
    dpo.train(
        config(
            tmp_path,
            lora_r=0,
            learning_rate=2e-3,
            beta=beta,
            num_train_epochs=120,
            logging_steps=40,
            max_grad_norm=0,
            per_device_train_batch_size=36,
        ),
        model,
        tokenizer,
        rows,
        [],
    )
    with torch.no_grad():
        kl = (optimum.exp() * (optimum - logps().log_softmax(0))).sum().item()
    print(f"KL to the optimum: {start:.4f} -> {kl:.2e}")
    assert start > 0.05 and kl < 1e-3


@pytest.mark.parametrize(
    "options",
    [
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        {"precompute_ref_log_probs": True},
        {"share_prompt": False},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": 2},
    ],
)
def test_the_curve_is_the_same(tokenizer, tmp_path, options):
    (tmp_path / "out").mkdir()
    curves = []
    for changes in ({}, options):
        settings = config(
            tmp_path,
            **{
                "lora_r": 0,
                "learning_rate": 1e-3,
                "num_train_epochs": 4,
                "per_device_train_batch_size": 4,
            }
            | changes,
        )
        dpo.train(settings, make_model(tokenizer), tokenizer, PAIRS * 2, PAIRS)
        curves.append(
            [
                line[key]
                for line in lines(tmp_path)
                for key in ("loss", "eval_loss", "margin", "eval_kl")
                if key in line
            ]
        )
    assert len(curves[0]) > 8 and curves[1] == pytest.approx(curves[0], abs=2e-5)


def test_a_reference_of_its_own_is_used_and_its_tokenizer_compared(tokenizer, tmp_path, caplog):
    other = tmp_path / "other"
    make_model(tokenizer, 1).save_pretrained(other)
    tokenizer.save_pretrained(other)
    (tmp_path / "out").mkdir()
    settings = config(tmp_path, reference_model_path=str(other), max_steps=1)
    with caplog.at_level("WARNING"):
        metrics = dpo.train(
            settings, common.add_adapter(make_model(tokenizer), settings), tokenizer, PAIRS, PAIRS
        )
    rows = encoded(tokenizer, tmp_path)
    expected, _ = dpo.loss(
        make_model(tokenizer), dpo.collate(rows), settings, make_model(tokenizer, 1)
    )
    assert metrics["eval_loss_before"] == pytest.approx(expected.item(), abs=1e-5) != math.log(2)
    grown = copy.deepcopy(tokenizer)
    grown.add_tokens(["new"])
    with pytest.raises(ConfigError, match="its tokenizer is not the policy's"):
        dpo.frozen_reference(settings, make_model(tokenizer), grown)


# Held-out pairs after training: 64 of them, whose chosen answers fell in 40, and that are right in
# 40. The 95% interval of 40 of 64 begins at 0.503, that of 39 of 64 at 0.487.
FELL = {
    "eval_chosen_logps": -12.0,
    "eval_chosen_logps_before": -10.0,
    "eval_chosen_fell": 40 / 64,
    "eval_accuracy": 40 / 64,
    "eval_accuracy_before": 0.5,
}


@pytest.mark.parametrize(
    "change, num_pairs, is_warned",
    [
        ({}, 64, True),
        ({"eval_chosen_fell": 39 / 64}, 64, False),
        ({"eval_accuracy": 39 / 64}, 64, False),
        ({"eval_chosen_logps": -9.0}, 64, False),
        ({"eval_chosen_fell": 1.0, "eval_accuracy": 1.0}, 3, False),
        ({"eval_chosen_fell": 1.0, "eval_accuracy": 1.0}, 4, True),
    ],
)
def test_chosen_answers_that_fell_are_warned_of_beyond_chance(caplog, change, num_pairs, is_warned):
    with caplog.at_level("WARNING"):
        core.preferences.warn_if_chosen_answers_fell(FELL | change, num_pairs)
    assert ("chosen answers became less likely" in caplog.text) is is_warned


def test_the_warning_counts_the_held_out_pairs(tokenizer, model, tmp_path, monkeypatch, caplog):
    figures = FELL | {"eval_chosen_fell": 1.0, "eval_accuracy": 1.0}
    monkeypatch.setattr(dpo, "fit", lambda *_: figures)
    with caplog.at_level("WARNING"):
        dpo.train(config(tmp_path, lora_r=0), model, tokenizer, PAIRS, PAIRS)
    assert f"(log-probability -2.0, in 100% of {len(PAIRS)} held-out pairs)" in caplog.text


def test_without_held_out_pairs_or_a_reference_there_is_no_warning(caplog):
    with caplog.at_level("WARNING"):
        core.preferences.warn_if_chosen_answers_fell({}, 0)
        free = {name: value for name, value in FELL.items() if name != "eval_chosen_fell"}
        core.preferences.warn_if_chosen_answers_fell(free, 64)
    assert not caplog.records


@pytest.mark.parametrize("unpaired", [True, False])
def test_kto_learns_from_single_answers_and_from_pairs(model_dir, tmp_path, unpaired):
    pairs = [(f"Say {n}", "yes " * (1 + n % 3), "no " * (1 + n % 2)) for n in range(12)]
    rows = [
        {"prompt": q, "completion": text, "label": good}
        for q, w, x in pairs
        for text, good in ((w, True), (x, False))
    ]
    rows = rows if unpaired else [{"prompt": q, "chosen": w, "rejected": x} for q, w, x in pairs]
    settings = config(
        tmp_path,
        model_name_or_path=model_dir,
        preference_dataset_path=written(tmp_path, rows),
        loss_type=["kto"],
        learning_rate=1e-2,
        num_train_epochs=4,
        validation_split=0.2,
    )
    result = dpo.DPOStage(settings).execute()
    assert result.success, result.error_message
    assert (
        result.metrics["eval_accuracy"] > 0.7
        and result.metrics["eval_loss"] < 0.45 < result.metrics["eval_loss_before"]
    )
    single = written(
        tmp_path, [{"prompt": prompt, "completion": "b", "label": True} for prompt in "ac"]
    )
    with pytest.raises(ConfigError, match="set loss_type=kto"):
        dpo.DPOStage(config(tmp_path, preference_dataset_path=single)).load_data()


@pytest.mark.parametrize(
    "options, said",
    [
        ({"loss_type": "dpo"}, "unknown loss_type 'dpo'; known: .*; sigmoid is DPO's own"),
        ({"loss_type": "sigmoid,nll", "loss_weights": "1"}, "one weight for each"),
        ({"loss_type": "kto,nll"}, "cannot be mixed"),
        ({"loss_type": "exo_pair", "label_smoothing": 0}, "set it to 1e-3"),
        ({"preference_dataset_path": ""}, "preference_dataset_path is missing"),
        ({"auto_detect_format": False}, "requires dataset_format"),
    ],
)
def test_options_that_do_not_go_together_are_refused(tmp_path, options, said):
    with pytest.raises(ConfigError, match=said):
        config(tmp_path, **options).validate()


@pytest.mark.parametrize(
    "options, said",
    [
        (
            {"loss_type": "hinge", "label_smoothing": 0.1},
            "label_smoothing has no effect with loss_type=hinge",
        ),
        ({"loss_type": "simpo", "reference_model_path": "x"}, "reference_model_path has no effect"),
        (
            {"simpo_gamma": 1},
            "simpo_gamma has no effect with loss_type=sigmoid; it belongs to simpo",
        ),
        (
            {"validation_split": 0, "eval_steps": 1},
            "eval_steps has no effect with validation_split=0",
        ),
    ],
)
def test_options_without_effect_are_noted(tmp_path, options, said):
    settings = config(tmp_path, **options)
    settings.validate()
    assert any(said in note for note in settings.notes), settings.notes


def test_two_processes_give_the_curve_of_one(model_dir, tmp_path):
    path = written(
        tmp_path, [{k: p[k] for k in ("prompt", "chosen", "rejected")} for p in PAIRS * 6]
    )
    options = dict(
        model_name_or_path=model_dir,
        preference_dataset_path=str(path),
        max_steps=4,
        learning_rate=1e-2,
        validation_split=0.25,
    )
    one, two = (
        options | dict(per_device_train_batch_size=4, output_dir=str(tmp_path / "1")),
        options
        | dict(
            per_device_train_batch_size=2,
            output_dir=str(tmp_path / "2"),
            precompute_ref_log_probs=True,
        ),
    )
    assert dpo.DPOStage(dpo.DPOConfig(**one)).execute().success
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node=2",
            "--standalone",
            "recipes/dpo.py",
            *(f"--{name}={value}" for name, value in two.items()),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0 and done.stdout.count("done:") == 1, done.stdout + done.stderr
    logged = [
        [
            json.loads(line)
            for line in (tmp_path / folder / "metrics.jsonl").read_text().splitlines()
        ]
        for folder in "12"
    ]
    curves = [
        [
            line[key]
            for line in lines
            for key in ("loss", "margin", "eval_loss", "eval_kl")
            if key in line
        ]
        for lines in logged
    ]
    assert len(curves[0]) == 12 and curves[1] == pytest.approx(curves[0], abs=1e-4)


# -- answers before and after ----------------------------------------------------------------------


def read_samples(folder):
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def test_held_out_prompts_are_answered_before_and_after(tmp_path, model_dir):
    rows = [{"prompt": f"Say {n}.", "chosen": f"{n}!", "rejected": "no"} for n in range(12)]
    options = dict(
        model_name_or_path=model_dir,
        preference_dataset_path=written(tmp_path, rows),
        validation_split=0.5,
        max_steps=3,
        learning_rate=0.1,
        max_new_tokens=5,
        log_level="error",
    )
    stage = dpo.DPOStage(config(tmp_path, num_eval_samples=4, **options))
    result = stage.execute()
    assert result.success, result.error_message
    samples = read_samples(tmp_path / "out")
    _, held_out = stage.data
    assert [sample["prompt"] for sample in samples] == [
        pair["prompt"][0]["content"] for pair in held_out[:4]
    ]
    for sample in samples:
        assert list(sample) == ["prompt", "chosen", "rejected", "before", "after"]
        assert sample["chosen"] == sample["prompt"].removeprefix("Say ").replace(".", "!")
        assert sample["rejected"] == "no"
    assert any(sample["before"] != sample["after"] for sample in samples)
    # The answers before training are those of the model that training starts from.
    config_of_start = config(tmp_path, model_name_or_path=model_dir)
    model, tokenizer = common.load_model_and_tokenizer(config_of_start)
    prompts = [pair["prompt"] for pair in held_out[:4]]
    texts = [text.strip() for text, _ in generate(model, tokenizer, prompts, 5)]
    assert [sample["before"] for sample in samples] == texts
    names = {"exact_match", "exact_match_before", "stopped", "stopped_before"}
    assert names <= set(result.metrics)


def test_without_samples_nothing_is_answered(tmp_path, model_dir, monkeypatch):
    monkeypatch.setattr(core.sampling, "sample_completions", lambda *_: 1 / 0)
    rows = [{"prompt": f"Say {n}.", "chosen": f"{n}!", "rejected": "no"} for n in range(4)]
    settings = config(
        tmp_path,
        model_name_or_path=model_dir,
        preference_dataset_path=written(tmp_path, rows),
        validation_split=0.5,
        max_steps=1,
        log_level="error",
    )
    result = dpo.DPOStage(settings).execute()
    assert result.success, result.error_message
    assert not (tmp_path / "out/samples.jsonl").exists() and "stopped" not in result.metrics


def test_each_prompt_is_answered_once_with_the_first_answers_of_each_kind():
    pairs = [pair("a", "1", "2"), pair("a", "3", "4"), pair("b", "5", "6"), pair("c", "7", "8")]
    samples = core.preferences.first_prompts(pairs, 2)
    assert [core.preferences.to_sample(sample) for sample in samples] == [
        {"prompt": "a", "chosen": "1", "rejected": "2"},
        {"prompt": "b", "chosen": "5", "rejected": "6"},
    ]
    single = core.preferences.split_pairs(pairs)
    assert core.preferences.first_prompts(single, 2) == samples
    only_bad = [{"prompt": [USER], "completion": [BAD], "label": False}]
    (sample,) = core.preferences.first_prompts(only_bad, 2)
    assert core.preferences.to_sample(sample) == {"prompt": "3 pm?", "rejected": "3"}


def test_the_chosen_answer_counts_as_the_expected_one(tmp_path):
    samples = [
        {"prompt": "a", "chosen": "1", "rejected": "2"},
        {"prompt": "b", "chosen": "2", "rejected": "1"},
        {"prompt": "c", "rejected": "3"},  # no desirable answer: it is not counted
    ]
    (tmp_path / "out").mkdir()
    before = [("2", True), ("1", False), ("3", False)]
    after = [(" 1\n", True), ("1", True), ("3", False)]
    metrics = compare_answers(config(tmp_path), samples, before, after)
    assert metrics == pytest.approx(
        {
            "exact_match_before": 0,
            "stopped_before": 1 / 3,
            "exact_match": 1 / 2,
            "stopped": 2 / 3,
        }
    )
    del samples[0]["chosen"], samples[1]["chosen"]
    metrics = compare_answers(config(tmp_path), samples, before, after)
    assert set(metrics) == {"stopped_before", "stopped"}


@pytest.mark.parametrize(
    "options, words",
    [
        ({"num_eval_samples": 4, "validation_split": 0}, "num_eval_samples has no effect"),
        ({"max_new_tokens": 5}, "without num_eval_samples"),
    ],
)
def test_options_of_the_answers_that_have_no_effect_are_noted(options, words, tmp_path):
    settings = config(tmp_path, **options)
    settings.validate()
    assert any(words in note for note in settings.notes)
