"""The rows of a run as TensorBoard events. Needs the `tensorboard` package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..config import UserError


class TensorBoardLog:
    """Writes event files into `folder`; `tensorboard --logdir FOLDER` shows them."""

    def __init__(self, folder: Path) -> None:
        """Raises `UserError` when the package is missing."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError("writing TensorBoard events needs the tensorboard package: pip install 'shoal[report]'") from None
        self._writer = SummaryWriter(str(folder))

    def write(self, row: dict[str, Any]) -> None:
        """One row of `metrics.jsonl`: numbers become scalars, per-layer figures one scalar for each layer.

        The expert loads are left out: as thousands of scalars they would drown the rest; the report shows them.
        """
        for name, value in row.items():
            if name in ("step", "expert_load") or value is None:
                continue
            if isinstance(value, list):
                for index, layer_value in enumerate(value):
                    self._writer.add_scalar(f"{name}/{index:02d}", layer_value, row["step"])
            else:
                group = "evaluation" if name.startswith("val_") else "train"
                self._writer.add_scalar(f"{group}/{name}", value, row["step"])

    def close(self) -> None:
        self._writer.close()
