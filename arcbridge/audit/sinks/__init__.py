"""Sinks: the records of an audit log's file are carried on to collectors (`sender`), over `http`, `syslog` or `stdout`.

The file with the chain is the truth and the spool: a sink reads it (`tail`) and keeps how far it has got. A sink delays
and refuses nothing that is recorded, and each record arrives at least once, in the order of the file; its `chain` and
`seq` show which one came twice. Invariant: what was not delivered and is no longer in any file is counted in the chain.
"""
