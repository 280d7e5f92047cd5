"""The load generator: a C program (load.c), compiled when it is first needed, and its face in Python."""
