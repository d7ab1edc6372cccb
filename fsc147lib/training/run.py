"""A run's folder: its files, its lock, and how a run resumes from it.

`config.json`, `metrics.jsonl` (a line every few steps, and one for each epoch), `before.csv` (answers before training),
`summary.json` (first, best and last validation), `best/` and `last/` (checkpoints), `last.old/` (the previous
checkpoint, used if `last/` is damaged), `run_id`, `wandb/`.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal
from uuid import uuid4

import torch
from filelock import Timeout

from ..data import Sample
from ..evaluation.answering import ImageResult, to_csv
from ..files import file_lock, recover_folder, set_aside, write_json, write_text
from ..model.network import CountingModel
from ..options import ConfigError
from .checkpoint import RUN_ID, TENSORS, link_checkpoint, load_training_state, save_checkpoint, sound_checkpoint

MAY_CHANGE = {
    "data", "out", "workers", "compile", "vision_cache", "log_every", "tracking", "resume", "overwrite", "dry_run",
    "save_every",
}  # fmt: skip
"""Options that may change when a run resumes; with another value of any other it would be another run."""


@dataclass
class TrainResult:
    """History of a run.

    Attributes:
        out: the run's folder.
        baselines: `metrics.constant_baselines` on the validation split.
        images: numbers of images of the splits `train` and `val`.
        steps: the step lines of metrics.jsonl: step, epoch, count_loss, attention_loss (None on steps
            without it), total, learning_rate, gradient_norm, images_per_second.
        epochs: a validation for each epoch; epoch 0 is the one before training.
    """

    out: Path
    baselines: dict[str, dict[str, float]]
    images: dict[str, int]
    steps: list[dict] = field(default_factory=list)
    epochs: list[dict] = field(default_factory=list)

    def summary(self) -> dict:
        """Validation metrics with their epoch, `before` training, `best` (lowest MAE) and `last`; baselines; images."""
        rows = [{"epoch": line["epoch"], **line["val"]} for line in self.epochs]
        best = min(rows[1:], key=lambda row: row["mae"])  # the first of those
        return {"before": rows[0], "best": best, "last": rows[-1], "baselines": self.baselines, "images": self.images}


def fingerprint(samples: dict[str, list[Sample]]) -> dict[str, str]:
    """SHA-256 of the `images` (names and files), `categories` and `dots` of all splits, in order.

    Boxes and density files are not in it, because training does not use them.
    """
    listed: dict[str, list] = {"images": [], "categories": [], "dots": []}
    for part in samples.values():
        with ThreadPoolExecutor() as pool:  # many reads at a time, for slow disks
            files = pool.map(lambda sample: hashlib.sha256(sample.image_path.read_bytes()).hexdigest(), part)
            listed["images"].append([(sample.name, file) for sample, file in zip(part, files, strict=True)])
        listed["categories"].append([sample.category for sample in part])
        listed["dots"].append([hashlib.sha256(sample.points.tobytes()).hexdigest() for sample in part])
    return {key: hashlib.sha256(json.dumps(values).encode()).hexdigest() for key, values in listed.items()}


def need_same_run(config) -> None:
    """Raise ConfigError unless the run in `config.out` was started with the same options, up to MAY_CHANGE."""
    path = config.out / "config.json"
    try:
        saved = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        cure = f"start a new run from {config.out}/last as --model"
        raise ConfigError(f"{path} cannot be read ({error}): {cure}") from error
    now = json.loads(config.to_json())
    for option in fields(config):  # an option that the file lacks had its default
        before = saved.get(option.name, option.default)
        if option.name == "epochs" and now["epochs"] > before:  # a run may be made longer
            continue
        if option.name not in MAY_CHANGE and now[option.name] != before:
            raise ConfigError(
                f"{option.name} is {now[option.name]}, but the run in {config.out} was started with {before}: "
                "resume with the same value, or start a new run with another --out"
            )


def is_main_process() -> bool:
    """Whether this is the first process of a run, the one that writes."""
    return os.environ.get("RANK", "0") == "0"


def read_run(out: Path) -> tuple[dict, dict, list[dict]]:
    """Options, summary and validations (lines of metrics.jsonl) of a run; a ConfigError if it finished no epoch."""
    try:
        options, summary = (json.loads((out / name).read_text()) for name in ("config.json", "summary.json"))
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise ConfigError(f"{out} holds no run with a finished epoch ({error}): give a run's folder") from error
    return options, summary, [line for line in lines if "val" in line]


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Lock a run's folder within the block, with a file beside it; the lock ends with its process.

    Raises:
        ConfigError: another run is at work there.
    """
    if not is_main_process():
        yield
        return
    try:
        with file_lock(out.parent / f".{out.name}.lock"):
            yield
    except Timeout as error:
        raise ConfigError(f"another run is at work in {out}: wait for its end, or name another --out") from error


class RunFolder:
    """The folder of a run.

    `start` renames the folder of an earlier run to NAME.old.  The first checkpoint of the new run deletes NAME.old;
    `close` restores it if there was none.

    Attributes:
        writes: this process writes; false in all but the first of several processes.
        checkpoint: `last`, also before it exists; `last.old` if a resumed run's `last` is damaged.

    Args:
        config: a `TrainConfig`.

    Raises:
        ConfigError: the folder holds something that is no run, a run that is not to be overwritten, or no run to
            resume.
        ModelError: all checkpoints are damaged.
    """

    def __init__(self, config):
        self.config, self.out, self.writes = config, config.out, is_main_process()
        self.checkpoint, self.tracker = self.out / "last", None
        self.replaced = self.out.with_name(self.out.name + ".old")
        recover_folder(self.checkpoint)
        has_checkpoint = self.checkpoint.is_dir()
        if config.resume:
            if not has_checkpoint:
                raise ConfigError(f"there is nothing to resume in {self.out}: no epoch of a run was finished there")
            need_same_run(config)
            self.checkpoint = sound_checkpoint(self.out)
            if not (self.checkpoint / TENSORS).is_file():
                cure = f"start a new run with --model {self.checkpoint} and another --out"
                raise ConfigError(f"{self.checkpoint} has no {TENSORS}: another version of fsc147lib wrote it; {cure}")
        elif has_checkpoint and not config.overwrite:
            raise ConfigError(
                f"{self.out} holds a run already: name another --out, go on with --resume, or --overwrite it"
            )
        elif self.out.exists():  # the run's id is written first, so without it the folder is no run's
            is_run = any((self.out / name).is_file() for name in (RUN_ID, f"{RUN_ID}.writing"))
            if not is_run and (not self.out.is_dir() or any(self.out.iterdir())):
                raise ConfigError(f"{self.out} holds something that is no run: name another --out (it is left alone)")

    def start(self, resolved) -> None:
        """Write the first files, set a replaced run aside, and start the tracker with the `resolved` config."""
        if not self.writes:
            return
        if not self.config.resume:
            set_aside(self.out)
            write_text(self.out / RUN_ID, uuid4().hex)
        write_text(self.out / "config.json", self.config.to_json())
        (self.out / "metrics.jsonl").touch()
        if self.config.tracking != "disabled":
            self.tracker = start_tracker(self.out, self.config.tracking, json.loads(resolved.to_json()))

    def epochs_before(self) -> int:
        """Epochs of the run that is resumed, as it was started."""
        return json.loads((self.out / "config.json").read_text())["epochs"]

    def restore(self, optimizer: torch.optim.Optimizer, images: dict[str, str]) -> dict:
        """Load the checkpoint's moments into the optimizer; returns the rest of its state.

        Raises:
            ConfigError: the run was started with other images; `images` is the `fingerprint` of the present ones.
        """
        state = load_training_state(self.checkpoint, optimizer)
        if changed := [part for part in images if state["data"].get(part) != images[part]]:
            raise ConfigError(
                f"{' and '.join(changed)} of train or val in {self.config.data} are not those that the run in "
                f"{self.out} was started with: give its --data, or start a new run with another --out"
            )
        return state

    def rewrite(self, result: TrainResult, step: int) -> None:
        """Rewrite the files of a run that resumes at `step`: lines of later steps go."""
        if result.epochs[-1]["step"] == step:  # a crash may have come between last/ and best/
            self._publish(result)
        lines = sorted([*result.steps, *result.epochs], key=lambda line: (line["step"], "val" in line))
        write_text(self.out / "metrics.jsonl", "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines))

    def log(self, line: dict) -> None:
        """Append a line to metrics.jsonl and send it to the tracker."""
        with (self.out / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
        if self.tracker is not None:
            self.tracker.log(line, step=line["step"])

    def write_table(self, name: str, images: list[ImageResult]) -> None:
        """Write a table of images (CSV) into the folder."""
        if self.writes:
            write_text(self.out / name, to_csv([image.row() for image in images]))

    def save(
        self, model: CountingModel, optimizer: torch.optim.Optimizer, state: dict, result: TrainResult,
        images: list[ImageResult] | None,
    ) -> None:  # fmt: skip
        """Write last/.  After a validation, also summary.json, and best/ if the MAE is the lowest.

        Args:
            state: JSON values that `restore` returns.
            images: results of the validation at this step; None within an epoch.
        """
        last, table = self.out / "last", None if images is None else to_csv([image.row() for image in images])
        if self.checkpoint != last:  # last/ is damaged; the sound checkpoint, last.old/, takes its place
            last.rename(self.out / f"damaged-{uuid4().hex[:8]}")
            recover_folder(last)
            self.checkpoint = last
        save_checkpoint(last, model, optimizer, state, (self.out / RUN_ID).read_text(), table)
        if images is not None:
            self._publish(result)
        shutil.rmtree(self.replaced, ignore_errors=True)

    def save_weights(self, model: CountingModel, result: TrainResult, images: list[ImageResult]) -> None:
        """Write last/ with the weights alone, its validation, and summary.json."""
        model.save(self.out / "last")
        self.write_table("last/validation.csv", images)
        write_json(self.out / "summary.json", result.summary())
        shutil.rmtree(self.replaced, ignore_errors=True)

    def _publish(self, result: TrainResult) -> None:
        """Write summary.json, and best/ if the last epoch is the best one."""
        summary = result.summary()
        if summary["best"]["epoch"] == summary["last"]["epoch"]:
            link_checkpoint(self.checkpoint, self.out / "best")
        write_json(self.out / "summary.json", summary)

    def close(self) -> None:
        """End tracking.  A run without a checkpoint is removed if it was to replace one, which comes back."""
        if self.tracker is not None:
            self.tracker.finish()
        if self.writes and not (self.out / "last").is_dir() and self.replaced.exists():
            shutil.rmtree(self.out, ignore_errors=True)
            recover_folder(self.out)


def start_tracker(out: Path, mode: Literal["offline", "online"], config: dict):
    """A Weights & Biases run, with methods `log` and `finish`; its files lie in `out`/wandb."""
    import wandb  # takes half a second
    from wandb.errors import Error

    os.environ.setdefault("WANDB_SILENT", "true")  # it would print into every notebook
    try:
        return wandb.init(project="fsc147lib", name=out.name, dir=out, mode=mode, config=config)
    except Error as error:
        raise ConfigError(
            f"tracking (--tracking) is {mode}, but Weights & Biases says: {error}  Log in with `wandb login`, or "
            "train with --tracking offline"
        ) from error
