"""What the notebooks share: where data, model and results are; and the runner behind `make run`.

The runner executes the notebooks in order with no window, writes them and their HTML to `runs/workbook/`, and sums up
their results in `summary.json`.  The results lie where JupyterLab looks for them too.  Left out: what a notebook shows.
"""

import json
import os
import re
import sys
import time
from dataclasses import dataclass
from functools import partialmethod
from pathlib import Path

import nbformat
import torch
from matplotlib_inline.backend_inline import set_matplotlib_formats
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from nbconvert import HTMLExporter
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from ..data.scenes import make_dataset
from ..evaluation.tables import PUBLISHED
from ..files import write_json, write_text
from ..model.device import gpu_memory
from ..model.load import count_parameters
from .timing import table

PICTURES = {"train": 400, "val": 60, "test": 50}  # the drawn data set that notebooks use when no root is given
RESULTS = Path("runs/notebooks")  # data, runs and timings of the notebooks, in the project's folder
COLUMNS = {  # of the summary that `make run` ends with
    "mae": ("MAE (objects)", "{mae:.2f}"),
    "rmse": ("RMSE (objects)", "{rmse:.2f}"),
    "kl": ("KL (nats)", "{kl:.3f}"),
    "mass_on_objects": ("attention on objects", "{mass_on_objects:.3f}"),
}


class WorkbookError(RuntimeError):
    """A notebook cannot go on; the message says what to run first, or which cell failed."""


FITS = (  # GiB that Qwen3-VL-2B was measured to need for it with FSC147's widest images (docs/cards.md)
    (64.5, {"batch_size": 16}),
    (34.5, {"batch_size": 16, "gradient_checkpointing": True}),
    (19.5, {"batch_size": 8, "lora": 16}),
    (10.5, {"batch_size": 16, "lora": 16, "gradient_checkpointing": True}),
    (0.0, {"batch_size": 2, "lora": 16, "gradient_checkpointing": True}),
)
"""From the fastest on; needs of another model are as many times as large as it is."""

HELD = (
    ", {:.1f} are needed: another process holds the rest, most likely the kernel of another notebook. "
    "Shut it down (Kernel, Shut Down Kernel), and run this cell again."
)


@dataclass(frozen=True)
class Settings:
    """Where a notebook finds its data, its model and the results of the others."""

    data: Path
    model: str
    out: Path

    @property
    def runs(self) -> Path:
        """Notebook 03's runs with this data and model, a folder each: NAME-1, NAME-2 ..."""
        return self.out / f"finetune-{'-'.join(Path(self.model).parts[-3:])}-{self.data.name}"

    def new_run(self, name: str) -> Path:
        """A folder that no run has used: what was trained before stays."""
        numbers = [int(path.name.rpartition("-")[2]) for path in self.runs.glob(f"{name}-[0-9]*")]
        return self.runs / f"{name}-{max(numbers, default=0) + 1}"

    def fit(self) -> dict:
        """Options of `train`, and a limit of images, for this model on this card; prints them, and what is free."""
        if not torch.cuda.is_available():
            return {"limit": 160, "batch_size": 8}
        most, free = (size / 2**30 for size in gpu_memory())
        scale = count_parameters(self.model) / 2.1e9
        needed, options = next((need * scale, options) for need, options in FITS if need * scale <= most)
        options = {"limit": 160, **options}
        print(f"{self.model} on {most:.0f} GiB: {', '.join(f'{key}={value}' for key, value in options.items())}")
        print(f"{free:.1f} GiB of the GPU are free" + (HELD.format(needed) if free < needed else "."))
        return options

    @property
    def comparison(self) -> Path:
        """What notebook 03 found on the test split."""
        return self.out / "comparison.json"

    @property
    def published(self) -> list[dict]:
        """Rows of published results on the test split; none beside drawn pictures, which they do not speak of."""
        return [] if self.data.name.startswith("drawn-") else PUBLISHED

    @property
    def overhead(self) -> Path:
        """The timings of notebook 02."""
        return self.out / "overhead.json"

    def trained(self) -> Path:
        """The best checkpoint of notebook 03's last run with both losses, or a WorkbookError that says to run it."""
        found = sorted(self.runs.glob("both-[0-9]*/best"), key=lambda best: int(best.parent.name.rpartition("-")[2]))
        if not found:
            raise WorkbookError(f"there is no trained model in {self.runs}: run 03_dual_loss_finetuning.ipynb first")
        return found[-1]


def settings(data: str | Path | None = None, model: str = "tiny", out: str | Path | None = None) -> Settings:
    """Settle where data root (None: drawn ones), model and results (None: RESULTS) are; draw what is not there.

    The environment variables FSC147_DATA, FSC147_MODEL and FSC147_OUT win over the arguments.
    """
    if "ipykernel" in sys.modules:  # photographs as PNG would make megabytes of a notebook
        set_matplotlib_formats("jpeg", pil_kwargs={"quality": 60})
        disable_progress_bar()  # transformers' own would stay in the page as text
        tqdm.__init__ = partialmethod(tqdm.__init__, file=sys.stdout)  # on stderr each bar leaves an empty red box
    data = os.environ.get("FSC147_DATA") or data
    model = os.environ.get("FSC147_MODEL") or str(model)
    project = Path() if Path("notebooks").is_dir() else Path("..")  # a kernel starts beside its notebook
    out = Path(os.environ.get("FSC147_OUT") or out or project / RESULTS)
    out.mkdir(parents=True, exist_ok=True)
    if data is None:
        data = out / "drawn-{train}-{val}-{test}".format(**PICTURES)
        if not data.exists():
            make_dataset(data, **PICTURES)
    return Settings(Path(data).expanduser(), model, out)


def run_notebook(path: Path, out: Path, progress: tqdm) -> float:
    """Execute a notebook in its own folder and write it, with its HTML, to `out`; returns the seconds it took.

    Raises:
        WorkbookError: naming the notebook and quoting the failed cell; what ran before is written.
    """
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=None,
        extra_arguments=["--IPKernelApp.log_level=40"],  # or each kernel warns of its unencrypted local socket
        resources={"metadata": {"path": str(path.parent)}},
        on_cell_executed=lambda **_: progress.update(),
        coalesce_streams=True,  # or each step of a progress bar stays as a line of its own
    )
    started = time.perf_counter()
    try:
        client.execute()
    except (CellExecutionError, DeadKernelError) as error:  # a kernel dies where the memory is full
        raise WorkbookError(f"{path.name} failed:\n{error}") from error
    finally:
        for cell in notebook.cells:  # where a progress bar ended, an empty red box would stand
            if "outputs" in cell:
                cell.outputs = [o for o in cell.outputs if o.output_type != "stream" or o.text.strip()]
        notebook.metadata.pop("widgets", None)  # dead in a page, and large; a static picture stands beside each
        write_text(out / path.name, nbformat.writes(notebook))
        page, _ = HTMLExporter(template_name="lab").from_notebook_node(notebook)
        write_text(out / f"{path.stem}.html", re.sub(r'(href="[\w-]+)\.ipynb', r"\1.html", page))  # from page to page
    return time.perf_counter() - started


def summarise(where: Settings, seconds: dict[str, float]) -> dict:
    """The numbers of a run of all notebooks, from the files that they wrote."""
    rows = {row["name"]: row for row in json.loads(where.overhead.read_text())["rows"]}
    overhead = {key: rows["attention, trained"][f"overhead_{key}"] for key in ("low", "median", "high")}
    about = {"data": str(where.data), "model": where.model, "test": json.loads(where.comparison.read_text())["rows"]}
    return {**about, "attention_loss_overhead": overhead, "seconds": seconds}


def summary_text(summary: dict) -> str:
    """The summary as the few lines that `make run` ends with."""
    overhead = "overhead of the attention loss: {median:.1%} (95 % interval {low:.1%} to {high:.1%})"
    times = [f"{name:<28}{spent:>8.0f} s" for name, spent in summary["seconds"].items()]
    rows = table(summary["test"], COLUMNS, head="test split")
    return "\n".join([rows, overhead.format(**summary["attention_loss_overhead"]), *times])


def main() -> int:
    """Run the workbook from the project's folder: `python -m fsc147lib.report.workbook`."""
    out, paths = Path("runs/workbook"), sorted(Path("notebooks").glob("[0-9]*.ipynb"))
    if not paths:
        print("there are no notebooks here: run this in the project's folder", file=sys.stderr)
        return 2
    for bars in ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS"):
        os.environ.setdefault(bars, "1")  # for the kernels: a bar in a page is noise
    for name in ("FSC147_DATA", "FSC147_MODEL", "FSC147_OUT"):  # kernels run in another folder
        value = os.environ.get(name)
        if value and (name == "FSC147_OUT" or Path(value).exists()):
            os.environ[name] = str(Path(value).resolve())
    cells = sum(cell.cell_type == "code" for path in paths for cell in nbformat.read(path, as_version=4).cells)
    seconds = {}
    with tqdm(total=cells, unit="cell", disable=False) as progress:
        for path in paths:
            progress.set_description(path.stem)
            try:
                seconds[path.stem] = run_notebook(path, out, progress)
            except WorkbookError as error:
                print(f"\n{error}", file=sys.stderr)
                return 1
    where = settings()
    summary = summarise(where, seconds)
    write_json(out / "summary.json", summary)
    print(summary_text(summary))
    print(f"\nexecuted notebooks, HTML and summary.json are in {out}/, what they made in {where.out}/")
    return 0


if __name__ == "__main__":
    sys.exit(main())
