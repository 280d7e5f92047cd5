"""The budget of each path: what an operation costs each role, counted in what does not depend on the machine.

`paths` has the operations and the processes that they go through, `probe` counts calls and allocations within those,
`system_calls` what the kernel is asked, `counting` makes one count of many operations, and `comparison` holds it
against `bench/budget.json`. Nothing here measures time.
"""
