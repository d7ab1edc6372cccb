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


class Strip:
    """The samples of a split: sorted, filtered, and a few thumbnails at a time."""

    def __init__(self, samples: list[Sample]):
        self.samples, self.first, self._small = samples, 0, {}

    def rows(self, kept: Kept | None) -> list[dict]:
        """Of each sample its count and, with a model, what `Kept.rows` says of it."""
        return kept.rows(self.samples) if kept else [{"count": sample.count} for sample in self.samples]

    def order(self, rows: list[dict], sort: str, category: str | None) -> list[int]:
        """Places of the samples of a category, or of all."""
        places = [i for i, sample in enumerate(self.samples) if category in (None, sample.category)]
        return sorted(places, key=lambda i: SORTS[sort](rows[i]))

    def thumbs(self, rows: list[dict], order: list[int]) -> dict:
        """For the page: from the first thumbnail, which is moved into the range, on."""
        self.first = min(max(0, self.first), (len(order) - 1) // STRIP * STRIP)
        shown, found = order[self.first : self.first + STRIP], []
        for i in shown:
            said = rows[i].get("predicted", "")
            told = f"{'?' if said is None else said} of " if "predicted" in rows[i] else ""
            if i not in self._small:
                self._small[i] = thumbnail(self.samples[i])
            text = f"{told}{self.samples[i].count} {self.samples[i].category}"
            found.append({"place": i, "src": self._small[i], "text": text})
        text = f"{self.first + 1} to {self.first + len(shown)} of {len(order)}"
        return {"thumbs": found, "text": text, "more": [self.first > 0, self.first + STRIP < len(order)]}

    def points(self, rows: list[dict]) -> list:
        """Place, true count, predicted count and name of each sample that was answered."""
        about = zip(self.samples, rows, strict=True)
        return [[i, r["count"], r["predicted"], s.name] for i, (s, r) in enumerate(about) if "predicted" in r]


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
        self.strip, self.canvas = Strip(list(samples)), Canvas()
        self.kept = {name: Kept(model) for name, model in (models or {}).items()}
        self.place, self.cells, self._waiting = 0, (), None
        self.controls = make_controls(self.samples, self.kept)
        self._offer()
        for name, control in self.controls.items():
            control.observe(lambda _, name=name: self._attempt(lambda: self._choose(name)), "value")
        self.canvas.on_msg(lambda _, content, buffers: self.receive(content, buffers))
        bar = widgets.Box(list(self.controls.values()), layout={"flex_flow": "row wrap"})
        super().__init__([bar, self.canvas])
        self.show_sample(self.order()[0])

    def __repr__(self) -> str:  # what a page without a kernel shows in its place
        return f"a viewer of {len(self.strip.samples)} pictures: run the notebook to use it"

    @property
    def choice(self) -> Choice:
        """What is shown."""
        values = {name: control.value for name, control in self.controls.items()}
        if not self.kept:
            return Choice(self.samples[self.place])
        chosen = {name: values[name] for name in ("model", "method", "layers", "heads", "word", "answer")}
        return Choice(self.samples[self.place], self.kept[values["model"]], cells=self.cells, **chosen)

    def figure(self) -> Figure:
        """What is shown, for a page without a running kernel."""
        return self.choice.figure()

    def rows(self) -> list[dict]:
        """What is known of each sample, see `Strip.rows`."""
        return self.strip.rows(self.choice.kept)

    def order(self) -> list[int]:
        """Places of the samples of the chosen category, sorted as chosen."""
        return self.strip.order(self.rows(), self.controls["sort"].value, self.controls["category"].value)

    def show_sample(self, place: int) -> None:
        """Show the sample at a place of `samples`, with no cells hidden."""
        self.place, self.cells = place, ()
        self._offer()
        self.redraw(strip=True, photo=True)

    def hide_cells(self, cells: Sequence[int]) -> None:
        """Hide these cells of 196, row by row, and count again."""
        cells = tuple(sorted({int(cell) for cell in cells} & set(range(GRID * GRID))))
        for hidden in ((), cells):
            self.choice.kept.prediction(self.samples[self.place], hidden)
        self.cells = cells
        self.redraw()

    def redraw(self, strip: bool = False, photo: bool = False, message: str = "") -> None:
        """Send the page what is chosen, thumbnails and photograph only where they changed."""
        choice, rows, changed = self.choice, self.rows(), {}
        scene = {**choice.scene(), "place": self.place, "message": message, "points": self.strip.points(rows)}
        scene["atlas"], changed["atlas"] = choice.atlas()
        if strip:
            changed["strip"] = self.strip.thumbs(rows, self.order())
        if photo:
            changed["photo"] = jpeg(choice.sample.image)
        self.canvas.update(scene=scene, **changed)
        self._predict_later()

    def receive(self, content: dict, buffers: Sequence = ()) -> None:
        """Do what a message of the page asks for, see `Canvas`."""
        actions = {
            "open": lambda: self.show_sample(int(content["place"])),
            "page": lambda: self._turn(int(content["by"])),
            "hide": lambda: self.hide_cells(content["cells"]),
            "head": lambda: self._choose_head(int(content["layer"]), int(content["head"])),
            "picture": lambda: self._add_picture(str(content["name"]), bytes(buffers[0])),
        }
        self._attempt(actions[content["kind"]])

    def _attempt(self, act: Callable[[], None]) -> None:
        """Do it, or say in the page why not."""
        try:
            act()
        except (DataError, ConfigError, ModelError, ValueError) as error:
            self.redraw(message=str(error))

    def _offer(self) -> None:
        """Offer this model's layers and heads, and only what the method and the picture have."""
        if self.kept:
            offer(self.controls, self.choice.kept, isinstance(self.samples[self.place], Picture))

    def _choose(self, name: str) -> None:
        if name in ("sort", "category"):
            self.strip.first = 0
            self.show_sample(self.order()[0])
        elif name != "count":
            self._offer()
            self.redraw(strip=name == "model")

    def _turn(self, by: int) -> None:
        self.strip.first += STRIP * by
        self.redraw(strip=True)

    def _choose_head(self, layer: int, head: int) -> None:
        self.controls["layers"].value, self.controls["heads"].value = (layer,), (head,)

    def _add_picture(self, name: str, content: bytes) -> None:
        self.samples.append(own_picture(name, content, self.controls["count"].value))
        self.show_sample(len(self.samples) - 1)

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
