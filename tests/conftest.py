import importlib
import json
import os
import sys
import tempfile
from pathlib import Path

import pytest
from support.processes import NULL_GPU, ROOT, free_port, hide_gpus, is_gpu_test, on_null_gpu, training_environment

# An installed distribution is on the path by itself; a bare checkout is not.
for folder in (ROOT, ROOT / "kernels"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

# Both are read when `datasets` is imported: a cache of our own, so that no test meets yesterday's rows, and no hub.
_CACHE = tempfile.TemporaryDirectory(prefix="l2v-tests-", ignore_cleanup_errors=True)
os.environ["HF_DATASETS_CACHE"] = _CACHE.name
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_configure(config):
    hide_gpus(config.args)  # before any test asks CUDA, which looks at the variable once


def pytest_collection_modifyitems(items):
    """Files with long tests come first: whole files go to a process, and one that begins last leaves the others idle."""
    long = (
        "training",
        "test_bad_input.py",
        "test_llama_recipes.py",
        "test_compile.py",
        "test_attention_kernel.py",
        "test_info_nce_kernel.py",
        "test_plan_memory.py",
    )
    items.sort(key=lambda item: not {item.path.name, item.path.parent.name}.intersection(long))
    if on_null_gpu():
        for item in items:
            if is_gpu_test(item.path.name):
                item.add_marker(pytest.mark.skipif(True, reason=NULL_GPU))


def pytest_terminal_summary(terminalreporter):
    skipped = [report for report in terminalreporter.getreports("skipped") if NULL_GPU in str(report.longrepr)]
    if skipped:
        terminalreporter.write_line(f"{len(skipped)} GPU tests skipped, {NULL_GPU}")


WHO = ("Hunden", "Katten", "En gammel mand", "Min søster", "Den lille pige", "Vores nabo", "Læreren", "En fisker")
DOES = ("løber gennem", "bor ved siden af", "drømmer om", "kigger ud over", "cykler forbi", "venter foran")
WHAT = ("skoven", "den røde låge", "havnen i Ærøskøbing", "en stille å", "byens største bibliotek")
VOCABULARY = 300
SPECIALS = ["<s>", "</s>", "<pad>"]


@pytest.fixture(scope="session")
def sentences() -> list[str]:
    """240 short Danish sentences, all different."""
    return [f"{who} {does} {what}." for who in WHO for does in DOES for what in WHAT]


def _train_tokenizer(folder: Path, sentences: list[str], *, bos: bool) -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=SPECIALS, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(sentences, trainer)
    if bos:  # Llama 3: byte level, then BOS before the text and nothing behind it
        template = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)])
        tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    assert len(fast) == VOCABULARY
    fast.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory, sentences) -> str:
    """A byte-level BPE tokenizer of 300 entries that adds no special token."""
    return _train_tokenizer(tmp_path_factory.mktemp("tokenizer"), sentences, bos=False)


@pytest.fixture(scope="session")
def bos_tokenizer_folder(tmp_path_factory, sentences) -> str:
    """The same tokenizer with Llama 3's post-processor: <s> before every text."""
    return _train_tokenizer(tmp_path_factory.mktemp("bos-tokenizer"), sentences, bos=True)


@pytest.fixture(scope="session")
def tiny_config() -> dict:
    """A Llama of 2 layers and hidden size 32, as `base.config` has it."""
    return {
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "tie_word_embeddings": False,
    }


@pytest.fixture(scope="session")
def config_folder(tmp_path_factory, tiny_config) -> str:
    """A transformers folder with that configuration and nothing else."""
    from transformers import AutoConfig

    folder = tmp_path_factory.mktemp("config")
    AutoConfig.for_model(**tiny_config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def base(tmp_path_factory, bos_tokenizer_folder, tiny_config) -> Path:
    """A folder with random weights and a tokenizer: a base as users have it."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**tiny_config, initializer_range=0.2)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(bos_tokenizer_folder).save_pretrained(folder)
    return folder


def write_jsonl(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="session", name="write_jsonl")
def _write_jsonl():
    """write_jsonl(path, rows) -> str: one JSON object a line."""
    return write_jsonl


@pytest.fixture(scope="session")
def tiny_recipe(bos_tokenizer_folder, tiny_config, sentences):
    """tiny_recipe(folder, **{"stages.mntp.steps": 8}) -> Path of a recipe in `folder`, its data and `out` there too.

    Stages mntp, simcse and supervised, the last two from mntp; batch 4, 4 steps, float32, no TensorBoard.
    """
    import yaml

    def write(folder: Path, **overrides) -> Path:
        documents = [{"text": " ".join(sentences[i : i + 5])} for i in range(0, 120, 5)]
        pairs = [
            {"query": f"Hvem {text.split(' ', 1)[1]}", "positive": text, "negatives": [sentences[-1 - i]]}
            for i, text in enumerate(sentences[:24])
        ]
        every = {"batch": 4, "steps": 4, "micro_tokens": 512}
        tree = {
            "name": "tiny",
            "out": str(folder / "run"),
            "base": {
                "model": "tiny-llama",
                "init": "random",
                "config": dict(tiny_config),
                "tokenizer": bos_tokenizer_folder,
                "precision": "fp32",
            },
            "lora": {"r": 4, "alpha": 8},
            "tracking": {"tensorboard": False},
            "stages": {
                "mntp": every
                | {"objective": "mntp", "length": 64, "lr": 5e-3}
                | {"data": write_jsonl(folder / "documents.jsonl", documents)},
                "simcse": every
                | {"objective": "simcse", "from": "mntp", "length": 48, "lr": 3e-3}
                | {"data": write_jsonl(folder / "sentences.jsonl", [{"text": text} for text in sentences[:40]])},
                "supervised": every
                | {"objective": "supervised", "from": "mntp", "length": 48, "lr": 3e-3}
                | {"data": write_jsonl(folder / "pairs.jsonl", pairs)},
            },
        }
        for dotted, value in overrides.items():
            at = tree
            *above, last = dotted.split(".")
            for key in above:
                at = at.setdefault(key, {})
            at[last] = value
        path = folder / "tiny.yaml"
        path.write_text(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True), encoding="utf-8")
        return path

    return write


@pytest.fixture(params=["bf16", "fp32"])
def auto_precision(request, monkeypatch):
    """The dtype that `precision: auto` takes on either kind of processor, which this machine now is; a test runs on both."""
    import torch

    monkeypatch.setenv("L2V_AUTO_PRECISION", request.param)
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[request.param]


@pytest.fixture
def cli_environment() -> dict[str, str]:
    """The environment of a training process on the CPU, with a port of its own and no rank."""
    return training_environment()


@pytest.fixture
def run_here(monkeypatch, capfd, tmp_path):
    """run_here(*args, expect=0) -> its output: the program as the one rank of a launcher, inside this process.

    Twenty seconds faster than `python -m l2v.train`, which starts two launchers and a trainer.
    """
    from l2v.train import main

    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "DS_ACCELERATOR": "cpu"}
    rank["PYTORCH_ALLOC_CONF"] = os.environ.get("PYTORCH_ALLOC_CONF", "")  # set, so main() sets none that stays
    for key, value in rank.items():
        monkeypatch.setenv(key, value)
    monkeypatch.chdir(tmp_path)

    def run(*args: object, expect: int = 0) -> str:
        monkeypatch.setenv("MASTER_PORT", str(free_port()))
        try:
            code = main([str(arg) for arg in args])
        finally:  # DeepSpeed keeps the groups of the process group that main() has just left
            if groups := sys.modules.get("deepspeed.utils.groups"):
                importlib.reload(groups)
        output = "".join(capfd.readouterr())
        assert code == expect, f"exit code {code}, expected {expect}:\n{output}"
        return output

    return run
