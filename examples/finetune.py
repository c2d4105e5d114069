"""Fine-tune a torchvision DenseNet whose early blocks are frozen.

Frozen parts keep nothing for backward; dense_ext saves memory in the rest. The data are scikit-learn's
handwritten digits. Run: python examples/finetune.py --epochs 3
"""

import torch
import torch.nn.functional as F
import torchvision
import typer
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset, random_split

import dense_ext

FROZEN = ("conv0", "norm0", "denseblock1", "transition1")


def digits(size: int) -> TensorDataset:
    """1797 images [3, size, size] with their labels."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    return TensorDataset(F.interpolate(images, size).expand(-1, 3, -1, -1), torch.tensor(data.target))


def main(epochs: int = 3, size: int = 32, batch: int = 64) -> None:
    """Train, then print the accuracy on images held out."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # weights="DEFAULT" downloads what torchvision trained on ImageNet; None starts from random weights.
    model = torchvision.models.densenet121(weights=None)
    model.classifier = torch.nn.Linear(model.classifier.in_features, 10)
    dense_ext.swap(model).to(device, memory_format=torch.channels_last)

    frozen = [getattr(model.features, name) for name in FROZEN]
    for part in frozen:
        part.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.02, momentum=0.9)
    training, test = random_split(digits(size), [0.8, 0.2])
    for epoch in range(epochs):
        model.train()
        for part in frozen:
            part.eval()  # their batch norms keep the statistics that they were trained with
        for images, labels in DataLoader(training, batch, shuffle=True, drop_last=True):
            loss = F.cross_entropy(model(images.to(device)), labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            x, labels = next(iter(DataLoader(test, len(test))))
            right = model(x.to(device)).argmax(1).cpu() == labels
        print(f"epoch {epoch + 1}: test accuracy {right.float().mean():.1%}")


if __name__ == "__main__":
    typer.run(main)
