import json
import pickle

import numpy as np
import pytest
from tiny_texts import BERT_SPECIAL, ROBERTA_SPECIAL, WORDS, byte_level_bpe, make_texts, wordpiece, write_folder
from tokenizers import Tokenizer

from jaxdistill.data import check_tokenizer, load_tokenizer, save_tokenizer
from jaxdistill.errors import InputError

LITERALS = "river [SEP] stone </s> <pad> light [CLS][MASK]<mask> <s>x</s> [PAD] [UNK]<unk> winter"


def test_ids_of_the_special_tokens(tokenizers_by_kind):
    bert, roberta, xlmr = (tokenizers_by_kind[kind] for kind in ("wordpiece", "bpe", "unigram"))
    assert (bert.pad_id, bert.cls_id, bert.sep_id, bert.mask_id) == (0, 2, 3, 4)
    assert (roberta.cls_id, roberta.pad_id, roberta.sep_id, roberta.mask_id) == (0, 1, 2, 4)
    assert (xlmr.cls_id, xlmr.pad_id, xlmr.sep_id, xlmr.mask_id) == (0, 1, 2, xlmr.vocab_size - 1)


def test_ordinary_text_gets_the_tokenizers_own_ids(tokenizer_folders, tokenizers_by_kind):
    texts = [*make_texts(20, seed=3), "", " ", "☃ \x00 \U0001f999"]
    for kind, folder in tokenizer_folders.items():
        original = Tokenizer.from_file(str(folder / "tokenizer.json"))
        original.no_truncation()
        original.no_padding()
        expected = [original.encode(text, add_special_tokens=False).ids for text in texts]
        assert [ids.tolist() for ids in tokenizers_by_kind[kind].encode(texts)] == expected
        assert max(map(len, expected)) > 16  # the truncation saved in the folder does not act


def test_special_tokens_in_the_text_are_text(any_tokenizer):
    ids = any_tokenizer.encode([LITERALS])[0]
    special = {any_tokenizer.cls_id, any_tokenizer.sep_id, any_tokenizer.pad_id, any_tokenizer.mask_id}
    assert not special & set(ids.tolist())
    assert len(ids) > 25


def test_the_text_survives_byte_for_byte(tokenizers_by_kind):
    bpe = tokenizers_by_kind["bpe"]
    assert bpe.backend.decode(bpe.encode([LITERALS])[0].tolist(), skip_special_tokens=False) == LITERALS


def test_unknown_characters_are_unk(tokenizers_by_kind):
    for kind, unk_id in (("wordpiece", 1), ("unigram", 3)):
        assert unk_id in tokenizers_by_kind[kind].encode(["river \U0001f999"])[0]


def test_dtype_follows_the_vocabulary(tokenizer):
    assert tokenizer.dtype == np.uint16
    assert type(tokenizer)(**{**vars(tokenizer), "vocab_size": 2**16}).dtype == np.uint16
    assert type(tokenizer)(**{**vars(tokenizer), "vocab_size": 2**16 + 1}).dtype == np.uint32


def test_fingerprint_is_of_the_content(tokenizer_folders, tokenizers_by_kind, tmp_path):
    assert load_tokenizer(tokenizer_folders["bpe"]).fingerprint == tokenizers_by_kind["bpe"].fingerprint
    untruncated = byte_level_bpe()
    untruncated.no_truncation()
    untruncated.no_padding()
    same = load_tokenizer(write_folder(tmp_path / "untruncated", untruncated, ROBERTA_SPECIAL))
    assert same.fingerprint == tokenizers_by_kind["bpe"].fingerprint
    uncased = wordpiece()
    uncased.normalizer.lowercase = False
    changed = load_tokenizer(write_folder(tmp_path / "cased", uncased, BERT_SPECIAL))
    assert changed.fingerprint != tokenizers_by_kind["wordpiece"].fingerprint


def test_pickles(any_tokenizer):
    assert pickle.loads(pickle.dumps(any_tokenizer)).encode([LITERALS])[0].tolist() == any_tokenizer.encode([LITERALS])[0].tolist()


def test_save_round_trip(tokenizer_folders, tokenizers_by_kind, tmp_path):
    for kind, folder in tokenizer_folders.items():
        save_tokenizer(folder, tmp_path / kind, model_max_length=48)
        assert load_tokenizer(tmp_path / kind).fingerprint == tokenizers_by_kind[kind].fingerprint
        settings = json.loads((tmp_path / kind / "tokenizer_config.json").read_text())
        assert settings["model_max_length"] == 48
        assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"  # transformers 4 knows this one


def test_folder_without_tokenizer(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(InputError, match=r"no tokenizer files there; it should hold tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_broken_tokenizer_file(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="cannot be loaded"):
        load_tokenizer(tmp_path)


def test_neither_folder_nor_reachable(no_network):
    with pytest.raises(InputError, match="no-one/nothing: no such folder, and no tokenizer of the Hub") as caught:
        load_tokenizer("no-one/nothing")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("missing", ["cls", "sep", "pad"])
def test_missing_special_token(tmp_path, missing):
    special = {name: token for name, token in BERT_SPECIAL.items() if name != f"{missing}_token"}
    folder = write_folder(tmp_path / "tokenizer", wordpiece(), special)
    with pytest.raises(InputError, match=f"has no {missing} token"):
        load_tokenizer(folder)


def test_slow_tokenizer(monkeypatch, tokenizer_folders):
    import transformers

    class Slow:
        is_fast = False

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: Slow())
    with pytest.raises(InputError, match="only a slow tokenizer"):
        load_tokenizer(tokenizer_folders["bpe"])


def test_check_against_the_teacher(tokenizer):
    size = tokenizer.vocab_size
    for vocab_size in (size, size + 1, size + 128):
        check_tokenizer(tokenizer, vocab_size=vocab_size, pad_token_id=0, where="data.tokenizer")
    for vocab_size, pad_token_id, message in (
        (size - 1, 0, f"data.tokenizer: the tokenizer has {size} tokens, the teacher's vocab_size is only {size - 1}"),
        (size + 129, 0, f"the teacher's vocab_size is {size + 129}; use the tokenizer the teacher was trained with"),
        (size, 1, "pads with id 0, the teacher's pad_token_id is 1"),
    ):
        with pytest.raises(InputError, match=message):
            check_tokenizer(tokenizer, vocab_size=vocab_size, pad_token_id=pad_token_id, where="data.tokenizer")


def test_words_are_in_the_vocabulary(tokenizer):
    # Guards the fixtures: with single letters only, the tests above would say little.
    assert all(len(ids) < 6 for ids in tokenizer.encode(WORDS))
