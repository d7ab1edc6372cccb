"""Teach Qwen3-VL to count on FSC147, and see where it looks while it counts.

The way of the data: `data` (a root on disk to samples) -> `collate` (to batches) -> `model` -> `heatmaps` and
`losses` -> `train` -> `evaluate` -> `viz`.  Each module opens with what it is for and what it leaves out.
"""
