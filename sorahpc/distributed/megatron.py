"""Everything taken from Megatron-Core, and the only file that imports it.

Megatron-Core 0.16 is used as a library of tensor-parallel linears, sequence-parallel mappings, data-parallel gradient
buffers, a distributed optimizer and sharded checkpoints. It asks for CUDA in a few dozen places that need none: where
there is no GPU, `_run_on_cpu` answers those, and the very same training code runs over gloo.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sorahpc.config import ModelConfig, TrainConfig
from sorahpc.distributed import gloo, muon
from sorahpc.distributed.mesh import COLLECTIVE_TIMEOUT, Mesh, init_process_group, pick_device

# ---------------------------------------------------------------------------------------------------------------------
# Megatron without CUDA


def _is_cuda(device: Any) -> bool:
    return str(device).startswith("cuda")


class _CudaIsCpu(TorchFunctionMode):
    """`device="cuda"` means the CPU, `x.cuda()` is x, and `x.type()` speaks of torch.cuda, as Megatron's checks expect.

    Costs about 1 us a torch call.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if _is_cuda(kwargs.get("device")):
            kwargs = {k: v for k, v in kwargs.items() if k != "pin_memory"} | {"device": "cpu"}
        return func(*args, **kwargs)


def _run_on_cpu() -> None:
    """Answer Megatron's CUDA calls with the CPU's. Process-wide, once, and only where there is no CUDA."""
    cuda: Any = torch.cuda
    cuda.current_device = lambda: torch.device("cpu")  # Megatron uses it as device=...
    cuda.synchronize = lambda *args, **kwargs: None
    cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(int(seed))
    cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    _CudaIsCpu().__enter__()  # stays for the life of the process: backward passes and checkpoints need it too


@functools.cache
def _core() -> Any:
    """Import megatron.core once, after what it needs is in place."""
    on_cpu = not torch.cuda.is_available()
    if on_cpu:
        _run_on_cpu()
    logging.getLogger("megatron").setLevel(logging.ERROR)  # what it lacks and which defaults it takes, a line each
    torch_module: Any = torch
    compile_ = torch.compile
    if on_cpu:  # Megatron's fused helpers compile at import (2 s) and at first use (3 to 25 s each); none is used here
        torch_module.compile = lambda f=None, **kwargs: f if f is not None else (lambda g: g)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "Transformer Engine / Apex is not installed", one warning a module
            import megatron.core
            import megatron.core.dist_checkpointing
            import megatron.core.distributed
            import megatron.core.optimizer
            import megatron.core.tensor_parallel
            import megatron.core.transformer
            from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    finally:
        torch_module.compile = compile_
    # Megatron calls collectives by names that torch 2.13 has renamed; one warning a process and name.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    _mend_torch_adam(DistributedOptimizer)
    clip_grads = megatron.core.optimizer.clip_grads
    if clip_grads.l2_norm_impl is megatron.core.utils.local_multi_tensor_l2_norm:  # neither TE nor Apex
        clip_grads.l2_norm_impl = _l2_norm
    if on_cpu:  # gloo's own wait on worker threads; both modules bind the names at import
        for module in (megatron.core.tensor_parallel.layers, megatron.core.tensor_parallel.mappings):
            module.dist_all_gather_func, module.dist_reduce_scatter_func = gloo.all_gather, gloo.reduce_scatter
    return megatron.core


def _mend_torch_adam(cls: Any) -> None:
    """Two faults of torch's AdamW under DistributedOptimizer (used where neither TE nor Apex is), 0.16.1 to 0.20.

    Sharded formats carry no 'step', so loading raises KeyError; and load_state_dict gives all parameters one step
    tensor, which AdamW then increments once a parameter: the resumed run silently diverges.
    """
    set_states, load = cls._set_main_param_and_optimizer_states, cls.load_state_dict

    def set_with_step(self: Any, model_param: Tensor, tensors: dict[str, Tensor]) -> None:
        group, order = self.model_param_group_index_map[model_param]
        step = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]].get("step")
        set_states(self, model_param, tensors if step is None else {**tensors, "step": step})

    def load_with_own_steps(self: Any, state_dict: Any) -> None:
        with torch.no_grad():
            load(self, state_dict)
        for state in self.optimizer.state.values():
            if torch.is_tensor(state.get("step")):
                state["step"] = state["step"].clone()

    cls._set_main_param_and_optimizer_states, cls.load_state_dict = set_with_step, load_with_own_steps


def _l2_norm(chunk_size: int, noop_flag: Tensor, lists: list[list[Tensor]], per_tensor: bool) -> tuple[Tensor, None]:
    """As Megatron's own, which fetches the norm of each gradient from the GPU by itself, and waits for each."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(lists[0]))).view(1), None


# ---------------------------------------------------------------------------------------------------------------------
# Mesh and layers


def start(rank: int = 0, world_size: int = 1, local_rank: int = 0, *, tp: int = 1, sp: bool = False) -> Mesh:
    """Join the process group (unless joined) and lay tp x dp over it, tp innermost; called again, lay it anew.

    Raises:
        SetupError: ranks that can't meet, or a node with fewer GPUs than ranks.
    """
    device = pick_device(local_rank)
    if not dist.is_initialized():
        init_process_group(rank, world_size, device)
    core = _core()
    core.parallel_state.destroy_model_parallel()
    core.parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=COLLECTIVE_TIMEOUT / datetime.timedelta(minutes=1),  # its own groups' too
    )
    return Mesh(
        tp_group=core.parallel_state.get_tensor_model_parallel_group(),
        dp_group=core.parallel_state.get_data_parallel_group(with_context_parallel=True),
        sp=sp and tp > 1,
        device=device,
    )


def stop() -> None:
    """Leave the mesh and the process group, if `start` got so far."""
    if dist.is_initialized():
        _core().parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def layer_config(model: ModelConfig, mesh: Mesh, dtype: torch.dtype) -> Any:
    """Megatron's TransformerConfig of our DiT: only what its linears, DDP and gradient reductions read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = _core().transformer.TransformerConfig(
            num_layers=model.depth,
            hidden_size=model.dim,
            num_attention_heads=model.num_heads,
            ffn_hidden_size=model.mlp_dim,
            tensor_model_parallel_size=mesh.tp_size,
            sequence_parallel=mesh.sp,
            params_dtype=dtype,
            bf16=dtype is torch.bfloat16,
            # Weights are drawn whole and then cut, so that they are the same for every tp size. The price is one whole
            # matrix at a time in host memory.
            use_cpu_initialization=True,
            # The per-head norms of q and k are replicated but see local heads only: Megatron sums the gradients of
            # parameters named q_layernorm / k_layernorm over tp if this is set.
            qk_layernorm=True,
            calculate_per_token_loss=True,  # our loss is already divided by the tokens of the global batch
            hidden_dropout=0.0,
            attention_dropout=0.0,
            gradient_accumulation_fusion=False,
        )
    return config


def _uniform(bound: float) -> Callable[[Tensor], Tensor]:
    return lambda weight: nn.init.uniform_(weight, -bound, bound)


def column_linear(
    config: Any, mesh: Mesh, in_dim: int, out_dim: int, *, parts: int = 1, replicated_input: bool = False
) -> nn.Module:
    """[L or L/tp, in_dim] -> [L, out_dim / tp]: weight cut by rows; under SP the tokens are gathered first.

    Args:
        parts: how many equal projections are fused in the output, head by head; each gets Xavier's bound for its own
            shape, and Muon takes each by itself.
        replicated_input: the input is whole on every rank (text) even where activations are split by tokens.
    """
    if replicated_input and config.sequence_parallel:
        config = _with_sp_off(config)
    layer = _core().tensor_parallel.ColumnParallelLinear(
        in_dim,
        out_dim,
        config=config,
        init_method=_uniform(math.sqrt(6.0 / (in_dim + out_dim // parts))),
        bias=True,
        gather_output=False,
        skip_bias_add=False,
        is_expert=False,
        tp_group=mesh.tp_group,
    )
    layer.weight.muon_parts = (parts, config.hidden_size // config.num_attention_heads if parts > 1 else 1)
    return layer


def row_linear(config: Any, mesh: Mesh, in_dim: int, out_dim: int, *, zero: bool = False) -> nn.Module:
    """[L, in_dim / tp] -> [L or L/tp, out_dim]: weight cut by columns; sums, and under SP scatters, the outputs."""
    layer = _core().tensor_parallel.RowParallelLinear(
        in_dim,
        out_dim,
        config=config,
        init_method=nn.init.zeros_ if zero else _uniform(math.sqrt(6.0 / (in_dim + out_dim))),
        bias=True,
        input_is_parallel=True,
        skip_bias_add=False,
        is_expert=False,
        tp_group=mesh.tp_group,
    )
    layer.weight.muon_parts = (1, 1)
    return layer


def _with_sp_off(config: Any) -> Any:
    import copy

    config = copy.copy(config)
    config.sequence_parallel = False
    return config


def replicated(module: nn.Module, mesh: Mesh) -> nn.Module:
    """Mark parameters that every tp rank holds and feeds with its own tokens: their gradients are SUMMED over tp.

    Without the mark the replicas drift apart silently under sequence parallelism.
    """
    for parameter in module.parameters():
        parameter.sequence_parallel = mesh.sp  # type: ignore[attr-defined]
    return module


def local_tokens(x: Tensor, mesh: Mesh) -> Tensor:
    """[L, ...] on every rank -> this rank's [L/tp, ...] under sequence parallelism, else x. No gradient flows to x."""
    return x.chunk(mesh.tp_size)[mesh.tp_rank] if mesh.sp else x


def gather_tokens(x: Tensor, mesh: Mesh) -> Tensor:
    """[L/tp, ...] -> [L, ...] on every rank, for a loss that each rank computes whole.

    Every rank holds the full gradient of the same loss, so the backward takes this rank's slice; Megatron's default
    would sum the tp copies and make all gradients tp times too large.
    """
    if not mesh.sp:
        return x
    return _core().tensor_parallel.gather_from_sequence_parallel_region(
        x, tensor_parallel_output_grad=False, group=mesh.tp_group
    )


# ---------------------------------------------------------------------------------------------------------------------
# Training


def wrap_ddp(model: nn.Module, config: Any) -> Any:
    """Gradient buffers in float32, reduced over dp when `finalize_grads` asks for it."""
    distributed = _core().distributed
    ddp_config = distributed.DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=False,
        use_distributed_optimizer=True,
        check_for_nan_in_grad=False,  # the training step checks on all ranks together
    )
    return distributed.DistributedDataParallel(config, ddp_config, model)


def make_optimizer(ddp: Any, train: TrainConfig, mesh: Mesh, dtype: torch.dtype) -> Any:
    """AdamW, or Muon for the matrices of attention and MLP and AdamW for the rest.

    Master weights and states are float32 and split over dp, also at dp = 1: one checkpoint format.
    """
    core = _core().optimizer
    optimizer = core.get_megatron_optimizer(
        core.OptimizerConfig(
            optimizer="adam",
            lr=train.lr,
            weight_decay=train.weight_decay,
            adam_beta1=train.betas[0],
            adam_beta2=train.betas[1],
            adam_eps=train.eps,
            clip_grad=train.clip_grad,
            bf16=dtype is torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=True,
        ),
        [ddp],
        use_gloo_process_groups=False,
    )
    (inner,) = _parts(optimizer)  # a dense model is one part
    if isinstance(inner.optimizer, torch.optim.AdamW):
        # Neither Transformer Engine nor Apex: torch's default goes parameter by parameter, three times as slow here.
        for group in inner.optimizer.param_groups:
            group["fused"] = True
    if train.optimizer == "muon":
        shards = {parameter: shard for parameter, *shard in main_shards(optimizer)}
        matrices = [
            muon.Matrix(tuple(p.shape), p.partition_dim, p.muon_parts, *shards.get(p, (None, 0, 0)))
            for p in ddp.module.parameters()
            if hasattr(p, "muon_parts")
        ]
        # As its authors do: half precision where it is fast. The iteration corrects its own rounding.
        compute = torch.bfloat16 if mesh.device.type == "cuda" else torch.float32
        # Muon takes the gradients of its slices away, which are no leaves; torch warns where AdamW looks for them.
        warnings.filterwarnings("ignore", message=r"The \.grad attribute of a Tensor that is not a leaf")
        inner.optimizer.register_step_pre_hook(muon.Muon(matrices, mesh, compute))
    return optimizer


def finalize_grads(ddp: Any) -> None:
    """Reduce gradients over dp and, for replicated parameters that saw local tokens or heads, over tp."""
    _core().distributed.finalize_model_grads([ddp])


def _parts(optimizer: Any) -> list[Any]:
    return getattr(optimizer, "chained_optimizers", [optimizer])


def gradient_norm(optimizer: Any) -> float:
    """Move the reduced gradients to the master weights and return their global norm, the same on every rank."""
    optimizer.prepare_grads()
    return float(optimizer.get_grad_norm())


def clip_and_step(optimizer: Any, norm: float, max_norm: float) -> None:
    """Scale the gradients to `max_norm` if above it, update the master weights, and copy them to the model."""
    if norm > max_norm:
        scale = max_norm / (norm + 1e-6)
        for inner in _parts(optimizer):
            if grads := [p.grad for p in inner.get_parameters() if p.grad is not None]:
                torch._foreach_mul_(grads, scale)
    optimizer.step_with_ready_grads()


def main_shards(optimizer: Any) -> Iterator[tuple[nn.Parameter, Tensor, int, int]]:
    """(model parameter, its float32 master slice on this rank, start, end) with start:end in the flat parameter.

    The slices of a parameter over the ranks of dp make it up, each element on one rank.
    """
    for inner in _parts(optimizer):
        for models, mains in (
            (inner.model_float16_groups, inner.shard_fp32_from_float16_groups),
            (inner.model_fp32_groups, inner.shard_fp32_groups),
        ):
            for model_group, main_group in zip(models, mains, strict=True):
                for parameter, main in zip(model_group, main_group, strict=True):
                    where = inner._get_model_param_range_map(parameter)["param"]
                    yield parameter, main, where.start, where.end


# ---------------------------------------------------------------------------------------------------------------------
# Sharded checkpoints

# The optimizer's states are written in the shape of the parameters, so that any tp x dp loads them.
_OPTIMIZER_FORMAT = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


def sharded_parameters(model: nn.Module, mesh: Mesh, prefix: str) -> dict[str, Any]:
    """Name -> Megatron ShardedTensor of each parameter, cut over tp where the parameter is."""
    from megatron.core.utils import make_sharded_tensor_for_checkpoint, make_tp_sharded_tensor_for_checkpoint

    groups = {"tp_group": mesh.tp_group, "dp_cp_group": mesh.dp_group}
    out = {}
    for name, parameter in model.named_parameters():
        key = f"{prefix}.{name}"
        if getattr(parameter, "tensor_model_parallel", False):
            axis = parameter.partition_dim  # type: ignore[attr-defined]
            out[key] = make_tp_sharded_tensor_for_checkpoint(parameter, key, tp_axis=axis, **groups)
        else:
            out[key] = make_sharded_tensor_for_checkpoint(parameter, key, **groups)
    return out


def replace_data(sharded: Any, key: str, data: Tensor) -> Any:
    """The same place in the global tensor, under another key and with other data."""
    import dataclasses

    return dataclasses.replace(sharded, key=key, data=data, dtype=data.dtype)


def optimizer_state(optimizer: Any, sharded_model: dict[str, Any], *, loading: bool) -> Any:
    """Sharded state dict of master weights and moments; with `loading`, the places to read them into."""
    if loading:
        for inner in _parts(optimizer):
            if not inner.optimizer.state:  # torch's AdamW has no moments before its first step
                inner._init_optimizer_states_with_dummy_values()
    return optimizer.sharded_state_dict(sharded_model, is_loading=loading, metadata=dict(_OPTIMIZER_FORMAT))


def save_sharded(state: dict[str, Any], folder: Path) -> None:
    """Write a sharded state dict into an existing empty folder. Collective."""
    with _quiet():
        _core().dist_checkpointing.save(state, str(folder))


def load_sharded(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Read what `state` describes, cut for this mesh, from a folder whose integrity was checked. Collective."""
    with _quiet():
        return _core().dist_checkpointing.load(state, str(folder))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
