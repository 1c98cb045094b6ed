"""core/chat.py on every chat template that TRL carries: each conversation is learnt as the template
itself renders it, or refused by name."""

import copy
import re
from pathlib import Path

import pytest
import trl

from core.chat import IGNORE, encode_conversation, prompt_ids, stop_tokens
from core.errors import RowError
from core.messages import as_messages, with_context

FOLDER = Path(trl.__file__).parent / "chat_templates"
# Without those of models that see pictures, which AutoModelForCausalLM does not load.
PICTURES = ("idefics3", "llava_next", "smolvlm")
TEMPLATES = sorted(
    path.stem
    for path in FOLDER.glob("*.jinja")
    if not path.stem.endswith("_training") and path.stem not in PICTURES
)
SPECIAL = re.compile(
    r"<[|｜][^<>|｜]+[|｜]>|<(?:start_of_turn|end_of_turn|bos|eos|sop)>|<\|turn>|<turn\|>|\[gMASK\]"
)
ENDS = ["<|return|>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<turn|>", "<|eot|>"]
ENDS += ["<|END_OF_TURN_TOKEN|>", "<｜end▁of▁sentence｜>"]
BEGINNINGS = ("<|begin_of_text|>", "<bos>", "<｜begin▁of▁sentence｜>")

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "Where"}},
                "required": ["city"],
            },
        },
    }
]
CALL = {
    "id": "call00001",
    "type": "function",
    "function": {"name": "get_weather", "arguments": {"city": "Oslo"}},
}
RESULT = {
    "role": "tool",
    "tool_call_id": "call00001",
    "name": "get_weather",
    "content": "sunny",
}


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


THOUGHT = "<think>\nTwo and two.\n</think>\n\nIt is 4."
KINDS = {
    "single": [user("2 + 2?"), assistant("It is 4.")],
    "multi": [user("One?"), assistant("Uno."), user("Two?"), assistant("Dos, my friend.")],
    "system": [{"role": "system", "content": "Be brief."}, user("2?"), assistant("It is 4.")],
    "thinking": [user("2 + 2?"), assistant(THOUGHT)],
    "thinking turns": [user("2 + 2?"), assistant(THOUGHT), user("Sure?"), assistant(THOUGHT)],
    "reasoning": [user("2 + 2?"), assistant("It is 4.", reasoning_content="Two and two.")],
    "tools": [user("Sun?"), assistant("", tool_calls=[CALL]), RESULT, assistant("It is sunny.")],
    "tools beside text": [
        user("Sun?"),
        assistant("Let me look.", tool_calls=[CALL]),
        RESULT,
        assistant("It is sunny."),
    ],
    "spaces": [user("  2 + 2? \n"), assistant("  It is 4. \n\n")],
    "special": [user("What is <|im_start|> for?"), assistant("It <|im_start|> begins a turn.")],
    "code": [user("Code?"), assistant("```python\nif x < 2:\n    print('a', \"b\")\n```")],
}
# Each says what is missing, or that the template's prompt is not how its answer begins.
REASONS = re.compile("leaves out|shortens|refuses|without its generation prompt")


@pytest.fixture(scope="module")
def tokenizer_of(tokenizer):
    """A function from the name of a template to a tokenizer with it, and its special tokens."""

    def load(name):
        template = (FOLDER / f"{name}.jinja").read_text()
        tok = copy.deepcopy(tokenizer)
        special = sorted(set(SPECIAL.findall(template)) - set(tok.get_vocab()))
        tok.add_special_tokens({"additional_special_tokens": special})
        tok.chat_template = template
        tok.eos_token = next((end for end in ENDS if end in template), "<|endoftext|>")
        tok.bos_token = next((b for b in BEGINNINGS if b in template), "<|im_start|>")
        return tok

    return load


def learnt_turns(tok, messages, tools):
    """[(ids of the context, target)] of each answer."""
    turns = []
    for ids, labels in encode_conversation(tok, messages, tools):
        for start in range(1, len(ids)):
            if labels[start] != IGNORE == labels[start - 1]:
                end = start
                while end < len(ids) and labels[end] != IGNORE:
                    end += 1
                turns.append((ids[:start], tok.decode(ids[start:end])))
    return turns


def check_definition(tok, rows, n, context, target):
    """The context is what a server shows, the target what the template then writes, and its end is
    where a server stops."""
    shown = tok.apply_chat_template(rows[:n], tokenize=False, add_generation_prompt=True)
    answered = tok.apply_chat_template(rows[: n + 1], tokenize=False)
    assert context == tok(shown, add_special_tokens=False).input_ids
    if answered.startswith(shown):  # TRL's version keeps the thoughts of some that do not
        written = answered[len(shown) :]
        assert written.startswith(target) or written + tok.eos_token == target
    assert tok(target, add_special_tokens=False).input_ids[-1] in stop_tokens(tok)


def outcome(tok, kind):
    """ "exact" or "refused"; fails if what is learnt is not what the template writes."""
    rows = KINDS[kind]
    tools = TOOLS if "tools" in kind else None
    messages = with_context(as_messages(copy.deepcopy(rows), "user"), {"tools": tools})
    try:
        turns = learnt_turns(tok, messages, tools)
    except RowError as error:
        assert REASONS.search(str(error))
        return "refused"
    answers = [n for n, row in enumerate(rows) if row["role"] == "assistant"]
    assert len(turns) == len(answers)
    for n, (context, target) in zip(answers, turns, strict=True):
        if not tools and kind != "reasoning":
            check_definition(tok, rows, n, context, target)
        said = rows[n]["content"].split("</think>")[-1].strip()
        assert said in target and rows[n].get("reasoning_content", "") in target
        assert all(call["function"]["name"] in target for call in rows[n].get("tool_calls", ()))
    return "exact"


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_conversation_is_learnt_as_its_template_writes_it_or_refused(tokenizer_of, name):
    tok = tokenizer_of(name)
    outcomes = {kind: outcome(tok, kind) for kind in KINDS}
    # A template whose prompt opens a thought needs one in the answers; others learn plain ones.
    prompt = tok.decode(prompt_ids(tok, [user("2 + 2?")]))
    plain = "refused" if prompt.rstrip().endswith("<think>") else "exact"
    if name == "qwen3_5_think":  # it closes an empty thought by itself
        plain = "exact"
    for kind in ("single", "multi", "spaces", "special", "code"):
        assert outcomes[kind] == plain or name.startswith("qwen3"), kind


def test_how_many_are_exact(tokenizer_of):
    outcomes = [outcome(tokenizer_of(name), kind) for name in TEMPLATES for kind in KINDS]
    assert len(outcomes) == len(TEMPLATES) * len(KINDS)
    assert outcomes.count("exact") >= 300
