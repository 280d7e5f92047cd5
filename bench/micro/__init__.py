"""Parts of the product under load alone: they show where time goes, and are no results to compare."""
