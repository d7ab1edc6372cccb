"""Root on disk to `Sample`: an official FSC147 root read and checked, drawn scenes in the same layout, and where
the objects are as a density and as a target heatmap, with the divergence between two maps.
"""

from .checking import check
from .faults import DataError
from .fsc147 import FSC147, open_split
from .hiding import Fill, hide
from .samples import Picture, Sample
from .scenes import draw_scene, make_dataset
from .targets import GRID, area_weights, density_map, kl_divergence, resample_map, target_heatmap

__all__ = [
    "FSC147", "GRID", "DataError", "Fill", "Picture", "Sample", "area_weights", "check", "density_map", "draw_scene",
    "hide", "kl_divergence", "make_dataset", "open_split", "resample_map", "target_heatmap",
]  # fmt: skip
