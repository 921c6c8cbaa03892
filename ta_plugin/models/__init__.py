"""Models built on tokenized attention, and how they are measured."""
