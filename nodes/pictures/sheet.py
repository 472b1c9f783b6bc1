"""Sheet: the pictures of a comparison with what is known of each. The value of SSR_SHEET."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from PIL import Image

from ...ssr_core import SSRError
from .grid import grid

Place = tuple[int, int]  # row, column


@dataclass(frozen=True, eq=False)
class Sheet:
    """Rows are prompts, columns are models; the last column is the merge."""

    pictures: Mapping[Place, Image.Image]
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cell: int  # the longer side of a picture, in pixels
    captions: Mapping[Place, str] = field(default_factory=dict)

    @property
    def places(self) -> list[Place]:
        """Row by row."""
        return [(row, column) for row in range(len(self.rows)) for column in range(len(self.columns))]

    def drawn(self) -> Image.Image:
        return grid(self.pictures, self.rows, self.columns, len(self.columns) - 1, self.cell, self.captions)

    def with_scores(self, label: str, scores: Sequence[float]) -> Sheet:
        """With a further line below each picture.

        Args:
            scores: of the pictures row by row.

        Raises:
            SSRError: there are more or fewer of them.
        """
        if len(scores) != len(self.places):
            raise SSRError(
                f"There are {len(scores)} scores for {len(self.places)} pictures. Connect images of SSR Compare to a "
                "node that gives one number for each."
            )
        named = [f"{label} {score:.3g}".strip() for score in scores]
        lines = {place: [self.captions.get(place, ""), line] for place, line in zip(self.places, named, strict=True)}
        return replace(self, captions={place: "\n".join(filter(None, both)) for place, both in lines.items()})
