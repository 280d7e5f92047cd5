"""ClientContext of the product under load alone, to see where time goes; not a result, but a way to find out."""
