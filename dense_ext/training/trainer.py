"""Training a DenseNet on images with Lightning, alone or beside PyTorch's eager twin."""

from __future__ import annotations

import logging
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from ..benchmark.errors import UsageError
from ..benchmark.peers import EAGER
from ..benchmark.results import Measurement, PeerLabel, Results
from ..models import MODELS
from .images import DataSets

CHECKPOINT, PEER_CHECKPOINT = "checkpoint.ckpt", "peer.ckpt"
OURS, PEER = "dense_ext", "torchvision, eager"  # the runs' names

# Warnings of Lightning that hold for every training here and call for nothing.
_EXPECTED = ("Checkpoint directory .* exists", ".*does not have many workers", ".*treespec, LeafSpec")
for _name in ("lightning.pytorch", "lightning.fabric"):
    logging.getLogger(_name).setLevel(logging.WARNING)


class _SeededByEpoch(DataLoader[Any]):
    """Draws the augmentation of an epoch alike, whether the training has just begun or was resumed."""

    def __iter__(self) -> Any:
        sampler: Any = self.sampler
        torch.manual_seed(hash((sampler.seed, sampler.epoch, sampler.rank)))
        return super().__iter__()


class Classifier(LightningModule):
    """A network with its images: cross entropy, SGD with Nesterov momentum 0.9 and weight decay 1e-4.

    The learning rate falls from ``settings["learning_rate"]`` to zero on a cosine schedule over all steps.
    Each process trains on its own share of the images; of its last batch for training, one that is
    smaller is left out: a single image has no batch statistics. Where the test images do not divide by
    the number of processes, some are tested twice.

    Args:
        network: in channels_last memory.
        settings: of the training, kept in its checkpoints.
        data: images to train and test on.
        batch: images a step in each process.
        workers: processes that load images.
    """

    def __init__(
        self, network: nn.Module, settings: dict[str, Any], data: DataSets, batch: int, workers: int
    ) -> None:
        super().__init__()
        self.network, self.data, self.batch, self.workers = network, data, batch, workers
        self.history: list[dict[str, float]] = []
        self.save_hyperparameters(settings)

    def train_dataloader(self) -> DataLoader[Any]:
        images, seed = self.data.training, self.hparams["seed"]
        order: DistributedSampler[Any] = DistributedSampler(
            images, self.trainer.world_size, self.global_rank, seed=seed
        )
        # Lightning sets the later epochs, but not the one that a resumed training begins with.
        order.set_epoch(len(self.history))
        return _SeededByEpoch(images, self.batch, sampler=order, drop_last=True, num_workers=self.workers)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.data.test, self.batch, num_workers=self.workers)

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        return self._loss("training", *batch)

    def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        self._loss("test", *batch)

    def _loss(self, part: str, images: Tensor, labels: Tensor) -> Tensor:
        logits = self.network(images.contiguous(memory_format=torch.channels_last))
        loss = F.cross_entropy(logits, labels)
        values = {f"{part}_loss": loss, f"{part}_accuracy": (logits.argmax(1) == labels).float().mean()}
        self.log_dict(
            values, on_step=False, on_epoch=True, prog_bar=True, sync_dist=True, batch_size=len(labels)
        )
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(
            self.parameters(),
            lr=self.hparams["learning_rate"],
            momentum=0.9,
            nesterov=True,
            weight_decay=1e-4,
        )
        steps = int(self.trainer.estimated_stepping_batches)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cosine, "interval": "step"}}

    def on_train_epoch_start(self) -> None:
        self._start = time.perf_counter()

    def on_train_epoch_end(self) -> None:
        names = ("training_loss", "training_accuracy", "test_loss", "test_accuracy")
        means = {name: float(self.trainer.callback_metrics[name]) for name in names}
        seconds = time.perf_counter() - self._start
        self.history.append({"epoch": self.current_epoch + 1, **means, "seconds": seconds})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["history"] = self.history

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.history = checkpoint["history"]


class Training:
    """A training of dense_ext's network and, with ``settings["peer"]``, then one of its eager twin.

    Args:
        settings: ``model, epochs, batch, learning_rate, seed, precision, recompute, peer``: what two
            trainings must share to be the same one. ``batch`` counts the images of all processes.
        data: images to train and test on.
        backend: dense_ext's.
        workers: processes that load images, beside each process that trains; 0 for none.
        folder: for checkpoints and logs.
        trainer: Lightning's ``accelerator, devices, num_nodes, strategy``.

    Raises:
        UsageError: Lightning refuses these options, or the images or the batch are too small for them.
    """

    def __init__(
        self,
        settings: dict[str, Any],
        data: DataSets,
        backend: str,
        workers: int,
        folder: Path,
        **trainer: Any,
    ) -> None:
        self.settings, self.data = settings, data
        self._checkpoints = {OURS: folder / CHECKPOINT, PEER: folder / PEER_CHECKPOINT}
        self._trainers = {name: self._trainer(name, trainer) for name in (OURS, PEER)[: 1 + settings["peer"]]}
        count, processes = len(data.training), self._trainers[OURS].world_size  # type: ignore[arg-type]
        if count < 2:
            raise UsageError(f"{data.source} holds {count} images for training, expected at least 2")
        batch = min(settings["batch"], count) // processes
        if batch < 1:
            raise UsageError(f"{settings['batch']} images a step are too few for {processes} processes")
        torch.manual_seed(settings["seed"])
        model = MODELS[settings["model"]](
            num_classes=len(data.classes), recompute=settings["recompute"], backend=backend
        )
        networks = {OURS: model.to(memory_format=torch.channels_last)}  # type: ignore[call-overload]
        if settings["peer"]:
            networks[PEER] = EAGER["eager-cl"].build(model, torch.device("cpu"))
        self._modules = {
            name: Classifier(network, settings, data, batch, workers) for name, network in networks.items()
        }

    def _trainer(self, name: str, options: dict[str, Any]) -> Trainer:
        path = self._checkpoints[name]
        callbacks: list[Callback] = [
            ModelCheckpoint(
                path.parent, path.stem, save_on_train_epoch_end=True, enable_version_counter=False
            )
        ]
        if sys.stderr.isatty():
            callbacks.append(RichProgressBar(console_kwargs={"stderr": True}))
        try:
            return Trainer(
                **options,
                max_epochs=self.settings["epochs"],
                precision=self.settings["precision"],
                callbacks=callbacks,
                logger=CSVLogger(path.parent / "logs", name.partition(",")[0]),
                enable_progress_bar=len(callbacks) > 1,
                enable_model_summary=False,
                num_sanity_val_steps=0,
                log_every_n_steps=1,
            )
        except (MisconfigurationException, ValueError) as error:
            raise UsageError(str(error).strip()) from error

    @property
    def main_process(self) -> bool:
        """Whether this process is the one, of those that train, that reports."""
        return self._trainers[OURS].is_global_zero

    def check_resumable(self) -> None:
        """Raise UsageError unless each checkpoint that is there is one of this training."""
        for path in filter(Path.exists, self._checkpoints.values()):
            try:
                before = torch.load(path, map_location="cpu", weights_only=True)
            except Exception as error:  # of any kind: a file can be broken in many ways
                raise UsageError(f"{path} is no checkpoint, or a broken one") from error
            if not isinstance(before, dict) or not {"hyper_parameters", "history"} <= before.keys():
                raise UsageError(f"{path} is no checkpoint of dense-ext train")
            for name, value in self.settings.items():
                if (old := before["hyper_parameters"].get(name)) != value:
                    raise UsageError(f"{path} was trained with {name} {old}, not {value}")

    def run(self) -> bool:
        """Train what is left of the epochs, with a checkpoint after each; False if Ctrl-C ended it."""
        for name, trainer in self._trainers.items():
            path = self._checkpoints[name]
            try:
                with warnings.catch_warnings():
                    for message in _EXPECTED:
                        warnings.filterwarnings("ignore", message)
                    trainer.fit(self._modules[name], ckpt_path=path if path.exists() else None)
            except SystemExit:  # how Lightning ends at Ctrl-C, which it then ignores
                if not trainer.interrupted:
                    raise
                signal.signal(signal.SIGINT, signal.default_int_handler)
                return False
        return True

    def fill(self, results: Results) -> None:
        """Give the results a row of each network and epoch that it was trained for."""
        for name, module in self._modules.items():
            results.peers[name] = PeerLabel(name, ours=name == OURS)
            for epoch in module.history:
                measures = {of: value for of, value in epoch.items() if of not in ("epoch", "seconds")}
                case, seconds = {"epoch": int(epoch["epoch"])}, [epoch["seconds"]]
                results.rows.append(Measurement(case, name, measures=measures, seconds=seconds))

    def weights(self) -> dict[str, Tensor]:
        """dense_ext's network's values after its last epoch; torchvision's of the same shape loads them."""
        state = torch.load(self._checkpoints[OURS], map_location="cpu", weights_only=True)["state_dict"]
        return {name.removeprefix("network."): value for name, value in state.items()}
