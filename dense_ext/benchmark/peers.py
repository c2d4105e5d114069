"""What is compared: DenseNets as torchvision and timm run them, and the same network swapped.

A name says what a peer is: the library or remedy, how it is run, and ``-cl`` for channels_last memory:
``eager``, ``memory-efficient-cl``, ``timm-compile``, ``budget-cl``, ``dense_ext-block-reference-graph``.
To add a peer, add its network to :data:`_NETWORKS`, or its way to run one to :data:`MODES`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..backends import BACKENDS, unavailable_reasons
from ..models import DenseNet
from ..schedule import RECOMPUTE
from ..swap import swap
from . import engines
from .engines import ENGINES, Engine
from .errors import UnavailableError, UsageError
from .networks import checkpointed_twin, timm_twin, torchvision_twin, with_weights

# Share of the activations' memory that torch.compile may keep for backward; it recomputes the rest.
ACTIVATION_BUDGET = 0.5

# How a peer is run: as a word in its name, and in its label.
MODES = {
    "eager": "",
    "compile": "torch.compile",
    "autotune": "torch.compile max-autotune",
    "budget": f"torch.compile, activation budget {ACTIVATION_BUDGET}",
    "graph": "CUDA graph",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "aotinductor": "AOTInductor, frozen weights",
}
COMPILED = ("compile", "autotune", "budget")


@dataclass(frozen=True)
class Network:
    """A network of a shape, as a library or a remedy has it."""

    label: str
    twin: Callable[[DenseNet], nn.Module]  # makes it, on the meta device, of one of dense_ext's shape
    modes: tuple[str, ...] = ("eager",)  # in which it can be run, keys of MODES
    forward: str | None = None  # another network whose forward without gradients is the same
    recompute: str | None = None  # dense_ext's policy, None for the others
    backend: str | None = None  # dense_ext's; None for the one the run is made with


@dataclass(frozen=True)
class Peer:
    """One way to run a network."""

    name: str  # as on the command line and in result files
    label: str  # for tables and figures
    source: str  # the network's name: this one's without mode and memory format
    network: Network
    mode: str  # a key of MODES; "graph" is the whole step as one CUDA graph
    channels_last: bool  # memory format of weights and images

    @property
    def ours(self) -> bool:
        return self.network.recompute is not None

    def check(self, device: torch.device, dtype: torch.dtype) -> None:
        """Raise UnavailableError if the peer cannot run here, with the reason."""
        if self.mode == "graph" and device.type != "cuda":
            raise UnavailableError("CUDA graphs need a GPU")
        if self.mode in ENGINES:
            engines.check(self.mode, device, dtype)
        backend = self.network.backend
        if backend is not None and (reason := unavailable_reasons(device, dtype)[backend]):
            raise UnavailableError(reason)

    def build(
        self, network: nn.Module, device: torch.device, backend: str = "auto", training: bool = True
    ) -> nn.Module:
        """A network as this peer runs it, float32 on ``device``: swapped, in its memory format, compiled.

        Of one of the family that is its twin with the same weights, of any other the network itself.

        Raises:
            UnavailableError: its library is not installed, or the peer does not train.
        """
        if isinstance(network, DenseNet):
            network = with_weights(self.network.twin(network), network.state_dict(), device)
        else:
            network = network.to(device)
        if recompute := self.network.recompute:
            swap(network, recompute=recompute, backend=self.network.backend or backend, strict=True)
        memory_format = self.memory_format(max(p.dim() for p in network.parameters()))
        network = network.to(memory_format=memory_format).train(training)  # type: ignore[call-overload]
        if self.mode in ENGINES:
            if training:
                raise UnavailableError(f"{MODES[self.mode]} is for inference")
            return Engine(self.mode, network)
        if self.mode in COMPILED:
            return torch.compile(network, **_compiler(self.mode))  # type: ignore[return-value]
        return network

    def memory_format(self, dimensions: int) -> torch.memory_format:
        """Of the images or the convolutions' weights, of 4 dimensions or for volumes 5."""
        if not self.channels_last:
            return torch.contiguous_format
        return torch.channels_last if dimensions == 4 else torch.channels_last_3d

    def images(self, batch: Tensor) -> Tensor:
        """The batch in this peer's memory format."""
        return batch.contiguous(memory_format=self.memory_format(batch.dim()))


def _compiler(mode: str) -> dict[str, Any]:
    """What torch.compile is told. Shapes do not change within a run; a graph for all would be slower."""
    options: dict[str, Any] = {"dynamic": False}
    if mode == "autotune":
        from torch._inductor import list_mode_options

        # The mode's own options, and none of its printing over the progress bar.
        quiet = {"autotune_num_choices_displayed": 0, "max_autotune_report_choices_stats": False}
        options["options"] = list_mode_options("max-autotune") | quiet
    if mode == "budget":
        options["backend"] = _compile_within_budget
    return options


def _compile_within_budget(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
    """Inductor under the activation memory budget.

    A backend of its own: torch.compile would otherwise run what it compiled without the budget.
    """
    import torch._functorch.config
    from torch._inductor.compile_fx import compile_fx

    with torch._functorch.config.patch(activation_memory_budget=ACTIVATION_BUDGET):
        return compile_fx(graph, list(inputs))


def _as_peers(source: str, network: Network) -> Iterator[Peer]:
    """A network in each of its modes and both memory formats.

    Engines have a format of their own, and dense_ext's networks are in channels_last.
    """
    ours = network.recompute is not None
    for mode, channels_last in itertools.product(network.modes, (False, True)):
        if channels_last != ours and (ours or mode in ENGINES):
            continue
        words = [(source, network.label)] if source != "eager" or mode == "eager" else []
        words += [(mode, MODES[mode])] if mode != "eager" else []
        words += [("cl", "channels_last")] if channels_last and not ours else []
        name, label = "-".join(word for word, _ in words), ", ".join(said for _, said in words)
        yield Peer(name, label, source, network, mode, channels_last)


_PLAIN_OR_COMPILED = ("eager", "compile", "autotune")
_efficient = partial(torchvision_twin, memory_efficient=True)
_NETWORKS = {
    "eager": Network("eager", torchvision_twin, tuple(MODES)),
    "memory-efficient": Network("memory_efficient", _efficient, _PLAIN_OR_COMPILED, "eager"),
    "timm": Network("timm", lambda model: timm_twin(model), _PLAIN_OR_COMPILED),
    "timm-memory-efficient": Network(
        "timm, memory_efficient", lambda model: timm_twin(model, memory_efficient=True), forward="timm"
    ),
    "checkpoint": Network("checkpointed blocks", checkpointed_twin, forward="eager"),
}
_OURS = {
    "-".join(filter(None, ("dense_ext", policy, backend))): Network(
        ", ".join(filter(None, (f"dense_ext, recompute {policy}", backend))), torchvision_twin,
        ("eager", "graph", "aotinductor"), "dense_ext", policy, backend,
    )
    for policy, backend in itertools.product(RECOMPUTE, (None, *BACKENDS))
}  # fmt: skip
PEERS = {peer.name: peer for of in (_NETWORKS | _OURS).items() for peer in _as_peers(*of)}
OTHERS = {name: peer for name, peer in PEERS.items() if not peer.ours}

# The small set: what torchvision offers as it comes.
EAGER = {name: PEERS[name] for name in ("eager", "eager-cl", "memory-efficient", "memory-efficient-cl")}
OURS = {policy: PEERS[f"dense_ext-{policy}"] for policy in RECOMPUTE}
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
    chosen = list(PEERS) if ALL in names else list(names)
    if all(PEERS[name].ours for name in chosen):
        raise UsageError(f"peers must name at least one of {', '.join(OTHERS)}")
    chosen += [OURS[policy].name for policy in policies]
    return sorted((PEERS[name] for name in dict.fromkeys(chosen)), key=lambda peer: peer.ours)


def for_inference(peers: Sequence[Peer]) -> list[Peer]:
    """The first of those that differ only in what they keep for backward, each time."""
    found: dict[tuple[object, ...], Peer] = {}
    for peer in peers:
        network, mode = peer.network, "compile" if peer.mode == "budget" else peer.mode
        kept = replace(peer, label=peer.label.replace(f", recompute {network.recompute}", ""))
        same = network.forward or peer.source, mode, peer.channels_last, network.backend
        found.setdefault(same, kept)
    return list(found.values())
