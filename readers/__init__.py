"""Reading the data: where it lies, images, annotations and tables, and whether it is plausible. See docs/data.md."""
