from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory, bos_tokenizer_folder, tiny_config) -> Path:
    """A folder with random weights and a tokenizer: a base as users have it."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**tiny_config, initializer_range=0.2)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(bos_tokenizer_folder).save_pretrained(folder)
    return folder
