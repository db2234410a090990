"""What the system promises when things go wrong, case by case: a letter for the kind, and a number."""
