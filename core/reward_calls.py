"""Calling a reward function by the names of its parameters.

TRL      function(prompts, completions, **columns) -> numbers
verl     compute_score(data_source, solution_str, ground_truth, extra_info) -> number, or
         compute_score(data_sources, solution_strs, ground_truths, extra_infos) -> numbers
others   function(prompt, completion, **columns) -> number

The processes of functions use this file too (core/function_server.py), so it imports nothing slow.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

# A function with one of these parameters takes one completion at a time.
ONE_COMPLETION = ("completion", "solution_str")
# {parameter of a function that takes one completion: of a function that takes lists}
PLURALS = {
    "prompt": "prompts",
    "completion": "completions",
    "data_source": "data_sources",
    "solution_str": "solution_strs",
    "ground_truth": "ground_truths",
    "extra_info": "extra_infos",
}
# Columns with the expected answer, if the data has no reward_model["ground_truth"] as in verl.
ANSWER_COLUMNS = ("ground_truth", "answer", "solution", "label")
# Raised by a function that reads a text as a list of messages, or messages as a text.
FORM_ERRORS = (TypeError, AttributeError, KeyError, IndexError)


class RewardCall:
    """Calls a reward function with prompts, completions and columns, each a list.

    Prompts are lists of messages and completions are texts. A function that cannot read these gets
    both as messages or both as texts, as in TRL, where it depends on the form of the data."""

    def __init__(self, function: Callable):
        self.function = function
        self.parameters = inspect.signature(function).parameters
        self.takes_one = any(name in self.parameters for name in ONE_COMPLETION)
        self.form: Callable | None = None  # the one of FORMS that the function can read

    def __call__(self, prompts: list, completions: list[str], columns: Mapping[str, Any]) -> Any:
        """What the function returns, awaited if it is async; a list of results if it takes one
        completion at a time."""
        errors = []
        for form in FORMS:
            # Once a form has worked, a later error is the function's own.
            if self.form not in (None, form):
                continue
            try:
                shown_prompts, shown_completions = form(prompts, completions)
                result = self.call(shown_prompts, shown_completions, columns)
            except FORM_ERRORS as error:
                errors.append(error)
            else:
                self.form = form
                return result
        raise errors[0]

    def call(self, prompts: list, completions: list, columns: Mapping[str, Any]) -> Any:
        results = []
        for values in self.values_by_call(prompts, completions, columns):
            args, kwargs = self.arguments(values)
            results.append(self.function(*args, **kwargs))
        results = wait_for_all(results)
        if self.takes_one:
            return [score_of(result) for result in results]
        return results[0]

    def values_by_call(
        self, prompts: list, completions: list, columns: Mapping[str, Any]
    ) -> list[dict[str, Any]]:
        """For each call of the function, the values of all possible parameter names."""
        extras = {"prompt": prompts, "completion": completions}
        for name, values in verl_values(completions, columns).items():
            if name in self.parameters or PLURALS[name] in self.parameters:
                extras[name] = values
        if not self.takes_one:
            return [{**columns, **{PLURALS[name]: extras[name] for name in extras}}]
        lists = {**columns, **extras}
        return [{name: lists[name][n] for name in lists} for n in range(len(completions))]

    def arguments(self, values: dict[str, Any]) -> tuple[list, dict[str, Any]]:
        """(args, kwargs): the values of the function's parameters; all if it has **kwargs."""
        args = []
        if self.has_own_names(values):
            args = [values.pop("prompts"), values.pop("completions")]
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in self.parameters.values()):
            return args, values
        return args, {name: values[name] for name in values if name in self.parameters}

    def has_own_names(self, values: Mapping[str, Any]) -> bool:
        """Whether the function's first two parameters are the prompts and completions under names
        of its own, as in `def reward(questions, answers, **columns)`."""
        if self.takes_one:
            return False
        kinds = [parameter.kind for parameter in self.parameters.values()]
        has_keywords = inspect.Parameter.VAR_KEYWORD in kinds
        if inspect.Parameter.POSITIONAL_ONLY in kinds:
            return True
        if inspect.Parameter.VAR_POSITIONAL in kinds[:2] and not has_keywords:
            return True  # def reward(*args)
        names = []
        for parameter in self.parameters.values():
            if parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
                names.append(parameter.name)
        if len(names) < 2:
            return False
        first, second = names[:2]
        if second == "completions":
            return first not in values
        return "completions" not in names and second not in values

    def missing(self, prompts: list, completions: list[str], columns: Mapping[str, Any]) -> list:
        """The function's parameters without a default that have no value."""
        [values] = self.values_by_call(prompts[:1], completions[:1], columns)
        args, kwargs = self.arguments(values)
        missing = []
        for parameter in list(self.parameters.values())[len(args) :]:
            is_many = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
            if parameter.default is parameter.empty and not is_many:
                missing.append(parameter.name)
        return [name for name in missing if name not in kwargs]


# -- the forms of prompts and completions ----------------------------------------------------------


def as_they_are(prompts: list, completions: list[str]) -> tuple[list, list]:
    return prompts, completions


def as_messages(prompts: list, completions: list[str]) -> tuple[list, list]:
    return prompts, [[{"role": "assistant", "content": text}] for text in completions]


def as_texts(prompts: list, completions: list[str]) -> tuple[list, list]:
    """Prompts as texts; a prompt of several messages stays a list."""
    texts = []
    for prompt in prompts:
        is_one = isinstance(prompt, list) and len(prompt) == 1
        texts.append(prompt[0]["content"] if is_one else prompt)
    return texts, completions


FORMS = (as_they_are, as_messages, as_texts)


# -- values ----------------------------------------------------------------------------------------


def verl_values(completions: list, columns: Mapping[str, Any]) -> dict[str, list]:
    """The arguments of verl's reward functions; without "ground_truth" if no column has it."""
    count = len(completions)
    values = {
        "solution_str": completions,
        "data_source": columns.get("data_source", [""] * count),
        "extra_info": columns.get("extra_info", [{}] * count),
    }
    for name in ANSWER_COLUMNS:
        if name in columns:
            values["ground_truth"] = columns[name]
            break
    for_models = columns.get("reward_model")
    if isinstance(for_models, list) and all("ground_truth" in (row or {}) for row in for_models):
        values["ground_truth"] = [row["ground_truth"] for row in for_models]
    return values


def score_of(result: Any) -> Any:
    """The score of a result: verl's functions may return {"score": number, ...}."""
    return result["score"] if isinstance(result, dict) and "score" in result else result


@functools.cache
def event_loop() -> asyncio.AbstractEventLoop:
    """One loop for all calls: a client that a function keeps between calls is bound to its loop."""
    return asyncio.new_event_loop()


def wait_for_all(results: list) -> list:
    """The results, those of async functions awaited together."""
    if not any(inspect.isawaitable(result) for result in results):
        return results

    async def wait(result):
        return await result if inspect.isawaitable(result) else result

    async def gather() -> list:
        return await asyncio.gather(*[wait(result) for result in results])

    return event_loop().run_until_complete(gather())


def to_plain(value: Any) -> Any:
    """Arrays, tensors and tuples as lists, number types as numbers. Anything else becomes the name
    of its type, for the error message."""
    if hasattr(value, "tolist"):  # NumPy, PyTorch, pandas
        return value.tolist()
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    if value is None or isinstance(value, int | float | str | dict):
        return value
    if hasattr(value, "__float__"):  # Decimal, Fraction
        return float(value)
    return f"<{type(value).__name__}>"
