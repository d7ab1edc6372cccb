"""The command line: `python -m fsc147lib COMMAND ...`; `--help` lists the commands, and each one's options.

Left out: everything that a command does; each calls one function.
"""

import json
import sys
from typing import Annotated, Union

import tyro

from .data.fsc147 import CheckConfig
from .data.scenes import SynthConfig
from .evaluation.answering import EvaluateConfig
from .files import write_text
from .report.overhead import OverheadConfig
from .report.throughput import ThroughputConfig
from .training.loop import TrainConfig


def run_check(config: CheckConfig) -> int:
    from .data.fsc147 import check

    report = check(config.root)
    print(report)
    if config.json is not None:
        write_text(config.json, json.dumps(report.to_dict(), indent=1))
    return 0 if report.clean else 1


def run_synth(config: SynthConfig) -> int:
    from .data.scenes import make_dataset

    out = make_dataset(config.out, config.train, config.val, config.test, config.seed, sprites=config.sprites)
    print(f"drew {config.train} train, {config.val} val and {config.test} test pictures in {out},")
    print("and as many in val_seen and test_seen, of training's categories")
    return 0


def run_train(config: TrainConfig) -> int:
    from .training.loop import train

    result = train(config)
    print_metrics(result.epochs[-1]["val"])
    print(f"weights in {config.out}/best and {config.out}/last, losses in {config.out}/metrics.jsonl")
    return 0


def run_evaluate(config: EvaluateConfig) -> int:
    from .evaluation.answering import evaluate

    print_metrics(evaluate(config).metrics)
    return 0


def run_overhead(config: OverheadConfig) -> int:
    from .report.overhead import measure_overhead

    measure_overhead(config)
    return 0


def run_throughput(config: ThroughputConfig) -> int:
    from .report.throughput import measure_throughput

    measure_throughput(config)
    return 0


def print_metrics(metrics: dict[str, float]) -> None:
    for name, value in metrics.items():
        print(f"{name:>18} " + ("      none" if value is None else f"{value:10.4f}"))


COMMANDS = {
    CheckConfig: ("check", run_check),
    SynthConfig: ("synth", run_synth),
    TrainConfig: ("train", run_train),
    EvaluateConfig: ("evaluate", run_evaluate),
    OverheadConfig: ("overhead", run_overhead),
    ThroughputConfig: ("throughput", run_throughput),
}


def main() -> int:
    choices = [Annotated[config, tyro.conf.subcommand(name)] for config, (name, _) in COMMANDS.items()]
    try:
        config = tyro.cli(tyro.conf.OmitSubcommandPrefixes[Union[tuple(choices)]], prog="python -m fsc147lib")  # noqa: UP007
        return COMMANDS[type(config)][1](config)
    except (ValueError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
