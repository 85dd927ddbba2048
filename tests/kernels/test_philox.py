import pytest
import torch

from l2v_kernels import philox4x32
from l2v_kernels.philox import keep_bytes, keep_scale, threshold

# kat_vectors of Random123: counter, key, words after 7 rounds
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "5f6fb709 0d893f64 4f121f81 4f730a48"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "5207ddc2 45165e59 4d8ee751 8c52f662"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "4dfccaba 190a87f0 c47362ba b6b5242a"),
]


def philox_python(k0, k1, c0, c1, c2, c3, rounds=7):
    """Philox4x32 on Python integers, from the paper."""
    for _ in range(rounds):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & 0xFFFFFFFF, (a >> 32) ^ c3 ^ k1, a & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def byte_python(seed, row, column, stream, domain):
    words = philox_python(seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF, column // 16, row, stream, domain)
    return words[column % 16 // 4] >> 8 * (column % 4) & 0xFF


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_known_answers(counter, key, words):
    counter, key, words = ([int(x, 16) for x in text.split()] for text in (counter, key, words))
    assert [int(word) for word in philox4x32(*key, *counter)] == words
    assert list(philox_python(*key, *counter)) == words


def test_random_addresses_against_python():
    inputs = torch.randint(0, 2**32, (6, 200))
    got = torch.stack(philox4x32(*inputs), 1).tolist()
    assert got == [list(philox_python(*column)) for column in inputs.t().tolist()]


def test_broadcasts_every_combination_of_shapes():
    full = torch.randint(0, 2**32, (6, 3, 5))
    for i in range(6):
        inputs = [full[j] if i == j else full[j, 0, 0] for j in range(6)]
        expected = philox4x32(*(x.expand(3, 5).clone() for x in inputs))
        for got, want in zip(philox4x32(*inputs), expected, strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("n_columns", [0, 1, 15, 16, 37])
def test_keep_bytes_against_python(n_columns):
    seeds = torch.tensor([[-1], [0], [2**62 + 12345]])
    rows = torch.tensor([0, 1, 2**31 - 1, 7], dtype=torch.int32)
    got = keep_bytes(seeds, rows, n_columns, stream=2**32 - 1, domain=2)
    assert got.shape == (3, 4, n_columns) and got.dtype == torch.uint8
    for i, seed in enumerate(seeds.flatten().tolist()):
        for j, row in enumerate(rows.tolist()):
            assert got[i, j].tolist() == [byte_python(seed, row, c, 2**32 - 1, 2) for c in range(n_columns)]


def test_keep_bytes_takes_a_domain_for_each_row():
    domain = torch.tensor([[257], [1]])
    got = keep_bytes(torch.tensor(9), torch.arange(3), 20, 4, domain)
    for i, d in enumerate((257, 1)):
        assert torch.equal(got[i], keep_bytes(torch.tensor(9), torch.arange(3), 20, 4, d))


def test_keep_bytes_does_not_depend_on_the_chunks(monkeypatch):
    seeds, rows = torch.randint(-(2**62), 2**62, (50,)), torch.arange(50)
    whole = keep_bytes(seeds, rows, 70, 1, 0)
    monkeypatch.setattr("l2v_kernels.philox._CALLS_ON_CPU", 7)
    assert torch.equal(keep_bytes(seeds, rows, 70, 1, 0), whole)


def test_bytes_are_uniform():
    data = keep_bytes(torch.randint(-(2**62), 2**62, (400,)), torch.arange(400), 640, 3, 0)
    counts = torch.bincount(data.flatten().int(), minlength=256).double()
    expected = data.numel() / 256
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert 150 < chi_square < 380  # 255 degrees of freedom: mean 255, standard deviation 22.6


def test_threshold_quantises():
    assert [threshold(p) for p in (0.0, 0.05, 0.3, 0.5)] == [0, 13, 77, 128]
    assert keep_scale(0.05) == 256 / 243
    for p in (-0.1, 1.0, 2.0, 0.999, float("nan")):
        with pytest.raises(ValueError, match="drop probability"):
            threshold(p)


@pytest.mark.parametrize(("stream", "n_columns"), [(-1, 4), (2**32, 4), (0, -1)])
def test_bad_addresses(stream, n_columns):
    with pytest.raises(ValueError, match="32 bits"):
        keep_bytes(torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), n_columns, stream, 0)
