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
from .checkpoints import SavesFiles
from .fp8 import Quantizer
from .huggingface import dtype_name, save_model

CHAT_TEMPLATE = "chat_template.jinja"
CARD = "README.md"
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
    training_tokens: int | None = None,
    license: str = "apache-2.0",
    fp8: Quantizer | None = None,
    generation: dict[str, Any] | None = None,
) -> None:
    """Write a complete folder that transformers, vLLM and SGLang open without Shoal; it appears under its name when it is whole.

    With `fp8`, matrices are stored as it quantizes them, and everything else in `dtype`; None keeps every tensor's own. `generation`: what
    `generation_config.json` says besides. An earlier export at `folder` is replaced.

    Raises `UserError` when something else is there, or when the model uses settings that the official architecture does not have.
    """
    obstacles = export_obstacles(model.config)
    if obstacles:
        raise UserError(f"this model cannot become a plain {model.config.model_type} folder: {'; '.join(obstacles)}")
    if folder.exists() and not _replaceable(folder):
        raise UserError(f"{folder} exists and is not an earlier export: choose another folder or empty it")
    weights = "float8_e4m3fn in blocks of 128x128" if fp8 else str(dtype).removeprefix("torch.") if dtype else dtype_name(model)
    card = model_card(folder.resolve().name, model, weights, training_tokens, license)
    with new_folder(folder.resolve()) as temporary:
        save_model(model, temporary, dtype=dtype, fp8=fp8, generation=generation)
        tokenizer.save(temporary, model.config.max_position_embeddings)
        if not (temporary / CHAT_TEMPLATE).exists():  # the one the model was tuned with comes with its tokenizer
            template = chat_template_for((temporary / "tokenizer.json").read_text(encoding="utf-8"))
            if template is not None:
                (temporary / CHAT_TEMPLATE).write_text(template, encoding="utf-8")
        (temporary / CARD).write_text(card, encoding="utf-8")


def chat_template() -> str:
    """The Jinja template that turns messages into text where the tokenizer brings none: the same for training, serving and export."""
    return resources.files(__package__).joinpath(CHAT_TEMPLATE).read_text(encoding="utf-8")


def chat_template_for(tokenizer: str) -> str | None:
    """`chat_template` where a `tokenizer.json` with this content has its tokens; None for other people's base models, which do not."""
    tokens = {token["content"] for token in json.loads(tokenizer).get("added_tokens", [])}
    return chat_template() if {"<｜User｜>", "<｜Assistant｜>"} <= tokens else None


def model_card(name: str, model: Transformer, weights: str, training_tokens: int | None, license: str) -> str:
    """A `README.md` for the Hugging Face hub: YAML front matter, then the facts in a table."""
    config = model.config
    parameters = sum(parameter.numel() for parameter in model.parameters())
    front = [
        f"license: {license}",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags:",
        "- shoal",
        f"- {config.model_type}",
    ]
    front.append(f"parameters: {parameters}")
    rows = [("Parameters", f"{parameters:,}"), ("Weights", weights), *_shape(config)]
    if training_tokens is not None:
        front.append(f"training_tokens: {training_tokens}")
        rows.append(("Training tokens", f"{training_tokens:,}"))
    table = ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows)]
    usage = [
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'tokenizer = AutoTokenizer.from_pretrained("PATH")',
        'model = AutoModelForCausalLM.from_pretrained("PATH")',
        "```",
    ]
    about = f"A {config.model_type} language model trained with Shoal."
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


def _replaceable(folder: Path) -> bool:
    """Whether nothing is lost when `folder` goes: it is empty, or holds one of our exports and nothing else."""
    if not folder.is_dir():
        return False
    names = [path.name for path in folder.iterdir()]
    if not names:
        return True
    if CARD not in names or not all(_FILES.fullmatch(name) for name in names):
        return False
    return "\n- shoal\n" in (folder / CARD).read_text(encoding="utf-8", errors="replace").split("\n---\n")[0] + "\n"
