"""What goes beyond the paper: clinical diagnoses, defences, attacked images as files, universal perturbations."""
