"""`shoal export`: transformers opens the folder and computes the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from shoal.cli import main
from shoal.config import MachineOptions, SamplingOptions
from shoal.engine import Engine, load


@pytest.mark.parametrize("kind", ["deepseek_v3", "llama"])
def test_transformers_gives_the_same_logits_and_the_same_text(
    kind: str, trained: Path, train_args: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    transformers = pytest.importorskip("transformers")
    run = trained
    if kind == "llama":
        run = tmp_path / "run"
        changes = ["--model.model-type", "llama", "--model.num-nextn-predict-layers", "0", "--model.num-key-value-heads", "1"]
        assert main(train_args(run, "--steps", "6", "--json", *changes)) == 0
    assert main(["export", str(run), str(tmp_path / "out"), "--format", "hf", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["model_type"], result["dtype"]) == (kind, "float32")
    assert f"A {kind} language model, trained with Shoal." in (tmp_path / "out" / "README.md").read_text()
    assert result["bytes"] == sum(file.stat().st_size for file in (tmp_path / "out").iterdir())

    ours = load(str(run), MachineOptions("cpu", "fp32", 1))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    prompt = "the red fish, été 😀"
    ids = ours.tokenizer.encode(prompt, bos=True)
    assert tokenizer(prompt)["input_ids"] == ids
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (ours.tokenizer.bos_id, ours.tokenizer.eos_id)
    with torch.no_grad():
        wanted = theirs(torch.tensor([ids])).logits
        got = ours.model.logits(ours.model(torch.tensor([ids])).hidden)
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
        continued = theirs.generate(torch.tensor([ids]), max_new_tokens=15, do_sample=False)[0].tolist()
    greedy = SamplingOptions(max_tokens=15, temperature=0)
    assert ids + Engine(ours.runner, ours.tokenizer).generate([ids], greedy)[0].ids == continued


@pytest.mark.parametrize("dtype", [None, "fp32", "fp16"])
def test_numbers_are_rounded_once_at_most(dtype: str | None, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An embedding in another type than the rest says nothing about the rest."""
    assert main(["export", str(trained), str(tmp_path / "source")]) == 0
    wanted = load_file(tmp_path / "source" / "model.safetensors")
    name, embedding = "model.layers.0.self_attn.o_proj.weight", "model.embed_tokens.weight"
    wanted |= {copy: wanted[copy].bfloat16() for copy in wanted if copy.endswith("embed_tokens.weight")}
    save_file(wanted, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    capsys.readouterr()
    assert main(["export", str(tmp_path / "source"), str(tmp_path / "out"), "--json", *(["--dtype", dtype] if dtype else [])]) == 0
    kind = torch.float16 if dtype == "fp16" else torch.float32
    said = str(kind).removeprefix("torch.")
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["dtype"] == said
    assert f"| Weights | {said} |" in (tmp_path / "out" / "README.md").read_text()
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert got[name].equal(wanted[name].to(kind))
    assert got[embedding].equal(wanted[embedding].to(kind) if dtype else wanted[embedding])


def test_an_export_can_be_used_and_exported_again(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for model, dtype in ((trained, "bf16"), (trained, "bf16"), (tmp_path / "out", "fp16")):
        out = tmp_path / ("out" if model == trained else "again")
        assert main(["export", str(model), str(out), "--dtype", dtype]) == 0
        assert "opens with transformers" in capsys.readouterr().out
    assert main(["generate", str(tmp_path / "again"), "the red", "--max-tokens", "3", "--threads", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] <= 3
    assert not [path.name for path in tmp_path.iterdir() if "tmp" in path.name]
