"""The colours of every figure: Okabe and Ito (2008), told apart by every common kind of colour vision."""

from __future__ import annotations

BLUE, ORANGE, GREEN, RED, SKY, PURPLE = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7"
PALETTE = (BLUE, ORANGE, GREEN, RED, SKY, PURPLE)
GREY, BLACK = "#8C8C8C", "#404040"
