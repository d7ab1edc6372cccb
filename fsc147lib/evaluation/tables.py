"""Metrics as a table that a person understands: words, units, which end is good, and what not looking achieves."""

MEASURES = {  # key of `counting_metrics` or `alignment`: words, which end is good, format
    "mae": ("MAE, mean error (objects)", "low", "{:.2f}"),
    "rmse": ("RMSE, root mean squared error (objects)", "low", "{:.2f}"),
    "nae": ("NAE, error / true count", "low", "{:.2f}"),
    "sre": ("SRE, root of mean (error² / true count)", "low", "{:.2f}"),
    "exact": ("exactly right", "high", "{:.0%}"),
    "within_1": ("right within 1 object", "high", "{:.0%}"),
    "within_10_percent": ("right within 10 %", "high", "{:.0%}"),
    "unparsed": ("answers that are no number", "low", "{:.0%}"),
    "unparsed_leniently": ("the same, read leniently", "low", "{:.0%}"),
    "mae_lenient": ("MAE, read leniently (decides nothing)", "low", "{:.2f}"),
    "count_loss": ("count loss (nats per answer token)", "low", "{:.3f}"),
    "kl": ("KL(target || map) (nats; 0 is perfect)", "low", "{:.3f}"),
    "mass_on_objects": ("part of the map on objects", "high", "{:.0%}"),
    "pearson": ("correlation of map and target (-1..1)", "high", "{:.2f}"),
    "pointing": ("map's largest cell has an object", "high", "{:.0%}"),
}
PUBLISHED = [
    {"name": "FamNet (published)", "mae": 22.08, "rmse": 99.54},
    {"name": "CountGD, text only (published)", "mae": 14.76, "rmse": 120.42},
    {"name": "QICA (published)", "mae": 12.41},
]
"""Errors on FSC147's test split as their authors give them."""

BIN_MEASURES = {"mae": "MAE", "nae": "NAE", "exact": "exact", "unparsed": "no number"}


def metrics_table(
    title: str, columns: dict[str, dict], baselines: dict[str, dict], bins: dict[str, dict] | None = None
) -> str:
    """Metrics of models (heading -> metrics) on one split, a line each, beside those of models that never look.

    Args:
        title: what was measured on what, the first line.
        baselines: of `constant_baselines`; may be empty.
        bins: of `metrics_by_bin`, printed below.
    """
    constants = {f"{name} {row['constant']:.1f}": row for name, row in baselines.items()}
    columns = {**columns, **constants}
    widths = [max(9, len(heading)) + 2 for heading in columns]
    lines = [title, "", f"{'':40}{'good':>6}" + _row(columns, widths)]
    for key, (words, good, form) in MEASURES.items():
        if any(key in metrics for metrics in columns.values()):
            lines.append(f"{words:40}{good:>6}" + _row((_cell(row, key, form) for row in columns.values()), widths))
    if constants:
        lines += ["", "mean, median: a model that never looks and always answers so; one that counts beats both"]
    if bins:
        headings = ["images", *BIN_MEASURES.values()]
        widths = [max(9, len(heading)) + 2 for heading in headings]
        lines += ["", f"{'true count':12}" + _row(headings, widths)]
        for name, row in bins.items():
            cells = [str(row["images"]), *(_cell(row, key, MEASURES[key][2]) for key in BIN_MEASURES)]
            lines.append(f"{name:12}" + _row(cells, widths))
    return "\n".join(lines)


def _cell(metrics: dict, key: str, form: str) -> str:
    return "-" if metrics.get(key) is None else form.format(metrics[key]).replace("%", " %")


def _row(cells, widths: list[int]) -> str:
    return "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
