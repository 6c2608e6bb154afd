"""flowstream in the trainers that people use: one module a trainer, each with its own extra."""
