"""Tokenizers: transformers' where there is one, sentencepiece where there is only a tokenizer.model."""

from __future__ import annotations

import pytest

from megatron_powerflow.data.tokenizer import load_tokenizer
from megatron_powerflow.errors import UserError
from tests.tiny_models import write_tokenizer

TEXT = "the quick brown fox jumps over the lazy dog and runs away from the old grey wolf"


@pytest.fixture(scope="module")
def sentencepiece_folder(tmp_path_factory):
    """A tokenizer.model trained here, and nothing beside it."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("sentencepiece")
    words = TEXT.split()
    sentences = [" ".join(words[i:] + words[:i]) for i in range(len(words))] * 4
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=60,
        model_type="bpe",
        bos_id=1,
        eos_id=2,
        minloglevel=2,
    )
    return folder


def test_a_folder_with_only_a_tokenizer_model_loads_through_sentencepiece(sentencepiece_folder):
    tokenizer = load_tokenizer(sentencepiece_folder)
    assert tokenizer.eos_token_id == 2
    ids = tokenizer.encode(TEXT)
    assert ids[0] == 1
    assert tokenizer.encode_plain(TEXT) == ids[1:]
    assert tokenizer.decode(ids[1:]) == TEXT
    assert tokenizer.decode([*ids[1:], 2, 59_999]) == TEXT  # ids beyond the vocabulary are padding rows of the model
    plain = f"Question: {TEXT}\n\nAnswer:"
    assert tokenizer.encode_chat([{"role": "user", "content": TEXT}]) == tokenizer.encode(plain)
    assert "no chat template" in tokenizer.notices[0]


def test_a_fast_tokenizer_loads_through_transformers(tmp_path):
    write_tokenizer(tmp_path, 20)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("w3 w4") == tokenizer.encode_plain("w3 w4") == [3, 4]
    assert tokenizer.eos_token_id == 2
    assert tokenizer.decode([3, 2, 4, 999]) == "w3 w4"
    assert tokenizer.encode_chat([{"role": "user", "content": "w3"}]) == tokenizer.encode("Question: w3 Answer:")
    assert "no chat template" in tokenizer.notices[0]


def test_the_real_chat_template_is_applied(smollm2):
    tokenizer = load_tokenizer(smollm2)
    text = tokenizer.decode(tokenizer.encode_chat([{"role": "user", "content": "Hello there"}]))
    assert text.endswith("user\nHello there\nassistant\n")


@pytest.mark.parametrize("content", ["", "{", '{"version": "1.0", "model": {"type": "Nothing"}}'])
def test_a_damaged_tokenizer_is_named(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError) as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_damaged_sentencepiece_model_is_named(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(UserError, match="not a sentencepiece model"):
        load_tokenizer(tmp_path)


def test_no_tokenizer_at_all(tmp_path):
    with pytest.raises(UserError, match="no tokenizer"):
        load_tokenizer(tmp_path)


def test_a_template_runs_no_code(tmp_path):
    """Chat templates are somebody else's Jinja: they run in transformers' sandbox."""
    import json

    write_tokenizer(tmp_path, 20)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    marker = tmp_path / "ran"
    settings["chat_template"] = (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}"
        f"{{{{ cycler.__init__.__globals__.os.system('touch {marker}') }}}}"
    )
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="chat template"):
        load_tokenizer(tmp_path).encode_chat([{"role": "user", "content": "w3"}])
    assert not marker.exists()
