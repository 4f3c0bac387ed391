# SPDX-License-Identifier: Apache-2.0
from .api import attention

__all__ = ["attention"]
