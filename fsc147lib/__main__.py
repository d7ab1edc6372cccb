"""The command line: `fsc147lib COMMAND ...`, also as `python -m fsc147lib COMMAND ...`.

A command is an entry of `COMMANDS`.  Its options are the fields of a dataclass beside the code that reads them.  Its
module, and torch with it, is imported only when the command runs.
"""

import gc
import importlib
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from .files import write_json, write_text
from .options import parse_options


def run_check(config) -> bool:
    from .data import check

    report = check(config.root, config.category, config.max_pixels)
    print(report)
    if config.exclude is not None:
        write_text(config.exclude, "".join(f"{name}\n" for name in report.exclude))
        print(f"{len(report.exclude)} training images to leave out are in {config.exclude}")
    if config.json is not None:
        write_json(config.json, report.to_dict())
    return report.clean


def run_import(config) -> None:
    from .data.own import import_pictures

    sizes = import_pictures(config)
    print(f"{config.out}: " + ", ".join(f"{size} pictures in {split}" for split, size in sizes.items()))


def run_synth(config) -> None:
    from .data import make_dataset

    make_dataset(**vars(config))
    print(f"drew {config.train} train, {config.val} val and {config.test} test pictures in {config.out},")
    print("and as many in val_seen and test_seen, of training's categories")


def run_train(config) -> bool:
    from .evaluation import metrics_table
    from .report.comparison import against_before
    from .training import train
    from .training.memory import plan_training

    if config.dry_run:
        fits, text, _ = plan_training(config)
        print(text)
        return fits
    summary = train(config).summary()
    best, last, images = summary["best"], summary["last"], summary["images"]
    columns = {"before": summary["before"], f"best, epoch {best['epoch']}": best, f"last, epoch {last['epoch']}": last}
    title = f"{images['val']} images of the split val of {config.data}, {config.model} trained on {images['train']}"
    print(metrics_table(title, columns, summary["baselines"]))
    print(f"\n{against_before(config.out)}")
    kept = "best and last" if config.checkpoints else "last"
    print(f"weights in {config.out}/: {kept}; losses in {config.out}/metrics.jsonl")
    return True


def run_evaluate(config) -> None:
    from .evaluation import evaluate, metrics_table
    from .evaluation.answering import model_before
    from .report.comparison import difference

    found, before = evaluate(config), config.before or model_before(config.model)
    columns = {"model": found.metrics}
    if before:
        first = evaluate(replace(config, model=before))
        columns = {f"before ({before})": first.metrics, **columns}
    title = f"{len(found.images)} images of the split {config.split} of {config.data}, answered by {config.model}"
    print(metrics_table(title, columns, found.baselines, found.bins))
    if before:
        rows = ({image.name: image.row() for image in each.images} for each in (found, first))
        print("", *difference("model - before", *rows), sep="\n")
    if config.json is not None:
        found.write(config.json, data=str(config.data), split=config.split, model=str(config.model))


def run_sweep(config) -> bool:
    from . import training
    from .report.comparison import sweep_figure, sweep_table

    rows = training.run_sweep(config)
    print(sweep_table(rows))
    sweep_figure(rows).savefig(config.out / "sweep.png", dpi=120)
    print(f"all of it in {config.out}/sweep.json, drawn in {config.out}/sweep.png")
    return all(row["finished"] for row in rows)


def run_study(config) -> None:
    from .report import study

    for budget in study.run_study(config).get("budgets", []):
        print("\n".join(["", *budget["verdict"]]))
        print(f"all of it in {config.out}/study.json, drawn in {config.out}/forest.png")


def run_compare(config) -> None:
    from .report import comparison

    print(comparison.compare_runs(config))


def run_verify(config) -> bool:
    from .report.verify import verify_model

    return all(row["passed"] for row in verify_model(config))


# name: (module:dataclass of the options, function or its name in that module, help); False means faults were found
COMMANDS = {
    "check": ("data.checking:CheckConfig", run_check, "count what an FSC147 root holds and list every fault"),
    "import": ("data.own:ImportConfig", run_import, "make a root of pictures of your own, from CSV or COCO JSON"),
    "synth": ("data.scenes:SynthConfig", run_synth, "draw a small data set in FSC147's layout"),
    "verify": ("report.verify:VerifyConfig", run_verify, "see whether a model works on this machine"),
    "train": ("training.memory:TrainCommand", run_train, "fine-tune a model with both losses"),
    "sweep": ("training.sweep:SweepConfig", run_sweep, "train once for each combination of some options' values"),
    "study": ("report.study:StudyConfig", run_study, "measure what the attention loss is worth on your data"),
    "evaluate": ("evaluation.answering:EvaluateConfig", run_evaluate, "answer a split; errors and alignment"),
    "merge": ("model.load:MergeConfig", "merge", "write a model with its adapters merged, for plain transformers"),
    "predict": ("report.predictions:PredictConfig", "predict_files", "count in your pictures, and show where it looks"),
    "compare": ("report.comparison:CompareConfig", run_compare, "lay training runs side by side, with intervals"),
    "overhead": ("report.overhead:OverheadConfig", "measure_overhead", "measure what the attention loss costs"),
    "throughput": ("report.throughput:ThroughputConfig", "measure_throughput", "measure training, variant by variant"),
}


def main(words: list[str] | None = None) -> int:
    """Run one command; returns its exit status.

    0: done.  1: faults found.  2: refused, with the reason on stderr.  129, 130, 143: stopped by SIGHUP, Ctrl-C or
    SIGTERM.

    A program that registers a heatmap method can end with `sys.exit(main())`, and has the same commands.

    Args:
        words: the command line after the program's name; None: `sys.argv`.
    """
    words = sys.argv[1:] if words is None else words
    program = Path(sys.argv[0]).name
    program = "python -m fsc147lib" if program == "__main__.py" else program
    lines = [f"  {name:<10} {text}" for name, (_, _, text) in COMMANDS.items()]
    overview = "\n".join([f"usage: {program} COMMAND ...", "", *lines, "", f"options: {program} COMMAND --help"])
    if not words or words[0] in ("-h", "--help"):
        print(overview)
        return 0 if words else 2
    if words[0] not in COMMANDS:
        print(f"{words[0]!r} is no command\n\n{overview}", file=sys.stderr)
        return 2
    try:
        try:
            return run_command(words, program)
        except (ConnectionResetError, ConnectionRefusedError, EOFError, RuntimeError) as error:
            return tell_killed_reader(error)
    except RuntimeError as error:  # torch can report the same dead reader twice, the second time anywhere
        return tell_killed_reader(error)


def tell_killed_reader(error: Exception) -> int:
    """Print a sentence and return the exit status if a process that reads images was killed; raise other errors."""
    from .readers import reader_died

    if not reader_died(error):
        raise error
    print(f"a process that reads images was killed ({error}): give fewer --workers, or 0", file=sys.stderr)
    return 2


def run_command(words: list[str], program: str) -> int:
    """Run the command named by the first word; returns its exit status."""
    options, run, _ = COMMANDS[words[0]]
    place, config = options.split(":")
    try:
        module = imported(place)
        run = getattr(module, run) if isinstance(run, str) else run
        return 1 if run(parse_options(getattr(module, config), words[1:], f"{program} {words[0]}")) is False else 0
    except (ConnectionResetError, ConnectionRefusedError):  # OSErrors of a dead reader
        raise
    except (ValueError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:  # an `Interrupted` of `train` says how to continue
        with suppress(OSError):  # the terminal is closed
            print(f"stopped: {stop}" if str(stop) else "stopped", file=sys.stderr)
        return 128 + getattr(stop, "signal", 2)


def imported(place: str):
    """Import a command's module.  At the first import, the garbage collector is paused, and then ignores the objects
    that were made: hundreds of thousands, which stay."""
    name = f"fsc147lib.{place}"
    if name in sys.modules or not gc.isenabled():
        return importlib.import_module(name)
    gc.collect()  # freeze would keep garbage
    gc.disable()
    try:
        return importlib.import_module(name)
    finally:
        gc.freeze()
        gc.enable()


if __name__ == "__main__":
    sys.exit(main())
