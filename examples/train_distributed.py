"""Train a DenseNet in several processes with DistributedDataParallel, on CPUs or GPUs.

torchrun starts the processes; each takes its share of every epoch's images, and their gradients are
averaged. The data are scikit-learn's handwritten digits. Run, with one process a GPU or a CPU:
torchrun --standalone --nproc-per-node 2 examples/train_distributed.py --epochs 4
"""

import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
import typer
from sklearn.datasets import load_digits
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import dense_ext


def main(epochs: int = 4, batch: int = 32) -> None:
    """Train, then print the accuracy on images held out; ``batch`` is each process's."""
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    dist.init_process_group("nccl" if gpu else "gloo")

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None].expand(-1, 3, -1, -1) / 8 - 1
    data, labels = F.interpolate(images, 16).to(device), torch.tensor(digits.target, device=device)
    training = TensorDataset(data[:1440], labels[:1440])
    sampler = DistributedSampler(training, seed=0)

    torch.manual_seed(0)
    network = dense_ext.models.densenet_bc_40_12().to(device, memory_format=torch.channels_last)
    model = DistributedDataParallel(network)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    for epoch in range(epochs):
        model.train()
        sampler.set_epoch(epoch)  # another order
        for x, y in DataLoader(training, batch, sampler=sampler, drop_last=True):
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if dist.get_rank() == 0:
            network.eval()
            with torch.no_grad():
                right = network(data[1440:]).argmax(1) == labels[1440:]
            print(f"epoch {epoch + 1}: test accuracy {right.float().mean():.1%}")

    # Equal in all processes. Gathered, Gloo's threads may hold the tensors at the end of Python, and abort.
    total = sum(p.detach().double().sum().item() for p in network.parameters())
    print(f"process {dist.get_rank()}: the parameters add up to {total!r}")
    del model  # first: as the last to hold the group, DDP's reducer can block Gloo's threads for ever
    dist.destroy_process_group()


if __name__ == "__main__":
    typer.run(main)
