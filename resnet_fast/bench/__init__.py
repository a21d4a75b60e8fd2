"""Measuring ResNets: layer shapes as data, the bound of every kernel, peers side by side, reports."""
