"""What the commands take: one record for each, read from the command line. Light: no torch, no trl."""

from fastgrpo.options.command_line import about, add_options, check_outputs, check_writable, read_options
from fastgrpo.options.drafting import DraftExportOptions, DraftImportOptions, DraftTrainOptions
from fastgrpo.options.generating import GenerateOptions
from fastgrpo.options.measuring import AcceptanceOptions, DraftersOptions, ProfileOptions, RolloutOptions
from fastgrpo.options.planning import BudgetOptions, OrderOptions, PlansOptions
from fastgrpo.options.shapes import name_plan, parse_plan, parse_speculation
from fastgrpo.options.simulating import SimulateOptions
from fastgrpo.options.training import DemoOptions, E2EOptions, LearningOptions, RewardsOptions, UpdateOptions, Workload
from fastgrpo.options.variants import Variant, parse_variant

__all__ = [
    "AcceptanceOptions",
    "BudgetOptions",
    "DemoOptions",
    "DraftExportOptions",
    "DraftImportOptions",
    "DraftTrainOptions",
    "DraftersOptions",
    "E2EOptions",
    "GenerateOptions",
    "LearningOptions",
    "OrderOptions",
    "PlansOptions",
    "ProfileOptions",
    "RewardsOptions",
    "RolloutOptions",
    "SimulateOptions",
    "UpdateOptions",
    "Variant",
    "Workload",
    "about",
    "add_options",
    "check_outputs",
    "check_writable",
    "name_plan",
    "parse_plan",
    "parse_speculation",
    "parse_variant",
    "read_options",
]
