"""Training a DenseNet on images, alone or beside PyTorch's eager twin, resumable to the bit."""

from __future__ import annotations

import csv
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..models import MODELS
from .errors import UsageError
from .images import DataSets
from .peers import EAGER
from .results import write_atomically
from .step import TrainStep

CHECKPOINT = "checkpoint.pt"
OURS, PEER = "dense_ext", "torchvision, eager"  # the runs' names

Tick = Callable[[str], None]


class Run:
    """One network in training, with all that its next epoch depends on.

    SGD with Nesterov momentum 0.9 and weight decay 1e-4 on a cosine schedule from ``learning_rate``
    to zero over all steps. The random numbers (augmentation, dropout) are the run's own, so runs side
    by side see the same ones.

    Args:
        network: on the device, in channels_last memory.
        dtype: other than float32 by autocast.
        device: the network's.
        learning_rate: at the start.
        steps: of the whole training.
        seed: of the run's random numbers.
    """

    def __init__(
        self,
        network: nn.Module,
        dtype: torch.dtype,
        device: torch.device,
        learning_rate: float,
        steps: int,
        seed: int,
    ) -> None:
        optimizer = torch.optim.SGD(
            network.parameters(), lr=learning_rate, momentum=0.9, nesterov=True, weight_decay=1e-4
        )
        self.step = TrainStep(network, optimizer, dtype, device)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        self.history: list[dict[str, float]] = []
        with torch.random.fork_rng(devices=_gpus(device)):
            torch.manual_seed(seed)
            self.random_state = self._random_state()

    def epoch(self, training: DataLoader[Any], test: DataLoader[Any], tick: Callable[[], None]) -> None:
        """Train on every batch once, then test; appends to ``history``. ``tick`` is called before a batch."""
        start = time.perf_counter()
        with self._own_random_numbers():
            trained = self._train(training, tick)
        tested = self._test(test)
        self.history.append({
            "epoch": len(self.history) + 1,
            "training_loss": trained[0], "training_accuracy": trained[1],
            "test_loss": tested[0], "test_accuracy": tested[1],
            "seconds": time.perf_counter() - start,
        })  # fmt: skip

    def _train(self, batches: DataLoader[Any], tick: Callable[[], None]) -> tuple[float, float]:
        self.step.model.train()
        mean = _Mean(self.step.device)
        for images, labels in self._on_device(batches):
            tick()
            loss, logits = self.step(images, labels)
            self.scheduler.step()
            mean.add(loss, logits, labels)
        return mean.result()

    def _test(self, batches: DataLoader[Any]) -> tuple[float, float]:
        self.step.model.eval()
        mean = _Mean(self.step.device)
        with torch.no_grad():
            for images, labels in self._on_device(batches):
                mean.add(*self.step.loss(images, labels), labels)
        return mean.result()

    def _on_device(self, batches: DataLoader[Any]) -> Iterator[tuple[Tensor, Tensor]]:
        device = self.step.device
        for images, labels in batches:
            yield (
                images.to(device, non_blocking=True, memory_format=torch.channels_last),
                labels.to(device, non_blocking=True),
            )

    def state_dict(self) -> dict[str, Any]:
        """Everything that :meth:`load_state_dict` needs to go on as if never stopped."""
        return {
            "network": self.step.model.state_dict(),
            "optimizer": self.step.optimizer.state_dict(),
            "scaler": self.step.scaler.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "random_state": self.random_state,
            "history": self.history,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step.model.load_state_dict(state["network"])
        self.step.optimizer.load_state_dict(state["optimizer"])
        self.step.scaler.load_state_dict(state["scaler"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.random_state = [t.cpu() for t in state["random_state"]]
        self.history = state["history"]

    def _random_state(self) -> list[Tensor]:
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(i) for i in _gpus(self.step.device))]

    @contextmanager
    def _own_random_numbers(self) -> Iterator[None]:
        """Draw from where this run's last epoch stopped."""
        gpus = _gpus(self.step.device)
        with torch.random.fork_rng(devices=gpus):
            torch.set_rng_state(self.random_state[0])
            for gpu, state in zip(gpus, self.random_state[1:], strict=True):
                torch.cuda.set_rng_state(state, gpu)
            yield
            self.random_state = self._random_state()


def _gpus(device: torch.device) -> list[int]:
    return [device.index or 0] if device.type == "cuda" else []


class _Mean:
    """Mean loss and share of right answers over images, summed on the device."""

    def __init__(self, device: torch.device) -> None:
        self.loss, self.right = (torch.zeros((), dtype=torch.float64, device=device) for _ in range(2))
        self.count = 0

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        self.loss += loss.double() * len(labels)
        self.right += (logits.argmax(1) == labels).sum()
        self.count += len(labels)

    def result(self) -> tuple[float, float]:
        return float(self.loss) / self.count, float(self.right) / self.count


class Training:
    """All runs of a training, epoch by epoch.

    Args:
        settings: ``model, epochs, batch, learning_rate, seed, amp, recompute, peer``: what two
            trainings must share to be the same one.
        data: images to train and test on.
        device: where.
        backend: dense_ext's.
        workers: processes that load images; 0 loads in this one.
    """

    def __init__(
        self, settings: dict[str, Any], data: DataSets, device: torch.device, backend: str, workers: int
    ) -> None:
        self.settings, self.data, self.device, self.workers = settings, data, device, workers
        self.finished_epochs = 0
        count = len(data.training)  # type: ignore[arg-type]
        if count < 2:
            raise UsageError(f"{data.source} holds {count} images for training, expected at least 2")
        # A last batch of a single image would have no batch statistics.
        self.batch = min(settings["batch"], count)
        self.steps_per_epoch = count // self.batch
        torch.manual_seed(settings["seed"])
        model = MODELS[settings["model"]](
            num_classes=len(data.classes), recompute=settings["recompute"], backend=backend
        )
        weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self.runs = {OURS: self._run(model.to(device, memory_format=torch.channels_last))}  # type: ignore[call-overload]
        if settings["peer"]:
            self.runs[PEER] = self._run(EAGER["eager-cl"].build(model, weights, device, backend))

    def _run(self, network: nn.Module) -> Run:
        s = self.settings
        dtype = torch.float32 if s["amp"] == "none" else getattr(torch, s["amp"])
        steps = s["epochs"] * self.steps_per_epoch
        return Run(network, dtype, self.device, s["learning_rate"], steps, s["seed"])

    def ticks(self) -> int:
        """How often :meth:`run` ticks."""
        return (self.settings["epochs"] - self.finished_epochs) * len(self.runs) * self.steps_per_epoch

    def run(self, folder: Path, tick: Tick) -> None:
        """Train what is left of the epochs, with a checkpoint in ``folder`` after each."""
        epochs = self.settings["epochs"]
        test = DataLoader(self.data.test, self.batch, num_workers=self.workers)
        while self.finished_epochs < epochs:
            for name, run in self.runs.items():
                last = f", test accuracy {run.history[-1]['test_accuracy']:.2%}" if run.history else ""
                text = f"{name}, epoch {self.finished_epochs + 1} of {epochs}{last}"
                run.epoch(self._training_batches(), test, lambda text=text: tick(text))  # type: ignore[misc]
            self.finished_epochs += 1
            write_atomically(folder / CHECKPOINT, lambda path: torch.save(self._state(), path))

    def _state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {
            "settings": self.settings,
            "finished_epochs": self.finished_epochs,
            "runs": {name: run.state_dict() for name, run in self.runs.items()},
        }

    def _training_batches(self) -> DataLoader[Any]:
        """The epoch's batches, in an order that depends only on the seed and the epoch."""
        order = torch.Generator().manual_seed(self.settings["seed"] * 1_000_003 + self.finished_epochs)
        return DataLoader(
            self.data.training,
            self.batch,
            shuffle=True,
            drop_last=True,
            generator=order,
            num_workers=self.workers,
        )

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint.

        Raises:
            UsageError: it is none, or of another training.
        """
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
        except Exception as error:  # of any kind: a file can be broken in many ways
            raise UsageError(f"{path} is no checkpoint, or a broken one") from error
        if not isinstance(state, dict) or state.keys() != self._state().keys():
            raise UsageError(f"{path} is no checkpoint of dense-ext train")
        for name, value in self.settings.items():
            if (before := state["settings"].get(name)) != value:
                raise UsageError(f"{path} was trained with {name} {before}, not {value}")
        self.finished_epochs = state["finished_epochs"]
        for name, run in self.runs.items():
            run.load_state_dict(state["runs"][name])

    def histories(self) -> dict[str, Any]:
        return {name: {"history": run.history} for name, run in self.runs.items()}

    def weights(self) -> dict[str, Tensor]:
        """dense_ext's network's values; torchvision's of the same shape loads them."""
        return self.runs[OURS].step.model.state_dict()


def write_csv(path: Path, runs: dict[str, Any]) -> None:
    """A row per network and epoch."""
    rows: Sequence[dict[str, Any]] = [
        {"network": name, **epoch} for name, run in runs.items() for epoch in run["history"]
    ]
    if not rows:
        return

    def write(temporary: Path) -> None:
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)

    write_atomically(path, write)
