"""The budget of paths: what is read from probe and strace, and what a difference says. No role runs here."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from bench.budget.__main__ import FILE, PAGE, verdict, with_table
from bench.budget.comparison import Budget, Cost, compare
from bench.budget.counting import usual, usual_number
from bench.budget.probe import Phase, Probe, environment, readable
from bench.budget.system_calls import read
from bench.load.build import NoCompiler
from tests.support.processes import require_or_skip

SEND, FLUSH, SPLIT = "wire/sender.py:Sender.send", "mux/session.py:MuxSession.flush", "bytes.split"
KEPT = Cost(Counter({SEND: 60, FLUSH: 39, SPLIT: 1}), 50, Counter(read=3, epoll_pwait=4), 1000, 2)
VERSIONS = {"python": "3.11", "uvloop": "0.22.1"}


def budget(cost: Cost, **versions: str) -> Budget:
    return Budget({**VERSIONS, **versions}, {"echo": {"agent": cost}})


def changed(functions: dict[str, int] | None = None, **figures: object) -> Cost:
    fields = {name: getattr(KEPT, name) for name in ("allocations", "system_calls", "bytes", "wake_ups")}
    return Cost(Counter({**KEPT.functions, **(functions or {})}), **{**fields, **figures})


def test_the_same_is_within_the_budget() -> None:
    assert compare(budget(KEPT).costs, budget(changed()).costs) == []
    assert verdict(budget(KEPT), budget(KEPT)) == ("every total is within 3% of budget.json", False)


@pytest.mark.parametrize(
    ("functions", "says"),
    [
        ({SEND: 64}, "   +4  wire/sender.py:Sender.send (60 -> 64)"),
        ({"new.py:paid": 4}, "   +4  new.py:paid (0 -> 4)"),
        ({FLUSH: 0}, "  -39  mux/session.py:MuxSession.flush (39 -> 0)"),
    ],
)
def test_a_function_that_spends_or_saves_is_named(functions: dict[str, int], says: str) -> None:
    text, beyond = verdict(budget(KEPT), budget(changed(functions)))
    assert beyond
    assert text.splitlines()[0].startswith("BEYOND  echo, agent: calls 100 -> ")
    assert says in text


def test_three_percent_are_said_and_no_failure() -> None:
    text, beyond = verdict(budget(KEPT), budget(changed({SEND: 63})))
    assert not beyond
    assert text.startswith("within  echo, agent: calls 100 -> 103 (+3, +3.0%)\n")


@pytest.mark.parametrize(
    ("figures", "says"),
    [
        ({"allocations": 59}, "allocations 50 -> 59 (+9, +18.0%)"),
        ({"wake_ups": 3}, "wake-ups 2 -> 3 (+1, +50.0%)"),
        ({"bytes": 969}, "bytes 1000 -> 969 (-31, -3.1%)"),
        ({"system_calls": Counter(read=3, epoll_pwait=4, getpid=1)}, "getpid 0 -> 1 (+1)"),
        ({"system_calls": Counter(read=4, epoll_pwait=3)}, "read 3 -> 4 (+1, +33.3%)"),
    ],
)
def test_each_figure_is_held(figures: dict[str, object], says: str) -> None:
    text, beyond = verdict(budget(KEPT), budget(changed(**figures)))
    assert beyond
    assert f"BEYOND  echo, agent: {says}" in text


def test_an_exec_may_differ_by_a_piece_of_its_answer() -> None:
    for pieces, beyond in ((2, False), (3, True)):
        more = changed(wake_ups=2 + pieces)
        assert [change.beyond for change in compare({"exec": {"agent": KEPT}}, {"exec": {"agent": more}})] == [beyond]


def test_a_path_that_became_cheaper_is_said_and_spends_nothing() -> None:
    for before, after, spends in ((KEPT, changed(wake_ups=3), True), (changed(wake_ups=3), KEPT, False)):
        (change,) = compare({"echo": {"agent": before}}, {"echo": {"agent": after}})
        assert change.beyond
        assert change.spends is spends


def test_a_path_that_the_file_lacks_and_one_that_is_gone_are_beyond_it() -> None:
    more = Budget(VERSIONS, {**budget(KEPT).costs, "exec": {"relay": KEPT}})
    for kept, now, says in ((budget(KEPT), more, "0 -> 100 (+100)"), (more, budget(KEPT), "100 -> 0 (-100, -100.0%)")):
        text, beyond = verdict(kept, now)
        assert beyond
        assert f"BEYOND  exec, relay: calls {says}" in text


def test_other_versions_are_said() -> None:
    assert (
        "versions differ from the file's: uvloop 0.22.1 -> 0.23\n"
        in verdict(budget(KEPT), budget(KEPT, uvloop="0.23"))[0]
    )


def test_the_file_is_what_was_written() -> None:
    assert Budget.read(budget(KEPT).text()) == budget(KEPT)
    assert Budget.read(FILE.read_text()).text() == FILE.read_text()
    assert '"/' not in FILE.read_text(), "a path of the machine that counted"
    assert budget(KEPT).table().splitlines()[-1] == "| echo | agent | 100 | 50 | 7 | 2 | 1000 |"


def test_the_usual_operation_is_the_budget() -> None:
    rare, timer, often = Counter(a=1), Counter(a=2, timer=3), Counter(a=2)
    assert usual([often, timer, often, rare]) == often
    assert usual([timer, Counter(a=2, timer=1), Counter(b=2), rare, often, Counter(a=3), timer, often]) == often, "2nd"
    assert usual_number([9, 7, 8, 1, 6, 3, 2, 4]) == 2, "no two are alike"


def test_system_calls_belong_to_the_operation_in_which_they_began() -> None:
    lines = [
        '9.5 read(7, ""..., 100) = 9',
        "10.1 epoll_pwait(3, [...], 1024, -1, NULL, 8) = 1",
        '10.2 read(7, ""..., 100)  = 40',
        "10.3 read(7, 0x7f, 100) = -1 EAGAIN (Resource temporarily unavailable)",
        '10.4 sendto(8, ""..., 60, 0, NULL, 0) = 60',
        "10.5 epoll_ctl(3, EPOLL_CTL_ADD, 14, {events=EPOLLIN, data={u32=14, u64=14}}) = 0",
        "10.6 epoll_pwait(3, [], 1024, 0, NULL, 8) = 0",
        "--- SIGCHLD ---",
        "11.1 epoll_pwait(3,  <detached ...>",
    ]
    first, second = read(lines, [10.0, 11.0, 12.0])
    assert first.system_calls == Counter(epoll_pwait=2, read=2, sendto=1, epoll_ctl=1)
    assert (first.bytes, first.wake_ups) == (100, 1)
    assert not second.system_calls


def test_names_say_where_a_function_is() -> None:
    assert readable("/any/where/arcbridge/wire/sender.py:Sender.send:") == "wire/sender.py:Sender.send"
    assert readable("/x/site-packages/aiohttp/web.py:run:") == "aiohttp/web.py:run"
    assert readable("/usr/lib/python3.11/ssl.py:SSLObject.read:") == "ssl.py:SSLObject.read"
    assert readable(f"{FILE.parent}/budget/joins.py:serve:") == "bench/budget/joins.py:serve"
    assert readable("list.append:") == "list.append"
    assert readable("builtins:len:") == "builtins:len"


PROGRAM = """
import sys, threading
def paid(of): return len(of)
def thrown():
    try: yield
    except ValueError: paid("")
for line in sys.stdin:
    if "thread" in line:
        other = threading.Thread(target=lambda: [paid("") for _ in range(100)]); other.start(); other.join()
    paid(line); held = [bytearray(100) for _ in range(50)]
    running = thrown(); next(running)
    try: running.throw(ValueError("is still one"))
    except StopIteration: pass
    print(flush=True)
"""


def test_a_process_is_counted_from_outside(tmp_path: Path) -> None:
    try:
        variables = environment(tmp_path)
    except NoCompiler as error:
        require_or_skip("compiler", str(error))
    argv = ["env", *(f"{name}={value}" for name, value in variables.items()), sys.executable, "-c", PROGRAM]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def turn(word: str) -> None:
            process.stdin.write(f"{word}\n")
            process.stdout.readline()

        turn("first")
        probe = Probe(tmp_path, process.pid)
        assert (probe.calls, probe.allocations) == (0, 0)
        probe.count(Phase.CALLS)
        for word, lens in (("plain", 2), ("thread", 2)):
            before = probe.calls
            turn(word)
            found = probe.functions(before, probe.calls)
            assert (found["<string>:paid"], found["builtins:len"]) == (lens, lens), "other threads do not count"
            assert found["<string>:thrown"] == 2
        probe.count(Phase.ALLOCATIONS)
        turn("plain")  # with the first call, it stops to count calls
        calls, before = probe.calls, probe.allocations
        turn("plain")
        assert probe.calls == calls
        assert 100 <= probe.allocations - before < 200
        probe.close()
        process.stdin.close()


def test_the_page_has_the_table_of_the_file() -> None:
    page = PAGE.read_text()
    assert with_table(page, Budget.read(FILE.read_text()).table()) == page, "make budget WRITE=1 writes both"
