import numpy as np
import pytest
import torch

from l2v.batch import PackedBatch, Segment, mix, pack


def ids(*numbers: int) -> np.ndarray:
    return np.asarray(numbers, dtype=np.int64)


THREE = [
    Segment(ids(5, 6, 7), pool_start=1, example=11, column=0, text_key=100, group=4),
    Segment(ids(8), pool_start=0, example=11, column=1, text_key=101),
    Segment(ids(9, 9, 5, 5), pool_start=4, example=12, column=0, text_key=100),
]


def test_a_gpu_gets_a_batch_through_pinned_memory(monkeypatch):
    """A copy from pageable memory waits for the device; nothing is pinned where no GPU is."""
    pinned, copied = [], []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: pinned.append(x) or x.clone())

    def to(x, device, *, non_blocking):
        assert non_blocking
        copied.append(x)
        return x

    batch = pack(THREE)
    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "to", to)
        there = batch.to("cuda:1")
        assert len(pinned) == len(copied) == 13
        assert not {id(x) for x in pinned} & {id(x) for x in copied}, "the pinned copies are what is sent"
        assert there.input_ids_T is copied[0] and there.lengths == batch.lengths
    assert torch.equal(batch.to("cpu").seeds_S, batch.seeds_S) and len(pinned) == 13


def test_segments_lie_one_after_another():
    batch = pack(THREE)
    assert batch.input_ids_T.tolist() == [5, 6, 7, 8, 9, 9, 5, 5]
    assert batch.position_ids_T.tolist() == [0, 1, 2, 0, 0, 1, 2, 3]
    assert batch.cu_seqlens.tolist() == [0, 3, 4, 8]
    assert batch.lengths == [3, 1, 4] and batch.tokens == 8
    assert batch.pool_mask_T.tolist() == [False, True, True, True, False, False, False, False]
    assert batch.example_ids_S.tolist() == [11, 11, 12]
    assert batch.columns_S.tolist() == [0, 1, 0]
    assert batch.text_keys_S.tolist() == [100, 101, 100]
    assert batch.groups_S.tolist() == [4, -1, -1]
    assert batch.label_index_L.numel() == 0 and batch.labels_L.numel() == 0


def test_dtypes_are_those_that_kernels_expect():
    batch = pack(THREE, label_index=[0], labels=[6])
    assert batch.cu_seqlens.dtype == torch.int32 and batch.pool_mask_T.dtype == torch.bool
    for name in ("input_ids_T", "position_ids_T", "example_ids_S", "columns_S", "text_keys_S", "groups_S", "seeds_S"):
        assert getattr(batch, name).dtype == torch.int64, name
    assert batch.label_index_L.dtype == batch.labels_L.dtype == torch.int64
    assert batch.label_index_L.tolist() == [0] and batch.labels_L.tolist() == [6]


def test_a_seed_is_the_address_and_not_the_place():
    seeds = pack(THREE, seed=42, step=7).seeds_S.tolist()
    assert seeds == [mix(42, 7, 11, 0), mix(42, 7, 11, 1), mix(42, 7, 12, 0)]
    assert pack(THREE[::-1], seed=42, step=7).seeds_S.tolist() == seeds[::-1]
    assert pack(THREE[1:2], seed=42, step=7).seeds_S.tolist() == seeds[1:2]


def test_every_part_of_the_address_counts():
    one = Segment(ids(1), example=3, column=1)
    seeds = {
        int(pack([segment], seed=seed, step=step).seeds_S[0])
        for seed, step, segment in [
            (0, 0, one),
            (1, 0, one),
            (0, 1, one),
            (0, 0, Segment(ids(1), example=4, column=1)),
            (0, 0, Segment(ids(1), example=3, column=2)),
            (0, 0, Segment(ids(1), example=1, column=3)),
        ]
    }
    assert len(seeds) == 6
    same_text_elsewhere = Segment(ids(2, 3), pool_start=1, example=3, column=1, text_key=9)
    assert int(pack([same_text_elsewhere]).seeds_S[0]) == int(pack([one]).seeds_S[0])


@pytest.mark.parametrize(
    ("numbers", "value"),
    [
        ((), 5700357409661599242),
        ((0,), 3980143261097177850),
        ((42,), 1474913046063446145),
        ((42, 0, 0, 0), 663639970033872716),
        ((42, 7, 123456, 1), 6403962792304151521),
        ((42, 0, -1, -1), 8071453562911702901),
        ((2**64 + 42,), 1474913046063446145),
        ((2**63,), 7077357458042669065),
    ],
)
def test_mix_is_a_contract(numbers, value):
    """Noise, masks and data order of every checkpoint ever written hang on these numbers: they never change."""
    assert mix(*numbers) == value


def test_mix_folds_splitmix64():
    """The same hash from its published steps (Steele, Lea, Flood 2014), in numpy's own 64-bit arithmetic."""

    def splitmix64(state: np.uint64) -> np.uint64:
        state = state + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return state ^ (state >> np.uint64(31))

    state = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        for number in (42, 7, 123456, 1):
            state = splitmix64(state ^ np.uint64(number))
    assert mix(42, 7, 123456, 1) == int(state) >> 1


def test_mix_spreads_over_63_bits():
    values = [mix(42, step, example) for step in range(20) for example in range(100)]
    assert len(set(values)) == len(values)
    assert all(0 <= value < 2**63 for value in values)
    ones = np.mean([[value >> bit & 1 for bit in range(63)] for value in values], axis=0)
    assert np.all(np.abs(ones - 0.5) < 0.06)  # 2,000 draws: five standard deviations are 0.056


def test_a_text_without_a_key_gets_that_of_its_pooled_tokens():
    pairs = [([1, 7, 8], 1), ([2, 3, 7, 8], 2), ([7, 8], 0), ([1, 7], 1), ([1, 8, 7], 1)]
    keys = pack([Segment(ids(*tokens), start) for tokens, start in pairs]).text_keys_S.tolist()
    assert keys[0] == keys[1] == keys[2], "the header does not count"
    assert len(set(keys)) == 3 and all(0 <= key < 2**63 for key in keys)
    assert pack([Segment(ids(7, 8).astype(np.int32))]).text_keys_S.tolist() == keys[:1]
    assert pack([Segment(ids(7, 8), text_key=0)]).text_keys_S.tolist() == [0], "a given key stays"


def test_to_moves_every_tensor_and_keeps_the_rest():
    batch = pack(THREE, label_index=[0], labels=[6])
    moved = batch.to("meta")
    tensors = {k: v for k, v in vars(moved).items() if isinstance(v, torch.Tensor)}
    assert len(tensors) == 13 and {v.device.type for v in tensors.values()} == {"meta"}
    assert isinstance(moved, PackedBatch) and moved.lengths == batch.lengths
    assert batch.input_ids_T.device.type == "cpu"


def test_a_pack_needs_a_segment():
    with pytest.raises(ValueError, match="at least one segment"):
        pack([])


@pytest.mark.parametrize("start", [-1, 3])
def test_pooling_starts_inside_the_segment_or_at_its_end(start):
    with pytest.raises(ValueError, match=f"pool_start {start} lies outside a segment of 2 tokens"):
        pack([Segment(ids(1, 2), pool_start=start)])
    assert pack([Segment(ids(1, 2), pool_start=2)]).pool_mask_T.tolist() == [False, False]
