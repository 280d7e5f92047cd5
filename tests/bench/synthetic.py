"""A made-up result: small, complete, and the same every time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bench.result import summary

SYSTEMS = {
    "arcbridge": "ours",
    "arcbridge-without-resumption": "ours",
    "openssh": "peer",
    "chisel": "peer",
    "rathole-stunnel": "peer",
    "rathole-tls": "peer",
    "stunnel-haproxy": "chain",
    "direct": "yardstick",
}

Figures = Mapping[str, Mapping[str, float]]

SCENARIOS: dict[str, dict[str, dict[str, float]]] = {
    "bulk": {
        "arcbridge": {"up_mb_per_s": 900, "down_mb_per_s": 960, "relay_cpu_s_per_gb": 0.3},
        "openssh": {"up_mb_per_s": 540, "down_mb_per_s": 580, "relay_cpu_s_per_gb": 1.35},
        "chisel": {"up_mb_per_s": 230, "down_mb_per_s": 215, "relay_cpu_s_per_gb": 6.45},
        "rathole-stunnel": {"up_mb_per_s": 600, "down_mb_per_s": 640, "relay_cpu_s_per_gb": 0.53},
        "rathole-tls": {"up_mb_per_s": 650, "down_mb_per_s": 630, "relay_cpu_s_per_gb": 1.12},
        "stunnel-haproxy": {"up_mb_per_s": 750, "down_mb_per_s": 730, "relay_cpu_s_per_gb": 0.4},
        "direct": {"up_mb_per_s": 5800, "down_mb_per_s": 3900},
    },
    "transfer": {
        name: {
            **{f"{way}_{size}mb_mb_per_s": value for way in ("up", "down") for size in (1, 10, 100)},
            **{f"streams{count}_mb_per_s": streams for count in (10, 100)},
        }
        for name, value, streams in (
            ("arcbridge", 500, 520),
            ("openssh", 330, 400),
            ("rathole-stunnel", 410, 390),
            ("stunnel-haproxy", 450, 540),
            ("direct", 3000, 4000),
        )
    },
    "resumption": {
        "arcbridge": {"up_mb_per_s": 880, "down_mb_per_s": 940, "ends_cpu_s_per_gb": 2.0},
        "arcbridge-without-resumption": {"up_mb_per_s": 900, "down_mb_per_s": 950, "ends_cpu_s_per_gb": 1.9},
    },
    "echo": {
        "arcbridge": {"p50_us": 168, "p99_us": 250, "per_s": 5800},
        "openssh": {"p50_us": 186, "p99_us": 276, "per_s": 5300},
        "chisel": {"p50_us": 205, "p99_us": 342, "per_s": 4800},
        "rathole-stunnel": {"p50_us": 178, "p99_us": 267, "per_s": 5500},
        "stunnel-haproxy": {"p50_us": 122, "p99_us": 198, "per_s": 8000},
        "direct": {"p50_us": 52, "p99_us": 67, "per_s": 19000},
    },
    "concurrent": {
        "arcbridge": {"per_s": 41000, "p99_us": 1500},
        "openssh": {"per_s": 16255, "p99_us": 2500},
        "chisel": {"per_s": 19269, "p99_us": 3000},
        "direct": {"per_s": 135740, "p99_us": 400},
    },
    "concurrent256": {
        "arcbridge": {"per_s": 43000, "p99_us": 9000},
        "openssh": {"per_s": 16000, "p99_us": 21000},
        "chisel": {"per_s": 22000, "p99_us": 30000},
    },
    "open": {
        "arcbridge": {"per_s": 2500, "eight_per_s": 5200},
        "openssh": {"per_s": 31, "eight_per_s": 3000},
        "chisel": {"per_s": 1500, "eight_per_s": 3400},
    },
    "keystroke": {
        "arcbridge": {"p50_us": 400, "p99_us": 900, "idle_p99_us": 310, "up_mb_per_s": 400, "down_mb_per_s": 410},
        "openssh": {"p50_us": 2400, "p99_us": 9000, "idle_p99_us": 320, "up_mb_per_s": 240, "down_mb_per_s": 230},
    },
    "last_mile": {
        "arcbridge": {"echo_p99_ms": 80, "echo_p50_ms": 55, "bulk_percent_of_link": 96}
        | {"down_echo_p99_ms": 90, "down_percent_of_link": 95},
        "openssh": {"echo_p99_ms": 1900, "echo_p50_ms": 1700, "bulk_percent_of_link": 97}
        | {"down_echo_p99_ms": 1800, "down_percent_of_link": 97},
    },
    "long_path": {
        "arcbridge": {"percent_of_link": 93, "up_mb_per_s": 46.5, "first_byte_round_trips": 1.02},
        "openssh": {"percent_of_link": 41, "up_mb_per_s": 20.5, "first_byte_round_trips": 1.03},
        "direct": {"percent_of_link": 99, "up_mb_per_s": 49.5, "first_byte_round_trips": 2.0},
    },
    "streams": {
        name: {
            f"n{count}_{metric}": value * (1 + factor * index)
            for index, count in enumerate((1, 10, 100, 1000, 5000))
            for metric, value in (
                ("mb_per_s", 800.0 / (2 - factor)),
                ("p99_us", 300.0 * 5**index),
                ("rss_mb", 60.0),
                ("cpu_us_per_request", 50.0),
            )
        }
        for name, factor in (("arcbridge", 0.03), ("openssh", 0.5), ("chisel", 0.3))
    },
}

STUDIES: dict[str, dict[str, float]] = {
    "start": {"version_ms": 31, "client_ready_ms": 320, "first_byte_ms": 9, "first_byte_beyond_5_round_trips_ms": 12},
    "scale": {"sessions": 10_000, "agents": 5_000, "session_rss_kib": 14, "agent_rss_kib": 41}
    | {"idle_percent_of_a_core": 6},
    "kubernetes": {"get_p50_overhead_ms": 0.8, "get_ratio": 0.55, "list_mb_per_s": 340, "watches": 500}
    | {"agent_cpu_us_per_request": 140, "agent_cpu_ms_per_exec": 3.9},
    "workers": {"one_mb_per_s": 700, "two_mb_per_s": 1190, "ratio": 1.7},
}


def result(scenarios: Mapping[str, Figures] = SCENARIOS, studies: Figures = STUDIES) -> dict[str, Any]:
    """What a run would have written."""
    return {
        "commit": "0123456789abcdef",
        "complete": True,
        "machine": {
            **{"cores": 2, "cpu": "A CPU", "memory_gb": 8.0, "kernel": "6.1", "system": "Linux", "python": "3.11.7"},
            **{"uvloop": "0.23.0", "cryptography": "50.0.0", "openssl": "OpenSSL 3.0.19", "load_average_before": 0.1},
            **{"load_average_after": 2.2, "steal_percent": 0.05, "date": "2026-01-31T12:00:00+00:00"},
        },
        "command": "python -m bench --full",
        "rounds": 3,
        "seconds_per_measurement": 1.5,
        "seconds_in_all": 1234.5,
        "plan": {
            name: {
                "title": f"what {name} does",
                "primary": list(dict.fromkeys(metric for found in measured.values() for metric in found)),
                "path": "100 ms" if name == "long_path" else "",
                "rounds": 3,
                "seconds": 1.5,
            }
            for name, measured in scenarios.items()
        },
        "systems": {
            name: {
                "version": "1.0",
                "standing": standing,
                "multiplexes": not name.startswith("rathole"),
                "roles": ["relay", "agent"] if name == "rathole-tls" else ["client", "relay", "agent"],
                "encrypts": "what it encrypts",
                "encryption_shown_by": "a recording",
                "tuned": "at its best",
                "seconds_to_start": 1.0,
                "resident_mb_before": {"relay": 10.0},
                "resident_mb_after": {"relay": 12.5},
            }
            for name, standing in SYSTEMS.items()
        },
        "left_out": {"konnectivity": "needs go | apt-get install golang"},
        "failures": ["round 2, open, chisel: a connection gave no byte"],
        "resumption_costs_percent": {},
        "scenarios": {
            name: {
                system: summary([{m: v * share for m, v in figures.items()} for share in (0.9, 1.0, 1.2)])
                for system, figures in measured.items()
            }
            for name, measured in scenarios.items()
        },
        "studies": {
            name: {"title": f"how {name} is", "values": dict(values), "runs": [], "notes": ["a note"]}
            for name, values in studies.items()
        },
        "log": [],
    }
