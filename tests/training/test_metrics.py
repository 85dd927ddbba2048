import io

from l2v.training.metrics import Progress


def shown(active: bool, every: float, monkeypatch) -> str:
    """What a bar of three steps prints, the second step of which has four micro-batches in two passes."""
    screen = io.StringIO()
    monkeypatch.setattr("sys.stderr", screen)
    bar = Progress(3, 0, "simcse", active=active)
    bar.every = bar.bar.mininterval = every
    bar.within(1, 1, 1)  # a step of one micro-batch has no passes worth telling
    bar.status("loss 1.0")
    bar.step()
    for number in (1, 2):
        for done in range(1, 5):
            bar.within(number, done, 4)
    bar.step()
    bar.close()
    return screen.getvalue()


def test_a_step_tells_of_its_passes(monkeypatch):
    text = shown(True, 0, monkeypatch)
    assert "encode 1/1" not in text
    assert all(f"{name} {i}/4, loss 1.0" in text for name in ("encode", "backward") for i in range(1, 5))
    assert "simcse" in text and "2/3" in text and text.rstrip().endswith("loss 1.0]")


def test_between_its_lines_it_is_silent(monkeypatch):
    text = shown(True, 1000, monkeypatch)
    assert "encode" not in text and "2/3" in text


def test_other_ranks_say_nothing(monkeypatch):
    assert shown(False, 1000, monkeypatch) == ""
