"""`study`: is the attention loss worth it on one's own data?  A grid of runs, a forest plot, a verdict.

Learning rate and weight are chosen on `val`.  Differences are told on `test`, paired by seed and image.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from tyro.conf import Positional

from ..data.fsc147 import open_split
from ..evaluation import paired_difference
from ..evaluation.answering import EvaluateConfig, evaluate
from ..files import write_json
from ..model.device import free_models
from ..model.load import recipe_of
from ..options import ConfigError, need, parse_options
from ..training.memory import plan_training
from ..training.setup import TrainConfig
from ..training.sweep import GridRun, SweepConfig, grid_runs, processes, row_of

COUNTS = "counts alone"
RESULT = "test.json"  # in a run's folder


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """Measure what the attention loss is worth: study --data ROOT --model MODEL -- --batch-size 32."""

    train: Positional[tuple[str, ...]] = ()
    """After --: options of train that all runs share."""
    data: Path
    """Folder in FSC147's official layout, with pictures in train, val and test."""
    model: str = "tiny"
    """"tiny", a folder, or a hub id such as Qwen/Qwen3-VL-2B-Instruct."""
    out: Path = Path("runs/study")
    """Folder of the study; the same command goes on where it was interrupted."""
    budgets: tuple[int, ...] = ()
    """Numbers of training pictures, each a study of its own; val is cut to the same number.  None: all pictures."""
    epochs: int = 3
    """Epochs of each run."""
    learning_rates: tuple[float, ...] = ()
    """One is chosen with counts alone, on val; none: the model's own."""
    weights: tuple[float, ...] = (0.1, 0.5)
    """Weights of the attention loss; the one with the least mean MAE on val is told on test."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the runs that choose."""
    confirm: tuple[int, ...] = ()
    """Seeds of the runs that are told on test; none: those that choose."""
    parallel: int = 1
    """Runs at once; small models leave room for many on one GPU."""
    dry_run: bool = False
    """Tell the number of runs and their time, and end."""

    def __post_init__(self):
        need(self, "seeds", len(self.seeds) > 0, "one seed or more")
        need(self, "weights", len(self.weights) > 0 and min(self.weights) > 0, "one weight above 0 or more")
        need(self, "budgets", min(self.budgets, default=1) > 0, "numbers above 0")
        need(self, "parallel", self.parallel >= 1, "at least 1")
        need(self, "epochs", self.epochs >= 2, "at least 2: one variant trains the encoder from half of them on")


@dataclass(frozen=True)
class Variant:
    """A line of the forest plot: how its runs train."""

    name: str
    weight: float = 0.0  # of the attention loss
    target: str = "objects"
    unfreeze: int | None = None  # first epoch that trains the vision encoder
    against: str = COUNTS  # the variant that it is compared with


def run_study(config: StudyConfig) -> dict:
    """Train what is not trained yet, answer `test`, write `study.json` and `forest.png`; `fsc147lib study` calls this.

    Returns:
        `before` (test metrics of the untuned model) and `budgets`, each with its `pictures`, chosen `learning_rate`
        and `weight`, `validation` (mean MAE by weight), `variants` (rows of `told`) and `verdict` (sentences).

    Raises:
        ConfigError: a run failed, with its last line.
        DataError: a split is empty.
    """
    sizes = {split: len(open_split(config.data, split)) for split in ("train", "val", "test")}
    budgets = [min(budget, sizes["train"]) for budget in config.budgets or (sizes["train"],)]
    describe_plan(config, budgets)
    if config.dry_run:
        return {}
    before = answer(shared_options(config, budgets[0]), config.model)["metrics"]
    study: dict = {"config": json.loads(json.dumps(asdict(config), default=str)), "before": before, "budgets": []}
    for budget in budgets:
        study["budgets"].append(study_budget(config, budget, before))
        write_json(config.out / "study.json", study)
        forest_plot(forest_lines(study)).savefig(config.out / "forest.png", dpi=150)
    return study


def describe_plan(config: StudyConfig, budgets: list[int]) -> None:
    """Print the number of runs, and the time of their steps by a step that is measured."""
    choosing = (max(1, len(config.learning_rates)) + len(config.weights)) * len(config.seeds)
    told_runs = len(variants(config, 1.0)) * len(config.confirm or config.seeds)
    runs = choosing + told_runs - (0 if config.confirm else 2 * len(config.seeds))
    fits, text, epoch = plan_training(shared_options(config, budgets[-1]))
    if not fits:
        raise ConfigError(text)
    minutes = runs * config.epochs * epoch * sum(budgets) / budgets[-1] / config.parallel / 60
    pictures = " and ".join(map(str, budgets))
    print(f"{runs * len(budgets)} runs of {config.epochs} epochs, on {pictures} training pictures.")
    print(
        f"Their steps take about {minutes:.0f} minutes here; starts, validations and answers come on top.", flush=True
    )


def shared_words(config: StudyConfig, budget: int) -> list[str]:
    """Words of `train` for all runs of a budget."""
    words = ["--data", str(config.data), "--model", config.model, "--epochs", str(config.epochs)]
    return [*words, "--limit", str(budget), "--tracking", "disabled", "--no-checkpoints", *config.train]


def shared_options(config: StudyConfig, budget: int) -> TrainConfig:
    """The options that all runs of a budget share."""
    return parse_options(TrainConfig, [*shared_words(config, budget), "--out", str(config.out / "plan")], "train")


def variants(config: StudyConfig, weight: float) -> list[Variant]:
    """The variants that are told on test, counts alone first."""
    chosen = [Variant(COUNTS), Variant(f"objects, weight {weight:g}", weight)]
    controls = {"shuffled": "another image's objects", "centre": "the centre"}
    chosen += [Variant(f"control: {words}", weight, target) for target, words in controls.items()]
    own = 0 if recipe_of(config.model).train_vision else config.epochs
    for epoch, words in ((config.epochs, "frozen"), (config.epochs // 2, "from half on"), (0, "from the start")):
        if epoch != own:
            alone = f"{COUNTS}, encoder {words}"
            chosen += [Variant(alone, 0.0, "objects", epoch)]
            chosen += [Variant(f"objects, encoder {words}", weight, "objects", epoch, alone)]
    return chosen


def study_budget(config: StudyConfig, budget: int, before: dict) -> dict:
    """Choose, confirm and tell for one number of training pictures."""

    def results(points: list[tuple[float | None, Variant]], seeds: Sequence[int]) -> list[list[dict]]:
        grids = [grid(config, budget, rate, variant, seeds) for rate, variant in points]
        finish(config, [run for runs in grids for run in runs])
        return [[json.loads((run.config.out / RESULT).read_text()) for run in runs] for runs in grids]

    def mean_maes(points: list[tuple[float | None, Variant]]) -> list[float]:
        return [float(np.mean([run["val"]["mae"] for run in runs])) for runs in results(points, config.seeds)]

    rates = config.learning_rates or (None,)
    by_rate = dict(zip(rates, mean_maes([(rate, Variant(COUNTS)) for rate in rates]), strict=True))
    rate = min(rates, key=by_rate.__getitem__)
    weights = (0.0, *config.weights)
    by_weight = dict(zip(weights, mean_maes([(rate, Variant("", weight)) for weight in weights]), strict=True))
    weight = min(config.weights, key=by_weight.__getitem__)
    chosen = variants(config, weight)
    runs = results([(rate, variant) for variant in chosen], config.confirm or config.seeds)
    found = dict(zip([variant.name for variant in chosen], runs, strict=True))
    rows = [told(variant, found[variant.name], found[variant.against]) for variant in chosen]
    return {
        "pictures": budget, "learning_rate": rate, "weight": weight, "validation_by_rate": by_rate,
        "validation": by_weight, "variants": rows, "verdict": verdict(budget, rows, before),
    }  # fmt: skip


def grid(config: StudyConfig, budget: int, rate: float | None, variant: Variant, seeds: Sequence[int]) -> list[GridRun]:
    """The runs of a variant, one for each seed."""
    point = {
        "learning_rate": rate, "attention_weight": variant.weight, "attention_target": variant.target,
        "unfreeze_vision_at": variant.unfreeze, "seed": ",".join(map(str, seeds)),
    }  # fmt: skip
    axes = tuple(f"{name}={value}" for name, value in point.items())
    return grid_runs(SweepConfig(tuple(shared_words(config, budget)), axes, config.out / f"pictures={budget}"))


def finish(config: StudyConfig, runs: list[GridRun]) -> None:
    """Train and answer the runs that have no result yet.  A run's weights are removed once it has answered."""
    trained = {run.name: row_of(run, 0.0)["finished"] for run in runs}
    for run in runs:
        if trained[run.name] and not (run.config.out / RESULT).is_file():
            conclude(run)
    waiting = [run for run in runs if not trained[run.name]]
    for run, seconds, error in processes(waiting, runs[0].config.out.parent / "logs", config.parallel):
        if error:
            raise ConfigError(f"{run.name} failed: {error}.  The same command tries it again")
        conclude(run)
        print(f"{run.config.out.parent.name}, {run.name}: {seconds:.0f} s", flush=True)


def conclude(run: GridRun) -> None:
    """Write a run's RESULT: the last validation, and the last weights' answers on `test`."""
    result = {"val": row_of(run, 0.0)["last"], **answer(run.config, str(run.config.out / "last"))}
    write_json(run.config.out / RESULT, result)
    for path in run.config.out.rglob("*.safetensors"):
        path.unlink()


def answer(options: TrainConfig, model: str) -> dict:
    """A model's answers on `test`: `metrics`, and each image's `error`."""
    found = evaluate(EvaluateConfig(
        options.data, model, "test", batch_size=64, category=options.category, max_pixels=options.max_pixels,
        precision=options.precision, workers=options.workers,
    ))  # fmt: skip
    free_models()
    return {"metrics": found.metrics, "error": [image.error for image in found.images]}


def told(variant: Variant, found: list[dict], against: list[dict]) -> dict:
    """A variant's row: test metrics of each of its runs, and the difference in MAE to another variant's runs.

    `difference` is low end, mean and high end of a 95 % bootstrap interval over seeds and images, in objects; below 0
    the variant is better.  `better` counts the seeds in which it is.
    """
    errors, others = (np.array([run["error"] for run in runs]) for runs in (found, against))  # [seeds, N]
    names = [name for name in ("mae", "exact", "kl") if found[0]["metrics"][name] is not None]
    return {
        **asdict(variant), "runs": len(found),
        **{name: [run["metrics"][name] for run in found] for name in names},
        "difference": paired_difference(errors, others), "better": int((errors.mean(1) < others.mean(1)).sum()),
    }  # fmt: skip


def verdict(budget: int, rows: list[dict], before: dict) -> list[str]:
    """What the numbers say, a sentence each."""
    counts, objects, *others = rows
    seeds, (low, middle, high) = objects["runs"], objects["difference"]
    own, other = np.mean(counts["mae"]), np.mean(objects["mae"])
    certain = "does not include" if low > 0 or high < 0 else "includes"
    sentences = [
        f"Fine-tuned on {budget} pictures, counts alone change the test MAE from {before['mae']:.2f} to {own:.2f}.",
        f"Against that, both losses change it by {100 * middle / own:+.0f} %, to {other:.2f} ({middle:+.2f} objects, "
        f"95 % interval {low:+.2f} to {high:+.2f}, which {certain} 0; better in {objects['better']} of {seeds} seeds).",
    ]
    if "kl" in counts and "kl" in objects:
        moved = sum(ours < theirs for ours, theirs in zip(objects["kl"], counts["kl"], strict=True))
        kl = f"KL {np.mean(counts['kl']):.2f} to {np.mean(objects['kl']):.2f}"
        sentences.append(f"The attention loss moves attention onto the objects in {moved} of {seeds} seeds ({kl}).")
    for row in others:
        if row["name"].startswith("control"):
            low, middle, high = row["difference"]
            sentences.append(f"{row['name'].capitalize()}: {middle:+.2f} objects ({low:+.2f} to {high:+.2f}).")
    return sentences


def forest_lines(study: dict, name: str = "") -> list[dict]:
    """Lines of `forest_plot` from a study, `name` before each group."""
    lines = []
    for budget in study["budgets"]:
        group = f"{name}{', ' if name else ''}{budget['pictures']} pictures"
        for row in budget["variants"]:
            if row["name"] != row["against"] and not row["name"].startswith(COUNTS):
                lines.append({"group": group, "name": row["name"], "difference": row["difference"]})
    return lines


def forest_plot(lines: list[dict]) -> Figure:
    """Differences in test MAE with their 95 % intervals, a line each, under the name of its group; 0 is no effect."""
    groups = list(dict.fromkeys(line["group"] for line in lines))
    figure, axes = plt.subplots(figsize=(8, 0.8 + 0.27 * (len(lines) + len(groups))), layout="constrained")
    labels, place = [], 0
    for group in groups:
        labels.append((place, group, "bold"))
        for line in (line for line in lines if line["group"] == group):
            place += 1
            low, middle, high = line["difference"]
            colour = "tab:gray" if line["name"].startswith("control") else "tab:blue"
            axes.plot([low, high], [place, place], color=colour, linewidth=2)
            axes.plot(middle, place, "o", color=colour)
            labels.append((place, line["name"], "normal"))
        place += 1
    axes.axvline(0, color="black", linewidth=1)
    axes.set_yticks([at for at, *_ in labels], [words for _, words, _ in labels], fontsize=10)
    for tick, (_, _, weight) in zip(axes.get_yticklabels(), labels, strict=True):
        tick.set_fontweight(weight)
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_xlabel("difference in test MAE to counts alone, objects; left of 0: fewer errors")
    return figure
