"""Infrastructure of the commands: errors, arguments, files, checkpoints, processes, charts.

Nothing here imports a module of the root. Imports: errors <- distributed <- command, errors <- files <- checkpoints.
"""
