"""The verifier's idea of a fetcher, and the one there is."""

from __future__ import annotations

from arcbridge.identity.fetch import Fetch, ReplyDocument
from arcbridge.net.fetch import HttpFetcher, Reply


def test_the_fetcher_of_net_is_one() -> None:
    fetcher: Fetch = HttpFetcher()
    document: ReplyDocument = Reply(200, b"{}")
    assert callable(fetcher)
    assert document.body == b"{}"
