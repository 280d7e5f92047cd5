"""Tokens that a platform has given to a job before it starts: in its environment, or in files.

One place may hold several, and the one is taken whose audience is wanted: `env:NAME[,NAME…]`, `file:PATH` (a file, or
a directory with one token in each file, as a projected volume of Kubernetes), and `gitlab`: each variable that holds a
token of this GitLab (`id_tokens` of the job). They are read at each use, because other programs renew files. Invariant:
a token is given out only for an audience that it names, and no token is in an error.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from arcbridge.client.credentials.jwt_unverified import UnverifiedClaims, read_unverified
from arcbridge.client.credentials.token_files import read_token, read_tokens
from arcbridge.errors import ConfigError, NotInThisJob, StateError, Unauthenticated
from arcbridge.identity.proof import place_of
from arcbridge.observe.untrusted_text import clean

GITLAB = "gitlab"
FILE = "file:"
ENVIRONMENT = "env:"
_MOST_FILES = 64
_SHOWN = 120
"""Bytes of an audience that a message names."""


class EnvironmentTokens:
    """The tokens of one place. Raises ConfigError for a place that cannot be."""

    def __init__(self, kind: str, environment: Mapping[str, str], clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._environment = environment
        self._names: list[str] = []
        self._path: Path | None = None
        self._issuer = ""
        self.what, self._advice = kind, "put a token with this audience there"
        if kind == GITLAB:
            self._issuer = environment.get("CI_SERVER_URL", "").rstrip("/")
            if not self._issuer:
                raise NotInThisJob("login.workload", "this is no job of GitLab (CI_SERVER_URL)")
            self._names = sorted(environment)
            self.what, self._advice = "the job", "add it to `id_tokens` of the job, with `aud: {audience}`"
        elif kind.startswith(ENVIRONMENT):
            self._names = [name.strip() for name in kind.removeprefix(ENVIRONMENT).split(",")]
            if not all(name.isascii() and name.isidentifier() for name in self._names):
                raise ConfigError("login.workload: env: needs names of environment variables, as in env:RELAY_TOKEN")
            if missing := [name for name in self._names if not environment.get(name)]:
                raise ConfigError(f"login.workload: the environment variable {missing[0]} is not set")
            self._advice = "have the platform give the job a token with this audience"
        elif path := kind.removeprefix(FILE):
            self._path = Path(path)
        else:
            raise ConfigError("login.workload: file: needs a path, as in file:/var/run/secrets/arcbridge")

    def for_audience(self, audience: str) -> str:
        """Return the token for `audience` that lasts longest. Raises Unauthenticated, StateError."""
        now, others, best, expired = self._clock(), set[str](), ("", UnverifiedClaims()), False
        for token in self._tokens():
            found = read_unverified(token)
            if self._issuer and found.issuer.rstrip("/") != self._issuer:
                continue  # a variable may hold a token of another service
            # Alone, or behind the key to which the token is bound (`identity.proof`).
            if audience not in map(place_of, found.audiences):
                others.update(found.audiences)
            elif 0 < found.expires_at <= now:
                expired = True
            elif not best[0] or found.expires_at > best[1].expires_at:
                best = token, found
        if best[0]:
            return best[0]
        if expired:
            raise Unauthenticated(f'the token of {self.what} for audience "{audience}" has expired; get a new one')
        known = ", ".join(f'"{clean(one, _SHOWN)}"' for one in sorted(others)[:4])
        raise Unauthenticated(
            f'{self.what} has no token for audience "{audience}"'
            + (f" (there are some for {known})" if known else "")
            + f"; {self._advice.format(audience=audience)}"
        )

    def _tokens(self) -> Iterator[str]:
        for name in self._names:
            yield from self._environment.get(name, "").split()
        if self._path is None:
            return
        if not self._path.is_dir():
            yield from read_tokens(self._path)
            return
        try:
            files = sorted(file for file in self._path.iterdir() if not file.name.startswith(".") and file.is_file())
        except OSError as error:
            raise StateError(f"cannot read {self._path}: {error.strerror}") from error
        if len(files) > _MOST_FILES:
            raise Unauthenticated(
                f"login.workload: {self._path} holds more than {_MOST_FILES} files; name a directory with tokens alone"
            )
        for file in files:
            yield read_token(file)
