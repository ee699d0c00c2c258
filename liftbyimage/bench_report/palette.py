"""Colours of the figures: the light half of `assets/page.css`, so that a page can put its variables in their place."""

from __future__ import annotations

from liftbyimage.bench_report.results import OURS, REFERENCE

PAPER, INK, FAINT, LINE = "#ffffff", "#1c1f24", "#5d646e", "#d5d9df"
BLUE, ORANGE, GREEN, GREY, YELLOW, PINK = "#0072b2", "#d55e00", "#00815e", "#8a8f98", "#b88a00", "#b0568c"
VARIABLES = {
    PAPER: "--paper",
    INK: "--ink",
    FAINT: "--faint",
    LINE: "--line",
    BLUE: "--blue",
    ORANGE: "--orange",
    GREEN: "--green",
    GREY: "--grey",
    YELLOW: "--yellow",
    PINK: "--pink",
}
COLOURS = {REFERENCE: GREY, OURS: BLUE}
MACHINES = (BLUE, ORANGE, GREEN, PINK, YELLOW, GREY)
