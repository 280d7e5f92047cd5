from arcbridge.relay.registry.base import RegistryUnavailable, shown_version


def test_unavailable_is_worth_trying_again() -> None:
    error = RegistryUnavailable("locked")
    assert (error.status_code, error.retry_after) == (503, 5)


def test_versions_are_shown_without_control_characters() -> None:
    assert shown_version("1.2.3+g0\x1b\r\n\u202e") == "1.2.3+g0"
    assert len(shown_version("1" * 100_000)) == 64
