"""Real images: one batch to measure with, and data sets to train on."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from .errors import UsageError

# ImageNet's channel means and deviations, as torchvision's networks expect.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_TEST_SHARE = 0.2
_DISTINCT = 64  # images of a batch
_CIFAR = 32  # pixels
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


@dataclass(frozen=True)
class Batch:
    """Images [N, 3, size, size] float32, labels [N], and where they come from."""

    images: Tensor
    labels: Tensor
    classes: int
    source: str


def sample_batch(folder: Path | None, batch: int, size: int, seed: int) -> Batch:
    """A batch of real images, the same for the same arguments; the latest one is kept.

    Args:
        folder: images by class, or None for random crops of scikit-learn's two photographs, as if they
            were of ImageNet's 1000 classes, or of CIFAR's 10 where they are as small.
        batch: N. After 64 images they repeat: speed and memory do not depend on what they show.
        size: height and width in pixels.
        seed: of the choice, the crops and the flips.

    Raises:
        UsageError: the folder is missing or holds no images.
    """
    distinct = _distinct_images(folder, min(batch, _DISTINCT), size, seed)
    picks = torch.arange(batch) % _DISTINCT
    return replace(distinct, images=distinct.images[picks], labels=distinct.labels[picks])


@functools.lru_cache(maxsize=1)
def _distinct_images(folder: Path | None, count: int, size: int, seed: int) -> Batch:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transform = training_transform(size)
        if folder is not None:
            data = image_folder(folder, transform)
            picks = [data[int(i)] for i in torch.randint(len(data), (count,))]
            images, labels = zip(*picks, strict=True)
            classes = len(data.classes)
            return Batch(torch.stack(images), torch.tensor(labels), classes, f"folder {folder.name}")
        photos, source = _photographs()
        images = tuple(transform(photos[i % len(photos)]) for i in range(count))
        classes = 10 if size <= _CIFAR else 1000
        return Batch(torch.stack(images), torch.arange(count) % len(photos), classes, source)


def _photographs() -> tuple[list[Tensor], str]:
    """Two images [3, H, W] uint8, and where they come from."""
    try:
        from sklearn.datasets import load_sample_images
    except ImportError:
        noise = torch.randint(256, (2, 3, 427, 640), dtype=torch.uint8)
        return list(noise), "noise (scikit-learn with its photographs is not installed)"
    photos = [torch.tensor(image).permute(2, 0, 1) for image in load_sample_images().images]
    return photos, "scikit-learn's sample photographs, random crops"


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
