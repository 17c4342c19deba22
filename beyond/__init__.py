"""What goes beyond the paper: clinical diagnoses, defences, attacked images stored as files."""
