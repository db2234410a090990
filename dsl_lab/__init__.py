"""Whole experiments on one machine, made of real server and client processes."""
