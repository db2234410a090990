"""A page that shows a run under way. It knows views of it (`dsl_server/watch.py`), no network, no wire."""
