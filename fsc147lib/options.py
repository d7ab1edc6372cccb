"""What the commands' options share: each command's dataclass lies in the module that reads it.

A dataclass is also the command line: `TrainConfig(epochs=2)` is `train --epochs 2`.  Values are checked
where one is made, so that a long run does not end on a typing error.

Left out: the options themselves.
"""

from typing import Literal

Precision = Literal["auto", "fp32", "bf16"]


class ConfigError(ValueError):
    """A value of a config cannot be used; the message names the field."""


def need(config, name: str, holds: bool, rule: str) -> None:
    """Refuse a field's value, in one sentence, where `holds` is false."""
    if not holds:
        flag = "--" + name.replace("_", "-")
        raise ConfigError(f"{name} ({flag}) is {getattr(config, name)}, but must be {rule}")
