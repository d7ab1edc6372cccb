"""What a person looks at: what the losses cost, how fast training is, figures, and the runner of the notebooks.

Nothing imports it but commands and notebooks.
"""

import importlib

_MODULE_OF = {"time_losses": "overhead", "read_report": "timing", "table": "timing", "write_report": "timing"}
__all__ = ["figures", "workbook", *_MODULE_OF]  # noqa: F822 the two are modules


def __getattr__(name: str):
    """The public names, loaded when first asked for: torch takes seconds to import, matplotlib and Jupyter one."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no name {name!r}")
    return getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
