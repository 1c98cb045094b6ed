"""chat.py: one answer, conversations and their commands, two models, the folder of a chain."""

import builtins
import io
import json
import shutil
import subprocess
import sys
from dataclasses import fields

import pytest
import sft
from conftest import ROOT, make_model, read_help
from rich.cells import cell_len

import chat
import core.conversation
from chain import Pipeline
from chat import ChatConfig
from common import BaseStage
from core.chat import encode_conversation, prompt_ids
from core.checkpoints import find_model_of_chain
from core.config import StageConfig
from core.conversation import Conversation, choose_sampling, stream_tokens
from core.errors import ConfigError
from core.sampling import generate, sample_completions, uniform_numbers
from core.screen import show_controls
from core.side_by_side import print_side_by_side

GREEDY = {"max_new_tokens": 12, "temperature": 0.0, "top_p": 1.0, "top_k": 0}
STOP = 2  # <|im_end|>


class Terminal(io.StringIO):
    def isatty(self):
        return True


def run_chat(monkeypatch, arguments, lines=None, piped=b""):
    """The exit status of chat.py. `lines` are typed in a terminal; an exception among them is
    raised, as Ctrl-C is."""
    typed = iter([*(lines or []), EOFError()])

    def type_line(prompt):
        line = next(typed)
        if isinstance(line, str):
            return line
        raise line

    stdin = io.TextIOWrapper(io.BytesIO(piped)) if lines is None else Terminal()
    monkeypatch.setattr(sys, "stdin", stdin)
    monkeypatch.setattr(builtins, "input", type_line)
    monkeypatch.setattr(sys, "argv", ["chat.py", *map(str, arguments)])
    try:
        chat.main()
    except SystemExit as end:
        return end.code
    return 0


@pytest.fixture
def answers(monkeypatch, tokenizer):
    """A list of answers that models give, whatever the questions. An answer is text, token ids, or
    a list of both and of exceptions to raise; beside it, the prompts that were asked."""
    scripted, prompts = [], []

    def stream(model, tokenizer, prompt, sampling, seed):
        prompts.append(tokenizer.decode(prompt))
        answer = scripted.pop(0) if scripted else "fine"
        parts = [answer, STOP] if isinstance(answer, str) else answer
        for part in parts:
            if isinstance(part, str):
                yield from tokenizer(part, add_special_tokens=False).input_ids
            elif isinstance(part, int):
                yield part
            else:
                raise part

    monkeypatch.setattr(core.conversation, "stream_tokens", stream)
    scripted_and_prompts = (scripted, prompts)
    return scripted_and_prompts


def new_conversation(model, tokenizer, **sampling):
    return Conversation("tiny", model, tokenizer, GREEDY | sampling)


def errors_in(printed):
    return [line for line in printed.splitlines() if line.startswith("error: ")]


def read_messages(path):
    return [json.loads(line)["messages"] for line in path.read_text().splitlines()]


# -- answers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("question", ["3 pm", "What is the capital of France?", "é 😀", "x"])
def test_the_streamed_text_is_that_of_greedy_decoding(model, tokenizer, question):
    conversation = new_conversation(model, tokenizer, max_new_tokens=40)
    pieces = list(conversation.ask(question))
    prompt = [{"role": "user", "content": question}]
    ((expected, has_stopped),) = generate(model, tokenizer, [prompt], 40)
    assert "".join(pieces) == conversation.messages[-1]["content"] == expected
    assert len([piece for piece in pieces if piece]) > 1
    assert bool(conversation.note) != has_stopped


def test_the_same_seed_samples_what_a_recipe_samples(model, tokenizer):
    sampling = {"max_new_tokens": 20, "temperature": 0.8, "top_p": 0.9, "top_k": 50}
    prompt = prompt_ids(tokenizer, [{"role": "user", "content": "3 pm"}])
    uniforms = uniform_numbers(1, sampling, seed=5)
    ((expected,), _) = sample_completions(model, tokenizer, [prompt], sampling, uniforms)
    tokens = list(stream_tokens(model, tokenizer, prompt, sampling, seed=5))
    assert len(tokens) == 20 and tokens[: len(expected)] == expected


def test_a_stop_token_ends_the_answer(model, tokenizer):
    calls = []

    def stop_at_the_fourth(module, inputs, logits):
        calls.append(1)
        logits[..., STOP] = 1e4 if len(calls) == 4 else -1e4
        return logits

    model.lm_head.register_forward_hook(stop_at_the_fourth)
    conversation = new_conversation(model, tokenizer)
    text = "".join(conversation.ask("hello"))
    assert conversation.note == "" and len(calls) == 4
    assert "<|im_end|>" not in text and "train" not in conversation.messages[-1]


def test_each_question_samples_anew(model, tokenizer):
    def first_two(conversation):
        conversation.start(None)
        first = "".join(conversation.ask("hello"))
        conversation.start(None)
        return first, "".join(conversation.ask("hello"))

    first, second = first_two(new_conversation(model, tokenizer, temperature=1.0))
    assert (first, second) == first_two(new_conversation(model, tokenizer, temperature=1.0))
    assert first != second


def test_a_character_of_several_tokens_is_shown_once_it_is_complete(model, tokenizer, answers):
    text = "a 😀 é 中 b"
    assert len(tokenizer(text).input_ids) > len(text)
    answers[0].append(text)
    pieces = list(new_conversation(model, tokenizer).ask("hello"))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces) and len(pieces) > 5


def test_half_a_character_at_the_end_is_shown_as_such(model, tokenizer, answers):
    first_byte = tokenizer("😀").input_ids[0]
    answers[0].append(["a", first_byte])
    assert "".join(new_conversation(model, tokenizer).ask("hello")) == "a\ufffd"


# -- one answer ------------------------------------------------------------------------------------


def test_a_pipe_gets_the_answer_alone(model_dir, tokenizer, monkeypatch, capsys):
    arguments = [model_dir, "--temperature=0", "--max_new_tokens=8"]
    assert run_chat(monkeypatch, arguments, piped=b"3 pm\n") == 0
    prompt = [{"role": "user", "content": "3 pm"}]
    ((expected, _),) = generate(make_model(tokenizer), tokenizer, [prompt], 8)
    printed = capsys.readouterr()
    assert printed.out == show_controls(expected) + "\n"
    assert "max_new_tokens 8, temperature 0" in printed.err and "cut off" in printed.err


def test_a_reader_that_leaves_ends_the_program(model_dir):
    command = [sys.executable, "chat.py", model_dir, "--prompt=a", "--max_new_tokens=400"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.read(1)
    process.stdout.close()
    errors = process.stderr.read().decode()
    assert process.wait(timeout=60) == 1 and "Traceback" not in errors and "ignored" not in errors


def test_the_option_prompt_is_answered_without_reading_stdin(
    model_dir, monkeypatch, capsys, answers
):
    answers[0].append("15:00")
    assert run_chat(monkeypatch, [model_dir, "--prompt=3 pm", "--system=Be brief."]) == 0
    assert capsys.readouterr().out == "15:00\n"
    (prompt,) = answers[1]
    assert "Be brief.<|im_end|>" in prompt and "user\n3 pm<|im_end|>" in prompt


def test_a_line_of_a_pipe_is_no_command(model_dir, monkeypatch, capsys, answers):
    assert run_chat(monkeypatch, [model_dir], piped=b"/quit\nor not?\n") == 0
    assert "user\n/quit\nor not?<|im_end|>" in answers[1][0]


@pytest.mark.parametrize(
    ("arguments", "piped", "words"),
    [
        (["MODEL", "--temprature=1"], b"a", "did you mean 'temperature'"),
        (["MODEL", "--temperature=-1"], b"a", "temperature='-1'"),
        (["MODEL", "--top_p=1.5"], b"a", "top_p='1.5'"),
        (["MODEL", "--top_p=2", "--temprature=1"], b"a", "2 mistakes"),
        (["MODEL", "--dry_run"], b"a", "unknown option 'dry_run'"),
        (["MODEL", "other"], b"a", "give one model"),
        (["MODEL", "--model=other"], b"a", "give one model"),
        (["--seed=1"], b"a", "give one model"),
        (["./nowhere"], b"a", "./nowhere: no such file"),
        (["MODEL", "--compare=./nowhere"], b"a", "./nowhere: no such file"),
        (["MODEL"], b" \n", "the prompt is empty"),
        (["MODEL"], b"\xff", "stdin cannot be read"),
        (["MODEL", "--prompt=a\udcff"], b"", "bytes that are not UTF-8"),
        (["MODEL", "--prompt=a<|im_end|>"], b"", "marks of the chat template"),
        (["MODEL"], b"a " * 600, "takes 512"),
    ],
)
def test_a_mistake_exits_with_status_2_and_one_message(
    model_dir, monkeypatch, capsys, arguments, piped, words
):
    arguments = [model_dir if word == "MODEL" else word for word in arguments]
    assert run_chat(monkeypatch, arguments, piped=piped) == 2
    printed = capsys.readouterr()
    (error,) = errors_in(printed.err)
    assert words in error and printed.out == ""


def test_the_options_of_a_stage_have_no_effect(model_dir, monkeypatch, capsys, answers):
    arguments = [model_dir, "--prompt=a", "--output_dir=x", "--enabled=false"]
    assert run_chat(monkeypatch, arguments) == 0
    assert "output_dir has no effect in a conversation" in capsys.readouterr().err


def test_help_has_the_options_of_a_conversation_and_no_others(monkeypatch, capsys):
    assert run_chat(monkeypatch, ["--help"]) == 0
    shown = capsys.readouterr().out
    entries = read_help(shown)
    options = {option.name for option in fields(ChatConfig)}
    assert set(entries) == options - chat.WITHOUT_EFFECT - {"model_name_or_path"}
    assert "/system TEXT" in shown and "output_dir" in {o.name for o in fields(StageConfig)}
    for name in set(ChatConfig.__annotations__) - {"everyday"}:
        assert len(entries[name][1].partition("(default")[0].strip()) > 5, name


# -- what is shown ---------------------------------------------------------------------------------

NASTY = "\x1b[31mred\x1b]0;title\x07\r\b\x9b2J\x00\u202eabc\ttab\nline"
HARMLESS = r"\x1b[31mred\x1b]0;title\x07\r\x08\x9b2J\x00\u202eabc" + "\ttab\nline"


@pytest.mark.parametrize("lines", [None, ["hello"]], ids=["pipe", "terminal"])
def test_control_characters_are_shown_and_not_sent(model_dir, monkeypatch, capsys, answers, lines):
    answers[0].append(NASTY)
    assert run_chat(monkeypatch, [model_dir], lines, piped=b"hello") == 0
    assert capsys.readouterr().out.rstrip("\n") == HARMLESS


@pytest.mark.parametrize("width", [43, 20])
def test_columns_are_as_wide_as_the_terminal_and_lose_nothing(monkeypatch, capsys, width):
    monkeypatch.setenv("COLUMNS", str(width))
    left = "One two three four five six.\n\n    code\n" + "x" * 50
    right = "中文字" * 10 + " [b]😀[/b]\x1b"
    print_side_by_side(["a/long/name/of/a/folder", "b"], [left, right])
    lines = capsys.readouterr().out.splitlines()
    assert {cell_len(line) for line in lines} == {width}

    def column(index):
        cells = [line.replace("┃", "│").split("│") for line in lines]
        return [cell[index] for cell in cells if len(cell) == 4]

    lefts, rights = column(1), column(2)
    assert "".join("".join(lefts).split()) == "".join(("a/long/name/of/a/folder" + left).split())
    assert "".join("".join(rights).split()) == "b" + "中文字" * 10 + r"[b]😀[/b]\x1b"
    assert any(cell.startswith("     co") for cell in lefts)


# -- conversations ---------------------------------------------------------------------------------


def test_a_conversation_keeps_its_turns_until_a_command_says_otherwise(
    model_dir, monkeypatch, capsys, answers
):
    answers[0].extend(["one", "two", "three", "four", "five"])
    lines = ["first", "second", "/reset", "third", "/system Be kind.", "fourth", "/reset", "fifth"]
    assert run_chat(monkeypatch, [model_dir, "--system=Be brief."], lines) == 0
    first, second, third, fourth, fifth = answers[1]
    assert "first" in second and "one<|im_end|>" in second and second.count("Be brief.") == 1
    assert "first" not in third and "Be brief." in third
    assert "third" not in fourth and "Be kind." in fourth and "Be brief." not in fourth
    assert "fourth" not in fifth and "Be kind." in fifth
    assert capsys.readouterr().out == "one\ntwo\nthree\nfour\nfive\n\n"


def test_without_a_text_the_system_prompt_goes(model_dir, monkeypatch, capsys, answers):
    run_chat(monkeypatch, [model_dir, "--system=Be brief."], ["/system", "hello"])
    assert "system" not in answers[1][0] and "system prompt: none" in capsys.readouterr().err


def test_an_unknown_command_is_not_sent(model_dir, monkeypatch, capsys, answers):
    lines = ["/sytem Be kind.", "/help", " /etc/hosts?", "", "  ", "/quit", "never"]
    assert run_chat(monkeypatch, [model_dir], lines) == 0
    printed = capsys.readouterr()
    assert len(errors_in(printed.err)) == 2
    assert printed.err.count("/save FILE") == 3 and printed.out == "fine\n"
    (prompt,) = answers[1]
    assert "user\n/etc/hosts?<|im_end|>" in prompt


def test_ctrl_c_stops_the_answer_and_leaves_no_conversation(
    model_dir, monkeypatch, capsys, answers
):
    answers[0].extend([["half", KeyboardInterrupt()], "whole"])
    lines = ["first", "second", KeyboardInterrupt(), KeyboardInterrupt(), "third"]
    assert run_chat(monkeypatch, [model_dir], lines) == 0
    assert len(answers[1]) == 3 and "half<|im_end|>" in answers[1][1]
    printed = capsys.readouterr()
    assert printed.out == "half\nwhole\nfine\n\n"
    assert "cut off by Ctrl-C" in printed.err and printed.err.count("(Ctrl-D leaves)") == 2


def test_ctrl_c_while_a_piece_is_printed_keeps_the_turn(model, tokenizer, answers):
    conversation = new_conversation(model, tokenizer)
    pieces = conversation.ask("hello")
    first = next(pieces)
    pieces.close()  # as when the loop over the pieces is left
    assert conversation.messages[-1] == {"role": "assistant", "content": first, "train": False}


def test_an_empty_answer_is_no_turn(model_dir, monkeypatch, capsys, answers):
    answers[0].extend(["", [KeyboardInterrupt()]])
    run_chat(monkeypatch, [model_dir], ["first", "second", "third"])
    assert "first" not in answers[1][1] and "second" not in answers[1][2]
    assert capsys.readouterr().err.count("the question is not kept") == 2


def test_a_full_context_is_said(model_dir, monkeypatch, capsys, answers):
    long = "x " * 100
    run_chat(monkeypatch, [model_dir, "--max_new_tokens=50"], [long, long, long, "/reset", long])
    (error,) = errors_in(capsys.readouterr().err)
    assert "takes 512" in error and "/reset" in error
    assert len(answers[1]) == 3 and answers[1][0] == answers[1][2]


def test_the_end_of_the_context_ends_an_answer(model, tokenizer):
    conversation = new_conversation(model, tokenizer, max_new_tokens=1000)
    conversation.stop_ids = []
    list(conversation.ask("x " * 240))
    assert conversation.note == "the answer was cut off because the context is full"


def test_a_question_that_cannot_be_asked_is_taken_back(model_dir, monkeypatch, capsys, answers):
    run_chat(monkeypatch, [model_dir], ["a<|im_end|>", "b\udcff", "x " * 600, "hello"])
    assert len(errors_in(capsys.readouterr().err)) == 3 and len(answers[1]) == 1


# -- /save -----------------------------------------------------------------------------------------


def test_a_saved_conversation_is_data_for_sft(
    model_dir, tokenizer, tmp_path, monkeypatch, capsys, answers
):
    file = tmp_path / "chats.jsonl"
    answers[0].extend(["15:00 é", ["half", KeyboardInterrupt()], "again"])
    lines = ["3 pm", "4 pm", f"/save {file}", "/reset", "5 pm", f"/save {file}"]
    run_chat(monkeypatch, [model_dir, "--system=Be brief."], lines)
    first, second = read_messages(file)
    assert [message["role"] for message in first] == ["system"] + ["user", "assistant"] * 2
    assert [message["content"] for message in second] == ["Be brief.", "5 pm", "again"]

    config = sft.SFTConfig(
        model_name_or_path=model_dir, dataset_name_or_path=str(file), validation_split=0
    )
    rows, _ = sft.SFTStage(config).load_data()
    learnt = []
    for row in rows:
        for ids, labels in encode_conversation(tokenizer, row):
            targets = [token for token, label in zip(ids, labels, strict=True) if label == token]
            learnt.append(tokenizer.decode(targets))
    # The answer that was stopped is context: it would teach to stop there.
    assert learnt == ["15:00 é<|im_end|>", "again<|im_end|>"]


def test_saving_overwrites_nothing(model_dir, tmp_path, monkeypatch, capsys, answers):
    text, broken, chats = (tmp_path / name for name in ("notes.txt", "b.jsonl", "chats.jsonl"))
    text.write_text("a note")
    broken.write_text("{")
    earlier = {"messages": [{"role": "user", "content": "a"}]}
    chats.write_text(json.dumps(earlier))  # without a line break at its end
    paths = [text, broken, chats, tmp_path / "no/folder.jsonl"]
    lines = [f"/save {chats}", "hello", *(f"/save {path}" for path in paths), "/save"]
    run_chat(monkeypatch, [model_dir], lines)
    errors = errors_in(capsys.readouterr().err)
    assert len(errors) == 5 and "no answer yet" in errors[0]
    assert text.read_text() == "a note" and broken.read_text() == "{"
    kept, added = read_messages(chats)
    assert kept == earlier["messages"]
    assert added[-1] == {"role": "assistant", "content": "fine"}


# -- two models ------------------------------------------------------------------------------------


def test_two_models_answer_side_by_side_each_in_its_own_conversation(
    model_dir, tmp_path, monkeypatch, capsys, answers
):
    monkeypatch.setenv("COLUMNS", "400")
    other = shutil.copytree(model_dir, tmp_path / "other")
    file = tmp_path / "chats.jsonl"
    answers[0].extend(["old one", "new one", ["half", KeyboardInterrupt()], "new two"])
    lines = ["first", "second", "x " * 600, "third", f"/save {file}"]
    assert run_chat(monkeypatch, [model_dir, f"--compare={other}"], lines) == 0
    printed = capsys.readouterr()
    shown = [[cell.strip() for cell in line[1:-1].split("│")] for line in printed.out.splitlines()]
    assert shown.index(["old one", "new one"]) < shown.index(["half", "new two"])
    heading = next(line for line in printed.out.splitlines() if model_dir in line)
    assert heading.index(str(other)) < heading.index(model_dir)
    # Ctrl-C stops the answer of one model; the other goes on.
    assert f"({other}: the answer was cut off by Ctrl-C)" in printed.err
    of_other, of_model = answers[1][-2:]
    assert "half<|im_end|>" in of_other and "new one" not in of_other
    assert "new two<|im_end|>" in of_model and "old one" not in of_model
    assert len(errors_in(printed.err)) == 1 and len(answers[1]) == 6
    (saved,) = read_messages(file)
    contents = [message["content"] for message in saved if message["role"] == "assistant"]
    assert contents == ["new one", "new two", "fine"]


def test_what_one_model_cannot_take_is_put_to_none(
    model_dir, tokenizer, tmp_path, monkeypatch, capsys, answers
):
    small = tmp_path / "small"
    make_model(tokenizer, max_position_embeddings=64).save_pretrained(small)
    tokenizer.save_pretrained(small)
    for arguments in ([model_dir, f"--compare={small}"], [small, f"--compare={model_dir}"]):
        assert run_chat(monkeypatch, [*arguments, "--prompt=" + "x " * 100]) == 2
    assert answers[1] == []


# -- models ----------------------------------------------------------------------------------------


class FailingStage(BaseStage):
    stage_name = "failing"

    def prepare_model_and_tokenizer(self, model, tokenizer, previous_result=None):
        return model, tokenizer

    def train(self, model, tokenizer):
        raise RuntimeError("broken")


@pytest.fixture(scope="module")
def chain_runs(model_dir, tmp_path_factory):
    """(folder of a finished chain, folder of one whose second stage failed)."""
    folder = tmp_path_factory.mktemp("chains")
    row = '{"question": "3 pm", "answer": "15:00"}\n'
    (folder / "data.jsonl").write_text(row * 8)
    options = {"data": str(folder / "data.jsonl"), "max_steps": 1, "validation_split": 0}
    Pipeline.register_stage("failing", FailingStage)
    for name, stages in (("finished", ["sft"]), ("failed", ["sft", "failing"])):
        values = {
            "model_name_or_path": model_dir,
            "output_dir": str(folder / name),
            "stages": stages,
            "stage_configs": {"sft": options},
            "log_level": "error",
        }
        Pipeline.from_dict(values).run()
    Pipeline.registry.clear()
    return folder / "finished", folder / "failed"


def test_the_folder_of_a_chain_stands_for_its_model(chain_runs, tmp_path):
    finished, failed = chain_runs
    assert find_model_of_chain(str(finished)) == str(finished / "final")
    assert find_model_of_chain(str(failed)) == str(failed / "01_sft")
    assert find_model_of_chain(str(finished / "01_sft")) == str(finished / "01_sft")
    assert find_model_of_chain("org/name") == "org/name"

    moved = shutil.copytree(failed, tmp_path / "moved")
    shutil.copytree(finished / "final", moved / "final")  # of an earlier run
    shutil.copytree(moved / "01_sft", moved / "02_failing", dirs_exist_ok=True)
    assert find_model_of_chain(str(moved)) == str(moved / "01_sft")
    (moved / "01_sft/model.safetensors").unlink()
    with pytest.raises(ConfigError, match="has no model yet"):
        find_model_of_chain(str(moved))
    (moved / "pipeline.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        find_model_of_chain(str(moved))


def test_a_chain_and_the_adapter_in_it_answer_alike(chain_runs, monkeypatch, capsys):
    finished, _ = chain_runs
    texts = []
    for folder in (finished, finished / "01_sft/adapter"):
        arguments = [folder, "--prompt=3 pm", "--temperature=0", "--max_new_tokens=8"]
        assert run_chat(monkeypatch, arguments) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != "\n"


def test_a_model_has_sampling_options_of_its_own(model, caplog):
    config = ChatConfig(model_name_or_path="x", top_k=5)
    defaults = {"max_new_tokens": 512, "temperature": 0.7, "top_p": 1.0, "top_k": 5}
    assert choose_sampling(config, model.generation_config) == defaults
    model.generation_config.update(temperature=0.6, top_p=0.9, top_k=20, repetition_penalty=1.05)
    with caplog.at_level("WARNING", "recipes"):
        sampling = choose_sampling(config, model.generation_config)
    assert sampling == defaults | {"temperature": 0.6, "top_p": 0.9}
    assert "repetition_penalty=1.05 is not applied" in caplog.text
    greedy = ChatConfig(model_name_or_path="x", temperature=0)
    assert choose_sampling(greedy, model.generation_config)["temperature"] == 0
