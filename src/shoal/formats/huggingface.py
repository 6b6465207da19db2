"""Hugging Face folders: `config.json` and safetensors weights under the official names of DeepSeek-V2, DeepSeek-V3 and Llama.

`Transformer` already bears the official names. What differs on disk: routed experts lie one by one, FP8 weights come with
scales (`numerics.fp8`), and MTP layers repeat embedding and output head, which they share with the main model.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..config import ModelConfig, UserError
from ..config.huggingface import model_config_from_dict, model_config_to_dict
from ..model import Transformer
from ..numerics.fp8 import dequantize_blocks

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_STACKED = re.compile(r"(.+\.mlp\.experts)\.(gate_proj|up_proj|down_proj)")
_HARMLESS = re.compile(r"\.rotary_emb\.(inv_freq|cos_cached|sin_cached)$")
_SCALE = "_scale_inv"
_READABLE = (torch.float32, torch.bfloat16, torch.float16)


def save_model(
    model: Transformer, folder: Path, *, dtype: torch.dtype | None = None, max_shard_bytes: int = 5 * 10**9, mtp_copies: bool = True
) -> None:
    """Write `config.json`, `generation_config.json` and the weights, in one file or in shards of at most `max_shard_bytes`.

    `dtype` None keeps every tensor's own; the routing bias stays fp32 always. With `mtp_copies` every MTP layer repeats
    embedding and output head as the official files do, which vLLM and SGLang look for.

    Raises `UserError` when the folder already holds weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.glob("*.safetensors")):
        raise UserError(f"{folder} already holds weights: choose another folder")
    tensors = official_tensors(model)
    if mtp_copies:
        tensors |= {name: tensors[source] for name, source in shared_copies(model.config).items() if name != _HEAD}

    def stored_dtype(name: str) -> torch.dtype:
        return tensors[name].dtype if dtype is None or name.endswith("e_score_correction_bias") else dtype

    sizes = {name: tensor.numel() * stored_dtype(name).itemsize for name, tensor in tensors.items()}
    shards = _plan_shards(sizes, max_shard_bytes)
    files = [WEIGHTS] if len(shards) == 1 else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for file, names in zip(files, shards, strict=True):
        # A copy of each: safetensors refuses tensors that share memory, as experts of one stack do.
        shard = {name: tensors[name].to("cpu", stored_dtype(name), copy=True).contiguous() for name in names}
        save_file(shard, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        _write_json(folder / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map})
    written = model_config_to_dict(model.config, dtype=str(stored_dtype(_EMBEDDING)).removeprefix("torch."))
    _write_json(folder / CONFIG, written)
    _write_json(folder / "generation_config.json", {key: written[key] for key in ("bos_token_id", "eos_token_id")})


def load_model(folder: Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Transformer:
    """The model of a Hugging Face folder, filled tensor by tensor so that no more than one copy of the weights is in memory.

    `dtype` None takes the one in which the embedding is stored (FP8 weights are dequantized to it). Files whose
    `config.json` announces MTP layers that are not there, as transformers writes them, load without, with a warning.

    Raises `UserError` for unsupported models, and for missing, unexpected, misshapen, non-finite or truncated tensors.
    """
    raw = _read_json(folder / CONFIG)
    config = _config(raw)
    with WeightFiles(folder, _fp8_block(raw)) as files:
        if config.num_nextn_predict_layers and not files.has_prefix(f"model.layers.{config.num_hidden_layers}."):
            warnings.warn(f"{folder} announces multi-token prediction layers but holds none: loading without them", stacklevel=2)
            config.num_nextn_predict_layers = 0
        with torch.device("meta"):
            model = Transformer(config)
        model = model.to(dtype or files.plain_dtype(_EMBEDDING)).to_empty(device=device)
        if config.tie_word_embeddings:  # to_empty gives every module a weight of its own
            model.lm_head.weight = model.model.embed_tokens.weight
        _fill(model, files)
    return model


def load_state(model: Transformer, folder: Path) -> None:
    """Overwrite the weights of `model` with those of a folder of the same shape; every tensor keeps its dtype and device.

    Raises `UserError` as `load_model` does; after an error about names or shapes the model is untouched.
    """
    with WeightFiles(folder, _fp8_block(_read_json(folder / CONFIG))) as files:
        _fill(model, files)


def read_config(folder: Path) -> ModelConfig:
    """The shape of the model in `folder`, without its weights."""
    return _config(_read_json(folder / CONFIG))


def official_tensors(model: Transformer) -> dict[str, Tensor]:
    """Every weight of the model, once, under its official name; routed experts are views of their stack, so all can be written to."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        stacked = _STACKED.fullmatch(name)
        if stacked:
            prefix, part = stacked.groups()
            tensors.update({f"{prefix}.{e}.{part}.weight": expert for e, expert in enumerate(tensor)})
        elif not (name == _HEAD and model.config.tie_word_embeddings):
            tensors[name] = tensor
    return tensors


def shared_copies(config: ModelConfig) -> dict[str, str]:
    """Names under which official files may repeat a shared tensor -> the tensor they repeat."""
    head = _EMBEDDING if config.tie_word_embeddings else _HEAD
    copies = {_HEAD: _EMBEDDING} if config.tie_word_embeddings else {}
    for layer in range(config.num_hidden_layers, config.num_hidden_layers + config.num_nextn_predict_layers):
        copies[f"model.layers.{layer}.embed_tokens.weight"] = _EMBEDDING
        copies[f"model.layers.{layer}.shared_head.head.weight"] = head
    return copies


class WeightFiles:
    """The safetensors files of a folder, read one tensor at a time; a context manager."""

    def __init__(self, folder: Path, fp8_block: tuple[int, int]) -> None:
        self.folder = folder
        self.fp8_block = fp8_block
        self.stack = ExitStack()
        self.file_of: dict[str, Any] = {}

    def __enter__(self) -> WeightFiles:
        with ExitStack() as opened:
            for path in self._paths():
                try:
                    file = opened.enter_context(safe_open(path, framework="pt", device="cpu"))
                except (SafetensorError, OSError) as error:
                    raise UserError(f"{path} is not a whole safetensors file ({error}): copy or download it again") from None
                self.file_of.update(dict.fromkeys(file.keys(), file))
            self.stack = opened.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def _paths(self) -> list[Path]:
        index = self.folder / INDEX
        if index.is_file():
            try:
                names = sorted(set(_read_json(index)["weight_map"].values()))
            except (KeyError, AttributeError, TypeError):
                raise UserError(f"{index} has no weight_map: copy or download it again") from None
        else:
            names = [WEIGHTS]
        for name in names:
            if not (self.folder / name).is_file():
                raise UserError(f"{self.folder} lacks {name}: the weights must be complete and in safetensors format")
        return [self.folder / name for name in names]

    def has_prefix(self, prefix: str) -> bool:
        return any(name.startswith(prefix) for name in self.file_of)

    def shape(self, name: str) -> list[int]:
        return self.file_of[name].get_slice(name).get_shape()

    def is_fp8(self, name: str) -> bool:
        return self.file_of[name].get_slice(name).get_dtype() == "F8_E4M3"

    def plain_dtype(self, name: str) -> torch.dtype:
        """How a tensor that is never quantized is stored."""
        if name not in self.file_of:
            raise UserError(f"{self.folder} lacks the tensor {name}: the files are incomplete")
        return self._readable(name, self.file_of[name].get_tensor(name)).dtype

    def read(self, name: str) -> Tensor:
        """One tensor, dequantized where it is FP8 with scales, all its numbers finite."""
        tensor = self.file_of[name].get_tensor(name)
        if self.is_fp8(name):
            if name + _SCALE not in self.file_of:
                raise UserError(f"{self.folder}: {name} is FP8 but its scales {name + _SCALE} are missing")
            tensor = dequantize_blocks(tensor, self.file_of[name + _SCALE].get_tensor(name + _SCALE), block=self.fp8_block)
        if not self._readable(name, tensor).isfinite().all():
            raise UserError(f"{self.folder}: {name} holds NaN or infinite numbers: the file is damaged or the run had diverged")
        return tensor

    def _readable(self, name: str, tensor: Tensor) -> Tensor:
        if tensor.dtype not in _READABLE:
            raise UserError(
                f"{self.folder}: {name} is stored as {tensor.dtype}, which is not supported: use fp32, bf16 or block-scaled FP8"
            )
        return tensor


def _fill(model: Transformer, files: WeightFiles) -> None:
    targets = official_tensors(model)
    copies = {name: source for name, source in shared_copies(model.config).items() if name in files.file_of}
    wanted = targets.keys() | copies.keys()
    wanted |= {name + _SCALE for name in wanted if name + _SCALE in files.file_of and files.is_fp8(name)}
    missing = [name for name in targets if name not in files.file_of]
    unexpected = [name for name in files.file_of if name not in wanted and not _HARMLESS.search(name)]
    if missing:
        raise UserError(f"{files.folder} lacks {_some(missing)}: the files are incomplete or config.json belongs to another model")
    if unexpected:
        raise UserError(f"{files.folder} has {_some(unexpected)} that config.json does not account for: is it another model's?")
    for name, target in targets.items():
        if files.shape(name) != list(target.shape):
            raise UserError(f"{files.folder}: {name} has shape {files.shape(name)}, but config.json makes it {list(target.shape)}")
    for name, target in targets.items():
        target.copy_(files.read(name))
    for name, source in copies.items():
        copy = files.read(name).to(targets[source])
        if copy.shape != targets[source].shape or not copy.equal(targets[source]):
            raise UserError(f"{files.folder}: {name} differs from {source}, but Shoal shares the two: such files are not supported")


def _config(raw: dict[str, Any]) -> ModelConfig:
    config = model_config_from_dict(raw)
    config.extra.pop("quantization_config", None)  # weights are dequantized on load: a saved copy has none
    return config


def _fp8_block(raw: dict[str, Any]) -> tuple[int, int]:
    """Rows and columns of an FP8 block; anything but block-scaled FP8 is refused."""
    quantization = raw.get("quantization_config")
    if not quantization:
        return 128, 128
    block = quantization.get("weight_block_size")
    if quantization.get("quant_method") != "fp8" or not block:
        method = quantization.get("quant_method")
        raise UserError(f"weights quantized by {method!r} are not supported: use the original files or block-scaled FP8")
    return block[0], block[1]


def _plan_shards(sizes: dict[str, int], limit: int) -> list[list[str]]:
    """Names in their order, cut so that a shard has at most `limit` bytes (or one tensor)."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _some(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''} ({', '.join(names[:3])}{more})"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise UserError(f"{path} cannot be read: name a folder with a model in Hugging Face format") from None
    except ValueError:
        raise UserError(f"{path} is not valid JSON: copy or download it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} does not hold a JSON object: copy or download it again")
    return content


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
