"""`l2v serve` with the client of OpenAI: every answer is the right vector, and every fault has OpenAI's error shape."""

import base64
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import openai
import pytest
from support.served import Served

from l2v import Encoder
from l2v.commands import main as cli
from l2v.serving.batcher import Batcher, Closed


@pytest.fixture(scope="module")
def encoder(base):
    return Encoder.from_pretrained(base)


@pytest.fixture
def serve(base, tmp_path):
    """serve(*options, slow=0.0) -> Served, ended with the test"""
    started = []

    def serve(*options, **more):
        started.append(Served(base, tmp_path, *options, **more))
        return started[-1]

    yield serve
    for served in started:
        served.process.kill()
        served.process.join()


@pytest.fixture(scope="module")
def one(base, tmp_path_factory):
    """One server for the tests that leave it as it was."""
    served = Served(base, tmp_path_factory.mktemp("served"), "--dimensions", "16,8", "--max-inputs", 9, "--max-body", 1)
    yield served
    served.process.kill()
    served.process.join()


def test_the_forms_of_the_interface(one, encoder, sentences):
    texts = sentences[:4]
    expected = encoder.encode(texts)
    for form in ("float", "base64", openai.NOT_GIVEN):
        found = one.client.embeddings.create(input=texts, model="tiny", encoding_format=form)
        rows = [row.embedding for row in found.data]
        rows = [np.frombuffer(base64.b64decode(row), "<f4") if isinstance(row, str) else row for row in rows]
        np.testing.assert_allclose(np.array(rows), expected, atol=1e-6)
        assert found.model == "tiny" and found.usage.prompt_tokens == found.usage.total_tokens > 4
    np.testing.assert_allclose(one.vectors(texts[0]), expected[:1], atol=1e-6)
    np.testing.assert_allclose(one.vectors(texts, dimensions=8), encoder.encode(texts, dimensions=8), atol=1e-6)
    ids = [encoder.tokenizer.plain([text])[0] for text in texts]
    np.testing.assert_allclose(one.vectors(ids), expected, atol=1e-6)
    np.testing.assert_allclose(one.vectors(ids[1]), expected[1:2], atol=1e-6)
    assert [model.id for model in one.client.models.list()] == ["tiny"]
    assert one.health() == {
        "status": "ok", "model": "tiny", "dimensions": 32, "max_length": 512, "waiting_tokens": 0,
    }  # fmt: skip


def test_500_requests_of_16_clients(one, encoder, sentences):
    """Of one to five texts each, of all lengths: nobody gets the vector of another."""

    def text(n, k):
        first = (n + k) % 240
        return " ".join(sentences[first : first + 1 + k * n % 4])

    requests = [[text(n, k) for k in range(1 + n % 5)] for n in range(500)]
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(one.vectors, requests))
    flat = encoder.encode([text for texts in requests for text in texts])
    np.testing.assert_allclose(np.concatenate(found), flat, atol=2e-6)
    assert [len(rows) for rows in found] == [len(texts) for texts in requests]


@pytest.mark.parametrize(
    ("body", "status", "message", "param"),
    [
        (b"{", 400, "not valid JSON", None),
        (b"\xff\xfe{}", 400, "not valid JSON", None),
        (b"[" * 100_000, 400, "not valid JSON", None),
        ([], 400, "has to be a JSON object", None),
        ({"input": "a"}, 400, "model is missing", "model"),
        ({"input": "a", "model": "gpt"}, 404, "the model 'gpt' does not exist; this server has 'tiny'", "model"),
        ({"model": "tiny"}, 400, "input is a text, a list of texts", "input"),
        ({"input": [], "model": "tiny"}, 400, "and not empty", "input"),
        ({"input": " \n", "model": "tiny"}, 400, "input 0 is empty", "input"),
        ({"input": ["a", None], "model": "tiny"}, 400, "input 1 is neither a text nor token ids", "input"),
        ({"input": ["a", [1]], "model": "tiny"}, 400, "input 1 is neither", "input"),
        ({"input": [True], "model": "tiny"}, 400, "input 0 is neither", "input"),
        ({"input": {"a": 1}, "model": "tiny"}, 400, "input is a text", "input"),
        ({"input": [[]], "model": "tiny"}, 400, "input 0 is an empty list", "input"),
        ({"input": [[10**30]], "model": "tiny"}, 400, "input 0: these are not the ids of a text", "input"),
        ({"input": [[-1]], "model": "tiny"}, 400, "not the ids of a text", "input"),
        ({"input": [[300]], "model": "tiny"}, 400, "not the ids of a text", "input"),
        ({"input": "\ud800", "model": "tiny"}, 400, "half of a surrogate pair", "input"),
        ({"input": ["a"] * 10, "model": "tiny"}, 413, "10 inputs in one request; at most 9", "input"),
        pytest.param({"input": "a", "model": "\ud800"}, 404, "does not exist", "model", id="half a pair as a name"),
        pytest.param(
            {"input": "a", "model": "tiny", "\ud800": 1}, 400, "unknown key", "\ud800", id="half a pair as a key"
        ),
        ({"input": "a " * 2000, "model": "tiny"}, 413, "longer than 512 tokens", "input"),
        ({"input": "a", "model": "tiny", "dimensions": 12}, 400, "these dimensions: 8, 16, 32", "dimensions"),
        ({"input": "a", "model": "tiny", "dimensions": True}, 400, "these dimensions", "dimensions"),
        ({"input": "a", "model": "tiny", "encoding_format": "int8"}, 400, "float or base64", "encoding_format"),
        ({"input": "a", "model": "tiny", "input_type": "x"}, 400, "query or document", "input_type"),
        ({"input": "a", "model": "tiny", "truncate": 1}, 400, "true or false", "truncate"),
        ({"input": "a", "model": "tiny", "dimension": 8}, 400, "unknown key 'dimension'", "dimension"),
        (b" " * 1_000_001, 413, "at most 1,000,000 are taken", None),
    ],
)  # fmt: skip
def test_faults_have_openais_shape_and_the_server_lives_on(one, encoder, sentences, body, status, message, param):
    reply = one.post(body)
    error = reply.json()["error"]
    assert reply.status_code == status and set(error) == {"message", "type", "param", "code"}
    assert message in error["message"] and error["param"] == param and error["type"] == "invalid_request_error"
    np.testing.assert_allclose(one.vectors(sentences[0])[0], encoder.encode(sentences[0]), atol=1e-6)


def test_the_client_raises_its_own_errors(one):
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        one.client.embeddings.create(input="a", model="gpt")
    with pytest.raises(openai.BadRequestError, match="is empty"):
        one.vectors("")
    for path, method in (("/embedding", "POST"), ("/embeddings", "GET")):
        reply = httpx.request(method, one.url + path)
        assert (
            reply.status_code in (404, 405)
            and "this server has POST /v1/embeddings" in reply.json()["error"]["message"]
        )
    parts = (b" " * 100_000 for _ in range(11))  # no stated length
    reply = httpx.post(f"{one.url}/embeddings", content=parts, timeout=60)
    assert reply.status_code == 413 and "more than 1,000,000 bytes" in reply.json()["error"]["message"]


def test_texts_are_cut_if_asked(one, encoder, sentences):
    long = " ".join(sentences[:60])
    found = one.vectors([long, sentences[0]], extra_body={"truncate": True})
    with pytest.warns(UserWarning, match="were cut"):
        np.testing.assert_allclose(found, encoder.encode([long, sentences[0]]), atol=1e-6)


def test_a_lone_text_waits_for_others_and_a_full_batch_does_not(encoder, sentences):
    batcher = Batcher(encoder, batch_tokens=64, max_wait=0.5, max_queue_tokens=10_000)
    ids, starts, _ = encoder.tokenizer.embedded(sentences[:1])
    begun = time.monotonic()
    batcher.submit(ids, starts).done.result(60)
    assert time.monotonic() - begun > 0.45
    batcher.close()
    patient = Batcher(encoder, batch_tokens=64, max_wait=3600, max_queue_tokens=10_000)
    ids, starts, _ = encoder.tokenizer.embedded(sentences[:12])
    first = patient.submit(ids[:6], starts[:6])  # the second request fills its last forward
    second = patient.submit(ids[6:], starts[6:])
    np.testing.assert_allclose(unit(first.done.result(60)), encoder.encode(sentences[:6]), atol=1e-6)
    assert patient.batches >= 2 and not second.done.done()
    patient.close()  # nothing that was accepted waits any longer
    np.testing.assert_allclose(unit(second.done.result(0)), encoder.encode(sentences[6:12]), atol=1e-6)
    with pytest.raises(Closed):
        patient.submit(ids, starts)


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_a_forward_that_fails_is_a_500_and_the_next_one_works(encoder, sentences):
    said = []
    batcher = Batcher(encoder, batch_tokens=64, max_wait=0, max_queue_tokens=10_000, report=said.append)
    ids, starts, _ = encoder.tokenizer.embedded(sentences[:9])
    failed = batcher.submit([*ids[:8], [10**6]], starts)  # a token that the embedding has not
    with pytest.raises(IndexError):
        failed.done.result(60)
    found = batcher.submit(ids, starts).done.result(60)
    np.testing.assert_allclose(unit(found), encoder.encode(sentences[:9]), atol=1e-6)
    assert said == ["a forward failed: IndexError"] and batcher.tokens == 0
    batcher.close()


def test_overload_is_429_and_nothing_hangs(serve, encoder, sentences):
    served = serve("--max-queue-tokens", 200, "--batch-tokens", 64, slow=0.05)

    def ask(n):
        try:
            return n, served.vectors(sentences[n : n + 2])
        except openai.RateLimitError as error:
            assert error.response.headers["retry-after"] == "1" and error.body["type"] == "rate_limit_error"
            return n, None

    with ThreadPoolExecutor(40) as pool:
        answers = list(pool.map(ask, range(80)))
    answered = {n: rows for n, rows in answers if rows is not None}
    assert 0 < len(answered) < 80
    for n, rows in answered.items():
        np.testing.assert_allclose(rows, encoder.encode(sentences[n : n + 2]), atol=2e-6)
    assert served.health()["waiting_tokens"] == 0
    assert served.vectors(sentences[:40]).shape == (40, 32)  # larger than the queue, and nothing waits


def test_a_client_that_hangs_up_is_dropped(serve, sentences):
    served = serve("--batch-tokens", 64, slow=0.1)
    body = json.dumps({"input": sentences[:200], "model": "tiny"}).encode()
    host, port = served.url.removeprefix("http://").removesuffix("/v1").split(":")
    with socket.create_connection((host, int(port))) as raw:
        head = f"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
        raw.sendall(head.encode() + body)
        until = time.monotonic() + 20
        while served.health()["waiting_tokens"] == 0 and time.monotonic() < until:
            time.sleep(0.01)
        assert served.health()["waiting_tokens"] > 1000
    until = time.monotonic() + 3  # the whole request would take 20 seconds
    while served.health()["waiting_tokens"] and time.monotonic() < until:
        time.sleep(0.01)
    assert served.health()["waiting_tokens"] == 0
    with socket.create_connection((host, int(port))) as raw:
        raw.sendall(head.encode() + body[:100])  # and one in the middle of its body
    assert served.vectors("hund").shape == (1, 32)


def test_sigterm_answers_all_that_was_accepted(serve, encoder, sentences):
    served = serve("--batch-tokens", 64, slow=0.05)
    answers, threads = {}, []
    for n in range(12):
        threads.append(threading.Thread(target=lambda n=n: answers.update({n: served.vectors(sentences[n : n + 3])})))
        threads[-1].start()
    until = time.monotonic() + 20
    while served.health()["waiting_tokens"] < 300 and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(0.3)  # all twelve are in
    assert len(answers) < 12
    code = served.end()
    for thread in threads:
        thread.join(60)
    assert code == 0 and len(answers) == 12
    for n, rows in answers.items():
        np.testing.assert_allclose(rows, encoder.encode(sentences[n : n + 3]), atol=2e-6)
    assert "every accepted request was answered" in served.said()
    with pytest.raises(httpx.ConnectError):
        served.health()


def test_logs_hold_no_texts(serve, base):
    served = serve()
    served.vectors("hemmelig")
    served.post({"input": ["hemmelig", 3], "model": "tiny"})
    served.post(b'{"hemmelig')
    assert served.end() == 0 and "hemmelig" not in served.said()


def test_bad_calls_are_one_sentence(base, capsys):
    def said(*options):
        assert cli.main(["serve", str(base), *map(str, options)]) in (1, 2)
        return capsys.readouterr().err

    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "Address already in use; choose another --port" in said("--port", taken.getsockname()[1])
    assert "--port is 70000; use 0 to 65535" in said("--port", 70000)
    assert "--host nowhere.invalid" in said("--host", "nowhere.invalid")
    assert "--max-wait-ms is -1" in said("--max-wait-ms", -1)
    assert "64 is not from 1 to 32" in said("--port", 0, "--dimensions", "64")


def test_half_a_letter_is_no_text(one, encoder):
    """The token ids of half an emoji decode to something else."""
    ids = encoder.tokenizer.plain(["🦆"])[0]
    assert len(ids) > 1
    with pytest.raises(openai.BadRequestError, match="not the ids of a text"):
        one.vectors([ids[:1]])


def test_only_this_machine_unless_asked(one):
    assert one.url.startswith("http://127.0.0.1:")
