"""What is read back from a file tokenizes as the tokenizer that was written."""

import gguf
import pytest

from halfbyte.errors import CheckpointError
from halfbyte.gguf.tokenizer import GgufTokenizer

TEXTS = [
    "the cat sat on the other 1212 mat",
    "  two  spaces, \n\n lines\tand the end ",
    "Größe 北京 🙂 the<|im_end|>the",
    "",
]


def test_byte_level_text_gets_the_same_tokens(write_tokenizer, make_byte_level):
    tokenizer = make_byte_level()
    served = GgufTokenizer(write_tokenizer(tokenizer))
    for text in TEXTS:
        assert served.encode(text) == tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_text_gets_the_same_tokens(write_tokenizer, prefix, make_sentencepiece):
    tokenizer = make_sentencepiece(prefix=prefix)
    served = GgufTokenizer(write_tokenizer(tokenizer))
    for text in ("the cat sat on the hat", "cat", "a  b\nc Ж!", "<turn>the cat<end>"):
        expected = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert served.encode(text) == [1, *expected]  # its template writes BOS


def test_prompts_have_one_bos(write_tokenizer, make_sentencepiece):
    tokenizer = make_sentencepiece(prefix=False)
    messages = [{"role": "user", "content": "the cat"}]
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert GgufTokenizer(write_tokenizer(tokenizer)).prompt_ids(messages) == expected
    assert expected.count(1) == 1


def test_spaces_behind_special_tokens_go_where_the_name_says_phi3(write_tokenizer, make_byte_level):
    tokenizer = make_byte_level()
    text = "<|im_start|> \nthe"
    assert GgufTokenizer(write_tokenizer(tokenizer)).encode(text)[1:] != GgufTokenizer(
        write_tokenizer(tokenizer)
    ).encode("the")
    assert GgufTokenizer(write_tokenizer(tokenizer, "phi-3 mini")).encode(text)[
        1:
    ] == GgufTokenizer(write_tokenizer(tokenizer)).encode("the")


def test_a_file_without_tokenizer_is_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "v.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match="no tokenizer"):
        GgufTokenizer(tmp_path / "v.gguf")
