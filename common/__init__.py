"""What both ends of the wire need, and only that."""
