"""Calls to another model, a judge or a teacher: one run here, or a server with OpenAI's protocol.

Every answer is kept in OUT/calls.jsonl, so a run that is repeated or resumed asks nothing twice."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from core.chat import prompt_ids
from core.config import Count, ModelConfig, Natural, NonNegative, Positive, Share, StageConfig
from core.errors import ConfigError, as_config_error
from core.fingerprints import file_identity
from core.hub import check_model
from core.logprobs import answer_logits, collate_answers
from core.model_config import context_length
from core.runtime import is_main_process, logger, to_device
from core.sampling import decode_completions, sample_completions, uniform_numbers

PROVIDERS = {  # kind: (base URL, environment variable of the key)
    "openai": ("https://api.openai.com/v1", "OPENAI_API_KEY"),
    "anthropic": ("https://api.anthropic.com/v1", "ANTHROPIC_API_KEY"),
}
MAX_ATTEMPTS = 8  # for a call whose answer arrives but is none
RETRIED_STATUSES = (408, 409, 429)  # beside 5xx; retried by the openai client
# What reading the body of something else than an answer raises: half an answer, a proxy's page.
NOT_AN_ANSWER = (ValueError, LookupError, TypeError, AttributeError)
# Options that decide what a model run here answers.
LOCAL_MODEL_OPTIONS = (
    "seed",
    "instruction_template",
    "torch_dtype",
    "use_4bit",
    "use_8bit",
    "revision",
)
CONTINUE = "Answers received so far are kept; run the same command to continue"

Request = tuple[list[dict], int]  # messages, and a number that tells equal messages apart


class LLMClientError(RuntimeError):
    """The judge or teacher can no longer be queried: it refuses, a limit is reached, or too many
    answers are missing."""


@dataclass
class LLMClientConfig(StageConfig):
    """Options of every stage that queries another model."""

    # calls to another model
    max_calls: Natural = 0  # maximum number of API calls, counted across restarts; 0: no limit
    max_cost: NonNegative = 0.0  # maximum dollars, counted across restarts; 0: no limit
    input_price: NonNegative = 0.0  # dollars per million input tokens
    output_price: NonNegative = 0.0  # dollars per million output tokens
    max_missing: Share = 0.1  # stop if a larger fraction of answers is missing or unreadable
    concurrency: Count = 8  # concurrent API calls; batch size of a model run here
    call_timeout: Positive = 120.0  # seconds to wait for an answer of the API

    def validate(self) -> None:
        super().validate()
        if self.max_cost and not (self.input_price or self.output_price):
            raise ConfigError(
                "max_cost needs input_price and output_price, in dollars per million tokens"
            )
        for name in vars(self):
            if name.endswith("_base_url"):
                self.validate_role(name.removesuffix("_base_url"))

    def validate_role(self, role: str) -> None:
        """Check the options that begin with `role`: "teacher" or "feedback"."""
        kind = getattr(self, f"{role}_model_type")
        key_variable = getattr(self, f"{role}_api_key")
        # Checked even if no call is made in the end: the option is written to files in any case.
        if key_variable and not os.environ.get(key_variable):
            raise ConfigError(
                f"{role}_api_key names the environment variable that holds the key. A key itself "
                "is refused: options are written to files and shown in the list of processes"
            )
        is_server = kind == "api" or kind in PROVIDERS
        server_options = f"{role}_base_url {role}_api_key max_calls max_cost call_timeout"
        why = f"with {role}_model_type={kind}: it is for servers"
        self.note_unread(not is_server, server_options, why)


class LLMClient:
    """Another model: run here, from a folder, hub name or .gguf file; or behind a server.

    `kind` api, openai or anthropic is a server at `url`, whose key is in the environment variable
    `key_variable`; any other kind is run here, loaded by `load_model(config) -> (model,
    tokenizer)`. An answer is appended to OUT/calls.jsonl as soon as it arrives, under a hash of
    model, messages, parameters and prompt version; a question with an answer in that file is not
    asked again."""

    def __init__(
        self,
        config: LLMClientConfig,
        role: str,
        path: str,
        kind: str,
        url: str | None = None,
        key_variable: str | None = None,
        load_model: Callable | None = None,
    ):
        default_url, default_variable = PROVIDERS.get(kind, (None, None))
        self.config = config
        self.role = role
        self.path = path
        self.kind = kind
        self.remote = kind == "api" or kind in PROVIDERS
        self.url = url or default_url
        self.key_variable = key_variable or default_variable
        self.secret = os.environ.get(self.key_variable or "", "")
        self.load_model = load_model
        self.local: Any = None  # (model, tokenizer)
        self.server: Any = None  # an openai.OpenAI
        # Every process writes a file of its own.
        suffix = "" if is_main_process() else f"-{os.environ['RANK']}"
        self.calls_file = Path(config.output_dir, f"calls{suffix}.jsonl")
        self.figures: Counter = Counter()  # what `report` returns
        self.last_problem = ""  # why the last missing answer is missing
        self.refusal = ""  # why the server cannot be used at all
        self.halted = False  # no further call is made

    # -- checks ------------------------------------------------------------------------------------

    def check(self) -> None:
        """Check what can be known before any model is loaded; raises ConfigError."""
        if not self.path:
            raise ConfigError(
                f"{self.role}_model_path is missing: give a folder, hub name or .gguf file, "
                "or the model's name on the server"
            )
        if not self.remote:
            check_model(self.path)
            return
        self.check_key()
        self.check_url()

    def check_key(self) -> None:
        """Check the key without printing it. The variable's name is printed only if we know it: it
        may be a key."""
        if not self.key_variable or re.fullmatch("[!-~]+", self.secret):
            return
        problem = "is not set"
        if self.secret:
            problem = "has a space, a line break or a letter beyond ASCII in it"
        known_variables = [variable for _, variable in PROVIDERS.values()]
        name = f" {self.key_variable}" if self.key_variable in known_variables else ""
        raise ConfigError(
            f"{self.role}_api_key names the environment variable that holds the key, "
            f"and{name} {problem}"
        )

    def check_url(self) -> None:
        """Check that the URL holds no secret and that something answers there."""
        option = f"{self.role}_base_url"
        url = self.url or ""
        if not re.match("https?://", url):
            raise ConfigError(
                f"{option} is the address of the server, for example http://localhost:8000/v1"
            )
        if re.search(r"//[^/]*@|[?]", url):
            kind = "query" if "?" in url else "password"
            raise ConfigError(
                f"{option} has a {kind} in it; name its environment variable by {self.role}_api_key"
            )
        try:
            urllib.request.urlopen(url, timeout=10).close()
        except urllib.error.HTTPError:
            return  # a status is an answer
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise ConfigError(f"{option}={url} does not answer: {error}") from None

    # -- asking ------------------------------------------------------------------------------------

    def ask(
        self,
        what: str,
        requests: Sequence[Request],
        sampling: Mapping,
        version: str,
        parse: Callable[[str], Any] | Sequence[Callable],
        choices: Sequence[str] = (),
    ) -> list:
        """`parse(answer)` for each request; None if there is no answer, or if `parse` returns None.

        `parse` is one function, or one for each request. A request is (messages, number); `number`
        tells several answers to equal messages apart. Temperature 0 is greedy; `version` is that of
        the prompts. With `choices` a model run here answers by their probabilities, as JSON.

        Raises LLMClientError if too many answers are missing, a limit is reached, or the server
        refuses."""
        # 1. Which answers are kept from before, and which are wanted?
        answers = self.read_calls()
        keys = []
        for messages, number in requests:
            keys.append(self.key([messages, number, dict(sampling), version, list(choices)]))
        wanted = {}
        for key, request in zip(keys, requests, strict=True):
            if key not in answers:
                wanted[key] = request
        num_known = len(requests) - len(wanted)
        logger.info("%s: %d answers, %d of them known from before", what, len(requests), num_known)
        self.figures.update(calls_cached=len(set(keys)) - len(wanted))

        # 2. Get those that the limits allow; each is kept as soon as it arrives.
        todo = self.within_limits(wanted, answers)
        max_failures = self.config.max_missing * len(requests)
        with contextlib.closing(self.answer(todo, sampling, choices)) as new_answers:
            progress = tqdm(new_answers, desc=what, total=len(todo), disable=None)
            spent = self.collect(progress, answers, max_failures)

        # 3. Stop where no repetition helps; else read the texts.
        is_complete = all(key in answers for key in keys)
        self.raise_if_stopped(spent, is_complete, calls_left_out=len(todo) < len(wanted))
        texts = [answers[key]["text"] if key in answers else None for key in keys]
        return self.parse_texts(what, texts, parse)

    def within_limits(self, wanted: dict[str, Request], answers: dict[str, dict]) -> dict:
        """The requests that max_calls and max_cost still allow."""
        if 0 < self.config.max_cost < self.spent(answers):
            return {}
        if not self.remote or not self.config.max_calls:
            return wanted
        calls_left = max(0, self.config.max_calls - len(answers))
        return dict(list(wanted.items())[:calls_left])

    def answer(
        self, todo: Mapping[str, Request], sampling: Mapping, choices: Sequence[str]
    ) -> Generator[tuple[str, dict | None], None, None]:
        """Yield (key, answer, or None if it is missing) for each request, as they come."""
        if not todo:
            return
        if self.remote:
            yield from self.call_server(todo, sampling)
        else:
            yield from self.run_here(todo, sampling, choices)

    def collect(
        self,
        new_answers: Iterable[tuple[str, dict | None]],
        answers: dict[str, dict],
        max_failures: float,
    ) -> float:
        """Write new answers to OUT/calls.jsonl and add them to `answers`, until a limit halts the
        calls; returns the dollars that all answers cost."""
        spent = self.spent(answers)
        failures = 0
        self.halted = False
        self.refusal = ""
        with open(self.calls_file, "a", encoding="utf-8") as file:
            for key, answer in new_answers:
                if answer is None:
                    failures += 1
                    # More are missing than allowed, and that will not change any more.
                    self.halted |= failures > max_failures
                    continue
                line = {"key": key, "role": self.role, **answer}
                # Flushed line by line: an answer that was paid for survives a crash.
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                file.flush()
                answers[key] = answer
                tokens_in, tokens_out = answer["tokens_in"], answer["tokens_out"]
                self.figures.update(calls=1, tokens_in=tokens_in, tokens_out=tokens_out)
                spent += self.spent({key: answer})
                self.halted |= 0 < self.config.max_cost < spent
                # A cost that cannot be computed cannot be limited.
                if self.has_prices() and not tokens_in:
                    self.refusal = "does not report token usage; set the prices to 0"
                    self.halted = True
        return spent

    def raise_if_stopped(self, spent: float, is_complete: bool, calls_left_out: bool) -> None:
        """Raise LLMClientError if the server refused, or if a limit left requests without an
        answer."""
        config = self.config
        if self.refusal:
            raise LLMClientError(f"{self.url} {self.refusal}. {CONTINUE}")
        if 0 < config.max_cost < spent and not is_complete:
            raise LLMClientError(
                f"max_cost={config.max_cost:g} is reached: {spent:.2f} dollars. "
                f"{CONTINUE} with a higher limit"
            )
        if calls_left_out:
            raise LLMClientError(
                f"max_calls={config.max_calls} is reached. {CONTINUE} with a higher limit"
            )

    def parse_texts(
        self, what: str, texts: list[str | None], parse: Callable | Sequence[Callable]
    ) -> list:
        """What `parse` makes of each text, None if it is missing; warns about those that are
        missing.

        Raises LLMClientError if there are more of them than `max_missing` allows."""
        parsers = [parse] * len(texts) if callable(parse) else parse
        values = []
        unreadable = []
        for text, parser in zip(texts, parsers, strict=True):
            value = None if text is None else parser(text)
            values.append(value)
            if text is not None and value is None:
                unreadable.append(text)

        absent = texts.count(None)
        missing = absent + len(unreadable)
        self.figures.update(missing=missing)
        if not missing:
            return values
        message = f"{what}: {missing} of {len(texts)} missing: {absent} without an answer"
        if self.last_problem:
            message += f" ({self.last_problem})"
        if unreadable:
            example = unreadable[0][-160:]
            message += f", {len(unreadable)} that cannot be read, such as {example!r}"
        if missing > self.config.max_missing * len(texts):
            raise LLMClientError(
                f"{message}. That is more than max_missing={self.config.max_missing:g}. {CONTINUE}"
            )
        logger.warning(message)
        return values

    # -- kept answers ------------------------------------------------------------------------------

    def key(self, request: list) -> str:
        """The hash under which the answer to a request is kept."""
        # A server's model is known by its name; one run here by its files and how it is loaded.
        local_model = []
        if not self.remote:
            options = [vars(self.config).get(name) for name in LOCAL_MODEL_OPTIONS]
            local_model = [file_identity(Path(self.path)), *options]
        identity = [self.role, self.path, self.url, local_model, *request]
        text = json.dumps(identity, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def read_calls(self) -> dict[str, dict]:
        """{key: answer} of this role from OUT/calls.jsonl and the files of other processes.

        A crash may cut off the last line of our file: it is removed. In other files it may be about
        to be written."""
        self.calls_file.touch()
        answers = {}
        for file in self.calls_file.parent.glob("calls*.jsonl"):
            content = file.read_bytes()
            end = content.rfind(b"\n") + 1
            if file == self.calls_file:
                os.truncate(file, end)
            for line in content[:end].splitlines():
                answer = json.loads(line)
                if answer["role"] == self.role:
                    answers[answer.pop("key")] = answer
        return answers

    def has_prices(self) -> bool:
        return bool(self.config.input_price or self.config.output_price)

    def spent(self, answers: Mapping[str, dict]) -> float:
        """Dollars that the answers cost; those of a model run here cost none."""
        total = 0.0
        if not self.remote:
            return total
        for answer in answers.values():
            total += answer["tokens_in"] * self.config.input_price
            total += answer["tokens_out"] * self.config.output_price
        return total / 1e6

    def report(self) -> dict[str, float]:
        """{"feedback_calls", ...}: calls made, answers known from before, missing answers; tokens;
        dollars."""
        names = ("calls", "calls_cached", "missing", "tokens_in", "tokens_out")
        metrics = {name: float(self.figures[name]) for name in names}
        if self.has_prices():
            metrics["cost"] = self.spent(self.read_calls())
        return {f"{self.role}_{name}": value for name, value in metrics.items()}

    # -- a server ----------------------------------------------------------------------------------

    def call_server(
        self, todo: Mapping[str, Request], sampling: Mapping
    ) -> Iterator[tuple[str, dict | None]]:
        """Yield (key, answer, or None if it is missing) in the order in which answers arrive."""
        import openai

        if self.server is None:
            # It retries lost connections, timeouts, RETRIED_STATUSES, 5xx, and heeds Retry-After.
            self.server = openai.OpenAI(
                api_key=self.secret or "none",
                base_url=self.url,
                max_retries=8,
                timeout=self.config.call_timeout,
            )
        # OpenAI's newer models accept only the first name, many other servers only the second.
        limit = "max_completion_tokens" if self.kind == "openai" else "max_tokens"
        options = {
            "model": self.path,
            "temperature": sampling["temperature"],
            limit: sampling["max_new_tokens"],
        }
        if sampling["top_p"] < 1:
            options["top_p"] = sampling["top_p"]

        pool = ThreadPoolExecutor(self.config.concurrency)
        try:
            under_way: dict[Future, str] = {}
            left = deque(todo.items())
            while left or under_way:
                # A call begins after earlier answers are counted: else many would exceed a limit.
                while left and len(under_way) < self.config.concurrency:
                    key, (messages, _) = left.popleft()
                    under_way[pool.submit(self.call, messages, options)] = key
                done, _ = wait(under_way, return_when=FIRST_COMPLETED)
                for future in done:
                    yield under_way.pop(future), future.result()
        finally:
            self.halted = True  # calls under way are not repeated
            pool.shutdown(wait=False, cancel_futures=True)

    def call(self, messages: list[dict], options: dict) -> dict | None:
        """One question to the server: {"text", "tokens_in", "tokens_out"}, or None if the answer is
        missing.

        The openai client does not retry a status 200 whose body is no answer, so this is done here.
        A status that it does not retry either is a refusal, and ends all calls."""
        import openai

        for attempt in range(MAX_ATTEMPTS):
            if self.halted:
                return None
            try:
                create = self.server.chat.completions.with_raw_response.create
                response = create(messages=messages, **options)
                answer = parse_answer(self.without_secret(response.text))
            except NOT_AN_ANSWER as error:
                self.last_problem = f"not an answer: {str(error)[:200]}"
                time.sleep(min(8, 0.5 * 2**attempt))
            except openai.APIStatusError as error:
                self.note_status(error)
                return None
            except openai.APIConnectionError as error:
                self.last_problem = str(error.__cause__ or error)
                return None
            else:
                if answer["text"] is None:
                    self.last_problem = "an answer has no text; it is kept and not asked for again"
                return answer
        return None

    def note_status(self, error: Any) -> None:
        """Note the reason in an error status; halt all calls if a retry cannot help."""
        # error.message is empty unless the body has the form of OpenAI's errors.
        body = " ".join(self.without_secret(error.response.text).split())
        self.last_problem = f"{error.status_code}: {body[:300] or error.message}"
        if error.status_code < 500 and error.status_code not in RETRIED_STATUSES:
            self.refusal = f"refuses: {self.last_problem}"
            self.halted = True

    def without_secret(self, text: str) -> str:
        """The text without the key, which a server may send back."""
        # Shorter values are no real keys, and would be found in ordinary words.
        return text.replace(self.secret, "***") if len(self.secret) > 7 else text

    # -- a model run here --------------------------------------------------------------------------

    def run_here(
        self, todo: Mapping[str, Request], sampling: Mapping, choices: Sequence[str]
    ) -> Iterator[tuple[str, dict | None]]:
        """Yield (key, answer, or None if the prompt is too long) from a model run here."""
        model, tokenizer = self.load()
        with as_config_error(f"model {self.path}: its chat template cannot take a prompt"):
            ids = {key: prompt_ids(tokenizer, messages) for key, (messages, _) in todo.items()}
        longest = context_length(model.config)
        if not choices:
            longest -= sampling["max_new_tokens"]

        # Similar lengths in a batch: little padding.
        sorted_keys = sorted(ids, key=lambda key: len(ids[key]))
        for start in range(0, len(sorted_keys), self.config.concurrency):
            batch_keys = sorted_keys[start : start + self.config.concurrency]
            for key in batch_keys:
                if len(ids[key]) > longest:
                    self.last_problem = f"longer than the {longest} tokens that it has room for"
                    yield key, None
            usable_keys = [key for key in batch_keys if len(ids[key]) <= longest]
            if not usable_keys:
                continue

            prompts = [ids[key] for key in usable_keys]
            if choices:
                texts = [json.dumps(row) for row in self.choice_probabilities(prompts, choices)]
                counts = [1] * len(texts)
            else:
                seeds = [self.request_seed(todo[key]) for key in usable_keys]
                completions = self.sample(prompts, sampling, seeds)
                texts, _ = decode_completions(tokenizer, completions)
                counts = [len(completion) for completion in completions]
            for key, text, count in zip(usable_keys, texts, counts, strict=True):
                yield key, {"text": text, "tokens_in": len(ids[key]), "tokens_out": count}

    def load(self) -> tuple:
        """(model, tokenizer), to be run here."""
        if self.local is None:
            model, tokenizer = self.load_model(ModelConfig(model_name_or_path=self.path))
            self.local = (model.requires_grad_(False).eval(), tokenizer)
        return self.local

    def request_seed(self, request: Request) -> int:
        """A seed that depends on the request alone, so the batch does not change the answer."""
        text = json.dumps([self.config.seed, *request])
        digest = hashlib.sha256(text.encode()).hexdigest()
        return int(digest[:12], 16)

    def sample(
        self, prompts: list[list[int]], sampling: Mapping, seeds: list[int]
    ) -> list[list[int]]:
        """Token ids of an answer to each prompt."""
        model, tokenizer = self.local
        sampling = dict(sampling)
        uniforms = None
        if sampling["temperature"] == 0:
            sampling["temperature"] = 1.0  # without random numbers decoding is greedy
        else:
            numbers = [uniform_numbers(1, sampling, seed) for seed in seeds]
            uniforms = torch.cat(numbers).to(model.device)  # (B, T)
        completions, _ = sample_completions(model, tokenizer, prompts, sampling, uniforms)
        return completions

    @torch.no_grad()
    def choice_probabilities(
        self, prompts: list[list[int]], choices: Sequence[str]
    ) -> list[list[float]]:
        """The probabilities of the choices, each a single token, as the next token of each prompt;
        they sum to 1."""
        model, tokenizer = self.local
        tokens = [tokenizer(choice, add_special_tokens=False).input_ids for choice in choices]
        if any(len(ids) != 1 for ids in tokens):
            names = ", ".join(choices)
            raise RuntimeError(
                f"the tokenizer of {self.path} has no single token for each of {names}; "
                "use another judge"
            )
        # The answer is a placeholder: its position is where the logits of the next token are.
        rows = [{"prompt": ids, "answers": [[ids[-1]]], "labels": [[ids[-1]]]} for ids in prompts]
        batch = collate_answers(rows, share_prompt=False)
        batch = to_device(batch, model.device)
        logits, _ = answer_logits(model, batch)  # (B, V)
        choice_logits = logits[:, [ids[0] for ids in tokens]].float()
        return choice_logits.softmax(-1).tolist()


def parse_answer(body: str) -> dict:
    """{"text", "tokens_in", "tokens_out"} of a chat completion; raises one of NOT_AN_ANSWER if
    `body` is none.

    A completion with usage is charged for, so it is an answer even without a text; then "text" is
    None."""
    completion = json.loads(body)
    if completion.get("error"):
        raise ValueError(completion["error"])
    usage = completion.get("usage") or {}
    choices = completion.get("choices")
    if not usage:
        content = completion["choices"][0]["message"]["content"]
    elif choices:
        content = choices[0]["message"].get("content")
    else:
        content = None

    # Content is a text, or a list of parts of which some have a text.
    parts = content if isinstance(content, list) else [{"text": content}]
    texts = []
    for part in parts:
        if isinstance(part, dict) and isinstance(part.get("text"), str):
            texts.append(part["text"])
    text = None
    if texts:
        # A lone surrogate cannot be written to a file.
        text = "".join(texts).encode("utf-8", "replace").decode()
    return {
        "text": text,
        "tokens_in": int(usage.get("prompt_tokens") or 0),
        "tokens_out": int(usage.get("completion_tokens") or 0),
    }
