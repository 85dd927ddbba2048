import errno
import json
import shutil

import pytest
import torch
from safetensors import SafetensorError

from l2v.errors import UserError
from l2v.training import checkpoint
from l2v.training.checkpoint import STATE, TENSORS, Checkpoint, newest, remove_all, save


def made(step: int) -> Checkpoint:
    generator = torch.Generator().manual_seed(step)
    names = ("weight.a", "exp_avg.a", "exp_avg_sq.a")
    return Checkpoint(step, {name: torch.randn(16, 4, generator=generator) for name in names}, {"tokens": step * 100})


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def assert_same(got: Checkpoint | None, step: int) -> None:
    expected = made(step)
    assert got is not None and got.step == step and got.facts["tokens"] == step * 100
    assert got.tensors.keys() == expected.tensors.keys()
    assert all(torch.equal(got.tensors[k], v) for k, v in expected.tensors.items())


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    path = save(folder, made(12), keep=2)
    assert path == folder / "step-000012" and names(folder) == ["step-000012"]
    assert names(path) == [STATE, TENSORS]
    assert_same(newest(folder), 12)


def test_the_oldest_beyond_keep_are_removed(tmp_path):
    for step in (3, 12, 100, 999999):
        save(tmp_path, made(step), keep=2)
    assert names(tmp_path) == ["step-000100", "step-999999"]
    save(tmp_path, made(1000000 - 2), keep=1)
    assert names(tmp_path) == ["step-999999"]


def test_the_newest_is_taken(tmp_path):
    for step in (9, 10, 11):
        save(tmp_path, made(step), keep=3)
    assert_same(newest(tmp_path), 11)


def test_there_may_be_none(tmp_path, capsys):
    assert newest(tmp_path) is None and newest(tmp_path / "nothing") is None
    assert capsys.readouterr().out == ""


def test_the_same_step_is_written_over(tmp_path):
    save(tmp_path, Checkpoint(5, {"a": torch.zeros(2)}, {"tokens": 1}), keep=2)
    save(tmp_path, made(5), keep=2)
    assert names(tmp_path) == ["step-000005"]
    assert_same(newest(tmp_path), 5)


def flip_a_bit(path):
    content = bytearray((path / TENSORS).read_bytes())
    content[-7] ^= 1
    (path / TENSORS).write_bytes(content)


def cut_the_tensors(path):
    content = (path / TENSORS).read_bytes()
    (path / TENSORS).write_bytes(content[: len(content) // 2])


def cut_the_state(path):
    content = (path / STATE).read_text()
    (path / STATE).write_text(content[: len(content) // 2])


def forget_the_sum(path):
    facts = json.loads((path / STATE).read_text())
    del facts["sha256"]
    (path / STATE).write_text(json.dumps(facts))


DAMAGE = {
    "a flipped bit": flip_a_bit,
    "half the tensors": cut_the_tensors,
    "no tensors": lambda path: (path / TENSORS).unlink(),
    "half the state": cut_the_state,
    "an empty state": lambda path: (path / STATE).write_bytes(b""),
    "no state": lambda path: (path / STATE).unlink(),
    "a state of bytes": lambda path: (path / STATE).write_bytes(b"\xff\xfe\x00"),
    "a state that is a list": lambda path: (path / STATE).write_text("[1]"),
    "no checksum": forget_the_sum,
    "an empty folder": lambda path: [file.unlink() for file in path.iterdir()],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_one_is_passed_over_with_a_warning(tmp_path, capsys, damage):
    for step in (1, 2, 3):
        save(tmp_path, made(step), keep=3)
    DAMAGE[damage](tmp_path / "step-000003")
    assert_same(newest(tmp_path), 2)
    output = capsys.readouterr().out
    assert output.count("\n") == 1
    assert output.startswith(f"warning: {tmp_path / 'step-000003'} is damaged and skipped: ")


def test_if_all_are_damaged_there_is_none(tmp_path, capsys):
    for step in (1, 2):
        save(tmp_path, made(step), keep=3)
        flip_a_bit(tmp_path / f"step-{step:06d}")
    assert newest(tmp_path) is None
    assert capsys.readouterr().out.count("its checksum does not match") == 2


def half_written(error):
    def save_file(tensors, path, *_, **__):
        path.write_bytes(b"half a checkpoint")
        raise error

    return save_file


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "no space left on the disk"),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), "no space left"),
        (OSError(errno.EFBIG, "File too large"), "File too large"),
        (OSError(errno.EROFS, "Read-only file system"), "Read-only file system"),
    ],
)
def test_a_full_disk_is_one_sentence_and_leaves_the_older_ones(tmp_path, monkeypatch, error, reason):
    for step in (1, 2):
        save(tmp_path, made(step), keep=2)
    monkeypatch.setattr(checkpoint, "save_file", half_written(error))
    with pytest.raises(UserError) as caught:
        save(tmp_path, made(3), keep=2)
    message = str(caught.value)
    assert f"{tmp_path / 'step-000003'}: the checkpoint cannot be written ({reason}" in message
    assert "earlier checkpoints are complete: free some space and run the same command again" in message
    assert "\n" not in message and caught.value.exit_code == 1
    assert names(tmp_path) == ["step-000001", "step-000002"]
    assert_same(newest(tmp_path), 2)
    monkeypatch.undo()
    save(tmp_path, made(3), keep=2)
    assert names(tmp_path) == ["step-000002", "step-000003"]


def test_a_failure_while_syncing_leaves_nothing_half_written(tmp_path, monkeypatch):
    save(tmp_path, made(1), keep=2)

    def fail(path):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(checkpoint, "sync", fail)
    with pytest.raises(UserError, match="Input/output error"):
        save(tmp_path, made(2), keep=2)
    assert names(tmp_path) == ["step-000001"]


def test_nothing_stands_under_the_final_name_before_it_is_whole(tmp_path, monkeypatch):
    real, seen = checkpoint.sync, []

    def watch(path):
        seen.append((path.name, names(tmp_path)))
        real(path)

    monkeypatch.setattr(checkpoint, "sync", watch)
    save(tmp_path, made(4), keep=2)
    assert [name for name, _ in seen[:-2]] and {name for name, _ in seen[:-2]} == {STATE, TENSORS}
    assert all("step-000004" not in there for _, there in seen[:-1])
    assert seen[-1] == (tmp_path.name, ["step-000004"])


def test_the_rest_of_a_killed_write_does_no_harm(tmp_path):
    save(tmp_path, made(1), keep=2)
    shutil.copytree(tmp_path / "step-000001", tmp_path / ".step-000002.partial")
    flip_a_bit(tmp_path / ".step-000002.partial")
    assert_same(newest(tmp_path), 1)
    save(tmp_path, made(2), keep=2)
    assert names(tmp_path) == ["step-000001", "step-000002"]
    assert_same(newest(tmp_path), 2)


def test_remove_all(tmp_path):
    save(tmp_path / "checkpoints", made(1), keep=2)
    remove_all(tmp_path / "checkpoints")
    remove_all(tmp_path / "checkpoints")
    assert names(tmp_path) == []
