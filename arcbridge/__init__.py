"""arcbridge: kubectl access to clusters behind firewalls, through a relay that cannot read what it carries."""

__version__ = "0.2.0"
