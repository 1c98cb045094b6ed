"""A server that misbehaves in every way at once, and a client that is killed: what is lost,
doubled, spent, and written down. A small run of it is a test; the large one is

    python tests/test_hostile_server.py  # 500 questions, 10 kills
"""

import argparse
import email.utils
import http.server
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# With characters that JSON and URLs escape.
KEY = 'sk-hostile/0123"456\\789<abc>&def'
PRICE = 1000.0  # dollars per million tokens
TOKENS_IN, TOKENS_OUT = 20, 30  # that the server charges for an answer
CONCURRENCY = 8

CLIENT = """
import json, sys
sys.path.insert(0, {root!r})
import core.api_server
from core.llm_client import LLMClient, LLMClientConfig, LLMClientError
from core.runtime import exit_on_signals, start_logging
from core.sampling import SAMPLING_DEFAULTS

exit_on_signals()
core.api_server.FIRST_DELAY, core.api_server.LONGEST_DELAY = 0.01, 0.05
config = LLMClientConfig(output_dir={folder!r}, call_timeout=3.0, concurrency={concurrency},
                         max_missing=0.2, input_price={price}, output_price={price}, **{limits})
client = LLMClient(config, "teacher", "big", "api", {url!r}, "HOSTILE_KEY")
requests = [([{{"role": "user", "content": f"What is {{n}} + 1?"}}], 0) for n in range({count})]
with start_logging("warning", {folder!r} / __import__("pathlib").Path("training.log")):
    try:
        answers = client.ask("sums", requests, SAMPLING_DEFAULTS, "1", str)
    except LLMClientError as error:
        print(error, file=sys.stderr)
        sys.exit(1)
with open({folder!r} + "/answers.json", "w") as file:
    json.dump(dict(answers=answers, calls=client.log.num_calls, cost=client.log.cost), file)
"""


def is_fated(number, every, rest):
    """Whether a question belongs to the few that share a fate."""
    return number % every == rest


class Hostile(http.server.BaseHTTPRequestHandler):
    """OpenAI's protocol, in bad faith. What is charged for is counted in `server.charged`."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        number = int(body["messages"][-1]["content"].split()[2])
        with self.server.lock:
            self.server.num_repeated += number in self.server.known
            chance = self.server.random.random()
        if self.refuses_parameters(body) or self.refuses_question(number) or self.fails(chance):
            return
        # From here on the server has worked, and wants to be paid.
        with self.server.lock:
            self.server.charged[number] += 1
        if self.breaks(chance):
            return
        time.sleep(0.01)
        if self.send(200, json.dumps(self.completion(number)).encode()):
            with self.server.lock:
                self.server.delivered[number] += 1

    def refuses_parameters(self, body):
        for name in ("temperature", "max_tokens"):
            if name in body:
                self.refuse(400, f"Unsupported parameter: {name}", param=name)
                return True
        return False

    def refuses_question(self, number):
        if is_fated(number, 50, 7):
            self.refuse(400, f"content filtered for {self.headers['Authorization']}")
        elif is_fated(number, 50, 8):
            self.refuse(400, "This model's maximum context length is 100 tokens")
        else:
            return False
        return True

    def fails(self, chance):
        """Temporary failures, which cost nothing."""
        date = email.utils.formatdate(time.time() + 1, usegmt=True)
        if chance < 0.03:
            self.refuse(429, "slow down", {"Retry-After": "0.05"})
        elif chance < 0.04:
            self.refuse(429, "slow down", {"Retry-After": "soon"})
        elif chance < 0.045:
            self.refuse(503, "overloaded", {"Retry-After": date})
        elif chance < 0.07:
            self.refuse(500, f"key {json.dumps(KEY)} crashed")
        else:
            return False
        return True

    def breaks(self, chance):
        """Answers that are paid for and never complete."""
        whole = json.dumps(self.completion(0)).encode()
        if chance < 0.09:
            self.send(200, f"<html>Bad gateway, {KEY}</html>".encode())
        elif chance < 0.11:
            self.send(200, whole[: len(whole) // 2])
        elif chance < 0.13:
            self.send(200, json.dumps({"error": {"message": f"no {KEY}"}}).encode())
        elif chance < 0.14:
            self.send(200, whole, pause=0.02)  # longer than the deadline, a byte at a time
        elif chance < 0.15:
            self.close_connection = True  # not a word
        else:
            return False
        return True

    def completion(self, number):
        escaped_key = json.dumps(KEY).replace("/", "\\/")
        message = {"role": "assistant", "content": f"{number} and 1.\n#### {number + 1}"}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        usage = {"prompt_tokens": TOKENS_IN, "completion_tokens": TOKENS_OUT}
        answer = {"model": "big", "choices": [choice], "usage": usage}
        if is_fated(number, 50, 11):
            message["content"] = f"<think>{escaped_key} #### 0</think>{message['content']}"
        if is_fated(number, 50, 12):
            message["reasoning_content"] = f"The key is {KEY}, so #### 0"
        if is_fated(number, 50, 13):
            message["content"] = [{"type": "text", "text": message["content"]}]
        if is_fated(number, 50, 14):
            message |= {"content": None, "refusal": f"Not with {KEY}."}
        if is_fated(number, 50, 15):
            choice["finish_reason"] = "length"
        if is_fated(number, 50, 16):
            answer["model"] = f"small {KEY}"
        if is_fated(number, 50, 17):
            answer["usage"] = None
        if is_fated(number, 50, 18):
            answer["usage"] = {"prompt_tokens": -(10**9), "completion_tokens": -(10**9)}
        return answer

    def refuse(self, status, message, headers=None, **fields):
        self.send(status, json.dumps({"error": {"message": message, **fields}}).encode(), headers)

    def send(self, status, body, headers=None, pause=0.0):
        """Send an answer; returns whether the client was still there."""
        try:
            self.send_response(status)
            lengths = {"Content-Type": "application/json", "Content-Length": str(len(body))}
            for name, value in {**lengths, "X-Echo": "hi", **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            for start in range(0, len(body), 1 if pause else len(body)):
                self.wfile.write(body[start : start + 1] if pause else body)
                time.sleep(pause)
            return True
        except OSError:
            self.close_connection = True
            return False

    def log_message(self, *_):
        pass


class Server(http.server.ThreadingHTTPServer):
    def handle_error(self, request, client_address):
        """A killed client sends half a request: that is no news."""
        if not isinstance(sys.exception(), OSError | ValueError):
            super().handle_error(request, client_address)


def start_server(seed=0):
    server = Server(("127.0.0.1", 0), Hostile)
    server.daemon_threads = True
    server.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    server.lock = threading.Lock()
    server.random = random.Random(seed)
    server.known = set()  # questions whose answers or refusals a client has kept
    server.num_repeated = 0  # requests for them
    server.charged = Counter()  # {question: requests that the server wants to be paid for}
    server.delivered = Counter()  # {question: complete answers that were sent}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def start_client(server, folder, count, **limits):
    script = CLIENT.format(
        root=str(ROOT),
        folder=str(folder),
        url=server.url,
        count=count,
        price=PRICE,
        concurrency=CONCURRENCY,
        limits=limits,
    )
    environment = os.environ | {"HOSTILE_KEY": KEY, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", script], stderr=subprocess.PIPE, text=True, env=environment
    )


def read_lines(path):
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def kill_repeatedly(server, folder, count, kills):
    """Kill clients at work; returns what the server had delivered and they had not kept. Every
    third is asked to end by SIGTERM, and keeps all."""
    delays = random.Random(1)
    num_lost = 0
    for kill in range(kills):
        before = len(read_lines(folder / "calls.jsonl"))
        server.known = known_questions(folder)
        client = start_client(server, folder, count)
        share = max(3, count // (kills + 1) // 2)
        while client.poll() is None and len(read_lines(folder / "calls.jsonl")) < before + share:
            time.sleep(0.01)
        time.sleep(delays.random() * 0.1)
        is_polite = kill % 3 == 1
        client.send_signal(signal.SIGTERM if is_polite else signal.SIGKILL)
        _, messages = client.communicate()
        assert client.returncode == (143 if is_polite else -signal.SIGKILL), messages
        time.sleep(1.0)  # what is under way in the server ends
        kept = [line for line in read_lines(folder / "calls.jsonl") if "refused" not in line]
        lost = server.delivered.total() - len(kept) - num_lost
        assert not (is_polite and lost), "an answer is lost after SIGTERM"
        assert 0 <= lost <= CONCURRENCY
        num_lost += lost
    return num_lost


def known_questions(folder):
    """The questions that were refused, and those whose answer tells its question."""
    known = set()
    for line in read_lines(folder / "calls.jsonl"):
        text = line.get("question") or line["text"] or ""
        known.update(int(number) for number in re.findall(r"\d+(?= and 1| \+ 1)", text))
    return known


def run(count, kills):
    """{what: (number, how many of them held)} of a run with all misbehaviours and kills."""
    server = start_server()
    table = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        num_lost = kill_repeatedly(server, folder, count, kills)
        server.known = known_questions(folder)
        client = start_client(server, folder, count)
        _, messages = client.communicate()
        assert client.returncode == 0, messages
        result = json.loads((folder / "answers.json").read_text())
        lines = read_lines(folder / "calls.jsonl")

        expected = []
        for number in range(count):
            is_missing = any(is_fated(number, 50, rest) for rest in (7, 8, 14))
            expected.append(None if is_missing else f"{number} and 1.\n#### {number + 1}")
        pairs = zip(result["answers"], expected, strict=True)
        table["answers as expected"] = (count, sum(found == wanted for found, wanted in pairs))
        once = Counter(line["key"] for line in lines)
        table["answers kept once"] = (count, sum(n == 1 for n in once.values()))
        num_known = len(known_questions(folder))
        table["known questions not asked again"] = (num_known, num_known - server.num_repeated)
        table["kills"] = (kills, kills)
        print(f"lost with SIGKILL: {num_lost} answers under way, all of them counted as calls")

        # Limits: every request that may be paid for is counted, over all kills.
        charged = server.charged.total()
        table["calls counted at least as charged"] = (charged, min(charged, result["calls"]))
        paid = charged * (TOKENS_IN + TOKENS_OUT) * PRICE / 1e6
        table["dollars counted at least as charged"] = (paid, min(paid, result["cost"]))
        print(f"calls: {result['calls']} counted, {charged} charged by the server")

        content = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
        forms = (KEY, json.dumps(KEY)[1:-1], json.dumps(json.dumps(KEY))[1:-1], KEY[:20])
        forms = [form.encode() for form in forms]
        table["forms of the key in no file"] = (len(forms), sum(f not in content for f in forms))
        table["flags"] = check_flags(lines, count)
    server.shutdown()
    return table


def check_flags(lines, count):
    """(number of answers that have to be flagged, number of those that are)."""
    wanted = sum(number % 50 in (15, 16, 17, 18) for number in range(count))
    flagged = 0
    for line in lines:
        other_model = line.get("model", "big") != "big"
        flagged += "finish" in line or other_model or "usage_missing" in line
    return wanted, flagged


def run_limits(count, num_runs=2):
    """Exact limits, each in a folder of its own, and over several runs."""
    table = {}
    for name, limit in (("max_calls", count // 2), ("max_cost", count * 0.05)):
        server = start_server(seed=3)
        with tempfile.TemporaryDirectory() as folder:
            for _ in range(num_runs):
                client = start_client(server, folder, count, **{name: limit})
                _, messages = client.communicate()
                assert client.returncode == 1 and f"{name}=" in messages, messages
            time.sleep(1.0)
        charged = server.charged.total()
        spent = charged if name == "max_calls" else charged * (TOKENS_IN + TOKENS_OUT) * PRICE / 1e6
        print(f"{name}={limit:g}: {spent:g} by the server's count")
        table[f"{name} never exceeded"] = (1, int(spent <= limit))
        server.shutdown()
    return table


def test_a_hostile_server_and_kills():
    table = run(count=60, kills=4) | run_limits(count=40, num_runs=1)
    for what, (number, held) in table.items():
        assert held == number, what


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--questions", type=int, default=500)
    parser.add_argument("--kills", type=int, default=10)
    options = parser.parse_args()
    for what, (number, held) in (
        run(options.questions, options.kills) | run_limits(options.questions)
    ).items():
        print(f"{what}: tried {number:g}, held {held:g}")
