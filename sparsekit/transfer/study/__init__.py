"""The study: a grid of upstream models, tasks, ways of transfer and seeds, from a document to a report.

``document`` reads what to do, ``table`` knows the cells and what is finished, ``run`` checks and runs them, ``speed`` times
the models, ``collect`` gathers the results, ``report`` shows them beside the published ones.
``methods`` is another grid, which makes upstream models by every pruning method.
"""

from . import methods
from .collect import collect
from .document import Study, load
from .report import write_study_report
from .run import check, run
from .speed import time_models
from .table import status

__all__ = ["Study", "check", "collect", "load", "methods", "run", "status", "time_models", "write_study_report"]
