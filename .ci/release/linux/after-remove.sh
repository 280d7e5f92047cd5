#!/bin/sh
# dpkg: "remove", "purge" and others; rpm: how many versions are left.
set -e

if [ "$1" = purge ]; then
    rm -f /etc/systemd/system/multi-user.target.wants/arcbridge-@ROLE@.service
fi
if [ -d /run/systemd/system ]; then
    systemctl daemon-reload
fi
if [ "$1" = purge ] || [ "$1" = 0 ]; then
    for kept in @STATE@; do
        # Keys, of which another installation has need, and records of what was done.
        if [ -e "$kept" ]; then
            # A relay's is a link that systemd has made: without it the keys would still be there.
            echo "arcbridge-@ROLE@: $(readlink -f "$kept") is kept; remove it by hand when no installation needs its keys and" >&2
            echo "no audit needs its records." >&2
        fi
    done
fi
