"""Without a lie the organisation works: what the other tests of this folder see comes from the lie."""

from __future__ import annotations

from pathlib import Path

from tests.hostile.organisation import ALICE, BOB, Organisation


async def test_honest_parts_serve(tmp_path: Path) -> None:
    async with Organisation.running(tmp_path, "prod", "test") as org:
        async with org.client(ALICE) as alice, org.client(BOB) as bob, org.client(ALICE, "test") as other:
            for client in (alice, bob, other):
                assert (await client.get()).status == 200
        assert len(org.requests) == 3
