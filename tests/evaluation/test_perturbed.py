from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from fibopolicy.cli.evaluate import Evaluate
from fibopolicy.errors import UserError
from fibopolicy.evaluation.config import EvaluateConfig
from fibopolicy.evaluation.episodes import Selector, read_rows, write_rows
from fibopolicy.evaluation.evaluate import Evaluation, evaluate_run
from fibopolicy.report.run import perturbation_table

PERTURB = ("light-color:2", "noise:1", "action-delay:3")


def config_of(run: Path, **options: object) -> EvaluateConfig:
    short = EvaluateConfig(run, episodes=3, video=0, max_steps=10, workers=1)
    return replace(short, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def clean(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    run = tmp_path_factory.mktemp("clean") / "run"
    shutil.copytree(tiny_run, run)
    return evaluate_run(config_of(run))


@pytest.fixture(scope="module")
def perturbed(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    """An evaluation with perturbations and a video; its folder must stay as it is."""
    run = tmp_path_factory.mktemp("perturbed") / "run"
    shutil.copytree(tiny_run, run)
    return evaluate_run(config_of(run, perturb=PERTURB, video=2))


def test_clean_rows_are_those_without_perturbations_and_pair_with_the_perturbed(
    clean: Evaluation, perturbed: Evaluation
) -> None:
    assert [row.repeatable() for row in perturbed.rows] == [row.repeatable() for row in clean.rows]
    assert tuple(perturbed.perturbed) == PERTURB
    for name, rows in perturbed.perturbed.items():
        assert {row.perturbation for row in rows} == {name}
        assert [row.init_state for row in rows] == [row.init_state for row in clean.rows]
        assert not any(row.mismatch for row in rows)
    assert any(
        after.total_reward != before.total_reward or after.repeatable() != before.repeatable()
        for after, before in zip(perturbed.perturbed["noise:1"], clean.rows, strict=True)
    )


def test_perturbed_rows_do_not_depend_on_workers_order_or_company(
    clean: Evaluation, perturbed: Evaluation, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(clean.rows_path.parent, run)
    before = read_rows(run / "episodes.jsonl")
    other = evaluate_run(config_of(run, workers=3, perturb=("action-delay:3", "noise:1")))
    for name, rows in other.perturbed.items():
        expected = perturbed.perturbed[name]
        assert [row.repeatable() for row in rows] == [row.repeatable() for row in expected]
    assert [row for row in read_rows(run / "episodes.jsonl") if not row.perturbation] == before


def test_a_perturbed_evaluation_is_resumed_and_never_repeated_by_accident(
    perturbed: Evaluation, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(perturbed.rows_path.parent, run)
    config = config_of(run, perturb=("noise:1",))
    with pytest.raises(UserError, match="has rows of this evaluation with noise:1; pass --resume"):
        evaluate_run(config)
    rows = read_rows(run / "episodes.jsonl")
    write_rows(
        run / "episodes.jsonl",
        [row for row in rows if (row.perturbation, row.index) != ("noise:1", 1)],
    )
    evaluate_run(config, resume=True)
    found = [row.repeatable() for row in read_rows(run / "episodes.jsonl")]
    assert len(found) == len(rows)
    assert {*found} == {row.repeatable() for row in rows}


def test_rows_are_selected_by_perturbation_and_clean_ones_by_default(
    perturbed: Evaluation,
) -> None:
    run = perturbed.rows_path.parent
    assert Selector().of(run) == perturbed.rows
    assert Selector(perturb="noise:1").of(run) == perturbed.perturbed["noise:1"]
    with pytest.raises(UserError, match=r"holds no evaluation with .*perturb blur:1"):
        Selector(perturb="blur:1").of(run)


def test_the_video_shows_initial_states_clean_and_perturbed(perturbed: Evaluation) -> None:
    assert perturbed.video_path is None
    assert perturbed.perturbed_video_path is not None
    assert perturbed.perturbed_video_path.stat().st_size > 1000


def test_the_table_has_the_paired_change_of_each_perturbation(perturbed: Evaluation) -> None:
    success = (True, True, False)
    before = [replace(row, success=s) for row, s in zip(perturbed.rows, success, strict=True)]
    after = [replace(row, success=False) for row in perturbed.perturbed["noise:1"]]
    broken = [replace(after[0], error="died"), *after[1:]]
    made = replace(perturbed, rows=tuple(before), perturbed={"noise:1": after, "blur:1": broken})
    _, noise, blur = perturbation_table(made)
    assert noise[:3] == ["noise:1", "0/3", "0.0 %"]
    assert noise[3].startswith("-66.7 [")
    assert blur[1] == "0/2"
    assert blur[3].startswith("-50.0 [")


def test_the_command_prints_and_shows_them(
    perturbed: Evaluation, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(perturbed.rows_path.parent, run)
    Evaluate(config_of(run, perturb=("noise:1",)), resume=True).run()
    printed = capsys.readouterr().out
    assert "noise:1" in printed
    assert "Robustness" in (run / "report.html").read_text(encoding="utf-8")


def test_what_a_policy_would_not_notice_is_refused(tiny_run: Path) -> None:
    with pytest.raises(UserError, match="unknown perturbation 'fog'"):
        config_of(tiny_run, perturb=("fog",))
