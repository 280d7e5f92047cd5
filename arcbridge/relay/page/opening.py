"""Makes the administrators' page of one process of a relay, by its settings."""

from __future__ import annotations

from contextlib import AsyncExitStack

from arcbridge.identity.authentication import AuthenticationConfig
from arcbridge.identity.verifier import TokenVerifier
from arcbridge.net.fetch import HttpFetcher
from arcbridge.relay.audit.log import audit_file
from arcbridge.relay.http.administration import AdminApi
from arcbridge.relay.http.api import Api
from arcbridge.relay.ledger import ledger_secret
from arcbridge.relay.page.facts import FactBook
from arcbridge.relay.page.login import CALLBACK, CookieSeal, PageLogin, PageSessions
from arcbridge.relay.page.site import PageSite
from arcbridge.relay.parts import Basis
from arcbridge.relay.settings import page_issuer


def make_page(basis: Basis, api: Api, administration: AdminApi, stack: AsyncExitStack) -> PageSite:
    """Return the page, whose routes are not installed yet; `stack` closes what it keeps open."""
    checked, tokens = basis.checked, basis.verifier
    config, public = checked.config, checked.public
    issuer = page_issuer(config.page, checked.issuers)
    fetcher = HttpFetcher()
    stack.push_async_callback(fetcher.close)
    verifier = TokenVerifier(AuthenticationConfig(()), fetcher, groups=tokens.groups)
    stack.push_async_callback(verifier.close)
    secret = ledger_secret(basis.authority.key_pem)
    seal, redirect = CookieSeal(secret, f"login at {public}"), f"{public.origin}{CALLBACK}"
    login = PageLogin(config.page, issuer, redirect, verifier, tokens, fetcher.ask, seal)
    sessions = PageSessions(CookieSeal(secret, f"session at {public}"), config.page.session)
    facts = FactBook(lambda: administration.relay, audit_file(config))
    return PageSite(api, facts, login, sessions, basis.policy, public, issuer)
