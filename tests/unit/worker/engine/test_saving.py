from __future__ import annotations

import errno
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from codeherd_schema.errors import CodeherdError, InvalidRequest, InvalidSetting, ModelFilesInvalid
from codeherd_worker.engine.loading import LoadedModel, load_model
from codeherd_worker.engine.quantization import Quantization, SavedQuantization
from codeherd_worker.engine.saving import SavedModel, save_quantized
from tests.unit.worker.engine.tiny_llama import tiny_llama

IDS = torch.tensor([[5, 6, 7, 8]])
#: Settings that an author may wish for and transformers refuses to write.
WISHES = {"do_sample": False, "temperature": 0.9, "top_p": 0.6}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    tiny_llama().save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(b"pieces")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "LICENSE.txt").write_text("terms")
    (folder / "generation_config.json").write_text(json.dumps(WISHES))
    return folder


def save(source: Path, out: Path, quantization: SavedQuantization = "nf4", **options: Any) -> SavedModel:
    options = dict[str, Any](device="cpu", progress=lambda step, share: None) | options
    return save_quantized(str(source), out, quantization=quantization, **options)


def load(folder: Path, quantization: Quantization = "auto") -> LoadedModel:
    return load_model(str(folder), quantization=quantization, device="cpu", slots=4)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_copy_loads_by_itself_and_answers_bit_for_bit_alike(
    source: Path, tmp_path: Path, quantization: SavedQuantization
) -> None:
    saved = save(source, tmp_path / "copy", quantization)

    direct, copy = load(source, quantization), load(tmp_path / "copy")
    assert (copy.quantization, copy.dtype) == (quantization, direct.dtype)
    assert copy.revision == saved.revision != direct.revision
    assert torch.equal(copy.model(IDS).logits, direct.model(IDS).logits)


def test_the_embedded_kind_with_one_tensor_for_both_ends_is_copied(tmp_path: Path) -> None:
    tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path / "tied")

    save(tmp_path / "tied", tmp_path / "copy")

    direct, copy = load(tmp_path / "tied", "nf4"), load(tmp_path / "copy")
    assert copy.model.lm_head.weight is copy.model.model.embed_tokens.weight
    assert torch.equal(copy.model(IDS).logits, direct.model(IDS).logits)


def test_a_copy_is_smaller_and_says_by_how_much(source: Path, tmp_path: Path) -> None:
    saved = save(source, tmp_path / "new" / "copy")

    sizes = [(f / "model.safetensors").stat().st_size for f in (source, tmp_path / "new" / "copy")]
    assert [saved.source_bytes, saved.saved_bytes] == sizes
    assert saved.saved_bytes < saved.source_bytes / 2


def test_a_copy_has_the_tokenizer_and_the_terms_and_is_readable_to_all(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "copy"

    save(source, out)

    for name in ("tokenizer.model", "tokenizer.json", "LICENSE.txt", "generation_config.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    modes = {path.stat().st_mode for path in out.iterdir()}
    assert len(modes) == 1


def test_an_empty_folder_may_take_the_copy(source: Path, tmp_path: Path) -> None:
    (tmp_path / "copy").mkdir()

    save(source, tmp_path / "copy")

    assert load(tmp_path / "copy").quantization == "nf4"


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_is_there_already_stays(source: Path, tmp_path: Path, kind: str) -> None:
    out = tmp_path / "copy"
    kept = out if kind == "file" else out / "kept"
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("mine")

    with pytest.raises(InvalidRequest, match="exists already") as caught:
        save(source, out)

    assert caught.value.hint
    assert kept.read_text() == "mine"


def test_a_quantized_model_is_not_quantized_again(source: Path, tmp_path: Path) -> None:
    save(source, tmp_path / "copy", "int8")

    with pytest.raises(InvalidSetting, match="quantized as int8 already") as caught:
        save(tmp_path / "copy", tmp_path / "second")

    assert caught.value.hint
    assert not (tmp_path / "second").exists()


def test_a_full_disk_leaves_nothing_behind(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill_up(_model: LlamaForCausalLM, folder: Path, **_options: Any) -> None:
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", fill_up)

    with pytest.raises(CodeherdError, match="cannot be written: No space left on device") as caught:
        save(source, tmp_path / "copy")

    assert caught.value.hint
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_an_interrupt_leaves_nothing_behind(source: Path, tmp_path: Path) -> None:
    def interrupt(step: str, share: float) -> None:
        if step == "save":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save(source, tmp_path / "copy", progress=interrupt)

    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_progress_goes_through_all_three_steps(
    source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ended: list[str] = []
    capfd.readouterr()

    save(source, tmp_path / "copy", progress=lambda step, share: ended.extend([step] * (share == 1)))

    assert ended == ["check", "load", "save"]
    assert capfd.readouterr().err == ""


def test_a_model_with_bad_numbers_is_not_copied(source: Path, tmp_path: Path) -> None:
    model = tiny_llama()
    model.model.norm.weight[0] = torch.nan
    model.save_pretrained(source)

    with pytest.raises(ModelFilesInvalid, match=re.escape("model.norm.weight in model.safetensors")):
        save(source, tmp_path / "copy")

    assert not (tmp_path / "copy").exists()
