"""Segment images with a U-Net whose encoder is a DenseNet, swapped.

segmentation_models_pytorch builds it on torchvision's dense blocks. Its encoder calls the stem and the
transitions module by module to get the features between. Its forward is traced and rewritten, so that
they run fused too. The images are MONAI's synthetic ones. Run: python examples/segmentation.py --steps 40
"""

import numpy as np
import segmentation_models_pytorch as smp
import torch
import typer
from monai.data import create_test_image_2d
from torch import Tensor

import dense_ext


def images(n: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noisy images of discs [n, 1, size, size], and the discs' masks."""
    random = np.random.RandomState(seed)
    options = {"num_objs": 6, "rad_min": 4, "rad_max": size // 6, "noise_max": 0.5, "num_seg_classes": 1}
    pairs = [create_test_image_2d(size, size, random_state=random, **options) for _ in range(n)]
    x, mask = (
        torch.tensor(np.stack(part), dtype=torch.float32)[:, None] for part in zip(*pairs, strict=True)
    )
    return x, mask


def main(steps: int = 40, size: int = 96, batch: int = 8) -> None:
    """Train, then print how well the mask overlaps the discs in images held out."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # encoder_weights="imagenet" downloads weights.
    model = smp.Unet(
        "densenet121", encoder_weights=None, decoder_channels=(64, 48, 32, 24, 16), in_channels=1, classes=1
    )
    dense_ext.swap(model).to(device, memory_format=torch.channels_last)
    print(dense_ext.report(model))

    criterion = smp.losses.DiceLoss(mode="binary")
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    for step in range(steps):
        x, mask = images(batch, size, seed=step)
        loss = criterion(model(x.to(device)), mask.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 9:
            print(f"step {step + 1}: Dice loss {loss.item():.3f}")

    model.eval()
    x, mask = images(16, size, seed=steps)
    with torch.no_grad():
        found = model(x.to(device)).cpu() > 0
    overlap, union = (found & mask.bool()).sum(), (found | mask.bool()).sum()
    print(f"intersection over union {overlap / union:.2f}")


if __name__ == "__main__":
    typer.run(main)
