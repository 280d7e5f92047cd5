import pytest
from hypothesis import given
from hypothesis import strategies as st

from arcbridge.errors import ConfigError
from arcbridge.pki.names import check_cluster_name, cluster_server_name


@pytest.mark.parametrize("name", ["a", "7", "prod-eu", "prod.eu-1", "a" * 63, "a--b", "a.-b"])
def test_canonical_names_pass_unchanged(name: str) -> None:
    assert check_cluster_name(name) == name
    assert cluster_server_name(name) == f"{name}.cluster.arcbridge"


@pytest.mark.parametrize(
    "name",
    ["", "-a", "a-", ".a", "a.", "a..b", "..", "*", "a*", ">", "a>b", "A", "Prod", "a b", "a\n", "\na", "a\r\nb", "a/b"]  # noqa: RUF005
    + ["a_b", "a\x00", "рrod", "pröd", "１", "a" * 64, "a" * 253, "a" * 65536, "prod\u200b", " a"],
)
def test_anything_else_is_refused_and_never_quoted(name: str) -> None:
    """docs/threats.md#J22: lengths, wildcards, control characters, mixed case, look-alikes."""
    for check in (check_cluster_name, cluster_server_name):
        with pytest.raises(ConfigError) as caught:
            check(name)
        assert len(name) < 4 or name not in caught.value.message
        assert len(caught.value.message) < 300


@given(st.text(max_size=70))
def test_whatever_passes_is_safe_in_uris_subjects_and_server_names(name: str) -> None:
    try:
        check_cluster_name(name)
    except ConfigError:
        return
    assert name.isascii()
    assert name == name.lower()
    assert not set(name) - set("abcdefghijklmnopqrstuvwxyz0123456789-.")
    assert len(name) <= 63
