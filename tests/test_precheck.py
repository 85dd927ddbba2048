"""Mistakes are answered by the starting process, before torch is loaded, with the line or the override that is wrong."""

import json
import resource
import subprocess
import sys

import pytest
import yaml
from support.processes import training_environment

from l2v import train
from l2v.commands import completion, main
from l2v.commands.plan import GPUS
from l2v.data.precheck import check_data, check_disk
from l2v.errors import UserError
from l2v.plan.gpus import SHEETS
from l2v.recipe.load import load_recipe
from l2v.training import launcher

SECONDS = 2.0
HEAVY = ("torch", "transformers", "datasets", "deepspeed", "peft", "pandas")


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """A recipe of two stages on a CSV and a JSONL file, in the working folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "faq.csv").write_text("Spørgsmål;Svar\nHvem?;Hunden.\nHvor?;Her.\n", encoding="utf-8")
    (tmp_path / "texts.jsonl").write_text('{"indhold": "Hunden er her."}\n{"indhold": "Katten."}\n', encoding="utf-8")
    common = {"batch": 2, "steps": 1, "lr": 1e-3}
    stages = {
        "mntp": common | {"objective": "mntp", "data": "texts.jsonl"},
        "supervised": common
        | {
            "objective": "supervised",
            "from": "mntp",
            "data": [{"path": "faq.csv"}, {"path": "faq.csv", "query": "Spørgsmål"}],
        },
    }
    tree = {"name": "mine", "base": {"model": "no/where"}, "stages": stages}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return tmp_path / "mine.yaml"


def refused(capsys, *arguments, code=1):
    """The one sentence of `l2v train`, which never starts a launcher."""
    assert train.main(list(arguments)) == code
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1 and shown.err.startswith("l2v: ")
    return shown.err[5:-1]


@pytest.fixture(autouse=True)
def no_rank(monkeypatch):
    for key in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setattr(launcher, "_run_once", lambda *_: pytest.fail("the launcher was started"))


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        (
            "stages.supervised.data={path: faq.csv, positive: Svra}",
            "stage 'supervised': data: faq.csv: the field 'Svra' is absent; found Spørgsmål, Svar; did you mean 'Svar'?",
        ),
        (
            "supervised.eval_data=held.csv",
            "stage 'supervised': eval_data: held.csv: file not found; give a file, a folder",
        ),
        ("mntp.data=[texts.jsonl, 'n*.jsonl']", "stage 'mntp': data: n*.jsonl: no readable file matches"),
        ("mntp.data=notes.doc", "stage 'mntp': data: notes.doc: file not found"),
        (
            "mntp.data={path: texts.jsonl, text: body}",
            "stage 'mntp': data: texts.jsonl, line 1: the field 'body' is absent",
        ),
        (
            "supervised.data={path: faq.csv, negatives: forkert_*}",
            "stage 'supervised': data: faq.csv: the field 'forkert_*' is absent",
        ),
        ("supervised.data={path: faq.csv, group: emne}", "data: faq.csv: the field 'emne' is absent"),
    ],
)
def test_the_override_is_named_whatever_stage_it_belongs_to(recipe, capsys, override, sentence):
    message = refused(capsys, "mine.yaml", override)
    assert message.startswith(f"command line '{override}': stage '") and sentence in message


def test_the_line_of_the_recipe_is_named(recipe, capsys):
    lines = recipe.read_text(encoding="utf-8").splitlines()
    at = next(n for n, line in enumerate(lines, 1) if "query: Spørgsmål" in line)
    recipe.write_text(recipe.read_text(encoding="utf-8").replace("query: Spørgsmål", "query: Navn"), encoding="utf-8")
    assert refused(capsys, "mine.yaml").startswith(
        f"mine.yaml:{at}: stage 'supervised': data: faq.csv: the field 'Navn' is"
    )
    (recipe.parent / "texts.jsonl").unlink()
    at = next(n for n, line in enumerate(lines, 1) if "texts.jsonl" in line)
    assert refused(capsys, "mine.yaml").startswith(f"mine.yaml:{at}: stage 'mntp': data: texts.jsonl: file not found")


def test_what_only_the_reader_can_know_is_left_to_it(recipe):
    """A JSONL file whose later rows have the column, the Hub, the sample, an empty file, guessed names."""
    rows = [{"query": "a", "positive": "b"}] * 150 + [{"query": "a", "positive": "b", "hard": ["c"]}]
    (recipe.parent / "late.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (recipe.parent / "empty.jsonl").write_text("", encoding="utf-8")
    for data in ("{path: late.jsonl, negatives: hard}", "hub:some/set", "sample:da/train", "empty.jsonl", "'f*.csv'"):
        overrides = [f"supervised.data={data}"]
        check_data("mine.yaml", overrides, None, load_recipe("mine.yaml", overrides), ["mntp", "supervised"])


def test_plan_and_tune_refuse_a_missing_file(recipe, capsys):
    for verb in ("plan", "tune"):
        assert main.main([verb, "mine.yaml", "mntp.data=gone.txt"]) == 1
        assert (
            "command line 'mntp.data=gone.txt': stage 'mntp': data: gone.txt: file not found" in capsys.readouterr().err
        )


def test_a_name_near_to_a_recipe_and_a_file_of_data(recipe, capsys):
    assert refused(capsys, "mine", code=2) == "no recipe 'mine'; did you mean 'mine.yaml'?"
    message = refused(capsys, "faq.csv", code=2)
    assert message == "faq.csv is data, not a recipe: 'l2v init faq --data faq.csv' writes a recipe for it, faq.yaml"
    assert "give a YAML file or one of" in refused(capsys, "nothing", code=2)
    assert "unknown key 'stages.mntp.stepz'; did you mean 'steps'?" in refused(
        capsys, "mine.yaml", "mntp.stepz=1", code=2
    )


def test_the_disk_is_checked(recipe, tmp_path, monkeypatch):
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    shape = f"base.config={json.dumps(sizes | {'num_key_value_heads': 8})}"
    found = load_recipe("mine.yaml", [shape, "base.init=random"])
    # Llama-3-8B with r 16: 41,943,040 weights, 12 bytes each in a checkpoint, three at a time, and 4 in the adapter.
    needed = 2 * 41_943_040 * (3 * 12 + 4)
    usage = type("Usage", (), {"free": needed})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    check_disk(found, ["mntp", "supervised"])
    usage.free = needed - 1
    with pytest.raises(
        UserError, match=r"runs/mine: its adapters and checkpoints need about 3\.1 GiB, and 3,200 MiB are free"
    ):
        check_disk(found, ["mntp", "supervised"])
    check_disk(found, ["mntp"])
    found.stages["mntp"].lora = None  # 6,979,321,856 weights of linears, and an embedding of 1,000 rows
    found.base.config["vocab_size"] = 1000
    usage.free = (6_979_321_856 + 1000 * 4096) * (3 * 12 + 4) - 1
    with pytest.raises(UserError, match=r"its weights and checkpoints need about 260\.2 GiB"):
        check_disk(found, ["mntp"])
    usage.free += 1
    check_disk(found, ["mntp"])
    (tmp_path / "file").write_text("")
    found.out = str(tmp_path / "file" / "run")
    with pytest.raises(UserError, match=r"file cannot be written; choose another folder with out="):
        check_disk(found, ["mntp"])


def test_the_names_of_gpus_are_those_of_the_plan():
    assert set(GPUS) == set(SHEETS)


def start(*arguments):
    """(its output, processor seconds, heavy modules) of `l2v` in a process of its own."""
    code = (
        "import sys; from l2v.commands.main import main\n"
        "try: code = main(sys.argv[1:])\n"
        "except SystemExit as stopped: code = stopped.code\n"
        f"print('loaded', *({set(HEAVY)!r} & sys.modules.keys())); sys.exit(code)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {k: v for k, v in training_environment().items() if k not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    *_, loaded = done.stdout.splitlines()
    return done, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, loaded.split()[1:]


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "mistyped"],
        ["train", "mine.yaml", "supervised.data={path: faq.csv, positive: Svra}"],
        ["plan", "mine.yaml", "x=1"],
    ],
    ids=["recipe", "column", "key"],
)
def test_a_mistake_costs_less_than_two_seconds_of_a_processor(recipe, arguments):
    done, seconds, loaded = start(*arguments)
    assert done.returncode in (1, 2) and done.stderr.count("\n") == 1 and done.stderr.startswith("l2v: "), done.stderr
    assert loaded == [] and seconds < SECONDS


def test_help_of_every_verb_loads_nothing_heavy():
    """One process for all of them: what one verb loads would still be there at the end."""
    verbs = [verb.split() for verb, _ in completion.parsers()]
    code = (
        "import contextlib, io, json, sys; from l2v.commands.main import main\n"
        "for words in json.loads(sys.argv[1]):\n"
        "    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit): main([*words, '--help'])\n"
        f"    print(*words, bool(out.getvalue()), *({set(HEAVY)!r} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(verbs)],
        env=training_environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == [f"{' '.join(words)} True" for words in verbs]


@pytest.mark.parametrize("given", [None, "23456"])
def test_the_launcher_takes_a_free_port_unless_one_is_given(monkeypatch, given, tmp_path, capsys):
    """A second training on the machine has another port; the line of deepspeed below our own is not asked for."""
    monkeypatch.setattr(launcher, "RESTART_PAUSE", 0.0)
    monkeypatch.setattr(launcher, "HOSTFILE", tmp_path / "none")
    monkeypatch.delenv("MASTER_PORT", raising=False)
    if given:
        monkeypatch.setenv("MASTER_PORT", given)
    commands, codes = [], [247, 75]

    def run_once(command, environment):
        commands.append(command)
        return codes[len(commands) - 1], False

    monkeypatch.setattr(launcher, "_run_once", run_once)
    assert launcher.launch("some.module", ["x"], 2, restarts=1) == 75
    ports = [command[command.index("--master_port") + 1] for command in commands]
    if given:
        assert ports == [given] * 2
    else:
        assert all(1024 < int(port) < 65536 and port != "29500" for port in ports)
    assert all(command[-3:] == ["--module", "some.module", "x"] for command in commands)
    first, last = capsys.readouterr().err.splitlines()
    assert "the job ended with exit code 247 (a rank was killed by SIGKILL; the system does so when memory" in first
    assert first.endswith("; restart 1 of 1 in 0 s") and last == "l2v: the job ended with exit code 75"
    (tmp_path / "none").write_text("node1 slots=8\n")
    commands.clear()
    launcher.launch("some.module", [], 2, restarts=1)
    assert ("--master_port" in commands[0]) == bool(given), (
        "all nodes of a hostfile use deepspeed's port, or the given one"
    )


def test_what_comes_next_names_the_texts(recipe):
    pairs = load_recipe("mine.yaml", ["supervised.data={path: 'my faq.csv', positive: Svar}"])
    assert train._next(pairs, None) == (
        "Next:\n  l2v search runs/mine \"your query\" --texts 'my faq.csv' --column Svar\n"
        "  l2v eval runs/mine --stages --benchmark seb-da\n  l2v report runs/mine"
    )
    hub = load_recipe("mine.yaml", ["supervised.data=hub:a/b"])
    assert '"your query"\n' in train._next(hub, None)
