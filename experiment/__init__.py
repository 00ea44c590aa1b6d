"""The results folder: claiming it, the saved maps, the saved numbers.

Nothing in here computes a map or a measure, or draws.
"""
