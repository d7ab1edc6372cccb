"""What a person looks at: benchmarks of cost and speed, figures, the viewer, `verify`, the runner of the notebooks.

Commands and notebooks import it; the other rooms do not.
"""

__all__ = [
    "comparison", "faithful", "figures", "overhead", "predictions", "study", "throughput", "timing",
    "viewer", "workbook",
]  # fmt: skip
