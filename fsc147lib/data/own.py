"""`import`: a root in FSC147's layout from pictures and labels in other formats (CSV of dots, COCO JSON of boxes)."""

import csv
import json
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm
from tyro.conf import Positional

from ..files import need_file, new_folder
from ..options import need
from .faults import IMAGES, DataError, is_plain, need_category, write_layout
from .samples import open_picture, shrunk


@dataclass(frozen=True)
class ImportConfig:
    """Make a root in FSC147's layout from pictures of your own."""

    out: Positional[Path]  # The root to make: a new folder.
    images: Path  # Folder of the pictures.
    points: Path | None = None
    """CSV with the columns image, x, y (and category), a line an object; or a folder with a CSV of x, y a picture."""
    coco: Path | None = None  # JSON in COCO's format, instead of --points; a dot is the centre of an object's box.
    category: str | None = None  # Category to count; needed where a picture has several, or the labels name none.
    val: float = 0.2  # Part of the pictures that goes to the validation split, chosen at random.
    test: float = 0.0  # Part of the pictures that goes to the test split.
    seed: int = 0  # Random seed of the splits.

    def __post_init__(self):
        need(self, "points", (self.points is None) != (self.coco is None), "given, or --coco, and not both")
        need(self, "val", 0 <= self.val < 1, "in 0..1")
        need(self, "test", self.test >= 0 and self.val + self.test < 1, "at least 0, and below 1 together with --val")
        need(self, "seed", self.seed >= 0, "at least 0")
        if self.category is not None:
            need_category(self.category, "--category: ")


Dots = dict[str, dict[str, list | None]]  # by picture and category: (x, y) in pixels of the upright picture
Sizes = dict[str, tuple[int, int]]  # (width, height) of the labelled pictures, where the labels tell them


def import_pictures(config: ImportConfig) -> dict[str, int]:
    """Write the root that `config` describes; returns the number of pictures in each split.

    Raises:
        DataError: labels or a picture cannot be used.  The message names the file and the place in it.
        FileExistsError: the root's folder is not empty.
    """
    file = config.points or config.coco
    entries, categories = {}, {}
    sources: dict[str, Path] = {}
    with new_folder(config.out) as draft:
        dots, sizes = read_points(file, config.category) if config.points else read_coco(file)
        (draft / IMAGES).mkdir(parents=True)
        for name, (category, points) in tqdm(choose_dots(file, dots, config.category).items(), "import", leave=False):
            source = find_picture(config.images, name)
            stored = f"{source.stem}.jpg"
            if not is_plain(stored):
                raise DataError(f"{stored!r} cannot be the name of a picture: rename {source}")
            if stored in sources:
                raise DataError(f"{source} and {sources[stored]} would both become {stored}: rename one of them")
            image = open_picture(source)
            _need_fitting(source, points, image.size, sizes.get(name, image.size))
            small = shrunk(image)
            small.save(draft / IMAGES / stored, quality=95)
            scaled = np.array(points).reshape(-1, 2) * small.size / image.size
            entries[stored] = {"points": scaled.round(3).tolist()}
            categories[stored], sources[stored] = category, source
        splits = choose_splits(list(entries), config.val, config.test, config.seed)
        write_layout(draft, entries, splits, categories)
    return {split: len(names) for split, names in splits.items()}


def choose_dots(file: Path, dots: Dots, category: str | None) -> dict[str, tuple[str, list]]:
    """The category and dots of each picture: of `category`, or of the picture's only one for None.

    Pictures without a category, or with a crowd of it (None for dots), are left out.  Raises DataError for a picture
    with several categories, an unknown `category`, or no picture left.
    """
    chosen = {}
    for name, kinds in dots.items():
        if category is None and len(kinds) > 1:
            raise DataError(f"{file}: {name} shows {', '.join(sorted(kinds))}: choose one with --category")
        kind = category or next(iter(kinds), None)
        points = kinds.get(kind, [])
        if kind is not None and points is not None:
            chosen[name] = kind, points
    found = sorted({kind for kinds in dots.values() for kind in kinds})
    if found and category not in (None, *found):
        raise DataError(f"{file} has no dots of category {category!r}, only of {', '.join(found)}")
    if not chosen:
        raise DataError(f"{file} has no picture to count {category or 'anything'} in")
    return chosen


def find_picture(folder: Path, name: str) -> Path:
    """The file of this name in a folder, or the only picture whose name without its ending is `name`."""
    if is_plain(name) and (folder / name).is_file():
        return folder / name
    found = [path for path in sorted(folder.glob("*")) if path.stem == name and path.suffix.lower() != ".csv"]
    if len(found) != 1:
        raise DataError(f"{folder} must hold one picture called {name!r}, but has {[path.name for path in found]}")
    return found[0]


def choose_splits(names: list[str], val: float, test: float, seed: int) -> dict[str, list[str]]:
    """Names by split, chosen at random; `val` and `test` are parts of 1, and a part above 0 gets a name at least."""
    order = np.random.default_rng(seed).permutation(names).tolist()
    n_val, n_test = (max(1, round(part * len(names))) if part else 0 for part in (val, test))
    if n_val + n_test >= len(names):
        needed = f"train, val ({n_val}) and test ({n_test})"
        raise DataError(f"too few pictures for {needed}: {len(names)} in all, label more")
    splits = {"train": order[n_val + n_test :], "val": order[:n_val], "test": order[n_val : n_val + n_test]}
    return {split: sorted(part) for split, part in splits.items() if part}


def _need_fitting(path: Path, points: list, size: tuple[int, int], labelled: tuple[int, int]) -> None:
    """Refuse dots outside a picture of this (width, height), in other units, or labelled at another size."""
    picture = f"{path} is {size[0]} x {size[1]} pixels, but"
    if labelled != size:
        raise DataError(f"{picture} its labels are of {labelled[0]} x {labelled[1]}")
    for x, y in points:
        if not (0 <= x <= size[0] and 0 <= y <= size[1]):
            raise DataError(f"{picture} has a dot at ({x:g}, {y:g})")
    if len(points) > 1 and max(map(max, points)) <= 1:
        raise DataError(f"all dots of {path} lie within one pixel: give x and y in pixels, not as parts of the picture")


def read_points(path: Path, category: str | None) -> tuple[Dots, Sizes]:
    """Dots from a CSV file (image, x, y, perhaps category), or from a folder of CSV files (x, y) named after pictures.

    A line without x and y, or a file of the folder without lines, is a count of 0.  `category` is that of lines that
    name none.  Raises DataError with the file and the line.
    """
    dots: Dots = defaultdict(lambda: defaultdict(list))
    if not path.is_dir():
        _read_csv(path, None, category, dots)
        return dots, {}
    for file in sorted(path.glob("*.csv")):
        _read_csv(file, file.stem, category, dots)
        if file.stem not in dots:
            dots[file.stem] = {need_category(category, f"{file}: "): []}
    return dots, {}


def _read_csv(path: Path, picture: str | None, category: str | None, dots: Dots) -> None:
    """Add the dots of a CSV file, all of one `picture` or (None) of those in its column `image`."""
    columns = ["x", "y"] if picture else ["image", "x", "y"]
    try:
        with need_file(path).open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, restkey="", restval="", skipinitialspace=True)
            rows = [(reader.line_num, {k: v.strip() for k, v in row.items() if k}) for row in reader]
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as CSV: {error}") from error
    if set(columns) - set(reader.fieldnames or ()):
        raise DataError(f"{path} must begin with a line that names the columns {', '.join(columns)}")
    for number, row in rows:
        place = f"{path}, line {number}: "
        name = picture or row["image"]
        if not name:
            raise DataError(f"{place}no image is named")
        points = dots[name][need_category(row.get("category") or category, place)]
        if row["x"] or row["y"]:
            points.append((_number(row, "x", place), _number(row, "y", place)))


def _number(row: dict[str, str], name: str, place: str) -> float:
    try:
        value = float(row[name])
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise DataError(f"{place}{name} is {row[name]!r}, but must be a number of pixels")
    return value


def read_coco(path: Path) -> tuple[Dots, Sizes]:
    """The centres of a COCO file's boxes, and the sizes of its pictures (see docs/data.md).

    A category with a crowd (`iscrowd`) in a picture has None for dots.  Raises DataError with the entry at fault.
    """
    kinds, names, sizes, crowds, entry = {}, {}, {}, [], None
    try:
        content = json.loads(need_file(path).read_text("utf-8-sig"))
        for entry in content["categories"]:
            kinds[entry["id"]] = need_category(str(entry["name"]))
        for entry in content["images"]:
            name = names[entry["id"]] = Path(entry["file_name"]).name
            if name in sizes:
                raise ValueError(f"two images are called {name}: rename one, and its file")
            sizes[name] = int(entry["width"]), int(entry["height"])
        dots: Dots = {name: {kind: [] for kind in kinds.values() if len(kinds) == 1} for name in sizes}
        for entry in content["annotations"]:
            marks, kind = dots[names[entry["image_id"]]], kinds[entry["category_id"]]
            x, y, width, height = map(float, entry["bbox"])
            marks.setdefault(kind, []).append((x + width / 2, y + height / 2))
            if entry.get("iscrowd"):
                crowds.append((marks, kind))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        place = f" in {entry!r:.200}" if entry else ""
        raise DataError(f"{path} is no COCO file ({type(error).__name__}: {error}{place}): see docs/data.md") from error
    for marks, kind in crowds:
        marks[kind] = None
    return dots, sizes
