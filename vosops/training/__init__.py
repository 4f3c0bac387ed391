# SPDX-License-Identifier: Apache-2.0
"""Training: clips from photographs and videos, losses, schedules, the loop."""
