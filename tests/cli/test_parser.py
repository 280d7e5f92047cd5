"""Command lines: which role, which command, what was given."""

from __future__ import annotations

import pytest

from arcbridge.cli.commands import commands_of, find_command
from arcbridge.cli.parser import UsageError, _commands_needed, parse
from arcbridge.cli.words import role_of
from arcbridge.errors import ExitCode


@pytest.mark.parametrize(
    ("line", "role"),
    [
        ("--role relay", "relay"),
        ("token list --role=relay", "relay"),
        ("proxy -n x", "client"),
        ("clusters", "client"),
        ("enroll", "agent"),
        ("token create", "relay"),
        ("config check", ""),
        ("version", ""),
        ("run", "client"),
        ("doctor prod", "client"),
        ("completion bash", ""),
        ("run -n x -- kubectl get pods --role relay", "client"),
        ("", ""),
        ("-n proxy", "client"),
        ("-n x", "client"),
        ("--relay https://r.example clusters", "client"),
        ("login https://r.example", "client"),
        ("--join-token-file x", "agent"),
        ("--log-level debug", ""),
        ("-- --role relay", ""),
    ],
)
def test_role(line: str, role: str) -> None:
    assert role_of(line.split()) == role


def test_role_of_the_environment_and_the_plugin() -> None:
    assert role_of(["run"], environment="agent") == "agent"
    assert role_of(["--role", "relay"], environment="agent") == "relay"
    assert role_of(["status"], program="/usr/bin/kubectl-arcbridge") == "client"


def test_flags_before_and_after_the_command() -> None:
    for line in (
        "--relay https://r -n a --name b clusters -o json",
        "clusters -o json --relay https://r --name a -n b",
    ):
        found = parse(line.split(), "client")
        assert found.command == ("clusters",)
        assert found.texts("relay") == ("https://r",)
        assert (found.texts("cluster"), found.text("output")) == (("a", "b"), "json")
    assert parse(["-f", "-", "--token", "-"], "client").text("file") == "-"


def test_nothing_given_is_nothing() -> None:
    found = parse([], "client")
    assert (found.command, found.given) == (("proxy",), {})
    assert parse(["run"], "agent").command == parse([], "agent").command


def test_defaults_of_the_sub_command_do_not_hide_what_came_before() -> None:
    found = parse(["-v", "--port", "1", "proxy"], "client")
    assert found.switch("verbose")
    assert found.text("port") == "1"


def test_words_of_one_argument_may_stand_around_flags() -> None:
    found = parse(
        ["forward", "svc/web", "-n", "shop", "8080:80", "--cluster", "c", "deploy/api", "9000", "-v", ":http"], "client"
    )
    assert found.texts("target") == ("svc/web", "8080:80", "deploy/api", "9000", ":http")
    assert (found.texts("n"), found.texts("cluster"), found.switch("verbose")) == (("shop",), ("c",), True)
    assert parse(["connect", "a", "-n", "c", "b"], "client").texts("name") == ("a", "b")
    assert parse(["-n", "c", "forward", "db"], "client").texts("cluster") == ("c",)
    for line in ("doctor a -v b", "forward svc/web -v 80 --port=1 -x", "whoami a"):
        with pytest.raises(UsageError):
            parse(line.split(), "client")


def test_positionals_and_groups() -> None:
    assert parse(["forward", "db", "--listen", "127.0.0.1:1"], "client").texts("target") == ("db",)
    found = parse(["token", "create", "--cluster", "c", "--uses", "3", "--rebind", "-o", "json"], "relay")
    assert found.command == ("token", "create")
    assert (found.text("cluster"), found.text("uses"), found.switch("rebind")) == ("c", "3", True)
    assert parse(["cluster", "revoke", "c"], "relay").text("cluster") == "c"


@pytest.mark.parametrize(
    ("role", "line", "said"),
    [
        ("client", "stauts", "unknown sub-command 'stauts'; did you mean status?"),
        ("client", "speedtest x", "`speedtest` is gone; `arcbridge doctor NAME --throughput` says how long"),
        ("client", "token create", "unknown sub-command 'token'; it is one of --role relay"),
        ("client", "relay", "unknown sub-command 'relay'; did you mean --role relay?"),
        ("client", "enroll", "unknown sub-command 'enroll'; it is one of --role agent"),
        ("relay", "token craete", "unknown sub-command 'craete'; did you mean create?"),
        ("relay", "token x", "unknown sub-command 'x'; there are create, list, delete"),
        ("relay", "token", "a sub-command is needed: one of create, list, delete"),
        ("client", "completion bsh", "SHELL: 'bsh' is unknown; did you mean bash? Use bash, zsh, fish or powershell"),
        (
            "client",
            "forward",
            "TARGET (TYPE/NAME and [LOCAL:]PORT, several of each; or the name of a target) is missing",
        ),
        ("client", "--clust x", "unknown flag --clust"),
        ("client", "--port", "argument --port: expected one argument"),
        ("relay", "user", "a sub-command is needed: one of revoke, restore, list"),
        ("agent", "--relays https://relay.example.com", "unknown flag --relays; did you mean --relay?"),
        ("agent", "--relays=x", "unknown flag --relays; did you mean --relay?"),
        (
            "relay",
            "cluster list --relay x",
            "unknown flag --relay: it is one of --role agent or client; `arcbridge clusters` lists",
        ),
        ("agent", "--zzzzzzzzzz run", "unknown flag --zzzzzzzzzz"),
    ],
)
def test_a_mistake_is_two_lines_and_is_named(
    role: str, line: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError) as caught:
        parse(line.split(), role)
    assert caught.value.code == ExitCode.USAGE
    mistake, remedy = capsys.readouterr().err.splitlines()
    assert mistake.startswith(f"error: {said}")
    assert "--help" in remedy


@pytest.mark.parametrize(
    ("role", "line", "command"),
    [("client", "doctor a b", "doctor"), ("client", "logs -x", "logs"), ("relay", "token create x", "token create"),
     ("client", "--port", "")],
)  # fmt: skip
def test_a_mistake_leads_to_the_help_of_its_command(
    role: str, line: str, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError):
        parse(line.split(), role)
    what = "flags and examples" if command else "commands"
    assert capsys.readouterr().err.endswith(f"run `arcbridge {command}{' ' * bool(command)}--help` for the {what}\n")


def test_relays_of_a_login_may_be_left_out_or_several() -> None:
    assert parse(["login"], "client").texts("relay_url") == ()
    assert parse(["login", "https://a", "https://b"], "client").texts("relay_url") == ("https://a", "https://b")
    assert parse(["--relay", "https://a", "login"], "client").texts("relay_url") == ()


@pytest.mark.parametrize(
    ("line", "begin"),
    [
        ("--help", "usage: arcbridge COMMAND"),
        ("-h", "usage: arcbridge COMMAND"),
        ("forward --help", "usage: arcbridge forward TARGET"),
        ("config print -h", "usage: arcbridge --role ROLE config print"),
        ("config --help", "usage: arcbridge --role client config SUB-COMMAND"),
    ],
)
def test_help(line: str, begin: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(line.split(), "client")
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith(begin)


LINES = """ | proxy | proxy --port 1 | --port 1 proxy -v | -n a -n b | -n=a | -nv | -v -v |
--cluster=a clusters -o json | -o json | --port | --port -1 | --port 1 --prot 2 proxy | --nonsense |
--remove-context=yes | nonsense | proxy extra | forward | forward db --listen 127.0.0.1:1 |
--listen 127.0.0.1:1 | completion fish | completion tcsh | config | config print | config nonsense |
--help | -h | proxy --help | --help proxy | -- proxy | --token - proxy | status --output |
-f x --no-context-switch login | version"""
"""Command lines, apart by bars; the first is empty."""


@pytest.mark.parametrize("line", LINES.split("|"))
def test_the_parser_of_one_sub_command_is_as_good_as_all(
    line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Making fewer parsers saves time alone: what was given, help and every message stay the same."""

    def outcome() -> object:
        try:
            found = parse(line.split(), "client")
        except SystemExit as ended:
            return ended.code, capsys.readouterr()
        return found.command, found.given

    short = outcome()
    monkeypatch.setattr("arcbridge.cli.parser._commands_needed", lambda arguments, role: commands_of(role))
    assert outcome() == short


def test_a_client_without_words_makes_no_parser_of_a_sub_command() -> None:
    assert _commands_needed(["--port", "1", "-n", "status"], "client") == ()
    assert _commands_needed(["--port", "1", "status", "--help"], "client") == (find_command("client", ("status",)),)


def test_another_program_s_command_line() -> None:
    line = "run -n a -n b --parallel 8 -- kubectl -n x get -- --help"
    found = parse(line.split(), "client")
    assert found.command == ("run",)
    assert found.texts("cluster") == ("a", "b")
    assert found.text("parallel") == "8"
    assert found.texts("command_line") == ("kubectl", "-n", "x", "get", "--", "--help")


@pytest.mark.parametrize("line", ["run -n a", "run -n a --", "run -n a kubectl apply -f x --all"])
def test_a_command_that_is_missing_or_not_behind_the_dashes(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError):
        parse(line.split(), "client")
    assert "the command goes behind --" in capsys.readouterr().err
