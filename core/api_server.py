"""Requests to a server with OpenAI's protocol: retries, adapted options, refusals and limits.

The requests of `ApiServer.answers` run in an event loop in a thread, so that each has a deadline
for its complete answer, and the main thread can handle signals."""

from __future__ import annotations

import asyncio
import email.utils
import html
import math
import queue
import re
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from core.call_log import CallLog, is_refused
from core.llm_answers import NOT_AN_ANSWER, is_same_model, parse_completion
from core.runtime import logger

MAX_ATTEMPTS = 9  # requests for one answer
FIRST_DELAY, LONGEST_DELAY = 0.5, 8.0  # seconds between them, doubled each time
LONGEST_WAIT = 3600.0  # seconds that a server may ask to wait by Retry-After
POLL_SECONDS = 0.1  # how soon a signal or a limit is noticed
RETRIED_STATUSES = (408, 409, 425, 429)  # besides 5xx
REFUSING_STATUSES = (400, 413, 422)  # may be about a single request
TOKENS_PER_MESSAGE = 32  # maximum that a chat template writes around a message

CONTENT_REFUSED = re.compile(
    r"content.?(filter|polic|management)|moderat|flagged|safety|inappropriate|responsible.?ai"
    r"|data.?inspection",
    re.IGNORECASE,
)
TOO_LONG = re.compile(
    r"context.?(length|window|size)|max\w*.?(model.?len|context)|too many (input |prompt )?tokens"
    r"|(prompt|input|messages?) (is|are) too (long|large)|reduce the length|max_length",
    re.IGNORECASE,
)
NO_SUCH_OPTION = re.compile(
    r"unsupported|not supported|n[o']t support|unrecognized|unknown|unexpected|not permitted"
    r"|not allowed|cannot both|deprecated|only the default",
    re.IGNORECASE,
)
# In order of removal: some models take a temperature, but not together with top_p.
ADAPTED_OPTIONS = ("top_p", "temperature", "max_tokens", "max_completion_tokens")
OTHER_LIMIT = {
    "max_tokens": "max_completion_tokens",
    "max_completion_tokens": "max_tokens",
}
# Names of httpx errors that occur before anything is sent.
NEVER_SENT = ("ConnectError", "ConnectTimeout", "PoolTimeout")


class ApiServer:
    """The model `model` on the server at `url`. Requests, answers and costs go to `log`."""

    def __init__(self, config: Any, kind: str, url: str, model: str, secret: str, log: CallLog):
        self.config = config
        self.url = url
        self.model = model
        self.secret = secret
        self.secret_pattern = escaped_forms(secret)
        self.log = log
        # OpenAI's newer models accept only the first name, many other servers only the second.
        self.limit_name = "max_completion_tokens" if kind == "openai" else "max_tokens"
        self.adapted: set[str] = set()  # options that the model refused
        self.resume_at = 0.0  # time of the next request by Retry-After, as time.monotonic()
        self.other_models: set[str] = set()  # models that answered instead
        self.estimates_cost = False  # true if the server reports no usage
        # State of the current call of `answers`:
        self.thread: threading.Thread | None = None  # runs the requests
        self.client: Any = None  # an openai.AsyncOpenAI
        self.options: dict[str, Any] = {}  # of a request
        self.max_new_tokens = 0
        self.under_way = 0
        self.num_failed = 0
        self.stopping = False  # no further request is sent
        self.limit = ""  # the limit that was reached
        self.refusal = ""  # why the server cannot be used at all
        self.problem = ""  # why the last missing answer is missing

    def answers(
        self,
        requests: Mapping[str, tuple[list[dict], str]],
        sampling: Mapping,
        max_failed: float,
        signals: Sequence[int],
    ) -> Iterator[tuple[str, dict | None]]:
        """Yield (key, answer, or None if it is missing) for each request {key: (messages, what it
        is about)}, in order of arrival, after recording them in the log.

        Stops early, with `limit` or `refusal` set, if more than `max_failed` are missing, or after
        a signal. Pending answers are waited for in any case."""
        import openai

        # Answers of an interrupted call may still be pending.
        if self.thread:
            self.thread.join()
        self.options = self.request_options(sampling)
        self.under_way = self.num_failed = 0
        self.stopping = False
        self.limit = self.refusal = self.problem = ""
        results: queue.SimpleQueue = queue.SimpleQueue()

        async def ask_all() -> None:
            # No retries by the client: `call` retries itself, because it counts each request.
            async with openai.AsyncOpenAI(
                api_key=self.secret or "none", base_url=self.url, max_retries=0, timeout=None
            ) as self.client:
                left = deque(requests.items())
                num_workers = min(self.config.concurrency, len(left))
                workers = [self.work(left, max_failed, results) for _ in range(num_workers)]
                await asyncio.gather(*workers)

        def run() -> None:
            try:
                asyncio.run(ask_all())
            except BaseException as error:
                results.put(error)
            results.put(None)

        # A daemon thread, so that a second signal ends the program at once.
        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()
        try:
            while True:
                if signals:
                    self.stopping = True
                try:
                    result = results.get(timeout=POLL_SECONDS)
                except queue.Empty:
                    continue
                if result is None:
                    return
                if isinstance(result, BaseException):
                    raise result
                yield result
        finally:
            self.stopping = True

    async def work(self, left: deque, max_failed: float, results: queue.SimpleQueue) -> None:
        """Request one answer after another until none is left."""
        while left and not self.stopping:
            key, (messages, name) = left.popleft()
            answer = await self.call(key, messages, name)
            if answer is None:
                self.num_failed += 1
                # More are missing than allowed, and later answers cannot change that.
                self.stopping |= self.num_failed > max_failed
            results.put((key, answer))

    # -- one answer --------------------------------------------------------------------------------

    async def call(self, key: str, messages: list[dict], name: str) -> dict | None:
        """The answer to one question, recorded in the log; None if it is missing.

        The openai client would not retry a status 200 whose body is not an answer, would not wait
        longer than two minutes, and would apply its timeout to each read instead of the whole
        answer."""
        import openai

        most_in, most_out = self.most_tokens(messages)
        resume_at = 0.0
        for attempt in range(MAX_ATTEMPTS):
            if not await self.may_send(most_in, most_out, resume_at):
                return None
            options = dict(self.options)
            self.log.note_sent(key, most_in, most_out)
            self.under_way += 1
            try:
                async with asyncio.timeout(self.config.call_timeout):
                    create = self.client.chat.completions.with_raw_response.create
                    response = await create(messages=messages, **options)
                answer = parse_completion(response.text, self.without_secret)
            except TimeoutError:
                self.problem = f"no complete answer within {self.config.call_timeout:g} s"
            except NOT_AN_ANSWER as error:
                self.problem = f"not an answer: {self.without_secret(str(error))[:200]}"
            except openai.APIStatusError as error:
                self.log.note_returned(key)
                if self.adapt_options(error, options):
                    continue
                if not self.may_be_retried(error, key, name):
                    return None
            except openai.APIConnectionError as error:
                self.problem = self.without_secret(str(error.__cause__ or error))
                if type(error.__cause__).__name__ in NEVER_SENT:
                    self.log.note_returned(key)
            else:
                self.log.keep(key, answer)
                self.note_oddities(answer, name)
                return answer
            finally:
                self.under_way -= 1
            resume_at = time.monotonic() + min(LONGEST_DELAY, FIRST_DELAY * 2**attempt)
        return None

    async def may_send(self, most_in: int, most_out: int, resume_at: float) -> bool:
        """Wait until a request may be sent; False if no more requests may be sent."""
        while not self.stopping:
            wait = max(self.resume_at, resume_at) - time.monotonic()
            limit = "" if wait > 0 else self.log.reached_limit(most_in, most_out)
            if wait <= 0 and not limit:
                return True
            # Pending requests may be returned, which frees their part of the limit.
            if limit and not self.under_way:
                self.limit = limit
                self.stopping = True
            await asyncio.sleep(min(wait, POLL_SECONDS) if wait > 0 else POLL_SECONDS)
        return False

    def most_tokens(self, messages: list[dict]) -> tuple[int, int]:
        """The maximum tokens (in, out) that a request can cost."""
        num_bytes = sum(len(str(message["content"]).encode()) for message in messages)
        # A token is at least one byte; a chat template writes some around each message.
        return num_bytes + TOKENS_PER_MESSAGE * len(messages), self.max_new_tokens

    def request_options(self, sampling: Mapping) -> dict[str, Any]:
        """The options of a request, without those that the model has refused."""
        self.max_new_tokens = sampling["max_new_tokens"]
        options = {
            "model": self.model,
            "temperature": sampling["temperature"],
            self.limit_name: self.max_new_tokens,
        }
        if sampling["top_p"] < 1:
            options["top_p"] = sampling["top_p"]
        return {name: value for name, value in options.items() if name not in self.adapted}

    def note_oddities(self, answer: dict, name: str) -> None:
        """Warn of an answer by another model, without usage, or cut off by a content filter."""
        model = answer.get("model", self.model)
        if not is_same_model(self.model, model) and model not in self.other_models:
            self.other_models.add(model)
            logger.warning(
                "%s: asked for %s, but %s answers; its answers are used, marked by `model` in %s",
                self.url,
                self.model,
                model,
                self.log.calls_file.name,
            )
        prices = self.config.input_price or self.config.output_price
        if answer.get("usage_missing") and prices and not self.estimates_cost:
            self.estimates_cost = True
            logger.warning(
                "%s reports no usable token counts; such calls are counted at the most they can "
                "cost: a token for each byte sent, and all tokens that may be written",
                self.url,
            )
        if answer.get("finish") == "content_filter":
            logger.warning("%s: a content filter ended the answer to %r", self.url, name)

    # -- what a status means -----------------------------------------------------------------------

    def adapt_options(self, error: Any, options: dict) -> bool:
        """Whether the server refuses one of the `options` of a request. Further requests then omit
        it, or use its other name."""
        text = self.describe(error)
        name = refused_option(error, text, options)
        if not name:
            return False
        if name in self.adapted:
            return name not in self.options  # a concurrent request has adapted it already
        self.adapted.add(name)
        value = self.options.pop(name)
        other_name = OTHER_LIMIT.get(name)
        if other_name and other_name not in self.adapted:
            self.limit_name = other_name
            self.options[other_name] = value
            change = f"asking with {other_name} instead"
        else:
            change = f"asking without it, so {name}={value} has no effect"
        logger.warning("%s: %s does not take %s; %s", self.url, self.model, name, change)
        return True

    def may_be_retried(self, error: Any, key: str, name: str) -> bool:
        """Whether retrying can succeed. If not, record the reason: the server refuses this
        question, or all questions."""
        status = error.status_code
        text = self.problem = self.describe(error)
        has_quota = error.code != "insufficient_quota" or "retry-after" in error.response.headers
        if status >= 500 or (status in RETRIED_STATUSES and has_quota):
            return self.heeds_retry_after(error.response.headers, text)

        refuses_content = status < 500 and CONTENT_REFUSED.search(text)
        is_too_long = status in REFUSING_STATUSES and TOO_LONG.search(text)
        # A server that has answered other questions does not refuse all of them.
        refuses_one = status in REFUSING_STATUSES and self.has_answered()
        if status not in (401, 402, 404) and (refuses_content or is_too_long or refuses_one):
            refusal = {"text": None, "refused": text, "question": name}
            self.log.keep(key, refusal | {"tokens_in": 0, "tokens_out": 0})
            logger.warning(
                "%s refuses the question %r: %s; it is not sent again", self.url, name, text
            )
        else:
            self.refusal = f"refuses: {text}"
            self.stopping = True
        return False

    def heeds_retry_after(self, headers: Mapping, text: str) -> bool:
        """Make all requests wait as long as the server asks for; False if that is too long."""
        wait = retry_after(headers)
        if wait > LONGEST_WAIT:
            self.refusal = f"asks to wait {wait:.0f} seconds: {text}"
            self.stopping = True
            return False
        resume_at = time.monotonic() + wait
        if wait > LONGEST_DELAY and resume_at > self.resume_at + LONGEST_DELAY:
            logger.warning("%s asks to wait %.0f seconds: %s", self.url, wait, text)
        self.resume_at = max(self.resume_at, resume_at)
        return True

    def has_answered(self) -> bool:
        return any(not is_refused(answer) for answer in self.log.answers.values())

    def describe(self, error: Any) -> str:
        """Status and body of an error, on one line."""
        # error.message is empty unless the body has the form of OpenAI's errors.
        body = " ".join(self.without_secret(error.response.text).split())
        return f"{error.status_code}: {body[:300] or self.without_secret(error.message)}"

    def without_secret(self, text: str) -> str:
        """The text without the key, which a server may echo."""
        return self.secret_pattern.sub("***", text) if self.secret_pattern else text


def refused_option(error: Any, text: str, options: Mapping) -> str:
    """The option that a server rejects, if that is what its error is about, else ""."""
    if error.status_code not in REFUSING_STATUSES or not NO_SUCH_OPTION.search(text):
        return ""
    if error.param in options and error.param in ADAPTED_OPTIONS:
        return error.param
    for name in ADAPTED_OPTIONS:
        if name in options and re.search(rf"(?<!\w){name}(?!\w)", text):
            return name
    return ""


def retry_after(headers: Mapping) -> float:
    """Seconds that a server asks to wait, given as a number or a date; 0 if it does not ask."""
    milliseconds = read_number(headers.get("retry-after-ms", ""))
    if milliseconds is not None:
        return milliseconds / 1000
    value = headers.get("retry-after", "")
    seconds = read_number(value)
    if seconds is not None:
        return seconds
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0


def read_number(text: str) -> float | None:
    """A number of at least 0; None for anything else."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) and number >= 0 else None


def escaped_forms(secret: str) -> re.Pattern | None:
    """A pattern for a key, verbatim or with some or all characters escaped as in JSON, Python, URLs
    or HTML; None for a value that is too short to be a key."""
    # Shorter ones would match ordinary words.
    if len(secret) < 8:
        return None
    pattern = ""
    for character in secret:
        code = ord(character)
        named = html.escape(character)
        forms = [
            rf"\\*{re.escape(character)}",
            rf"\\+(?:u00|x){code:02x}",
            rf"%(?:25)*{code:02x}",
            rf"&#(?:0*{code}|x0*{code:x});",
        ]
        if named != character:
            forms.append(re.escape(named))
        pattern += f"(?:{'|'.join(forms)})"
    return re.compile(pattern, re.IGNORECASE)
