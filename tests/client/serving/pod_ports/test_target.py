"""What `forward` reads from its command line."""

from __future__ import annotations

import pytest

from arcbridge.client.serving.pod_ports.target import (
    PortPair,
    is_kubernetes,
    parse_addresses,
    parse_ports,
    parse_targets,
)
from arcbridge.errors import ConfigError


def test_targets_and_their_ports() -> None:
    words = ["svc/web", "8080:80", "https", "deployment.apps/api", ":9000", "PODS/db-0", "5432"]
    targets = parse_targets(words, "shop")
    assert [str(target) for target in targets] == ["svc/web", "deploy/api", "pod/db-0"]
    assert [target.ports for target in targets] == [
        (PortPair(8080, "80"), PortPair(None, "https")),
        (PortPair(0, "9000"),),
        (PortPair(5432, "5432"),),
    ]
    assert [target.collection for target in targets] == [
        "/api/v1/namespaces/shop/services",
        "/apis/apps/v1/namespaces/shop/deployments",
        "/api/v1/namespaces/shop/pods",
    ]
    for word in ("sts/a", "statefulset/a", "ds/a", "rs/a", "po/a"):
        assert parse_targets([word, "1"], "x")[0].name == "a"


def test_a_first_word_without_a_type_is_a_pod() -> None:
    (target,) = parse_targets(["till", "8080:80", "http"], "shop")
    assert str(target) == "pod/till"
    assert target.ports == (PortPair(8080, "80"), PortPair(None, "http"))


@pytest.mark.parametrize(("word", "pair"), [("80", PortPair(80, "80")), (":web", PortPair(0, "web")),
                                            ("0:80", PortPair(0, "80")), ("web", PortPair(None, "web")),
                                            ("65535:1", PortPair(65535, "1"))])  # fmt: skip
def test_ports(word: str, pair: PortPair) -> None:
    assert parse_ports(word) == pair


@pytest.mark.parametrize(
    "words",
    [
        ["80"],
        ["80", "8080"],
        ["8080:80", "till"],
        ["till"],
        ["svc/web"],
        ["svc/web", "80", "svc/api"],
        ["job/web", "80"],
        ["svc/../secrets", "80"],
        ["svc/web\r\nHost: x", "80"],
        ["svc/", "80"],
        ["svc/web", "0"],
        ["svc/web", "65536"],
        ["svc/web", "1:2:3"],
        ["svc/web", "x:80"],
        ["svc/web", "80:"],
        ["svc/web", "٣"],
        ["svc/web", "8080:80", "8080:81"],
    ],
)
def test_what_is_no_target(words: list[str]) -> None:
    with pytest.raises(ConfigError):
        parse_targets(words, "shop")


@pytest.mark.parametrize("namespace", ["", "a/b", "a\n", "A", "x" * 300])
def test_what_is_no_namespace(namespace: str) -> None:
    with pytest.raises(ConfigError):
        parse_targets(["svc/web", "80"], namespace)


def test_addresses() -> None:
    texts = ["localhost,10.0.0.1", "::1", "10.0.0.1"]
    assert parse_addresses(texts) == ["localhost", "10.0.0.1", "::1"]
    for text in ("", "localhost,", "example.org", "10.0.0.1:80", "10.0.0.1, ::1"):
        with pytest.raises(ConfigError, match="flag --address"):
            parse_addresses([text])


def test_a_target_of_the_agent_is_one_word() -> None:
    assert not is_kubernetes(["postgres"])
    assert is_kubernetes(["svc/web", "80"])
    assert is_kubernetes(["postgres", "80"])
