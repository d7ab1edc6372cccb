"""What the commands' options share: each command's dataclass lies in the module that reads it.

A dataclass is also the command line: `TrainConfig(epochs=2)` is `train --epochs 2`.  Values are checked
where one is made, so that a long run does not end on a typing error.

Left out: the options themselves.
"""

from collections.abc import Sequence
from typing import Literal

Precision = Literal["auto", "fp32", "bf16"]


class ConfigError(ValueError):
    """A value of a config cannot be used; the message names the field."""


def need(config, name: str, holds: bool, rule: str) -> None:
    """Refuse a field's value, in one sentence, where `holds` is false."""
    if not holds:
        flag = "--" + name.replace("_", "-")
        raise ConfigError(f"{name} ({flag}) is {getattr(config, name)}, but must be {rule}")


def split_preset(words: Sequence[str], presets: dict[str, dict]) -> tuple[list[str], dict]:
    """Take `--preset NAME` out of a command's words.

    Returns:
        The other words, and the preset's values, which are defaults for them; none without a preset.
    """
    words = [part for word in words for part in (word.split("=", 1) if word.startswith("--preset=") else [word])]
    if "--preset" not in words:
        return words, {}
    at = words.index("--preset")
    name = "".join(words[at + 1 : at + 2])
    if name not in presets:
        raise ConfigError(f"preset (--preset) is {name!r}, but must be one of {', '.join(presets)}")
    return words[:at] + words[at + 2 :], presets[name]
