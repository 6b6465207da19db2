"""Matrices whose rows lie on several processes, for an optimizer that needs them whole (Muon).

Each matrix is put together on one process, as much work on each: a process sends and receives about as many values as it holds, twice,
and no matrix is orthogonalised more than once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

Work = Callable[[list[Tensor], list[int]], list[Tensor]]
"""From the matrices that this process owns, and their numbers among all of them, to as many of the same shapes."""


class SplitMatrices:
    """Exchanges rows of matrices between the processes of `group`, which hold equal runs of rows, the last ones fewer or none."""

    def __init__(self, group: dist.ProcessGroup, shapes: dict[int, tuple[int, ...]]) -> None:
        """`shapes` holds the whole shape of every local part of a matrix by its `id`."""
        self.group, self.shapes = group, shapes
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)

    def shape(self, part: Tensor) -> tuple[int, ...] | None:
        """Shape of the whole matrix that `part` is cut from; None where it is whole."""
        return self.shapes.get(id(part))

    def rows(self, total: int, process: int) -> int:
        chunk = -(-total // self.size)
        return max(0, min(chunk, total - chunk * process))

    def owners(self, shapes: list[tuple[int, ...]]) -> list[int]:
        """The process that puts each matrix together, by work (m n min(m, n)), the largest first."""
        load = [0] * self.size
        owners = [0] * len(shapes)
        for i in sorted(range(len(shapes)), key=lambda i: (-shapes[i][0] * shapes[i][1] * min(shapes[i]), i)):
            owners[i] = min(range(self.size), key=load.__getitem__)
            load[owners[i]] += shapes[i][0] * shapes[i][1] * min(shapes[i])
        return owners

    def apply(self, parts: list[Tensor], shapes: list[tuple[int, ...]], work: Work) -> list[Tensor]:
        """The same rows of what `work` makes of the matrices of `shapes` as `parts` are of them."""
        owners = self.owners(shapes)
        order = sorted(range(len(parts)), key=lambda i: owners[i])  # as values leave
        mine = [i for i in order if owners[i] == self.rank]
        leaving = [sum(parts[i].numel() for i in order if owners[i] == process) for process in range(self.size)]
        # What arrives from a process: its rows of all my matrices.
        counts = [[self.rows(shapes[i][0], process) * shapes[i][1] for i in mine] for process in range(self.size)]
        flat = torch.cat([parts[i].flatten() for i in order])
        arrived = flat.new_empty(sum(map(sum, counts)))
        dist.all_to_all_single(arrived, flat, [sum(c) for c in counts], leaving, group=self.group)
        runs = [run.split(count) for run, count in zip(arrived.split([sum(c) for c in counts]), counts, strict=True)]
        matrices = [torch.cat([runs[p][k] for p in range(self.size)]).view(shapes[i]) for k, i in enumerate(mine)]
        done = work(matrices, mine) if mine else []
        pieces = [m.flatten().split([counts[p][k] for p in range(self.size)]) for k, m in enumerate(done)]
        back = torch.cat([pieces[k][p] for p in range(self.size) for k in range(len(mine))]) if mine else flat.new_empty(0)
        home = torch.empty_like(flat)
        dist.all_to_all_single(home, back.contiguous(), leaving, [sum(c) for c in counts], group=self.group)
        results: list[Tensor] = [flat] * len(parts)
        for i, part in zip(order, home.split([parts[i].numel() for i in order]), strict=True):
            results[i] = part.view(parts[i].shape)
        return results
