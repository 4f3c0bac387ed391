# SPDX-License-Identifier: Apache-2.0
"""Recipes: models, augmentation, ensembles, zoom and refinement put together, over whole data sets."""

from .ablation import AblationError, Step, ablate, ablation_steps
from .dataset_run import DatasetError, DatasetReport, run_dataset
from .late_objects import LateObjects
from .pipeline import Pipeline
from .processes import Processes
from .recipe import ConfigError, Member, Memory, Recipe, Refinement, load_recipe, parse_tta

__all__ = [
    "AblationError",
    "ConfigError",
    "DatasetError",
    "DatasetReport",
    "LateObjects",
    "Member",
    "Memory",
    "Pipeline",
    "Processes",
    "Recipe",
    "Refinement",
    "Step",
    "ablate",
    "ablation_steps",
    "load_recipe",
    "parse_tta",
    "run_dataset",
]
