"""Options of `shoal bench efficiency` and `shoal bench ablation`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .errors import require_at_least_one

Scale = Literal["small", "medium", "gpu"]
StudyName = Literal["experts", "attention", "anchored", "granularity", "balance"]


@dataclass
class BenchEfficiencyCommand:
    """The compute that equal loss costs a Llama-style dense baseline and Shoal's recipes.

    The baseline runs twice: as Llamas are trained, and with the sampled softmax that the recipes have (`sampled`), so that a ratio can
    be read without it. Every run trains on the same tokens with a complete schedule of its own and is scored on the same held-out text.
    The ratio of FLOPs and of seconds is taken at equal bits per byte, interpolated between the budgets of each side, and never beyond
    them.
    """

    data: tuple[str, ...] = ()
    """Files or folders as for `shoal train`. Without: the Python standard library's source on this machine."""
    scale: Scale = "small"
    """Budgets: small up to 1e13 FLOPs (half an hour to an hour on one core), medium up to 1e15, gpu from 1e16 on."""
    seeds: int | None = None
    """Runs of every budget; the interval is over seeds. None: 3, with --quick 1."""
    quick: bool = False
    """Budgets of 3%: whether all works, in a few minutes."""
    search: bool = False
    """Tune width, depth, batch and learning rate of every side by the same steps around its rule, and print what was found."""
    out: str = "runs/efficiency"
    """Folder of results and picture. Runs of the same code that it holds already are not repeated."""
    threads: int = 1
    """CPU threads of a run; so small models gain little from more."""
    json: bool = False
    """A benchmark always ends with its JSON object; accepted for the sake of scripts."""

    def validate(self) -> None:
        """Raise `UserError` on the first option that cannot work."""
        require_at_least_one(self, "seeds", "threads")


@dataclass
class BenchAblationCommand:
    """What one ingredient is worth: small models of one shape whose arms differ in one thing, up to 4e13 FLOPs.

    experts: a mixture against a dense layer of as many active parameters. attention: MLA against multi-head attention; anchored: the same
    two, as models of the rules begin, and MLA that begins copying. granularity: few wide experts against many narrow ones. balance: the
    routing bias against a balance loss, and against neither. Every run has a complete schedule of its own; the ratio of FLOPs and of
    seconds is taken at equal bits per byte, as in `shoal bench efficiency`.
    """

    study: StudyName = "experts"
    """What is compared: experts with dense layers, MLA with multi-head attention (attention; begun alike: anchored), fine experts with
    coarse ones, or ways to balance experts."""
    data: tuple[str, ...] = ()
    """Files or folders as for `shoal train`. Without: the Python standard library's source on this machine."""
    seeds: int | None = None
    """Runs of every budget; the interval is over seeds. None: 3, with --quick 1."""
    quick: bool = False
    """Budgets of 1%: whether all works, in a minute."""
    out: str = "runs/ablation"
    """Folder of results and pictures. Runs of the same code that it holds already are not repeated; studies share those of equal arms."""
    threads: int = 1
    """CPU threads of a run; so small models gain little from more."""
    json: bool = False
    """A benchmark always ends with its JSON object; accepted for the sake of scripts."""

    def validate(self) -> None:
        """Raise `UserError` on the first option that cannot work."""
        require_at_least_one(self, "seeds", "threads")
