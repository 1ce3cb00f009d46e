"""Images from files to the device, split once and for all and served as [0, 1] batches: by name, or your own."""

from __future__ import annotations

from afd.data.datasets import FILES, NAMES, Splits, check_data, load
from afd.data.extra import MixedBatches, read_extra
from afd.data.images import Batches, Images
from afd.errors import DataError

__all__ = ["FILES", "NAMES", "Batches", "DataError", "Images", "MixedBatches", "Splits", "check_data", "load"]
__all__ += ["read_extra"]
