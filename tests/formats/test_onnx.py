"""ONNX graphs of small exports: the vectors of the Encoder in ONNX Runtime and in sentence-transformers."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3TextConfig, LlamaConfig, Qwen3Config

from l2v import Encoder
from l2v.errors import UserError
from l2v.formats import facts
from l2v.formats.onnx_engine import check_precisions, encode, open_session, padded
from l2v.formats.onnx_export import write_onnx
from l2v.formats.onnx_graph import Band, Graph

pytestmark = pytest.mark.filterwarnings("ignore")
SIZES = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "initializer_range": 0.2, "pad_token_id": 2, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
GEMMA = Gemma3TextConfig(
    **SIZES, num_hidden_layers=3, sliding_window=8, layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    query_pre_attn_scalar=8,
)  # fmt: skip


@pytest.fixture(scope="module")
def export(tmp_path_factory, bos_tokenizer_folder, tokenizer_folder):
    """export(config, length=..., **options) -> (Encoder, folder): a random base of that configuration, exported."""

    def make(config, length=64, bos=True, **options):
        base, folder = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("export") / "encoder"
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(base)
        AutoTokenizer.from_pretrained(bos_tokenizer_folder if bos else tokenizer_folder).save_pretrained(base)
        encoder = Encoder.from_pretrained(base, precision="fp32", length=length, **options)
        encoder.save(folder)
        return encoder, folder

    return make


@pytest.fixture(scope="module")
def llama(export):
    return export(LlamaConfig(**SIZES, num_hidden_layers=2, tie_word_embeddings=False))


def bands(folder):
    return Graph(facts.Export.read(folder)).bands


def test_the_module_gives_the_vectors_of_the_encoder(llama, sentences):
    """Padded on either side, alone, with tokens in front that are not pooled; no runtime is needed for this."""
    encoder, folder = llama
    graph, read = Graph(facts.Export.read(folder)), facts.Export.read(folder)
    texts = [*sentences[:3], "ja", sentences[5] * 20]
    ids, starts, cut = read.tokenizer.embedded(texts)
    assert set(starts) == {1} and cut == 1 and graph.bands == (Band(None, None),)
    feed = {name: torch.from_numpy(x) for name, x in padded(ids).items()}
    want = encoder.encode(texts)
    with torch.no_grad():
        _, found = graph(**feed, pool_start=torch.tensor([1]))
        _, all_pooled = graph(**feed, pool_start=torch.tensor([0]))
        _, left = graph(**{name: x.flip(1) for name, x in left_padded(feed).items()}, pool_start=torch.tensor([1]))
    np.testing.assert_allclose(found.numpy(), want, atol=2e-6)
    np.testing.assert_allclose(left.numpy(), want, atol=2e-6)
    assert np.abs(all_pooled.numpy() - want).max() > 1e-2


def left_padded(feed):
    """The same rows, padded on the left and reversed, so that `flip` gives them in order."""
    lengths = feed["attention_mask"].sum(1)
    rows = [
        {name: torch.cat([x[i, : lengths[i]].flip(0), x[i, lengths[i] :]]) for name, x in feed.items()}
        for i in range(len(lengths))
    ]
    return {name: torch.stack([row[name] for row in rows]) for name in feed}


@pytest.mark.parametrize(
    ("config", "options", "band"),
    [
        (GEMMA, {}, None),
        (LlamaConfig(**SIZES, num_hidden_layers=1), {"attention": "causal", "pooling": "last"}, (Band(None, 0),)),
        (Qwen3Config(**SIZES, num_hidden_layers=1), {"pooling": "weighted_mean", "bos": False}, (Band(None, None),)),
    ],
    ids=["gemma", "causal", "qwen"],
)
def test_other_families_directions_and_poolings(export, config, options, band, sentences):
    encoder, folder = export(config, length=40, **options)
    graph, read = Graph(facts.Export.read(folder)), facts.Export.read(folder)
    if band is None:  # its windows, which are shorter than the texts; how wide they are is the export's choice
        narrow = [b for b in graph.bands if b.left is not None]
        assert len(graph.bands) == 2 and narrow and narrow[0].left == narrow[0].right in (4, 8)
    else:
        assert graph.bands == band
    texts = [sentences[3] * 3, "nej", sentences[8]]
    ids, starts, _ = read.tokenizer.embedded(texts)
    with torch.no_grad():
        feed = {name: torch.from_numpy(x) for name, x in padded(ids).items()}
        _, found = graph(**feed, pool_start=torch.tensor([starts[0]]))
    np.testing.assert_allclose(found.numpy(), encoder.encode(texts), atol=3e-6)


def test_a_mask_that_is_no_band_is_refused():
    from l2v.formats.onnx_graph import _band

    blocks = torch.block_diag(torch.ones(4, 4), torch.ones(4, 4)).bool()[None, None]
    with pytest.raises(UserError, match="not a window around each token"):
        _band(blocks, 8)
    band = (torch.arange(8)[None] - torch.arange(8)[:, None]).abs() <= 2
    assert _band(torch.where(band, 0.0, -1e9)[None, None], 8) == Band(2, 2)


@pytest.fixture(scope="module")
def written(llama):
    """Every precision of the Llama."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    encoder, folder = llama
    return encoder, folder, {each.precision: each for each in write_onnx(folder, ["int8", "fp32", "fp16"])}


@pytest.mark.slow
def test_onnx_runtime_gives_the_same_vectors(written, sentences):
    encoder, folder, files = written
    texts = [*sentences[10:40], "æ", sentences[1] * 30, "Hvad er det? 🙂"]
    for instruction in (None, "Find svaret"):
        want = encoder.encode(texts, instruction)
        np.testing.assert_allclose(encode(folder, texts, instruction), want, atol=1e-5)
        half = encode(folder, texts, instruction, precision="fp16")
        assert 1e-6 < (1 - (half * want).sum(1)).max() < 1e-3
        small = encode(folder, texts, instruction, precision="int8")
        assert (small * want).sum(1).min() > 0.98
    np.testing.assert_allclose(encode(folder, texts[:1]), encoder.encode(texts[:1]), atol=1e-5)
    assert files["fp32"].entry <= 1e-5 and files["fp16"].cosine <= 1e-3


@pytest.mark.slow
def test_the_graph_says_what_it_is_and_nothing_of_this_machine(written):
    import onnx

    _, folder, files = written
    for precision, each in files.items():
        model = onnx.load(each.file)
        onnx.checker.check_model(model)
        assert str(folder.parent).encode() not in each.file.read_bytes() and b".py" not in each.file.read_bytes()
        session = open_session(folder, precision)
        assert [x.name for x in session.get_inputs()] == ["input_ids", "attention_mask"]
        assert [x.name for x in session.get_overridable_initializers()] == ["pool_start"]
        assert session.get_outputs()[1].shape[-1] == 32
        if precision == "fp32":
            said = json.loads(session.get_modelmeta().custom_metadata_map["l2v"])
            assert said == {
                "attention": "bidirectional", "pooling": "mean", "normalize": True, "length": 64, "header": "<s>",
            }  # fmt: skip
            names = {node.name for node in model.graph.node if node.op_type == "MatMul"}
            assert "decoder.layers.1.mlp.down_proj" in names
        if precision == "int8":
            assert sum(node.op_type == "MatMulInteger" for node in model.graph.node) == 14 - len(each.floats)


@pytest.mark.slow
def test_the_last_token_reaches_the_first_state(written):
    _, folder, _ = written
    session = open_session(folder)
    ids = np.arange(20, 32)[None]
    other = ids.copy()
    other[0, -1] = 99
    states = [session.run(["last_hidden_state"], padded(x.tolist()))[0][0, 0] for x in (ids, other)]
    assert np.abs(states[0] - states[1]).max() > 1e-3


@pytest.mark.slow
def test_sentence_transformers_loads_it(written, sentences):
    pytest.importorskip("optimum.onnxruntime.modeling", exc_type=ImportError)  # its 0.1 needs transformers 4
    from sentence_transformers import SentenceTransformer

    encoder, folder, _ = written
    for name, bar in (("model.onnx", 1e-5), ("model_fp16.onnx", 1e-2)):
        model = SentenceTransformer(str(folder), backend="onnx", model_kwargs={"file_name": f"onnx/{name}"})
        np.testing.assert_allclose(model.encode(sentences[:8]), encoder.encode(sentences[:8]), atol=bar)


@pytest.mark.slow
def test_windows_hold_in_onnx_runtime(export, sentences):
    pytest.importorskip("onnxruntime")
    encoder, folder = export(GEMMA, length=60)
    write_onnx(folder)
    texts = [sentences[i] * 4 for i in range(6)] + ["kort"]
    np.testing.assert_allclose(encode(folder, texts), encoder.encode(texts), atol=1e-5)


def test_a_layer_with_one_large_channel_stays_in_float(llama):
    from l2v.formats.onnx_int8 import sensitive_layers

    _, folder = llama
    graph = Graph(facts.Export.read(folder))
    ids = [list(range(20, 50)), list(range(100, 130))]
    layer = graph.decoder.layers[1].mlp
    plain = sensitive_layers(graph, ids, [1, 1])
    assert "decoder.layers.1.mlp.down_proj" not in plain
    with torch.no_grad():  # one channel a thousand times the others, as a massive activation
        layer.up_proj.weight[3] *= 1000
        layer.down_proj.weight[:, 3] /= 1000
    assert "decoder.layers.1.mlp.down_proj" in sensitive_layers(graph, ids, [1, 1])


def test_mistakes_are_one_sentence(tmp_path):
    with pytest.raises(UserError, match="no ONNX precision 'int4'; choose from fp32, fp16, int8"):
        check_precisions(["fp32", "int4"])
    with pytest.raises(UserError, match="not an export of l2v; write one with 'l2v export RUN"):
        facts.Export.read(tmp_path)
    pytest.importorskip("onnxruntime")
    (tmp_path / "onnx").mkdir()
    with pytest.raises(
        UserError, match=r"model_fp16\.onnx: not found; write it with 'l2v export MODEL .* --onnx fp16'"
    ):
        open_session(tmp_path, "fp16")


def test_a_package_of_the_extra_that_is_missing_is_named():
    with pytest.raises(
        UserError, match=r"needs the package not_there, which is not installed: pip install 'l2v\[onnx\]'"
    ):
        facts.need("onnx", "json", "not_there")


def test_a_graph_with_other_vectors_is_not_kept(llama, monkeypatch):
    pytest.importorskip("onnxscript")
    from l2v.formats import onnx_export

    _, folder = llama
    before = sorted(path.name for path in folder.rglob("*"))
    monkeypatch.setattr(onnx_export, "_write", lambda export, target, chosen: [])
    monkeypatch.setattr(onnx_export.onnx_engine, "encode", lambda *a, **k: np.ones((10, 32), np.float32))
    with pytest.raises(
        UserError, match=r"\(llama\) cannot be written as ONNX: an entry of its vectors would differ by"
    ):
        write_onnx(folder)
    assert sorted(path.name for path in folder.rglob("*")) == before


def test_differences_count_nan_as_far():
    a = np.eye(3, dtype=np.float32)
    assert facts.differences(a * 5, a) == (0, 0)
    assert facts.differences(a, np.roll(a, 1, 1)) == (1, 1)
    assert facts.differences(np.where(a == 1, np.nan, a), a)[1] == np.inf
