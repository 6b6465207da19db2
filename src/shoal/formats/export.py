"""A folder to publish or to serve with other engines: weights, tokenizer, chat template and model card."""

from __future__ import annotations

import json
import re
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from ..atomic import new_folder
from ..config import ModelConfig, UserError
from ..config.huggingface import export_obstacles
from ..model import Transformer
from .checkpoints import SavesFiles, is_complete
from .fp8 import Quantizer
from .huggingface import dtype_name, save_model

CHAT_TEMPLATE = "chat_template.jinja"
CARD = "README.md"
_LICENCE_FILE = re.compile(r"(licen[cs]e|notice)[\w.-]*", re.IGNORECASE)
_LICENCE = re.compile(r"^license(?:_name|_link)?:.*(?:\n[ -].*)*", re.MULTILINE)
"""In the front matter of a card; a list may go on over several lines."""
_FILES = re.compile(
    r"README\.md|(config|generation_config|tokenizer|tokenizer_config|model\.safetensors\.index)\.json|chat_template\.jinja|additional_chat_templates"
    r"|model(-\d+-of-\d+)?\.safetensors"
)


def export_model(
    model: Transformer,
    tokenizer: SavesFiles,
    folder: Path,
    dtype: torch.dtype | None,
    *,
    source: Path | None = None,
    fp8: Quantizer | None = None,
    generation: dict[str, Any] | None = None,
) -> None:
    """Write a complete folder that transformers, vLLM and SGLang open without Shoal; it appears under its name when it is whole.

    With `fp8`, the matrices that it takes are stored as it quantizes them, and everything else in `dtype`; None keeps every tensor's own.
    `source` is the folder that the model comes from, whose licence is that of the copy. `generation`: what `generation_config.json` says
    besides. An earlier export at `folder` is replaced.

    Raises `UserError` when something else is there, or when the model uses settings that the official architecture does not have.
    """
    obstacles = export_obstacles(model.config)
    if obstacles:
        raise UserError(f"this model cannot become a plain {model.config.model_type} folder: {'; '.join(obstacles)}")
    licences = _licence_files(source) if source is not None else {}
    if folder.exists() and not _replaceable(folder, licences):
        raise UserError(f"{folder} exists and is not an earlier export: choose another folder or empty it")
    weights = "float8_e4m3fn in blocks of 128x128" if fp8 else str(dtype).removeprefix("torch.") if dtype else dtype_name(model)
    card = model_card(folder.resolve().name, model, weights, source)
    with new_folder(folder.resolve()) as temporary:
        save_model(model, temporary, dtype=dtype, fp8=fp8, generation=generation)
        tokenizer.save(temporary, model.config.max_position_embeddings)
        if not (temporary / CHAT_TEMPLATE).exists():  # the one the model was tuned with comes with its tokenizer
            template = chat_template_for((temporary / "tokenizer.json").read_text(encoding="utf-8"))
            if template is not None:
                (temporary / CHAT_TEMPLATE).write_text(template, encoding="utf-8")
        (temporary / CARD).write_text(card, encoding="utf-8")
        for name, content in licences.items():
            (temporary / name).write_bytes(content)


def chat_template() -> str:
    """The Jinja template that turns messages into text where the tokenizer brings none: the same for training, serving and export."""
    return resources.files(__package__).joinpath(CHAT_TEMPLATE).read_text(encoding="utf-8")


def chat_template_for(tokenizer: str) -> str | None:
    """`chat_template` where a `tokenizer.json` with this content has its tokens; None for other people's base models, which do not."""
    tokens = {token["content"] for token in json.loads(tokenizer).get("added_tokens", [])}
    return chat_template() if {"<｜User｜>", "<｜Assistant｜>"} <= tokens else None


def model_card(name: str, model: Transformer, weights: str, source: Path | None) -> str:
    """A `README.md` for the Hugging Face hub: YAML front matter, then the facts in a table.

    It names a licence where the card in `source` does, and speaks of training where that is a checkpoint of a run.
    """
    config = model.config
    parameters = sum(parameter.numel() for parameter in model.parameters())
    front = [
        *(_LICENCE.findall("\n".join(_front_matter(source / CARD))) if source is not None else ()),
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags:",
        "- shoal",
        f"- {config.model_type}",
        f"parameters: {parameters}",
    ]
    rows = [("Parameters", f"{parameters:,}"), ("Weights", weights), *_shape(config)]
    table = ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows)]
    usage = [
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'tokenizer = AutoTokenizer.from_pretrained("PATH")',
        'model = AutoModelForCausalLM.from_pretrained("PATH")',
        "```",
    ]
    made = "trained" if source is not None and is_complete(source) else "exported"
    about = f"A {config.model_type} language model, {made} with Shoal."
    return "\n".join(["---", *front, "---", "", f"# {name}", "", about, "", *table, "", "## Use", "", *usage, ""])


def _shape(config: ModelConfig) -> list[tuple[str, str]]:
    rows = [
        ("Layers x width", f"{config.num_hidden_layers} x {config.hidden_size}"),
        ("Attention", f"{'MLA' if config.uses_mla else 'GQA'}, {config.num_attention_heads} heads"),
        ("Context", f"{config.max_position_embeddings} tokens"),
        ("Vocabulary", str(config.vocab_size)),
    ]
    if config.uses_mla and config.n_routed_experts:
        shared = f", {config.n_shared_experts} shared" if config.n_shared_experts else ""
        rows.append(("Experts", f"{config.num_experts_per_tok} of {config.n_routed_experts}{shared}"))
    if config.num_nextn_predict_layers:
        rows.append(("Multi-token prediction", f"{config.num_nextn_predict_layers} layer(s)"))
    return rows


def _front_matter(card: Path) -> list[str]:
    """Lines of the YAML that a card begins with; none where there is no card, or no YAML in it."""
    lines = card.read_text(encoding="utf-8", errors="replace").splitlines() if card.is_file() else []
    return lines[1 : lines.index("---", 1)] if lines[:1] == ["---"] and "---" in lines[1:] else []


def _licence_files(source: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(source.iterdir()) if _LICENCE_FILE.fullmatch(path.name) and path.is_file()}


def _replaceable(folder: Path, licences: dict[str, bytes]) -> bool:
    """Whether nothing is lost when `folder` goes: it is empty, or holds one of our exports, perhaps with `licences`, and nothing else."""
    if not folder.is_dir():
        return False
    found = list(folder.iterdir())
    ours = all(_FILES.fullmatch(path.name) or (path.name in licences and path.read_bytes() == licences[path.name]) for path in found)
    return not found or (ours and "- shoal" in _front_matter(folder / CARD))
