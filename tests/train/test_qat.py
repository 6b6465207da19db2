"""Fine-tuning that sees the weights as they will be in 4 bits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.cli import main
from shoal.config import UserError
from shoal.engine.load import load_transformer
from shoal.formats.locate import locate_model
from shoal.numerics.grouped import dequantize, quantize
from shoal.train.qat import Rounding, round_weights


def test_the_forward_pass_is_that_of_the_quantized_folder(trained: Path, tmp_path: Path) -> None:
    model = load_transformer(locate_model(str(trained)))
    model.model.embed_tokens.weight.data = model.model.embed_tokens.weight.bfloat16().float()  # as the folder holds it
    round_weights(model)
    assert main(["quantize", str(trained), str(tmp_path / "q"), "--threads", "1"]) == 0
    engines = load_transformer(tmp_path / "q")
    ids = torch.arange(1, 31).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(ids).hidden, engines.eval()(ids).hidden, rtol=1e-4, atol=1e-4)


def test_gradients_pass_the_rounding_and_scales_stay() -> None:
    weight = torch.randn(3, 8, 40, requires_grad=True)
    rounding = Rounding(weight)
    out = rounding(weight)
    assert out.equal(weight + (dequantize(quantize(weight.detach(), 4)) - weight).detach())
    grad = torch.randn_like(weight)
    out.backward(grad)
    assert weight.grad is not None
    assert weight.grad.equal(grad)
    scales = rounding.scales.clone()
    rounding(weight.detach() * 3)
    assert rounding.scales.equal(scales)


def test_a_checkpoint_holds_the_rounded_weights_and_goes_on_to_the_bit(trained: Path, train_args: Any, tmp_path: Path) -> None:
    rates = ["--optimizer.muon-lr", "0.005", "--checkpoint.every-steps", "2", "--checkpoint.keep-last", "9"]
    run, half = tmp_path / "run", tmp_path / "half"
    assert main(train_args(run, "--start", str(trained), "--qat", "int4", "--steps", "4", *rates)) == 0
    rounded = load_transformer(run / "checkpoints" / "step_0000004").state_dict()
    assert main(["quantize", str(run), str(tmp_path / "q"), "--threads", "1"]) == 0
    engines = load_transformer(tmp_path / "q").state_dict()
    for name in (name for name in engines if "layers.0." in name or "layers.1." in name):
        # Rounding once more may change a group whose largest weights have shrunk by a third: then it has a better grid.
        assert (engines[name] - rounded[name]).norm() < 0.01 * rounded[name].norm()
    shutil.copytree(run, half)
    shutil.rmtree(half / "checkpoints" / "step_0000004")
    assert main(train_args(half, "--start", str(trained), "--qat", "int4", "--steps", "4", *rates, "--resume")) == 0
    again = load_transformer(half / "checkpoints" / "step_0000004").state_dict()
    assert all(again[name].equal(rounded[name]) for name in rounded)


@pytest.mark.slow
def test_fine_tuning_makes_up_for_most_of_what_rounding_costs(
    trained: Path, train_args: Any, workshop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside as much fine-tuning without rounding, which is then rounded to nearest."""

    def increase(*more: str) -> tuple[float, float]:
        run, out = tmp_path / f"run{len(more)}", tmp_path / f"q{len(more)}"
        rates = ["--optimizer.muon-lr", "0.005", "--optimizer.embed-lr", "0.002", "--optimizer.adam-lr", "0.001"]
        assert main(train_args(run, "--start", str(base), "--steps", "150", *rates, *more)) == 0
        assert main(["quantize", str(run), str(out), "--data", str(workshop / "text.txt"), "--threads", "1", "--json"]) == 0
        result = json.loads(capsys.readouterr().out.splitlines()[-1])
        return result["bpb_before"], result["bpb_after"]

    base = tmp_path / "base"
    assert main(train_args(base, "--steps", "300")) == 0
    plain, rounded = increase()
    _, aware = increase("--qat", "int4")
    assert aware - plain < (rounded - plain) / 3


def test_a_run_starts_from_a_model(trained: Path, train_args: Any, tmp_path: Path) -> None:
    changes = ["--start", str(trained), "--steps", "1", "--optimizer.muon-lr", "0", "--optimizer.embed-lr", "0"]
    rest = ["--optimizer.head-lr", "0", "--optimizer.adam-lr", "0", "--balance.bias-update-speed", "0"]
    assert main(train_args(tmp_path / "run", *changes, *rest)) == 0
    first, second = (load_transformer(locate_model(str(folder))).state_dict() for folder in (trained, tmp_path / "run"))
    assert first.keys() == second.keys()
    assert all(first[name].equal(second[name]) for name in first)


def test_what_rounds_in_other_ways_is_refused() -> None:
    from shoal.config.recipes import load_recipe

    for change in ({"precision": "fp8"}, {"recompute": ("swiglu",)}):
        config = load_recipe("demo")
        config.qat = "int4"
        for name, value in change.items():
            setattr(config, name, value)
        with pytest.raises(UserError, match="products of its own"):
            config.validate()
