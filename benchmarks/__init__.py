# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of the operators against their peers: `python -m benchmarks.run OPERATOR`."""
