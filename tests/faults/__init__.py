"""What goes wrong, case by case: crashes, bad links, hostile input. Tests bear the numbers of their cases."""
