"""Samples: the built-in set, the layouts people have, splits, views that can be replayed, and word lists.

    from pocketvlm.data import open_data
    source = open_data("openmoji?pool=test&fold=0")
    len(source), source[0].label, source.summary()

Needs numpy and Pillow only; pictures are decoded by whoever uses them (`edge.preprocess.decode_image`).
"""

from __future__ import annotations

if __name__ != "pocketvlm.data":
    raise ImportError("import this package as pocketvlm.data; a second copy under 'data' would duplicate every class")

from pocketvlm.data.cache import cache_dir
from pocketvlm.data.opening import open_data
from pocketvlm.data.report import BadSampleReport
from pocketvlm.data.sample import Caption, HardNegative, ImageRef, Sample, Turn
from pocketvlm.data.source import DataSource

__all__ = [
    "BadSampleReport",
    "Caption",
    "DataSource",
    "HardNegative",
    "ImageRef",
    "Sample",
    "Turn",
    "cache_dir",
    "open_data",
]
