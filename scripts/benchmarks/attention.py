"""Fibottention against dense attention: the table of shapes, the crossover over N, and whole encoders.

    python scripts/benchmarks/attention.py --hardware xeon-2-threads

Writes docs/benchmarks/<theme>_<hardware>_<date>.json and prints the tables.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from fibopolicy.attention import FibottentionPattern
from fibopolicy.attention.drawing import draw_crossover, draw_pattern
from fibopolicy.attention.profile import profile_attention
from fibopolicy.attention.profile import table as attention_table
from fibopolicy.encoders.profile import profile_encoder
from fibopolicy.encoders.profile import table as encoder_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--hardware", required=True, help="what the result files call this machine")
    parser.add_argument("--turns", type=int, default=20, help="timed turns of each attention contender")
    parser.add_argument("--encoder-turns", type=int, default=4, help="timed turns of each encoder")
    parser.add_argument("--flex", action="store_true", help="time FlexAttention too, which is compiled first")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"))
    options = parser.parse_args()

    report = profile_attention(turns=options.turns, device=options.device, flex=options.flex)
    name = f"{options.hardware}_{report.environment['date']}"
    report.write(options.out / f"attention_{name}.json")
    draw_crossover(report, options.out / f"attention_{name}.png")
    print(attention_table(report), flush=True)

    encoders = profile_encoder(turns=options.encoder_turns, device=options.device)
    encoders.write(options.out / f"encoder_{name}.json")
    print(encoder_table(encoders))

    draw_pattern(FibottentionPattern(196, 6), options.out.parent / "images" / "pattern_196_6.png")


if __name__ == "__main__":
    main()
