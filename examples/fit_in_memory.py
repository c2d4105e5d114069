"""Ask whether a training step fits into memory, and let swap choose what to recompute.

Nothing runs until the plan is made. The defaults plan for a small budget, so that one step also runs on a
laptop's CPU. Run: python examples/fit_in_memory.py --batch 32 --memory 300MB
"""

import torch
import torch.nn.functional as F
import torchvision
import typer

import dense_ext
from dense_ext.memory import Planner


def main(batch: int = 32, size: int = 112, memory: str = "300MB", step: bool = True) -> None:
    """Print what each policy needs, choose one block by block, and run a step with it."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = torchvision.models.densenet121(weights=None).to(device, memory_format=torch.channels_last)

    planner = Planner(model, (3, size, size), optimizer="adamw")
    for policy in ("none", "bottleneck", "block"):
        peak, largest = planner.estimate(batch, policy).peak, planner.largest_batch(memory, policy)
        print(f"recompute {policy}: {peak / 1e6:.0f} MB for {batch} images; {largest} fit into {memory}")

    # Raises a ValueError that names the largest batch, if nothing fits.
    dense_ext.swap(model, recompute="auto", input_shape=(batch, 3, size, size), memory=memory)
    chosen = [row.recompute for row in dense_ext.report(model).rows if row.kind == "dense block"]
    print(f"chosen, block by block: {', '.join(chosen)}")
    print(f"planned peak: {planner.estimate(batch, chosen).peak / 1e6:.0f} MB")

    if step:
        optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
        images = torch.randn(batch, 3, size, size, device=device).contiguous(
            memory_format=torch.channels_last
        )
        loss = F.cross_entropy(model(images), torch.zeros(batch, dtype=torch.long, device=device))
        loss.backward()
        optimizer.step()
        print(f"one step: loss {loss.item():.2f}")
        if device == "cuda":
            print(f"measured peak: {torch.cuda.max_memory_allocated() / 1e6:.0f} MB")


if __name__ == "__main__":
    typer.run(main)
