"""The process that `Subprocess` starts. It imports nothing slow, so that it starts quickly."""

import importlib.util
import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from core.reward_calls import RewardCall, to_plain


def serve(path: str, name: str) -> None:
    """The other side of `Subprocess`: answer each line on stdin, [method, prompts, completions,
    columns], with a line on stdout."""
    requests = os.fdopen(os.dup(0), encoding="utf-8")
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    # Output of the function, or of a C library, must not mix with answers: send it to stderr. The
    # function, or a program that it starts, must not read requests: give it an empty stdin.
    os.dup2(2, 1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    # It would warn that its timeouts are off; instead, this process is killed if it takes too long.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    try:
        call = RewardCall(load_function(path, name))
    except (Exception, SystemExit) as error:
        send(answers, error=describe(error))
        return

    send(answers, result="ready")
    methods: dict[str, Callable] = {"call": call, "missing": call.missing}
    for line in requests:
        method, *arguments = json.loads(line)
        try:
            result = methods[method](*arguments)
            send(answers, result=result)
        except (Exception, SystemExit) as error:
            send(answers, error=describe(error))


def load_function(path: str, name: str) -> Callable:
    """The function `name` in the file at `path`."""
    # Make modules beside the file importable, as with `python path`. Our own verifiers need none,
    # and core/statistics.py would shadow the standard library's.
    folder = Path(path).resolve().parent
    if folder != Path(__file__).resolve().parent:
        sys.path.insert(0, str(folder))
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return getattr(module, name)


def send(file: TextIO, **answer) -> None:
    text = json.dumps(answer, default=to_plain)
    print(text, file=file, flush=True)


def describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
