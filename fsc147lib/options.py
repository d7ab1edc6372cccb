"""What the commands' options share: each command's dataclass lies in the module that reads it.

A dataclass is also the command line: `TrainConfig(epochs=2)` is `train --epochs 2`.  Values are checked
where one is made, so that a long run does not end on a typing error.
"""

import os
from collections.abc import Sequence
from dataclasses import MISSING, fields
from typing import Literal

Precision = Literal["auto", "fp32", "bf16", "fp16"]


class ConfigError(ValueError):
    """A value of a config cannot be used; the message names the field."""


def need(config, name: str, holds: bool, rule: str) -> None:
    """Refuse a field's value, in one sentence, where `holds` is false."""
    if not holds:
        flag = "--" + name.replace("_", "-")
        raise ConfigError(f"{name} ({flag}) is {getattr(config, name)}, but must be {rule}")


def need_report(config, beside: str = "") -> None:
    """Refuse a `json` that cannot be written, before any work is done for it; `beside` it is a .csv of these."""
    if config.json is not None:
        folder = next(folder for folder in config.json.absolute().parents if folder.exists())
        writable = not config.json.is_dir() and folder.is_dir() and os.access(folder, os.W_OK)
        need(config, "json", writable, "a file, not a folder, at a place where files can be written")
        need(config, "json", not beside or config.json.suffix != ".csv", f"no .csv: the {beside} go to one beside it")


def parse_options(config: type, words: Sequence[str], program: str):
    """A command's options from a command line; `--preset NAME` gives those that `config.PRESETS` has another default.

    Raises:
        SystemExit: the words make no options; the reason is printed.
        ConfigError: there is no such preset.
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
