"""Asking another model, a judge or a teacher: one run here, or one behind a server that speaks OpenAI's protocol."""

from __future__ import annotations

import functools
import hashlib
import http.client
import json
import os
import re
import time
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterable, Mapping, Sequence

import torch
from tqdm import tqdm

from core.chat import prompt_ids
from core.config import Count, ModelConfig, Natural, NonNegative, Positive, Share, StageConfig
from core.errors import ConfigError
from core.fingerprints import file_identity
from core.hub import check_model
from core.logprobs import answer_logits, collate_answers
from core.runtime import is_main_process, logger
from core.sampling import decode_completions, sample_completions, uniform_numbers


class LLMClientError(RuntimeError):
    """Another model is not asked any further: it refuses, a limit is reached, or too many answers are missing."""


PROVIDERS = {  # kind: (where it is, the environment variable of its key)
    "openai": ("https://api.openai.com/v1", "OPENAI_API_KEY"),
    "anthropic": ("https://api.anthropic.com/v1", "ANTHROPIC_API_KEY"),
}


@dataclass
class LLMClientConfig(StageConfig):
    """Options of every stage that asks another model."""

    max_calls: Natural = (
        0  # answers of a server that this output_dir may gather, over all its runs; 0: no limit
    )
    max_cost: NonNegative = 0.0  # dollars that they may cost, but for calls under way; 0: no limit
    input_price: NonNegative = 0.0  # dollars for a million tokens sent
    output_price: NonNegative = 0.0  # dollars for a million tokens received
    max_missing: Share = (
        0.1  # the stage stops if a larger share of the answers is missing or cannot be read
    )
    concurrency: Count = 8  # calls to a server at a time; for a model run here, the batch
    call_timeout: Positive = 120.0  # seconds to wait for an answer of a server

    def validate(self) -> None:
        super().validate()
        if self.max_cost and not (self.input_price or self.output_price):
            raise ConfigError(
                "max_cost needs input_price and output_price, dollars for a million tokens"
            )
        for role in (
            name.removesuffix("_base_url") for name in vars(self) if name.endswith("_base_url")
        ):
            kind, variable = vars(self)[f"{role}_model_type"], vars(self)[f"{role}_api_key"]
            if variable and not os.environ.get(variable):  # also where nothing is asked in the end
                raise ConfigError(
                    f"{role}_api_key names the environment variable that holds the key. A key itself is "
                    "refused: options are written to files and shown in the list of processes"
                )
            names = f"{role}_base_url {role}_api_key max_calls max_cost call_timeout"
            why = f"with {role}_model_type={kind}: it is for servers"
            self.refuse_unread(kind not in ("api", *PROVIDERS), names, why)


class LLMClient:
    """Another model: of a folder, hub name or .gguf file, run here, or by `kind` (api, openai, anthropic) one behind a
    server at `url`, whose key is in the environment `variable`. An answer is appended to OUT/calls.jsonl the moment it
    comes, under a hash of model, messages, parameters and prompt version; what stands there is not asked again."""

    def __init__(
        self,
        config: LLMClientConfig,
        role: str,
        path: str,
        kind: str,
        url: str | None = None,
        variable: str | None = None,
        load_model: Callable | None = None,
    ):
        self.config, self.role, self.path, self.kind, self.figures = (
            config,
            role,
            path,
            kind,
            Counter(),
        )
        home, usual = PROVIDERS.get(self.kind, (None, None))
        self.remote, self.url, self.variable = (
            self.kind == "api" or home is not None,
            url or home,
            variable or usual,
        )
        self.secret = os.environ.get(self.variable or "", "")
        rank = (
            "" if is_main_process() else f"-{os.environ['RANK']}"
        )  # every process writes a file of its own
        self.load_model = load_model  # config -> (model, tokenizer)
        self.local: Any = None  # (model, tokenizer)
        self.server: Any = None  # an openai.OpenAI
        self.calls = Path(config.output_dir, f"calls{rank}.jsonl")
        self.trouble, self.refusal, self.halted = "", "", False

    def check(self) -> None:
        """Refuse what cannot be asked, before any model is loaded; raises ConfigError."""
        role = self.role
        if not self.path:
            raise ConfigError(
                f"{role}_model_path is missing: a folder, hub name or .gguf file; of a server, the "
                "model's name there"
            )
        if not self.remote:
            return check_model(self.path)
        if self.variable and not re.fullmatch("[!-~]+", self.secret):
            wrong = (
                "has a space, a line break or a letter beyond ASCII in it"
                if self.secret
                else "is not set"
            )
            usual = f" {self.variable}" * (
                self.variable in (known for _, known in PROVIDERS.values())
            )  # or a key?
            raise ConfigError(
                f"{role}_api_key names the environment variable that holds the key, and{usual} {wrong}"
            )
        if not re.match("https?://", self.url or ""):
            raise ConfigError(
                f"{role}_base_url says where the server is, for example http://localhost:8000/v1"
            )
        if re.search(r"//[^/]*@|[?]", self.url):
            kind = "query" if "?" in self.url else "password"
            raise ConfigError(
                f"{role}_base_url has a {kind} in it; name its environment variable by {role}_api_key"
            )
        try:
            urllib.request.urlopen(self.url, timeout=10).close()
        except (OSError, ValueError, http.client.HTTPException) as error:
            if not hasattr(error, "code"):  # an HTTPError has one: something answers
                raise ConfigError(f"{role}_base_url={self.url} does not answer: {error}") from None

    def ask(
        self,
        what: str,
        requests: Sequence[tuple[list[dict], int]],
        sampling: Mapping,
        version: str,
        parse: Callable[[str], Any] | Sequence[Callable],
        choices: Sequence[str] = (),
    ) -> list:
        """`parse(answer)` for each (messages, number), or one of them for each; None without an answer, or if it makes
        nothing of it. `number` tells several answers to equal messages apart; temperature 0 is greedy; `version`
        is that of the prompts. With `choices` a model run here answers by their probabilities, as JSON.
        Raises AskingError when too many are missing, a limit is reached, or the server refuses."""
        known = self.read_calls()
        keys = [
            self.key([messages, number, dict(sampling), version, [*choices]])
            for messages, number in requests
        ]
        wanted = {key: request for key, request in zip(keys, requests) if key not in known}
        spent = self.spent(known)
        room = (
            self.config.max_calls - len(known)
            if self.remote and self.config.max_calls
            else len(wanted)
        )
        room = 0 if 0 < self.config.max_cost < spent else room
        todo = dict([*wanted.items()][: max(0, room)])
        logger.info(
            "%s: %d answers, %d of them known from before",
            what,
            len(requests),
            len(requests) - len(wanted),
        )
        self.figures.update(calls_cached=len({*keys}) - len(wanted))
        ask = self.ask_server if self.remote else functools.partial(self.ask_here, choices=choices)
        failed, self.halted, self.refusal = 0, False, ""
        with (
            open(self.calls, "a", encoding="utf-8") as out,
            tqdm(total=len(todo), desc=what, disable=None) as bar,
        ):
            for key, answer in ask(todo, sampling) if todo else ():
                bar.update()
                if answer is None:
                    failed += 1
                    self.halted |= failed > self.config.max_missing * len(
                        requests
                    )  # it will not get better
                    continue
                out.write(
                    json.dumps({"key": key, "role": self.role, **answer}, ensure_ascii=False) + "\n"
                )
                out.flush()
                known[key] = answer
                self.figures.update(
                    calls=1, tokens_in=answer["tokens_in"], tokens_out=answer["tokens_out"]
                )
                spent += self.spent({key: answer})
                self.halted |= 0 < self.config.max_cost < spent
                if not answer["tokens_in"] and (
                    self.config.input_price or self.config.output_price
                ):
                    self.refusal, self.halted = (
                        "does not say how many tokens it took; set the prices to 0",
                        True,
                    )
        again = "What came is kept; run the same command to go on"
        if self.refusal:
            raise LLMClientError(f"{self.url} {self.refusal}. {again}")
        if 0 < self.config.max_cost < spent and not {*keys} <= known.keys():
            raise LLMClientError(
                f"max_cost={self.config.max_cost:g} is reached: {spent:.2f} dollars. {again}, with more"
            )
        if len(todo) < len(wanted):
            raise LLMClientError(
                f"max_calls={self.config.max_calls} is reached. {again}, with more"
            )
        texts = [known[key]["text"] if key in known else None for key in keys]
        parsers = [parse] * len(texts) if callable(parse) else parse
        found = [
            None if text is None else parse(text)
            for text, parse in zip(texts, parsers, strict=True)
        ]
        absent, missing = sum(text is None for text in texts), sum(value is None for value in found)
        self.figures.update(missing=missing)
        if missing:
            unread = next(
                (text for text, value in zip(texts, found) if text is not None and value is None),
                None,
            )
            said = (
                f"{what}: {missing} of {len(found)} missing: {absent} without an answer"
                + (f" ({self.trouble})" if self.trouble else "")
                + (
                    f", {missing - absent} that cannot be read, such as {unread[-160:]!r}"
                    if unread is not None
                    else ""
                )
            )
            if missing > self.config.max_missing * len(found):
                raise LLMClientError(
                    f"{said}. That is more than max_missing={self.config.max_missing:g}. {again}"
                )
            logger.warning(said)
        return found

    def key(self, request: list) -> str:
        options = (
            "seed",
            "instruction_template",
            "torch_dtype",
            "use_4bit",
            "use_8bit",
            "revision",
        )
        here = (
            []
            if self.remote
            else [file_identity(Path(self.path)), *map(vars(self.config).get, options)]
        )
        whole = [self.role, self.path, self.url, here, *request]
        return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:32]

    def read_calls(self) -> dict[str, dict]:
        """{key: answer} of OUT/calls.jsonl, those of other processes too; a line that a crash cut off is removed."""
        self.calls.touch()
        files = {file: file.read_bytes() for file in self.calls.parent.glob("calls*.jsonl")}
        ends = {file: whole.rfind(b"\n") + 1 for file, whole in files.items()}
        os.truncate(self.calls, ends[self.calls])  # others may be writing at theirs
        lines = (
            json.loads(line)
            for file, whole in files.items()
            for line in whole[: ends[file]].splitlines()
        )
        return {line.pop("key"): line for line in lines if line["role"] == self.role}

    def spent(self, answers: Mapping[str, dict]) -> float:
        """Dollars."""
        prices = {"tokens_in": self.config.input_price, "tokens_out": self.config.output_price}
        return (
            sum(
                answer[name] * price
                for answer in answers.values()
                for name, price in prices.items()
            )
            / 1e6
        )

    def ask_server(
        self, todo: Mapping[str, tuple], sampling: Mapping
    ) -> Iterable[tuple[str, dict | None]]:
        """(key, answer or None) as they come. The library tries again after 408, 409, 429, 5xx and timeouts, when
        Retry-After says; what it gives up is missing. Whatever else the server refuses ends the asking."""
        import openai

        if self.server is None:
            self.server = openai.OpenAI(
                api_key=self.secret or "none",
                base_url=self.url,
                max_retries=8,
                timeout=self.config.call_timeout,
            )
        create, limit = (
            self.server.chat.completions.with_raw_response.create,
            ("max_completion_tokens" if self.kind == "openai" else "max_tokens"),
        )
        options = {"temperature": sampling["temperature"], limit: sampling["max_new_tokens"]}
        options |= {"top_p": sampling["top_p"]} if sampling["top_p"] < 1 else {}
        clean = lambda text: (
            text.replace(self.secret, "***") if len(self.secret) > 7 else text
        )  # a server may send it

        def call(messages: list[dict]) -> dict | None:
            for attempt in range(8):
                if self.halted:
                    return None
                try:
                    answer = json.loads(
                        clean(create(model=self.path, messages=messages, **options).text)
                    )
                    if answer.get("error"):
                        raise ValueError(answer["error"])
                    used = (
                        answer.get("usage") or {}
                    )  # what is charged for is an answer, also without a text
                    said = (
                        answer["choices"][0]["message"] if answer.get("choices") or not used else {}
                    )
                    text = said.get("content") if used else said["content"]
                    parts = text if isinstance(text, list) else [{"text": text}]
                    texts = [
                        part["text"]
                        for part in parts
                        if isinstance(part, dict) and isinstance(part.get("text"), str)
                    ]
                    text = "".join(texts) if texts else None
                    if text is None:
                        self.trouble = (
                            "an answer has no text; it stays in calls.jsonl and is not asked again"
                        )
                    return {
                        "text": text and text.encode("utf-8", "replace").decode(),
                        "tokens_in": int(used.get("prompt_tokens") or 0),
                        "tokens_out": int(used.get("completion_tokens") or 0),
                    }
                except (
                    ValueError,
                    LookupError,
                    TypeError,
                    AttributeError,
                ) as error:  # half an answer, or another page
                    self.trouble = f"not an answer: {str(error)[:200]}"
                    time.sleep(min(8, 0.5 * 2**attempt))
                except openai.APIStatusError as error:
                    words = " ".join(clean(error.response.text).split())[
                        :300
                    ]  # error.message has OpenAI's form alone
                    self.trouble = f"{error.status_code}: {words or error.message}"
                    if error.status_code not in (408, 409, 429) and error.status_code < 500:
                        self.refusal, self.halted = f"refuses: {self.trouble}", True
                    return None
                except openai.APIConnectionError as error:
                    self.trouble = str(error.__cause__ or error)
                    return None
            return None

        pool = ThreadPoolExecutor(self.config.concurrency)
        try:
            futures = {pool.submit(call, messages): key for key, (messages, _) in todo.items()}
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            self.halted = True  # what is under way is not tried again
            pool.shutdown(wait=False, cancel_futures=True)

    def ask_here(self, todo: Mapping[str, tuple], sampling: Mapping, choices: Sequence[str]):
        """(key, answer) from a model run here; its random numbers come from the request, whatever the batch."""
        model, tokenizer = self.load()
        ids = {key: prompt_ids(tokenizer, messages) for key, (messages, _) in todo.items()}
        seed = lambda key: int(
            hashlib.sha256(json.dumps([self.config.seed, *todo[key]]).encode()).hexdigest()[:12], 16
        )
        keys, size = sorted(ids, key=lambda key: len(ids[key])), self.config.concurrency
        longest = model.config.max_position_embeddings - (
            0 if choices else sampling["max_new_tokens"]
        )
        for some in (keys[start : start + size] for start in range(0, len(keys), size)):
            fit = [key for key in some if len(ids[key]) <= longest]
            if len(fit) < len(some):
                self.trouble = f"longer than the {longest} tokens that the model has room for"
                yield from ((key, None) for key in some if key not in fit)
            if not fit:
                continue
            prompts = [ids[key] for key in fit]
            if choices:
                texts, counts = (
                    [json.dumps(chances) for chances in self.choose(prompts, choices)],
                    [1] * len(fit),
                )
            else:
                numbers = torch.cat([uniform_numbers(1, sampling, seed(key)) for key in fit])
                greedy = sampling["temperature"] == 0
                rest = dict(sampling) | ({"temperature": 1.0} if greedy else {})
                completions, _ = sample_completions(
                    model, tokenizer, prompts, rest, None if greedy else numbers.to(model.device)
                )
                texts, counts = (
                    decode_completions(tokenizer, completions)[0],
                    [len(completion) for completion in completions],
                )
            for key, text, count in zip(fit, texts, counts):
                yield key, {"text": text, "tokens_in": len(ids[key]), "tokens_out": count}

    def load(self) -> tuple:
        """(model, tokenizer), to be run here."""
        if self.local is None:
            model, tokenizer = self.load_model(ModelConfig(model_name_or_path=self.path))
            self.local = model.requires_grad_(False).eval(), tokenizer
        return self.local

    @torch.no_grad()
    def choose(self, prompts: list[list[int]], choices: Sequence[str]) -> list[list[float]]:
        """Of each prompt, the probabilities of the choices, each one token, as the next one: they add up to 1."""
        model, tokenizer = self.local
        tokens = [tokenizer(choice, add_special_tokens=False).input_ids for choice in choices]
        if any(len(ids) != 1 for ids in tokens):
            raise RuntimeError(
                f"the tokenizer of {self.path} has no single token for each of {', '.join(choices)}"
            )
        rows = [{"prompt": ids, "answers": [[ids[-1]]], "labels": [[ids[-1]]]} for ids in prompts]
        batch = {
            name: value.to(model.device)
            for name, value in collate_answers(rows, share_prompt=False).items()
        }
        logits, _ = answer_logits(model, batch)
        return logits[:, sum(tokens, [])].float().softmax(-1).tolist()

    def report(self) -> dict[str, float]:
        """{"feedback_calls", ...}: answers asked for, known from before, missing; tokens; dollars."""
        names = ("calls", "calls_cached", "missing", "tokens_in", "tokens_out")
        found = {name: float(self.figures[name]) for name in names}
        found |= (
            {"cost": self.spent(self.read_calls())}
            if self.config.input_price or self.config.output_price
            else {}
        )
        return {f"{self.role}_{name}": value for name, value in found.items()}
