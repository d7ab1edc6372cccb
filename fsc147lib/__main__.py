"""The command line: `fsc147lib COMMAND ...`, also as `python -m fsc147lib COMMAND ...`.

A command is an entry of `COMMANDS`.  Its options are the fields of a dataclass that lies beside the code that
reads them.  A command's module, and torch with it, is imported once that command is chosen.

Left out: everything that a command does; each calls one function.
"""

import gc
import importlib
import sys
from contextlib import suppress
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
    from .training import train
    from .training.plan import describe, plan_training

    if config.dry_run:
        plans = plan_training(config)
        print(describe(plans))
        return plans[0].fits
    summary = train(config).summary()
    columns = {"before": summary["before"]}
    columns |= {f"{name}, epoch {summary[name]['epoch']}": summary[name] for name in ("best", "last")}
    title = f"{summary['images']['val']} images of the split val of {config.data}, {config.model} trained on"
    print(metrics_table(f"{title} {summary['images']['train']}", columns, summary["baselines"]))
    print(f"\nweights in {config.out}/best and {config.out}/last, losses in {config.out}/metrics.jsonl")
    return True


def run_evaluate(config) -> None:
    from .evaluation import evaluate, metrics_table

    found = evaluate(config)
    title = f"{len(found.images)} images of the split {config.split} of {config.data}, answered by {config.model}"
    print(metrics_table(title, {"model": found.metrics}, found.baselines, found.bins))
    if config.json is not None:
        found.write(config.json, data=str(config.data), split=config.split, model=str(config.model))


def run_predict(config) -> None:
    from .model.prediction import predict_files
    from .report.figures import save_prediction

    for i, prediction in enumerate(predict_files(config)):
        print(prediction)
        if config.map is not None:
            save_prediction(prediction, config.map_path(i))
            print(f"  map in {config.map_path(i)}")


def run_sweep(config) -> bool:
    from . import training
    from .report.comparison import sweep_figure, sweep_table

    rows = training.run_sweep(config)
    print(sweep_table(rows))
    sweep_figure(rows).savefig(config.out / "sweep.png", dpi=120)
    print(f"all of it in {config.out}/sweep.json, drawn in {config.out}/sweep.png")
    return all(row["finished"] for row in rows)


def run_compare(config) -> None:
    from .report.comparison import compare_runs

    print(compare_runs(config))


def run_verify(config) -> bool:
    from .report.verify import verify_model

    return all(row["passed"] for row in verify_model(config))


# name: (module and dataclass of its options; what runs, or its name in that module, False if it found faults; help)
COMMANDS = {
    "check": ("data.checking:CheckConfig", run_check, "count what an FSC147 root holds and list every fault"),
    "import": ("data.own:ImportConfig", run_import, "make a root of pictures of your own, from CSV or COCO JSON"),
    "synth": ("data.scenes:SynthConfig", run_synth, "draw a small data set in FSC147's layout"),
    "verify": ("report.verify:VerifyConfig", run_verify, "see whether a model works on this machine"),
    "train": ("training.plan:TrainCommand", run_train, "train to count and to look, and keep the best weights"),
    "sweep": ("training.sweep:SweepConfig", run_sweep, "train once for each combination of some options' values"),
    "evaluate": ("evaluation.answering:EvaluateConfig", run_evaluate, "answer a split; errors and alignment"),
    "predict": ("model.prediction:PredictConfig", run_predict, "count in your pictures, and show where it looks"),
    "compare": ("report.comparison:CompareConfig", run_compare, "lay training runs side by side, with intervals"),
    "overhead": ("report.overhead:OverheadConfig", "measure_overhead", "measure what the attention loss costs"),
    "throughput": ("report.throughput:ThroughputConfig", "measure_throughput", "measure training, variant by variant"),
}


def main(words: list[str] | None = None) -> int:
    """Run one command; returns its exit status.

    0: done.  1: faults found.  2: refused, with the reason on stderr.  129, 130, 143: stopped by SIGHUP, Ctrl-C or
    SIGTERM.

    A file of your own that adds a heatmap method first has the same commands: `sys.exit(main())` at its end.
    `words` follow the program's name on the command line; None: those of `sys.argv`.
    """
    words = sys.argv[1:] if words is None else words
    program = Path(sys.argv[0]).name
    program = "python -m fsc147lib" if program == "__main__.py" else program
    if not words or words[0] in ("-h", "--help"):
        print(overview(program))
        return 0 if words else 2
    if words[0] not in COMMANDS:
        print(f"{words[0]!r} is no command\n\n{overview(program)}", file=sys.stderr)
        return 2
    try:
        try:
            return run_command(words, program)
        except (ConnectionResetError, ConnectionRefusedError, EOFError, RuntimeError) as error:
            return tell_killed_reader(error)
    except RuntimeError as error:  # torch reports a dead reader once more, in the middle of the sentence on it
        return tell_killed_reader(error)


def tell_killed_reader(error: Exception) -> int:
    """The exit status, where a process that reads images was killed; else the error is raised again."""
    from .readers import reader_died

    if not reader_died(error):
        raise error
    print(f"a process that reads images was killed ({error}): give fewer --workers, or 0", file=sys.stderr)
    return 2


def run_command(words: list[str], program: str) -> int:
    """Run the command that the first word names; its exit status."""
    options, run, _ = COMMANDS[words[0]]
    place, config = options.split(":")
    try:
        module = imported(place)
        run = getattr(module, run) if isinstance(run, str) else run
        return 1 if run(parse_options(getattr(module, config), words[1:], f"{program} {words[0]}")) is False else 0
    except (ConnectionResetError, ConnectionRefusedError):
        raise
    except (ValueError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:  # of `train` with a sentence on how to go on
        with suppress(OSError):  # the terminal was closed
            print(f"stopped: {stop}" if str(stop) else "stopped", file=sys.stderr)
        return 128 + getattr(stop, "signal", 2)


def imported(place: str):
    """A command's module.  Where that is the first time, the garbage collector rests meanwhile and never looks at what
    the imports leave: hundreds of thousands of objects that stay."""
    name = f"fsc147lib.{place}"
    if name in sys.modules or not gc.isenabled():
        return importlib.import_module(name)
    gc.collect()  # or garbage would stay, too
    gc.disable()
    try:
        return importlib.import_module(name)
    finally:
        gc.freeze()
        gc.enable()


def overview(program: str) -> str:
    lines = [f"  {name:<10} {text}" for name, (_, _, text) in COMMANDS.items()]
    return "\n".join([f"usage: {program} COMMAND ...", "", *lines, "", f"options: {program} COMMAND --help"])


if __name__ == "__main__":
    sys.exit(main())
