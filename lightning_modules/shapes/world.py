"""The embedded world's grammar: what a prompt can ask for, and how large and what colour that is in a picture.

A prompt is "two large green triangles on a white background": 3 counts, 2 sizes, 4 colours, 3 shapes and
3 backgrounds make 216 prompts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product

from lightning_modules.errors import DataError

SIDE = 32  # pixels
COUNTS = ("one", "two", "three")
SIZES = ("small", "large")
COLOURS = {
    "red": (0.90, 0.10, 0.10),
    "green": (0.10, 0.70, 0.20),
    "blue": (0.15, 0.25, 0.90),
    "yellow": (0.95, 0.85, 0.10),
}
SHAPES = ("circle", "square", "triangle")
BACKGROUNDS = {"white": (0.97, 0.97, 0.97), "gray": (0.50, 0.50, 0.50), "black": (0.04, 0.04, 0.04)}

# Half the width of a shape, in pixels. Three large ones must fit into a picture with a gap between them.
HALF_WIDTHS = {
    ("circle", "small"): 4.2,
    ("circle", "large"): 6.5,
    ("square", "small"): 3.8,
    ("square", "large"): 5.9,
    ("triangle", "small"): 4.7,
    ("triangle", "large"): 7.0,
}
TRIANGLE_HEIGHT = 1.8  # in half widths
# The area of a shape of half width 1.
UNIT_AREAS = {"circle": math.pi, "square": 4.0, "triangle": TRIANGLE_HEIGHT}


@dataclass(frozen=True)
class Scene:
    """What a prompt asks for. The words are keys of the tables above; ``count`` is 1, 2 or 3."""

    count: int
    size: str
    colour: str
    shape: str
    background: str

    @property
    def caption(self) -> str:
        plural = "s" if self.count > 1 else ""
        number = COUNTS[self.count - 1]
        return f"{number} {self.size} {self.colour} {self.shape}{plural} on a {self.background} background"

    @property
    def area(self) -> float:
        """Pixels that one of its objects covers."""
        return UNIT_AREAS[self.shape] * HALF_WIDTHS[self.shape, self.size] ** 2

    @staticmethod
    def parse(prompt: str) -> Scene:
        """The scene of a caption.

        Raises:
            DataError: the prompt is not one of the 216.
        """
        scene = SCENES.get(prompt.strip().lower())
        if scene is None:
            raise DataError(
                f"the shapes reward cannot judge the prompt {prompt!r}: want one like "
                "'two large green triangles on a white background'; use another reward or prompts of this form"
            )
        return scene


SCENES: dict[str, Scene] = {
    scene.caption: scene
    for scene in (
        Scene(count, size, colour, shape, background)
        for count, size, colour, shape, background in product((1, 2, 3), SIZES, COLOURS, SHAPES, BACKGROUNDS)
    )
}
