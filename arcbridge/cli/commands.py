"""Every sub-command, as data: its words, the function that does it, its flags and its roles.

Parser, help, completion and dispatch (`run`) follow from this one table. A function is named as `module:name` within
`arcbridge.cli` and imported when its command runs: this module is read at every start, also for `--help`.
"""

from __future__ import annotations

from arcbridge.settings.flags import AGENT, CLIENT, RELAY, ROLES, Flag

DOCUMENTS = ("json", "yaml")
"""The formats of `--output` in which everything is printed, for programs; each command has them."""
SHELLS = ("bash", "zsh", "fish", "powershell")
FOR_PEOPLE = ("table", "wide")
LIST_OUTPUTS = (*FOR_PEOPLE, *DOCUMENTS, "name")
DIAGNOSIS_OUTPUTS = ("table", *DOCUMENTS)


class Argument:
    """The positional argument of a sub-command. `count`: empty for one, `?`, `*` or `+` as in a regular expression."""

    __slots__ = ("choices", "count", "help", "kind", "name", "shown")

    def __init__(
        self, name: str, help: str, count: str = "", *, choices: tuple[str, ...] = (), shown: str = "", kind: str = ""
    ) -> None:
        self.name = name
        self.help = help
        self.count = count
        self.choices = choices
        self.shown = shown
        """How the usage line has it; empty: as `NAME`, or `NAME …`."""
        self.kind = kind
        """What completion offers for it besides `choices`: `clusters`, `files`, or nothing."""


class Command:
    """One sub-command and its own flags, as `WORDS = module:function`; the function takes an `Invocation` and returns
    the exit code."""

    __slots__ = ("argument", "examples", "flags", "function", "help", "path", "roles", "takes_command", "uses")

    def __init__(
        self, script: str, help: str, *parts: Flag | Argument | str, takes_command: bool = False, uses: str = ""
    ) -> None:
        path, _, self.function = script.partition(" = ")
        self.path = tuple(path.split())
        self.help = help
        self.roles: tuple[str, ...] = ()
        self.flags = [part for part in parts if isinstance(part, Flag)]
        self.argument = next((part for part in parts if isinstance(part, Argument)), None)
        self.examples = [line for part in parts if isinstance(part, str) for line in part.split(" ;; ")]
        """Command lines, each with what it does behind a `#`; in a row of the table `;;` stands between them."""
        self.uses = uses
        """The long names of those flags of the role that its help lists among its own."""
        self.takes_command = takes_command
        """Whether another program's command line follows behind `--`; the parser reads nothing of it."""


def _output(*choices: str) -> Flag:
    """Make `--output` of a command; the first of `choices` is the default."""
    return Flag("-o --output FORMAT", "how to print", choices=choices, default=choices[0])


def _commands(roles: tuple[str, ...], *commands: Command) -> tuple[Command, ...]:
    """Give commands to those roles."""
    for command in commands:
        command.roles = roles
    return commands


OUTPUT = _output(*LIST_OUTPUTS)
ROW_OUTPUT = _output("table", *DOCUMENTS, "name")
DIAGNOSIS_OUTPUT = _output(*DIAGNOSIS_OUTPUTS)
TEXT_OUTPUT = _output("text", *DOCUMENTS)
SETTINGS_OUTPUT = _output("toml", *DOCUMENTS)

_FOR = Flag("--for DURATION", "reach the cluster for this time alone, as 1h or 30m")
_RESTRICT = "--read-only --no-secrets --namespace --verb"
_FORCE = Flag("--force", "also where not all have followed the step before")
_REQUEST = Argument("name", "name of the request, as `elevations` shows it")
_CLUSTER = Argument("cluster", "name of the cluster", kind="clusters")
_BUNDLE = (
    Flag("--without-names", "numbers for users, groups and clusters, and no text that may have one"),
    Flag("--log FILE", "the log, where it is a file; - reads it from standard input"),
    # Not `file`, which is a setting of the client.
    Argument("archive", "the file to write; - is standard output (default: a new one here)", "?", kind="files"),
)
_USER = Argument("user", "name of the user as the policy has it, or ISSUER#SUBJECT")

COMMANDS = (
    *_commands(
        (CLIENT,),
        Command(
            "proxy = client:proxy",
            "serve kubectl on a local port (the default)",
            _FOR,
            "arcbridge proxy -n berlin ;; arcbridge proxy -n berlin -f -  # print the kubeconfig instead of merging it",
            uses="--cluster --port --file --kube-context --no-context-switch --remove-context " + _RESTRICT,
        ),
        Command(
            "forward = client:forward",
            "carry local ports to pods behind a name, or to a TCP target of the agent",
            Flag("--namespace NAME…", "namespace of what is named (default: default)"),
            Flag("-n NAME…", "the same; with a target of the agent: the cluster"),
            Flag("--address ADDRESS…", "where the local ports listen (default: localhost); may be repeated"),
            Flag("--listen HOST:PORT", "local address of a target of the agent (default: 127.0.0.1:0)"),
            Flag("--any-user", "let programs of other users of this machine use the ports"),
            Argument("target", "TYPE/NAME and [LOCAL:]PORT, several of each; or the name of a target", "+"),
            "arcbridge forward -n shop --cluster berlin svc/web 8080:80",
            "arcbridge forward --cluster berlin db --listen 127.0.0.1:5432  # a TCP target of the agent",
            uses="--cluster",
        ),
        Command(
            "gateway = client:gateway",
            "serve many callers and clusters over HTTPS, each request with its caller's own tokens",
            Flag("--listen HOST:PORT", "where to listen (default: 127.0.0.1:8443); without a host: everywhere"),
            Flag("--certificate FILE", "certificate chain that callers are shown (PEM)"),
            Flag("--key FILE", "its key"),
            "arcbridge gateway --certificate tls.crt --key tls.key --pins-file pins.toml ;; "
            "arcbridge gateway --listen :8443 --certificate tls.crt --key tls.key  # everywhere",
        ),
        Command(
            "connect = background:connect",
            "serve clusters in the background, for kubectl from any terminal",
            Flag("--static", "a client certificate in the kubeconfig, for tools without plugins"),
            Argument("name", "names of clusters", "*", kind="clusters"),
            "arcbridge connect berlin munich  # both, from any terminal",
            "arcbridge connect berlin -f ~/.kube/berlin  # in a kubeconfig of its own",
            "arcbridge connect berlin --read-only --kube-context berlin-ro  # beside the one with all your rights",
            uses="--port --file --kube-context --no-context-switch " + _RESTRICT,
        ),
        Command(
            "disconnect = background:disconnect",
            "serve clusters no more, and take their contexts out",
            Flag("--all", "all that are connected"),
            Argument("name", "names of clusters or contexts", "*", kind="clusters"),
            "arcbridge disconnect berlin ;; arcbridge disconnect --all",
        ),
        Command(
            "stop = background:stop",
            "end the background process; kubectl starts it again",
            Flag("--force", "kill it (SIGKILL) where it neither answers nor ends by SIGTERM"),
            "arcbridge stop ;; arcbridge stop --force  # where it hangs",
        ),
        Command(
            "logs = background:logs",
            "print the log of the background process",
            Flag("-f --follow", "go on as it grows"),
            "arcbridge logs ;; arcbridge logs -f  # until Ctrl-C",
        ),
        Command(
            "credential = background:credential",
            "print a credential for kubectl, which runs this by itself",
            Flag("--ended", "say that what served the cluster has ended"),
        ),
        Command("background = background:serve", "be the background process, as systemd starts it"),
        Command(
            "complete = completion:complete",
            "print what a shell offers at a TAB",
            Argument("shell", "which shell", choices=SHELLS),
            takes_command=True,
        ),
        Command(
            "clusters = client:clusters",
            "list the clusters you may reach",
            _output(*LIST_OUTPUTS, "clusterprofile"),
            Flag("--gateway URL", "with -o clusterprofile: the gateway where tools reach them"),
            Flag("--gateway-ca-file FILE", "its CA, where tools do not know it"),
            "arcbridge clusters ;; arcbridge clusters -o name  # one a line, for scripts",
            "arcbridge clusters -o clusterprofile --gateway https://gateway.example.org  # for an inventory",
        ),
        Command(
            "login = login:login",
            "log in at a relay; commands that name no relay then mean it",
            Flag("--renew-trust", "ask again whether to trust the relay's CA and its issuer"),
            Flag("--force", "log in anew where there is a login"),
            Flag("--wait DURATION", "end after that time, as 60s or 10m; without a terminal a login needs it"),
            Argument("relay_url", "https://host[:port] of the relay (default: the one logged in at last)", "*"),
            "arcbridge login https://relay.example.org",
            "arcbridge login --grant-type device-code  # the browser is on another machine",
            uses="--grant-type --trust-first-use --relay-ca-pin --relay-ca-file --redirect-port",
        ),
        Command(
            "whoami = login:whoami",
            "show who is logged in, until when, and where",
            ROW_OUTPUT,
            Flag("--check", "ask the relay whether it takes the login"),
            "arcbridge whoami ;; arcbridge whoami --check  # does the relay take the login?",
        ),
        Command(
            "trust = client:trust",
            "show the pins of the clusters that are trusted here, and trust another one",
            Flag("--renew", "trust the pin that the cluster shows now, or that of --cluster-ca-pin"),
            OUTPUT,
            Argument("name", "name of the cluster (default: all)", "?", kind="clusters"),
            "arcbridge trust ;; arcbridge trust berlin --renew  # its CA was replaced (a rotation needs nothing)",
            uses="--cluster-ca-pin",
        ),
        Command(
            "key = client:key",
            "make the key of --proof-key-file, and print what names it",
            ROW_OUTPUT,
            "arcbridge key --proof-key-file ~/.config/arcbridge/proof.key",
            "arcbridge key --proof-key-file proof.key -o json",
            uses="--proof-key-file",
        ),
        Command("logout = login:logout", "forget the kept tokens, here and at the issuer", "arcbridge logout"),
        Command(
            "run = client:run",
            "run a command against clusters, and leave nothing behind",
            Flag("--parallel N", "clusters at a time, where several are named (default: 4)"),
            _FOR,
            "arcbridge run -n berlin -- kubectl get pods",
            "arcbridge run -n 'prod-*' --parallel 8 -- kubectl get nodes  # in each",
            "arcbridge run -n berlin --read-only --namespace shop --for 1h -- PROGRAM  # with fewer rights",
            takes_command=True,
            uses="--cluster --workload --pins-file --cluster-ca-pin " + _RESTRICT,
        ),
        Command(
            "elevate = elevation:elevate",
            "ask for groups for a time, and wait until the cluster lends them",
            Flag("--for DURATION", "for how long, as 30m (default: 1h, or what the rule gives at most)"),
            Flag("--reason TEXT", "why; the approver reads it, and the records have it"),
            Flag("--group NAME…", "a group to ask for (default: all of the rule); may be repeated"),
            Flag("--rule NAME", "the AccessRule to ask by, where several give the groups"),
            "arcbridge elevate -n berlin --for 30m --reason INC-42",
            "arcbridge elevate -n berlin --reason INC-42 --group ops  # one of the groups that a rule gives",
            uses="--cluster",
        ),
        Command(
            "approve = elevation:approve",
            "approve what another user asks for",
            _REQUEST,
            "arcbridge elevations -n berlin  # lists what waits ;; arcbridge approve -n berlin anna-x7k2p",
            uses="--cluster",
        ),
        Command(
            "deny = elevation:deny",
            "deny what another user asks for, or end what it lends",
            Flag("--reason TEXT", "why; the user who asked reads it"),
            _REQUEST,
            "arcbridge deny -n berlin anna-x7k2p ;; arcbridge deny -n berlin anna-x7k2p --reason 'no incident'",
            uses="--cluster",
        ),
        Command(
            "withdraw = elevation:withdraw",
            "withdraw a request, or end what it lends before its time",
            _REQUEST,
            "arcbridge withdraw -n berlin anna-x7k2p ;; arcbridge withdraw anna-x7k2p",
            uses="--cluster",
        ),
        Command(
            "elevations = elevation:elevations",
            "list who has asked for which groups, and until when they are lent",
            Flag("--all", "also what is over, denied or withdrawn"),
            OUTPUT,
            "arcbridge elevations -n berlin ;; arcbridge elevations -n berlin --all -o json",
            uses="--cluster",
        ),
        Command(
            "doctor = client:doctor",
            "look at each hop of the way, and say what is wrong",
            Flag("--throughput", "read from the cluster for five seconds, to measure the rate"),
            DIAGNOSIS_OUTPUT,
            Argument("name", "cluster to look at (default: --cluster)", "?", kind="clusters"),
            "arcbridge doctor berlin ;; arcbridge doctor berlin -o json  # for scripts: `ok`, `cause`, and each hop",
        ),
        Command(
            "bundle = bundle:bundle",
            "write one file for a report of a fault, without a secret",
            *_BUNDLE,
            "arcbridge bundle -n berlin ;; arcbridge bundle --without-names report.tar.gz  # for a public issue",
            uses="--cluster",
        ),
        Command(
            "status = background:status",
            "show what is connected here",
            OUTPUT,
            "arcbridge status ;; arcbridge status -o wide  # all columns, however narrow the terminal is",
        ),
        Command(
            "uninstall = uninstall:uninstall",
            "remove contexts, logins and keys of this user, and say what stays",
            Flag("--yes", "do not ask"),
            "arcbridge uninstall ;; arcbridge uninstall --yes  # ask nothing",
        ),
    ),
    *_commands(
        (RELAY, AGENT),
        Command(
            "run = serve:run",
            "run the role (the default)",
            "arcbridge --role relay run --config relay.toml ;; arcbridge --role agent run --config agent.toml",
        ),
        Command(
            "doctor = serve:doctor",
            "check this role and all that it depends on, and say what to do",
            DIAGNOSIS_OUTPUT,
            "arcbridge --role relay doctor --config relay.toml ;; arcbridge --role agent doctor -o json",
        ),
        Command(
            "bundle = bundle:bundle",
            "write one file for a report of a fault, without a secret",
            *_BUNDLE,
            "arcbridge --role relay bundle --config relay.toml ;; arcbridge --role agent bundle --config agent.toml",
            "arcbridge --role relay bundle --without-names report.tar.gz  # for a public issue",
            "arcbridge --role agent bundle --log agent.log --without-names report.tar.gz  # for a public issue",
        ),
        Command(
            "audit show = audit:show",
            "print the records of audit logs",
            Flag("--user NAME", "only what this user did, or what was done to this user"),
            Flag("--cluster NAME", "only what a relay has recorded of this cluster"),
            Flag("--since TIME", "only later ones: 2h, 7d, 2026-11-25, or 2026-11-25T12:00:00Z"),
            TEXT_OUTPUT,
            Argument(
                "file",
                "audit logs; .gz too (default: the role's own, with what logrotate made of it)",
                "*",
                kind="files",
            ),
            "arcbridge audit show --user alice --since 2h agent-audit.log",
            "arcbridge --role relay audit show -o json  # the relay's own",
        ),
        Command(
            "audit verify = audit:verify_logs",
            "check audit logs for records that are missing or were changed",
            Flag("--anchors FILE…", "the role's own log (JSON) with the heads of the chains; may be repeated"),
            TEXT_OUTPUT,
            Argument("file", "an audit log, as it was written; .gz too", "+", kind="files"),
            "arcbridge audit verify audit.log audit.log.1.gz",
            "arcbridge audit verify audit.log --anchors agent.log  # with the heads in its log",
        ),
        Command(
            "ca status = ca:status",
            "show the CA of this relay or cluster, and who has followed a rotation",
            OUTPUT,
            "arcbridge --role relay ca status ;; arcbridge --role agent ca status -o json",
        ),
        Command(
            "ca next = ca:make_next",
            "make the next CA, and announce it",
            _FORCE,
            "arcbridge --role relay ca next ;; arcbridge --role agent ca next",
        ),
        Command(
            "ca activate = ca:activate",
            "have the next CA sign, once all know it",
            _FORCE,
            "arcbridge --role relay ca activate ;; arcbridge --role agent ca activate",
        ),
        Command(
            "ca retire = ca:retire",
            "have the former CA count no more, once no end needs it",
            _FORCE,
            "arcbridge --role relay ca retire ;; arcbridge --role agent ca retire",
        ),
    ),
    *_commands(
        (AGENT,),
        Command(
            "enroll = serve:enroll",
            "trade the join token for a certificate, then end",
            "arcbridge enroll --config agent.toml ;; arcbridge enroll --config agent.toml --join-token-file token",
            uses="--join-token-file --state-dir --state-secret",
        ),
        Command(
            "recording list = recording:list_recordings",
            "list recorded sessions, as the audit log has them",
            Flag("--user NAME", "only those of this user"),
            Flag("--since TIME", "only later ones: 2h, 7d, 2026-11-25, or 2026-11-25T12:00:00Z"),
            OUTPUT,
            Argument(
                "file", "audit logs; .gz too (default: the agent's own, with its rotated ones)", "*", kind="files"
            ),
            "arcbridge recording list --user alice --since 7d audit.jsonl",
            "arcbridge recording list -o json audit.jsonl",
        ),
        Command(
            "recording open = recording:open_recording",
            "play a recorded session on this terminal",
            Flag("--identity FILE", "the private key of a recipient, as age-keygen writes it"),
            Flag("--text", "print what was shown as lines, without what steers a terminal"),
            Flag("--cast", "print the recording for asciinema"),
            Argument("file", "a recording", kind="files"),
            "arcbridge recording open --identity auditor.key a.cast.age.tar",
            "arcbridge recording open --identity auditor.key --cast a.cast.age.tar > a.cast",
        ),
        Command(
            "recording verify = recording:verify_recordings",
            "check that recordings are what the audit log says",
            Flag("--audit FILE…", "an audit log; may be repeated (default: the agent's own, with its rotated ones)"),
            TEXT_OUTPUT,
            Argument("file", "recordings, or directories of them", "+", kind="files"),
            "arcbridge recording verify --audit audit.jsonl recordings",
            "arcbridge recording verify --audit audit.jsonl a.cast.age.tar",
        ),
    ),
    *_commands(
        (RELAY,),
        Command(
            "token create = relay:token_create",
            "make a join token for a cluster's agents",
            Flag("--cluster NAME", "name of the cluster"),
            Flag("--uses N", "how often it may be used (default: 1)"),
            Flag("--ttl DURATION", "how long it lives, as 1h or 7d (default: 1h)"),
            Flag("--rebind", "let the cluster come back with another CA"),
            Flag("--kube-server URL", "for an agent that is no pod: https://host:port of its API server"),
            Flag("--kube-ca-file FILE", "CA of that API server, on the agent's machine"),
            Flag("--kube-token-file FILE", "the agent's own token there"),
            Flag("--kube-client-certificate-file FILE", "or its client certificate"),
            Flag("--kube-client-key-file FILE", "key of that certificate"),
            ROW_OUTPUT,
            "arcbridge token create --cluster berlin",
            "arcbridge token create --cluster berlin --uses 3 --ttl 7d  # for three agents",
        ),
        Command(
            "token list = relay:token_list",
            "list join tokens",
            OUTPUT,
            "arcbridge token list ;; arcbridge token list -o json",
        ),
        Command(
            "token delete = relay:token_delete",
            "delete a join token",
            Argument("id", "id of the token, the part before the dot"),
            "arcbridge token delete 3f9c2a17 ;; arcbridge --config relay.toml token delete 3f9c2a17",
        ),
        Command(
            "policy list = relay:policy_list",
            "show the policy in force, and what is held back",
            OUTPUT,
            "arcbridge policy list ;; arcbridge policy list -o json",
        ),
        Command(
            "policy explain = policy:explain",
            "say which rule lets a user reach a cluster, or which is nearest; exit code 1 where none does",
            Flag("--groups GROUP…", "groups of the user, separated by commas (default: those of the last token)"),
            Flag("--actor NAME", "the program that acts for the user (default: none does)"),
            TEXT_OUTPUT,
            Argument(
                "name",
                "the user, as the policy names it, and the cluster; with --groups the cluster alone will do",
                "+",
                shown="[USER] CLUSTER",
            ),
            "arcbridge policy explain alice berlin ;; arcbridge policy explain --groups dev,ops berlin",
        ),
        Command(
            "policy diff = policy:diff",
            "say what another policy file would change; exit code 1 with differences, 2 with errors",
            TEXT_OUTPUT,
            Argument("file", "the policy file", kind="files"),
            "arcbridge policy diff new-policy.toml ;; arcbridge policy diff new-policy.toml -o json",
        ),
        Command(
            "policy accept = relay:policy_accept",
            "put a changed policy in force that is held back",
            Argument("hash", "hash of the version, as `policy list` shows it"),
            "arcbridge policy list  # shows the hash ;; arcbridge policy accept 3f9c2a17",
        ),
        Command(
            "cluster list = relay:cluster_list",
            "list enrolled clusters",
            OUTPUT,
            "arcbridge cluster list ;; arcbridge cluster list -o wide  # with sessions, checks and pins",
        ),
        Command(
            "cluster revoke = relay:cluster_revoke",
            "cut a cluster off and refuse it",
            _CLUSTER,
            "arcbridge cluster revoke berlin ;; arcbridge --config relay.toml cluster revoke berlin",
        ),
        Command(
            "cluster restore = relay:cluster_restore",
            "let a revoked cluster back in",
            _CLUSTER,
            "arcbridge cluster restore berlin ;; arcbridge --config relay.toml cluster restore berlin",
        ),
        Command(
            "cluster delete = relay:cluster_delete",
            "forget a cluster that is no more",
            _CLUSTER,
            "arcbridge cluster delete berlin ;; arcbridge --config relay.toml cluster delete berlin",
        ),
        Command(
            "session list = relay:session_list",
            "list the sessions that run now",
            OUTPUT,
            "arcbridge session list ;; arcbridge session list -o json",
        ),
        Command(
            "refusal list = relay:refusal_list",
            "list who was refused which cluster lately, and why",
            OUTPUT,
            "arcbridge refusal list ;; arcbridge refusal list -o json",
        ),
        Command(
            "session end = relay:session_end",
            "end one session",
            Flag("--reason TEXT", "shown to the user"),
            Argument("session", "id of the session, as `session list` shows it, or its first one"),
            "arcbridge session end 01K5 ;; arcbridge session end 01K5 --reason 'maintenance at 18:00'",
        ),
        Command(
            "user revoke = relay:user_revoke",
            "end a user's sessions and refuse the tokens issued before a time",
            Flag("--before TIME", "refuse tokens issued before, as 2026-11-25T12:00:00Z or 2026-11-25 (default: now)"),
            Flag("--reason TEXT", "shown to the user"),
            _USER,
            "arcbridge user revoke alice --reason 'laptop lost' ;; arcbridge user revoke alice --before 2026-11-25",
        ),
        Command(
            "user restore = relay:user_restore",
            "take a revocation back",
            _USER,
            "arcbridge user restore alice ;; arcbridge --config relay.toml user restore alice",
        ),
        Command(
            "backup = backup:backup",
            "write what this relay cannot be without into one file, while it runs",
            Flag("--recipient KEY…", "encrypt it to a public key of age or OpenSSH; may be repeated"),
            Flag("--overwrite", "replace the file"),
            Argument("file", "the file to write", kind="files"),
            "arcbridge backup relay.backup ;; arcbridge backup --recipient age1… relay.backup.age  # encrypted",
        ),
        Command(
            "restore = backup:restore",
            "bring back what a backup contains; the relay must be stopped",
            Flag("--identity FILE", "private key of age or OpenSSH, for an encrypted backup"),
            Flag("--overwrite", "replace the registry or CA that is there; its revocations stay"),
            Flag("--settings DIR", "write the settings files in it to this directory, too"),
            Flag("--show", "say what it contains, and change nothing"),
            Flag("--yes", "restore although relays of the fleet run"),
            Argument("file", "a file that `backup` has written", kind="files"),
            "arcbridge restore --show relay.backup  # what is in it?",
            "arcbridge restore relay.backup.age --identity key.txt",
        ),
        Command(
            "recovery list = relay:recovery_list",
            "list clusters from which revocations may come back",
            OUTPUT,
            "arcbridge recovery list ;; arcbridge recovery list -o json",
        ),
        Command("recovery end = relay:recovery_end", "wait for no more revocations", "arcbridge recovery end"),
        Command(
            "user list = relay:user_list",
            "list the users who are revoked",
            OUTPUT,
            "arcbridge user list ;; arcbridge user list -o json",
        ),
    ),
    *_commands(
        ROLES,
        Command(
            "config check = configuration:check",
            "check the settings and the files they name as a start does; exit code 2 with errors",
            TEXT_OUTPUT,
            "arcbridge --role relay config check --config relay.toml ;; arcbridge --role client config check -o json",
            "arcbridge --role agent config check --config agent.toml",
        ),
        Command(
            "config init = initial_settings:init",
            "write the annotated settings files of the role, filled from the flags; edited files are left alone",
            Flag(
                "--directory DIR",
                "where to (default: /etc/arcbridge for root, else the user's own directory of settings, on Linux "
                "~/.config/arcbridge)",
            ),
            Flag("--issuer URL", "the OIDC issuer whose tokens count, or at which to log in"),
            Flag("--client-id ID", "this program's client id there (default: arcbridge)"),
            Flag(
                "--audience AUDIENCE",
                "audience of the tokens for this end (default: arcbridge-relay; an agent's is arcbridge-NAME)",
            ),
            Flag(
                "--group NAME…", "a group that may reach every cluster (relay), as the issuer names it; may be repeated"
            ),
            "arcbridge --role client config init ;; arcbridge --role relay config init --directory . --group platform",
            "arcbridge --role agent config init --directory .",
        ),
        Command(
            "config print = configuration:show",
            "print the settings in force",
            SETTINGS_OUTPUT,
            "arcbridge --role client config print ;; arcbridge --role agent config print -o json",
            "arcbridge --role relay config print --config relay.toml",
        ),
        Command("version = run:version", "print the version", "arcbridge version"),
        Command(
            "completion = completion:print_script",
            "print a completion script for a shell",
            Argument("shell", "which shell", choices=SHELLS),
            "source <(arcbridge completion bash)  # also zsh ;; arcbridge completion fish | source",
        ),
    ),
)

ADMINISTRATION = ("token", "cluster", "session", "refusal", "user")
"""Groups of the relay's commands that administrators have over HTTPS, too, as `admin GROUP WORD`."""


def _over_https(command: Command) -> Command:
    """Return the client's command that does what this one does on the relay's machine (`cli.admin`)."""
    parts = command.flags if command.argument is None else [*command.flags, command.argument]
    there = "arcbridge --relay https://relay.example.org"
    examples = [one.replace("arcbridge --config relay.toml", there) for one in command.examples]
    examples = [one.replace(f" {command.path[0]} ", f" admin {command.path[0]} ", 1) for one in examples]
    made = Command(f"admin {' '.join(command.path)} = admin:administer", command.help, *parts, *examples)
    made.roles = (CLIENT,)
    return made


# The policy is shown and no more: an administrator who could accept a version could give rights to himself.
COMMANDS += tuple(
    _over_https(command)
    for command in COMMANDS
    if command.roles == (RELAY,) and (command.path[0] in ADMINISTRATION or command.path == ("policy", "list"))
)

DEFAULT_COMMAND = {RELAY: ("run",), AGENT: ("run",), CLIENT: ("proxy",)}

GROUPS = {
    CLIENT: (
        ("first steps", "login clusters connect"),
        ("every day", "status disconnect run doctor bundle proxy forward gateway logs stop"),
        ("more rights for a time", "elevate approve deny withdraw elevations"),
        ("login and trust", "whoami logout trust key"),
        ("administration", "admin"),
        ("settings and shells", "config completion uninstall version"),
    ),
    RELAY: (
        ("serve", "run doctor bundle backup restore recovery"),
        ("clusters and their agents", "cluster token session refusal ca"),
        ("users", "policy user audit"),
        ("settings and shells", "config completion version"),
    ),
    AGENT: (
        ("serve", "run enroll doctor bundle audit recording ca"),
        ("settings and shells", "config completion version"),
    ),
}
"""The first words of each role's commands, in groups, as the help has them."""
INTERNAL = ("background", "complete", "credential")
"""Commands of the client that programs run: neither help nor completion shows them."""

GROUP_HELP = {
    "admin": "administer over HTTPS, with your own login",
    "audit": "audit logs",
    "recording": "recorded sessions",
    "token": "join tokens",
    "ca": "rotation of the CA",
    "cluster": "enrolled clusters",
    "session": "sessions that run now",
    "refusal": "users who were refused a cluster lately",
    "policy": "who may reach which cluster",
    "user": "users whose logins are revoked",
    "recovery": "revocations that a registry has lost",
    "config": "settings",
}

GONE = {"speedtest": "`arcbridge doctor NAME --throughput` says how long round trips take, and how fast bytes come"}
"""Sub-commands of former releases, and what to use instead."""


WITHOUT_ROLE = {"audit": AGENT}
"""Groups that read files of whichever role, so that none has to be named, and the one that is taken then."""


def commands_of(role: str) -> tuple[Command, ...]:
    return tuple(command for command in COMMANDS if role in command.roles)


def find_command(role: str, path: tuple[str, ...]) -> Command:
    return next(command for command in commands_of(role) if command.path == path)
