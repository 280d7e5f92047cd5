"""Commands of the client, each without the parsing of its flags and the printing of its result."""
