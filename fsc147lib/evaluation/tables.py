"""Metrics as text tables: words, units, which direction is good."""

from collections.abc import Sequence

from .metrics import ABSURD

MEASURES = {  # metric: words, whether low or high is good, format
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
OTHER = ("", "", "{:.3f}")  # a metric that is not in MEASURES is printed under its own name
BIN_MEASURES = {"mae": "MAE", "nae": "NAE", "exact": "exact", "unparsed": "no number"}

PUBLISHED = [
    {"name": "FamNet (published)", "mae": 22.08, "rmse": 99.54},
    {"name": "CountGD, text only (published)", "mae": 14.76, "rmse": 120.42},
    {"name": "QICA (published)", "mae": 12.41},
]
"""Errors on FSC147's test split, from the papers."""


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of equal length as text: the first column aligned left, the others right, two spaces between columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)


def metrics_table(
    title: str, columns: dict[str, dict], baselines: dict[str, dict], bins: dict[str, dict] | None = None
) -> str:
    """Metrics of models on a split as text: a row for each metric, a column for each model and each baseline.

    Args:
        title: the first line.
        columns: heading -> metrics of a model; a sentence below the table tells its absurd answers, if it gave any.
        baselines: of `constant_baselines`; may be empty.
        bins: of `metrics_by_bin`, printed as a second table.
    """
    columns = columns | {f"{name} {row['constant']:.1f}": row for name, row in baselines.items()}
    rows = [["", "good", *columns]]
    found = dict.fromkeys(key for metrics in columns.values() for key in metrics)
    below = ("absurd", "mae_without_absurd", "constant", "epoch")  # in sentences and headings
    for key in [*(key for key in MEASURES if key in found), *(key for key in found if key not in (*MEASURES, *below))]:
        words, good, _ = MEASURES.get(key, OTHER)
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
    form = MEASURES.get(key, OTHER)[2]
    return "-" if metrics.get(key) is None else form.format(metrics[key]).replace("%", " %")
