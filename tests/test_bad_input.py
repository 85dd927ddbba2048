import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.processes import finish, start_ranks

from l2v.training import checkpoint

ALONE = {"stages.simcse.from": "base", "stages.supervised.from": "base"}


@pytest.fixture
def recipe(tiny_recipe, tmp_path):
    """recipe(**overrides) -> Path of the tiny recipe, whose stages all start from the base."""
    return lambda **overrides: tiny_recipe(tmp_path, **ALONE | overrides)


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def assert_refused(output: str, *parts: str, run: Path | None = None) -> None:
    """One sentence with these parts, no traceback, and of the run nothing but the mark of whose folder it is."""
    sentences = [line for line in output.splitlines() if line.startswith("l2v: ")]
    assert len(sentences) == 1, output
    for part in parts:
        assert part in sentences[0], output
    assert "Traceback" not in output
    left = files(run or Path.cwd() / "run")
    assert all(name.endswith("/stage.json") for name in left), left


def failed_start(run_here, recipe, folder: Path) -> None:
    """A start that claims the folder and then finds nothing to train on."""
    (folder / "empty.jsonl").write_text("")
    output = run_here(recipe(**{"stages.mntp.data": str(folder / "empty.jsonl")}), "--stage", "mntp", expect=1)
    assert "the data set is empty" in output and (folder / "run/mntp/stage.json").is_file()


def test_a_recipe_that_is_not_there(run_here):
    assert_refused(run_here("nowhere.yaml", expect=2), "no recipe 'nowhere.yaml': give a YAML file or one of")


@pytest.mark.parametrize(
    ("overrides", "arguments", "parts"),
    [
        ({"stages.mntp.bacth": 4}, [], ["tiny.yaml:", "unknown key 'stages.mntp.bacth'; did you mean 'batch'?"]),
        ({"stages.mntp.steps": 0}, [], ["stage 'mntp': steps is 0 and must be at least 1"]),
        ({}, ["mntp.stepz=3"], ["command line 'mntp.stepz=3': unknown key", "did you mean 'steps'?"]),
        ({}, ["--stage", "mnpt"], ["no stage 'mnpt'; did you mean 'mntp'?"]),
        ({"base.mask_token": "to ord"}, ["--stage", "mntp"], ["base.mask_token 'to ord' is", "choose one that is one"]),
        ({"lora.targets": ["no_proj"]}, ["--stage", "mntp"], ["lora.targets: no_proj match no linear layer"]),
        ({"base.template": {"prefix": "bruger: "}}, ["--stage", "simcse", "length=3"], ["leaves no room"]),
        ({"base.config": {"model_type": "lama"}}, ["--stage", "mntp"], ["base.config", "lama"]),
        (
            {"stages.simcse.directions": ["query_to_doc", "doc_to_qeury"]},
            ["--stage", "simcse"],
            ["tiny.yaml:", "stages.simcse.directions[1] is 'doc_to_qeury'; choose one of query_to_doc, query_to_query"],
        ),
        (
            {},
            ["--stage", "simcse", "partition=per_direction", "directions=[query_to_doc, query_to_query]"],
            ["tiny.yaml: stage 'simcse': partition: per_direction takes the directions query_to_doc and doc_to_query"],
        ),
        ({}, ["--stage", "simcse", "matryoshka=[16, 8]"], ["stage 'simcse': matryoshka is [16, 8]; give 1 to 16"]),
        ({"base.config": {"hidden_size": 8}}, ["--stage", "mntp"], ["base.config needs a model_type, for example"]),
    ],
)
def test_a_recipe_mistake_is_exit_code_2(run_here, recipe, overrides, arguments, parts):
    assert_refused(run_here(recipe(**overrides), *arguments, expect=2), *parts)


@pytest.mark.parametrize(
    ("stage", "content", "parts"),
    [
        ("mntp", None, ["documents.jsonl: file not found"]),
        ("mntp", '{"text": "god"}\n{"text": \n', ["documents.jsonl, line 2: malformed JSON", "is one object"]),
        ("mntp", '{"ord": "god"}\n', ["documents.jsonl, line 1: the field 'text' is absent; found ord"]),
        ("mntp", '{"text": "god"}\n{"text": " "}\n', ["line 2: 'text' is empty; remove the row or set skip_empty"]),
        ("mntp", "", ["documents.jsonl: the data set is empty; it needs at least one row"]),
        ("mntp", b'{"text": "\\ud83d"}\n', ["documents.jsonl, line 1: 'text' holds half of a surrogate pair"]),
        ("simcse", '{"text": "alene"}\n', ["stage 'simcse': 1 example leaves no in-batch negatives; give at least 2"]),
        ("supervised", '{"query": "Hvem?"}\n', ["pairs.jsonl, line 1: the field 'positive' is absent; found query"]),
        ("supervised", '{"query": "Hvem?", "positive": ""}\n', ["pairs.jsonl, line 1: 'positive' is empty"]),
    ],
)
def test_bad_data_is_exit_code_1(run_here, recipe, tmp_path, stage, content, parts):
    path = recipe()
    data = tmp_path / {"mntp": "documents", "simcse": "sentences", "supervised": "pairs"}[stage]
    data = data.with_suffix(".jsonl")
    data.unlink()
    if content is not None:
        data.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert_refused(run_here(path, "--stage", stage, expect=1), *parts)


def test_bad_held_out_data_is_found_before_training(run_here, recipe):
    output = run_here(recipe(**{"stages.mntp.eval_data": "gone.jsonl"}), "--stage", "mntp", expect=1)
    assert_refused(output, "gone.jsonl: file not found")


def test_an_example_that_fits_no_micro_batch(run_here, recipe):
    output = run_here(recipe(**{"stages.supervised.micro_tokens": 48}), "--stage", "supervised", expect=1)
    assert_refused(output, "tokens (all its texts) and micro_tokens is 48; raise micro_tokens or lower length")


def test_a_matryoshka_prefix_beyond_the_base(run_here, recipe):
    output = run_here(recipe(), "--stage", "simcse", "matryoshka=[8, 33]", expect=1)
    assert_refused(output, "stage 'simcse': matryoshka asks for a prefix of 33 and the vectors of 'tiny-llama' have 32")
    output = run_here(recipe(), "--stage", "simcse", "matryoshka=[8, 16]", "eval_data=sentences.jsonl")
    assert "simcse: dimensions beyond 16 of 32 are in no matryoshka length and learn nothing" in output


def test_a_base_that_is_not_there(run_here, recipe, tokenizer_folder):
    gone = {"base.model": "/nowhere/llama", "base.init": "pretrained", "base.config": None}
    output = run_here(recipe(**gone), "--stage", "mntp", expect=1)
    assert_refused(output, "the base '/nowhere/llama' was not found")
    output = run_here(recipe(**gone, **{"base.tokenizer": None}), "--stage", "mntp", expect=1)
    assert_refused(output, "/nowhere/llama")
    output = run_here(recipe(**gone | {"base.model": tokenizer_folder}), "--stage", "mntp", expect=1)
    assert_refused(output, tokenizer_folder)


def test_a_base_without_weights(run_here, recipe, config_folder):
    empty = {"base.model": config_folder, "base.init": "pretrained", "base.config": None}
    output = run_here(recipe(**empty), "--stage", "mntp", expect=1)
    assert_refused(output, f"the base '{config_folder}' cannot be loaded")


@pytest.mark.parametrize("adapter", ["/nowhere/adapter", "empty"])
def test_an_adapter_that_is_not_there(run_here, recipe, tmp_path, adapter):
    (tmp_path / "empty").mkdir()
    output = run_here(recipe(), "--stage", "simcse", f"adapters=[{adapter}]", expect=1)
    assert_refused(output, adapter)


def test_a_stage_whose_parent_is_not_trained(run_here, recipe, tmp_path):
    output = run_here(recipe(**{"stages.simcse.from": "mntp"}), "--stage", "simcse", expect=1)
    assert_refused(output, "stage 'simcse' starts from 'mntp', which is not trained yet", "train it first")
    assert not (tmp_path / "run").exists()


def test_a_fixed_recipe_goes_into_the_same_folder(run_here, recipe, tmp_path):
    good = recipe()
    failed_start(run_here, recipe, tmp_path)
    run_here(good := recipe(), "--stage", "mntp")
    assert good.is_file() and (tmp_path / "run/mntp/adapter/adapter_model.safetensors").is_file()


def test_a_folder_of_another_recipe_is_left_alone(run_here, recipe, tmp_path):
    path, run = recipe(), tmp_path / "run" / "mntp"
    assert "mntp: done, adapter in" in run_here(path, "--stage", "mntp")
    before = {name: (run / name).read_bytes() for name in files(run)}
    output = run_here(path, "--stage", "mntp", "lr=1e-3", expect=1)
    assert f"l2v: {run} belongs to another recipe: stages.mntp.lr was 0.005 and is now 0.001;" in output
    assert (
        "choose another folder with out=..., or start from scratch with --fresh" in output and "Traceback" not in output
    )
    assert {name: (run / name).read_bytes() for name in files(run)} == before
    assert "mntp: already trained" in run_here(path, "--stage", "mntp", "log_every=2")
    assert "mntp: done" in run_here(path, "--stage", "mntp", "lr=1e-3", "--fresh")
    assert (run / "adapter/adapter_model.safetensors").read_bytes() != before["adapter/adapter_model.safetensors"]


def test_a_run_of_a_version_that_knew_fewer_keys_goes_on(run_here, recipe, tmp_path):
    path, mark = recipe(), tmp_path / "run" / "simcse" / "stage.json"
    run_here(path, "--stage", "simcse")
    facts = json.loads(mark.read_text())
    for key in ("directions", "matryoshka", "partition"):
        del facts["recipe"]["stages"]["simcse"][key]
    mark.write_text(json.dumps(facts))
    assert "simcse: already trained" in run_here(path, "--stage", "simcse")
    output = run_here(path, "--stage", "simcse", "matryoshka=[8, 32]", expect=1)
    assert "stages.simcse.matryoshka was null and is now [8, 32]" in output


def test_a_stage_is_not_done_when_its_parent_was_trained_again(run_here, recipe):
    path = recipe(**{"stages.simcse.from": "mntp"})
    run_here(path, "--stage", "mntp")
    run_here(path, "--stage", "simcse")
    assert "simcse: already trained" in run_here(path, "--stage", "simcse")
    run_here(path, "--stage", "mntp", "mntp.seed=7", "--fresh")
    changed = recipe(**{"stages.simcse.from": "mntp", "stages.mntp.seed": 7})
    output = run_here(changed, "--stage", "simcse", expect=1)
    assert "already trained" not in output and "--fresh" in output


def test_a_folder_of_something_else_is_left_alone(run_here, recipe, tmp_path):
    thesis = tmp_path / "run" / "mntp" / "thesis.tex"
    thesis.parent.mkdir(parents=True)
    thesis.write_text("years of work")
    for fresh in ([], ["--fresh"]):
        output = run_here(recipe(), "--stage", "mntp", *fresh, expect=1)
        assert f"{thesis.parent} is not empty and not a run of l2v: choose another folder with out=..." in output
        assert "Traceback" not in output and files(tmp_path / "run") == {"mntp/thesis.tex"}


def test_a_folder_that_cannot_be_written(run_here, recipe, tmp_path):
    (tmp_path / "run").write_text("a file where the folder should be")
    output = run_here(recipe(), "--stage", "mntp", expect=1)
    assert "cannot be written" in output and "choose another folder with out=..." in output
    assert "Traceback" not in output


def test_a_damaged_mark_is_one_sentence(run_here, recipe, tmp_path):
    failed_start(run_here, recipe, tmp_path)
    (tmp_path / "run/mntp/stage.json").write_text('{"name": ')
    assert_refused(run_here(recipe(), "--stage", "mntp", expect=1), "stage.json: damaged; remove")


def test_a_disk_that_takes_no_more(run_here, recipe, tmp_path):
    """A limit on file size stands in for a full disk: it needs no mount and holds for root as well."""
    path, run = recipe(**{"lora.r": 16}), tmp_path / "run" / "mntp"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, hard))
    try:
        output = run_here(path, "--stage", "mntp")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "step-000004: the checkpoint cannot be written (" in output and "Traceback" not in output
    assert "Training continues; the newest checkpoint is none" in output and "mntp: done" in output
    assert "adapter/adapter_model.safetensors" in files(run) and not list(run.glob("checkpoints/step-*"))


def test_metrics_on_a_full_disk(run_here, recipe, tmp_path):
    failed_start(run_here, recipe, tmp_path)
    (tmp_path / "run/mntp/metrics.jsonl").symlink_to("/dev/full")
    output = run_here(recipe(), "--stage", "mntp")
    assert (
        "metrics.jsonl cannot be written (No space left on device); training continues, its rows wait for space"
        in output
    )
    assert output.count("its rows wait") == 1 and "mntp: done" in output and "Traceback" not in output


def test_texts_beyond_the_length_are_counted(run_here, recipe):
    output = run_here(recipe(**{"stages.simcse.length": 12}), "--stage", "simcse")
    assert "simcse: 40 texts were longer than 12 tokens and were truncated; raise `length` to keep them whole" in output


def test_an_interrupt_before_the_first_step(run_here, recipe, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("l2v.training.stage.build", interrupted)
    output = run_here(recipe(), "--stage", "mntp", expect=1)
    assert_refused(output, "stopped before the first step; nothing has changed")


def test_two_ranks_say_one_sentence_and_end_with_the_same_exit_code(recipe, tmp_path):
    """Which the launcher passes on: training/test_launcher.py."""
    said = finish(start_ranks([[recipe(**{"base.mask_token": "to ord"})]] * 2), expect=2)
    assert_refused("".join(said), "base.mask_token 'to ord' is", run=tmp_path / "run")


def wait_for_rows(metrics: Path, rows: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 300
    while not metrics.is_file() or len(metrics.read_text().splitlines()) < rows:
        assert process.poll() is None and time.monotonic() < deadline, (
            "training ended or hangs before it could be stopped"
        )
        time.sleep(0.05)


def assert_stopped_and_continues(run_here, path: Path, run: Path, said: str) -> None:
    """An interrupt kept a checkpoint, and one rank takes every step that is left."""
    saved = checkpoint.newest(run / "checkpoints")
    assert saved is not None and 3 <= saved.step < 150
    assert f"l2v: stopped after step {saved.step}; the same command continues from there" in said
    assert "Traceback" not in said
    assert not (run / "adapter").exists() and not list(run.rglob("*.partial"))
    assert f"mntp: continues after step {saved.step}" in run_here(path, "--stage", "mntp")
    rows = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert rows == list(range(1, 151))
    assert (run / "adapter/adapter_model.safetensors").is_file()


def test_ctrl_c_keeps_a_checkpoint_and_the_same_command_continues(recipe, run_here, tmp_path):
    """Two ranks; one continues."""
    path, run = recipe(**{"stages.mntp.steps": 150}), tmp_path / "run" / "mntp"
    ranks = start_ranks([[path, "--stage", "mntp"]] * 2)
    try:
        wait_for_rows(run / "metrics.jsonl", 3, ranks[0])
    finally:
        for rank in ranks:
            rank.send_signal(signal.SIGINT)
    assert_stopped_and_continues(run_here, path, run, "".join(finish(ranks, expect=1)))


@pytest.mark.slow
def test_ctrl_c_reaches_the_ranks_through_the_launcher(recipe, run_here, cli_environment, tmp_path):
    """Two ranks under the launcher that `l2v train` starts; one continues."""
    path, run = recipe(**{"stages.mntp.steps": 150}), tmp_path / "run" / "mntp"
    log = tmp_path / "log.txt"
    with open(log, "w") as output:
        command = [sys.executable, "-m", "l2v.train", str(path), "--stage", "mntp", "--processes", "2"]
        process = subprocess.Popen(
            command, env=cli_environment, stdout=output, stderr=subprocess.STDOUT, cwd=tmp_path, start_new_session=True
        )
        try:
            wait_for_rows(run / "metrics.jsonl", 3, process)
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does
            code = process.wait(timeout=120)
        finally:
            process.kill()
    output = log.read_text()
    assert code == 1, output
    assert_stopped_and_continues(run_here, path, run, output)
