import datasets
import numpy as np
import pytest

from l2v.data.examples import MntpBlocks, Pairs, Views
from l2v.data.sources import PAIRS, TEXTS
from l2v.data.tokens import TextTokenizer, load_tokenizer, text_key
from l2v.errors import UserError
from l2v.recipe import Template

CHAT = Template(prefix="</s>bruger\n", suffix="</s>", instruction="{instruction}: ")


@pytest.fixture(scope="module")
def tokenizer(bos_tokenizer_folder):
    return load_tokenizer(bos_tokenizer_folder)


def text_rows(texts: list[str]) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"text": texts}, features=TEXTS)


def pair_rows(*pairs: dict) -> datasets.Dataset:
    empty = {"negatives": [], "instruction": None, "document_instruction": None}
    return datasets.Dataset.from_list([empty | pair for pair in pairs], features=PAIRS)


@pytest.mark.parametrize("length", [2, 7, 33, 64, 10_000])
@pytest.mark.parametrize("document_mask", [True, False])
def test_blocks_are_the_token_stream_cut_in_equal_parts(tokenizer, sentences, length, document_mask):
    documents = [sentences[0], "a", *sentences[1:9], "b", "c"]
    texts = TextTokenizer(tokenizer, CHAT, length)
    whole = texts.documents(documents)
    stream = np.concatenate(whole)
    starts = set(np.cumsum([0, *map(len, whole[:-1])]).tolist())
    blocks = MntpBlocks(text_rows(documents), texts, document_mask=document_mask)

    left = len(stream) % length
    kept = len(stream) - (left if left == 1 else 0)
    assert len(blocks) == len(blocks.lengths) == -(-kept // length)
    assert blocks.lengths.sum() == kept
    assert set(blocks.lengths[:-1].tolist()) <= {length}
    assert blocks.segments.tolist() == [1] * len(blocks)

    at = 0
    for index in range(len(blocks)):
        block = blocks[index]
        assert [s.example for s in block] == [index] * len(block)
        assert [s.column for s in block] == list(range(len(block)))
        assert all(s.pool_start == 0 and s.ids.dtype == np.int64 for s in block)
        assert sum(map(len, block)) == blocks.lengths[index]
        if not document_mask:
            assert len(block) == 1
        for i, segment in enumerate(block):
            if document_mask:
                assert i == 0 or at in starts
                assert not starts & set(range(at + 1, at + len(segment)))
            assert segment.ids.tolist() == stream[at : at + len(segment)].tolist()
            at += len(segment)
    assert at == kept


def test_blocks_are_read_in_any_order(tokenizer, sentences):
    blocks = MntpBlocks(text_rows(sentences[:20]), TextTokenizer(tokenizer, CHAT, 32))
    forwards = [[s.ids.tolist() for s in blocks[i]] for i in range(len(blocks))]
    backwards = [[s.ids.tolist() for s in blocks[i]] for i in reversed(range(len(blocks)))]
    assert forwards == backwards[::-1]


def test_a_last_block_of_one_token_is_left_out(tokenizer):
    texts = TextTokenizer(tokenizer, CHAT, 4)
    assert [len(ids) for ids in texts.documents(["1234", "123"])] == [5, 4]
    blocks = MntpBlocks(text_rows(["1234", "123"]), texts)
    assert blocks.lengths.tolist() == [4, 4]
    assert MntpBlocks(text_rows(["1234", "1234"]), texts).lengths.tolist() == [4, 4, 2]


def test_documents_of_one_token_have_nothing_to_predict(tokenizer_folder):
    texts = TextTokenizer(load_tokenizer(tokenizer_folder), CHAT, 4)
    with pytest.raises(UserError, match="fewer than 2 tokens"):
        MntpBlocks(text_rows(["a"]), texts)


def test_what_is_told_of_documents(tokenizer, sentences):
    texts = TextTokenizer(tokenizer, CHAT, 32)
    total = sum(map(len, texts.documents(sentences[:9])))
    blocks = MntpBlocks(text_rows(sentences[:9]), texts)
    assert blocks.notes == [f"9 documents, {total} tokens, {len(blocks)} blocks of 32"]


def test_views_are_one_text_at_two_addresses(tokenizer, sentences):
    texts = TextTokenizer(tokenizer, CHAT, 64)
    views = Views(text_rows([*sentences[:5], sentences[0]]), texts)
    ids, starts, _ = texts.embedded(sentences[:5])
    assert len(views) == 6
    for i in range(5):
        first, second = views[i]
        assert first.ids.tolist() == second.ids.tolist() == ids[i]
        assert first.pool_start == second.pool_start == starts[i] > 1
        assert (first.example, second.example) == (i, i) and (first.column, second.column) == (0, 1)
        assert first.text_key == second.text_key == text_key(sentences[i])
        assert views.lengths[i] == 2 * len(ids[i]) and views.segments[i] == 2
    assert views[5][0].text_key == views[0][0].text_key != views[1][0].text_key


def test_pairs_are_query_positive_and_as_many_negatives_as_there_are(tokenizer):
    texts = TextTokenizer(tokenizer, CHAT, 64)
    rows = [
        {"query": "Hvem?", "positive": "Hunden.", "negatives": ["Katten.", "Koen.", "Hesten."]},
        {"query": "Hvor?", "positive": "Skoven.", "negatives": []},
        {"query": "Hvad?", "positive": "Havet.", "negatives": ["Skoven."]},
    ]
    for most in (0, 1, 2, 5, "auto"):
        pairs = Pairs(pair_rows(*rows), texts, max_negatives=most)
        assert len(pairs) == 3
        for i, row in enumerate(rows):
            expected = [row["query"], row["positive"], *row["negatives"][: 7 if most == "auto" else most]]
            ids, starts, _ = texts.embedded(expected)
            segments = pairs[i]
            assert [s.ids.tolist() for s in segments] == ids
            assert [s.pool_start for s in segments] == starts
            assert [s.column for s in segments] == list(range(len(expected)))
            assert {s.example for s in segments} == {i}
            assert [s.text_key for s in segments] == [text_key(t) for t in expected]
            assert pairs.segments[i] == len(expected) and pairs.lengths[i] == sum(map(len, ids))
    last = Pairs(pair_rows(*rows), texts, max_negatives=1)
    assert last[1][1].text_key == last[2][2].text_key


def test_instructions_stand_before_their_own_side(tokenizer):
    texts = TextTokenizer(tokenizer, CHAT, 64)
    row = {"query": "Hvem?", "positive": "Hunden.", "negatives": ["Katten."]}
    both = {"instruction": "Find", "document_instruction": "Svar"}
    query, positive, negative = Pairs(pair_rows(row | both), texts)[0]
    assert tokenizer.decode(query.ids[: query.pool_start]) == "<s></s>bruger\nFind:"
    assert tokenizer.decode(positive.ids[: positive.pool_start]) == "<s></s>bruger\nSvar:"
    assert tokenizer.decode(negative.ids) == "<s></s>bruger\nSvar: Katten.</s>"
    alone = Pairs(pair_rows(row), texts)[0]
    assert query.text_key == alone[0].text_key
    assert tokenizer.decode(alone[0].ids) == "<s></s>bruger\nHvem?</s>"


def test_cut_texts_are_told(tokenizer, sentences):
    texts = TextTokenizer(tokenizer, Template(), 10)
    cut = texts.embedded(sentences[:3])[2]
    assert cut == 3
    told = "3 texts were longer than 10 tokens and were truncated; raise `length` to keep them whole"
    views = Views(text_rows([*sentences[:3], "a"]), texts)
    assert views.notes == ["4 texts, 32 tokens", told]
    pairs = Pairs(pair_rows({"query": sentences[0], "positive": sentences[1], "negatives": [sentences[2]]}), texts)
    assert pairs.notes == ["1 pairs, 30 tokens", told, "1 hard negatives, up to 1 a row"]
    assert Views(text_rows(["a"]), texts).notes == ["1 texts, 2 tokens"]


def test_the_notes_count_hard_negatives_used_and_unused(tokenizer, sentences):
    texts = TextTokenizer(tokenizer, Template(), 64)
    counts = [9, 0, 2, 1]
    pairs = pair_rows(
        *(
            {"query": f"{n}?", "positive": f"{n}.", "negatives": sentences[10 * n : 10 * n + k]}
            for n, k in enumerate(counts)
        )
    )

    def notes(**options):
        return Pairs(pairs, texts, **options).notes[1:]

    used = "10 hard negatives, up to 7 a row; 1 rows have none"
    assert notes() == [used, "2 of 12 hard negatives are unused: max_negatives is auto (at most 7 a row)"]
    assert notes(max_negatives=9) == ["12 hard negatives, up to 9 a row; 1 rows have none"]
    three = [
        "3 hard negatives, up to 1 a row; 1 rows have none",
        "9 of 12 hard negatives are unused: max_negatives is 1",
    ]
    assert notes(max_negatives=1) == three
    assert notes(max_negatives=0) == ["12 of 12 hard negatives are unused: max_negatives is 0"]
    none = Pairs(pair_rows({"query": "a", "positive": "b"}), texts, max_negatives=3).notes
    assert none[1:] == ["no row has hard negatives; a query's negatives are the other texts of its batch"]
    segments = [len(pair) - 2 for pair in Pairs(pairs, texts)]
    assert segments == [7, 0, 2, 1]


def test_the_notes_count_questions_that_occur_more_than_once(tokenizer):
    texts = TextTokenizer(tokenizer, Template(), 64)
    asked = ["Hvem?", "Hvor?", "Hvem?", "Hvad?", "Hvem?", "Hvor?"]
    rows = pair_rows(*({"query": q, "positive": f"{n}.", "negatives": ["x"]} for n, q in enumerate(asked)))
    note = "5 of 6 queries occur more than once; their answers are not negatives of each other"
    assert Pairs(rows, texts).notes[-1] == note
    trained = "5 of 6 queries occur more than once; mask_duplicates: false makes their answers negatives of each other"
    assert Pairs(rows, texts, mask_duplicates=False).notes[-1] == trained
    assert "more than once" not in " ".join(Pairs(rows.select([0, 1, 3]), texts).notes)


def test_cut_texts_are_counted_over_all_batches_of_rows(tokenizer, sentences):
    texts = TextTokenizer(tokenizer, Template(), 10)
    views = Views(text_rows([sentences[i % 240] for i in range(2100)]), texts)
    assert views.notes[1].startswith("2100 texts were longer than 10 tokens")


def test_another_length_or_number_of_negatives_is_tokenised_again(tokenizer, tmp_path, sentences):
    row = {"query": sentences[0], "positive": sentences[1], "negatives": [sentences[2], sentences[3]]}
    empty = {"instruction": None, "document_instruction": None}
    saved = tmp_path / "rows"
    datasets.Dataset.from_list([row | empty], features=PAIRS).save_to_disk(saved)
    rows = datasets.load_from_disk(str(saved))
    assert rows.cache_files
    lengths = {}
    for length in (12, 64):
        for most in (1, 2):
            texts = TextTokenizer(tokenizer, Template(), length)
            lengths[length, most] = int(Pairs(rows, texts, max_negatives=most).lengths[0])
    assert lengths[12, 1] == 36 and lengths[12, 2] == 48
    assert lengths[64, 1] > 36 and lengths[64, 2] > lengths[64, 1]
    templated = Pairs(rows, TextTokenizer(tokenizer, CHAT, 64), max_negatives=1)
    assert templated.lengths[0] > lengths[64, 1]
