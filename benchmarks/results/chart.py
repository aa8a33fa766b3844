"""An experiment's figures with their intervals, and the course of runs, as plain SVG on white."""

import math
from html import escape
from itertools import cycle

from .experiments import Experiment
from .statistics import FIGURES


def ticks(low: float, high: float) -> list[float]:
    """About four round numbers within low to high."""
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough)
    return [float(f"{step * i:.6g}") for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def chart(experiment: Experiment, lines: list[tuple[str, dict[str, tuple[float, float, float]]]]) -> str:
    """A panel a figure, a row a line: a dot with its interval. Plain SVG on white, so that it reads in a dark page."""
    left, width, gap, top, step = 210, 270, 40, 46, 26
    bottom, full = top + step * len(lines), left + len(experiment.charts) * (width + gap)
    text = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {full} {bottom + 34}" width="{full}" '
        'font-family="system-ui, sans-serif" font-size="13" fill="#222">',
        f'<title>{escape(experiment.title)}</title><rect width="100%" height="100%" fill="#fff"/>']
    heights = [top + step * (i + 0.5) for i in range(len(lines))]
    text += [f'<text x="{left - 14}" y="{y + 4}" text-anchor="end">{escape(label)}</text>'
             for y, (label, _) in zip(heights, lines)]
    for n, name in enumerate(experiment.charts):
        ends = [value for _, values in lines for value in values[name]]
        pad = 0.08 * (max(ends) - min(ends)) or 1.0
        low, high, x0 = min(ends) - pad, max(ends) + pad, left + n * (width + gap)
        scale = width / (high - low)
        text.append(f'<text x="{x0}" y="24" font-weight="600">{escape(FIGURES[name].heading)}</text>')
        for tick in ticks(low, high):
            x = x0 + scale * (tick - low)
            text.append(f'<path d="M{x:.1f} {top}V{bottom}" stroke="#ddd"/><text x="{x:.1f}" y="{bottom + 18}" '
                        f'text-anchor="middle" fill="#666" font-size="11">{tick:g}</text>')
        for y, (_, values) in zip(heights, lines):
            x, start, end = (x0 + scale * (value - low) for value in values[name])
            text.append(f'<path d="M{start:.1f} {y}H{end:.1f}" stroke="#2563a8" stroke-width="2"/>'
                        f'<circle cx="{x:.1f}" cy="{y}" r="4" fill="#2563a8"/>')
    return "\n".join([*text, "</svg>", ""])


COLOURS = ("#2563a8", "#c2410c", "#15803d", "#7e22ce", "#b91c1c", "#0e7490", "#a16207", "#be185d", "#4d7c0f", "#475569")


def course_chart(title: str, courses: dict[str, list[list[float]]]) -> str:
    """Runs by name, each a list of (rows so far, reward, judge): a panel for the reward and one for the judge."""
    left, width, height, gap, top = 60, 360, 250, 70, 46
    bottom, full = top + height, left + 2 * (width + gap) + 60
    text = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {full} {bottom + 44}" width="{full}" '
        'font-family="system-ui, sans-serif" font-size="13" fill="#222">',
        f'<title>{escape(title)}</title><rect width="100%" height="100%" fill="#fff"/>']
    most = max(points[-1][0] for points in courses.values())
    for n, (name, factor) in enumerate((("mean reward, by the scorer", 1), ("right, by the judge, %", 100)), 1):
        values = [factor * point[n] for points in courses.values() for point in points]
        pad, x0 = 0.05 * (max(values) - min(values)) or 1.0, left + (n - 1) * (width + gap)
        low, high = min(values) - pad, max(values) + pad
        text.append(f'<text x="{x0}" y="24" font-weight="600">{name}</text>')
        for tick in ticks(low, high):
            y = bottom - height * (tick - low) / (high - low)
            text.append(f'<path d="M{x0} {y:.1f}H{x0 + width}" stroke="#ddd"/><text x="{x0 - 8}" y="{y + 4:.1f}" '
                        f'text-anchor="end" fill="#666" font-size="11">{tick:g}</text>')
        for tick in ticks(0, most):
            text.append(f'<text x="{x0 + width * tick / most:.1f}" y="{bottom + 18}" text-anchor="middle" fill="#666" '
                        f'font-size="11">{tick:,.0f}</text>')
        text.append(f'<text x="{x0 + width}" y="{bottom + 36}" text-anchor="end" fill="#666">U-Net rows</text>')
        for colour, points in zip(cycle(COLOURS), courses.values()):
            at = [f"{x0 + width * x / most:.1f} {bottom - height * (factor * point[n - 1] - low) / (high - low):.1f}"
                  for x, *point in points]
            text.append(f'<path d="M{"L".join(at)}" fill="none" stroke="{colour}" stroke-width="2"/>')
    for i, (colour, name) in enumerate(zip(cycle(COLOURS), courses)):
        y, x = top + 12 + 22 * i, full - 110
        text.append(f'<path d="M{x} {y - 4}h18" stroke="{colour}" stroke-width="3"/><text x="{x + 24}" y="{y}">'
                    f'{escape(name)}</text>')
    return "\n".join([*text, "</svg>", ""])
