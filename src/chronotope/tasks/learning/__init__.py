"""Learning problems: one contract, one trainer, one file of results for each run."""

from chronotope.tasks.learning.results import Result, read_results
from chronotope.tasks.learning.run import learn, measure_again
from chronotope.tasks.learning.settings import Settled, recall, remember, settle
from chronotope.tasks.learning.task import TEST, VALID, Makes, Numbers, Published, Schedule, Task

__all__ = [
    "TEST",
    "VALID",
    "Makes",
    "Numbers",
    "Published",
    "Result",
    "Schedule",
    "Settled",
    "Task",
    "learn",
    "measure_again",
    "read_results",
    "recall",
    "remember",
    "settle",
]
