"""Reading the data: folder layouts, images, annotations, tables, checks of plausibility. See docs/data.md."""
