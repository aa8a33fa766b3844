"""What benchmarks/cost.py counts, and what the README says of it."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

from benchmarks import cost
from model.ldm import SD15

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def counted() -> dict[str, float]:
    return cost.count(512, 512)


def test_operations_are_the_published_ones(counted):
    """SD1.5's U-Net at 512x512 is 401.6 GMAC a row, ViT-H/14's image tower 167.4; decoding as diffusers'."""
    assert counted["row"] == pytest.approx(2 * 0.4016, rel=2e-3)
    with torch.device("meta"):
        decoder = AutoencoderKL(**{name: value for name, value in SD15["vae"].items() if name[0] != "_"})
        decoded = cost.tflop(lambda: decoder.decode(torch.empty(1, 4, 64, 64)))
    assert counted["picture"] == pytest.approx(2 * 0.1674 + decoded, rel=2e-3)


def test_a_pair_is_six_rows_and_what_lora_adds(counted):
    """Two rows of the policy, two of the reference, and a backward pass without the frozen weights' gradients."""
    assert 6 < counted["pair"] / counted["row"] < 6.5


def test_the_readme_has_its_table(program, capsys):
    assert program(cost) == 0
    assert capsys.readouterr().out.strip() in (ROOT / "README.md").read_text()
