"""FLOW for image classifiers, where the new task has classes of its own: probe, fine-tune, train the head again."""
