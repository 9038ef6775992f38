"""The folder of a captioner's model: none of its code is run, and what can't be used is one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from models import write_llm

from sorahpc.errors import ConfigError
from sorahpc.models.captioner import LocalModel

CANARY = "import pathlib; pathlib.Path({!r}).touch()\n"


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llm(tmp_path_factory.mktemp("models") / "llm")


@pytest.fixture
def folder(llm: Path, tmp_path: Path) -> Path:
    return shutil.copytree(llm, tmp_path / "llm")


def edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **fields}))


def load(folder: Path, frames: bool = False) -> tuple[str, str]:
    model = LocalModel(folder, "float32", "cpu", with_frames=frames)
    return model.answer("a ball", [], seed=0, temperature=0.7, max_new_tokens=5)


def test_no_code_of_a_model_folder_is_run(folder: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    code = CANARY.format(str(canary)) + "class X: pass\n"
    for name in ("modeling_x.py", "tokenization_x.py", "configuration_x.py", "custom_generate/generate.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(code)
    auto = {"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "modeling_x.X"}
    edit(folder / "config.json", auto_map=auto)
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_x.X", None]})
    edit(folder / "generation_config.json", custom_generate=str(folder), num_beams=7)
    load(folder)
    edit(folder / "config.json", model_type="x", auto_map=auto)
    with pytest.raises(ConfigError, match=r"caption.path: model_type in .* found 'x'"):
        load(folder)
    assert not canary.exists()


def test_weights_of_another_format_are_not_read(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n(S'touch pwned'\ntR.")
    with pytest.raises(ConfigError, match=r"caption.path: no model.safetensors in .*read from safetensors only"):
        load(folder)
    (folder / "model.safetensors").write_bytes((folder / "pytorch_model.bin").read_bytes())
    with pytest.raises(ConfigError, match=r"caption.path: .* doesn't load as AutoModelForCausalLM") as caught:
        load(folder)
    assert "\n" not in str(caught.value) and not Path("pwned").exists()


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_a_config_that_names_code_of_another_place_is_refused(folder: Path, key: str) -> None:
    edit(folder / "config.json", text_config={key: "somebody/kernel"})
    with pytest.raises(ConfigError, match=rf"config.json: {key}: .* found 'somebody/kernel', code of another place"):
        load(folder)


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize(
    ("adapter", "base"),
    [
        ('{"base_model_name_or_path": "somebody/\\nlarge", "peft_type": "LORA"}', " for 'somebody/\\\\nlarge'"),
        ("{", ""),
    ],
)
def test_an_adapter_is_refused_since_transformers_may_fetch_or_leave_out_what_belongs_to_it(
    folder: Path, adapter: str, base: str, alone: bool
) -> None:
    (folder / "adapter_config.json").write_text(adapter)
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors") if alone else None
    (folder / "config.json").unlink() if alone else None
    with pytest.raises(ConfigError) as caught:
        load(folder)
    assert str(caught.value) == (
        f"caption.path: {folder} holds an adapter of PEFT (adapter_config.json){base}, expected a whole model; "
        "merge both (merge_and_unload, save_pretrained), or take the adapter's files away"
    )


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("config.json", "[]", "no readable config.json"),
        ("config.json", '{"model_type": "llama", "x": ' + '{"a":' * 5000 + "1" + "}" * 5001, "no readable config.json"),
        ("config.json", '{"model_type": "t5"}', "expected a causal LM or an image-text-to-text model"),
        ("config.json", '{"model_type": ["llama"]}', "no readable config.json"),
        ("config.json", '{"model_type": "llama", "hidden_size": "x"}', "doesn't load"),
        ("tokenizer.json", "{}", "doesn't load as AutoTokenizer"),
        ("chat_template.jinja", "{{ raise_exception('no\nroles') }}", "the chat template in .* fails on 0 frames"),
        ("chat_template.jinja", "{% for", "the chat template in .* fails on 0 frames"),
        ("chat_template.jinja", "{{ ''.__class__.__mro__[1].__subclasses__() }}", "the chat template in .* fails"),
    ],
)
def test_a_broken_folder_is_one_line(folder: Path, name: str, data: str, expected: str) -> None:
    (folder / name).write_text(data)
    with pytest.raises(ConfigError, match=expected) as caught:
        load(folder)
    assert str(caught.value).startswith("caption.path: ") and "\n" not in str(caught.value)


def test_a_model_that_cannot_see_is_not_shown_frames(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"caption.frames: 0 expected, since .*llm \(llama\) reads text alone"):
        load(folder, frames=True)
    with pytest.raises(ConfigError, match=r"caption\.path: no folder"):
        load(folder / "nowhere")


def test_a_model_without_a_chat_template_goes_on_with_the_text(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    assert load(folder)[0]
