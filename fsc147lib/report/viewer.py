"""The viewer: one window on samples and models, in which one looks, chooses, hides cells and counts again.

    viewer.Viewer(FSC147(root, "val"), {"counts alone": load_model("tiny"), "both losses": load_model("tiny-dual")})

Left out: what is shown of a choice (`scene`), how the page draws it (`canvas`), what is computed (`kept`).
"""

import asyncio
import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_args

import ipywidgets as widgets
from matplotlib.figure import Figure

from ..data import GRID, DataError, Picture, Sample
from ..model import CountingModel, ModelError, method_names
from ..model.looking import Word
from ..options import ConfigError
from .canvas import Canvas, jpeg, thumbnail
from .kept import Kept, has_heads
from .scene import Choice

STRIP = 9
"""Thumbnails at a time."""

PAUSE = 0.15
"""Seconds without a change before the distribution, which takes longer than a redraw, is computed."""

SORTS: dict[str, Callable[[dict], float]] = {
    "order of the split": lambda row: 0,
    "largest count": lambda row: -row["count"],
    "largest error": lambda row: -math.inf if row["predicted"] is None else -abs(row["predicted"] - row["count"]),
    "worst alignment": lambda row: math.inf if math.isnan(row["kl"]) else -row["kl"],
}


class Viewer(widgets.VBox):
    """Photograph, target, map and difference of one sample after the other; as the last line of a cell it is shown.

    Args:
        samples: with images.
        models: name -> model, to choose from; without one, photographs and targets alone are shown.

    With models it answers all samples when it opens, and again for each other model when that is chosen.
    """

    def __init__(self, samples: Sequence[Sample], models: dict[str, CountingModel] | None = None):
        self.samples = list(samples)  # and after them pictures of one's own
        if not self.samples:
            raise DataError("there are no samples to view: give a split that has some")
        self.in_split, self.canvas = len(self.samples), Canvas()
        self.kept = {name: Kept(model) for name, model in (models or {}).items()}
        self.first, self.cells, self._thumbnails, self._waiting = 0, (), {}, None
        self.controls = make_controls(self.samples, self.kept)
        self.place = 0
        self._offer()
        for name, control in self.controls.items():
            control.observe(lambda _, name=name: self._attempt(self._choose, name), "value")
        self.canvas.on_msg(lambda _, content, buffers: self.receive(content, buffers))
        bar = widgets.Box(list(self.controls.values()), layout={"flex_flow": "row wrap"})
        super().__init__([bar, self.canvas])
        self.show_sample(self.order()[0])

    def __repr__(self) -> str:  # what a page without a kernel shows in its place
        return f"a viewer of {self.in_split} pictures: run the notebook to use it"

    @property
    def choice(self) -> Choice:
        """What is shown."""
        sample = self.samples[self.place]
        values = {name: control.value for name, control in self.controls.items()}
        if not self.kept:
            return Choice(sample)
        chosen = {name: values[name] for name in ("model", "method", "layers", "heads", "word", "answer")}
        return Choice(sample, self.kept[values["model"]], cells=self.cells, **chosen)

    def figure(self) -> Figure:
        """What is shown, for a page without a running kernel."""
        return self.choice.figure()

    def rows(self) -> list[dict]:
        """Of each sample of the split its count and, with a model, what `Kept.rows` says of it."""
        split = self.samples[: self.in_split]
        return self.choice.kept.rows(split) if self.kept else [{"count": sample.count} for sample in split]

    def order(self) -> list[int]:
        """Places of the samples of the chosen category, sorted as chosen."""
        rows, wanted, sort = self.rows(), self.controls["category"].value, SORTS[self.controls["sort"].value]
        places = [i for i in range(self.in_split) if wanted in (None, self.samples[i].category)]
        return sorted(places, key=lambda i: sort(rows[i]))

    def redraw(self, strip: bool = False, photo: bool = False, message: str = "") -> None:
        """Send the page what is chosen, thumbnails and photograph only where they changed."""
        choice, changed = self.choice, {}
        scene = {**choice.scene(), "place": self.place, "message": message, "points": []}
        scene["atlas"], changed["atlas"] = choice.atlas()
        if self.kept:
            about = zip(self.samples, self.rows(), strict=False)
            scene["points"] = [
                [i, row["count"], row["predicted"], sample.name] for i, (sample, row) in enumerate(about)
            ]
        if strip:
            changed["strip"] = self._strip()
        if photo:
            changed["photo"] = jpeg(choice.sample.image)
        self.canvas.update(scene=scene, **changed)
        self._predict_later()

    def _strip(self) -> dict:
        order, rows = self.order(), self.rows()
        self.first = min(max(0, self.first), (len(order) - 1) // STRIP * STRIP)
        shown = order[self.first : self.first + STRIP]
        thumbs = []
        for i in shown:
            sample, said = self.samples[i], rows[i].get("predicted", "")
            if i not in self._thumbnails:
                self._thumbnails[i] = thumbnail(sample)
            told = f"{'?' if said is None else said} of " if self.kept else ""
            thumbs.append({"place": i, "src": self._thumbnails[i], "text": f"{told}{sample.count} {sample.category}"})
        text = f"{self.first + 1} to {self.first + len(shown)} of {len(order)}"
        return {"thumbs": thumbs, "text": text, "more": [self.first > 0, self.first + STRIP < len(order)]}

    def _offer(self) -> None:
        """Offer this model's layers and heads, and only what the method and the picture have."""
        if self.kept:
            offer(self.controls, self.choice.kept, isinstance(self.samples[self.place], Picture))

    def show_sample(self, place: int) -> None:
        """Show the sample at a place of `samples`, with no cells hidden."""
        self.place, self.cells = place, ()
        self._offer()
        self.redraw(strip=True, photo=True)

    def hide_cells(self, cells: Sequence[int]) -> None:
        """Hide these cells of 196, row by row, and count again."""
        cells = tuple(sorted({int(cell) for cell in cells} & set(range(GRID * GRID))))
        self.choice.kept.prediction(self.samples[self.place])
        self.choice.kept.prediction(self.samples[self.place], cells)
        self.cells = cells
        self.redraw()

    def _choose(self, name: str) -> None:
        if name in ("sort", "category"):
            self.first = 0
            self.show_sample(self.order()[0])
        elif name != "count":
            self._offer()
            self.redraw(strip=name == "model")

    def receive(self, content: dict, buffers: Sequence = ()) -> None:
        """Do what a message of the page asks for, see `Canvas`."""
        self._attempt(getattr(self, f"_on_{content['kind']}"), content, buffers)

    def _attempt(self, act: Callable, *arguments) -> None:
        """Do it, or say in the page why not."""
        try:
            act(*arguments)
        except (DataError, ConfigError, ModelError, ValueError) as error:
            self.redraw(message=str(error))

    def _on_open(self, content: dict, _) -> None:
        self.show_sample(int(content["place"]))

    def _on_page(self, content: dict, _) -> None:
        self.first += STRIP * int(content["by"])
        self.redraw(strip=True)

    def _on_hide(self, content: dict, _) -> None:
        self.hide_cells(content["cells"])

    def _on_head(self, content: dict, _) -> None:
        self.controls["layers"].value = (int(content["layer"]),)
        self.controls["heads"].value = (int(content["head"]),)

    def _on_picture(self, content: dict, buffers: Sequence) -> None:
        picture = own_picture(str(content["name"]), bytes(buffers[0]), self.controls["count"].value)
        self.samples.append(picture)
        try:
            self.show_sample(len(self.samples) - 1)
        except (DataError, ValueError):  # the model's processor refuses its shape
            self.place = 0
            self._offer()
            raise

    def _predict_later(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
        if self.kept and not self.choice.kept.has_prediction(self.samples[self.place]):
            try:
                self._waiting = asyncio.get_running_loop().call_later(PAUSE, self._attempt, self._predict)
            except RuntimeError:  # no kernel, so nobody waits
                self._predict()

    def _predict(self) -> None:
        self.choice.kept.prediction(self.samples[self.place])
        self.redraw()


def make_controls(samples: list[Sample], kept: dict[str, Kept]) -> dict[str, widgets.Widget]:
    """Menus by name, each with what there is to choose; those of a model only where there is one."""
    categories = sorted({sample.category for sample in samples})
    menus = {
        "sort": [name for name in SORTS if kept or name in list(SORTS)[:2]],
        "category": [("all", None), *((name, name) for name in categories)],
    }
    if kept:
        menus |= {"model": list(kept), "method": list(method_names()), "layers": [((), ())], "heads": [("all", None)]}
        menus |= {"word": list(get_args(Word)), "answer": ["own", "true"]}
    made = {name: widgets.Dropdown(options=menu, description=name) for name, menu in menus.items()}
    if kept:
        made["count"] = widgets.Text("objects", description="count", tooltip="what to count in a picture of your own")
    for control in made.values():
        control.layout.width = "220px"
    return made


def offer(controls: dict[str, widgets.Widget], kept: Kept, own: bool) -> None:
    """Give the menus that depend on others what there is to choose now; `own`: there is no true answer."""
    default = f"default: {', '.join(map(str, kept.default_layers))}"
    menus = {
        "layers": [(default, kept.default_layers), ("all", kept.layers), *((str(i), (i,)) for i in kept.layers)],
        "heads": [("all", None), *((str(i), (i,)) for i in kept.heads)],
        "answer": [(whose, whose) for whose in (("own",) if own else ("own", "true"))],
    }
    for name, menu in menus.items():
        if controls[name].options != tuple(menu):
            controls[name].options = menu
    for name in ("layers", "heads"):
        controls[name].layout.display = None if has_heads(controls["method"].value) else "none"


def own_picture(name: str, content: bytes, category: str) -> Picture:
    """A picture from the bytes of its file; DataError names the file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "picture"
        path.write_bytes(content)
        try:
            return Picture(path, category, name)
        except DataError as error:
            raise DataError(str(error).replace(str(path), name)) from error
