"""A callback that writes down how many numbers its process holds, of how many there are."""

import json
from pathlib import Path

from lightning.pytorch import Callback
from torch.distributed.tensor import DTensor


def held(tensors):
    """Numbers in this process, numbers in all, and how many of the tensors are sharded."""
    tensors = [tensor for tensor in tensors if tensor.dim()]
    here = sum((tensor.to_local() if isinstance(tensor, DTensor) else tensor).numel() for tensor in tensors)
    shared = sum(isinstance(tensor, DTensor) for tensor in tensors)
    return {"here": here, "all": sum(tensor.numel() for tensor in tensors), "tensors": len(tensors), "shared": shared}


class Held(Callback):
    """``held-0.json`` of rank 0, and so on: of the denoisers' weights, gradients and moments."""

    gradients = None

    def on_before_optimizer_step(self, trainer, module, optimizer):
        found = [p.grad for network in module.denoisers() for p in network.parameters() if p.grad is not None]
        self.gradients = held(found)

    def on_train_end(self, trainer, module):
        found = {f"weights {n}": held(network.parameters()) for n, network in enumerate(module.denoisers())}
        found["gradients"] = self.gradients
        found["moments"] = held([value for state in trainer.optimizers[0].state.values() for value in state.values()])
        (Path(trainer.default_root_dir) / f"held-{trainer.global_rank}.json").write_text(json.dumps(found))
