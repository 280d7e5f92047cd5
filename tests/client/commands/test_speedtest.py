"""What a speed test says of what it measured; `tests/e2e/test_speedtest.py` measures."""

from __future__ import annotations

from arcbridge.client.commands.speedtest import Measurement, Reading, RoundTrips


def measurement(reading: Reading) -> Measurement:
    return Measurement(
        "prod", "relay.example.org:443", RoundTrips((0.03, 0.02, 0.04)), 0.041, RoundTrips((0.05,)), reading
    )


def test_a_line_for_each_hop() -> None:
    rows = measurement(Reading("/openapi/v2", 50_000_000, 5.0, 10)).rows()
    assert [row["hop"] for row in rows] == ["relay", "agent", "API server", "from the cluster", "to the cluster"]
    assert rows[0]["round_trip"] == "20.0 ms (median 30.0 ms)"
    assert rows[1]["round_trip"] == "41.0 ms"
    assert rows[3]["rate"] == "10.0 MB/s"
    assert "/openapi/v2 read 10 times in 5.0 s" in rows[3]["how"]
    assert rows[4]["how"].startswith("not measured")


def test_what_was_not_measured_has_no_figure() -> None:
    found = measurement(Reading(why_not="not measured: too small"))
    assert found.rows()[3] == {"hop": "from the cluster", "rate": "", "how": "not measured: too small"}
    assert found.document()["from_cluster"]["bytes_per_second"] == 0.0
    assert found.document()["from_cluster"]["not_measured"] == "not measured: too small"
    assert RoundTrips().best == RoundTrips().median == 0.0
