"""Train MONAI's three-dimensional DenseNet-121 on volumes, swapped.

The volumes are MONAI's synthetic ones: some hold many small spheres, the others few large ones, and the
network learns to tell which. Run: python examples/medical_volumes.py --steps 30
"""

import numpy as np
import torch
import torch.nn.functional as F
import typer
from monai.data import create_test_image_3d
from monai.networks.nets import DenseNet121
from torch import Tensor

import dense_ext

SPHERES = ({"num_objs": 12, "rad_min": 2, "rad_max": 4}, {"num_objs": 2, "rad_min": 6, "rad_max": 10})


def volumes(n: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Volumes [n, 1, size, size, size] with a little noise, and their classes, 0 and 1 in turn."""
    random, labels = np.random.RandomState(seed), torch.arange(n) % 2
    made = [
        create_test_image_3d(size, size, size, noise_max=0.3, random_state=random, **SPHERES[label])[0]
        for label in labels.tolist()
    ]
    return torch.tensor(np.stack(made), dtype=torch.float32)[:, None], labels


def main(steps: int = 30, size: int = 32, batch: int = 8) -> None:
    """Train, then print the accuracy on volumes held out."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = DenseNet121(spatial_dims=3, in_channels=1, out_channels=2)
    dense_ext.swap(model).to(device, memory_format=torch.channels_last_3d)
    print(dense_ext.report(model))

    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for step in range(steps):
        x, labels = volumes(batch, size, seed=step)
        loss = F.cross_entropy(model(x.to(device)), labels.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 5 == 4:
            print(f"step {step + 1}: loss {loss.item():.3f}")

    model.eval()
    x, labels = volumes(32, size, seed=steps)
    with torch.no_grad():
        right = model(x.to(device)).argmax(1).cpu() == labels
    print(f"test accuracy {right.float().mean():.1%}")


if __name__ == "__main__":
    typer.run(main)
