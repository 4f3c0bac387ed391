# SPDX-License-Identifier: Apache-2.0
"""What vosops is timed against: one file per way of computing an operator in plain PyTorch.

Every file has one function per operator, named and called as in vosops, written from the published
equations (docs/operators.md); none shares code with vosops.
"""
