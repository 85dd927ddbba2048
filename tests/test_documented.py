"""Every command and Python block of the pages is run by a test, or listed with what it needs in tests/documented.yaml."""

import io
import json
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from support.documents import ROOT, blocks, commands
from support.made_run import make_run
from support.served import Served
from support.versions import need_smollm2

from l2v.commands.main import main

LIST = yaml.safe_load((ROOT / "tests" / "documented.yaml").read_text(encoding="utf-8"))
PAGES = [
    ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")),
    *(ROOT / folder / "README.md" for folder in ("examples", "kernels", "benchmarks")),
]  # fmt: skip
LISTED = {tuple(shlex.split(line)): how for how, lines in LIST.items() for line in lines}
HERE = [shlex.split(line) for line in LIST["here"]]
# What a command prints, wherever the page says so or a reader would look for it.
PRINTS = {
    "init": "faq.csv: 24 pairs", "check": " pairs", "search": "Man sejler til", "encode": "24 vectors",
    "eval": "results, 0 skipped", "mine": "negatives", "export": ": written, ", "quantize": "small_vectors.png",
    "report": ".html", "verify": "faq-encoder: 64 texts, ",
}  # fmt: skip


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, base):
    """The files and runs that the pages' commands name, on a tiny base."""
    need_smollm2()
    folder = tmp_path_factory.mktemp("documented")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        rows = [(f"Hvordan kommer man til ø nummer {n}?", f"Man sejler til ø nummer {n}.") for n in range(24)]
        table = "".join(f"{query};{answer}\n" for query, answer in rows)
        for name in ("faq.csv", "kunder.csv", "MAPPE/train.csv", "MAPPE/test.csv"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text("Spørgsmål;Svar\n" + table, encoding="utf-8")
        lines = [{"query": q, "positive": a, "article": str(at)} for at, (q, a) in enumerate(rows)]
        topics = [{"tekst": answer, "emne": ("hav", "land")[at % 2]} for at, (_, answer) in enumerate(rows)]
        for name, content in (
            ("pairs.jsonl", lines), ("emner.jsonl", topics), ("mine_test/pairs.jsonl", lines), ("my-folder/pairs.jsonl", lines),
        ):  # fmt: skip
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content))
        assert main(["init", "made", "--data", "faq.csv", "--base", str(base)]) == 0
        recipe = folder / "made.yaml"
        # The tiny base has a token a letter: its texts and instructions are longer.
        recipe.write_text(re.sub(r"length: \d+ ", "length: 192 ", recipe.read_text(encoding="utf-8")), encoding="utf-8")
        run = make_run(recipe)
        for name in ("faq", "mine", "NAME", "llama3-8b-da", "one", "two"):
            shutil.copytree(run, folder / "runs" / name)
    return folder


def test_every_command_of_the_pages_is_in_the_list():
    documented = {tuple(command) for page in PAGES for command in commands(page.read_text(encoding="utf-8"))}
    assert documented - set(LISTED) == set(), "say in tests/documented.yaml how it is tested"
    assert set(LISTED) - documented == set(), "no page has it any more"
    assert len(LISTED) == sum(map(len, LIST.values())), "a command is listed twice"


@pytest.mark.parametrize("node", [how for how in LIST if how.startswith("tests/")])
def test_the_tests_that_run_a_command_exist(node):
    path, _, name = node.partition("::")
    assert re.search(rf"^def {name}\(", (ROOT / path).read_text(encoding="utf-8"), flags=re.MULTILINE)


@pytest.mark.parametrize("command", HERE, ids=" ".join)
def test_a_command_runs_as_written(command, workspace, monkeypatch, capfd):
    monkeypatch.chdir(workspace)
    monkeypatch.setattr("sys.stdin", io.StringIO("Hvordan kommer man til ø nummer 3?\n"))
    code = main(command[1:])
    said = capfd.readouterr()
    assert code == 0, said.err
    verb = command[2] if command[1] == "data" else command[1]
    assert PRINTS[verb] in said.out + said.err
    assert "Traceback" not in said.err and "Warning" not in said.err, said.err
    if command[1] == "search":
        hits = 5 if "--top" in command else 3
        heading = command[3] == "--texts" and "--json" not in command  # the query that came from the pipe
        assert len(said.out.splitlines()) == (hits if "--json" in command else 2 * hits + heading)


@pytest.mark.parametrize("page", ["evaluation.md", "info-nce.md", "linear-cross-entropy.md"])
def test_python_blocks_run_with_the_names_they_use(page, capsys):
    torch.manual_seed(0)
    names = {
        "queries_NE": torch.randn(6, 4096), "candidates_ME": torch.randn(9, 4096), "targets_N": torch.arange(6),
        "text_keys_M": torch.arange(9), "hidden_LE": torch.randn(5, 16), "head": torch.nn.Linear(16, 40).requires_grad_(False),
        "labels_L": torch.arange(5), "labels_of_the_step": 5,
    }  # fmt: skip
    (code,) = blocks((ROOT / "docs" / page).read_text(encoding="utf-8"), "python")
    exec(compile(code, page, "exec"), names)
    if page == "evaluation.md":
        assert capsys.readouterr().out.startswith("1 jealk/TTC-L2V-supervised-2 8030261248 68.42")
    else:
        assert names["loss"].isfinite()


def test_the_kernels_example_runs():
    names = {}
    (code,) = blocks((ROOT / "kernels" / "README.md").read_text(encoding="utf-8"), "python")
    exec(compile(code, "kernels/README.md", "exec"), names)
    assert names["o_THD"].shape == (532, 8, 64) and names["loss"].isfinite()


def test_the_exported_encoder_is_loaded_as_the_danish_page_says(workspace, monkeypatch):
    monkeypatch.chdir(workspace)
    if not (workspace / "faq-encoder").is_dir():
        assert main(["export", "runs/faq", "faq-encoder"]) == 0
    names = {}
    (code,) = blocks((ROOT / "docs" / "da.md").read_text(encoding="utf-8"), "python")
    exec(compile(code, "docs/da.md", "exec"), names)
    assert names["vektorer"].shape[0] == 2


def test_the_served_and_encoded_page_runs(workspace, monkeypatch, capsys):
    pytest.importorskip("faiss")
    monkeypatch.chdir(workspace)
    assert main(["encode", "runs/faq", "faq.csv", "--out", "faq.npy", "--column", "Svar"]) == 0
    client, index = blocks((ROOT / "docs" / "encoding.md").read_text(encoding="utf-8"), "python")
    capsys.readouterr()
    served = Served("runs/faq", workspace, name="faq")
    try:
        exec(compile(client, "docs/encoding.md", "exec"), {"URL": served.url})
    finally:
        served.process.kill()
        served.process.join()
    assert capsys.readouterr().out == "32\n"
    names = {}
    exec(compile(index, "docs/encoding.md", "exec"), names)
    assert names["index"].ntotal == 24 and names["scores"].shape == (1, 3)


@pytest.mark.slow
def test_own_data_in_three_commands_with_the_embedded_base(tmp_path):
    """The README's commands as a reader types them: a few minutes on two cores."""
    rows = [(f"Hvordan kommer man til ø nummer {n}?", f"Man sejler til ø nummer {n} fra havnen.") for n in range(24)]
    (tmp_path / "faq.csv").write_text("Spørgsmål;Svar\n" + "".join(f"{q};{a}\n" for q, a in rows), encoding="cp1252")
    said = {}
    for command in (
        c for c in commands((ROOT / "README.md").read_text(encoding="utf-8")) if any("faq" in w for w in c)
    ):
        done = subprocess.run(
            [sys.executable, "-m", "l2v", *command[1:]], cwd=tmp_path, capture_output=True, text=True, timeout=1800
        )
        assert done.returncode == 0, done.stderr
        said[command[1]] = done.stdout + done.stderr
    assert "faq.csv: 24 pairs" in said["init"] and "read as Windows-1252" in said["init"]
    assert "done, adapter in runs/faq/supervised" in said["train"] and "l2v search runs/faq" in said["train"]
    assert said["search"].count("Man sejler til ø nummer") == 3
