"""The process that `Subprocess` of core/function_process.py starts. It imports nothing of ours, so that it starts at once."""

import importlib.util
import json
import os
import sys
from pathlib import Path


def serve(path: str, name: str) -> None:
    """The other side of `Subprocess`: answer each line on stdin by a line on stdout."""
    out = open(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what the function prints, or a C library under it, is not an answer
    say = lambda **answer: print(json.dumps(answer, default=float), file=out, flush=True)
    try:
        spec = importlib.util.spec_from_file_location(Path(path).stem, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        function = getattr(module, name)
    except Exception as error:
        return say(error=f"{type(error).__name__}: {error}")
    say(result="ready")
    for line in sys.stdin:
        args, kwargs = json.loads(line)
        try:
            say(result=function(*args, **kwargs))
        except Exception as error:
            say(error=f"{type(error).__name__}: {error}")
