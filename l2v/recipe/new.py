"""A recipe for the user's data: commented YAML whose sizes are chosen from the content of the file."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import yaml

from l2v.recipe.load import load_recipe
from l2v.recipe.schema import MAX_AUTO_NEGATIVES, Base, Recipe
from l2v.recipe.shipped import recipe_folder
from l2v.recipe.source import Source

LETTERS_A_TOKEN = 2.5  # Danish in an English tokenizer, as most bases have
TEMPLATE_TOKENS = 16  # the template around a text, roughly
SMALL = "smollm2-135m-da"  # the recipe whose base trains on a CPU
LARGE = "llama3-8b-da"
COLUMN = 34  # column where comments begin


@dataclass
class OwnData:
    """What a file (or several) holds. source: its path and columns. rows: those with text; empty: those without; bad: those
    that cannot be read; notes: what reading met, to print. letters: of all documents
    together; long_letters: 95% of the texts have at most so many. sentences: of texts that are split for SimCSE, else 0.
    example: a short query. searched: the column that `l2v search` uses by default.
    """

    source: Source
    kind: Literal["pairs", "texts"]
    columns: list[str] = field(default_factory=list)
    delimiter: str | None = None
    rows: int = 0
    empty: int = 0
    bad: int = 0
    files: int = 1
    notes: list[str] = field(default_factory=list)
    letters: int = 0
    long_letters: int = 0
    negatives: int = 0
    sentences: int = 0
    example: str = ""
    searched: str = ""

    @property
    def document(self) -> str:
        """The column of the texts to search."""
        return self.source.positive if self.kind == "pairs" else self.source.text

    def read_as(self) -> dict[str, str]:
        """The chosen columns: key to column."""
        keys = ("query", "positive", "negatives") if self.kind == "pairs" else ("text",)
        return {key: getattr(self.source, key) for key in keys if key != "negatives" or self.negatives}


@dataclass(frozen=True)
class Sizes:
    """Bounds for a base of some size: largest batch and length (tokens), micro_tokens, and learning rates of the stages."""

    batch: int
    blocks: int
    length: int
    block_length: int
    micro_tokens: int
    rates: dict[str, float]
    dropout: float


def known_recipe(base: str) -> Recipe | None:
    """The shipped recipe for a base of this name; its template and learning rates are reused."""
    recipes = (load_recipe(str(path)) for path in sorted(recipe_folder().glob("*.yaml")))
    return next((recipe for recipe in recipes if recipe.base.model == base), None)


def compose(name: str, base: str, data: OwnData) -> str:
    """The recipe as text: base, LoRA, and the stages that the data allows."""
    like = known_recipe(base)
    sizes = _sizes(like)
    head = _head(name, base, data) + _base(base, like.base if like else None, sizes)
    stages = [_mntp(data, sizes), _supervised(data, sizes) if data.kind == "pairs" else _simcse(data, sizes)]
    return head + "\nstages:\n" + "\n".join(stages)


def _sizes(like: Recipe | None) -> Sizes:
    small = like is not None and like.name == SMALL
    rates = {name: stage.lr for name, stage in (like or load_recipe(LARGE)).stages.items()}
    dropout = like.lora.dropout if like and like.lora else 0.05
    if small:
        return Sizes(32, 8, 128, 128, 8192, rates, dropout)
    return Sizes(128, 32, 512, 512, 16384, rates, dropout)


def _batch(count: int, most: int) -> int:
    """The largest power of 2 from 2 to `most` with at least four batches in the data."""
    return max(2, min(most, 1 << max(0, int(math.log2(max(1, count // 4))))))


def _steps(count: int, batch: int, epochs: int, least: int) -> int:
    return min(1000, max(least, math.ceil(epochs * count / batch)))


def _length(data: OwnData, most: int) -> int:
    tokens = data.long_letters / LETTERS_A_TOKEN + TEMPLATE_TOKENS
    return min(most, 32 * math.ceil(tokens / 32))


def _line(key: str, value: object, comment: str = "", indent: int = 4) -> str:
    shown = value if isinstance(value, str) else _number(value)
    text = f"{' ' * indent}{key}: {shown}"
    return f"{text:<{COLUMN}} # {comment}\n" if comment else f"{text}\n"


def _number(value: object) -> str:
    if isinstance(value, float) and 0 < value < 0.01:
        mantissa, _, exponent = f"{value:e}".partition("e")
        return f"{float(mantissa):.1f}e{int(exponent)}"
    return str(value)


def quoted(text: str) -> str:
    """A text as YAML, in quotes where it needs them."""
    return yaml.safe_dump([text], default_flow_style=True, allow_unicode=True, width=math.inf).strip()[1:-1]


def _source(data: OwnData, **columns: str | bool) -> str:
    # Several files may have other columns each, which are guessed when they are read.
    keys: dict[str, str | bool] = {"path": data.source.path}
    keys |= {key: value for key, value in columns.items() if data.files == 1 or key == "sentences"}
    if data.bad:
        keys["skip_bad"] = True
    elif data.empty:
        keys["skip_empty"] = True
    inner = ", ".join(f"{key}: {str(v).lower() if isinstance(v, bool) else quoted(v)}" for key, v in keys.items())
    return "{" + inner + "}"


def _head(name: str, base: str, data: OwnData) -> str:
    what = "pairs" if data.kind == "pairs" else "texts"
    skipped = [(data.empty, "for an empty text"), (data.bad, "because they cannot be read")]
    empty = "".join(f" (rows skipped {why}: {count:,})" for count, why in skipped if count)
    return (
        f"# {base} into a text encoder, on {data.rows:,} {what} of {Path(data.source.path).name}{empty}.\n"
        f"#   l2v train {name}.yaml\n"
        "# Any key can be overridden on the command line: stages.mntp.steps=200, or with --stage mntp just steps=200.\n"
        "# What each key means, and all other keys: l2v recipes llama3-8b-da.\n\n"
        + _line("name", quoted(name), "the run's name, and its folder below runs/", 0)
        + _line("seed", 42, "decides data order and dropout", 0)
    )


def _base(name: str, known: Base | None, sizes: Sizes) -> str:
    out = "\nbase:\n" + _line("model", quoted(name), "a folder or a hub name", 2)
    out += _line("precision", "auto", "auto | bf16 | fp32; auto trains in bf16 where the hardware multiplies it", 2)
    if known and (known.template.prefix or known.template.suffix):
        out += _line("template", "", "what stands around a text; only text and suffix are pooled", 2)
        for key in ("prefix", "suffix"):
            escaped = yaml.safe_dump(getattr(known.template, key), default_style='"', width=math.inf).strip()
            out += f"    {key}: {escaped}\n"
    else:
        out += (
            "  # template:                      # what stands around a text; an instruction-tuned base needs its own turn\n"
            '  #   prefix: ""                   # markers (its model card has them), a base without turns needs none\n'
            '  #   suffix: ""\n'
        )
    return (
        out
        + "\nlora:\n"
        + _line("r", 16, "rank", 2)
        + _line("alpha", 32, "the update is scaled by alpha / r", 2)
        + _line("dropout", sizes.dropout, "" if sizes.dropout else "0 saves a third of a step's time on a CPU", 2)
    )


def _common(steps: int, lr: float, warmup: int = 0) -> str:
    out = _line("steps", steps, "optimizer steps")
    out += _line("lr", lr, "peak learning rate")
    if warmup:
        out += _line("warmup", warmup, "steps of linear warm-up")
    out += _line("decay", "linear", "linear | cosine | none: how the rate falls after the warm-up")
    out += _line("decay_steps", "end", "the step at which the rate is 0; end: the last one")
    out += _line("log_every", max(1, steps // 20), "steps between rows of metrics")
    return out + _line("save_every", 100 if steps > 100 else 0, "steps between checkpoints; 0 saves at the end only")


def _mntp(data: OwnData, sizes: Sizes) -> str:
    tokens = data.letters / LETTERS_A_TOKEN
    blocks = max(1, int(tokens / sizes.block_length))
    batch = _batch(blocks, sizes.blocks)
    why = (
        "    # The base only attended to the left before: without this stage, pairs gain less. To train on pairs alone,\n"
        "    # remove the stage and write `from: base` below.\n"
        if data.kind == "pairs"
        else ""
    )
    return (
        "  mntp:                            # masked next-token prediction: the decoder learns to use the text to the right\n"
        + why
        + _line("objective", "mntp")
        + _line("data", _source(data, text=data.document))
        + _line("batch", batch, f"blocks of `length` tokens a step; the texts fill about {blocks:,}")
        + _line("length", sizes.block_length, "tokens in a block")
        + _line(
            "micro_tokens", min(sizes.micro_tokens, 16384), "tokens in memory at a time: lower it where memory is short"
        )
        + _common(_steps(blocks, batch, 3, 40), sizes.rates["mntp"])
    )


def _supervised(data: OwnData, sizes: Sizes) -> str:
    columns = {"query": data.source.query, "positive": data.source.positive}
    if data.negatives:
        columns["negatives"] = data.source.negatives
    batch = _batch(data.rows, sizes.batch)
    steps = _steps(data.rows, batch, 3, 30)
    has = f"yours have up to {data.negatives}" if data.negatives else "yours have none"
    return (
        "  supervised:                      # a query moves near its positive and away from the others of the batch\n"
        + _line("objective", "supervised")
        + _line("from", "mntp", "the stage it starts from")
        + _line("data", _source(data, **columns))
        + "    # eval_data: held-out.csv      # pairs held out from training, same columns; then eval_every: 20\n"
        + _line("batch", batch, "pairs a step: the positives of the others are negatives")
        + _length_line(data, sizes)
        + _line("micro_tokens", sizes.micro_tokens, "tokens in memory at a time: lower it where memory is short")
        + _common(steps, sizes.rates["supervised"], max(1, steps // 10))
        + _line("scale", 20, "one over the temperature")
        + _line(
            "max_negatives",
            "auto",
            f"hard negatives per row; auto: as many as it has, at most {MAX_AUTO_NEGATIVES}; {has}",
        )
    )


def _simcse(data: OwnData, sizes: Sizes) -> str:
    count = data.sentences or data.rows
    keys: dict[str, str | bool] = {"text": data.document} | ({"sentences": True} if data.sentences else {})
    batch = _batch(count, sizes.batch)
    split = f"    # Your texts are long, so each is split into sentences, about {count:,}.\n" if data.sentences else ""
    return (
        "  simcse:                          # a text and itself under other dropout are a pair: no labels needed\n"
        + split
        + _line("objective", "simcse")
        + _line("from", "mntp", "the stage it starts from")
        + _line("data", _source(data, **keys))
        + _line("batch", batch, "texts a step: the others are negatives")
        + _length_line(data, sizes)
        + _line("micro_tokens", sizes.micro_tokens, "tokens in memory at a time: lower it where memory is short")
        + _common(_steps(count, batch, 1, 30), sizes.rates["simcse"])
        + _line("scale", 20, "one over the temperature")
        + _line("attention_dropout", 0.3, "on attention probabilities; what makes the two views differ")
    )


def _length_line(data: OwnData, sizes: Sizes) -> str:
    length = _length(data, sizes.length)
    whole = data.long_letters / LETTERS_A_TOKEN + TEMPLATE_TOKENS <= length
    fit = "about 95% of your texts fit" if whole else "longer texts are truncated; more takes more time and memory"
    return _line("length", length, f"tokens of a text; {fit}")
