from arcbridge.relay.failure_limit import FailureLimit, source_of


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_burst_then_one_at_a_time() -> None:
    clock = Clock()
    limit = FailureLimit(burst=3, every=10, clock=clock)
    for _ in range(3):
        assert limit.wait("192.0.2.1") == 0
        limit.failed("192.0.2.1")
    assert 1 <= limit.wait("192.0.2.1") <= 11
    assert limit.wait("192.0.2.2") == 0
    clock.now += 10.1
    assert limit.wait("192.0.2.1") == 0
    limit.failed("192.0.2.1")
    assert limit.wait("192.0.2.1") > 0
    clock.now += 1000
    for _ in range(3):
        assert limit.wait("192.0.2.1") == 0
        limit.failed("192.0.2.1")
    assert limit.wait("192.0.2.1") > 0
    assert limit.refused == 3


def test_the_table_is_bounded_and_forgets_the_oldest() -> None:
    limit = FailureLimit(burst=1, every=1000, size=100, clock=Clock())
    for n in range(10_000):
        limit.failed(f"10.0.{n // 256}.{n % 256}")
    assert len(limit) == 100
    assert limit.wait("10.0.0.0") == 0
    assert limit.wait("10.0.39.15") > 0


def test_sources() -> None:
    assert source_of("192.0.2.1") == source_of("::ffff:192.0.2.1") == "192.0.2.1"
    assert source_of("2001:db8::1") == source_of("2001:db8::ffff:1") == "2001:db8::/64"
    assert source_of("2001:db8:0:1::1") != source_of("2001:db8::1")
    assert source_of("fe80::1%eth0") == "fe80::/64"
    assert source_of("") == source_of("a name") == "unknown"
