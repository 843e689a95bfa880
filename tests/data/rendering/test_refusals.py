"""What rendering refuses: pairs with a reason, tokenizers and templates with one line."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from mrpo.data.pairs import Pair
from mrpo.data.rendering import Refusal, RenderedPrompt, Renderer
from mrpo.errors import UserError
from mrpo.tests.data.families import BY_NAME, ask, message, pair_of, rendered
from mrpo.tests.data.family_templates import PHI3


@pytest.mark.parametrize(
    ("name", "prompt", "says"),
    [
        ("gemma", [message("system", "Be brief."), message("user", "Hi")], "system role not supp"),
        ("llama2", [message("user", "Hi"), message("user", "You there?")], "roles must alternate"),
        ("mistral", [message("user", "Hi"), message("critic", "No.")], "only user, assistant and"),
        ("llama3", [{"role": "user", "content": ["text"]}], "TypeError"),
    ],
)
def test_what_a_template_does_not_take_is_a_reason_not_an_error(
    name: str, prompt: list[dict[str, Any]], says: str
) -> None:
    family = BY_NAME[name]
    template = family.template.replace("| trim", "+ ''") if name == "llama3" else family.template
    renderer = Renderer(family.tokenizer(), chat_template=template)
    refusal, fine = renderer.render_many([pair_of(prompt, "Yes.", "No."), ask()])
    assert isinstance(refusal, Refusal)
    assert refusal.reason == "template_refused"
    assert says in refusal.detail
    assert isinstance(fine, RenderedPrompt)


def test_nothing_before_a_response_that_could_predict_it_is_a_reason() -> None:
    refusal = BY_NAME["qwen2.5"].renderer().render(Pair("", "Yes.", "No."))
    assert isinstance(refusal, Refusal)
    assert refusal.reason == "nothing_before_response"
    with_bos = rendered(BY_NAME["llama3"].renderer(), Pair("", "Yes.", "No."))
    assert with_bos.responses[0].start == 1


def test_a_response_that_leaves_no_token_is_a_reason() -> None:
    template = PHI3.replace("~ '<|end|>\\n' }}", "}}").replace("else eos_token", "else ''")
    renderer = Renderer(BY_NAME["phi3"].tokenizer(), chat_template=template)
    refusal = renderer.render(ask(" \n", "Yes."))
    assert isinstance(refusal, Refusal)
    assert refusal.reason == "empty_response_tokens"
    assert refusal.detail.startswith("chosen: ")


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "gemma2"])
def test_a_model_folder_without_tokenizer_is_refused(model_type: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(UserError, match=r"no tokenizer.*save_pretrained") as caught:
        Renderer.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_model_that_is_not_there_is_refused(tmp_path: Path) -> None:
    for model in (tmp_path / "nowhere", "some-org/no-such-model"):
        with pytest.raises(UserError, match="no tokenizer to load") as caught:
            Renderer.load(model)
        assert "\n" not in str(caught.value)


def test_a_tokenizer_without_offsets_is_refused(tmp_path: Path) -> None:
    from transformers import ByT5Tokenizer

    ByT5Tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"ByT5Tokenizer\) gives no character offsets"):
        Renderer.load(tmp_path)
    with pytest.raises(UserError, match="gives no character offsets"):
        Renderer(ByT5Tokenizer())  # type: ignore[arg-type]


def test_a_mistral_folder_gets_a_fast_tokenizer_even_with_mistral_common_installed(
    tmp_path: Path,
) -> None:
    from transformers import AutoTokenizer

    pattern, sizes = r"\s+|\S+", {"num_vocab_tokens": 256, "default_num_special_tokens": 100}
    config = {"pattern": pattern, "default_vocab_size": 356, "version": "v3", **sizes}
    tokens = [base64.b64encode(bytes([byte])).decode() for byte in range(256)]
    vocab = [{"rank": i, "token_bytes": t, "token_str": None} for i, t in enumerate(tokens)]
    (tmp_path / "tekken.json").write_text(json.dumps({"config": config, "vocab": vocab}))
    (tmp_path / "config.json").write_text('{"model_type": "mistral"}')

    assert isinstance(Renderer.load(tmp_path).render(Pair("Is it?", "Yes", "No")), RenderedPrompt)
    by_default = AutoTokenizer.from_pretrained(tmp_path)
    assert type(by_default).__name__ == "MistralCommonBackend"
    with pytest.raises(UserError, match=r"MistralCommonBackend\) gives no character offsets"):
        Renderer(by_default)  # type: ignore[arg-type]


def test_messages_for_a_model_without_template_are_refused() -> None:
    renderer = Renderer(BY_NAME["alpaca"].tokenizer())
    assert renderer.chat_template is None
    assert renderer.end_of_turn is None
    assert isinstance(renderer.render(Pair("Is it?", " Yes.", " No.")), RenderedPrompt)
    with pytest.raises(UserError, match="no chat template and the pairs are messages"):
        renderer.render(ask())


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{% for m in messages %}", "can't show a question and an answer .*TemplateSyntaxError"),
        ("{{ raise_exception('no') }}", "can't show a question and an answer .*no"),
        ("{{ messages[0].content }}", "doesn't show the assistant's answer"),
    ],
)
def test_a_template_of_no_use_is_refused_at_once(template: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        Renderer(BY_NAME["alpaca"].tokenizer(), chat_template=template)


def test_template_kwargs_cannot_take_the_place_of_our_own_arguments() -> None:
    family = BY_NAME["alpaca"]
    with pytest.raises(UserError, match="of the reference: tokenize can't be set"):
        Renderer(
            family.tokenizer(),
            chat_template=family.template,
            chat_template_kwargs={"tokenize": True},
        )
    with pytest.raises(UserError, match="of a pair: tools can't be set"):
        family.renderer().render(ask(chat_template_kwargs={"tools": []}))
