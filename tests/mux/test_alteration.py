"""What a TLS library says is sorted into bytes that were altered, and everything else."""

from __future__ import annotations

import ssl

import pytest

from arcbridge.errors import BytesAltered, ConnectionLost
from arcbridge.mux.alteration import alteration


def tls_error(reason: str, kind: type[ssl.SSLError] = ssl.SSLError) -> ssl.SSLError:
    error = kind(1, f"[SSL: {reason}]")
    error.reason = reason
    return error


@pytest.mark.parametrize(
    "reason",
    [
        "DECRYPTION_FAILED_OR_BAD_RECORD_MAC",
        "UNEXPECTED_MESSAGE",
        "BAD_RECORD_TYPE",
        "INVALID_SESSION_ID",
        "INVALID_CCS_MESSAGE",
        "SSLV3_ALERT_BAD_RECORD_MAC",
        "TLSV1_ALERT_DECRYPT_ERROR",
    ],
)
def test_what_no_honest_path_makes(reason: str) -> None:
    error = tls_error(reason)
    found = alteration(error)
    assert isinstance(found, BytesAltered)
    assert isinstance(found, ConnectionLost), "it is resumed and reported as any lost connection"
    assert found.__cause__ is error
    assert found.message == (
        f"bytes were altered on the way between client and agent, which TLS found out ({reason.split('_ALERT_')[-1]}); "
        "if it happens again, another party is in between: tell the relay's operator"
    )


@pytest.mark.parametrize(
    "error",
    [
        None,
        ConnectionResetError("reset"),
        TimeoutError(),
        tls_error("UNEXPECTED_EOF_WHILE_READING"),
        tls_error("CERTIFICATE_VERIFY_FAILED", ssl.SSLCertVerificationError),
        tls_error("", ssl.SSLEOFError),
        tls_error("TLSV1_ALERT_UNKNOWN_CA"),
        tls_error("TLSV13_ALERT_CERTIFICATE_REQUIRED"),
        ssl.SSLError("without a reason"),
    ],
    ids=repr,
)
def test_losses_and_refusals_are_none(error: BaseException | None) -> None:
    assert alteration(error) is None
