"""What every command needs and no paper describes: errors, arguments, files, checkpoints, processes.

Nothing here imports a module of the root. Imports: errors <- distributed <- command, errors <- files <- checkpoints.
"""
