"""The command line: parsing, and `--help` from the comments beside the options."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from dataclasses import MISSING, fields
from typing import Any, Sequence

from core.errors import ConfigError


def read_command_line(arguments: Sequence[str]) -> tuple[list[str], dict[str, str | None]]:
    """(words, options) of a command line, all as text: the config's annotations say what a value is, not its looks."""
    import fire

    flags = Counter(
        word.partition("=")[0].strip("-").replace("-", "_")
        for word in arguments
        if word[:2] == "--"
    )
    if wrong := [
        f"--{name} stands {count} times" for name, count in flags.items() if count > 1 or not name
    ]:
        raise ConfigError(f"{wrong[0]}; an option is written once, as --name=value")
    found: list = []
    cli = fire.decorators.SetParseFn(str)(
        lambda *words, **options: found.extend((list(words), options))
    )
    fire.Fire(cli, command=list(arguments))
    return found[0], {
        key: None if value in ("None", "null") else value for key, value in found[1].items()
    }


def option_help(config_class: Any) -> str:
    """The options of a config class: name, default, and the comment beside it in the source."""
    source = "".join(
        inspect.getsource(cls) for cls in reversed(config_class.__mro__) if hasattr(cls, "aliases")
    )
    comments, lines = dict(re.findall(r"^    (\w+): .*  # (.*)$", source, re.M)), []
    for f in fields(config_class):
        default = f.default if f.default_factory is MISSING else ",".join(f.default_factory())
        default = str(default).replace("\n", r"\n") if len(str(default)) < 60 else "..."
        lines.append(f"{f'  --{f.name}={default}':<46}  {comments[f.name]}")
    short = ", ".join(f"--{alias} is --{name}" for alias, name in config_class.aliases.items())
    return "\n".join([*lines, f"\n{short}"])
