"""Checks and parsing of the commands' options.

Each command has a dataclass, in the module that reads it: `TrainConfig(epochs=2)` is `train --epochs 2`.
"""

import os
from collections.abc import Sequence
from dataclasses import MISSING, fields
from typing import Literal

Precision = Literal["auto", "fp32", "bf16", "fp16"]


class ConfigError(ValueError):
    """An option has a value that cannot be used; the message names the option."""


def need(config, name: str, holds: bool, rule: str) -> None:
    """Raise ConfigError for a field of a config if `holds` is False; `rule` completes "must be"."""
    if not holds:
        flag = "--" + name.replace("_", "-")
        raise ConfigError(f"{name} ({flag}) is {getattr(config, name)}, but must be {rule}")


def need_report(config, beside: str = "") -> None:
    """Check the option `json` of a config, a report's path or None; ConfigError if no file can be written there.

    `beside` names the rows of a .csv that is written beside the report, whose own ending must then be another.
    """
    if config.json is not None:
        folder = next(folder for folder in config.json.absolute().parents if folder.exists())
        writable = not config.json.is_dir() and folder.is_dir() and os.access(folder, os.W_OK)
        need(config, "json", writable, "a file, not a folder, at a place where files can be written")
        need(config, "json", not beside or config.json.suffix != ".csv", f"no .csv: the {beside} go to one beside it")


def parse_options(config: type, words: Sequence[str], program: str):
    """Parse the words of a command line into `config`.  `--preset NAME` takes defaults from `config.PRESETS[NAME]`.

    Raises:
        SystemExit: the words are no such options; the reason is printed.
        ConfigError: the preset is unknown.
    """
    import tyro  # takes a third of a second

    words, presets, preset = list(words), getattr(config, "PRESETS", {}), {}
    if presets and "--preset" in words:
        at = words.index("--preset")
        name = "".join(words[at + 1 : at + 2])
        if name not in presets:
            raise ConfigError(f"preset (--preset) is {name!r}, but must be one of {', '.join(presets)}")
        required = {field.name: tyro.MISSING for field in fields(config) if field.default is MISSING}
        words[at : at + 2], preset = [], {"default": config(**required, **presets[name])}
    return tyro.cli(config, args=words, prog=program, **preset)
