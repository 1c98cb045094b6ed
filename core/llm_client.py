"""Calls to another model, a judge or a teacher: run locally, or a server with OpenAI's protocol.

Every answer is recorded in OUT/calls.jsonl, so a repeated or resumed run asks nothing twice."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import re
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from core.api_server import ApiServer
from core.call_log import CallLog
from core.chat import literal_prompt_ids, prompt_ids
from core.config import Count, ModelConfig, Natural, NonNegative, Positive, Share, StageConfig
from core.digests import file_identity
from core.errors import ConfigError, as_config_error
from core.hub import check_model
from core.llm_answers import Answer, is_same_model, read_answer, was_cut, whole_text
from core.logprobs import answer_logits, collate_answers
from core.model_config import context_length
from core.runtime import deferred_signals, logger, to_device
from core.sampling import decode_completions, sample_completions, uniform_numbers

PROVIDERS = {  # kind: (base URL, environment variable of the key)
    "openai": ("https://api.openai.com/v1", "OPENAI_API_KEY"),
    "anthropic": ("https://api.anthropic.com/v1", "ANTHROPIC_API_KEY"),
}
# Options that affect the answers of a local model.
LOCAL_MODEL_OPTIONS = (
    "seed",
    "instruction_template",
    "torch_dtype",
    "use_4bit",
    "use_8bit",
    "revision",
)
CONTINUE = "Answers received so far are kept; run the same command to continue"

# The option that limits the length of answers, by role.
TOKEN_LIMITS = {
    "feedback": "max_verdict_tokens",
    "teacher": "max_new_tokens in generation_kwargs",
}

Request = tuple[list[dict], int]  # messages, and a number that tells equal messages apart


class LLMClientError(RuntimeError):
    """The judge or teacher can no longer be queried: the server refuses, a limit is reached, or too
    many answers are missing."""


@dataclass
class LLMClientConfig(StageConfig):
    """Options of every stage that queries another model."""

    # calls to another model
    max_calls: Natural = 0  # maximum number of API calls, counted across restarts; 0: no limit
    max_cost: NonNegative = 0.0  # maximum dollars, counted across restarts; 0: no limit
    input_price: NonNegative = 0.0  # dollars per million input tokens
    output_price: NonNegative = 0.0  # dollars per million output tokens
    max_missing: Share = 0.1  # stop if a larger fraction of answers is missing or unreadable
    concurrency: Count = 8  # concurrent API calls; batch size of a local model
    call_timeout: Positive = 120.0  # seconds within which an API answer must be complete

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
    """Another model: run locally, from a folder, hub name or .gguf file; or behind a server.

    `kind` api, openai or anthropic is a server at `url`, whose key is in the environment variable
    `key_variable`; any other kind runs locally, loaded by `load_model(config) -> (model,
    tokenizer)`. An answer is appended to OUT/calls.jsonl as soon as it arrives, under a hash of
    model, messages, parameters and prompt version; a question with an answer in that file is not
    asked again. `verbatim` is for the policy itself: its prompts are encoded as in training, and
    its answers are used unchanged, including reasoning."""

    def __init__(
        self,
        config: LLMClientConfig,
        role: str,
        path: str,
        kind: str,
        url: str | None = None,
        key_variable: str | None = None,
        load_model: Callable | None = None,
        verbatim: bool = False,
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
        self.verbatim = verbatim
        self.local: Any = None  # (model, tokenizer)
        self.server: ApiServer | None = None
        self.log = CallLog(config, role, charges=self.remote)
        self.figures: Counter = Counter()  # what `report` returns
        self.last_problem = ""  # why the last missing answer is missing

    # -- checks ------------------------------------------------------------------------------------

    def check(self) -> None:
        """Check what can be checked before any model is loaded; raises ConfigError."""
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
        """Check the key without printing it. The name of the variable is printed only if it is one
        of ours: the user may have given a key by mistake."""
        if not self.key_variable or re.fullmatch("[!-~]+", self.secret):
            return
        problem = "is not set"
        if self.secret:
            problem = "has a space, a line break or a non-ASCII character in it"
        known_variables = [variable for _, variable in PROVIDERS.values()]
        name = f" {self.key_variable}" if self.key_variable in known_variables else ""
        raise ConfigError(
            f"{self.role}_api_key names the environment variable that holds the key, "
            f"but{name} {problem}"
        )

    def check_url(self) -> None:
        """Check that the URL contains no secret and that something answers there."""
        option = f"{self.role}_base_url"
        url = self.url or ""
        if not re.match("https?://", url):
            raise ConfigError(
                f"{option} is the address of the server, for example http://localhost:8000/v1; "
                f"or set {self.role}_model_type to {' or '.join(PROVIDERS)}"
            )
        if re.search(r"//[^/]*@|[?]", url):
            kind = "query" if "?" in url else "password"
            raise ConfigError(
                f"{option} has a {kind} in it; name its environment variable in {self.role}_api_key"
            )
        try:
            urllib.request.urlopen(url, timeout=10).close()
        except urllib.error.HTTPError:
            return  # an error status is an answer too
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise ConfigError(f"{option}={url} does not answer: {error}") from None

    # -- asking ------------------------------------------------------------------------------------

    def ask(
        self,
        what: str,
        requests: Sequence[Request],
        sampling: Mapping,
        version: str,
        parse: Callable[[Any], Any] | Sequence[Callable],
        choices: Sequence[str] = (),
        read: Callable[[Answer], Any] = whole_text,
        names: Sequence[str] = (),
    ) -> list:
        """`parse(read(answer))` for each request; None if there is no answer, or if one of the two
        returns None.

        `parse` is one function, or one for each request. A request is (messages, number); `number`
        distinguishes several answers to the same messages. Temperature 0 is greedy; `version` is
        that of the prompts. With `choices` a local model answers with their probabilities, as JSON.
        `names` say what each request is about, if that is not its first message.

        Raises LLMClientError if too many answers are missing, a limit is reached, or the server
        refuses. After SIGTERM or SIGINT the program ends once pending answers are recorded."""
        # 1. Which answers are already recorded, and which are needed?
        self.log.read()
        answers = self.log.answers
        keys = []
        for messages, number in requests:
            keys.append(self.key([messages, number, dict(sampling), version, list(choices)]))
        wanted = {}
        names_by_key = {}
        for key, request, name in zip(keys, requests, names or [""] * len(keys), strict=True):
            names_by_key[key] = name or request[0][0]["content"][:200]
            if key not in answers:
                wanted[key] = request
        num_known = len(requests) - len(wanted)
        logger.info("%s: %d answers, %d of them known from before", what, len(requests), num_known)
        self.figures.update(calls_cached=len(set(keys)) - len(wanted))

        # 2. Get the others; each is recorded as soon as it arrives.
        self.last_problem = ""
        max_failed = self.max_missing(len(requests))
        if wanted:
            new_answers = self.answer(wanted, sampling, choices, names_by_key, max_failed)
            with contextlib.closing(new_answers):
                for _, answer in tqdm(new_answers, desc=what, total=len(wanted), disable=None):
                    if answer is not None:
                        tokens = {name: answer[name] for name in ("tokens_in", "tokens_out")}
                        self.figures.update(calls=1, **tokens)
            self.raise_if_stopped()

        # 3. Parse them.
        kept = [answers.get(key) for key in keys]
        self.note_flags(what, [answer for answer in kept if answer])
        return self.parse_answers(what, kept, read, parse)

    def answer(
        self,
        wanted: Mapping[str, Request],
        sampling: Mapping,
        choices: Sequence[str],
        names: Mapping[str, str],
        max_failed: float,
    ) -> Generator[tuple[str, dict | None], None, None]:
        """Yield (key, answer, or None if it is missing) for each request as answers arrive, after
        recording them in the log."""
        if not self.remote:
            for key, answer in self.run_here(wanted, sampling, choices):
                if answer is not None:
                    self.log.keep(key, answer)
                yield key, answer
            return
        if self.server is None:
            self.server = ApiServer(
                self.config, self.kind, self.url or "", self.path, self.secret, self.log
            )
        requests = {key: (messages, names[key]) for key, (messages, _) in wanted.items()}
        timeout = self.config.call_timeout
        action = f"waiting for the answers under way, at most {timeout:g} seconds, then exiting"
        with deferred_signals(action) as signals:
            yield from self.server.answers(requests, sampling, max_failed, signals)
        self.last_problem = self.server.problem

    def raise_if_stopped(self) -> None:
        """Raise LLMClientError if the server refuses all questions, or a limit was reached."""
        if self.server is None:
            return
        if self.server.refusal:
            raise LLMClientError(f"{self.url} {self.server.refusal}. {CONTINUE}")
        if self.server.limit:
            raise LLMClientError(f"{self.server.limit}. {CONTINUE} with a higher limit")

    def note_flags(self, what: str, answers: Sequence[Mapping]) -> None:
        """Count answers cut off by the token limit, with a warning, and those by other models."""
        cut = sum(map(was_cut, answers))
        models = [answer.get("model", self.path) for answer in answers]
        other_model = sum(not is_same_model(self.path, model) for model in models)
        # Only if there are any; most runs have none.
        for name, count in {"cut": cut, "other_model": other_model}.items():
            if count:
                self.figures[name] += count
        if cut and not self.verbatim:
            logger.warning(
                "%s: the token limit ended %d of %d answers; raise %s",
                what,
                cut,
                len(answers),
                TOKEN_LIMITS.get(self.role, "it"),
            )

    def parse_answers(
        self,
        what: str,
        kept: Sequence[Mapping | None],
        read: Callable[[Answer], Any],
        parse: Callable | Sequence[Callable],
    ) -> list:
        """Apply `read` and `parse` to each recorded answer; None if it is missing. Warns about
        missing answers.

        Raises LLMClientError if there are more of them than `max_missing` allows."""
        parsers = [parse] * len(kept) if callable(parse) else parse
        values = []
        unreadable = []
        absent = 0
        for line, parser in zip(kept, parsers, strict=True):
            answer = self.read(line) if line else None
            content = None if answer is None else read(answer)
            value = None if content is None else parser(content)
            values.append(value)
            if answer is None:
                absent += 1
                self.last_problem = why_absent(line) or self.last_problem
            elif value is None:
                unreadable.append(answer.text)

        missing = absent + len(unreadable)
        self.figures.update(missing=missing)
        if not missing:
            return values
        message = f"{what}: {missing} of {len(kept)} missing: {absent} without an answer"
        if self.last_problem:
            message += f" ({self.last_problem})"
        if unreadable:
            example = unreadable[0][-160:]
            message += f", {len(unreadable)} that cannot be read, such as {example!r}"
        if missing > self.max_missing(len(kept)):
            remedy = CONTINUE
            if None not in kept:  # running again would not ask again
                file = self.log.calls_file
                remedy = f"They are kept: raise max_missing, or remove their lines from {file}"
            raise LLMClientError(
                f"{message}. That is more than max_missing={self.config.max_missing:g}. {remedy}"
            )
        logger.warning(message)
        return values

    def max_missing(self, count: int) -> float:
        """How many of `count` answers may be missing: at least one if there are several, unless
        max_missing is 0."""
        allowed = self.config.max_missing * count
        return max(1.0, allowed) if allowed and count > 1 else allowed

    def read(self, line: Mapping) -> Answer | None:
        """The answer in a line of OUT/calls.jsonl."""
        if self.verbatim and line["text"] is not None:
            return Answer(line["text"], "", was_cut(line))
        return read_answer(line)

    # -- recorded answers --------------------------------------------------------------------------

    def key(self, request: list) -> str:
        """The hash under which the answer to a request is recorded."""
        # A server's model is identified by name, a local one by its files and how it is loaded.
        local_model = []
        if not self.remote:
            options = [vars(self.config).get(name) for name in LOCAL_MODEL_OPTIONS]
            local_model = [file_identity(Path(self.path)), *options]
        identity = [self.role, self.path, self.url, local_model, *request]
        text = json.dumps(identity, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def report(self) -> dict[str, float]:
        """{"feedback_calls", ...}: calls made, answers recorded before, missing answers, tokens,
        dollars."""
        names = ["calls", "calls_cached", "missing", "tokens_in", "tokens_out"]
        names += [name for name in ("cut", "other_model") if self.figures[name]]
        metrics = {name: float(self.figures[name]) for name in names}
        if self.config.input_price or self.config.output_price:
            self.log.read()
            metrics["cost"] = self.log.cost
        return {f"{self.role}_{name}": value for name, value in metrics.items()}

    # -- a local model -----------------------------------------------------------------------------

    def run_here(
        self, todo: Mapping[str, Request], sampling: Mapping, choices: Sequence[str]
    ) -> Iterator[tuple[str, dict | None]]:
        """Yield (key, answer, or None if the prompt is too long) from a local model."""
        model, tokenizer = self.load()
        with as_config_error(f"model {self.path}: its chat template cannot take a prompt"):
            encode = prompt_ids if self.verbatim else literal_prompt_ids
            ids = {key: encode(tokenizer, messages) for key, (messages, _) in todo.items()}
        longest = context_length(model.config)
        if not choices:
            longest -= sampling["max_new_tokens"]

        # Batches of similar length need little padding.
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
                stopped = [True] * len(texts)
            else:
                seeds = [self.request_seed(todo[key]) for key in usable_keys]
                completions = self.sample(prompts, sampling, seeds)
                texts, stopped = decode_completions(tokenizer, completions)
                counts = [len(completion) for completion in completions]
            written = zip(usable_keys, texts, counts, stopped, strict=True)
            for key, text, count, has_stop in written:
                answer = {"text": text, "tokens_in": len(ids[key]), "tokens_out": count}
                yield key, answer if has_stop else answer | {"finish": "length"}

    def load(self) -> tuple:
        """(model, tokenizer) of a local model."""
        if self.local is None:
            model, tokenizer = self.load_model(ModelConfig(model_name_or_path=self.path))
            self.local = (model.requires_grad_(False).eval(), tokenizer)
        return self.local

    def request_seed(self, request: Request) -> int:
        """A seed that depends only on the request, so that batching does not change the answer."""
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
            sampling["temperature"] = 1.0  # decoding is greedy because there are no random numbers
        else:
            numbers = [uniform_numbers(1, sampling, seed) for seed in seeds]
            uniforms = torch.cat(numbers).to(model.device)  # (B, T)
        completions, _ = sample_completions(model, tokenizer, prompts, sampling, uniforms)
        return completions

    @torch.no_grad()
    def choice_probabilities(
        self, prompts: list[list[int]], choices: Sequence[str]
    ) -> list[list[float]]:
        """The probabilities of the choices, each a single token, as next token after each prompt,
        normalized to sum to 1."""
        model, tokenizer = self.local
        tokens = [tokenizer(choice, add_special_tokens=False).input_ids for choice in choices]
        if any(len(ids) != 1 for ids in tokens):
            names = ", ".join(choices)
            raise RuntimeError(
                f"the tokenizer of {self.path} has no single token for each of {names}; "
                "use another judge"
            )
        # The answer is a placeholder, to get the logits at its position.
        rows = [{"prompt": ids, "answers": [[ids[-1]]], "labels": [[ids[-1]]]} for ids in prompts]
        batch = collate_answers(rows, share_prompt=False)
        batch = to_device(batch, model.device)
        logits, _ = answer_logits(model, batch)  # (B, V)
        choice_logits = logits[:, [ids[0] for ids in tokens]].float()
        return choice_logits.softmax(-1).tolist()


def why_absent(line: Mapping | None) -> str:
    """Why a line of OUT/calls.jsonl has no answer; "" if there is no line."""
    if line is None:
        return ""
    if "refused" in line:
        return f"refused, {line['refused']}; not sent again"
    if "refusal" in line:
        return f"the model declines: {line['refusal'][:200]}"
    if line.get("finish") == "content_filter":
        return "ended by a content filter; kept, and not asked for again"
    if was_cut(line):
        return "the token limit came before the answer; kept, and not asked for again"
    return "an answer has no text; it is kept and not asked for again"
