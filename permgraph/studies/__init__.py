"""Studies: hundreds of pairs of networks, on one machine or many."""

from permgraph.studies.plan import Cell, Named, StudyPlan
from permgraph.studies.run import study
from permgraph.studies.table import StudyResult

__all__ = ["Cell", "Named", "StudyPlan", "StudyResult", "study"]
