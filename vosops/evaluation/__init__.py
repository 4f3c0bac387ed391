# SPDX-License-Identifier: Apache-2.0
"""Region similarity J and contour accuracy F as the DAVIS 2017 benchmark defines them."""

from .folders import EvaluationError, evaluate_folders
from .metrics import boundary_map, contour_accuracy, region_similarity
from .report import EvaluationReport, write_csv
from .sequence import SequenceScore, Statistics, evaluate_sequence, statistics

__all__ = [
    "EvaluationError",
    "EvaluationReport",
    "SequenceScore",
    "Statistics",
    "boundary_map",
    "contour_accuracy",
    "evaluate_folders",
    "evaluate_sequence",
    "region_similarity",
    "statistics",
    "write_csv",
]
