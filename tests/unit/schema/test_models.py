from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given

from codeherd_schema.errors import InvalidSetting, PromptTooLong, UnknownModel, UnsupportedByModel
from codeherd_schema.models import (
    TINY,
    ChatFormat,
    ModelTable,
    ServedModel,
    check_fit,
    fewest_prompt_tokens,
    most_prompt_tokens,
)
from codeherd_schema.requests import ChatRequest, GenerateRequest, InfillRequest, JobKind, Request, Sampling
from tests import samples
from tests.samples import PUBLISHED, a_request

CHAT = ChatRequest.model_validate({"messages": [{"role": "user", "content": "hi"}]})
REQUESTS: dict[JobKind, Request] = {
    JobKind.GENERATE: GenerateRequest(prompt="a"),
    JobKind.INFILL: InfillRequest(prefix="a", suffix="b"),
    JobKind.CHAT: CHAT,
}


@pytest.mark.parametrize(
    ("size", "parameters", "kib_per_token"),
    [("7b", 6.739, 512), ("13b", 13.016, 800), ("34b", 33.744, 192), ("70b", 68.977, 320)],
)
@pytest.mark.parametrize("variant", ["", "-python", "-instruct"])
def test_figures_of_the_published_models(
    size: str, parameters: float, kib_per_token: int, variant: str
) -> None:
    model = PUBLISHED[f"codellama-{size}{variant}"]

    assert model.parameters == pytest.approx(parameters * 1e9)
    assert model.kv_bytes_per_token() == kib_per_token * 1024
    assert model.context_window == (4_096 if size == "70b" and variant else 16_384)


def test_only_the_base_7b_and_13b_infill() -> None:
    assert {name for name, model in PUBLISHED.items() if model.infilling} == {
        "tiny",
        "codellama-7b",
        "codellama-13b",
    }


def test_only_instruct_models_chat() -> None:
    formats = {name: model.chat for name, model in PUBLISHED.items() if model.chat}

    assert formats == {
        "codellama-7b-instruct": ChatFormat.INST,
        "codellama-13b-instruct": ChatFormat.INST,
        "codellama-34b-instruct": ChatFormat.INST,
        "codellama-70b-instruct": ChatFormat.STEP,
    }


def test_sources_are_the_hub_ids_of_the_transformers_format() -> None:
    assert PUBLISHED["codellama-34b-python"].source == "codellama/CodeLlama-34b-Python-hf"
    assert PUBLISHED["codellama-7b"].source == "codellama/CodeLlama-7b-hf"


@pytest.mark.parametrize(
    "name", ["codellama-7b", "CodeLlama-7B", "codellama/CodeLlama-7b-hf", "CODELLAMA/codellama-7b-HF"]
)
def test_model_is_found_by_name_and_hub_id_whatever_the_case(name: str) -> None:
    assert ModelTable().find(name) is not None
    assert ModelTable().find(name).name == "codellama-7b"


def test_unknown_model_comes_with_the_nearest_names() -> None:
    with pytest.raises(UnknownModel, match="no model `codelama-7b`") as caught:
        ModelTable().find("codelama-7b")

    assert caught.value.hint is not None
    assert "`codellama-7b`" in caught.value.hint


@pytest.mark.parametrize("kind", JobKind)
def test_request_is_checked_against_what_the_model_can(kind: JobKind) -> None:
    table = ModelTable()
    for model in table:
        request = REQUESTS[kind].model_copy(update={"model": model.name})
        if model.can(kind):
            assert table.check(request) is model
            assert model.name in table.able(kind)
            continue
        with pytest.raises(UnsupportedByModel) as caught:
            table.check(request)
        assert caught.value.hint == "these can: " + ", ".join(table.able(kind))


def test_prompt_that_cannot_fit_is_refused_with_the_figures() -> None:
    request = a_request(prompt="x" * 40_000)

    with pytest.raises(PromptTooLong, match=r"at least 2501 tokens .* 256 new .* 2048") as caught:
        ModelTable().check(request)

    assert "xxx" not in caught.value.message
    assert ModelTable().check(a_request(prompt="x" * 40_000, overflow="truncate")) is TINY


def test_new_tokens_alone_can_be_too_many() -> None:
    request = a_request(prompt="", sampling=Sampling(max_new_tokens=2_048), overflow="truncate")

    with pytest.raises(PromptTooLong):
        ModelTable().check(request)


def test_fit_is_exact() -> None:
    request = a_request(sampling=Sampling(max_new_tokens=1_000))

    check_fit(TINY, request, 1_048)
    with pytest.raises(PromptTooLong):
        check_fit(TINY, request, 1_049)


@given(samples.requests)
def test_bounds_of_a_prompts_tokens_are_in_order(request_: Request) -> None:
    assert 1 <= fewest_prompt_tokens(request_, 16) <= most_prompt_tokens(request_)


# A user's own entries.

OWN = """
[models.my-coder]
source = "/models/my-coder"
parameters = 1
layers = 2
kv_heads = 2
head_dim = 4
vocab_size = 100
context_window = 64
infilling = true
chat = "inst"
"""


def test_own_entry_is_served(tmp_path: Path) -> None:
    path = tmp_path / "models.toml"
    path.write_text(OWN)

    model = ModelTable.from_file(path).find("my-coder")

    assert (model.context_window, model.chat) == (64, ChatFormat.INST)
    assert all(model.can(kind) for kind in JobKind)


def test_own_entry_replaces_a_published_one() -> None:
    longer = PUBLISHED["codellama-7b"].model_copy(update={"context_window": 32_768})

    table = ModelTable([longer])

    assert table.find("codellama/CodeLlama-7b-hf").context_window == 32_768
    assert len(list(table)) == len(PUBLISHED)


def test_no_file_is_the_published_table() -> None:
    assert [model.name for model in ModelTable.from_file(None)] == list(PUBLISHED)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[models", "cannot be read"),
        (b"\xff", "cannot be read"),
        (OWN.replace("layers = 2", "layers = 0").encode(), "model `my-coder` in .*: `layers`"),
        (OWN.replace("layers = 2", "").encode(), "`layers`: field required"),
        (OWN.replace('"inst"', '"rap"').encode(), "`chat`"),
        (b"[models.my-coder]\nname = 'x'", "my-coder"),
        (b"[models]\nmy-coder = 5", "my-coder"),
        (b"models = 5", "models"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_faulty_file_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "models.toml"
    path.write_bytes(content)

    with pytest.raises(InvalidSetting, match=message):
        ModelTable.from_file(path)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidSetting, match=r"nope\.toml"):
        ModelTable.from_file(tmp_path / "nope.toml")


@pytest.mark.parametrize("field", ["parameters", "layers", "context_window", "longest_piece"])
def test_impossible_figures_are_refused(field: str) -> None:
    data: dict[str, Any] = TINY.model_dump() | {field: 0}

    with pytest.raises(ValueError, match=field):
        ServedModel.model_validate(data)
