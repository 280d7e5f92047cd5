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
            echo "arcbridge-@ROLE@: $kept is kept; remove it by hand once nobody needs its keys and records" >&2
        fi
    done
fi
