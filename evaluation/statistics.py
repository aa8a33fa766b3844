"""The statistics of a comparison: who wins and how sure that is, how far the colours shifted, how much pictures of one
prompt differ; and two of these as a table's cell says them. Nothing here draws, loads or scores.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

HSV, RGB = ("hue", "saturation", "value"), ("red", "green", "blue")


def wilson(wins: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95 % interval of a share, by Wilson's score: it stays within 0 and 100 % and holds for small n, too."""
    if n == 0:
        return 0.0, 1.0
    share, spread = wins / n, z * math.sqrt(wins * (n - wins) / n + z * z / 4) / (n + z * z)
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    return max(0.0, middle - spread), min(1.0, middle + spread)


def win_rate(candidate: Sequence[float], baseline: Sequence[float]) -> dict[str, int | float | list[float] | None]:
    """Scores of both, picture by picture -> how often the candidate's is higher. `percent` and its 95 % interval leave
    ties out, as the paper's figures do (multiples of 1/177); `percent_ties_half` counts a tie as half a win."""
    wins = sum(c > b for c, b in zip(candidate, baseline, strict=True))
    losses = sum(c < b for c, b in zip(candidate, baseline, strict=True))
    n, decided = len(candidate), wins + losses
    return {
        "wins": wins, "ties": n - decided, "losses": losses,
        "percent": 100 * wins / decided if decided else None,
        "percent_ties_half": 100 * (wins + (n - decided) / 2) / n if n else None,
        "ci95": [100 * bound for bound in wilson(wins, decided)]}


def percent_and_interval(rate: dict) -> str:
    """A `win_rate` in words, such as "50.0 % (18.8 to 81.2, 2 tied)"."""
    percent = "all tied" if rate["percent"] is None else f"{rate['percent']:.1f} %"
    ties = f", {rate['ties']} tied" if rate["ties"] else ""
    return f"{percent} ({rate['ci95'][0]:.1f} to {rate['ci95'][1]:.1f}{ties})"


def rgb_to_hsv(rgb: Tensor) -> Tensor:
    """(..., 3) in [0, 1] -> hue, saturation, value (..., 3) in [0, 1]; grey has the hue and saturation 0."""
    r, g, b = rgb.unbind(-1)
    value, low = rgb.amax(-1), rgb.amin(-1)
    chroma = value - low
    some = torch.where(chroma > 0, chroma, 1)
    hue = torch.where(value == r, (g - b) / some, torch.where(value == g, (b - r) / some + 2, (r - g) / some + 4))
    return torch.stack([(hue / 6) % 1, chroma / torch.where(value > 0, value, 1), value], dim=-1)


def colours(image: Image.Image) -> dict[str, float]:
    """The means over a picture's pixels: of HSV and RGB, each in [0, 1], and of the hue as a direction on its circle
    (hue_x, hue_y)."""
    rgb = torch.from_numpy(np.array(image.convert("RGB"), dtype=np.float64) / 255)                # (H, W, 3)
    hsv = rgb_to_hsv(rgb)
    angle = 2 * math.pi * hsv[..., 0]
    means = [*hsv.mean(dim=(0, 1)), *rgb.mean(dim=(0, 1)), angle.cos().mean(), angle.sin().mean()]
    return {name: mean.item() for name, mean in zip((*HSV, *RGB, "hue_x", "hue_y"), means, strict=True)}


def colour_shift(candidate: Sequence[dict[str, float]], baseline: Sequence[dict[str, float]]) -> dict:
    """`colours` of all pictures of both -> the percent change of the mean of each HSV channel, as in Table 2 (None
    from a mean of 0). Hue is a circle, on which that mean means little: `hue_degrees`, 0 to 180, is the angle between
    both mean directions. `rgb` is the change of the mean red, green and blue, in levels of 255."""
    def mean(rows: Sequence[dict[str, float]], name: str) -> float:
        return sum(row[name] for row in rows) / len(rows)

    shift: dict = {}
    for name in HSV:
        before, after = mean(baseline, name), mean(candidate, name)
        shift[name] = 100 * (after - before) / before if before else None
    angles = [math.degrees(math.atan2(mean(rows, "hue_y"), mean(rows, "hue_x"))) for rows in (candidate, baseline)]
    turn = abs(angles[0] - angles[1])
    shift["hue_degrees"] = min(turn, 360 - turn)
    shift["rgb"] = [255 * (mean(candidate, name) - mean(baseline, name)) for name in RGB]
    return shift


def rgb_levels(shift: dict) -> str:
    """The change of red, green and blue of a `colour_shift`, in levels of 255, such as "-0.1 +0.0 -0.2"."""
    return " ".join(f"{levels:+.1f}" for levels in shift["rgb"])


def spread(embeddings: Tensor, prompts: Sequence[str]) -> Tensor:
    """Embeddings (B, D) and B prompts -> (B,): the mean distance, 1 - cosine, of each picture to the others of its
    prompt; 0 for one that is alone. The mean over a prompt's pictures is their mean pairwise distance."""
    unit = torch.nn.functional.normalize(embeddings.float(), dim=-1)
    same = torch.tensor([[a == b for b in prompts] for a in prompts], device=unit.device)
    same = same & ~torch.eye(len(prompts), dtype=torch.bool, device=unit.device)
    return ((1 - unit @ unit.T) * same).sum(dim=1) / same.sum(dim=1).clamp(min=1)


def summary(sides: list[str], scores: dict[str, list[dict]], scorers: list[str]) -> dict:
    """What report.json says of the pictures; for a single candidate also at the top, without its name."""
    def column(side: str, name: str) -> list:
        return [answers[name] for answers in scores[side]]

    means = {name: {side: sum(column(side, name)) / len(scores[side]) for side in sides} for name in scorers}
    candidates = {side: {
        "win_rate": {name: win_rate(column(side, name), column(sides[0], name)) for name in scorers},
        "colour_shift": colour_shift(column(side, "colours"), column(sides[0], "colours"))} for side in sides[1:]}
    report = candidates[sides[1]] if len(sides) == 2 else {}
    report = {**report, "candidates": candidates, "mean_score": means}
    if all("diversity" in answers for side in sides for answers in scores[side]):
        report["diversity"] = {side: sum(column(side, "diversity")) / len(scores[side]) for side in sides}
    return report
