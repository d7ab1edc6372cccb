"""What the notebooks share: data, model, folder of results, and options of training that fit on the GPU."""

import os
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib_inline.backend_inline import set_matplotlib_formats
from transformers.utils.logging import disable_progress_bar

from ..data import Sample
from ..data.fsc147 import open_split, split_counts
from ..data.scenes import make_dataset
from ..evaluation.tables import PUBLISHED
from ..model.device import gpu_memory
from ..model.load import count_parameters
from ..options import ConfigError
from ..training.run import read_run

WORLD = "sea"  # that the shipped models have never seen
PICTURES = {"train": 400, "val": 60, "test": 150}  # of the drawn data set
SHIPPED_PAIR = {"counts": "tiny", "both": "tiny-dual"}
SHOWN = 60  # images of a split that a notebook looks at
COLUMNS = {  # of the tables of test results: key -> heading, format
    "mae": ("MAE (objects)", "{mae:.2f}"),
    "rmse": ("RMSE (objects)", "{rmse:.2f}"),
    "kl": ("KL (nats)", "{kl:.3f}"),
    "mass_on_objects": ("attention on objects", "{mass_on_objects:.3f}"),
}
FITS = (  # fastest first: GiB that Qwen3-VL-2B needs with FSC147's widest images (docs/cards.md), and options
    (64.5, {"batch_size": 16}),
    (34.5, {"batch_size": 16, "gradient_checkpointing": True}),
    (19.5, {"batch_size": 8, "lora": 16}),
    (10.5, {"batch_size": 16, "lora": 16, "gradient_checkpointing": True}),
    (0.0, {"batch_size": 2, "lora": 16, "gradient_checkpointing": True}),
)


class WorkbookError(RuntimeError):
    """A notebook cannot go on; the message names the cell that failed, or the notebook to run first."""


@dataclass(frozen=True)
class Settings:
    """Data root, model and folder of results of the notebooks."""

    data: Path
    model: str
    out: Path

    @property
    def runs(self) -> Path:
        """Folder of notebook 03's training runs with this data and model: NAME-1, NAME-2 ..."""
        return self.out / f"finetune-{'-'.join(Path(self.model).parts[-3:])}-{self.data.name}"

    @property
    def published(self) -> list[dict]:
        """Rows of published results on the test split; none for drawn pictures."""
        return [] if self.data.name.startswith("drawn-") else PUBLISHED

    def numbered(self, name: str) -> dict[int, Path]:
        """Folders NAME-1, NAME-2 ... of `runs` by number."""
        return {int(path.name.rpartition("-")[2]): path for path in self.runs.glob(f"{name}-[0-9]*")}

    def new_run(self, name: str) -> Path:
        """A folder for a new training run, with the next free number."""
        return self.runs / f"{name}-{max(self.numbered(name), default=0) + 1}"

    def pair(self) -> dict[str, str]:
        """Last weights of notebook 03's newest finished runs, "counts" and "both"; the shipped pair without them."""
        pair = {name: self.newest(name) for name in SHIPPED_PAIR}
        if not all(pair.values()):
            pair = SHIPPED_PAIR
        print("\n".join(f"{name}: {model}" for name, model in pair.items()))
        return pair

    def newest(self, name: str) -> str | None:
        """Folder `last` of the newest of the runs NAME-1, NAME-2 ... that trained all its epochs; None without one."""
        for _, run in sorted(self.numbered(name).items(), reverse=True):
            with suppress(ConfigError):
                options, summary, _ = read_run(run)
                if summary["last"]["epoch"] == options["epochs"]:
                    return str(run / "last")
        return None

    @property
    def splits(self) -> list[str]:
        """Those of train, val and test that hold images."""
        return [split for split in ("train", "val", "test") if split_counts(self.data, split)]

    def samples(self, split: str, most: int = SHOWN) -> list[Sample]:
        """Up to `most` images of a split, evenly spaced over it.  Where a root has no test split, val stands for it."""
        if split == "test" and split not in self.splits:
            print(f"{self.data.name} has no test split: val stands for it")
            split = "val"
        found = open_split(self.data, split)
        if len(found) > most:
            print(f"{split}: {most} of {len(found)} images")
        return [found[i * len(found) // most] for i in range(most)] if len(found) > most else found

    def fit(self) -> dict:
        """Options of `train` that fit on this GPU; prints them and the free memory."""
        if not torch.cuda.is_available():
            return {"batch_size": 8}
        total, free = (size / 2**30 for size in gpu_memory())
        scale = count_parameters(self.model) / 2.1e9  # a model's need grows with its size
        needed, options = next((need * scale, options) for need, options in FITS if need * scale <= total)
        print(f"{self.model} on {total:.0f} GiB: {', '.join(f'{key}={value}' for key, value in options.items())}")
        print(f"{free:.1f} GiB of the GPU are free", end=".\n" if free >= needed else f", {needed:.1f} are needed: ")
        if free < needed:
            print("another process holds the rest, most likely the kernel of another notebook. "
                  "Shut it down (Kernel, Shut Down Kernel), and run this cell again.")  # fmt: skip
        return options


def settings(data: str | Path | None = None, model: str = "tiny", out: str | Path | None = None) -> Settings:
    """Settings of a notebook; draws the data set if it is missing.

    Args:
        data: a root; None for drawn pictures.
        model: as in `load_model`.
        out: folder of results; None for the project's runs/notebooks.

    The environment variables FSC147_DATA, FSC147_MODEL and FSC147_OUT replace the arguments.
    """
    if "ipykernel" in sys.modules:
        set_matplotlib_formats("jpeg", pil_kwargs={"quality": 60})  # PNG would make megabytes of a notebook
        disable_progress_bar()  # transformers' own would stay in the page as text
    project = Path() if Path("notebooks").is_dir() else Path("..")  # a kernel starts beside its notebook
    out = Path(os.environ.get("FSC147_OUT") or out or project / "runs/notebooks")
    out.mkdir(parents=True, exist_ok=True)
    data = os.environ.get("FSC147_DATA") or data
    if data is None:
        data = out / "-".join(["drawn", WORLD, *map(str, PICTURES.values())])
        if not data.exists():
            make_dataset(data, **PICTURES, world=WORLD)
    open_split(Path(data).expanduser(), "train", 1)  # a wrong folder is told in the first cell
    return Settings(Path(data).expanduser(), os.environ.get("FSC147_MODEL") or str(model), out)
