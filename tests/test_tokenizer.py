"""Text to ids and back: the character tokenizer, templates with holes, padding."""

import numpy as np
import pytest
import tokenizers
import transformers

from dmrl import data, tokenizer
from dmrl.tasks import BLANK, gsm8k
from dmrl.tasks.answers import TEXT

DIGITS = tokenizer.characters("4321")
MASK, EOS = DIGITS.mask_token_id, DIGITS.eos_token_id


def words():
    """A tokenizer of whole words, with a chat template and no padding token."""
    vocab = {"<eos>": 0, "<user>": 1, "solve": 2, "this": 3}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token=None))
    core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")
    made.chat_template = (
        "{% for m in messages %}<user> {{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %} <eos>{% endif %}"
    )
    return made


def test_characters_have_fixed_ids_whatever_the_order_of_the_alphabet():
    assert (MASK, EOS, DIGITS.pad_token_id, len(DIGITS)) == (0, 1, 1, 6)
    assert tokenizer.encode(DIGITS, "1234") == [2, 3, 4, 5]
    assert tokenizer.characters("1123344").get_vocab() == DIGITS.get_vocab()


PRINTABLE = TEXT.replace(BLANK, "")


@pytest.mark.parametrize("text", ["x", "a b\n\tc", "<answer>\n 1|2 \n</answer>", PRINTABLE])
def test_any_text_of_the_alphabet_comes_back(text):
    tok = tokenizer.characters(TEXT + "\n\t ")
    ids = tokenizer.encode(tok, text)
    assert len(ids) == len(text)
    assert tokenizer.decode(tok, np.array([ids]), tok.mask_token_id, tok.eos_token_id) == [text]


def test_saved_and_loaded_like_any_hugging_face_tokenizer(tmp_path):
    DIGITS.save_pretrained(tmp_path)
    for loaded in (
        transformers.AutoTokenizer.from_pretrained(tmp_path),
        tokenizer.load(str(tmp_path)),
    ):
        assert loaded.get_vocab() == DIGITS.get_vocab()
        assert (loaded.mask_token_id, loaded.eos_token_id, loaded.pad_token_id) == (MASK, EOS, EOS)
        assert tokenizer.encode(loaded, "4132") == tokenizer.encode(DIGITS, "4132")
        assert loaded.decode([5, 2, 4]) == "413"


def test_padding_falls_back_to_eos(tmp_path):
    words().save_pretrained(tmp_path)
    assert tokenizer.load(str(tmp_path)).pad_token_id == 0


def test_a_tokenizer_without_an_end_is_refused(tmp_path):
    made = words()
    made.eos_token = None
    made.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no EOS token"):
        tokenizer.load(str(tmp_path))


def test_no_tokenizer_there(tmp_path):
    with pytest.raises(ValueError, match=r"no tokenizer at .*give a local folder"):
        tokenizer.load(str(tmp_path))


def test_unknown_characters_are_named():
    with pytest.raises(ValueError, match=r"cannot tokenize '12x4y': no token for \['x', 'y'\]"):
        tokenizer.encode(DIGITS, "12x4y")


@pytest.mark.parametrize("alphabet", ["", BLANK])
def test_alphabets_that_cannot_work(alphabet):
    with pytest.raises(ValueError, match="has no character"):
        tokenizer.characters(alphabet)


def test_a_blank_is_no_token():
    assert tokenizer.characters("1234" + BLANK).get_vocab() == DIGITS.get_vocab()
    with pytest.raises(ValueError, match=f"no token for \\['{BLANK}'\\]"):
        tokenizer.encode(DIGITS, "1" + BLANK)


def test_prompts_go_through_the_chat_template_if_there_is_one():
    assert tokenizer.encode_prompt(words(), "solve this") == [1, 2, 3, 0]
    assert tokenizer.encode_prompt(words(), "") == []
    assert tokenizer.encode_prompt(DIGITS, "12") == [2, 3]


START, END, HEAD, HEADED, TURN = (
    "startoftext",
    "endoftext",
    "start_header_id",
    "end_header_id",
    "eot_id",
)
WORDS = [
    "\n\n",
    "user",
    "assistant",
    "system",
    "How",
    " ",
    "many",
    "?",
    "<",
    "reasoning",
    ">",
    "\n",
]


def llada(tmp_path):
    """A tokenizer of few words with LLaDA-8B-Instruct's special tokens and chat template, which
    puts a start of text before what it encodes unless told not to; saved and loaded."""
    marks = [f"<|{name}|>" for name in (START, END, HEAD, HEADED, TURN)]
    vocab = {word: i for i, word in enumerate([*marks, *WORDS])}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token=None))
    words = tokenizers.Regex(r"\n\n|\w+|\W")
    core.pre_tokenizer = tokenizers.pre_tokenizers.Split(words, "isolated")
    core.decoder = tokenizers.decoders.Fuse()
    core.add_special_tokens(marks)
    core.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{marks[0]} $A", special_tokens=[(marks[0], 0)]
    )
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=marks[0], eos_token=marks[1], pad_token=marks[1]
    )
    made.chat_template = (
        "{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
        "<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] | trim }}<|eot_id|>"
        "{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    )
    made.save_pretrained(tmp_path)
    return tokenizer.load(str(tmp_path))


def test_llada_s_chat_template_is_rendered_to_the_last_token(tmp_path):
    tok = llada(tmp_path)
    turn = [0, 2, 6, 3, 5, 9, 10, 11, 12, 4, 2, 7, 3, 5]
    assert tokenizer.encode_prompt(tok, "How many?") == turn
    assert tokenizer.encode_prompt(tok, "\nHow many?\n") == turn  # the template strips it
    assert tok.decode(turn) == (
        "<|startoftext|><|start_header_id|>user<|end_header_id|>\n\nHow many?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert tok("How")["input_ids"] == [0, 9], "without care there would be two starts of text"


def test_a_prefill_begins_the_assistant_s_turn(tmp_path):
    class Asked(gsm8k.Task):
        def examples(self, split):
            return [gsm8k.Example("How many?", "7"), gsm8k.Example("How?", "7")]

    tok = llada(tmp_path)
    task = Asked(style="compact", equality="string")
    begun = data.tokenize(task, tok, "test", None, 4, 99, prefill="<reasoning>")
    turn = [0, 2, 6, 3, 5, 9, 10, 11, 12, 4, 2, 7, 3, 5, 13, 14, 15]
    assert begun.prompt.tolist() == [turn, [1, 1, *turn[:6], *turn[8:]]]
    assert begun.prompt_valid.sum(axis=1).tolist() == [17, 15]


@pytest.mark.parametrize(
    ("template", "ids"),
    [("12__", [2, 3, 0, 0]), ("_2_4", [0, 3, 0, 5]), ("____", [0] * 4), (None, [0] * 4)],
)
def test_templates_have_masks_where_they_are_blank(template, ids):
    assert tokenizer.encode_template(DIGITS, template, 4, MASK) == ids
    if template:
        assert tokenizer.decode(DIGITS, np.array([ids]), MASK, EOS) == [template]


def test_a_longer_template_is_refused_and_a_shorter_one_ends():
    with pytest.raises(ValueError, match="template '12_' is 3 tokens, the completion 2"):
        tokenizer.encode_template(DIGITS, "12_", 2, MASK)
    assert tokenizer.encode_template(DIGITS, "12_", 5, MASK) == [2, 3, 0, EOS, EOS]


def test_decoding_stops_at_the_first_eos_and_shows_masks_as_blanks():
    rows = np.array([[2, 0, 3, EOS, 4], [EOS, 2, 2, 2, 2], [0, 0, 0, 0, 0]])
    assert tokenizer.decode(DIGITS, rows, MASK, EOS) == ["1_2", "", "_____"]
    assert tokenizer.decode(DIGITS, rows, MASK, EOS, whole=True) == ["1_23", "1111", "_____"]


def test_padding_is_on_the_left():
    tokens, valid = tokenizer.pad_left([[2, 3], [], [4, 5, 2]], 3, EOS)
    assert tokens.tolist() == [[1, 2, 3], [1, 1, 1], [4, 5, 2]]
    assert valid.tolist() == [[False, True, True], [False] * 3, [True] * 3]
    assert tokenizer.pad_left([[], []], 0, EOS)[0].shape == (2, 0)


def test_long_prompts_are_counted():
    with pytest.raises(ValueError, match=r"2 of 3 prompts are longer than max_prompt_length=1 \(l"):
        tokenizer.pad_left([[2, 3], [2], [2, 3, 4]], 1, EOS)
