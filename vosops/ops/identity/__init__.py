# SPDX-License-Identifier: Apache-2.0
from .api import identity_embedding

__all__ = ["identity_embedding"]
