import numpy as np
import pytest
from support.versions import need_smollm2

from l2v.data.tokens import TextTokenizer, as_ids, check_vocabulary, load_tokenizer, text_key
from l2v.errors import RecipeError, UserError
from l2v.recipe import Base, Template

TEXT = "Hunden på Ærø ser_dig."
GOLDEN = [42, 87, 80, 266, 223, 82, 270, 223, 296, 265, 262, 260, 65, 70, 75, 73, 16]
BOS, EOS = 0, 1
CHAT = Template(prefix="</s>bruger\n", suffix="</s>", instruction="{instruction}: ")


@pytest.fixture(scope="module", params=["plain", "bos"])
def adds_bos(request) -> bool:
    return request.param == "bos"


@pytest.fixture(scope="module")
def tokenizer(adds_bos, tokenizer_folder, bos_tokenizer_folder):
    return load_tokenizer(bos_tokenizer_folder if adds_bos else tokenizer_folder)


def test_golden_ids(tokenizer, adds_bos):
    texts = TextTokenizer(tokenizer, Template(), 64)
    expected = [BOS] * adds_bos + GOLDEN
    assert texts.documents([TEXT, TEXT]) == [expected, expected]
    assert texts.embedded([TEXT]) == ([expected], [int(adds_bos)], 0)


@pytest.mark.parametrize("template", [Template(), Template(suffix="</s>"), Template(prefix="</s>bruger\n"), CHAT])
@pytest.mark.parametrize("instruction", [None, "", "Find svaret på spørgsmålet"])
@pytest.mark.parametrize("text", [TEXT, "a", "Æ", "  Hunden ser. \n", "1", ".", "日本"])
def test_text_and_suffix_are_pooled_and_nothing_else(tokenizer, adds_bos, template, instruction, text):
    texts = TextTokenizer(tokenizer, template, 128)
    (ids,), (start,), cut = texts.embedded([text], instruction)
    header = template.prefix + (template.instruction.format(instruction=instruction) if instruction else "")
    assert texts.header(instruction) == header
    before, pooled = tokenizer.decode(ids[:start]), tokenizer.decode(ids[start:])
    shown = header.rstrip(
        " "
    )  # the space before a word is a part of its token, or a token before it; both count to the text
    assert before == "<s>" * adds_bos + shown
    assert pooled == header[len(shown) :] + text.strip() + template.suffix
    assert cut == 0


def test_a_token_that_spans_the_border_belongs_to_the_text(tokenizer):
    texts = TextTokenizer(tokenizer, Template(prefix="Find: "), 64)
    (ids,), (start,), _ = texts.embedded(["ser"])
    tokens = tokenizer.convert_ids_to_tokens(ids)
    assert tokens[start:] == ["Ġs", "er"]


def test_pooling_begins_at_one_position_whatever_a_text_begins_with(tokenizer):
    """A word has the space before it in its token, a digit or an emoji has not; engines exclude a fixed number of tokens."""
    texts = TextTokenizer(tokenizer, CHAT, 64)
    _, starts, _ = texts.embedded(["ser", "3 ser", "🙂", "Ærø", "\u4f60"], "Find:")
    assert len(set(starts)) == 1
    joined = [tokenizer.tokenize(f"Find: {text}")[-1] for text in ("s", "3")]
    assert joined == ["Ġs", "3"]  # both kinds are among them


def test_a_recipe_can_pool_the_prompt_too(tokenizer, adds_bos):
    base = Base(model="x", template=CHAT, pool_prompt=True)
    texts, usual = (
        TextTokenizer.of(tokenizer, base, 64),
        TextTokenizer.of(tokenizer, Base(model="x", template=CHAT), 64),
    )
    assert texts.embedded([TEXT], "Find") == (usual.embedded([TEXT], "Find")[0], [0], 0)
    assert usual.embedded([TEXT], "Find")[1][0] > 0
    assert texts.fingerprint() != usual.fingerprint()  # tokenised data of one is not taken for the other


def test_texts_in_one_call_are_those_of_single_calls(tokenizer, sentences):
    texts = TextTokenizer(tokenizer, CHAT, 40)
    ids, starts, cut = texts.embedded(sentences[:30], "Find")
    single = [texts.embedded([text], "Find") for text in sentences[:30]]
    assert ids == [one[0][0] for one in single] and starts == [one[1][0] for one in single]
    assert cut == sum(one[2] for one in single)


@pytest.mark.parametrize("suffix", ["", "</s>", "</s> slut"])
@pytest.mark.parametrize("instruction", [None, "Find"])
def test_truncation_cuts_the_text_and_keeps_the_rest(tokenizer, suffix, instruction):
    template = Template(prefix="</s>bruger\n", suffix=suffix)
    (whole,), (start,), cut = TextTokenizer(tokenizer, template, 256).embedded([TEXT], instruction)
    assert cut == 0
    tail = len(tokenizer(suffix, add_special_tokens=False)["input_ids"])
    body = len(whole) - start - tail
    for keep in range(1, body + 1):
        texts = TextTokenizer(tokenizer, template, start + keep + tail)
        (ids,), (at,), cut = texts.embedded([TEXT], instruction)
        assert at == start and cut == (keep < body)
        assert ids == whole[: start + keep] + whole[len(whole) - tail :]


def test_an_end_token_of_the_tokenizer_is_pooled_and_survives_truncation(tokenizer_folder):
    from tokenizers import processors

    tokenizer = load_tokenizer(tokenizer_folder)
    both = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)])
    tokenizer.backend_tokenizer.post_processor = both
    for length, keep in ((64, len(GOLDEN)), (12, 10)):
        ids, starts, cut = TextTokenizer(tokenizer, Template(), length).embedded([TEXT])
        assert (ids, starts, cut) == ([[BOS, *GOLDEN[:keep], EOS]], [1], int(keep < len(GOLDEN)))


def test_cut_texts_are_counted(tokenizer, adds_bos):
    texts = TextTokenizer(tokenizer, Template(), len(GOLDEN) + adds_bos)
    ids, _, cut = texts.embedded([TEXT, TEXT + " Og mere.", "a", TEXT * 3])
    assert cut == 2
    assert [len(one) for one in ids] == [texts.length, texts.length, 1 + adds_bos, texts.length]
    assert ids[1] == ids[0]


def test_a_header_that_leaves_no_room_is_refused(tokenizer):
    texts = TextTokenizer(tokenizer, CHAT, 24)
    with pytest.raises(RecipeError) as caught:
        texts.embedded(["Hunden"], "En lang instruktion der fylder det hele")
    message = str(caught.value)
    assert "length 24 leaves no room for the text: template and instruction take" in message
    assert "raise length or shorten the instruction" in message
    taken = int(message.split("take ")[1].split()[0])
    TextTokenizer(tokenizer, CHAT, taken + 1).embedded(["Hunden"], "En lang instruktion der fylder det hele")
    with pytest.raises(RecipeError):
        TextTokenizer(tokenizer, CHAT, taken).embedded(["Hunden"], "En lang instruktion der fylder det hele")


def test_documents_are_never_cut(tokenizer, sentences, adds_bos):
    document = " ".join(sentences[:40])
    (ids,) = TextTokenizer(tokenizer, CHAT, 16).documents([document])
    assert len(ids) > 256 and tokenizer.decode(ids) == "<s>" * adds_bos + document


def test_the_mask_token_is_one_token(tokenizer):
    texts = TextTokenizer(tokenizer, Template(), 64)
    assert texts.single("_") == 65 and texts.single("</s>") == EOS
    with pytest.raises(RecipeError, match=r"base\.mask_token 'Hund' is 4 tokens in this tokenizer; choose one"):
        texts.single("Hund")


def test_the_fingerprint_follows_all_that_changes_ids(tokenizer, tokenizer_folder, bos_tokenizer_folder):
    texts = TextTokenizer(tokenizer, CHAT, 64)
    before = texts.fingerprint()
    texts.embedded([TEXT * 9], "Find")
    texts.documents([TEXT])
    assert texts.fingerprint() == before == TextTokenizer(tokenizer, CHAT, 64).fingerprint()
    changed = [TextTokenizer(tokenizer, CHAT, 65), TextTokenizer(tokenizer, Template(), 64)]
    both = [TextTokenizer(load_tokenizer(folder), CHAT, 64) for folder in (tokenizer_folder, bos_tokenizer_folder)]
    assert before not in {one.fingerprint() for one in changed}
    assert both[0].fingerprint() != both[1].fingerprint()


def test_a_tokenizer_that_is_not_there(tmp_path, config_folder):
    for folder in (tmp_path / "nothing", config_folder):
        with pytest.raises(UserError, match="no tokenizer can be loaded") as caught:
            load_tokenizer(str(folder))
        assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_text_keys_are_a_contract():
    """They stand in the caches of tokenised data, so they never change."""
    assert text_key("Hunden") == text_key("Hunden") != text_key("hunden")
    assert text_key(TEXT) == 4033242586849385128
    assert all(0 <= text_key(str(i)) < 2**63 for i in range(100))


def test_ids_are_int64():
    assert as_ids([1, 2]).dtype == np.int64 and as_ids([]).dtype == np.int64


def test_smollm2_golden_ids():
    folder = need_smollm2()
    template = Template(prefix="<|im_start|>user\n", suffix="<|im_end|>")
    texts = TextTokenizer(load_tokenizer(folder), template, 64)
    text = "Hunden på Ærø ser dig, men den gør ikke noget."
    golden = [56, 1145, 264, 273, 27054, 44741, 98, 21817, 1236, 2047, 28, 1800, 4017, 310, 21817, 98]
    golden += [216, 1873, 396, 304, 435, 305, 30]
    assert texts.documents([text]) == [golden]
    (ids,), (start,), _ = texts.embedded([text])
    assert ids[start:] == [*golden, 2]
    assert texts.tokenizer.decode(ids[:start]) == "<|im_start|>user\n"
    assert texts.single("_") == 79


def test_a_tokenizer_with_more_tokens_than_the_base_has_vectors_for(bos_tokenizer_folder):
    tokenizer = load_tokenizer(bos_tokenizer_folder)
    check_vocabulary(tokenizer, 300, Base("some/base"))
    tokenizer.add_tokens(["<|a|>", "<|b|>"])
    with pytest.raises(UserError) as caught:
        check_vocabulary(tokenizer, 300, Base("some/base", tokenizer="other/tokenizer"))
    assert str(caught.value) == (
        "the tokenizer of 'other/tokenizer' has 2 tokens (such as '<|b|>', id 301) for which the base 'some/base', an embedding "
        "of 300 rows, has no vector; use the tokenizer that belongs to the base (base.tokenizer), or train vectors for them "
        "(lora.trainable_tokens)"
    )
    check_vocabulary(tokenizer, 302, Base("some/base"))
    padded = load_tokenizer(bos_tokenizer_folder)
    padded.add_special_tokens({"pad_token": "<|padding|>"})
    check_vocabulary(padded, 300, Base("some/base"))  # nothing is padded
