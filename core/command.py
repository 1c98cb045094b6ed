"""The command that started a run, to be shown and repeated."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Sequence

from core.options import SECRET_NAMES

MASK = "***"
# In a URL: https://user:password@host
CREDENTIALS = re.compile(r"(?<=://)[^/@\s]+(?=@)")


def started_by() -> str:
    """The command of this process, quoted for a shell, with secrets masked.

    Empty in a notebook or at a prompt, where no command would repeat the run.
    """
    main_file = getattr(sys.modules["__main__"], "__file__", None)
    if main_file is None or not sys.argv or not sys.argv[0]:
        return ""
    words = ["python", sys.argv[0], *mask_secrets(sys.argv[1:])]
    command = shlex.join(words)
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if processes > 1:
        command += f"  # in each of {processes} processes of accelerate launch"
    return command


def mask_secrets(arguments: Sequence[str]) -> list[str]:
    """The arguments, with the values of options that are named like secrets masked.

    The name may be that of the option or a key in a mapping: --model_kwargs='{api_key: ...}'.
    """
    masked = []
    value_is_secret = False
    for argument in arguments:
        is_option = argument.startswith("-")
        name, equals, value = argument.partition("=")
        if value_is_secret and not argument.startswith("--"):
            shown = MASK
        elif is_option and equals:
            shown = f"{name}={mask_value(name, value)}"
        elif is_option:
            shown = argument
        else:
            shown = mask_value("", argument)
        value_is_secret = is_option and not equals and is_secret(name)
        masked.append(shown)
    return masked


def mask_value(name: str, value: str) -> str:
    mapped_names = re.findall(r"([\w.-]+)[\"']?\s*:", value) if "{" in value else []
    if is_secret(name) or any(map(is_secret, mapped_names)):
        return MASK
    return CREDENTIALS.sub(MASK, value)


def is_secret(name: str) -> bool:
    return SECRET_NAMES.search(name.lower()) is not None
