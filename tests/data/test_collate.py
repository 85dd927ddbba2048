import numpy as np
import pytest
import torch

from l2v.batch import Segment, pack
from l2v.data.collate import Masking, collate, mask

MASK, VOCABULARY, SPECIALS = 65, 300, frozenset({0, 1, 2})


class Rows:
    """Examples from a list; each is one or more segments of given lengths."""

    def __init__(self, lengths: list[list[int]], seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        self.ids = [[random.integers(100, VOCABULARY, n) for n in example] for example in lengths]

    def __getitem__(self, index: int) -> list[Segment]:
        return [Segment(ids, example=index, column=column) for column, ids in enumerate(self.ids[index])]


def masking(p: float = 0.2, split=(0.8, 0.1, 0.1), specials=SPECIALS) -> Masking:
    return Masking(p, split, MASK, VOCABULARY, specials)


def by_address(batch) -> dict[tuple[int, int], tuple[list[int], list[tuple[int, int]]]]:
    """(example, column) -> the ids shown and the (row, label) pairs of that segment."""
    out = {}
    starts = batch.cu_seqlens.tolist()
    labels = dict(zip((batch.label_index_L + 1).tolist(), batch.labels_L.tolist(), strict=True))
    for s, address in enumerate(zip(batch.example_ids_S.tolist(), batch.columns_S.tolist(), strict=True)):
        begin, end = starts[s], starts[s + 1]
        rows = [(i - begin, labels[i]) for i in range(begin, end) if i in labels]
        out[address] = (batch.input_ids_T[begin:end].tolist(), rows)
    return out


@pytest.fixture(scope="module")
def large():
    """60,000 tokens in segments of 150, of which a tenth are special."""
    rows = Rows([[150] * 4 for _ in range(100)])
    for example in rows.ids:
        for ids in example:
            ids[::10] = 1
    return rows


def test_the_right_share_is_hidden_in_the_right_way(large):
    plain = collate(large, list(range(100)), seed=3, step=5)
    batch = collate(large, list(range(100)), seed=3, step=5, masking=masking())
    may = (plain.position_ids_T > 0) & (plain.input_ids_T > 2)
    hidden = torch.zeros_like(may)
    hidden[batch.label_index_L + 1] = True
    n = int(hidden.sum())
    assert abs(n / int(may.sum()) - 0.2) < 0.009  # 54,000 draws: five standard deviations
    assert not (hidden & ~may).any()
    assert torch.equal(batch.input_ids_T[~hidden], plain.input_ids_T[~hidden])

    shown, true = batch.input_ids_T[hidden], plain.input_ids_T[hidden]
    as_mask = (shown == MASK).float().mean().item()
    kept = (shown == true).float().mean().item()
    assert abs(as_mask - 0.8) < 0.02 and abs(kept - 0.1) < 0.016  # 10,800 draws
    random = shown[(shown != MASK) & (shown != true)]
    assert abs(len(random) / n - 0.1) < 0.016
    counts = torch.bincount(random, minlength=VOCABULARY)
    assert len(counts) == VOCABULARY and (counts > 0).float().mean() > 0.9
    assert abs(random.float().mean().item() - VOCABULARY / 2) < 15


def test_labels_are_the_true_ids_and_stand_one_before(large):
    plain = collate(large, [4, 7, 9], seed=3, step=5)
    batch = collate(large, [4, 7, 9], seed=3, step=5, masking=masking())
    assert len(batch.labels_L) > 100
    assert torch.equal(plain.input_ids_T[batch.label_index_L + 1], batch.labels_L)
    segment_T = torch.arange(len(plain.lengths)).repeat_interleave(torch.tensor(plain.lengths))
    assert torch.equal(segment_T[batch.label_index_L], segment_T[batch.label_index_L + 1])
    assert (batch.label_index_L.diff() > 0).all()


def test_nothing_else_of_the_batch_changes(large):
    plain = collate(large, [1, 2], seed=3, step=5)
    batch = collate(large, [1, 2], seed=3, step=5, masking=masking())
    for name in ("position_ids_T", "cu_seqlens", "pool_mask_T", "example_ids_S", "columns_S", "seeds_S"):
        assert torch.equal(getattr(plain, name), getattr(batch, name)), name
    assert batch.lengths == plain.lengths and plain.label_index_L.numel() == 0
    again = collate(large, [1, 2], seed=3, step=5)
    assert torch.equal(plain.input_ids_T, again.input_ids_T)


def test_special_tokens_and_first_rows_stay_even_when_all_is_hidden():
    rows = Rows([[1], [2], [40], [3, 1, 5]])
    rows.ids[2][0][5:9] = [0, 1, 2, 1]
    batch = collate(rows, [0, 1, 2, 3], seed=0, step=0, masking=masking(p=1.0, split=(1.0, 0.0, 0.0)))
    got = by_address(batch)
    assert [row for row, _ in got[2, 0][1]] == [*range(1, 5), *range(9, 40)]
    assert got[2, 0][0][5:9] == [0, 1, 2, 1]
    assert got[0, 0] == ([rows.ids[0][0][0]], []) and got[3, 1] == ([rows.ids[3][1][0]], [])
    assert got[1, 0] == ([rows.ids[1][0][0], MASK], [(1, rows.ids[1][0][1])])
    assert len(batch.labels_L) == 1 + 35 + 2 + 4


@pytest.mark.parametrize(("split", "check"), [((1.0, 0.0, 0.0), "mask"), ((0.0, 0.0, 1.0), "keep")])
def test_splits_at_the_border(large, split, check):
    plain = collate(large, list(range(20)), seed=3, step=5)
    batch = collate(large, list(range(20)), seed=3, step=5, masking=masking(0.8, split))
    at = batch.label_index_L + 1
    expected = torch.full_like(at, MASK) if check == "mask" else plain.input_ids_T[at]
    assert torch.equal(batch.input_ids_T[at], expected)
    may = int(((plain.position_ids_T > 0) & (plain.input_ids_T > 2)).sum())
    assert abs(len(at) / may - 0.8) < 0.02


def test_the_pack_plays_no_part():
    rows = Rows([[9, 30], [17], [25, 4, 12], [40], [33]])
    whole = by_address(collate(rows, [0, 1, 2, 3, 4], seed=7, step=2, masking=masking(0.5)))
    turned = by_address(collate(rows, [3, 1, 4, 0, 2], seed=7, step=2, masking=masking(0.5)))
    assert turned == whole
    parts: dict = {}
    for micro in ([2], [4, 0], [1, 3]):
        parts |= by_address(collate(rows, micro, seed=7, step=2, masking=masking(0.5)))
    assert parts == whole


def test_seed_step_example_and_column_each_draw_their_own():
    text = np.arange(100, 200)

    def rows(seed: int, step: int, example: int, column: int) -> list[int]:
        batch = mask(pack([Segment(text, example=example, column=column)], seed=seed, step=step), masking(0.5))
        return batch.label_index_L.tolist()

    address = (7, 2, 3, 1)
    assert rows(*address) == rows(*address)
    drawn = {tuple(rows(*address))}
    for part in range(4):
        moved = list(address)
        moved[part] += 1
        drawn.add(tuple(rows(*moved)))
    assert len(drawn) == 5


def test_a_longer_text_keeps_the_masks_of_its_beginning():
    ids = np.random.default_rng(0).integers(100, VOCABULARY, 80)
    short, long = (mask(pack([Segment(ids[:n])], seed=1), masking(0.5)) for n in (50, 80))
    assert torch.equal(long.input_ids_T[:50], short.input_ids_T)
    assert [i for i in long.label_index_L.tolist() if i < 49] == short.label_index_L.tolist()


def test_masks_are_a_contract():
    """Masks of a run that resumes must be those of the run that stopped, also after an upgrade: these never change."""
    batch = mask(pack([Segment(np.arange(100, 140), example=5, column=1)], seed=42, step=3), masking())
    assert batch.label_index_L.tolist() == [1, 4, 8, 10, 17, 20, 27, 37]
    assert batch.input_ids_T[batch.label_index_L + 1].tolist() == [65, 65, 65, 18, 65, 65, 275, 65]


def test_nothing_chosen_is_one_token_without_a_loss():
    batch = collate(Rows([[4]]), [], seed=3, step=5, masking=masking(1.0))
    assert batch.tokens == 1 and batch.labels_L.numel() == 0
    assert batch.example_ids_S.tolist() == [-1] and batch.columns_S.tolist() == [-1]
    assert not torch.equal(batch.seeds_S, collate(Rows([[4]]), [0], seed=3, step=5).seeds_S)


def test_columns_of_an_example_lie_side_by_side():
    batch = collate(Rows([[3, 2], [1], [2, 2, 2]]), [2, 0], seed=0, step=0)
    assert batch.example_ids_S.tolist() == [2, 2, 2, 0, 0]
    assert batch.columns_S.tolist() == [0, 1, 2, 0, 1]
    assert batch.lengths == [2, 2, 2, 3, 2]
