"""The training loop: train an epoch, validate, save a checkpoint, and again.

The same seed on the same machine gives the same run.  A run that stopped continues with `resume` to the same end: from
the step that a signal interrupted, or from the last whole epoch after a kill.
"""

import time
from collections.abc import Callable
from statistics import fmean

from tqdm import tqdm

from ..model.features import KeptFeatures
from ..model.network import freeze_vision
from ..readers import progress_bar
from .interrupt import Interrupted, Signals
from .memory import place_of_features
from .run import TrainResult, fingerprint, locked
from .setup import Run, TrainConfig
from .step import lazy_weight, learning_rate_factor


def train(config: TrainConfig, on_log: Callable | None = None, on_epoch: Callable | None = None) -> TrainResult:
    """Fine-tune a model; the command `train`.

    Args:
        config: the options; the run's folder is `config.out`.
        on_log: called with each line of metrics.jsonl (a dict), for a live curve.
        on_epoch: called with the `CountingModel` before training and after each epoch.

    Returns:
        The run's history.  The weights are in `out/best` and `out/last`.

    Raises:
        ConfigError, DataError, ModelError: before the first step, with the cure in the message.
        NonFiniteLoss: during training; `last/` holds the last whole epoch.
        Interrupted: after Ctrl-C, SIGTERM, SIGHUP or a notebook's interrupt; `last/` holds all finished steps.
    """
    with locked(config.out), Signals().caught() as signals:
        run = Run(config, on_log, on_epoch, signals=signals)
        try:
            open_run(run)
            if not run.result.epochs:
                run.validate()
                run.folder.write_table("before.csv", run.validation.images)
            with progress_bar(total=run.total_steps, initial=run.step, desc="train") as progress:
                while run.epoch < config.epochs:
                    started = time.perf_counter()
                    with signals.hold():
                        train_epoch(run, progress)
                    run.validate()
                    if run.folder.writes:
                        progress.write(epoch_line(run.result, config.epochs, time.perf_counter() - started))
                    with signals.hold():
                        run.save()
        except Interrupted:
            raise stopped(run, signals.received) from None
        finally:
            signals.held = True
            run.folder.close()
    return run.result


def epoch_line(result: TrainResult, epochs: int, seconds: float) -> str:
    """The last epoch in a line: mean losses of its logged steps, validation beside that before training, seconds.

    A second line warns where two epochs in a row are worse than before training.
    """
    epoch, validations = result.epochs[-1]["epoch"], [line["val"] for line in result.epochs]
    maes, steps = [found["mae"] for found in validations], [line for line in result.steps if line["epoch"] == epoch]
    parts = []
    for name in ("count", "attention"):
        values = [line[f"{name}_loss"] for line in steps if line[f"{name}_loss"] is not None]
        parts += [f"{name} loss {fmean(values):.3f}"] if values else []
    parts.append(f"MAE {maes[-1]:.2f} ({maes[0]:.2f} before)")
    if maes[-1] == min(maes[1:]):
        parts[-1] += ", the best"
    if validations[-1].get("kl") is not None:
        parts.append(f"KL {validations[-1]['kl']:.2f} ({validations[0]['kl']:.2f})")
    line = f"epoch {epoch} of {epochs}: {', '.join(parts)}; {seconds:.0f} s"
    if len(maes) > 2 and min(maes[-2:]) > maes[0]:
        line += "\nfor two epochs validation is worse than before training: try a lower learning rate"
    return line


def open_run(run: Run) -> None:
    """Begin or resume the run in its folder, and compute the image features that are kept."""
    config, run.fingerprint = run.config, fingerprint(run.samples)
    run.accelerator.wait_for_everyone()  # each process has checked the folder, in which one writes from here on
    with run.signals.hold():
        if config.resume:
            run.restore()
        run.folder.start(config)
    freeze_vision(run.model.network, not config.vision_trains(run.epoch))
    if config.caches_vision and not config.vision_trains(run.epoch):
        place = place_of_features(run)
        if place == "off":
            run.open_loader(pixels=True)
        else:
            kept = KeptFeatures.encode(run.model, run.kept_samples(), run.compute, place, run.workers)
            run.training_step.features = kept


def train_epoch(run: Run, progress: tqdm) -> None:
    """Train on each image once, or on the rest of an epoch that was interrupted; log every `log_every` steps."""
    config, step = run.config, run.training_step
    trains_vision = config.vision_trains(run.epoch)
    freeze_vision(run.model.network, not trains_vision)
    if trains_vision and not run.collate.pixels:  # kept features would become wrong
        step.features = None
        run.open_loader(pixels=True)
    step.loss.train()
    images, started = 0, time.perf_counter()
    for window in run.windows(run.epoch, run.step - run.epoch * run.batches.steps):
        factor = learning_rate_factor(run.step, run.total_steps, config.warmup, config.schedule)
        for group in step.optimizer.param_groups:
            group["lr"] = config.learning_rate * factor
        run.torn = True
        losses, norm = step(window, lazy_weight(config.attention_weight, config.heatmap_every, run.step))
        run.step, run.torn = run.step + 1, False
        images += sum(len(batch["names"]) for batch in window)
        progress.update()
        looked = config.heatmap_every > 1 and losses.attention is not None
        if run.step == 1 or run.step % config.log_every == 0 or looked:
            step.check()
            numbers = {name: None if value is None else float(value) for name, value in losses._asdict().items()}
            line = {
                "step": run.step, "epoch": run.epoch + 1, "count_loss": numbers["count"],
                "attention_loss": numbers["attention"], "total": numbers["total"],
                "learning_rate": config.learning_rate * factor,
                "gradient_norm": float(norm) if norm.isfinite() else None,
                "images_per_second": images / (time.perf_counter() - started),
            }  # fmt: skip
            if step.scaler.is_enabled():
                line["skipped_steps"] = step.skipped
            run.log(line)
            if time.monotonic() - run.saved_at >= 60 * config.save_every and run.step < run.total_steps:
                run.save()
            progress.set_postfix({name: f"{value:.3f}" for name, value in numbers.items() if value is not None})
            images, started = 0, time.perf_counter()
        run.signals.check()
    step.check()
    run.epoch += 1


def stopped(run: Run, number: int) -> Interrupted:
    """Save the steps that are not saved yet; returns the exception that says how to continue after signal `number`."""
    if run.step > run.saved and not run.torn:
        run.training_step.check()
        run.save()
    if not run.saved:
        return Interrupted(number)
    how = f"{run.config.out}/last: go on with the same command and --resume (in Python: resume=True)"
    return Interrupted(number, f"after step {run.saved} of {run.total_steps}, all of it in {how}")
