"""The GPU host: the top of the network. It never sees raw data."""
