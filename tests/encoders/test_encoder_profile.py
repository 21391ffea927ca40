from __future__ import annotations

from fibopolicy.encoders.profile import encoder_table, profile_encoder


def test_an_encoder_is_timed_with_dense_attention_and_without_attention() -> None:
    report = profile_encoder([(1, 64), (2, 96)], width=32, depth=1, num_heads=2, turns=2)
    assert [(t.batch, t.num_tokens) for t in report.timings] == [(1, 16), (2, 36)]
    assert all(min(t.dense, t.fibottention, t.deleted) > 0 for t in report.timings)
    assert len(encoder_table(report).splitlines()) == 4
