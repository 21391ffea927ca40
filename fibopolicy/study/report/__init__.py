"""What a study says: success and cost side by side, paired differences, verdicts; as
Markdown, CSV and one HTML page.

From a study directory, whether it is finished or not:

    from pathlib import Path
    from fibopolicy.study.report import write_report

    page = write_report(Path("studies/fibottention_vs_dense"))            # its answer
    stands in the first lines page = write_report(Path("studies/fibottention_vs_dense"),
    videos=True)  # and shows where the encoders differ

Beside the page lie `report.md`, `cells.csv`, `seeds.csv` and `comparisons.csv`. The
numbers behind them:

    from fibopolicy.study.records import read_study
    from fibopolicy.study.report import results

    found = results(read_study(Path("studies/fibottention_vs_dense")))
    for one in found.comparisons:
        print(one.subject, one.difference.value, one.difference.low,
        one.difference.high, one.p, one.verdict)
"""

from fibopolicy.study.report.results import results
from fibopolicy.study.report.write import write_report

__all__ = ["results", "write_report"]
