"""The example that reads dates: a few steps of training, the results of every backend, and the picture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import dates
import numpy
import pytest
import torch
import typer
from dates_data import pairs, split
from matplotlib import image
from trees import each

if TYPE_CHECKING:
    from pathlib import Path


def unseen(count: int) -> Any:
    """Return pairs of days that are held out."""
    return pairs(split(dates.SEED, dates.HELD_OUT)[1][:count], numpy.random.default_rng(7))


def test_the_loss_falls() -> None:
    batch = unseen(100)
    first, last = (float(dates.loss(each(dates.learn(steps), torch.from_numpy), batch)) for steps in (1, 30))
    assert last < first / 1.5


def test_the_picture_shows_the_weights(tmp_path: Path) -> None:
    def drawn(params: dict[str, Any]) -> numpy.ndarray:
        dates.draw(params, unseen(1), tmp_path / "dates.png")
        return image.imread(tmp_path / "dates.png")

    first = dates.learn(1)
    assert (drawn(first) != drawn(first | {"decoder": first["decoder"][::-1]})).any()


def test_the_program_fails_if_too_few_days_are_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dates, "HELD_OUT", 7)
    with pytest.raises(typer.Exit):
        dates.main(steps=2, picture=tmp_path / "dates.png")
    assert (tmp_path / "dates.png").exists()
    assert capsys.readouterr().out.count("7 of 7 translated as on PyTorch") == 4
