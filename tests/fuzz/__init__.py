"""Coverage-guided fuzzing of everything that reads input from outside: `make fuzz TARGET=NAME SECONDS=N`."""
