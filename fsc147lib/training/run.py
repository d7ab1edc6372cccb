"""The folder of a run: who may use it, what it holds, and how a run comes back from it.

`config.json`, `metrics.jsonl` (a line every few steps, and one for each epoch), `summary.json` (validation
before, best and last), `best/` and `last/` (checkpoints), `last.old/` (the checkpoint before, used where the last is
damaged), `run_id`, `wandb/`.

Left out: what a checkpoint holds (`checkpoint`), and when to write one (`loop`).
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
from .checkpoint import RUN_ID, link_checkpoint, load_training_state, save_checkpoint, sound_checkpoint

MAY_CHANGE = {
    "data", "out", "workers", "compile", "vision_cache", "log_every", "tracking", "resume", "overwrite", "dry_run",
}  # fmt: skip
"""Options that a resumed run may give anew; with any other it would not be the same run."""


@dataclass
class TrainResult:
    """What a run leaves behind.

    Attributes:
        out: the run's folder.
        baselines: `metrics.constant_baselines` on the validation split.
        images: how many images `train` and `val` have.
        steps: the step lines of metrics.jsonl: step, epoch, count_loss, attention_loss (None on steps
            without it), total, learning_rate, gradient_norm, images_per_second.
        epochs: one validation for each epoch, the first from before training (epoch 0).
    """

    out: Path
    baselines: dict[str, dict[str, float]]
    images: dict[str, int]
    steps: list[dict] = field(default_factory=list)
    epochs: list[dict] = field(default_factory=list)

    def summary(self) -> dict:
        """Validation `before` training, `best` (lowest MAE, with its epoch) and `last`; baselines; images."""
        rows = [{"epoch": line["epoch"], **line["val"]} for line in self.epochs]
        best = min(rows[1:], key=lambda row: row["mae"])  # the first of those
        return {"before": rows[0], "best": best, "last": rows[-1], "baselines": self.baselines, "images": self.images}


def fingerprint(samples: dict[str, list[Sample]]) -> dict[str, str]:
    """SHA-256 of what training sees of each split, in its order: of `images` (names and files), `categories`, `dots`.

    A copy of a root elsewhere has the same; boxes and density files, which nothing is trained on, have no part in it.
    """
    listed: dict[str, list] = {"images": [], "categories": [], "dots": []}
    for part in samples.values():
        with ThreadPoolExecutor() as pool:  # many at once, for disks that answer late
            files = pool.map(lambda sample: _sha256(sample.image_path.read_bytes()), part)
            listed["images"].append([(sample.name, file) for sample, file in zip(part, files, strict=True)])
        listed["categories"].append([sample.category for sample in part])
        listed["dots"].append([_sha256(sample.points.tobytes()) for sample in part])
    return {key: _sha256(json.dumps(values).encode()) for key, values in listed.items()}


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def need_same_run(config) -> None:
    """Raise ConfigError unless the run in `config.out` was started with the same options, up to MAY_CHANGE."""
    path = config.out / "config.json"
    try:
        saved = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path} cannot be read ({error}): start a new run from {config.out}/last as --model"
        ) from error
    now = json.loads(config.to_json())
    for option in fields(config):  # one that the run did not know yet had its default
        before = saved.get(option.name, option.default)
        if option.name not in MAY_CHANGE and now[option.name] != before:
            raise ConfigError(
                f"{option.name} is {now[option.name]}, but the run in {config.out} was started with {before}: "
                "resume with the same value, or start a new run with another --out"
            )


def is_main_process() -> bool:
    """Whether this process is the only one of a run or the first, which alone writes."""
    return os.environ.get("RANK", "0") == "0"


def read_run(out: Path) -> tuple[dict, dict, list[dict]]:
    """Options, summary, and the validations (lines of metrics.jsonl) of a run; ConfigError if it finished no epoch."""
    try:
        options, summary = (json.loads((out / name).read_text()) for name in ("config.json", "summary.json"))
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise ConfigError(f"{out} holds no run with a finished epoch ({error}): give a run's folder") from error
    return options, summary, [line for line in lines if "val" in line]


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Keep other runs out of a run's folder; the lock, a file beside it, ends with the process that holds it.

    Raises:
        ConfigError: another run is at work there.
    """
    if not is_main_process():
        yield
        return
    try:
        with file_lock(out.parent / f".{out.name}.lock", wait=False):
            yield
    except Timeout as error:
        raise ConfigError(f"another run is at work in {out}: wait for its end, or name another --out") from error


class RunFolder:
    """A run's folder.  An earlier run in it stays until the first checkpoint of the new one; see also `locked`.

    Attributes:
        writes: whether this process is the one of the run that writes; others read.
        checkpoint: that a resumed run goes on from.

    Args:
        config: a `TrainConfig`.

    Raises:
        ConfigError: there is something else in the folder, an earlier run that is not to be overwritten, or
            none that could go on.
    """

    def __init__(self, config):
        self.config, self.out, self.writes = config, config.out, is_main_process()
        self.checkpoint = self.out / "last"
        self.before = self.out.with_name(self.out.name + ".old")  # an earlier run, until this one's first checkpoint
        self.tracker = None
        recover_folder(self.out / "last")
        started = any((self.out / name).is_file() for name in (RUN_ID, f"{RUN_ID}.writing"))  # written first
        finished_epoch = (self.out / "last").is_dir()
        if config.resume:
            if not finished_epoch:
                raise ConfigError(f"there is nothing to resume in {self.out}: no epoch of a run was finished there")
            need_same_run(config)
            self.checkpoint = sound_checkpoint(self.out)
        elif finished_epoch and not config.overwrite:
            raise ConfigError(
                f"{self.out} holds a run already: name another --out, go on with --resume, or --overwrite it"
            )
        elif not started and self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            raise ConfigError(f"{self.out} holds something that is no run: name another --out (it is left alone)")

    def start(self, resolved) -> None:
        """Begin to write, and to track the `resolved` config; an earlier run is set aside."""
        if self.writes:
            if not self.config.resume:
                set_aside(self.out)
                write_text(self.out / RUN_ID, uuid4().hex)
            write_text(self.out / "config.json", self.config.to_json())
            (self.out / "metrics.jsonl").touch()
            if self.config.tracking != "disabled":
                self.tracker = start_tracker(self.out, self.config.tracking, json.loads(resolved.to_json()))

    def restore(self, optimizer: torch.optim.Optimizer, seen: dict[str, str]) -> dict:
        """Put the checkpoint's moments back into the optimizer, and return the rest of what was saved with it.

        A ConfigError where `seen`, the `fingerprint` of the images, is another.
        """
        state = load_training_state(self.checkpoint, optimizer)
        if changed := [part for part in seen if state["data"].get(part) != seen[part]]:
            raise ConfigError(
                f"{' and '.join(changed)} of train or val in {self.config.data} are not those that the run in "
                f"{self.out} was started with: give its --data, or start a new run with another --out"
            )
        return state

    def rewrite(self, result: TrainResult, step: int) -> None:
        """Write the files of a run that goes on from this step as its checkpoint knows them."""
        if result.epochs[-1]["step"] == step:  # a crash may have come between last/ and best/
            self._publish(result)
        lines = sorted([*result.steps, *result.epochs], key=lambda line: (line["step"], "val" in line))
        write_text(self.out / "metrics.jsonl", "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines))

    def log(self, line: dict) -> None:
        """Add a line to metrics.jsonl and to what is tracked."""
        with (self.out / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
        if self.tracker is not None:
            self.tracker.log(line, step=line["step"])

    def save(
        self, model: CountingModel, optimizer: torch.optim.Optimizer, state: dict, result: TrainResult,
        images: list[ImageResult] | None,
    ) -> None:  # fmt: skip
        """Write last/; with the `images` of an epoch's validation also summary.json, and best/ if its MAE is lowest.

        `state` are JSON values that `restore` gives back.
        """
        last, listed = self.out / "last", None if images is None else to_csv([image.row() for image in images])
        if self.checkpoint != last:  # the last is damaged, and the one before must not make room for it
            last.rename(self.out / f"damaged-{uuid4().hex[:8]}")
            recover_folder(last)
            self.checkpoint = last
        save_checkpoint(last, model, optimizer, state, (self.out / RUN_ID).read_text(), listed)
        if images is not None:
            self._publish(result)
        shutil.rmtree(self.before, ignore_errors=True)

    def _publish(self, result: TrainResult) -> None:
        """Write what follows from the checkpoint of a whole epoch: summary.json, and best/."""
        summary = result.summary()
        if summary["best"]["epoch"] == summary["last"]["epoch"]:
            link_checkpoint(self.checkpoint, self.out / "best")
        write_json(self.out / "summary.json", summary)

    def close(self) -> None:
        """End tracking; give the folder back to the run that it was to replace, if this one came to nothing."""
        if self.tracker is not None:
            self.tracker.finish()
        if self.writes and not (self.out / "last").is_dir() and self.before.exists():
            shutil.rmtree(self.out, ignore_errors=True)
            recover_folder(self.out)


def start_tracker(out: Path, mode: Literal["offline", "online"], config: dict):
    """A Weights & Biases run with `log` and `finish`, its files in `out`/wandb."""
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
