import itertools
import json

import pytest
import torch

from l2v_kernels.attention.config import ARCHITECTURES, Config, candidates, default, is_medium, is_short
from l2v_kernels.launching import architecture

pytest.importorskip("triton")

from l2v_kernels.attention import tune


def test_every_case_has_a_default_that_the_kernels_can_run():
    for kind, arch, D, itemsize, short in itertools.product(
        ("forward", "query", "key"), ARCHITECTURES, (8, 64, 80, 128, 200, 256), (2, 4), (False, True)
    ):
        config = default(kind, arch, D, itemsize, short)
        # A tile holds at least one token of 8 heads, and dropout's blocks are 16 keys.
        assert config.block_m % 8 == 0 and config.block_n % 16 == 0 and config.num_warps in (4, 8, 16)
        tried = candidates(kind, arch, D, itemsize)
        assert config in tried and len(set(tried)) == len(tried)


def test_tiles_without_dropout():
    for kind, arch, D, short, group, tma in itertools.product(
        ("forward", "query", "key"), ARCHITECTURES, (64, 96, 128, 256), (False, True), (1, 2, 4, 8), (False, True)
    ):
        config = default(kind, arch, D, 2, short, True, tma, group)
        assert config.block_m % 8 == 0 and config.block_n % 16 == 0
        # Descriptors exist from sm_90 on, and only for tensors that they can describe.
        assert not config.tma or (tma and arch >= 90)
        assert config in candidates(kind, arch, D, 2, True, tma)
        assert tma or not any(tried.tma for tried in candidates(kind, arch, D, 2, True, tma))
        # With dropout, causality, a window or softcap nothing has changed.
        assert not default(kind, arch, D, 2, short, False, tma, group).tma
    assert default("forward", 90, 128, 2, False, True, True) == Config(128, 128, 8, 3, tma=True)
    assert default("forward", 90, 128, 2, False, True, True, medium=True) == Config(64, 64, 4, 2, tma=True)
    assert is_medium(128) and not is_medium(512)
    assert default("key", 90, 128, 2, False, True, True, 1) == Config(32, 128, 8, 2, tma=True)


def test_architectures():
    known = {(8, 0): 80, (8, 6): 120, (8, 9): 120, (9, 0): 90, (10, 0): 100, (10, 3): 100, (12, 0): 120, (12, 1): 120}
    assert all(architecture(*capability) == arch for capability, arch in known.items())
    assert is_short(30, 4) and not is_short(128, 4) and is_short(128, 1)


def choose(monkeypatch, tmp_path, mean, calls=None):
    monkeypatch.setenv("L2V_CACHE", str(tmp_path))
    monkeypatch.setattr(tune, "fastest", lambda configs, launch: calls.append(1) or configs[3])
    return tune.choose("forward", torch.zeros(mean * 4, 4, 64), 4, 4, "plain", False, lambda config: None)


def test_no_search_unless_asked(monkeypatch, tmp_path):
    monkeypatch.delenv("L2V_AUTOTUNE", raising=False)
    calls = []
    assert choose(monkeypatch, tmp_path, 30, calls) == default("forward", 80, 64, 4, True)
    assert not calls and not list(tmp_path.iterdir())


def test_a_search_is_kept_on_disk(monkeypatch, tmp_path):
    monkeypatch.setenv("L2V_AUTOTUNE", "1")
    calls, want = [], candidates("forward", 80, 64, 4)[3]
    assert choose(monkeypatch, tmp_path, 30, calls) == choose(monkeypatch, tmp_path, 31, calls) == want
    assert len(calls) == 1
    tune._cache.cache_clear()
    assert choose(monkeypatch, tmp_path, 29, calls) == want and len(calls) == 1
    assert choose(monkeypatch, tmp_path, 300, calls) == want and len(calls) == 2
    (file,) = (tmp_path / "attention").iterdir()
    assert len(json.loads(file.read_text())) == 2 and "triton" in file.name
    file.write_text("{ broken")
    tune._cache.cache_clear()
    assert choose(monkeypatch, tmp_path, 30, calls) == want and len(calls) == 3


def test_the_search_takes_the_fastest_that_runs():
    times = {Config(16, 16, 4, 1): 3.0, Config(32, 16, 4, 1): 1.0, Config(32, 32, 4, 1): 2.0}

    def launch(config):
        if config not in times:
            raise RuntimeError("does not fit")
        return times[config]

    configs = [Config(128, 128, 8, 5), *times]
    assert tune.fastest(configs, launch, time=lambda call: call()) == Config(32, 16, 4, 1)
    assert tune.fastest(configs[:1], launch, time=lambda call: call()) is None
