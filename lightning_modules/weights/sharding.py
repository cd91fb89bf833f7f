"""``trainer.strategy: fsdp2``: the denoiser's weights, gradients and moments, shared out over the processes (FSDP2).

With DDP every process holds all of them, and they are the most of what a training holds. Here it holds its part of
each weight of the denoiser, and of the reference's frozen copy. The weights of a block are gathered when it computes
and freed afterwards; gradients are added up straight into the parts. VAE, text encoders and rewards stay unsharded:
they are small, frozen, and asked by one process at a time.

Processes draw pictures and sample pools each for itself. They do so within ``gathered_weights``, which gathers the
networks once and lets them go at its end, and export within ``unsharded``; both take the room of the networks' full
weights, not that of gradients and moments.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from datetime import timedelta
from typing import Any, Protocol, runtime_checkable
from weakref import WeakKeyDictionary, WeakSet

import lightning.pytorch as pl
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy, StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from lightning_modules.errors import ConfigError
from lightning_modules.lightning_internals import shard_over_all_processes


@runtime_checkable
class Shardable(Protocol):
    """A LightningModule that knows which of its networks are large."""

    def shard(self, mesh: DeviceMesh) -> None:
        """``shard`` them over the processes of a one-dimensional mesh. Called once, on every process."""


def shard(network: nn.Module, blocks: tuple[type[nn.Module], ...], mesh: DeviceMesh) -> None:
    """Leave this process its part of every weight of the network.

    Weights are gathered in the type they have and gradients added up in theirs: autocast rounds what it rounds
    without sharding, and no more.

    Args:
        network: the one that is called; its weights are the same in all processes.
        blocks: classes of the parts whose weights are gathered and freed on their own.
        mesh: the processes, in one dimension.

    Raises:
        ConfigError: parts of it are compiled, or weights do not lie row by row.
    """
    if isinstance(network, FSDPModule):
        return
    _check_plain(network)
    _UNSHARDED[network] = _without_weights(network)
    parts = [part for part in network.modules() if isinstance(part, blocks) and part is not network]
    for part in (*reversed(parts), network):  # what lies within another one first
        # Also what is in no block: between passes a network then has its parts, and no gathered weights.
        fully_shard(part, mesh=mesh, reshard_after_forward=True)
    trains = any(parameter.requires_grad for parameter in network.parameters())
    if not trains and hasattr(network, "reset_iter_state"):  # some 50 bytes a block and pass; older torch has no way
        network.register_forward_hook(_forget_pass)


def _check_plain(network: nn.Module) -> None:
    if any(part._compiled_call_impl is not None for part in network.modules()):
        raise ConfigError(
            "trainer.strategy fsdp2: it gathers a block's weights around each call, and model.policy.compile compiles "
            "past that; set model.policy.compile to false, or use ddp"
        )
    if not all(parameter.is_contiguous() for parameter in network.parameters()):
        raise ConfigError(
            "trainer.strategy fsdp2: it shares out weights row by row, and with model.policy.channels_last they lie "
            "otherwise; set model.policy.channels_last to false, or use ddp"
        )


# Sharded network -> what it was before, without its weights: ``fully_shard`` changes classes for good.
_UNSHARDED: WeakKeyDictionary[nn.Module, nn.Module] = WeakKeyDictionary()
_GATHERED: WeakSet[nn.Module] = WeakSet()


def _without_weights(network: nn.Module) -> nn.Module:
    """A copy of the same classes and settings that takes no room."""
    return deepcopy(network, {id(value): _meta(value) for value in network.parameters()})


def _meta(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)


def _forget_pass(network: Any, args: Any, output: Any) -> None:
    """torch notes each pass until the backward that goes with it, which a network that never trains has none of."""
    if network not in _GATHERED:  # it would share out what is gathered
        network.reset_iter_state()


def own_class(module: nn.Module) -> type[nn.Module]:
    """Its class as it is written down, also while it is sharded: ``fully_shard`` puts one of its own over it."""
    return next(c for c in type(module).__mro__ if issubclass(c, nn.Module) and not issubclass(c, FSDPModule))


@contextmanager
def gathered_weights(*networks: nn.Module) -> Iterator[None]:
    """Within it sharded networks have all of their weights, in every pass.

    All processes must enter it together; how often each calls a network within it is its own affair. Weights must not
    be changed, nor asked for by ``state_dict``, see ``unsharded``. Networks that are not sharded are left alone.
    """
    entered = [network for network in networks if isinstance(network, FSDPModule) and network not in _GATHERED]
    parts = [part for network in entered for part in network.modules() if isinstance(part, FSDPModule)]
    try:
        for network in entered:
            _GATHERED.add(network)
            network.set_reshard_after_forward(False)
        for part in parts:
            part.unshard()
        yield
    finally:
        for network in entered:
            network.set_reshard_after_forward(True)
            _GATHERED.discard(network)
        for part in parts:
            part.reshard()


@contextmanager
def unsharded(owner: nn.Module) -> Iterator[None]:
    """Within it the sharded networks among a module's children are plain copies: of their own classes, complete, and
    for export alone. All processes must enter it together."""
    sharded = {name: child for name, child in owner.named_children() if isinstance(child, FSDPModule)}
    try:
        for name, network in sharded.items():
            plain = deepcopy(_UNSHARDED[network])
            weights = {key: whole_tensor(value) for key, value in network.state_dict().items()}
            plain.load_state_dict(weights, assign=True)
            setattr(owner, name, plain)
        yield
    finally:
        for name, network in sharded.items():
            setattr(owner, name, network)


def whole_tensor(value: Tensor) -> Tensor:
    """All of a tensor, gathered if it is sharded; then all processes must call it."""
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach()


@StrategyRegistry.register("fsdp2", description="The denoiser shared out over the processes")
class FullyShardedStrategy(ModelParallelStrategy):
    """Lightning's ``ModelParallelStrategy`` for data-parallel training with ``shard``; ``fsdp2`` for short.

    A checkpoint is one file of full trained weights and moments, as without sharding: a run may be resumed under
    another strategy or with another number of processes. Other jobs than fit shard nothing.

    Args:
        process_group_backend: backend of torch.distributed; None takes nccl on GPUs, gloo on CPUs.
        timeout: after which a collective call that others don't join fails.

    Raises:
        ConfigError: the training needs full weights, or trains others than those of large networks.
    """

    def __init__(
        self, process_group_backend: str | None = None, timeout: timedelta | None = default_pg_timeout
    ) -> None:
        super().__init__(
            save_distributed_checkpoint=False, process_group_backend=process_group_backend, timeout=timeout
        )

    def setup_environment(self) -> None:
        shard_over_all_processes(self)
        super().setup_environment()

    # One full checkpoint, restored before anything is sharded: as strategies do that shard nothing.

    save_checkpoint = ParallelStrategy.save_checkpoint
    load_checkpoint = ParallelStrategy.load_checkpoint
    load_model_state_dict = ParallelStrategy.load_model_state_dict
    restore_checkpoint_after_setup = False
    lightning_restore_optimizer = True

    def setup(self, trainer: pl.Trainer) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._check()
            self._shard(trainer)
        # Not ModelParallelStrategy's, which wants the sharding in configure_model, before a checkpoint is restored.
        ParallelStrategy.setup(self, trainer)

    def _check(self) -> None:
        refused = None
        if not isinstance(self.lightning_module, Shardable):
            refused = f"{type(self.lightning_module).__name__} has no large network to share out; use ddp"
        elif getattr(self.lightning_module, "ema", None) is not None:
            refused = "model.ema averages whole weights; leave it out, or use ddp"
        elif getattr(self.precision_plugin, "scaler", None) is not None:
            refused = "ModelParallelStrategy knows no 16-mixed; take bf16-mixed, or use ddp"
        if refused is not None:
            raise ConfigError(f"trainer.strategy fsdp2: {refused}")

    def _shard(self, trainer: pl.Trainer) -> None:
        module = self.lightning_module
        assert isinstance(module, Shardable)
        module.shard(self.device_mesh["data_parallel"])
        for name, parameter in module.named_parameters():
            if parameter.requires_grad and not isinstance(parameter, DTensor):
                raise ConfigError(
                    f"trainer.strategy fsdp2: it shares out the denoiser, and {name} trains too; train the denoiser "
                    "alone, or use ddp"
                )

    def optimizer_step(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().optimizer_step(optimizer, *args, **kwargs)
        except RuntimeError as error:
            if "DTensor" not in str(error) and "placement" not in str(error):
                raise
            raise ConfigError(
                f"trainer.strategy fsdp2: {type(optimizer).__name__} computes with whole weights; take "
                "torch.optim.AdamW, or use ddp"
            ) from error

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The weights under training, gathered, on the first process; all must call it."""
        assert self.lightning_module is not None
        trained = {name: value for name, value in self.lightning_module.named_parameters() if value.requires_grad}
        return self._collected(trained)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Likewise, its moments."""
        return self._collected(ParallelStrategy.optimizer_state(self, optimizer))

    def _collected(self, tree: dict[str, Any]) -> dict[str, Any]:
        def collect(value: Tensor) -> Tensor | None:
            gathered = whole_tensor(value)
            return gathered.cpu() if self.is_global_zero else None

        found = apply_to_collection(tree, Tensor, collect)
        return found if self.is_global_zero else {}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Of each moment this process's part."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"]):
            numbers = [number for group in state["param_groups"] for number in group["params"]]
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            parts = {
                number: {key: _part_like(value, parameter) for key, value in state["state"][number].items()}
                for number, parameter in zip(numbers, parameters)
                if number in state["state"]
            }
            optimizer.load_state_dict({**state, "state": parts})


def _part_like(value: Any, parameter: Tensor) -> Any:
    """Of a tensor of the parameter's shape the same part; anything else, such as a count of steps, is for all."""
    if not isinstance(parameter, DTensor) or not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
