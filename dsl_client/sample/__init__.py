"""A class-balanced piece of Fashion-MNIST, so that a first run needs no download (see NOTICE)."""
