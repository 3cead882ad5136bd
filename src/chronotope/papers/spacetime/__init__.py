"""Space and time in one model: which attends to which, and in what order."""
