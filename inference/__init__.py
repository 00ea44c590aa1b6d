"""The stochastic passes, made cheap: seeded dropout masks, the algebra that shares what passes have in common, their moments.

Exact, never approximate. Nothing in here knows a heatmap or a file; :mod:`uncertainty` and :mod:`experiment` do.
"""
