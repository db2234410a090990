"""The edge node: private data and the bottom of the network."""
