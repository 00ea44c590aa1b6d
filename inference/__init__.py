"""The stochastic passes of the U-Net, made cheap: seeded dropout masks, and the algebra that shares what passes have in common.

Exact, never approximate. Nothing in here knows a heatmap, a variance or a file; :mod:`uncertainty` does.
"""
