"""Metrics as tables that a person understands: words, units, which end is good, and what not looking achieves."""

from collections.abc import Sequence

from .metrics import ABSURD

MEASURES = {  # key of `counting_metrics` or `alignment`: words, which end is good, format
    "mae": ("MAE, mean error (objects)", "low", "{:.2f}"),
    "rmse": ("RMSE, root mean squared error (objects)", "low", "{:.2f}"),
    "median_error": ("median error (objects)", "low", "{:.2f}"),
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
PLAIN_MEASURE = ("", "", "{:.3f}")
"""A metric without a line above is told by its key."""
TOLD_BELOW = ("absurd", "mae_without_absurd", "constant")

PUBLISHED = [
    {"name": "FamNet (published)", "mae": 22.08, "rmse": 99.54},
    {"name": "CountGD, text only (published)", "mae": 14.76, "rmse": 120.42},
    {"name": "QICA (published)", "mae": 12.41},
]
"""Errors on FSC147's test split as their authors give them."""

BIN_MEASURES = {"mae": "MAE", "nae": "NAE", "exact": "exact", "unparsed": "no number"}


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of as many cells each as text: the first column to the left, the others to the right, two spaces apart."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)


def metrics_table(
    title: str, columns: dict[str, dict], baselines: dict[str, dict], bins: dict[str, dict] | None = None
) -> str:
    """Metrics of models (heading -> metrics) on one split, a line each, beside those of models that never look.

    A sentence below tells a model's `absurd_answers`, where it gave any.

    Args:
        title: what was measured on what, the first line.
        baselines: of `constant_baselines`; may be empty.
        bins: of `metrics_by_bin`, printed below.
    """
    columns = columns | {f"{name} {row['constant']:.1f}": row for name, row in baselines.items()}
    rows = [["", "good", *columns]]
    found = dict.fromkeys(key for metrics in columns.values() for key in metrics if key not in TOLD_BELOW)
    for key in (*(key for key in MEASURES if key in found), *(key for key in found if key not in MEASURES)):
        words, good, _ = MEASURES.get(key, PLAIN_MEASURE)
        rows.append([words or key, good, *(_cell(metrics, key) for metrics in columns.values())])
    text = f"{title}\n\n{aligned(rows)}"
    if told := [_absurd_answers(name, metrics) for name, metrics in columns.items() if metrics.get("absurd")]:
        text += "\n\n" + "\n".join(told)
    if baselines:
        text += "\n\nmean, median: a model that never looks and always answers so; one that counts beats both"
    if bins:
        rows = [["true count", "images", *BIN_MEASURES.values()]]
        rows += [[name, str(row["images"]), *(_cell(row, key) for key in BIN_MEASURES)] for name, row in bins.items()]
        text += f"\n\n{aligned(rows)}"
    return text


def _absurd_answers(name: str, metrics: dict) -> str:
    answers, them = ("1 answer", "it") if metrics["absurd"] == 1 else (f"{metrics['absurd']} answers", "them")
    mae = _cell({"mae": metrics["mae_without_absurd"]}, "mae")
    return f"{name}: {answers} above {ABSURD} times the largest count in training; without {them} MAE {mae}"


def _cell(metrics: dict, key: str) -> str:
    form = MEASURES.get(key, PLAIN_MEASURE)[2]
    return "-" if metrics.get(key) is None else form.format(metrics[key]).replace("%", " %")
