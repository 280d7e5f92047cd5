"""Sessions to an agent: connections, resumption on another relay, and what a refusal means for the next attempt."""
