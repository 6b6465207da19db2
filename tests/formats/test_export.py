from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.cli import main
from shoal.config import UserError
from shoal.data.tokenizer import Tokenizer, train_tokenizer
from shoal.formats.export import chat_template, export_model
from shoal.formats.huggingface import load_model
from shoal.formats.quantized import open_quantized
from shoal.model import Transformer

Make = Callable[..., Transformer]
BOS, EOS, USER, ASSISTANT = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_tokenizer(["The quick brown fox jumps over the lazy dog. " * 20, "Ein Käse für 12 €; 漢字\n\tdef f(x): return x"], 400)


def test_transformers_opens_an_export_unchanged(make_model: Make, bpe: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = make_model(vocab_size=400)
    folder = tmp_path / "small-fish"
    export_model(model, bpe, folder, torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for text in ("The lazy dog", "  Käse\n\n\t12345 漢字 €🙂", f"{EOS}literal?", ""):
        ids = tokenizer(text)["input_ids"]
        assert ids == bpe.encode(text, bos=True, special=True)
        assert tokenizer.decode(ids) == bpe.decode(ids, skip_special=False)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1) == (theirs.config.bos_token_id, theirs.config.eos_token_id)
    assert tokenizer.model_max_length == model.config.max_position_embeddings
    assert theirs.generation_config.eos_token_id == 1
    ids = torch.tensor([bpe.encode("The quick brown fox", bos=True)])
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, model.logits(model(ids).hidden), atol=1e-4, rtol=0)


def test_chat_template_renders_and_marks_what_the_assistant_says(make_model: Make, bpe: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    export_model(make_model(vocab_size=400), bpe, tmp_path / "out", torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "The fox?"},
        {"role": "assistant", "content": "<think>hm</think>\n\nJumps."},
        {"role": "user", "content": "The dog?"},
    ]
    asked = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert asked == f"{BOS}Be brief.{USER}The fox?{ASSISTANT}Jumps.{EOS}{USER}The dog?{ASSISTANT}"
    answered = [*messages, {"role": "assistant", "content": "<think>so</think>Lazy."}]
    rendered = tokenizer.apply_chat_template(answered, return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = rendered["input_ids"], rendered["assistant_masks"]
    assert ids.count(0) == 1
    said = tokenizer.decode([token for token, marked in zip(ids, mask, strict=True) if marked])
    assert said == f"Jumps.{EOS}<think>so</think>Lazy.{EOS}"
    with pytest.raises(Exception, match="needs the role"):
        tokenizer.apply_chat_template([{"role": "wizard", "content": "x"}])


def test_a_tokenizers_own_chat_template_is_kept(make_model: Make, bpe: Tokenizer, tmp_path: Path) -> None:
    own = Tokenizer(bpe.json, bpe.config, chat_template="{{ messages[0].content }}")
    export_model(make_model(vocab_size=400), own, tmp_path / "out", torch.float32)
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages[0].content }}" != chat_template()


def test_templates_with_names_come_along_and_the_folder_can_be_replaced(make_model: Make, bpe: Tokenizer, tmp_path: Path) -> None:
    own = Tokenizer(bpe.json, bpe.config, "D", {"tool_use": "T"})
    for _ in range(2):
        export_model(make_model(vocab_size=400), own, tmp_path / "out", torch.float32)
    assert Tokenizer.load(tmp_path / "out").named_templates == {"tool_use": "T"}


def test_other_peoples_base_models_get_no_chat_template(make_model: Make, bpe: Tokenizer, tmp_path: Path) -> None:
    theirs = Tokenizer(bpe.json.replace(USER, "<user>"), bpe.config)
    for tokenizer, count in ((theirs, 0), (bpe, 1)):
        export_model(make_model(vocab_size=400), tokenizer, tmp_path / "out", torch.float32)
        assert len(list((tmp_path / "out").glob("chat_template.jinja"))) == count


def test_model_card_states_the_facts(make_model: Make, tokenizer: Any, tmp_path: Path) -> None:
    model = make_model(tie_word_embeddings=True)
    export_model(model, tokenizer, tmp_path / "fish", torch.bfloat16)
    front, body = (tmp_path / "fish" / "README.md").read_text().removeprefix("---\n").split("\n---\n", 1)
    unique = {parameter.data_ptr(): parameter.numel() for parameter in model.parameters()}
    assert {"library_name: transformers", "- deepseek_v3"} <= set(front.splitlines())
    assert f"parameters: {sum(unique.values())}" in front
    assert body.startswith("\n# fish\n")
    assert f"{sum(unique.values()):,}" in body
    assert "license" not in front
    assert "exported with Shoal" in body


def test_the_licence_comes_along(make_model: Make, bpe: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    export_model(make_model(vocab_size=400), bpe, source, torch.float32)
    front = ["language: en", "license: other", "license_name: deepseek", "license_link: LICENSE-MODEL", "tags:", "- chat"]
    (source / "README.md").write_text("\n".join(["---", *front, "---", "# A model", "license: no", ""]))
    for name in ("LICENSE-MODEL", "Notice.txt"):
        (source / name).write_text(f"the text of {name}")
    for model, again in ((source, out), (source, out), (out, tmp_path / "again")):
        assert main(["export", str(model), str(again), "--dtype", "bf16"]) == 0
        said, body = (again / "README.md").read_text().split("\n---\n", 1)
        assert [line for line in said.splitlines() if "license" in line] == front[1:4]
        assert "A deepseek_v3 language model, exported with Shoal." in body
        assert all((again / name).read_text() == f"the text of {name}" for name in ("LICENSE-MODEL", "Notice.txt"))
    (source / "README.md").write_text("---\nlicense:\n- mit\n- apache-2.0\ntags: []\n---\n")
    assert main(["export", str(source), str(out)]) == 0
    assert (out / "README.md").read_text().startswith("---\nlicense:\n- mit\n- apache-2.0\nlibrary_name:")
    (out / "LICENSE-MODEL").write_text("mine alone")
    assert main(["export", str(source), str(out)]) == 2
    assert "not an earlier export" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "setting"),
    [
        ({"qk_norm": True}, "qk_norm"),
        ({"logit_softcap": 15.0}, "logit_softcap is 15.0"),
        ({"moe_layer_freq": 2}, "moe_layer_freq"),
        ({"scoring_func": "softmax"}, "scoring_func is softmax and not sigmoid"),
        ({"topk_method": "greedy"}, "topk_method"),
        ({"model_type": "deepseek_v2", "topk_method": "greedy", "scoring_func": "softmax"}, "norm_topk_prob"),
        ({"model_type": "llama", "hidden_size": 36, "num_attention_heads": 5, "head_dim": 8}, "hidden_size 36"),
    ],
)
def test_settings_that_others_lack_are_refused(
    make_model: Make, tokenizer: Any, tmp_path: Path, changes: dict[str, Any], setting: str
) -> None:
    with pytest.raises(UserError, match=setting):
        export_model(make_model(**changes), tokenizer, tmp_path / "out", torch.float32)
    assert list(tmp_path.iterdir()) == []


def test_only_an_earlier_export_is_replaced(make_model: Make, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    export_model(make_model(seed=1), tokenizer, folder, torch.float32)
    export_model(make_model(seed=2), tokenizer, folder, torch.float32)
    second = load_model(folder).lm_head.weight
    assert torch.equal(second, make_model(seed=2).lm_head.weight)
    with monkeypatch.context() as patch:
        patch.setattr(type(tokenizer), "save", lambda *args: os.stat(tmp_path / "absent"))
        with pytest.raises(FileNotFoundError):
            export_model(make_model(seed=3), tokenizer, folder, torch.float32)
    assert torch.equal(load_model(folder).lm_head.weight, second)
    assert list(tmp_path.iterdir()) == [folder]
    for name in ("thesis.txt", "conversations.json", "mine.jinja", "model-notes.safetensors"):
        (folder / name).write_text("my only copy")
        with pytest.raises(UserError, match="not an earlier export"):
            export_model(make_model(), tokenizer, folder, torch.float32)
        (folder / name).rename(tmp_path / "file")
    (folder / "README.md").write_text("# Someone else's model")
    for path in (folder, tmp_path / "file"):
        with pytest.raises(UserError, match="not an earlier export"):
            export_model(make_model(), tokenizer, path, torch.float32)


def test_everybody_may_read_an_export_who_may_read_its_folder(make_model: Make, tokenizer: Any, tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        export_model(make_model(), tokenizer, tmp_path / "out", torch.float32)
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "out").iterdir()} == {0o644}


def test_numbers_that_a_format_does_not_have_are_refused(make_model: Make, tokenizer: Any, tmp_path: Path) -> None:
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight[3, 5] = 1e5
    with pytest.raises(UserError, match=r"lm_head\.weight holds numbers beyond 65504"):
        export_model(model, tokenizer, tmp_path / "out", torch.float16)
    assert list(tmp_path.iterdir()) == []


def test_what_is_said_of_sampling_stays_and_what_is_said_of_files_goes(make_model: Make, bpe: Tokenizer, tmp_path: Path) -> None:
    """`generation_config.json` may know more ends of a text; Python files beside the source are not beside the copy."""
    source, out = tmp_path / "source", tmp_path / "out"
    export_model(make_model(vocab_size=400), bpe, source, torch.float32)
    config = json.loads((source / "config.json").read_text())
    config |= {"eos_token_id": [config["eos_token_id"], 7], "auto_map": {"AutoConfig": "mine.Config"}, "rope_note": "kept"}
    (source / "config.json").write_text(json.dumps(config))
    (source / "generation_config.json").write_text(json.dumps({"do_sample": True, "temperature": 0.6, "eos_token_id": [1, 7, 9]}))
    assert main(["export", str(source), str(out)]) == 0
    written, generation = (json.loads((out / name).read_text()) for name in ("config.json", "generation_config.json"))
    assert "auto_map" not in written
    assert (written["eos_token_id"], written["rope_note"]) == ([1, 7, 9], "kept")
    assert (generation["do_sample"], generation["temperature"], generation["eos_token_id"]) == (True, 0.6, [1, 7, 9])
    assert main(["quantize", str(source), str(tmp_path / "q"), "--threads", "1"]) == 0
    assert json.loads((tmp_path / "q" / "generation_config.json").read_text()) == generation
    assert open_quantized(tmp_path / "q").config.extra["eos_token_id"] == [1, 7, 9]
