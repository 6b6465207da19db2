"""Who holds which rows of which parameter, and how whole tensors are made of them and taken apart.

Everything is divided along its first dimension: stacks of experts between the processes of an expert group, so that a matrix stays
whole; then, under FSDP2, each tensor between the processes that would otherwise hold the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..config import ParallelConfig
from ..model import MoE, Transformer
from .pipeline import holds_embedding_twice, keep_stages
from .team import Team


@dataclass
class Piece:
    """The rows `start` to `start + len(local)` of one tensor of the whole model, as this process holds them."""

    name: str
    parameter: nn.Parameter
    """The module's own; a DTensor under FSDP2."""
    local: Tensor
    """What optimizers work on: it shares its memory with `parameter`."""
    start: int
    shape: tuple[int, ...]
    """Of the whole tensor."""
    copies: int = 1
    """Processes that hold these rows."""
    sum_over: tuple[dist.ProcessGroup, ...] = ()
    """Where gradients are still to be summed after the backward pass."""
    on_two_stages: bool = False
    """Whether a pipeline holds it on its first and on its last stage, where it need not get a gradient."""

    @property
    def is_split_matrix(self) -> bool:
        """Whether a matrix is cut through, so that it takes several processes to orthogonalise it."""
        return len(self.shape) == 2 and tuple(self.local.shape) != self.shape


class Shards:
    """The parameters of a model as this process holds them; for a process by itself, the model's own."""

    def __init__(self, pieces: list[Piece], team: Team) -> None:
        self.pieces, self.team = pieces, team
        self._by_parameter = {id(piece.parameter): piece for piece in pieces}
        self._by_name = {piece.name: piece for piece in pieces}

    @classmethod
    def whole(cls, model: nn.Module) -> Shards:
        """Of a process by itself."""
        return cls([Piece(name, p, p, 0, tuple(p.shape)) for name, p in model.named_parameters()], Team())

    def of(self, parameter: Tensor) -> Piece:
        return self._by_parameter[id(parameter)]

    def collect_gradients(self) -> None:
        """After the last backward pass of a step: sum what is not yet summed, and hand gradients to what optimizers work on."""
        if self.team.is_alone:
            for piece in self.pieces:
                if piece.local.grad is not None and piece.local.grad.is_sparse:
                    piece.local.grad = piece.local.grad.coalesce()
            return
        from torch.distributed.tensor import DTensor

        to_sum: dict[tuple[dist.ProcessGroup, ...], list[Tensor]] = {}
        for piece in self.pieces:
            grad = piece.parameter.grad
            if grad is None and piece.on_two_stages:
                grad = torch.zeros_like(piece.parameter)
            piece.local.grad = grad.to_local() if isinstance(grad, DTensor) else grad
            if piece.local.grad is not None and piece.sum_over:
                to_sum.setdefault(piece.sum_over, []).append(piece.local.grad)
        for groups, grads in to_sum.items():
            flat = torch.cat([grad.flatten() for grad in grads])
            for group in groups:
                dist.all_reduce(flat, group=group)
            parts = flat.split([grad.numel() for grad in grads])
            torch._foreach_copy_(grads, [part.view_as(grad) for part, grad in zip(parts, grads, strict=True)])

    def forget_gradients(self) -> None:
        for piece in self.pieces:
            piece.parameter.grad = piece.local.grad = None

    def gradients(self) -> list[Tensor]:
        """Of the sparse ones, the rows that they hold."""
        grads = [piece.local.grad for piece in self.pieces if piece.local.grad is not None]
        return [grad.values() if grad.is_sparse else grad for grad in grads]

    def gradient_norm(self) -> Tensor:
        """Norm of the whole model's gradient, the same on every process."""
        norms = torch.stack(torch._foreach_norm(self.gradients()))
        if self.team.is_alone:
            return torch.linalg.vector_norm(norms)
        copies = norms.new_tensor([piece.copies for piece in self.pieces if piece.local.grad is not None])
        return self.team.sum((norms.double().square() / copies).sum()).sqrt().to(norms.dtype)

    def gather(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors, by name, in the first process's main memory (elsewhere: nothing) of what every process holds of them.

        Under the names of parameters `tensors` has one row for each of `Piece.local`, of whatever shape, or scalars; under other names
        tensors that are whole already.
        All processes must call this, each with what it has.
        """
        if self.team.is_alone:
            return dict(tensors)
        mine = {name: self._place(name, tensor) for name, tensor in tensors.items() if tensor.numel()}
        everyone: list[dict[str, tuple]] = [{} for _ in range(self.team.layout.world)]
        dist.all_gather_object(everyone, mine)
        whole: dict[str, Tensor] = {}
        seen = set()
        for owner, held in enumerate(everyone):
            for name, (start, rows, shape, dtype) in held.items():
                if (name, start) in seen:
                    continue
                seen.add((name, start))
                part = tensors[name].detach().cpu().contiguous() if owner == self.team.rank else None
                if self.team.is_first:
                    if part is None:
                        part = torch.empty((rows, *shape[1:]) if shape else (), dtype=dtype)
                        dist.recv(part, src=owner)
                    target = whole.setdefault(name, torch.empty(shape, dtype=dtype))
                    (target[start : start + rows] if shape else target).copy_(part)
                elif part is not None:
                    dist.send(part, dst=0)
        return whole

    def _place(self, name: str, tensor: Tensor) -> tuple[int, int, tuple[int, ...], torch.dtype]:
        piece = self._by_name.get(name)
        if piece is None or tensor.dim() == 0:
            return 0, len(tensor) if tensor.dim() else 1, tuple(tensor.shape), tensor.dtype
        return piece.start, len(tensor), (piece.shape[0], *tensor.shape[1:]), tensor.dtype

    def take(self, name: str, whole: Tensor) -> Tensor:
        """The rows of a whole tensor that this process holds."""
        piece = self._by_name.get(name)
        return whole if piece is None or whole.dim() == 0 else whole[piece.start : piece.start + len(piece.local)]


def divide(model: Transformer, config: ParallelConfig, team: Team) -> Shards:
    """Keep of a whole model what belongs to this process; every process must start from the same weights."""
    if team.is_alone:
        return Shards.whole(model)
    from torch.distributed.tensor import DTensor  # not for a process by itself: it takes 40 MB

    layout = team.layout
    twice = holds_embedding_twice(model, layout)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    starts = dict.fromkeys(shapes, 0)
    expert_names = {f"{name}.experts.{part}" for name, moe in _mixtures(model) for part, _ in moe.experts.named_parameters()}
    if layout.expert > 1:
        for name, moe in _mixtures(model):
            for part, stack in list(moe.experts.named_parameters()):
                held = len(stack) // layout.expert
                starts[f"{name}.experts.{part}"] = team.expert_rank * held
                mine = stack.detach()[team.expert_rank * held : (team.expert_rank + 1) * held].clone()
                setattr(moe.experts, part, nn.Parameter(mine))
    else:
        expert_names = set()
    if layout.pipeline > 1:
        keep_stages(model, team)
    if config.shards_dense:
        _fully_shard(model, team)
    pieces = []
    for name, parameter in model.named_parameters():
        group = ("replica",) if name in expert_names else ("replica", "node", "local")
        size = layout.replica if name in expert_names else layout.data
        if isinstance(parameter, DTensor):
            mesh = parameter.device_mesh
            local = parameter.to_local().detach()
            start = starts[name] + min(_chunk(parameter.shape[0], mesh.size()) * mesh.get_local_rank(), parameter.shape[0])
            pieces.append(Piece(name, parameter, local, start, shapes[name]))
        else:
            sum_over = (team.group(*group),) if size > 1 else ()
            on_ends = twice and parameter is getattr(model.model.embed_tokens, "weight", None)
            if on_ends:
                assert team.ends is not None
                size, sum_over = 2 * size, (*sum_over, team.ends)
            pieces.append(Piece(name, parameter, parameter, starts[name], shapes[name], size, sum_over, on_ends))
    return Shards(pieces, team)


def _chunk(rows: int, processes: int) -> int:
    """Rows of every process but the last ones, as FSDP2 divides them."""
    return -(-rows // processes)


def _mixtures(model: Transformer) -> Iterator[tuple[str, MoE]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, MoE))


def _fully_shard(model: Transformer, team: Team) -> None:
    """FSDP2: one unit per decoder layer. What the model uses outside of its layers' calls belongs to the root, which stays gathered.

    In a pipeline layers are gathered once a step, for all micro-batches, and what lies outside of layers is not divided (`Pipeline` makes
    stages their roots).
    """
    from torch.distributed.fsdp import FSDPModule, fully_shard

    in_pipeline = team.layout.pipeline > 1
    experts: set[nn.Parameter] = set()
    if team.layout.expert > 1:
        for _, moe in _mixtures(model):
            if team.layout.replica > 1:
                fully_shard(moe.experts, mesh=team.submesh("replica"), reshard_after_forward=not in_pipeline)
            else:
                experts |= set(moe.experts.parameters())
    mesh = team.data_mesh
    mtp = set(model.mtp_modules)
    keep: dict[str, Any] = {"reshard_after_forward": False} if in_pipeline else {}
    for layer in model.model.layers:
        if isinstance(layer, nn.Identity):  # of another stage
            continue
        for unit in (layer.self_attn, layer.mlp) if layer in mtp else (layer,):
            fully_shard(unit, mesh=mesh, ignored_params=experts, **keep)
    if not in_pipeline:
        fully_shard(model, mesh=mesh, reshard_after_forward=False, ignored_params=experts)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Losses are divided by the number of processes before they are differentiated: gradients add up.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
