"""The viewer: a widget that shows samples and maps, and lets one choose options, hide cells and count again.

viewer.Viewer(FSC147(root, "val"), {"counts alone": load_model("tiny"), "both losses": load_model("tiny-dual")})
"""

import asyncio
import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_args

import anywidget
import ipywidgets as widgets
import traitlets
from matplotlib.figure import Figure

from ..data import GRID, DataError, Picture, Sample
from ..model import CountingModel, ModelError, method_names
from ..model.looking import Whose, Word
from ..options import ConfigError
from .scene import Choice, Kept, photo_url

STRIP = 9  # thumbnails at a time
THUMBNAIL = 96, 72  # their largest width and height in pixels
PAUSE = 0.15  # seconds without a change until the distribution is computed, which takes longer than a redraw

SORTS: dict[str, Callable[[dict], float]] = {
    "order of the split": lambda row: 0,
    "largest count": lambda row: -row["count"],
    "largest error": lambda row: -math.inf if row["predicted"] is None else -abs(row["predicted"] - row["count"]),
    "worst alignment": lambda row: math.inf if math.isnan(row["kl"]) else -row["kl"],
}


class Canvas(anywidget.AnyWidget):
    """The widget's part in the page: draws `scene`, `photo` and `strip`, and sends messages to `Viewer.receive`."""

    _esm = Path(__file__).with_name("canvas.js")
    _css = Path(__file__).with_name("canvas.css")
    strip = traitlets.Dict().tag(sync=True)  # "thumbs": [{"place", "src", "text"}], "text", "more": [before, after]
    photo = traitlets.Unicode().tag(sync=True)  # data URL, as all pictures
    scene = traitlets.Dict().tag(sync=True)  # of `Choice.scene` and `Viewer.redraw`; its "version" grows


class Viewer(widgets.VBox):
    """A notebook's widget of a sample's photograph, target, map and difference.

    Args:
        samples: one or more; a DataError without any.
        models: name -> model.  A model answers all samples when it is first chosen.  Without models there are
            photographs and targets alone.
    """

    def __init__(self, samples: Sequence[Sample], models: dict[str, CountingModel] | None = None):
        self.split = list(samples)
        if not self.split:
            raise DataError("there are no samples to view: give a split that has some")
        self.samples = list(self.split)  # and after them the user's pictures
        self.kept = {name: Kept(model, self.split) for name, model in (models or {}).items()}
        self.place, self.first, self.cells, self.waiting = 0, 0, (), None
        self.controls, self.canvas = make_controls(self.split, self.kept), Canvas()
        self.show_sample(self.order()[0])
        for name, control in self.controls.items():
            control.observe(lambda _, name=name: self.receive({"kind": "control", "name": name}), "value")
        self.canvas.on_msg(lambda _, *message: self.receive(*message))
        super().__init__([widgets.Box([*self.controls.values()], layout={"flex_flow": "row wrap"}), self.canvas])

    def __repr__(self) -> str:  # stands in a page without a kernel
        return f"a viewer of {len(self.split)} pictures: run the notebook to use it"

    @property
    def choice(self) -> Choice:
        """The sample in view, and the chosen options."""
        if not self.kept:
            return Choice(self.samples[self.place])
        names = ("model", "method", "layers", "heads", "word", "answer")
        chosen = {name: self.controls[name].value for name in names}
        return Choice(self.samples[self.place], self.kept[chosen["model"]], cells=self.cells, **chosen)

    def figure(self) -> Figure:
        """The view as a figure, for a page without a kernel."""
        return self.choice.figure()

    def rows(self) -> list[dict]:
        """`Kept.rows` of the chosen model; without a model, each sample's count."""
        return self.choice.kept.rows if self.kept else [{"count": sample.count} for sample in self.split]

    def order(self) -> list[int]:
        """Indices of the samples of the chosen category, in the chosen order."""
        rows, sort, category = self.rows(), SORTS[self.controls["sort"].value], self.controls["category"].value
        places = [i for i, sample in enumerate(self.split) if category in ("", sample.category)]
        return sorted(places, key=lambda i: sort(rows[i]))

    def thumbnails(self) -> dict:
        """The page's strip of thumbnails, from number `first` on, which is moved into its range."""
        order, rows = self.order(), self.rows()
        self.first = min(max(0, self.first), (len(order) - 1) // STRIP * STRIP)
        thumbs = []
        for i in order[self.first : self.first + STRIP]:
            text = f"{self.split[i].count} {self.split[i].category}"
            if self.kept:
                predicted = rows[i]["predicted"]
                text = f"{'?' if predicted is None else predicted} of {text}"
            thumbs.append({"place": i, "src": photo_url(self.split[i], THUMBNAIL), "text": text})
        text = f"{self.first + 1} to {self.first + len(thumbs)} of {len(order)}"
        return {"thumbs": thumbs, "text": text, "more": [self.first > 0, self.first + STRIP < len(order)]}

    def show_sample(self, place: int) -> None:
        """Show the sample with this index in `samples`, with no cells hidden."""
        self.place, self.cells = place, ()
        self.redraw()

    def hide_cells(self, cells: Sequence[int]) -> None:
        """Hide cells of the 14x14 grid (0..195, row by row), and count again."""
        self.cells = tuple(sorted({int(cell) for cell in cells} & set(range(GRID * GRID))))
        for hidden in ((), self.cells):
            self.choice.kept.prediction(self.samples[self.place], hidden)
        self.redraw()

    def redraw(self, message: str = "") -> None:
        """Send the scene to the page, with a message for the user."""
        points = []
        if self.kept:
            offer(self.controls, self.choice)
            points = [[i, row["count"], row["predicted"], self.split[i].name] for i, row in enumerate(self.rows())]
        version = self.canvas.scene.get("version", 0) + 1
        more = {"version": version, "place": self.place, "message": message, "points": points}
        with self.canvas.hold_sync():
            self.canvas.strip, self.canvas.photo = self.thumbnails(), photo_url(self.choice.sample)
            self.canvas.scene = {**self.choice.scene(), **more}
        self.predict_later()

    def predict_later(self) -> None:
        """Compute the distribution over counts once nothing has changed for PAUSE seconds."""
        if self.waiting is not None:
            self.waiting.cancel()
        if self.kept and not self.choice.predictions():
            try:
                self.waiting = asyncio.get_running_loop().call_later(PAUSE, self.receive, {"kind": "predict"})
            except RuntimeError:  # there is no kernel
                self.receive({"kind": "predict"})

    def receive(self, message: dict, buffers: Sequence = ()) -> None:
        """Handle a message of the page or of a control; the page shows the error if there is one."""
        try:
            self.do(message, buffers)
        except (DataError, ConfigError, ModelError, ValueError) as error:
            self.redraw(str(error))

    def do(self, message: dict, buffers: Sequence) -> None:
        match message:
            case {"kind": "open", "place": place}:
                self.show_sample(place)
            case {"kind": "page", "by": by}:
                self.first += STRIP * by
                self.redraw()
            case {"kind": "hide", "cells": cells}:
                self.hide_cells(cells)
            case {"kind": "head", "layer": layer, "head": head}:
                self.controls["layers"].value, self.controls["heads"].value = (layer,), (head,)
            case {"kind": "picture", "name": name}:
                self.samples.append(own_picture(name, bytes(buffers[0]), self.controls["count"].value))
                self.show_sample(len(self.samples) - 1)
            case {"kind": "control", "name": "sort" | "category"}:
                self.first = 0
                self.show_sample(self.order()[0])
            case {"kind": "control", "name": name} if name != "count":
                self.redraw()
            case {"kind": "predict"}:
                self.choice.kept.prediction(self.samples[self.place])
                self.redraw()


def make_controls(samples: list[Sample], kept: dict[str, Kept]) -> dict[str, widgets.Widget]:
    """The controls by name; `offer` fills the menus that depend on the choice."""
    menus = {"sort": list(SORTS), "category": [("all", ""), *sorted({(one.category, one.category) for one in samples})]}
    if kept:
        menus |= {"model": list(kept), "method": method_names(), "layers": [()], "heads": [()]}
        menus |= {"word": get_args(Word), "answer": get_args(Whose)}
    else:
        menus["sort"] = menus["sort"][:2]  # the other two need answers
    made = {name: widgets.Dropdown(options=menu, description=name) for name, menu in menus.items()}
    if kept:
        made["count"] = widgets.Text("objects", description="count", tooltip="what to count in a picture of your own")
    for control in made.values():
        control.layout.width = "220px"
    return made


def offer(controls: dict[str, widgets.Widget], choice: Choice) -> None:
    """Fill the menus of layers, heads and answer for a choice; hide layers and heads if its method has none."""
    kept = choice.kept
    default = f"default: {', '.join(map(str, kept.default_layers))}"
    menus = {
        "layers": ((default, kept.default_layers), ("all", kept.layers), *((str(i), (i,)) for i in kept.layers)),
        "heads": (("all", ()), *((str(i), (i,)) for i in kept.heads)),
        "answer": ("own",) if choice.true_count is None else get_args(Whose),
    }
    for name, menu in menus.items():
        if controls[name].options != menu:
            controls[name].options = menu
    for name in ("layers", "heads"):
        controls[name].layout.display = None if choice.has_heads else "none"


def own_picture(name: str, content: bytes, category: str) -> Picture:
    """A picture from a file's bytes; a DataError names the file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "picture"
        path.write_bytes(content)
        try:
            return Picture(path, category, name)
        except DataError as error:
            raise DataError(str(error).replace(str(path), name)) from error
