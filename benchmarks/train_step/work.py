"""What the train-step benchmark trains: models, workloads, their texts, and the batches that every provider sees.

python -m benchmarks.train_step.work FOLDER MODEL    writes a model's random weights and tokenizer; calibrates a GPU

All providers load one folder of weights and take the same examples in the same steps, so that their first losses can be
compared: a peer that does other work is found out. Lengths are log-normal, with the spread that the logarithms of lengths
have in the Danish sample and in Danish descriptions of packages (sentences 0.5, questions 0.3, passages 0.6).
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from l2v.files import replace_text
from l2v.model.memory import LayerShape
from l2v.recipe import Recipe
from l2v.recipe.load import load_recipe

SPREADS = {"document": 0.6, "sentence": 0.5, "query": 0.35, "passage": 0.6}


@dataclass(frozen=True)
class Lengths:
    """Tokens of a kind of text, those that the tokenizer adds among them."""

    kind: str
    mean: int
    most: int

    def draw(self, generator: random.Random) -> int:
        """Log-normal with this mean, cut at `most`."""
        sigma = SPREADS[self.kind]
        drawn = generator.lognormvariate(math.log(self.mean) - sigma**2 / 2, sigma)
        return min(max(4, round(drawn)), self.most)


@dataclass(frozen=True)
class Workload:
    """One stage of a recipe. Without `columns` it trains on what the recipe names."""

    stage: str
    batch: int | None = None
    length: int | None = None
    micro_tokens: int | None = None
    columns: tuple[Lengths, ...] = ()

    def overrides(self) -> list[str]:
        """Of the recipe's keys, for `l2v train --stage`."""
        keys: dict[str, Any] = {"from": "base", "eval_data": "[]", "eval_every": 0, "save_every": 0, "log_every": 1}
        if self.columns:
            keys |= {"batch": self.batch, "length": self.length, "micro_tokens": self.micro_tokens}
        if self.columns and self.stage == "supervised":
            keys |= {"negatives": "global", "group": "null", "max_negatives": 1}
        return [f"stages.{self.stage}.{key}={value}" for key, value in keys.items()]


def _workloads(batches: Sequence[int], length: int, micro_tokens: int, most: int) -> dict[str, Workload]:
    mntp, simcse, supervised = batches
    sentence = Lengths("sentence", 30, min(128, most))
    query, passage = Lengths("query", 20, min(64, most)), Lengths("passage", min(200, most // 2), most)
    return {
        "mntp": Workload("mntp", mntp, length, micro_tokens, (Lengths("document", length, 8 * length),)),
        "simcse": Workload("simcse", simcse, 128, micro_tokens, (sentence,)),
        "supervised": Workload("supervised", supervised, most, 2 * micro_tokens, (query, passage, passage)),
    }


@dataclass(frozen=True)
class Model:
    """What is trained, by which recipe, on which workloads, and how many steps a run warms up and is timed."""

    name: str
    recipe: str
    workloads: dict[str, Workload]
    shape: dict[str, Any] | None = None
    """Of random weights; None takes the recipe's own base."""
    warmup: int = 1
    steps: int = 3
    rows: int | None = None
    """Blocks in a padded peer's micro-batch of MNTP, where a whole batch without checkpointing does not fit."""
    checkpointing: bool = True
    """Whether layers are computed twice where nothing else fits; the ladder then starts from there."""


_MINI = {
    "model_type": "llama",
    "vocab_size": 16384,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
_OWN = {name: Workload(name) for name in ("mntp", "simcse", "supervised")}
_8B = "llama3-8b-da"

_LLAMA = load_recipe(_8B).base.config
_LONG = _workloads((32, 128, 64), 512, 16384, 512)

MODELS = {
    "8b": Model("8b", _8B, _LONG, _LLAMA, 3, 8, rows=8),
    "shallow": Model("shallow", _8B, _LONG, _LLAMA | {"num_hidden_layers": 2}, 1, 2, rows=8),
    "smollm2": Model("smollm2", "smollm2-135m-da", _OWN, steps=2, checkpointing=False),
    "mini": Model("mini", _8B, _workloads((4, 16, 6), 128, 2048, 128), _MINI, rows=2),
}


class Work:
    """A model's workloads in a folder: weights, texts, batches, and the recipe as every run takes it."""

    def __init__(self, model: Model, folder: Path, tokenizer: str | None = None) -> None:
        """tokenizer: a folder or hub name to use in place of a made one, a word of the Danish sample a token."""
        self.model, self.folder, self.tokenizer = model, folder, tokenizer

    @property
    def base(self) -> Path:
        """The folder of random weights."""
        return self.folder / "base"

    def overrides(self, name: str, steps: int, extra: Iterable[str] = ()) -> list[str]:
        """The command line of `l2v train RECIPE` for a workload; texts are written on the first call."""
        workload = self.model.workloads[name]
        out = [*workload.overrides(), f"stages.{workload.stage}.steps={steps}", "tracking.tensorboard=false"]
        if self.model.shape:
            data = self._file(name, steps, ".jsonl")
            if not data.is_file():
                from l2v.data.tokens import load_tokenizer

                rows = texts(workload, steps, Words.counted(load_tokenizer(self.tokenizer or str(self.base))))
                data.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
            out += [f"base.model={self.base}", "base.template={prefix: '', suffix: ''}"]
            out += [f"stages.{workload.stage}.data={data}"]
            out += [f"base.tokenizer={self.tokenizer}"] if self.tokenizer else []
        return [*out, *extra]

    def _file(self, name: str, steps: int, suffix: str) -> Path:
        made_from = repr((self.model.workloads[name], steps, self.tokenizer, SPREADS))
        return self.folder / f"{name}-{hashlib.sha256(made_from.encode()).hexdigest()[:8]}{suffix}"

    def recipe(self, name: str, steps: int, extra: Iterable[str] = ()) -> Recipe:
        """The recipe with these overrides."""
        return load_recipe(self.model.recipe, self.overrides(name, steps, extra), self.model.workloads[name].stage)

    def batches(self, name: str, steps: int) -> Path:
        """A file of the examples of every step, in the order in which the training program takes them (see `batches`)."""
        file = self._file(name, steps, ".batches.json")
        if not file.is_file():
            recipe = self.recipe(name, steps)
            replace_text(file, json.dumps(batches(recipe, self.model.workloads[name].stage, steps)))
        return file


def linear_parameters(recipe: Recipe, stage: str) -> int:
    """N of 4N FLOPs a token: the weights of the decoder's linear layers, without embeddings and head."""
    from l2v.model.load import load_config

    shape = LayerShape.of(load_config(recipe.base), rank=recipe.stages[stage].lora.r, targets=(), itemsize=2)
    return shape.linear_parameters * shape.layers


class Words:
    """Words of the Danish sample, and how many tokens a tokenizer makes of each."""

    def __init__(self, words: Sequence[str], tokens: Sequence[int], added: int) -> None:
        self.words, self.tokens, self.added = words, tokens, added

    @classmethod
    def counted(cls, tokenizer) -> Words:
        """As a tokenizer counts them, after a space."""
        words = sample_words()
        ids = tokenizer([f" {word}" for word in words], add_special_tokens=False)["input_ids"]
        return cls(words, [len(i) for i in ids], len(tokenizer("")["input_ids"]))

    def text(self, tokens: int, generator: random.Random) -> str:
        """Words drawn at random, of about `tokens` tokens, with those that the tokenizer adds."""
        chosen, left = [], tokens - self.added
        while left > 0:
            at = generator.randrange(len(self.words))
            chosen.append(self.words[at])
            left -= self.tokens[at]
        return " ".join(chosen)


def sample_words() -> list[str]:
    """The different words of the Danish sample's passages, sorted."""
    from l2v.data import sample

    return sorted({word for passage in sample.passages().values() for word in passage.text.split()})


def texts(workload: Workload, steps: int, words: Words, seed: int = 0) -> list[dict[str, Any]]:
    """Rows for `steps` steps of a workload, the same at every call."""
    generator = random.Random(f"{seed} {workload.stage}")
    if workload.stage == "mntp":
        (document,) = workload.columns
        # Blocks of the full length and no shorter one behind them, where the tokenizer lets the words come out even.
        rows, left = [], steps * workload.batch * workload.length
        while left > 0:
            tokens = document.draw(generator)
            tokens = tokens if left - tokens >= 4 else left
            rows.append({"text": words.text(tokens, generator)})
            left -= tokens
        return rows
    rows = []
    for _ in range(steps * workload.batch):
        drawn = [words.text(column.draw(generator), generator) for column in workload.columns]
        if workload.stage == "simcse":
            rows.append({"text": drawn[0]})
        else:
            rows.append({"query": drawn[0], "positive": drawn[1], "negatives": drawn[2:]})
    return rows


def batches(recipe: Recipe, name: str, steps: int) -> list[dict[str, list]]:
    """The examples of every step of a stage on one rank, as the training program would take them.

    A step is a dict of lists, an item an example. MNTP: ids (of a block, before masking), masked and labels (-100 but at
    what is to be predicted). Else, with an item for every column: ids, starts (pooled from there) and texts.
    """
    from l2v.data.collate import Masking, collate
    from l2v.data.open import open_examples
    from l2v.data.sampler import Sampler
    from l2v.data.sources import open_rows
    from l2v.data.tokens import TextTokenizer, load_tokenizer
    from l2v.model.embedded import resolve
    from l2v.model.load import load_config
    from l2v.recipe import Mntp, Supervised

    stage, seed = recipe.stages[name], recipe.stage_seed(name)
    tokenizer = load_tokenizer(recipe.base.tokenizer or resolve(recipe.base.model))
    tokens = TextTokenizer.of(tokenizer, recipe.base, stage.length)
    examples = open_examples(stage.data, stage, tokens)
    sampler = Sampler(
        examples, batch=stage.batch, micro_tokens=stage.micro_tokens, seed=seed, group=getattr(stage, "group", None)
    )
    plans = [[i for unit in sampler.plan(step).units[0] for i in unit.examples] for step in range(steps)]
    if isinstance(stage, Mntp):
        vocabulary = min(len(tokenizer), load_config(recipe.base).vocab_size)
        masking = Masking(
            stage.mask_probability, stage.mask_split, tokens.single(recipe.base.mask_token), vocabulary,
            frozenset(tokenizer.all_special_ids),
        )  # fmt: skip
        out = []
        for step, chosen in enumerate(plans):
            found = {"ids": [], "masked": [], "labels": []}
            for i in chosen:
                batch = collate(examples, [i], seed=seed, step=step, masking=masking)
                labels_T = torch.full_like(batch.input_ids_T, -100)
                labels_T[batch.label_index_L + 1] = batch.labels_L
                found["ids"].append([token for segment in examples[i] for token in segment.ids.tolist()])
                found["masked"].append(batch.input_ids_T.tolist())
                found["labels"].append(labels_T.tolist())
            out.append(found)
        return out
    kind = "pairs" if isinstance(stage, Supervised) else "sentences"
    rows = open_rows(stage.data, kind)

    def columns(i: int) -> list[str]:
        if kind == "sentences":
            return [rows[i]["text"]] * 2
        return [rows[i]["query"], rows[i]["positive"], *rows[i]["negatives"][: len(examples[i]) - 2]]

    return [
        {
            "ids": [[segment.ids.tolist() for segment in examples[i]] for i in chosen],
            "starts": [[segment.pool_start for segment in examples[i]] for i in chosen],
            "texts": [columns(i) for i in chosen],
        }
        for chosen in plans
    ]


def write_base(model: Model, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
    """Random weights, normal with a deviation of 0.02 and norms of 1, as a transformers folder, made on the device.

    Its configuration has the keys that transformers 4 and 5 both read, and `is_causal: false`, by which plain transformers
    and sentence-transformers are bidirectional as well.
    """
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(AutoConfig.for_model(**model.shape), dtype=dtype)
    generator = torch.Generator(device).manual_seed(0)
    shards: dict[str, dict[str, torch.Tensor]] = {}
    for name, parameter in empty.named_parameters():
        tensor = torch.ones(parameter.shape, dtype=dtype, device=device)
        if "norm" not in name:
            tensor.normal_(0.0, 0.02, generator=generator)
        layer = name.split("layers.")[1].split(".")[0] if "layers." in name else "outer"
        shards.setdefault(f"model-{layer}.safetensors", {})[name] = tensor.cpu()
    for file, tensors in shards.items():
        save_file(tensors, folder / file, metadata={"format": "pt"})
    index = {name: file for file, tensors in shards.items() for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    write_tokenizer(folder)
    config = model.shape | {
        "architectures": ["LlamaForCausalLM"],
        "torch_dtype": str(dtype).removeprefix("torch."),
        "is_causal": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    # Last, since it marks the folder as whole.
    (folder / "config.json").write_text(json.dumps(config, indent=1))


def write_tokenizer(folder: Path) -> None:
    """A token a word of the Danish sample, BOS first, `_` as the mask; in files that transformers 4 reads as well."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    specials = ["<s>", "</s>", "<unk>"]
    vocabulary = {word: at for at, word in enumerate([*specials, "_", *sample_words()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.add_special_tokens(specials)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 8192} | names
    settings["model_input_names"] = ["input_ids", "attention_mask"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))


def main(argv: Sequence[str]) -> None:
    """In its own process, so that the one that starts the runs holds no memory of the device."""
    from l2v.machine import calibration
    from l2v.model.load import device, dtype_of

    folder, name = argv
    where, dtype = device(), dtype_of("auto")
    if MODELS[name].shape and not (Path(folder) / "config.json").is_file():
        write_base(MODELS[name], Path(folder), where, dtype)
    found = calibration(where, dtype)
    # The shallow model runs beside other work, where a calibration would come out too low, and would be kept.
    if found is None and where.type == "cuda" and name != "shallow":
        found = calibration(where, dtype, measure=True)
    print(json.dumps({"dtype": str(dtype).removeprefix("torch."), "rates": found and asdict(found)}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
