"""`l2v data synthesize`: against a server on this machine that errs in every way, and with a model of transformers."""

import json
import re
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from l2v.commands import main as cli
from l2v.data.sources import open_rows
from l2v.recipe import Source
from l2v.recipe.tasks import find_task
from l2v.synthesis import endpoint as endpoint_module
from l2v.synthesis.endpoint import Endpoint
from l2v.synthesis.journal import Answer, Journal
from l2v.synthesis.wording import STYLES, query_of, question

KEY = "sk-hemmelig-nogle-123"
STYLE_OF = {style.prompt: name for name, style in STYLES.items()}


class Server:
    """An OpenAI-compatible server. Its answer is the passage's first three words behind "Hvem", if `plan` says no other."""

    def __init__(self) -> None:
        self.requests, self.headers, self.at_once, self.most = [], [], 0, 0
        self.plan, self.slow, self.lock = (lambda text, nth: None), 0.0, threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                told, text = body["messages"][1]["content"].split("\n\nTekst:\n")
                with outer.lock:
                    outer.requests.append((text, STYLE_OF[told], body))
                    outer.headers.append(self.headers)
                    nth = sum(t == text for t, *_ in outer.requests)
                    outer.at_once += 1
                    outer.most = max(outer.most, outer.at_once)
                try:
                    outer.answer(self, text, nth)
                except (BrokenPipeError, ConnectionResetError):
                    pass
                finally:
                    with outer.lock:
                        outer.at_once -= 1

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, handler, text: str, nth: int) -> None:
        time.sleep(self.slow)
        status, body = self.plan(text, nth) or (200, "Hvem " + " ".join(text.split()[:3]) + "?")
        if status == "sleep":
            time.sleep(body)
        if status == "cut":
            handler.connection.close()
            return
        if status == 200 and isinstance(body, str):
            body = reply(body)
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        handler.send_response(status if isinstance(status, int) else 200)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(raw)))
        handler.end_headers()
        handler.wfile.write(raw)


def reply(text: str | None, **changes) -> dict:
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}} | changes
    usage = {"prompt_tokens": 100, "completion_tokens": 7, "total_tokens": 107}
    return {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage}


@pytest.fixture
def server(monkeypatch):
    made = Server()
    monkeypatch.setattr(endpoint_module, "WAIT", 0.002)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture
def made(server, tmp_path, write_jsonl, sentences, capsys):
    """made(*options, expect=0) -> (rows written, what was told): 12 different passages, and one of them again."""
    passages = [f"{sentences[20 * i]} Det er nummer {i}." for i in range(12)]
    data = write_jsonl(tmp_path / "passages.jsonl", [{"text": t} for t in [*passages, passages[3] + " "]])

    def run(*options: object, expect: int = 0, out: str = "out.jsonl", url: str | None = None):
        fixed = ["--out", str(tmp_path / out), "--model", "m", "--endpoint", url or server.url]
        code = cli.main(["data", "synthesize", data, *fixed, *map(str, options)])
        told = capsys.readouterr()
        assert KEY not in told.out + told.err
        assert code == expect, told.err
        path = tmp_path / out
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
        return rows, told.out if code == 0 else told.err.splitlines()[-1]

    run.passages = passages
    return run


def test_every_passage_gets_a_query_in_danish(made, server, tmp_path):
    rows, told = made("--filter", "none")
    assert [row["positive"] for row in rows] == made.passages
    assert len(server.requests) == 12 and "12 pairs of 12 passages (1 duplicate passages)" in told
    assert "tokens: 1,200 read, 84 written" in told and not list(tmp_path.glob("*.work"))
    for text, style, body in server.requests:
        row = next(r for r in rows if r["positive"] == text)
        assert row["style"] == style and row["query"] == "Hvem " + " ".join(text.split()[:3]) + "?"
        assert row["instruction"] == find_task(STYLES[style].task).query
        assert "dansk" in body["messages"][0]["content"] and body["model"] == "m"
    assert {h["Authorization"] for h in server.headers} == {f"Bearer {KEY}"}
    source = Source(str(tmp_path / "out.jsonl"), instruction="instruction")
    assert open_rows([source], "pairs")["query"][:] == [row["query"] for row in rows]


def test_styles_are_drawn_from_the_text_and_turn_with_the_number(made, server):
    rows, _ = made("--filter", "none", "--number", 3)
    styles = Counter((text, style) for text, style, _ in server.requests)
    assert set(styles.values()) == {1} and len(styles) == 36, "each passage once in every style"
    assert len(rows) == 12, "the same query again is dropped"
    first = {text: question(i, 0, text, tuple(STYLES), 42).style for i, text in enumerate(made.passages)}
    again = {text: question(99, 0, text, tuple(STYLES), 42).style for text in made.passages}
    assert first == again and len(set(first.values())) == 3
    assert first != {text: question(0, 0, text, tuple(STYLES), 43).style for text in made.passages}


def test_a_query_that_does_not_find_its_passage_is_dropped(made, server):
    """For one passage the model asks of another one, for a second of nothing in the collection."""
    lost, empty = made.passages[4], made.passages[7]
    server.plan = lambda text, nth: {lost: (200, "Hvem er nummer 9?"), empty: (200, "Zyklotron xylofon?")}.get(
        text, (200, f"Hvad er {text.split('nummer ')[1]}")
    )
    rows, told = made("--top", 1)
    assert [r["positive"] for r in rows] == [p for p in made.passages if p not in (lost, empty)]
    assert {row["rank"] for row in rows} == {1}
    assert "dropped: 2 its passage is not among the first 1" in told


def test_an_encoder_filters_too(made, tmp_path, bos_tokenizer_folder, tiny_config):
    base = model_folder(tmp_path / "base", bos_tokenizer_folder, tiny_config)
    rows, _ = made("--filter", base, "--top", 4, out="few.jsonl")
    from l2v import Encoder

    encoder = Encoder.from_pretrained(base)
    passages_ME = encoder.encode(made.passages)
    expected = {}
    for i, text in enumerate(made.passages):
        task = find_task(STYLES[question(i, 0, text, tuple(STYLES), 42).style].task)
        scores = passages_ME @ encoder.encode("Hvem " + " ".join(text.split()[:3]) + "?", task.query)
        expected[text] = 1 + int((scores > scores[i]).sum())
    assert {r["positive"]: r["rank"] for r in rows} == {t: rank for t, rank in expected.items() if rank <= 4}
    assert 0 < len(rows) < 12


# a server that errs


@pytest.mark.parametrize(
    "trouble",
    [
        (500, {"error": {"message": "oh"}}),
        (503, b"not json"),
        (429, {"error": {"message": "slow down"}}),
        ("cut", None),
        ("sleep", 0.6),
        (200, b"{"),
        (200, b"<html>"),
        (200, {"choices": []}),
        (200, {"surprise": 1}),
        (200, []),
        (200, "  "),
        (200, "Et spørgsmål?\nOg et til?"),
        (200, "x" * 400),
        (200, reply(None)),
        (200, reply("Hvem er", finish_reason="length")),
        (200, reply("x", message=None)),
    ],
    ids=lambda t: f"{t[0]}-{str(t[1])[:20]}",
)
def test_a_passing_trouble_is_tried_again(made, server, trouble):
    server.plan = lambda text, nth: trouble if nth < 3 and text == made.passages[5] else None
    rows, told = made("--filter", "none", "--timeout", 0.3, "--concurrency", 4)
    assert [r["positive"] for r in rows] == made.passages
    assert "asked: 12 queries in 14 tries" in told and len(server.requests) == 14


def test_lasting_trouble_keeps_the_rest_and_the_same_command_goes_on(made, server):
    server.plan = lambda text, nth: (500, {}) if text in made.passages[:2] else None
    _, told = made("--filter", "none", "--retries", 1, expect=1)
    assert told.startswith("l2v: 2 of 12 queries failed (the last one: status 500); the others are kept: run the same")
    assert len(server.requests) == 10 + 2 * 2
    server.plan, server.requests = (lambda text, nth: None), []
    rows, _ = made("--filter", "none", "--retries", 1)
    assert [r["positive"] for r in rows] == made.passages
    assert {text for text, *_ in server.requests} == set(made.passages[:2]), "only these were asked for again"


def test_failed_queries_may_be_done_without(made, server):
    server.plan = lambda text, nth: ("cut", None) if text == made.passages[0] else None
    rows, told = made("--filter", "none", "--retries", 0, "--skip-failed")
    assert [r["positive"] for r in rows] == made.passages[1:] and "11 queries in 11 tries, 1 failed" in told


def test_what_is_refused_or_never_an_answer_is_dropped_and_counted(made, server):
    plans = {made.passages[0]: (400, {"error": {"message": "filtered"}}), made.passages[1]: (200, "")}
    server.plan = lambda text, nth: plans.get(text)
    rows, told = made("--filter", "none", "--retries", 2, "--price", 2, 10)
    assert [r["positive"] for r in rows] == made.passages[2:]
    assert "dropped: 1 malformed, 1 refused" in told and "asked: 12 queries in 14 tries" in told
    read, written = 100 * (10 + 3), 7 * (10 + 3)  # three tries of the empty answer were paid for
    assert f"tokens: {read:,} read, {written} written" in told
    assert f"cost: {(2 * read + 10 * written) / 1e6:.4f}, at 2 and 10 a million" in told


def test_a_killed_run_asks_nothing_twice(made, server, monkeypatch):
    whole, _ = made("--filter", "none", out="whole.jsonl")
    server.requests.clear()
    real = Journal.add

    def dying(self, key, answer):
        real(self, key, answer)
        if len(self.answers) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "add", dying)
    assert made("--filter", "none", "--concurrency", 1, expect=1)[1] == "l2v: stopped"
    monkeypatch.setattr(Journal, "add", real)
    rows, _ = made("--filter", "none", "--concurrency", 1)
    assert rows == whole and len(server.requests) == 12


def test_no_more_questions_at_a_time_than_asked_for(made, server):
    server.slow = 0.03
    made("--filter", "none", "--concurrency", 3)
    assert server.most == 3


def test_a_server_asks_for_time(server, monkeypatch):
    slept = []
    monkeypatch.setattr(endpoint_module.time, "sleep", slept.append)
    asking = Endpoint(server.url, "m", key_name="X", retries=3, timeout=5, temperature=0, most_tokens=9)
    asking._pause(question(0, 0, "tekst", ("short",), 1), 0, "7")
    asking._pause(question(0, 0, "tekst", ("short",), 1), 0, "900")
    asking._pause(question(0, 0, "tekst", ("short",), 1), 2, "Wed, 21 Oct 2015")
    assert slept[0] == 7 and slept[1] == 30 and 0.004 <= slept[2] <= 0.012


@pytest.mark.parametrize(
    ("status", "part"),
    [
        (401, "rejects the key (401); set the environment variable OPENAI_API_KEY"),
        (403, "rejects the key (403)"),
        (404, "unknown model 'm', or the URL has no chat completions (404)"),
    ],
)
def test_what_no_question_can_pass_stops_at_once(made, server, status, part):
    server.plan = lambda text, nth: (status, {"error": {"message": f"wrong key {KEY}"}})
    _, told = made("--concurrency", 2, expect=1)
    assert told.startswith(f"l2v: {server.url}: ") and part in told and len(server.requests) <= 3


def test_a_server_that_is_not_there(made):
    _, told = made("--retries", 0, "--concurrency", 2, url="http://127.0.0.1:9/v1", expect=1)
    assert re.search(
        r"127\.0\.0\.1:9/v1: [89] queries in a row failed \(the last one: no connection\); the answers", told
    )


# a local model


def model_folder(folder, tokenizer, config) -> str:
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**config, initializer_range=0.2)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("template", [None, "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}"])
def test_a_model_of_transformers(tmp_path, bos_tokenizer_folder, tiny_config, sentences, write_jsonl, capsys, template):
    """Its weights are random, but each answer is one line, the same each time, and it resumes after a stop."""
    from transformers import AutoTokenizer

    config = tiny_config | {"max_position_embeddings": 2048}
    folder = model_folder(tmp_path / "model", bos_tokenizer_folder, config)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    data = write_jsonl(tmp_path / "p.jsonl", [{"tekst": t} for t in sentences[:5]])
    fixed = ["data", "synthesize", data, "--model", folder, "--text", "tekst", "--filter", "none", "--most-tokens", "6"]
    fixed += ["--batch", "2"]

    def run(out: str) -> list[dict]:
        assert cli.main([*fixed, "--out", str(tmp_path / out)]) == 0
        return [json.loads(line) for line in (tmp_path / out).read_text().splitlines()]

    first = run("a.jsonl")
    assert "tokens: " in capsys.readouterr().out
    assert len(first) >= 3 and all(row["query"] and "\n" not in row["query"] for row in first)
    real, calls = Journal.add, []

    def dying(self, key, answer):
        calls.append(key)
        if len(calls) == 4:
            raise KeyboardInterrupt
        real(self, key, answer)

    Journal.add = dying
    try:
        assert cli.main([*fixed, "--out", str(tmp_path / "b.jsonl")]) == 1
    finally:
        Journal.add = real
    assert run("b.jsonl") == first


# answers, journals, bad input


@pytest.mark.parametrize(
    ("answer", "query"),
    [
        ("Hvem bor her?", "Hvem bor her?"),
        (' "Hvem bor her?" \n\n', "Hvem bor her?"),
        ("Spørgsmål: »Hvem bor her?«", "Hvem bor her?"),
        ("1. Hvem bor her?", "Hvem bor her?"),
        ("- å", None),
        ("Søgeord: hund skov", "hund skov"),
        ("a\nb", None),
        ("", None),
        (None, None),
        ("?!", None),
        ("x" * 301, None),
        ("HUNDEN  bor her.", None),
        ("1914 krig", "1914 krig"),
    ],
)
def test_what_counts_as_a_query(answer, query):
    assert query_of(answer, "Hunden bor her.") == query


def test_a_journal_forgets_a_line_that_was_cut(tmp_path):
    journal = Journal(tmp_path)
    journal.add("0.0", Answer("æ", None, 3, 4, 1))
    journal.add("1.0", Answer(None, "refused"))
    journal.close()
    whole = journal.path.read_bytes()
    for damage in (whole[:-1], whole[:-9], whole + b'{"question": "2.0"', whole + b'{"other": 1}\n'):
        journal.path.write_bytes(damage)
        again = Journal(tmp_path)
        assert again.answers["0.0"] == Answer("æ", None, 3, 4, 1)
        again.add("9.0", Answer("ny"))
        again.close()
        read = Journal(tmp_path).answers
        assert read["9.0"].query == "ny" and set(read) == {"0.0", "9.0"} | (
            {"1.0"} if damage.startswith(whole) else set()
        )


@pytest.mark.parametrize(
    ("options", "code", "part"),
    [
        (["--number", 0], 2, "--number is 0 and must be at least 1"),
        (["--concurrency", 0], 2, "--concurrency is 0 and must be at least 1"),
        (["--most-tokens", 0], 2, "--most-tokens is 0 and must"),
        (["--retries", -1], 2, "--retries is -1 and must not be negative"),
        (["--timeout", 0], 2, "--timeout is 0 and must be above 0 seconds"),
        (["--temperature", 3], 2, "--temperature is 3; use 0 up to 2"),
        (
            ["--endpoint", "localhost:8000"],
            1,
            "--endpoint localhost:8000: give a URL that begins with http:// or https://",
        ),
        (["--text", "tekst"], 1, "line 1: the field 'tekst' is absent; found text"),
        (["--filter", "gone/encoder"], 1, "gone/encoder"),
    ],
)
def test_bad_options_are_one_sentence(made, options, code, part):
    _, told = made(*options, expect=code)
    assert told.startswith("l2v: ") and part in told


def test_a_model_that_is_not_there(tmp_path, sentences, write_jsonl, capsys):
    data = write_jsonl(tmp_path / "p.jsonl", [{"text": sentences[0]}])
    out = ["--out", str(tmp_path / "o.jsonl"), "--filter", "none"]
    assert cli.main(["data", "synthesize", data, "--model", str(tmp_path / "gone"), *out]) == 1
    assert "gone: no tokenizer can be loaded" in capsys.readouterr().err
    assert cli.main(["data", "synthesize", "gone.jsonl", "--model", "x", *out]) == 1
    assert "gone.jsonl: file not found" in capsys.readouterr().err
