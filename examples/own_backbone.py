"""Build a densely connected backbone of your own from dense_ext.DenseBlock and Transition.

It returns the features at every scale, as detectors and segmenters want them; here a classifier reads the
last ones, on scikit-learn's handwritten digits. Run: python examples/own_backbone.py --epochs 5
"""

import torch
import torch.nn.functional as F
import typer
from sklearn.datasets import load_digits
from torch import Tensor, nn

import dense_ext


class Backbone(nn.Module):
    """Dense blocks with transitions between them: [N, in_channels, H, W] -> features, finest first."""

    def __init__(self, in_channels: int, layers: tuple[int, ...], growth_rate: int) -> None:
        super().__init__()
        channels = 2 * growth_rate
        self.stages = nn.ModuleList([nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)])
        for depth in layers:
            block = dense_ext.DenseBlock(depth, channels, growth_rate, recompute="block")
            self.channels = channels + depth * growth_rate
            channels = self.channels // 2
            self.stages += [block, dense_ext.Transition(self.channels, channels)]  # halves H and W
        del self.stages[-1]

    def forward(self, x: Tensor) -> list[Tensor]:
        outputs = [x]
        for stage in self.stages:
            outputs.append(stage(outputs[-1]))
        return outputs[2::2]  # the blocks'


def main(epochs: int = 5, batch: int = 64) -> None:
    """Train, then print the accuracy on images held out."""
    torch.manual_seed(0)
    digits = load_digits()
    x, y = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1, torch.tensor(digits.target)
    training, test = torch.randperm(len(x)).split((1440, len(x) - 1440))
    model = Backbone(in_channels=1, layers=(4, 6, 4), growth_rate=12).to(memory_format=torch.channels_last)
    classifier = nn.Linear(model.channels, 10)
    optimizer = torch.optim.AdamW([*model.parameters(), *classifier.parameters()], lr=2e-3)
    for epoch in range(epochs):
        model.train()
        for picks in training[torch.randperm(len(training))].split(batch):
            loss = F.cross_entropy(classifier(model(x[picks])[-1].mean((2, 3))), y[picks])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            right = classifier(model(x[test])[-1].mean((2, 3))).argmax(1) == y[test]
        print(f"epoch {epoch + 1}: test accuracy {right.float().mean():.1%}")


if __name__ == "__main__":
    typer.run(main)
