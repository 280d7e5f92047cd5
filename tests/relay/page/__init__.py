"""The administrators' page."""
