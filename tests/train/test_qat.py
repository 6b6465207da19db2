"""Fine-tuning that sees the weights as they will be in 4 bits."""

from __future__ import annotations

import json
import random
import shutil
from itertools import islice
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


CALCULATOR = {
    "sequence-length": 128, "batch-size": 8, "eval-tokens": 8192, "checkpoint.every-steps": 0, "model.hidden-size": 64,
    "model.intermediate-size": 192, "model.num-attention-heads": 4, "model.max-position-embeddings": 256, "model.kv-lora-rank": 32,
    "model.qk-nope-head-dim": 16, "model.qk-rope-head-dim": 16, "model.v-head-dim": 16, "model.moe-intermediate-size": 64,
    "model.init": "fan_in",
}  # fmt: skip
"""What its model has other than that of the shared recipe."""


def sums(pages: int) -> str:
    """Text that a small model can learn all there is to learn of, and of which rounding then costs it something."""
    draw = random.Random(0)
    lines = ((draw.randrange(100), draw.randrange(100)) for _ in range(16 * pages))
    return "\n\n".join("".join(f"{a}+{b}={a + b}\n" for a, b in islice(lines, 16)) for _ in range(pages))


@pytest.mark.slow
def test_fine_tuning_makes_up_for_most_of_what_rounding_costs(workshop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Beside as much fine-tuning without rounding, which is then rounded to nearest."""
    text = tmp_path / "sums.txt"
    text.write_text(sums(8000), encoding="utf-8")
    options = [(f"--{name}", str(value)) for name, value in CALCULATOR.items()]
    common = [part for option in options if not option[0].startswith("--model.") for part in option]
    shape = [part for option in options if option[0].startswith("--model.") for part in option]

    def learn(name: str, *more: str) -> Path:
        places = ["--data", str(text), "--corpus.cache", str(tmp_path / "cache"), "--out", str(tmp_path / name)]
        assert main(["train", str(workshop / "recipe.toml"), *places, *common, *more]) == 0
        return tmp_path / name

    def rounded(run: Path) -> tuple[float, float]:
        capsys.readouterr()
        assert main(["quantize", str(run), f"{run}-int4", "--data", str(text), "--threads", "1", "--json"]) == 0
        result = json.loads(capsys.readouterr().out.splitlines()[-1])
        return result["bpb_before"], result["bpb_after"]

    base = learn("base", *shape, "--model.zero-init-output", "--steps", "1500")
    rates = ["--optimizer.muon-lr", "0.0015", "--optimizer.embed-lr", "0.0006", "--optimizer.adam-lr", "0.0003"]
    tuning = ["--start", str(base), "--steps", "400", *rates]
    plain, after = rounded(learn("plain", *tuning))
    _, aware = rounded(learn("aware", *tuning, "--qat", "int4"))
    print(f"bits per byte: {plain:.5f}, rounded {after:.5f}; fine-tuned for 4 bits, rounded {aware:.5f}")
    assert after - plain > 0.002, "rounding costs too little to say what fine-tuning saves"
    assert aware - plain < (after - plain) / 3


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
        config.qat, config.start = "int4", "model"
        for name, value in change.items():
            setattr(config, name, value)
        with pytest.raises(UserError, match="products of its own"):
            config.validate()
