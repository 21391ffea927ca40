"""The verbs that time and draw attention."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from fibopolicy.devices import resolve_device
from fibopolicy.errors import UserError
from fibopolicy.files import refuse_existing


@dataclass(frozen=True)
class Profile:
    """Time sparse attention against dense, side by side in turns, and print the ratios with their quartiles.

    Example: fibopolicy profile attention --out attention.json
    """

    what: tyro.conf.Positional[Literal["attention", "encoder"]]
    """The attention alone, or a whole ViT-S with it."""
    turns: int = 10
    """Timed turns of each contender."""
    device: str = "cpu"
    """Where to run."""
    flex: bool = False
    """Also time FlexAttention, which torch compiles first: minutes, and a C++ compiler on CPUs, where it has no backward."""
    out: Path | None = None
    """JSON file to write; for attention, a picture of the crossover over N lies beside it."""
    overwrite: bool = False
    """Replace existing files."""

    def run(self) -> None:
        from fibopolicy.attention import profile as attention
        from fibopolicy.attention.drawing import draw_crossover
        from fibopolicy.encoders import profile as encoder

        if self.turns < 1:
            raise UserError(f"turns must be at least 1, got {self.turns}")
        if self.flex and self.what == "encoder":
            raise UserError("--flex is for profile attention; encoders are timed dense, with Fibottention and without attention")
        resolve_device(self.device)
        if self.out is not None:
            refuse_existing(self.out, self.overwrite)
        if self.what == "attention":
            report = attention.profile_attention(turns=self.turns, device=self.device, flex=self.flex)
            print(attention.table(report))
        else:
            report = encoder.profile_encoder(turns=self.turns, device=self.device)
            print(encoder.table(report))
        if self.out is not None:
            report.write(self.out)
            if self.what == "attention":
                draw_crossover(report, self.out.with_suffix(".png"))


@dataclass(frozen=True)
class ShowPattern:
    """Draw which token pairs each head keeps.

    Example: fibopolicy show-pattern --tokens 196 --heads 6 --out pattern.png
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
        from fibopolicy.attention.drawing import draw_pattern

        refuse_existing(self.out, self.overwrite)
        pattern = FibottentionPattern(self.tokens, self.heads, modified=self.modified, layer=self.layer)
        draw_pattern(pattern, self.out)
        print(f"{self.out}: {self.heads} heads keep {100 * pattern.density:.2f} % of the patch pairs")
