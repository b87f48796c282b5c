"""Rollouts without a model: recorded facts replayed against any planner, on measured or computed costs. No torch."""

from fastgrpo.simulation.corrections import fit_corrections
from fastgrpo.simulation.costs import Corrections, Costs, ProfileCosts, StepSeconds, StepWork
from fastgrpo.simulation.facts import Facts
from fastgrpo.simulation.facts_files import load_facts, save_facts
from fastgrpo.simulation.lengths import draw_lengths, draw_requests
from fastgrpo.simulation.limit import find_limit, replay_told
from fastgrpo.simulation.predict import PLANNERS, Prediction, predict_planners, replay_settled
from fastgrpo.simulation.replay import Replay, Request, build_requests, replay
from fastgrpo.simulation.roofline import DEVICES, MODELS, Roofline, build_roofline_profile
from fastgrpo.simulation.trees import TreeTables

__all__ = [
    "DEVICES",
    "MODELS",
    "PLANNERS",
    "Corrections",
    "Costs",
    "Facts",
    "Prediction",
    "ProfileCosts",
    "Replay",
    "Request",
    "Roofline",
    "StepSeconds",
    "StepWork",
    "TreeTables",
    "build_requests",
    "build_roofline_profile",
    "draw_lengths",
    "draw_requests",
    "find_limit",
    "fit_corrections",
    "load_facts",
    "predict_planners",
    "replay",
    "replay_settled",
    "replay_told",
    "save_facts",
]
