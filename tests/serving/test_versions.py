"""Exports in other versions of transformers and sentence-transformers: the same vectors, or a sentence, never causal ones.

L2V_OTHER_PYTHONS names interpreters that have them, with a colon between two. What was seen is in docs/serving.md.
"""

import json
import os
import subprocess

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from l2v import Encoder
from l2v.recipe import Template
from l2v.recipe.instructions import Instructions
from l2v.serving.texts import SAMPLE, long_texts

PYTHONS = [path for path in os.environ.get("L2V_OTHER_PYTHONS", "").split(":") if path]
ASKED = "Find den tekst, der besvarer spørgsmålet:"
VERSIONS = "import transformers, sentence_transformers as s; print(transformers.__version__, s.__version__)"
ENCODE = """
import json, sys, numpy as np
from sentence_transformers import SentenceTransformer
folder, texts, out = sys.argv[1:]
model, texts = SentenceTransformer(folder, device="cpu"), json.load(open(texts))
np.savez(out, plain=model.encode(texts, batch_size=8), query=model.encode(texts, batch_size=8, prompt_name="query"))
"""

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not PYTHONS, reason="L2V_OTHER_PYTHONS names no interpreter")]


def child(python: str, *arguments: str) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run([python, "-c", *arguments], capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module", params=["llama", "smollm2", "gemma3"])
def exported(request, tmp_path_factory, bos_tokenizer_folder, tiny_config):
    """An encoder, its export, and texts of all kinds, in Gemma's case beyond its window too."""
    folder = tmp_path_factory.mktemp(request.param)
    name, template = "smollm2-135m-instruct", None
    if request.param != "smollm2":
        torch.manual_seed(0)
        shape = tiny_config | {
            "initializer_range": 0.2,
            "pad_token_id": None,
            "head_dim": 8,
            "model_type": request.param,
        }
        if request.param == "gemma3":
            shape |= {"model_type": "gemma3_text", "sliding_window": 16, "layer_types": None}
        name, template = str(folder / "base"), Template(prefix="spørg: ", suffix="</s>")
        AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape), dtype=torch.float32).save_pretrained(name)
        AutoTokenizer.from_pretrained(bos_tokenizer_folder).save_pretrained(name)
    encoder = Encoder.from_pretrained(name, precision="fp32", length=128, template=template)
    encoder.instructions = Instructions((ASKED,), ("",))
    encoder.save(folder / "export")
    texts = SAMPLE + long_texts(lambda text: len(encoder.tokenizer.plain([text])[0]), 128)
    return encoder, folder / "export", texts


@pytest.mark.parametrize("python", PYTHONS)
def test_another_version_gives_the_vectors_or_says_what_it_needs(exported, tmp_path, python):
    encoder, folder, texts = exported
    versions = child(python, VERSIONS).stdout.split()
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    done = child(python, ENCODE, str(folder), str(tmp_path / "texts.json"), str(tmp_path / "out.npz"))
    if versions[0].startswith("4."):
        assert done.returncode and "needs transformers 5.2 or newer" in done.stderr, (versions, done.stderr[-500:])
        return
    pooling = json.loads((folder / "1_Pooling" / "config.json").read_text())
    if "embedding_dimension" in pooling and tuple(map(int, versions[1].split(".")[:2])) < (5, 4):
        assert done.returncode and "embedding_dimension" in done.stderr, (versions, done.stderr[-500:])
        return
    assert not done.returncode, (versions, done.stderr[-2000:])
    with np.load(tmp_path / "out.npz") as seen:
        apart = [
            np.abs(seen["plain"] - encoder.encode(texts)).max(),
            np.abs(seen["query"] - encoder.encode_query(texts)).max(),
        ]
    print(
        f"transformers {versions[0]}, sentence-transformers {versions[1]}: {apart[0]:.1e} plain, {apart[1]:.1e} with prompt"
    )
    # SmolLM2, untrained in both directions: sentence-transformers itself moves by 4e-5 with its batch size.
    assert max(apart) < (1e-4 if "smollm2" in str(folder) else 1e-5), (versions, apart)
