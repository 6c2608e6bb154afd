"""Pages that show a run or a data set: one HTML file each, which needs no network."""
