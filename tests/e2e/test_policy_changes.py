"""The policy, with real processes: changes that are not meant, tests in the file, and who is refused and why."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.cluster import KUBECTL_MINORS, Cluster
from tests.support.processes import run
from tests.support.reports import metrics, records, rewrite, until, wait_for_record
from tests.support.world import ALICE, BOB, CLUSTER, MALLORY, ApiServer, World, arcbridge

RULES = (
    '[[allow]]\ngroups = ["platform"]\nclusters = ["berlin-*"]\n\n'
    '[[allow]]\ngroups = ["oidc:interns"]\nclusters = ["berlni-factory"]\n'
)


def policy(world: World, *words: str) -> subprocess.CompletedProcess[bytes]:
    """Run one of the operator's commands about the policy."""
    return run([*arcbridge("--role", "relay", "policy", *words, "--config", str(world.relay_config))], check=False)


@pytest.mark.timeout(300)
def test_an_emptied_policy_cuts_nobody_until_it_is_accepted(api: ApiServer, cluster: Cluster) -> None:
    """docs/threats.md#V19. With two workers, of which each holds it back and one command accepts it at both."""
    with World(api) as world:
        world.relay_settings = "workers = 2"
        world.start()
        client = world.start_client(ALICE)
        kubectl = cluster.kubectl_for(KUBECTL_MINORS[0], client.kubeconfig)
        kubectl.run("get", "namespace", "default")
        file = world.relay_config.parent / "policy.toml"
        mark = world.relay.mark()
        rewrite(file, "# everything was deleted\n")
        held = wait_for_record(world.relay, "policy held back", after=mark)
        assert (held["level"], held["users_lost"]) == ("error", held["sessions_lost"])
        assert "it has no rule" in held["reason"]
        kubectl.run("get", "namespace", "default")

        def listed() -> list[dict[str, object]]:
            return list(json.loads(policy(world, "list", "-o", "json").stdout))

        until(lambda: [row["held"] for row in listed()] == [held["hash"]] * 2, "both workers hold it back")
        until(
            lambda: metrics(world.relay_observe)['arcbridge_relay_check_ok{check="policy"}'] == 0,
            "the metric says so",
            timeout=30,
        )
        refused = policy(world, "accept", "0" * 12)
        assert refused.returncode
        assert b"is held back: 'policy list' shows what is in force" in refused.stderr
        accepted = policy(world, "accept", str(held["hash"]))
        assert accepted.stdout.decode() == f"version {held['hash']} of the policy counts from now on\n"
        taken = wait_for_record(world.relay, "policy taken over", after=mark)
        assert (taken["hash"], taken["rules"]) == (held["hash"], 0)
        wait_for_record(world.relay, "sessions cut off", after=mark)
        assert [row["held"] for row in listed()] == ["", ""]


@pytest.fixture(scope="module")
def world(api: ApiServer) -> Iterator[World]:
    """A relay of two workers. Of the clusters that its policy names one is enrolled and one is mistyped."""
    with World(api) as made:
        made.relay_settings = "workers = 2"
        made.policy = RULES
        yield made.start()


def explained(world: World, *words: str) -> tuple[int, dict[str, Any]]:
    done = policy(world, "explain", *words, "-o", "json")
    return done.returncode, dict(json.loads(done.stdout))


@pytest.mark.timeout(300)
def test_who_is_refused_and_why_is_told_to_operator_and_user(world: World) -> None:
    """docs/threats.md#J22. The groups that came are in the log, in the user's own error, and in `policy explain`."""
    told = world.run_client(MALLORY, "run", "--", "kubectl", "version").stderr
    assert (
        f'cluster "{CLUSTER}" does not exist or you may not reach it; ask the relay\'s operator for access '
        "(known groups: none; 1 more came)" in told
    )
    refused = wait_for_record(world.relay, "join failed")
    assert (refused["rule"], refused["groups"], refused["more_groups"]) == ("policy.rule", [], 1)
    code, row = explained(world, MALLORY.email, CLUSTER)
    assert (code, row["allowed"], row["token"]["from"], row["token"]["more"]) == (1, False, "join", 1)
    assert (row["cluster_state"], row["agents"], row["running"]) == ("Connected", 1, True)
    # The prefix is the mistake; the group's name shows it.
    code, row = explained(world, "--groups", "interns,other", CLUSTER)
    assert (code, row["rule"], row["line"], row["lacks"]) == (1, "allow[0]", 1, ["group"])
    code, row = explained(world, "--groups", "interns", "berlni-factory")
    assert (code, row["rule"], row["near"], row["did_you_mean"]) == (1, "allow[1]", "oidc:interns", CLUSTER)
    assert row["cluster_state"] == "not enrolled"
    world.start_client(ALICE)
    done = policy(world, "explain", ALICE.email, CLUSTER)
    assert done.returncode == 0, done
    first, *others = done.stdout.decode().splitlines()
    assert first == (
        f'user "{ALICE.email}" in the groups "platform" may reach "{CLUSTER}": allow[0] (line 1) allows it, by the '
        'group "platform"'
    )
    assert others[1].startswith("groups: 1 that the policy names and 0 more, of a session at 20")
    assert others[2:] == ["cluster: Connected, agents: 1"]


@pytest.mark.timeout(300)
def test_another_policy_is_compared_before_it_counts(world: World, tmp_path: Path) -> None:
    """With what connected users lose by name, warnings and tests; nothing is changed by it."""
    client = world.start_client(ALICE)
    other = tmp_path / "other.toml"
    other.write_text(RULES)
    assert policy(world, "diff", str(other)).returncode == 0
    other.write_text(RULES.replace('"platform"', '"developers"'))
    done = policy(world, "diff", str(other))
    assert done.returncode == 1, done
    assert b'no cluster that is enrolled is "berlni-factory"; did you mean "berlin-factory"?' in done.stderr
    text = done.stdout.decode()
    assert re.search(r"\nchanged +allow\[0\] +1 +group developers +group platform\n", text)
    assert re.search(rf"\n{CLUSTER} +group developers +group platform\n", text)
    assert re.search(rf"\n{ALICE.email} +[1-9] +- +{CLUSTER}\n", text)
    row = json.loads(policy(world, "diff", str(other), "-o", "json").stdout)
    assert [(one["user"], one["loses"]) for one in row["users"]] == [(ALICE.email, [CLUSTER])]
    other.write_text(f'{RULES}\n[[test]]\ngroups = ["platform"]\ndeny = ["{CLUSTER}"]\n')
    done = policy(world, "diff", str(other))
    assert done.returncode == 2
    assert f'line 9: test[0]: a user in the groups "platform" must not reach "{CLUSTER}": allow[0] (line 1)' in (
        done.stderr.decode()
    )
    assert client.process.running
    assert records(world.relay, "policy taken over") == []


@pytest.mark.timeout(300)
def test_a_version_whose_tests_fail_counts_nowhere(world: World) -> None:
    """At `config check` and at a start it is an error, and at a relay that runs the former version stays in force."""
    file = world.relay_config.parent / "policy.toml"
    mark = world.relay.mark()
    failing = f'{RULES}\n[[test]]\nuser = "bob@example.com"\naccept = ["{CLUSTER}"]\n'
    rewrite(file, failing)
    refused = wait_for_record(world.relay, "policy not taken over", after=mark)
    words = (
        f'line 9: test[0]: user "{BOB.email}" has to reach "{CLUSTER}": no rule allows it, and the nearest, allow[0]'
    )
    assert words in refused["reason"]
    assert len({row["hash"] for row in json.loads(policy(world, "list", "-o", "json").stdout)}) == 1
    check = run([*arcbridge("--role", "relay", "config", "check", "--config", str(world.relay_config))], check=False)
    assert check.returncode == 2
    assert words in check.stderr.decode()
    started = run([*arcbridge("--role", "relay", "--config", str(world.relay_config), "--listen", "127.0.0.1:0")],
                  check=False)  # fmt: skip
    assert started.returncode == 2
    assert words in started.stderr.decode()
    mark = world.relay.mark()
    rewrite(file, failing.replace("accept", "deny"))
    wait_for_record(world.relay, "policy can be read again", after=mark)
    check = run([*arcbridge("--role", "relay", "config", "check", "--config", str(world.relay_config))], check=False)
    assert check.returncode == 0
    # The registry says which clusters there are.
    warned = 'allow[1].clusters: no cluster that is enrolled is "berlni-factory"; did you mean "berlin-factory"?'
    assert warned in check.stderr.decode()
    mark = world.relay.mark()
    rewrite(file, RULES.replace("platform", "developers").replace('"berlin-*"', '"munich-*", "berlin-*"'))
    wait_for_record(world.relay, "policy taken over", after=mark)
    found = wait_for_record(world.relay, "settings", after=mark, setting="policy")
    assert 'allow[0].clusters: no cluster that is enrolled is "munich-*"' in found["reason"]
    rewrite(file, RULES)
    # Without a relay that runs the file of the settings is compared.
    world.stop_relay()
    other = file.with_name("other.toml")
    other.write_text(RULES.replace('"platform"', '"developers"'))
    row = json.loads(policy(world, "diff", str(other), "-o", "json").stdout)
    assert (row["running"], row["users"], len(row["rules"])) == (False, [], 1)
    assert row["clusters"] == [{"cluster": CLUSTER, "gains": ["group developers"], "loses": ["group platform"]}]


@pytest.mark.timeout(300)
def test_a_wrong_groups_claim_is_named_at_first_look(api: ApiServer) -> None:
    """At the relay and at the agent: by a line of the log, a metric, and `doctor`."""
    with World(api) as world:
        plain = world.authentication

        def authentication(audience: str) -> str:
            return plain(audience).replace('"claim": "groups"', '"claim": "roles"')

        world.authentication = authentication
        world.policy = '[[allow]]\ngroups = ["platform"]\nusers = ["bob@example.com"]\nclusters = ["*"]\n'
        world.start()
        told = world.run_client(ALICE, "run", "--", "kubectl", "version").stderr
        assert '(the relay takes your groups from the claim "roles", which your token does not have)' in told
        refused = wait_for_record(world.relay, "join failed")
        assert refused["detail"] == "the token has no claim 'roles', from which its groups are taken"
        world.start_client(BOB)
        for role, process, config, port in (
            ("relay", world.relay, world.relay_config, world.relay_observe),
            ("agent", world.agent, world.agent_config, world.agent_observe),
        ):
            line = wait_for_record(process, "token without groups")
            assert (line["level"], line["claim"], line["issuer"]) == ("warning", "roles", world.issuer.url)
            assert metrics(port)[f"arcbridge_{role}_tokens_without_groups_total"] >= 1
            done = run([*arcbridge("--role", role, "doctor", "--config", str(config), "-o", "json")], check=False)
            assert "token_groups" in [hop["code"] for hop in json.loads(done.stdout)["hops"]], done
