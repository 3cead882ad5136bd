"""Makes docs/results.md from results/**/result.json, which `chronotope train` wrote."""

from pathlib import Path

from chronotope.report.learned import results_page
from chronotope.tasks.learning import read_results

HERE = Path(__file__).parent

if __name__ == "__main__":
    (HERE / "results.md").write_text(results_page(read_results(HERE.parent / "results")))
