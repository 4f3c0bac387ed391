# SPDX-License-Identifier: Apache-2.0
from .api import soft_aggregate

__all__ = ["soft_aggregate"]
