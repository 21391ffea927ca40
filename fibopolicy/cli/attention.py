"""The command that draws attention."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fibopolicy.errors import UserError
from fibopolicy.utils.files import check_output


@dataclass(frozen=True)
class PlotPattern:
    """Draw which token pairs each head keeps.

    Example: fibopolicy plot-pattern --tokens 196 --heads 6 --out pattern.png
    """

    tokens: int = 196
    """Patch tokens."""
    heads: int = 6
    """Attention heads."""
    layer: int = 0
    """Layer, from 0: each permutes the heads in its own way."""
    modified: bool = False
    """The variant with two more offsets per head."""
    out: Path = Path("pattern.png")
    """PNG file to write."""
    overwrite: bool = False
    """Replace an existing file."""

    def run(self) -> None:
        from fibopolicy.attention import FibottentionPattern
        from fibopolicy.attention.plot import draw_pattern

        check_output(self.out, self.overwrite)
        # a picture of more would show nothing, and fill the memory
        if self.tokens > 4096 or self.heads > 256:
            raise UserError(
                f"at most 4096 tokens and 256 heads can be drawn, got {self.tokens} and"
                f" {self.heads}"
            )
        pattern = FibottentionPattern(
            self.tokens, self.heads, modified=self.modified, layer=self.layer
        )
        draw_pattern(pattern, self.out)
        print(
            f"{self.out}: {self.heads} heads keep {100 * pattern.density:.2f} % of the patch pairs"
        )
