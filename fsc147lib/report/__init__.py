"""What a person looks at: what the losses cost, how fast training is, figures, and the runner of the notebooks.

Nothing imports it but commands and notebooks.
"""

import importlib

_MODULE_OF = {
    "figures": "", "workbook": "",
    "time_losses": "overhead",
    "read_report": "timing", "table": "timing", "write_report": "timing",
}  # fmt: skip
__all__ = list(_MODULE_OF)


def __getattr__(name: str):
    """The public names, loaded when first asked for: torch takes seconds to import, matplotlib and Jupyter one."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no name {name!r}")
    module = importlib.import_module(f".{_MODULE_OF[name] or name}", __name__)
    return getattr(module, name) if _MODULE_OF[name] else module
