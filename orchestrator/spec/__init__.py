"""The sweep file: its format, its checks, and the trials that it describes."""

from orchestrator.spec._trial_values import Dimension
from orchestrator.spec.cells import Cell, cells_of
from orchestrator.spec.marked_yaml import SpecError
from orchestrator.spec.notes import notes_of
from orchestrator.spec.resources import ProcessResources, Resources
from orchestrator.spec.sweep import SweepSpec
from orchestrator.spec.sweep_file import find_sweep, load_sweep, sweep_schema
