"""The loop: a run trains epoch by epoch, validates after each, and leaves a checkpoint.

The same seed on the same machine gives the same run, and a run that was stopped goes on with `resume` to the very
same end: from the step at which a signal reached it, or from the last whole epoch where it was killed.
"""

import time
from collections.abc import Callable

from tqdm import tqdm

from ..model.features import KeptFeatures
from ..model.network import freeze_vision
from ..readers import progress_bar
from .interrupt import Interrupted, Signals
from .memory import place_of_features
from .run import TrainResult, fingerprint, locked
from .setup import Run, TrainConfig
from .step import lazy_weight, learning_rate_factor


def open_run(run: Run) -> None:
    """Begin in the folder, or go on in it, and keep image features where the encoder is frozen."""
    config, run.fingerprint = run.config, fingerprint(run.samples)
    run.accelerator.wait_for_everyone()  # all have looked at the folder; from here one writes
    with run.signals.hold():
        if config.resume:
            run.restore()
        run.folder.start(config)
    freeze_vision(run.model.network, not config.vision_trains(run.epoch))  # what is answered first, too
    if config.caches_vision and not config.vision_trains(run.epoch):
        train, val = run.samples.values()
        mirrored = [sample.flipped() for sample in train] if config.flip else []
        run.training_step.features = KeptFeatures.encode(
            run.model, [*train, *mirrored, *val], run.compute, place_of_features(run),
            config.out.parent / "vision-cache", run.workers,
        )  # fmt: skip


def train_epoch(run: Run, progress: tqdm) -> None:
    """Train on each image once, with a line of the log every few steps; an epoch that was interrupted goes on."""
    config, step = run.config, run.training_step
    trains_vision = config.vision_trains(run.epoch)
    freeze_vision(run.model.network, not trains_vision)
    if trains_vision and run.store is None:  # kept image features are about to be wrong
        step.features = None
        run.open_loader(pixels=True)
    step.loss.train()
    images, started, every = 0, time.perf_counter(), config.heatmap_every
    for window in run.windows(run.epoch, run.step - run.epoch * run.batches.steps):
        factor = learning_rate_factor(run.step, run.total_steps, config.warmup, config.schedule)
        for group in step.optimizer.param_groups:
            group["lr"] = rate = config.learning_rate * factor
        run.torn = True
        losses, norm = step(window, lazy_weight(config.attention_weight, every, run.step))
        run.step, run.torn = run.step + 1, False
        images += sum(len(batch["names"]) for batch in window)
        progress.update()
        if run.step % config.log_every == 0 or run.step == 1 or losses.attention is not None and every > 1:
            step.check()
            line = {name: None if value is None else float(value) for name, value in losses._asdict().items()}
            skipped = {"skipped_steps": step.skipped} if step.scaler.is_enabled() else {}
            run.log({
                "step": run.step, "epoch": run.epoch + 1, "count_loss": line["count"],
                "attention_loss": line["attention"], "total": line["total"],
                "learning_rate": rate, "gradient_norm": float(norm) if norm.isfinite() else None,
                "images_per_second": images / (time.perf_counter() - started), **skipped,
            })  # fmt: skip
            images, started = 0, time.perf_counter()
            progress.set_postfix({name: f"{value:.3f}" for name, value in line.items() if value is not None})
        run.signals.check()
    step.check()
    run.epoch += 1


def train(config: TrainConfig, on_log: Callable | None = None, on_epoch: Callable | None = None) -> TrainResult:
    """Fine-tune a model; `python -m fsc147lib train` calls this.

    Args:
        config: what to do; the run's folder is `config.out`.
        on_log: called with each line of metrics.jsonl as it is written, for a live curve.
        on_epoch: called with the model before training and after each epoch, for maps on the way.

    Returns:
        The run's history.  The weights are in `out/best` and `out/last`.

    Raises:
        ConfigError, DataError, ModelError: before the first step, with the cure in the message.
        NonFiniteLoss: during training; `last/` holds the last whole epoch.
        Interrupted: after Ctrl-C, SIGTERM, SIGHUP or a notebook's interrupt; `last/` holds all steps.
    """
    with locked(config.out), Signals().caught() as signals:
        run = Run(config, on_log, on_epoch, signals=signals)
        try:
            open_run(run)
            if not run.result.epochs:
                run.validate()
            with progress_bar(total=run.total_steps, initial=run.step, desc="train") as progress:
                while run.epoch < config.epochs:
                    with signals.hold():
                        train_epoch(run, progress)
                    run.validate()
                    with signals.hold():
                        run.save()
        except Interrupted:
            raise stopped(run, signals.received) from None
        finally:
            signals.held = True
            run.folder.close()
    return run.result


def stopped(run: Run, number: int) -> Interrupted:
    """Save the steps that are not saved yet, and say how to go on; `number` is the signal's."""
    if run.step > run.saved and not run.torn:
        run.training_step.check()
        run.save()
    if not run.saved:
        return Interrupted(number)
    where = f"after step {run.saved} of {run.total_steps}, all of it in {run.config.out}/last"
    how = "go on with the same command and --resume (in Python: resume=True)"
    if run.config.lora:
        how = "its adapters are merged, so it cannot go on, but last/ is a model"
    return Interrupted(number, f"{where}: {how}")
