import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from support.forked import start
from support.processes import finish, free_port

pytest.importorskip("sentence_transformers")

from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.losses import MatryoshkaLoss, MultipleNegativesRankingLoss
from sentence_transformers.models import Pooling, Transformer

from l2v_kernels.integrations.sentence_transformers import FusedMultipleNegativesRankingLoss

ALL = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
SYMMETRIC = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
CASES = {
    "pairs": (2, {}),
    "triplets": (3, {"scale": 50.0}),
    "several hard negatives": (5, {}),
    "four directions, pairs": (2, {"directions": ALL}),
    "four directions, hard negatives": (4, {"directions": ALL}),
    "symmetric": (2, SYMMETRIC),
    "symmetric, hard negatives": (3, SYMMETRIC),
}
ROOT = Path(__file__).resolve().parents[2]


def embeddings(columns, batch=7, width=24):
    """Queries near their positives, as trained ones are, so that no gradient is a rounding error; of any length."""
    center = torch.randn(batch, 1, width)
    made = (center + 1.5 * torch.randn(batch, columns, width)) * torch.rand(batch, columns, 1).add(0.5)
    return [x.clone().requires_grad_() for x in made.unbind(1)]


def compare(ours, theirs, columns):
    left = embeddings(columns)
    right = [x.detach().clone().requires_grad_() for x in left]
    got, want = ours.compute_loss_from_embeddings(left, None), theirs(right)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    gradients = [torch.cat(torch.autograd.grad(loss, x)) for loss, x in ((got, left), (want, right))]
    assert want > 0.1
    assert (gradients[0] - gradients[1]).abs().max() <= 1e-5 * gradients[1].abs().max()


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_equal_the_original(name):
    columns, settings = CASES[name]
    original = MultipleNegativesRankingLoss(torch.nn.Identity(), **settings)
    fused = FusedMultipleNegativesRankingLoss(torch.nn.Identity(), **settings)
    compare(fused, lambda x: original.compute_loss_from_embeddings(x, None), columns)


def test_hard_negatives_that_only_their_query_sees():
    fused = FusedMultipleNegativesRankingLoss(torch.nn.Identity(), own_hard_negatives=True)

    def by_hand(columns):
        queries, positives, negatives = (torch.nn.functional.normalize(x, dim=-1) for x in columns)
        scores = torch.cat([queries @ positives.T, (queries * negatives).sum(-1, keepdim=True)], 1)
        return torch.nn.functional.cross_entropy(20.0 * scores, torch.arange(len(queries)))

    compare(fused, by_hand, 3)


def test_false_negatives_are_skipped():
    fused = FusedMultipleNegativesRankingLoss(torch.nn.Identity(), false_negative_margin=0.1)

    def by_hand(columns):
        queries, documents = (torch.nn.functional.normalize(x, dim=-1) for x in columns)
        cosines = queries @ documents.T
        hidden = cosines > cosines.diagonal()[:, None] + 0.1
        assert hidden.any()
        scores = (20.0 * cosines).masked_fill(hidden, -torch.inf)
        return torch.nn.functional.cross_entropy(scores, torch.arange(len(queries)))

    torch.manual_seed(1)
    compare(fused, by_hand, 2)


def test_one_pair_teaches_nothing_and_does_not_fail():
    """The last batch of an epoch may be one pair."""
    columns = embeddings(2, batch=1)
    for settings in ({}, {"directions": ALL}):
        loss = FusedMultipleNegativesRankingLoss(torch.nn.Identity(), **settings).compute_loss_from_embeddings(columns)
        assert all((g == 0).all() for g in torch.autograd.grad(loss, columns)) and loss == 0


def test_errors_say_what_is_wrong():
    model = torch.nn.Identity()
    with pytest.raises(ValueError, match="at least two columns"):
        FusedMultipleNegativesRankingLoss(model).compute_loss_from_embeddings(embeddings(1))
    for settings, words in (
        ({"directions": ("doc_to_query",)}, "directions are"),
        ({"directions": ALL, "partition_mode": "per_direction"}, "have no positive"),
        ({"scale": 0.0}, "above 0"),
        ({"matryoshka_dims": [8, 8]}, "ascend"),
        ({"matryoshka_dims": []}, "ascend"),
        ({"matryoshka_dims": [8], "matryoshka_weights": [1.0, 2.0]}, "2 matryoshka_weights for 1"),
        ({"matryoshka_weights": [1.0]}, "1 matryoshka_weights for 0"),
    ):
        with pytest.raises(ValueError, match=words):
            FusedMultipleNegativesRankingLoss(model, **settings)
    with pytest.raises(ValueError, match="at most E = 24"):
        FusedMultipleNegativesRankingLoss(model, matryoshka_dims=[32]).compute_loss_from_embeddings(embeddings(2))
    for absent in ("similarity_fct", "hardness_mode"):
        with pytest.raises(TypeError, match=absent):
            FusedMultipleNegativesRankingLoss(model, **{absent: None})


def test_what_the_model_card_gets():
    loss = FusedMultipleNegativesRankingLoss(torch.nn.Identity(), directions=ALL, matryoshka_dims=[16, 8])
    config = json.loads(json.dumps(loss.get_config_dict()))
    assert config["directions"] == list(ALL) and config["matryoshka_dims"] == [8, 16] and config["scale"] == 20.0
    assert all(number in loss.citation for number in ("1807.03748", "2308.03281", "2205.13147"))
    assert loss.temperature == 0.05


def test_autocast_does_not_make_the_scores_coarse():
    columns = embeddings(2)
    loss = FusedMultipleNegativesRankingLoss(torch.nn.Identity())
    plain = loss.compute_loss_from_embeddings(columns)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss.compute_loss_from_embeddings(columns), plain)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, tokenizer_folder):
    from transformers import AutoTokenizer, BertConfig, BertModel

    folder = tmp_path_factory.mktemp("bert")
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    noise = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    torch.manual_seed(0)
    config = BertConfig(**sizes, **noise, num_attention_heads=2, max_position_embeddings=64, pad_token_id=2)
    BertModel(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(folder)
    return str(folder)


def train(make_loss, folder, out, sentences, columns):
    """Losses of every step, and the weights after the last."""
    body = Transformer(folder, max_seq_length=32)
    model = SentenceTransformer(modules=[body, Pooling(32)], device="cpu")
    names = ["anchor", "positive", *(f"negative_{i}" for i in range(columns - 2))]
    # 21 rows in batches of 4: the last one is a single pair.
    rows = {name: sentences[i * 21 : (i + 1) * 21] for i, name in enumerate(names)}
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(out), num_train_epochs=1, per_device_train_batch_size=4, learning_rate=1e-3, seed=3, use_cpu=True,
        logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True,
    )  # fmt: skip
    trainer = SentenceTransformerTrainer(
        model=model, args=arguments, train_dataset=Dataset.from_dict(rows), loss=make_loss(model)
    )
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return losses, {name: x.detach() for name, x in model.named_parameters()}, trainer


RUNS = {
    "pairs": (2, lambda m: MultipleNegativesRankingLoss(m), {}),
    "hard negatives": (4, lambda m: MultipleNegativesRankingLoss(m), {}),
    "four directions": (3, lambda m: MultipleNegativesRankingLoss(m, directions=ALL), {"directions": ALL}),
    "symmetric": (2, lambda m: MultipleNegativesRankingLoss(m, **SYMMETRIC), SYMMETRIC),
    "matryoshka": (
        3,
        lambda m: MatryoshkaLoss(m, MultipleNegativesRankingLoss(m), [32, 16, 8], [1.0, 0.5, 0.25]),
        {"matryoshka_dims": [32, 16, 8], "matryoshka_weights": [1.0, 0.5, 0.25]},
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_training_run_ends_with_the_weights_of_the_original(name, model_folder, tmp_path, sentences):
    columns, original, settings = RUNS[name]
    start = {n: x.detach().clone() for n, x in Transformer(model_folder).named_parameters()}
    want_losses, want, _ = train(original, model_folder, tmp_path, sentences, columns)
    ours = lambda m: FusedMultipleNegativesRankingLoss(m, **settings)  # noqa: E731
    losses, got, trainer = train(ours, model_folder, tmp_path, sentences, columns)
    assert len(losses) == 6 and losses == pytest.approx(want_losses, rel=1e-5, abs=1e-5)
    change = sum((want[f"0.{n}"] - x).square().sum() for n, x in start.items()).sqrt()
    difference = sum((want[n] - x).square().sum() for n, x in got.items()).sqrt()
    # AdamW divides by the gradient's own size, so an entry that is all rounding moves a weight like any other.
    assert difference <= 1e-4 * change and change > 0.1
    if name == "pairs":
        trainer.model.save_pretrained(str(tmp_path / "saved"))
        assert "FusedMultipleNegativesRankingLoss" in (tmp_path / "saved" / "README.md").read_text()


def test_matryoshka_loss_around_this_one_is_the_same_in_more_passes(model_folder, tmp_path, sentences):
    around = lambda m: MatryoshkaLoss(m, FusedMultipleNegativesRankingLoss(m), [32, 16, 8])  # noqa: E731
    inside = lambda m: FusedMultipleNegativesRankingLoss(m, matryoshka_dims=[32, 16, 8])  # noqa: E731
    first, second = (train(make, model_folder, tmp_path, sentences, 3)[0] for make in (around, inside))
    assert first == pytest.approx(second, rel=1e-4, abs=2e-4)


def test_an_older_version_embeds_column_by_column(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers.base.losses.merged_forward", None)
    where = importlib.util.find_spec("l2v_kernels.integrations.sentence_transformers").origin
    spec = importlib.util.spec_from_file_location("older", where)
    older = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(older)
    columns = [x.detach() for x in embeddings(3)]
    calls = []
    model = lambda features: calls.append(features) or {"sentence_embedding": features["x"]}  # noqa: E731
    loss = older.FusedMultipleNegativesRankingLoss(model)
    want = MultipleNegativesRankingLoss(torch.nn.Identity()).compute_loss_from_embeddings(columns, None)
    torch.testing.assert_close(loss([{"x": x} for x in columns], None), want)
    assert [id(features["x"]) for features in calls] == [id(x) for x in columns]


TOGETHER = {
    "pairs": (2, {}),
    "four directions": (3, {"directions": ALL, "own_hard_negatives": True}),
    "symmetric": (3, SYMMETRIC),
    "matryoshka": (3, {"matryoshka_dims": [8, 24]}),
}
GATHERED = """
import sys, torch, torch.distributed as dist
from l2v_kernels.integrations.sentence_transformers import FusedMultipleNegativesRankingLoss as Loss
dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
results = {}
for name, (settings, whole) in torch.load(f"{sys.argv[1]}/cases.pt").items():
    mine = [x.chunk(world)[rank].clone().requires_grad_() for x in whole]
    loss = Loss(torch.nn.Identity(), gather_across_devices=True, **settings).compute_loss_from_embeddings(mine)
    loss.backward()
    # What data parallelism does to gradients: their mean over ranks.
    results[name] = (loss.detach() / world, [x.grad / world for x in mine])
torch.save(results, f"{sys.argv[1]}/{rank}.pt")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    cases = {n: (settings, [x.detach() for x in embeddings(columns, 6)]) for n, (columns, settings) in TOGETHER.items()}
    torch.save(cases, tmp_path / "cases.pt")
    environment = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environment |= {"PYTHONPATH": str(ROOT / "kernels"), "OMP_NUM_THREADS": "1"}
    (tmp_path / "gathered.py").write_text(GATHERED)
    command = [str(tmp_path / "gathered.py"), str(tmp_path)]
    loaded = ("l2v_kernels.integrations.sentence_transformers", "torch.distributed")
    finish([start(command, environment | {"RANK": str(rank)}, preload=loaded) for rank in range(2)], timeout=120)
    shares = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for name, (settings, whole) in cases.items():
        leaves = [x.clone().requires_grad_() for x in whole]
        loss = FusedMultipleNegativesRankingLoss(torch.nn.Identity(), **settings).compute_loss_from_embeddings(leaves)
        loss.backward()
        torch.testing.assert_close(sum(share[name][0] for share in shares), loss.detach())
        largest = max(x.grad.abs().max() for x in leaves)
        for column, leaf in enumerate(leaves):
            got = torch.cat([share[name][1][column] for share in shares])
            assert (got - leaf.grad).abs().max() <= 1e-5 * largest, name
