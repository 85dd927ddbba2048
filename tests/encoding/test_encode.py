"""`l2v encode`: rows, order, ids and columns of every format; resuming; what it refuses."""

import gzip
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file
from support.processes import free_port, training_environment

from l2v import Encoder
from l2v.commands import main as cli
from l2v.encoding import rows
from l2v.encoding.join import read_facts


@pytest.fixture(scope="module")
def encoder(base):
    return Encoder.from_pretrained(base)


@pytest.fixture
def encode(base, capsys, monkeypatch, tmp_path):
    """encode(file, out, *options, expect=0) -> what was printed; chunks have 7 rows."""
    monkeypatch.setattr(rows, "CHUNK_ROWS", 7)

    def encode(file, out, *options, expect=0):
        capsys.readouterr()
        code = cli.main(["encode", str(base), str(file), "--out", str(tmp_path / out), *map(str, options)])
        said = capsys.readouterr()
        assert code == expect, said.err
        return said

    return encode


def ids(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_ids_and_vectors_of_every_format(encode, encoder, tmp_path, sentences):
    texts = [" ".join(sentences[: 1 + n % 5]) for n in range(30)]
    lines = [json.dumps({"id": f"x{n}", "text": text, "n": n}) for n, text in enumerate(texts)]
    with gzip.open(tmp_path / "a.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join(lines))
    expected = encoder.encode(texts)
    for out in ("a.npy", "a.safetensors", "a.parquet"):
        said = encode(tmp_path / "a.jsonl.gz", out)
        assert f"{tmp_path / out}: 30 vectors of 32 dimensions; instruction: none" in said.out
        assert not (tmp_path / f"{out}.work").exists()
    np.testing.assert_allclose(np.load(tmp_path / "a.npy", allow_pickle=False), expected, atol=1e-6)
    np.testing.assert_allclose(load_file(tmp_path / "a.safetensors")["vectors"], expected, atol=1e-6)
    table = pq.read_table(tmp_path / "a.parquet")
    assert table.column_names == ["id", "text", "n", "embedding"]
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), 32)
    np.testing.assert_allclose(np.stack(table["embedding"].to_numpy()), expected, atol=1e-6)
    assert table.drop_columns(["embedding"]).to_pylist() == [json.loads(line) for line in lines]
    shown = str(tmp_path / "a.jsonl.gz")
    assert ids(tmp_path / "a.npy.ids.jsonl") == [{"file": shown, "row": n + 1, "id": f"x{n}"} for n in range(30)]
    for out in ("a.npy", "a.safetensors", "a.parquet"):
        facts = read_facts(tmp_path / out)
        assert (facts["rows"], facts["dimensions"], facts["precision"]) == (30, 32, "fp32")


def test_dimensions_side_and_task(encode, encoder, tmp_path, sentences):
    (tmp_path / "q.txt").write_text("\n".join(sentences[:5]), encoding="utf-8")
    encode(tmp_path / "q.txt", "q.npy", "--dimensions", 8, "--task", "question-da", "--side", "query")
    found = np.load(tmp_path / "q.npy", allow_pickle=False)
    expected = encoder.encode(sentences[:5], "Find den tekst, der besvarer spørgsmålet:", dimensions=8)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    encode(tmp_path / "q.txt", "d.npy", "--task", "question-da")  # a document has no instruction
    plain = np.load(tmp_path / "d.npy", allow_pickle=False)
    np.testing.assert_allclose(plain, encoder.encode(sentences[:5]), atol=1e-6)
    encode(tmp_path / "q.txt", "s.npy", "--task", "same-topic-da")  # both sides are the same
    same = np.load(tmp_path / "s.npy", allow_pickle=False)
    np.testing.assert_allclose(same, encoder.encode(sentences[:5], "Find en tekst om det samme emne:"), atol=1e-6)


def test_parquet_columns_keep_their_types(encode, tmp_path, sentences):
    table = pa.table(
        {
            "tekst": sentences[:20],
            "price": pa.array([1] * 20, pa.decimal128(9, 2)),
            "when": pa.array(range(20), pa.timestamp("us", tz="Europe/Copenhagen")),
            "tags": pa.array([["a"], None] * 10, pa.list_(pa.string())),
            "kind": pa.array(["x", "y"] * 10).dictionary_encode(),
            "meta": pa.array([{"a": 1, "b": None}] * 20, pa.struct([("a", pa.int32()), ("b", pa.string())])),
            "small": pa.array(range(20), pa.uint8()),
        }
    )
    pq.write_table(table, tmp_path / "in.parquet")
    encode(tmp_path / "in.parquet", "out.parquet")
    found, given = (
        pq.read_table(tmp_path / "out.parquet").drop_columns(["embedding"]),
        pq.read_table(tmp_path / "in.parquet"),
    )
    assert found.schema.equals(given.schema) and found.to_pylist() == given.to_pylist()
    encode(tmp_path / "in.parquet", "few.parquet", "--columns", "small, tekst", "--vector-column", "v")
    assert pq.read_table(tmp_path / "few.parquet").column_names == ["small", "tekst", "v"]


def test_fields_of_json_lose_no_digit(encode, tmp_path, sentences, write_jsonl):
    """Types that differ from chunk to chunk: null, integer and float, too long an integer, lists, and nothing in common."""
    rows = [
        {"text": text, "late": None, "number": 1, "long": n, "list": [], "any": n}
        for n, text in enumerate(sentences[:7])
    ]
    rows += [
        {"text": text, "late": "x", "number": 0.5, "long": 2**53 + 1, "list": ["b"], "any": {"k": n}}
        for n, text in enumerate(sentences[7:14])
    ]
    rows += [{"text": text, "number": 2, "long": 0.5, "list": None, "any": "æ"} for text in sentences[14:16]]
    said = encode(write_jsonl(tmp_path / "in.jsonl", rows), "out.parquet")
    assert "stored as JSON texts: long, any" in said.err
    found = pq.read_table(tmp_path / "out.parquet").drop_columns(["embedding"]).to_pylist()
    for row in found:
        row["long"], row["any"] = json.loads(row["long"]), json.loads(row["any"])
    assert found == [{"late": None} | row for row in rows]


@pytest.mark.parametrize(
    ("name", "content", "options", "sentence"),
    [
        ("a.txt", "en\n\nto\n", [], "a.txt, line 2: 'text' is empty"),
        ("a.jsonl", '{"text": "en"}\n{"text": null}\n', [], "a.jsonl, line 2: 'text' is empty"),
        ("a.jsonl", '{"text": "en"}\n{"tekst": "to"}\n', [], "a.jsonl, line 2: the field 'text' is absent; found tekst"),
        ("a.jsonl", '{"text": "en"}\n{"text": 3}\n', [], "a.jsonl, line 2: the field 'text' is text; found int"),
        ("a.jsonl", '{"text": "en"}\n{"text": "to"\n', [], "a.jsonl, line 2: malformed JSON"),
        ("a.csv", "id,body\n1,en\n", ["--column", "krop"], "a.csv: the field 'krop' is absent; found id, body"),
        ("a.csv", "id,body\n1,en\n", ["--column", "body", "--id", "nr"], "a.csv: the field 'nr' is absent"),
        ("a.csv", "id,text\n1,en\n", ["--columns", "titel"], "a.csv: the field 'titel' is absent"),
        ("a.jsonl", '{"text": "en", "embedding": 1}\n', [], "has a field 'embedding' already"),
        ("a.jsonl", '{"text": "en"}\n', ["--dimensions", "33"], "--dimensions is 33; the vectors of"),
        ("a.txt", "\n\n", ["--empty", "skip"], "holds no text to encode"),
        ("a.md", "en", [], "unknown file type '.md'"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(encode, tmp_path, name, content, options, sentence):
    (tmp_path / name).write_text(content, encoding="utf-8")
    said = encode(tmp_path / name, "out.parquet", *options, expect=1)
    assert sentence in said.err and said.err.startswith("l2v: ") and len(said.err.splitlines()) == 1
    assert not (tmp_path / "out.parquet").exists()


def test_other_refusals(encode, tmp_path, sentences):
    (tmp_path / "a.txt").write_text("\n".join(sentences[:3]), encoding="utf-8")
    assert (
        "write to a file that ends in .npy, .safetensors or .parquet"
        in encode(tmp_path / "a.txt", "a.bin", expect=1).err
    )
    assert "--columns needs a .parquet file" in encode(tmp_path / "a.txt", "a.npy", "--columns", "x", expect=2).err
    assert "--processes is 0" in encode(tmp_path / "a.txt", "a.npy", "--processes", 0, expect=2).err
    assert "b.txt: file not found" in encode(tmp_path / "b.txt", "a.npy", expect=1).err
    (tmp_path / "a.npy").write_bytes(b"mine")
    assert "the file exists; remove it" in encode(tmp_path / "a.txt", "a.npy", expect=1).err
    assert (tmp_path / "a.npy").read_bytes() == b"mine"


def test_empty_texts(encode, encoder, tmp_path, sentences):
    (tmp_path / "a.txt").write_text(f"{sentences[0]}\n  \n{sentences[1]}\n", encoding="utf-8")
    encode(tmp_path / "a.txt", "z.npy", "--empty", "zeros")
    zeros = np.load(tmp_path / "z.npy", allow_pickle=False)
    np.testing.assert_allclose(zeros[[0, 2]], encoder.encode(sentences[:2]), atol=1e-6)
    assert not zeros[1].any()
    said = encode(tmp_path / "a.txt", "s.npy", "--empty", "skip")
    assert "1 row with an empty text skipped" in said.err
    assert [row["row"] for row in ids(tmp_path / "s.npy.ids.jsonl")] == [1, 3]


def test_texts_that_are_cut_are_counted_over_all_chunks(encode, tmp_path, sentences):
    (tmp_path / "a.txt").write_text("\n".join([" ".join(sentences[:30])] * 9 + ["kort"]), encoding="utf-8")
    said = encode(tmp_path / "a.txt", "a.npy", "--length", "64")
    assert "9 of 10 texts are longer than 64 tokens and were cut" in said.err


def test_a_finished_file_is_kept_and_other_content_refused(encode, tmp_path, sentences):
    (tmp_path / "a.txt").write_text("\n".join(sentences[:9]), encoding="utf-8")
    encode(tmp_path / "a.txt", "a.npy")
    stamp = (tmp_path / "a.npy").stat().st_mtime_ns
    assert "9 vectors of 32 dimensions, finished before" in encode(tmp_path / "a.txt", "a.npy").out
    assert "the file exists with another dimensions; remove it" in encode(
        tmp_path / "a.txt", "a.npy", "--dimensions", 4, expect=1
    ).err  # fmt: skip
    (tmp_path / "a.txt").write_text("\n".join(sentences[1:10]), encoding="utf-8")
    assert "the file exists with another files" in encode(tmp_path / "a.txt", "a.npy", expect=1).err
    assert (tmp_path / "a.npy").stat().st_mtime_ns == stamp


def test_shards_of_other_options_are_not_mixed(encode, encoder, tmp_path, sentences, monkeypatch):
    (tmp_path / "a.txt").write_text("\n".join(sentences[:30]), encoding="utf-8")
    calls, original = [], Encoder.encode

    def stops(self, texts, *rest, **options):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(texts)
        return original(self, texts, *rest, **options)

    monkeypatch.setattr(Encoder, "encode", stops)
    assert "the same command resumes" in encode(tmp_path / "a.txt", "a.npy", expect=1).err
    monkeypatch.undo()
    monkeypatch.setattr(rows, "CHUNK_ROWS", 7)
    encode(tmp_path / "a.txt", "a.npy", "--instruction", "Find:")
    np.testing.assert_allclose(
        np.load(tmp_path / "a.npy", allow_pickle=False), encoder.encode(sentences[:30], "Find:"), atol=1e-6
    )


def one_rank(environment, command, log):
    """A rank of a launcher, in a process that was forked with all imports done."""
    os.environ |= environment
    with open(log, "w", encoding="utf-8") as sys.stdout, open(log, "a", encoding="utf-8") as sys.stderr:
        code = cli.main(command)
    os._exit(code)


@pytest.fixture
def start(base, tmp_path, monkeypatch):
    """start(file, out, world) -> processes that encode it together; chunks have 7 rows. Killed at the end of the test."""
    monkeypatch.setattr(rows, "CHUNK_ROWS", 7)
    context, started = multiprocessing.get_context("fork"), []

    def start(file, out, world):
        group = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        command = ["encode", str(base), str(file), "--out", str(out)]
        own = [
            context.Process(
                target=one_rank, args=(group | {"RANK": str(n), "LOCAL_RANK": str(n)}, command, tmp_path / f"{n}.log")
            )
            for n in range(world)
        ]  # fmt: skip
        for process in own:
            process.start()
        started.extend(own)
        return own

    yield start
    for process in started:
        process.kill()
        process.join()


def test_killed_and_resumed_over_ranks_and_alone(start, encode, encoder, tmp_path, sentences):
    """Two ranks are killed in the middle; one process without a launcher finishes."""
    texts = [f"{text} {n}" for n in range(4) for text in sentences]
    (tmp_path / "a.txt").write_text("\n".join(texts), encoding="utf-8")
    out = tmp_path / "a.npy"
    ranks = start(tmp_path / "a.txt", out, 2)
    until = time.monotonic() + 90
    while len(found := list(tmp_path.glob("a.npy.work/*/shard-*.arrow"))) < 20 and time.monotonic() < until:
        time.sleep(0.01)
    for rank in ranks:
        rank.kill()
        rank.join()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("a.npy.work/*/shard-*.arrow")}
    assert 20 <= len(before) < 138 and not out.exists(), found
    assert {int(path.stem.removeprefix("shard-")) % 2 for path in before} == {0, 1}
    encode(tmp_path / "a.txt", "a.npy")
    np.testing.assert_allclose(np.load(out, allow_pickle=False), encoder.encode(texts), atol=1e-6)
    assert [row["row"] for row in ids(tmp_path / "a.npy.ids.jsonl")] == list(range(1, len(texts) + 1))


def test_ranks_give_the_file_of_one_process_and_one_sentence(start, encode, tmp_path, sentences):
    (tmp_path / "a.txt").write_text("\n".join(sentences[:40]), encoding="utf-8")
    for rank in (ranks := start(tmp_path / "a.txt", tmp_path / "three.npy", 3)):
        rank.join(60)
    logs = [(tmp_path / f"{n}.log").read_text(encoding="utf-8") for n in range(3)]
    assert [rank.exitcode for rank in ranks] == [0, 0, 0], logs
    assert "40 vectors of 32 dimensions" in logs[0] and logs[1:] == ["", ""]
    encode(tmp_path / "a.txt", "one.npy")
    assert (tmp_path / "one.npy").read_bytes() == (tmp_path / "three.npy").read_bytes()
    (tmp_path / "bad.txt").write_text("\n".join([*sentences[:20], "", sentences[20]]), encoding="utf-8")
    for rank in (ranks := start(tmp_path / "bad.txt", tmp_path / "bad.npy", 2)):
        rank.join(60)
    logs = [(tmp_path / f"{n}.log").read_text(encoding="utf-8") for n in range(2)]
    assert [rank.exitcode for rank in ranks] == [1, 1]
    assert "bad.txt, line 21: 'text' is empty" in logs[0] and logs[1] == ""


def test_a_full_disk_is_a_sentence_and_loses_nothing(encode, encoder, tmp_path, sentences):
    (tmp_path / "a.txt").write_text("\n".join(sentences[:60]), encoding="utf-8")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:  # shards fit, the joined file does not
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
        said = encode(tmp_path / "a.txt", "a.npy", expect=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert "cannot be written: File too large; finished work is kept, and the same command resumes" in said.err
    assert not (tmp_path / "a.npy").exists() and len(list(tmp_path.glob("a.npy.work/*/shard-*.arrow"))) == 9
    assert not list(tmp_path.rglob("*.partial"))
    encode(tmp_path / "a.txt", "a.npy")
    np.testing.assert_allclose(np.load(tmp_path / "a.npy"), encoder.encode(sentences[:60]), atol=1e-6)


def test_more_than_the_disk_has_is_refused_before_any_work(encode, tmp_path, sentences, monkeypatch):
    (tmp_path / "a.txt").write_text("\n".join(sentences[:3]), encoding="utf-8")
    real = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real._replace(free=100))
    said = encode(tmp_path / "a.txt", "a.npy", expect=1)
    assert "the vectors need 0.0 GB while they are written, and 0.0 GB are free" in said.err
    assert not list(tmp_path.glob("a.npy*"))


def test_a_second_process_does_not_write_the_same_file(encode, tmp_path, sentences):
    import fcntl

    (tmp_path / "a.txt").write_text("\n".join(sentences[:3]), encoding="utf-8")
    (tmp_path / "a.npy.work").mkdir()
    with open(tmp_path / "a.npy.work" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another l2v encode is writing it now" in encode(tmp_path / "a.txt", "a.npy", expect=1).err
    encode(tmp_path / "a.txt", "a.npy")
    assert os.path.getsize(tmp_path / "a.npy") > 0


CHILD = """
import resource, sys
from l2v.commands.main import main
code = main(sys.argv[1:])
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
sys.exit(code)
"""


@pytest.mark.slow
def test_200_000_texts_in_flat_memory_killed_and_resumed(tmp_path, bos_tokenizer_folder, tiny_config, sentences):
    """A tenth of the texts and all of them take the same memory; a kill in the middle loses no row and doubles none."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    base = tmp_path / "base"
    LlamaForCausalLM(LlamaConfig(**tiny_config | {"num_hidden_layers": 1})).save_pretrained(base)
    AutoTokenizer.from_pretrained(bos_tokenizer_folder).save_pretrained(base)
    count, few = 200_000, 20_000
    texts = [f"{sentences[n % 240]} {n}" for n in range(count)]
    for name, lines in (("few.jsonl", texts[:few]), ("all.jsonl", texts)):
        rows = (json.dumps({"id": n, "text": text}) for n, text in enumerate(lines))
        (tmp_path / name).write_text("\n".join(rows), encoding="utf-8")

    def start(name, out):
        command = ["encode", str(base), str(tmp_path / name), "--out", str(tmp_path / out), "--dimensions", "8"]
        return subprocess.Popen(
            [sys.executable, "-c", CHILD, *command], env=training_environment(), stdout=subprocess.PIPE, text=True
        )

    def peak(process):
        said = process.communicate(timeout=3600)[0]
        assert process.returncode == 0, said
        return int(said.split("peak")[1]) / 1024

    small = peak(start("few.jsonl", "few.parquet"))
    first = start("all.jsonl", "all.parquet")
    while first.poll() is None and len(list(tmp_path.glob("all.parquet.work/*/shard-*.arrow"))) < 15:
        time.sleep(0.02)
    first.kill()
    first.communicate()
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("all.parquet.work/*/shard-*.arrow")}
    assert 15 <= len(kept) < 49
    large = peak(start("all.jsonl", "all.parquet"))
    print(f"peak memory: {few:,} texts {small:.0f} MiB, {count:,} texts {large:.0f} MiB")
    assert large < small + 40  # MiB; the texts alone are 10, their rows in Python over 100
    table = pq.read_table(tmp_path / "all.parquet")
    assert table["id"].to_pylist() == list(range(count)) and table["text"].to_pylist() == texts
    sample = list(range(0, count, 997))
    expected = Encoder.from_pretrained(base).encode([texts[n] for n in sample], dimensions=8)
    np.testing.assert_allclose(np.stack(table["embedding"].to_numpy()[sample]), expected, atol=1e-5)
    assert pq.ParquetFile(tmp_path / "all.parquet").metadata.num_row_groups == 49


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["l2v", "torchrun", "deepspeed"])
def test_every_launcher(launcher, base, encoder, tmp_path, sentences):
    (tmp_path / "a.txt").write_text("\n".join(sentences), encoding="utf-8")
    own = ["encode", str(base), str(tmp_path / "a.txt"), "--out", str(tmp_path / "a.npy")]
    port = str(free_port())
    start = {
        "l2v": ["-m", "l2v", *own, "--processes", "2"],
        "torchrun": ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port, "-m", "l2v", *own],
        "deepspeed": [
            "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", port, "--module", "l2v", *own,
        ],
    }  # fmt: skip
    command = [sys.executable, *start[launcher]]
    done = subprocess.run(command, env=training_environment(), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0 and done.stdout.count("240 vectors of 32 dimensions") == 1, done.stdout + done.stderr
    np.testing.assert_allclose(np.load(tmp_path / "a.npy", allow_pickle=False), encoder.encode(sentences), atol=1e-6)


@pytest.mark.parametrize("source", ["data", "data/*.jsonl", "data/**"])
def test_what_is_written_is_never_read_as_data(base, tmp_path, monkeypatch, capsys, source):
    """Not the vectors, and not the ids and facts beside them."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jsonl").write_text('{"text": "Hunden løber."}\n', encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["encode", str(base), source, "--out", "data/v.npy"]) == 1
    assert "v.npy: lies among the texts of data" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["a.jsonl"]


def test_every_line_of_a_text_file_has_a_vector_also_at_its_end(base, tmp_path):
    (tmp_path / "t.txt").write_text("Hunden løber.\n\nKatten sover.\n\n\n", encoding="utf-8")
    assert (
        cli.main(["encode", str(base), str(tmp_path / "t.txt"), "--out", str(tmp_path / "v.npy"), "--empty", "zeros"])
        == 0
    )
    assert np.load(tmp_path / "v.npy").any(1).tolist() == [True, False, True, False, False]
    assert [row["row"] for row in ids(tmp_path / "v.npy.ids.jsonl")] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--columns", ","], "--columns names no field"),
        (["--task", "question-da", "--instruction", "Find svaret"], "give one of them"),
    ],
)
def test_options_that_would_have_no_effect(base, tmp_path, capsys, options, says):
    (tmp_path / "t.jsonl").write_text('{"text": "Hunden løber."}\n', encoding="utf-8")
    assert (
        cli.main(["encode", str(base), str(tmp_path / "t.jsonl"), "--out", str(tmp_path / "v.parquet"), *options]) == 2
    )
    assert says in capsys.readouterr().err


def test_a_name_given_twice_is_one_column_and_a_killed_join_leaves_nothing(base, tmp_path):
    (tmp_path / "t.jsonl").write_text('{"text": "Hunden løber.", "a": 1}\n', encoding="utf-8")
    (left := tmp_path / ".v.parquet.1.partial").write_bytes(b"half")
    out = tmp_path / "v.parquet"
    assert cli.main(["encode", str(base), str(tmp_path / "t.jsonl"), "--out", str(out), "--columns", "a,a"]) == 0
    assert pq.read_schema(out).names == ["a", "embedding"] and not left.exists()
