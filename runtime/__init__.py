"""What every long-running command needs: configuration, errors, whole files, the lock, signals, processes, progress.

Nothing in here knows what an image, a map or a score is. Modules that work without PyTorch do not import it.
"""
