# SPDX-License-Identifier: Apache-2.0
from .api import local_attention

__all__ = ["local_attention"]
