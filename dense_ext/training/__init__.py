"""Training a DenseNet on a folder of images, as ``dense-ext train`` does; needs ``dense_ext[train]``."""

from __future__ import annotations

from .images import DataSets, digits_data, folder_data
from .trainer import CHECKPOINT, PEER_CHECKPOINT, Training

__all__ = ["CHECKPOINT", "PEER_CHECKPOINT", "DataSets", "Training", "digits_data", "folder_data"]
