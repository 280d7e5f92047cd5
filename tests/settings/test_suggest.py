"""What is said of a word that is not known."""

from arcbridge.settings.suggest import listed, nearest, unknown


def test_the_nearest_and_all() -> None:
    formats = ("table", "json", "yaml")
    assert unknown("flag --output", "jsn", formats) == (
        "flag --output: 'jsn' is unknown; did you mean json? Use table, json or yaml"
    )
    assert unknown("flag --output", "html", formats) == "flag --output: 'html' is unknown; use table, json or yaml"
    assert unknown("x", "y" * 40, ("a",)) == f"x: '{'y' * 20}…' is unknown; use a"
    assert nearest("stauts", ("status", "stop")) == "status"
    assert nearest("zzz", ("status",)) == ""
    assert listed(("one",)) == "one"
