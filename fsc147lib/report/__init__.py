"""What a person looks at: what the losses cost, how fast training is, figures, and the runner of the notebooks.

Nothing imports it but commands and notebooks.
"""

__all__ = [
    "comparison",
    "faithful",
    "figures",
    "overhead",
    "predictions",
    "throughput",
    "timing",
    "viewer",
    "workbook",
]  # modules, loaded on import
