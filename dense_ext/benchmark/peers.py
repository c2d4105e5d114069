"""What is compared: DenseNets as torchvision and timm run them, and the same network swapped.

A name says what a peer is: the library or remedy, how it is run, and ``-cl`` for channels_last memory:
``eager``, ``memory-efficient-cl``, ``timm-compile``, ``budget-cl``, ``dense_ext-block-reference-graph``.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch._functorch.config
import torch._inductor
from torch import Tensor, nn

from ..backends import BACKENDS, unavailable_reasons
from ..models import DenseNet
from ..schedule import RECOMPUTE
from ..swap import swap
from .errors import UnavailableError, UsageError
from .networks import checkpoint_blocks, timm_twin, torchvision_twin, with_weights

# Share of the activations' memory that torch.compile may keep for backward; it recomputes the rest.
ACTIVATION_BUDGET = 0.5

# How a peer is run: as a word in its name, and in its label.
_MODES = {
    "eager": "",
    "compile": "torch.compile",
    "autotune": "torch.compile max-autotune",
    "budget": f"torch.compile, activation budget {ACTIVATION_BUDGET}",
    "graph": "CUDA graph",
}
_SOURCES = {"eager": "eager", "memory-efficient": "memory_efficient", "checkpoint": "checkpointed blocks",
            "timm": "timm"}  # fmt: skip


def _compile_within_budget(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
    """Inductor under the activation memory budget.

    A backend of its own: torch.compile would otherwise run what it compiled without the budget.
    """
    from torch._inductor.compile_fx import compile_fx

    with torch._functorch.config.patch(activation_memory_budget=ACTIVATION_BUDGET):
        return compile_fx(graph, list(inputs))


# Shapes do not change within a run; a graph for any shape would be a slower one.
_COMPILERS: dict[str, dict[str, Any]] = {
    "compile": {"dynamic": False},
    # The mode's own options, and none of its printing over the progress bar.
    "autotune": {
        "dynamic": False,
        "options": {
            **torch._inductor.list_mode_options("max-autotune"),
            "autotune_num_choices_displayed": 0,
            "max_autotune_report_choices_stats": False,
        },
    },
    "budget": {"dynamic": False, "backend": _compile_within_budget},
}


@dataclass(frozen=True)
class Peer:
    """One way to run the network.

    Args:
        name: short, as on the command line and in result files.
        label: for tables and plots.
        channels_last: memory format of weights and images.
        source: "eager" for torchvision's network as it comes, "memory-efficient" for its checkpointing
            of concatenation, norm and 1x1 convolution, "checkpoint" for torch.utils.checkpoint around
            each block, "timm" for timm's network.
        mode: "eager", "compile", "autotune", "budget" (torch.compile as it comes, with max-autotune,
            with an activation memory budget) or "graph" (the whole step as one CUDA graph).
        recompute: dense_ext's policy, None for the others.
        backend: dense_ext's; None for the one the run is made with.
    """

    name: str
    label: str
    channels_last: bool
    source: str = "eager"
    mode: str = "eager"
    recompute: str | None = None
    backend: str | None = None

    @property
    def ours(self) -> bool:
        return self.recompute is not None

    def as_json(self) -> dict[str, Any]:
        """What a result file says of the peer."""
        return {"label": self.label, "ours": self.ours, "mode": self.mode}

    @property
    def memory_efficient(self) -> bool:
        return self.source == "memory-efficient"

    @property
    def graphed(self) -> bool:
        return self.mode == "graph"

    def check(self, device: torch.device, dtype: torch.dtype) -> None:
        """Raise UnavailableError if the peer cannot run here, with the reason."""
        if self.graphed and device.type != "cuda":
            raise UnavailableError("CUDA graphs need a GPU")
        if self.backend is not None and (reason := unavailable_reasons(device, dtype)[self.backend]):
            raise UnavailableError(reason)

    def build(
        self,
        model: DenseNet,
        weights: Mapping[str, Tensor],
        device: torch.device,
        backend: str,
        training: bool = True,
    ) -> nn.Module:
        """The network with ``weights``, float32, on ``device``; in training mode unless told otherwise.

        Raises:
            UnavailableError: its library is not installed.
        """
        network = with_weights(self._twin(model), weights, device)
        if self.recompute is not None:
            swap(network, recompute=self.recompute, backend=self.backend or backend, strict=True)
        if self.source == "checkpoint":
            checkpoint_blocks(network)
        network = network.to(memory_format=self.memory_format).train(training)  # type: ignore[call-overload]
        if self.mode in _COMPILERS:
            return torch.compile(network, **_COMPILERS[self.mode])  # type: ignore[return-value]
        return network

    def _twin(self, model: DenseNet) -> nn.Module:
        return timm_twin(model) if self.source == "timm" else torchvision_twin(model, self.memory_efficient)

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def images(self, batch: Tensor) -> Tensor:
        """The batch in this peer's memory format."""
        return batch.contiguous(memory_format=self.memory_format)


def _other(source: str, mode: str, channels_last: bool) -> Peer:
    kept = source if source != "eager" or mode == "eager" else ""
    words = [kept, mode if mode != "eager" else "", "cl" if channels_last else ""]
    label = [_SOURCES[source] if kept else "", _MODES[mode], "channels_last" if channels_last else ""]
    return Peer("-".join(filter(None, words)), ", ".join(filter(None, label)), channels_last, source, mode)


def _ours(policy: str, backend: str | None, mode: str) -> Peer:
    words = ["dense_ext", policy, backend, mode if mode != "eager" else None]
    label = [f"dense_ext, recompute {policy}", backend, _MODES[mode]]
    name, label_text = "-".join(filter(None, words)), ", ".join(filter(None, label))
    return Peer(name, label_text, channels_last=True, mode=mode, recompute=policy, backend=backend)


def _named(peers: Sequence[Peer]) -> dict[str, Peer]:
    return {peer.name: peer for peer in peers}


_KINDS = [
    *itertools.product(("eager", "memory-efficient", "timm"), ("eager", "compile", "autotune")),
    ("checkpoint", "eager"), ("eager", "budget"), ("eager", "graph"),
]  # fmt: skip
OTHERS = _named([_other(*kind, channels_last) for kind in _KINDS for channels_last in (False, True)])
EAGER = {
    name: OTHERS[name] for name in ("eager", "eager-cl", "memory-efficient", "memory-efficient-cl")
}  # the small set: what torchvision offers as it comes
OURS = {policy: _ours(policy, None, "eager") for policy in RECOMPUTE}
PEERS = {
    **OTHERS,
    **_named([
        _ours(*kind) for kind in itertools.product(RECOMPUTE, (None, *BACKENDS), ("eager", "graph"))
    ]),
}  # fmt: skip
ALL = "all"


def choose(names: Sequence[str], policies: Sequence[str]) -> list[Peer]:
    """The peers by name ("all" for every one), then dense_ext by recompute policy.

    Raises:
        UsageError: an unknown or repeated name, or no peer to compare with.
    """
    for what, given, known in (("peers", names, (*PEERS, ALL)), ("recompute", policies, RECOMPUTE)):
        for name in given:
            if name not in known:
                raise UsageError(f"{what} must be among {', '.join(known)}; got {name!r}")
        if len(set(given)) < len(given):
            raise UsageError(f"{what} names one twice: {', '.join(given)}")
    chosen = _named([*PEERS.values()] if ALL in names else [PEERS[name] for name in names])
    if all(peer.ours for peer in chosen.values()):
        raise UsageError(f"peers must name at least one of {', '.join(OTHERS)}")
    chosen |= _named([OURS[policy] for policy in policies])
    return sorted(chosen.values(), key=lambda peer: peer.ours)


def for_inference(peers: Sequence[Peer]) -> list[Peer]:
    """The first of those that differ only in what they keep for backward, each time."""
    found: dict[tuple[object, ...], Peer] = {}
    for peer in peers:
        source = "timm" if peer.source == "timm" else "eager"
        mode = "compile" if peer.mode == "budget" else peer.mode
        kept = replace(peer, label=peer.label.replace(f", recompute {peer.recompute}", ""))
        found.setdefault((peer.ours, source, mode, peer.channels_last, peer.backend), kept)
    return list(found.values())
