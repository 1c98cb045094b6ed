"""The process that `Subprocess` starts. It imports nothing of ours, so that it starts at once."""

import importlib.util
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any, TextIO


def serve(path: str, name: str) -> None:
    """The other side of `Subprocess`: answer each line on stdin, [args, kwargs], by a line on
    stdout."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    # What the function prints, or a C library under it, is not an answer: it goes to stderr.
    os.dup2(2, 1)
    # It warns that its timeouts are off: this process is killed from outside if it takes long.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    try:
        function = load_function(path, name)
    except Exception as error:
        send(answers, error=describe(error))
        return

    send(answers, result="ready")
    for line in sys.stdin:
        args, kwargs = json.loads(line)
        try:
            result = function(*args, **kwargs)
            send(answers, result=result)
        except Exception as error:
            send(answers, error=describe(error))


def load_function(path: str, name: str) -> Any:
    """The function `name` of the file at `path`."""
    # A file anywhere, by its path: its folder need not be on sys.path.
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return getattr(module, name)


def send(file: TextIO, **answer) -> None:
    text = json.dumps(answer, default=float)  # default: numbers of numpy and torch
    print(text, file=file, flush=True)


def describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
