"""`l2v verify --url`: servers that read an export as vLLM and Text Embeddings Inference do, and how one differs or fails."""

import pytest
from support.engine_rules import Tei, Vllm
from support.export_server import served

from l2v import Encoder
from l2v.commands import main as cli
from l2v.errors import UserError
from l2v.recipe import Template
from l2v.recipe.instructions import Instructions
from l2v.serving.remote import Endpoint
from l2v.serving.verify import verify


@pytest.fixture(scope="module")
def exports(tmp_path_factory, base):
    """One that pools everything, with EOS and an instruction, and one of the default."""
    out = {}
    for name, options in {"all": {"pool_prompt": True}, "text": {}}.items():
        encoder = Encoder.from_pretrained(
            base, precision="fp32", length=40, template=Template(suffix="</s>"), **options
        )
        encoder.instructions = Instructions(("Find svaret:\n",), ("",))
        out[name] = tmp_path_factory.mktemp("remote") / name
        encoder.save(out[name])
    return out


def row(folder, url, precision="fp32"):
    return verify(folder, engines=[Endpoint(url, precision)], log=lambda _: None).rows[0]


def mistake(folder, url):
    """What is said of a server that gives no vectors."""
    with pytest.raises(UserError) as error:
        Endpoint(url, "fp32").open(folder)(["a"] * 8, None)
    return str(error.value)


@pytest.mark.parametrize("rules", [Vllm, pytest.param(Tei, marks=pytest.mark.slow)])
def test_a_server_gives_the_vectors_where_everything_is_pooled(exports, rules, capsys, monkeypatch):
    """Short, cut and instructed texts; the answers come in another order. It cannot for the default, and that shows."""
    monkeypatch.setattr("l2v.serving.verify.ENGINES", [])
    with served(rules(exports["all"])) as url:
        assert cli.main(["verify", str(exports["all"]), "--url", url, "--url-precision", "fp32"]) == 0
        line = next(line for line in capsys.readouterr().out.splitlines() if url in line)
        assert line.split()[1] == "same"
    with served(rules(exports["text"])) as url:
        found = row(exports["text"], url, "fp16")
        assert found.same is False and found.cosine > 0.01


def test_limits_are_those_of_the_precision_that_it_runs_in(exports):
    class Rounded(Vllm):
        def encode(self, texts, dimensions=None):
            return super().encode(texts, dimensions).half().float()

    with served(Rounded(exports["all"])) as url:
        assert row(exports["all"], url, "fp16").same and row(exports["all"], url).same is False


def test_a_server_that_fails_is_said_to(exports):
    folder, rules = exports["all"], Vllm(exports["all"])
    with served(rules) as url:
        assert Endpoint(f"{url}#tiny", "fp32").open(folder)(["a"], None).shape == (1, 32)
        assert "status 404" in mistake(folder, f"{url}#huge")
    for broken, said in ((401, "status 401"), (413, "status 413"), (3, "asked for 8 vectors and got 3")):
        with served(rules, broken=broken) as url:
            assert said in mistake(folder, url)
    with served(rules, owner="l2v") as url:
        assert "l2v serve, which puts the template itself" in mistake(folder, url)
    found = row(folder, url)  # it is gone
    assert found.same is False and "does not answer" in found.note


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "tiny", "ftp://127.0.0.1/v1", "http://#tiny"])
def test_what_is_no_url_is_said_before_anything_is_loaded(exports, url, capsys):
    with pytest.raises(UserError, match="no URL"):
        Endpoint(url, "fp16")
    assert cli.main(["verify", str(exports["all"]), "--url", url]) == 1
    assert f"--url {url}: no URL" in capsys.readouterr().err
