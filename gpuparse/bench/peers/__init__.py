"""The sides of the comparison: gpuparse and what else could feed the same training; one module for each.

Each module has `make(data, settings, variant)`, which returns a `sides.Side`, and imports its library there.
"""
