#!/bin/sh
# dpkg: "remove" (or "upgrade"); rpm: how many versions are left then.
set -e

unit=arcbridge-@ROLE@.service
if [ "$1" = remove ] || [ "$1" = 0 ]; then
    if [ -d /run/systemd/system ]; then
        systemctl --quiet stop "$unit"
    fi
fi
# dpkg's `remove` keeps the settings, and whether the service is started at boot is one: `purge` takes it (after-remove.sh).
if [ "$1" = 0 ]; then
    systemctl --quiet disable "$unit" || true
fi
