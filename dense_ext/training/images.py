"""Images to train on: folders of them, or scikit-learn's handwritten digits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from ..benchmark.errors import UsageError

# ImageNet's channel means and deviations, as torchvision's networks expect.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_TEST_SHARE = 0.2
_SPLIT_SEED = 0  # of the split into training and test images; not the training's seed

Transform = Callable[[Any], Tensor]


def training_transform(size: int) -> Transform:
    """Random crop and flip to [3, size, size], float32, normalised."""
    transform: Transform = v2.Compose([
        v2.RGB(), v2.RandomResizedCrop(size, scale=(0.25, 1.0), antialias=True), v2.RandomHorizontalFlip(),
        v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(_MEAN, _STD),
    ])  # fmt: skip
    return transform


def test_transform(size: int) -> Transform:
    """The middle of the image, [3, size, size], float32, normalised."""
    transform: Transform = v2.Compose([
        v2.RGB(), v2.Resize(size * 8 // 7, antialias=True), v2.CenterCrop(size),
        v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(_MEAN, _STD),
    ])  # fmt: skip
    return transform


def image_folder(folder: Path, transform: Transform | None = None) -> ImageFolder:
    """Images in a sub-folder per class.

    Raises:
        UsageError: no such folder, no sub-folders, or one without images.
    """
    if not folder.is_dir():
        raise UsageError(f"data folder {folder} does not exist")
    try:
        return ImageFolder(folder, transform)
    except FileNotFoundError as error:
        message = str(error).splitlines()[0].rstrip(".")
        raise UsageError(f"data folder {folder} must hold a folder of images per class: {message}") from error


@dataclass(frozen=True)
class DataSets:
    """Training and test images with their labels, and the classes' names."""

    training: Dataset[tuple[Tensor, int]]
    test: Dataset[tuple[Tensor, int]]
    classes: Sequence[str]
    source: str


def folder_data(folder: Path, size: int) -> DataSets:
    """A folder with ``train`` and ``val`` or ``test``, or one folder of classes, split 4 to 1 by class.

    Raises:
        UsageError: the folder is missing, holds no images, or its parts have different classes.
    """
    held_out = next((folder / name for name in ("val", "test") if (folder / name).is_dir()), None)
    if (folder / "train").is_dir() and held_out is not None:
        training = image_folder(folder / "train", training_transform(size))
        test = image_folder(held_out, test_transform(size))
        if training.classes != test.classes:
            raise UsageError(f"train and {held_out.name} in {folder} have different classes")
        return DataSets(training, test, training.classes, f"folder {folder.name}")
    training = image_folder(folder, training_transform(size))
    test = image_folder(folder, test_transform(size))
    first, second = _split(training.targets)
    source = f"folder {folder.name}, {1 - _TEST_SHARE:.0%} of it for training"
    return DataSets(Subset(training, first), Subset(test, second), training.classes, source)


def _split(labels: Sequence[int]) -> tuple[list[int], list[int]]:
    """Indices for training and test, every class in its share."""
    from sklearn.model_selection import train_test_split

    try:
        first, second = train_test_split(
            range(len(labels)), test_size=_TEST_SHARE, random_state=_SPLIT_SEED, stratify=labels
        )
    except ValueError as error:
        raise UsageError(f"too few images to split: {error}") from error
    return first, second


class Digits(Dataset[tuple[Tensor, int]]):
    """scikit-learn's handwritten digits as images [3, size, size], normalised to mean 0, deviation 1.

    Args:
        part: ``"training"`` (with random shifts of up to two pixels) or ``"test"``.
        size: height and width in pixels.
    """

    def __init__(self, part: str, size: int) -> None:
        from sklearn.datasets import load_digits

        data = load_digits()
        images = torch.from_numpy(data.images).float().div_(16)
        split = dict(zip(("training", "test"), _split(data.target), strict=True))
        mean, std = images[split["training"]].mean(), images[split["training"]].std()
        chosen = ((images[split[part]] - mean) / std)[:, None].expand(-1, 3, -1, -1)
        self.images = v2.functional.resize(chosen, [size, size], antialias=True)
        self.labels = torch.as_tensor(data.target[split[part]])
        fill = float(-mean / std)  # the background
        self.transform = v2.RandomCrop(size, padding=2, fill=fill) if part == "training" else v2.Identity()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.images[index]), int(self.labels[index])


def digits_data(size: int) -> DataSets:
    """The 1797 handwritten digits that come with scikit-learn, split 4 to 1 by class."""
    source = "scikit-learn's handwritten digits"
    return DataSets(Digits("training", size), Digits("test", size), [str(i) for i in range(10)], source)
