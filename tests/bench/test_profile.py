"""What `perf` says is read into parts."""

from __future__ import annotations

from bench.studies.profile import parts_of, symbols_of

BY_OBJECT = """
# Samples: 2K of event 'cpu-clock:ppp'
#
# Overhead  Shared Object
# ........  .............
    55.16%  [kernel.kallsyms]
    19.25%  libcrypto.so.3
    11.94%  libc.so.6
     9.49%  libpython3.11.so.1.0
     2.14%  loop.cpython-311-x86_64-linux-gnu.so
     1.70%  libssl.so.3
     0.21%  _socket.cpython-311-x86_64-linux-gnu.so
     0.08%  [vdso]
"""
BY_SYMBOL = """
    11.94%  [k] _copy_from_iter                 -      -
     8.22%  [.] __memmove_avx_unaligned_erms    -      -
     0.49%  [.] 0x0000000000241e92              -      -
"""


def test_objects_become_parts() -> None:
    assert parts_of(BY_OBJECT) == {
        "kernel": 55.16,
        "tls": 20.95,
        "copies": 11.94,
        "python": 9.7,
        "uvloop": 2.14,
        "other": 0.08,
    }
    assert parts_of("nothing") == {}


def test_functions_without_a_name_are_not_listed() -> None:
    assert symbols_of(BY_SYMBOL) == [(11.94, "kernel: _copy_from_iter"), (8.22, "__memmove_avx_unaligned_erms")]
