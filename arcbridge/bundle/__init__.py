"""One file for a report of a fault: what each role is asked for, what of it may stand there, and how it is packed."""
